//! The compute agent's config file, with every default.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Component, PathBuf};

use serde::Deserialize;
use tether_agent_core::config::{ConfigError, Danger, Metrics, Server};
use tether_agent_core::daemon::AgentConfig;
use tether_agent_core::reconcile::TombstoneDays;
use tether_agent_core::roles::Roles;

/// `compute-agent.toml`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    /// Where the agent keeps its journal.
    #[serde(default = "default_state_directory")]
    pub(crate) state_directory: PathBuf,
    /// For how many days ended attachments are remembered, so that a late call finds its id spent.
    #[serde(default)]
    pub(crate) tombstone_days: TombstoneDays,
    /// libvirt's URI.
    #[serde(default = "default_libvirt_uri")]
    pub(crate) libvirt_uri: String,
    /// How long a guest may take to let go of a disk when Detach does not say.
    #[serde(default = "default_guest_deadline_milliseconds")]
    pub(crate) guest_deadline_milliseconds: u64,
    /// How the agent is reached.
    #[serde(default = "default_server")]
    pub(crate) server: Server,
    /// How shares are mounted.
    #[serde(default)]
    pub(crate) nfs: Nfs,
    /// Where metrics are told.
    #[serde(default = "default_metrics")]
    pub(crate) metrics: Metrics,
    /// What nobody should need.
    #[serde(default)]
    pub(crate) danger: Danger,
}

/// `[nfs]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Nfs {
    /// The versions to mount with, tried in this order.
    pub(crate) versions: Vec<NfsVersion>,
    /// More options of nfs(5), one an entry. How a mount behaves when its server is away is not for anybody to change.
    pub(crate) options: Vec<MountOption>,
}

impl Default for Nfs {
    fn default() -> Self {
        Self { versions: vec![NfsVersion::V4_2, NfsVersion::V4_1], options: Vec::new() }
    }
}

/// A version of NFS. Version 3 has other locks, other ids and more daemons, and is not spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(crate) enum NfsVersion {
    #[serde(rename = "4.2")]
    V4_2,
    #[serde(rename = "4.1")]
    V4_1,
}

impl NfsVersion {
    /// As in `vers=`, and as the kernel shows it.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::V4_2 => "4.2",
            Self::V4_1 => "4.1",
        }
    }
}

/// One option of nfs(5): `NAME=NUMBER`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct MountOption(String);

/// What may be set, and from what to what. Nothing that changes who waits for what: `hard`, `retry` and the like are ours.
/// Outside of these the kernel would take another number and show that.
const MOUNT_OPTIONS: [(&str, std::ops::RangeInclusive<u32>); 5] = [
    ("nconnect", 1..=16),
    ("rsize", 1024..=1_048_576),
    ("wsize", 1024..=1_048_576),
    ("timeo", 1..=6000),
    ("retrans", 1..=100),
];

impl MountOption {
    /// The option as text.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for MountOption {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let legal = text.split_once('=').is_some_and(|(name, number)| {
            let digits = number.bytes().all(|b| b.is_ascii_digit()) && !number.starts_with('0');
            let number = number.parse().ok().filter(|_| digits);
            MOUNT_OPTIONS
                .iter()
                .any(|(known, range)| *known == name && number.is_some_and(|number| range.contains(&number)))
        });
        if legal {
            return Ok(Self(text));
        }
        let known = MOUNT_OPTIONS
            .iter()
            .map(|(name, range)| format!("{name} ({} to {})", range.start(), range.end()));
        Err(format!("{text:?} must be NAME=NUMBER: {}", known.collect::<Vec<_>>().join(", ")))
    }
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

fn default_metrics() -> Metrics {
    Metrics { listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 7442)) }
}

fn default_server() -> Server {
    Server {
        listen: None,
        socket: "/run/tether/compute-agent.sock".into(),
        certificate: None,
        key: None,
        ca: None,
        roles: Roles::default(),
    }
}

impl AgentConfig for Config {
    fn check(&self) -> Result<(), ConfigError> {
        self.server.check(self.danger)?;
        // Mounts are below it, and their paths go into domain XML and are compared with what the kernel shows.
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/_.+-".contains(&byte);
        let components = self.state_directory.components();
        let straight =
            components.clone().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
        if !self.state_directory.is_absolute()
            || !straight
            || components.as_path() != self.state_directory
            || !self.state_directory.as_os_str().as_encoded_bytes().iter().copied().all(plain)
        {
            return Err(ConfigError::value(
                "state_directory",
                "must be an absolute path of a-z A-Z 0-9 _ . + - and /, without . and ..",
            ));
        }
        if self.nfs.versions.is_empty() {
            return Err(ConfigError::value("nfs.versions", "must name at least one of \"4.2\" and \"4.1\""));
        }
        let names: BTreeSet<&str> =
            self.nfs.options.iter().filter_map(|o| o.as_str().split('=').next()).collect();
        if names.len() != self.nfs.options.len() {
            return Err(ConfigError::value("nfs.options", "must name each option once"));
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

    fn metrics(&self) -> SocketAddr {
        self.metrics.listen
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tether_proto::mangled;

    proptest! {
        #[test]
        fn a_damaged_config_is_refused_or_checked(text in mangled(include_str!("../../packaging/examples/compute-agent.toml"))) {
            if let Ok(config) = toml::from_str::<Config>(&text) {
                drop(config.check());
            }
        }
    }

    #[test]
    fn an_empty_config_is_enough_on_the_host_itself() {
        let config: Config = toml::from_str("").unwrap();
        config.check().unwrap();
        assert_eq!(config.libvirt_uri, "qemu:///system");
    }

    #[test]
    fn mount_options_are_numbers_of_known_names_and_nothing_else() {
        let config: Config = toml::from_str("[nfs]\noptions = [\"nconnect=4\", \"rsize=65536\"]").unwrap();
        config.check().unwrap();
        for bad in [
            "soft",
            "hard",
            "nconnect",
            "nconnect=",
            "nconnect=2,rw",
            "nconnect=2,soft",
            "x;reboot",
            "$(id)",
            "retry=100",
            "rsize=0x10",
            "rsize= 1",
            "nconnect=4\\n",
            "vers=3",
            "-o",
            "",
            "timeo=1=2",
            "timeo=0100",
            "timeo=9999",
            "nconnect=0",
            "nconnect=17",
        ] {
            let text = format!("[nfs]\noptions = [\"{bad}\"]");
            let problem = toml::from_str::<Config>(&text).expect_err(bad).to_string();
            assert!(problem.contains("NAME=NUMBER"), "{bad}: {problem}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, words) in [
            ("libvirt_url = \"x\"", "unknown field `libvirt_url`"),
            ("guest_deadline_milliseconds = 1", "guest_deadline_milliseconds"),
            ("[server]\nsocket = \"x\"", "server.socket"),
            ("[server]\nsocket = \"/run/x\"\nlisten = \"[::]:7440\"", "server.ca"),
            ("state_directory = \"x\"", "state_directory"),
            ("state_directory = \"/var/lib/../x\"", "state_directory"),
            ("state_directory = \"/var/lib/a b\"", "state_directory"),
            ("[nfs]\nversions = []", "nfs.versions"),
            ("[nfs]\nversions = [\"3\"]", "unknown variant `3`"),
            ("[nfs]\noptions = [\"timeo=100\", \"timeo=200\"]", "nfs.options"),
            ("[nfs]\noption = []", "unknown field `option`"),
        ] {
            let problem = match toml::from_str::<Config>(text) {
                Err(error) => error.to_string(),
                Ok(config) => config.check().expect_err("must be refused").to_string(),
            };
            assert!(problem.contains(words), "{problem}");
        }
    }
}
