//! The compute agent's config file, with every default.

use std::path::PathBuf;

use serde::Deserialize;
use tether_agent_core::config::{ConfigError, Danger, Server};
use tether_agent_core::daemon::AgentConfig;

/// `compute-agent.toml`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    /// Where the agent keeps its journal.
    #[serde(default = "default_state_directory")]
    pub(crate) state_directory: PathBuf,
    /// libvirt's URI.
    #[serde(default = "default_libvirt_uri")]
    pub(crate) libvirt_uri: String,
    /// How long a guest may take to let go of a disk when Detach does not say.
    #[serde(default = "default_guest_deadline_milliseconds")]
    pub(crate) guest_deadline_milliseconds: u64,
    /// How the agent is reached.
    #[serde(default = "default_server")]
    pub(crate) server: Server,
    /// What nobody should need.
    #[serde(default)]
    pub(crate) danger: Danger,
}

fn default_state_directory() -> PathBuf {
    "/var/lib/tether/compute-agent".into()
}

fn default_libvirt_uri() -> String {
    "qemu:///system".into()
}

fn default_guest_deadline_milliseconds() -> u64 {
    20_000
}

fn default_server() -> Server {
    Server {
        listen: None,
        socket: "/run/tether/compute-agent.sock".into(),
        certificate: None,
        key: None,
        ca: None,
    }
}

impl AgentConfig for Config {
    fn check(&self) -> Result<(), ConfigError> {
        self.server.check(self.danger)?;
        if !self.state_directory.is_absolute() {
            return Err(ConfigError::value("state_directory", "must be an absolute path"));
        }
        if self.libvirt_uri.is_empty() {
            return Err(ConfigError::value("libvirt_uri", "must be a libvirt URI, as in qemu:///system"));
        }
        if !(100..=3_600_000).contains(&self.guest_deadline_milliseconds) {
            return Err(ConfigError::value("guest_deadline_milliseconds", "must be from 100 to 3600000"));
        }
        Ok(())
    }

    fn server(&self) -> &Server {
        &self.server
    }

    fn danger(&self) -> Danger {
        self.danger
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_config_is_enough_on_the_host_itself() {
        let config: Config = toml::from_str("").unwrap();
        config.check().unwrap();
        assert_eq!(config.libvirt_uri, "qemu:///system");
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, words) in [
            ("libvirt_url = \"x\"", "unknown field `libvirt_url`"),
            ("guest_deadline_milliseconds = 1", "guest_deadline_milliseconds"),
            ("[server]\nsocket = \"x\"", "server.socket"),
            ("[server]\nsocket = \"/run/x\"\nlisten = \"[::]:7440\"", "server.ca"),
            ("state_directory = \"x\"", "state_directory"),
        ] {
            let problem = match toml::from_str::<Config>(text) {
                Err(error) => error.to_string(),
                Ok(config) => config.check().expect_err("must be refused").to_string(),
            };
            assert!(problem.contains(words), "{problem}");
        }
    }
}
