//! The storage agent's config file, with every default.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;
use tether_agent_core::config::{ConfigError, Danger, Server};
use tether_agent_core::daemon::AgentConfig;
use tether_proto::{Iqn, PoolName, Portal};

/// `storage-agent.toml`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    /// Where the agent keeps its journal.
    #[serde(default = "default_state_directory")]
    pub(crate) state_directory: PathBuf,
    /// How the agent is reached.
    #[serde(default = "default_server")]
    pub(crate) server: Server,
    /// How exports are reached.
    pub(crate) iscsi: Iscsi,
    /// Where volumes live, by pool name.
    #[serde(default)]
    pub(crate) pool: BTreeMap<PoolName, Pool>,
    /// What nobody should need.
    #[serde(default)]
    pub(crate) danger: Danger,
}

/// `[iscsi]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Iscsi {
    /// Addresses of this host on the storage network, each with its port. An export listens on those
    /// that the host has when it is made.
    pub(crate) portals: Vec<Portal>,
    /// What each target's name begins with; `:` and the attachment id follow. Unique to this host.
    pub(crate) iqn_prefix: Iqn,
}

/// `[pool.NAME]`
#[derive(Debug, Clone, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Pool {
    /// A volume group, or a thin pool in it.
    Lvm {
        /// The volume group.
        volume_group: String,
        /// The thin pool in it; left out, volumes are thick.
        thin_pool: Option<String>,
        /// The group's physical volumes. LVM is told to see these and nothing else (F10).
        devices: Vec<PathBuf>,
    },
}

fn default_state_directory() -> PathBuf {
    "/var/lib/tether/storage-agent".into()
}

fn default_server() -> Server {
    Server {
        listen: None,
        socket: "/run/tether/storage-agent.sock".into(),
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
        if self.iscsi.portals.is_empty() {
            return Err(ConfigError::value(
                "iscsi.portals",
                "must name at least one address of this host, as in [\"192.0.2.1:3260\"]",
            ));
        }
        // 223 bytes is the most an iSCSI name may have; ':' and a UUID follow the prefix.
        if self.iscsi.iqn_prefix.as_str().len() > 223 - 37 {
            return Err(ConfigError::value("iscsi.iqn_prefix", "must have at most 186 bytes"));
        }
        for (name, Pool::Lvm { volume_group, thin_pool, devices }) in &self.pool {
            let key = |field: &str| format!("pool.{name}.{field}");
            if !is_lvm_name(volume_group) {
                return Err(ConfigError::value(key("volume_group"), "is no name of a volume group"));
            }
            if thin_pool.as_deref().is_some_and(|pool| !is_lvm_name(pool)) {
                return Err(ConfigError::value(key("thin_pool"), "is no name of a thin pool"));
            }
            if devices.is_empty() || devices.iter().any(|device| !device.starts_with("/dev")) {
                return Err(ConfigError::value(
                    key("devices"),
                    format!(
                        "must list the group's physical volumes, as in [\"/dev/sdb\"]; see: pvs -S vg_name={volume_group}"
                    ),
                ));
            }
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

/// lvm(8), "Valid names".
fn is_lvm_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..")
        && !name.starts_with('-')
        && name.len() <= 127
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.+-".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        [iscsi]
        portals = ["10.0.0.1:3260", "[fd00::1]:3260"]
        iqn_prefix = "iqn.2026-11.internal.tether:storage1"
        [pool.fast]
        kind = "lvm"
        volume_group = "vg0"
        devices = ["/dev/sdb"]
    "#;

    fn problem(text: &str) -> String {
        match toml::from_str::<Config>(text) {
            Err(error) => error.to_string(),
            Ok(config) => config.check().expect_err("must be refused").to_string(),
        }
    }

    #[test]
    fn a_small_config_is_enough() {
        let config: Config = toml::from_str(GOOD).unwrap();
        config.check().unwrap();
        assert_eq!(config.server.socket.to_str(), Some("/run/tether/storage-agent.sock"));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (from, to, words) in [
            ("portals = [", "portal = [", "unknown field `portal`"),
            (":3260\",", "\",", "must have a port"),
            ("iqn.2026-11", "iqn.26-11", "YYYY-MM"),
            ("\"lvm\"", "\"zfs\"", "unknown variant `zfs`"),
            ("\"vg0\"", "\"../vg0\"", "pool.fast.volume_group"),
            ("[\"/dev/sdb\"]", "[]", "pool.fast.devices"),
            ("[pool.fast]", "[pool.\"a/b\"]", "pool"),
            ("[iscsi]", "[server]\nsocket = \"/run/x\"\nlisten = \"0.0.0.0:7440\"\n[iscsi]", "server.ca"),
            ("[iscsi]", "[danger]\nplain = true\n[iscsi]", "unknown field `plain`"),
        ] {
            let text = GOOD.replacen(from, to, 1);
            let problem = problem(&text);
            assert!(problem.contains(words), "{problem}");
        }
    }
}
