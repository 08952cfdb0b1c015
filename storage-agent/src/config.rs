//! The storage agent's config file, with every default.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use serde::Deserialize;
use tether_agent_core::config::{ConfigError, Danger, Metrics, Server};
use tether_agent_core::daemon::AgentConfig;
use tether_agent_core::reconcile::TombstoneDays;
use tether_agent_core::roles::Roles;
use tether_proto::{Iqn, PoolName, Portal, ServerAddress, SharePath};

/// `storage-agent.toml`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    /// Where the agent keeps its journal.
    #[serde(default = "default_state_directory")]
    pub(crate) state_directory: PathBuf,
    /// For how many days ended attachments are remembered, so that a late call finds its id spent.
    #[serde(default)]
    pub(crate) tombstone_days: TombstoneDays,
    /// How the agent is reached.
    #[serde(default = "default_server")]
    pub(crate) server: Server,
    /// How logical volumes are reached.
    pub(crate) iscsi: Option<Iscsi>,
    /// How files are reached.
    pub(crate) nfs: Option<Nfs>,
    /// Where volumes live, by pool name.
    #[serde(default)]
    pub(crate) pool: BTreeMap<PoolName, Pool>,
    /// Where metrics are told.
    #[serde(default = "default_metrics")]
    pub(crate) metrics: Metrics,
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

/// `[nfs]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Nfs {
    /// Addresses of this host on the storage network. An export names those that the host has when it is made.
    pub(crate) servers: Vec<ServerAddress>,
    /// Where hypervisors are. A directory is shared with those addresses of a connector that lie here, and no others.
    pub(crate) client_networks: Vec<IpNet>,
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
        /// From how full on the pool is told to those who watch and by the doctor, in percent; of a thin pool also its metadata.
        #[serde(default)]
        threshold_percent: Threshold,
    },
    /// A directory on this host that is shared over NFS.
    Directory {
        /// The directory; it is root's.
        path: SharePath,
        /// The user who owns the files, and whom every client is.
        owner_uid: u32,
        /// The group of the files.
        owner_gid: u32,
        /// From how full on the file system is told to those who watch, in percent.
        #[serde(default)]
        threshold_percent: Threshold,
    },
}

impl Pool {
    /// From how full on it is told.
    pub(crate) fn threshold_percent(&self) -> u8 {
        let (Self::Lvm { threshold_percent, .. } | Self::Directory { threshold_percent, .. }) = self;
        threshold_percent.0
    }
}

/// How full a pool may be before somebody should look, 1 to 100 percent.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(try_from = "u8")]
pub(crate) struct Threshold(u8);

impl Default for Threshold {
    fn default() -> Self {
        Self(80)
    }
}

impl TryFrom<u8> for Threshold {
    type Error = &'static str;
    fn try_from(percent: u8) -> Result<Self, Self::Error> {
        match percent {
            1..=100 => Ok(Self(percent)),
            _ => Err("threshold_percent must be 1 to 100"),
        }
    }
}

fn default_state_directory() -> PathBuf {
    "/var/lib/tether/storage-agent".into()
}

fn default_metrics() -> Metrics {
    Metrics { listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 7441)) }
}

fn default_server() -> Server {
    Server {
        listen: None,
        socket: "/run/tether/storage-agent.sock".into(),
        certificate: None,
        key: None,
        ca: None,
        roles: Roles::default(),
    }
}

impl AgentConfig for Config {
    fn check(&self) -> Result<(), ConfigError> {
        self.server.check(self.danger)?;
        if !self.state_directory.is_absolute() {
            return Err(ConfigError::value("state_directory", "must be an absolute path"));
        }
        if let Some(iscsi) = &self.iscsi {
            iscsi.check()?;
        }
        if let Some(nfs) = &self.nfs {
            nfs.check()?;
        }
        for (name, pool) in &self.pool {
            let key = |field: &str| format!("pool.{name}.{field}");
            match pool {
                Pool::Lvm { .. } if self.iscsi.is_none() => {
                    return Err(ConfigError::value(
                        "iscsi",
                        format!("must be given: pool {name} is of kind lvm"),
                    ));
                }
                Pool::Lvm { volume_group, thin_pool, devices, .. } => {
                    check_lvm(key, volume_group, thin_pool.as_deref(), devices)?;
                }
                Pool::Directory { .. } if self.nfs.is_none() => {
                    let problem = format!("must be given: pool {name} is of kind directory");
                    return Err(ConfigError::value("nfs", problem));
                }
                Pool::Directory { owner_uid: 0 | u32::MAX, .. } => {
                    return Err(ConfigError::value(key("owner_uid"), NEVER_ROOT));
                }
                Pool::Directory { owner_gid: 0 | u32::MAX, .. } => {
                    return Err(ConfigError::value(key("owner_gid"), NEVER_ROOT));
                }
                Pool::Directory { path, .. } => self.check_alone(name, path)?,
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

    fn metrics(&self) -> SocketAddr {
        self.metrics.listen
    }
}

const NEVER_ROOT: &str =
    "must not be root's: whoever reaches the share is this user (on Debian, QEMU's is: id libvirt-qemu)";

impl Config {
    /// No pool's directory is another's, or in it: a name would be known twice.
    fn check_alone(&self, name: &PoolName, path: &SharePath) -> Result<(), ConfigError> {
        for (other, pool) in &self.pool {
            if let Pool::Directory { path: others, .. } = pool
                && other != name
                && Path::new(path.as_str()).starts_with(others.as_str())
            {
                let problem = format!("must not be in the directory of pool {other}, {others}");
                return Err(ConfigError::value(format!("pool.{name}.path"), problem));
            }
        }
        Ok(())
    }
}

impl Iscsi {
    fn check(&self) -> Result<(), ConfigError> {
        if self.portals.is_empty() {
            return Err(ConfigError::value(
                "iscsi.portals",
                "must name at least one address of this host, as in [\"192.0.2.1:3260\"]",
            ));
        }
        // 223 bytes is the most an iSCSI name may have; ':' and a UUID follow the prefix.
        if self.iqn_prefix.as_str().len() > 223 - 37 {
            return Err(ConfigError::value("iscsi.iqn_prefix", "must have at most 186 bytes"));
        }
        Ok(())
    }
}

impl Nfs {
    fn check(&self) -> Result<(), ConfigError> {
        if self.servers.is_empty() {
            return Err(ConfigError::value(
                "nfs.servers",
                "must name at least one address of this host, as in [\"192.0.2.1\"]",
            ));
        }
        if self.client_networks.is_empty() {
            return Err(ConfigError::value(
                "nfs.client_networks",
                "must name at least one network of hypervisors, as in [\"192.0.2.0/24\"]",
            ));
        }
        Ok(())
    }
}

fn check_lvm(
    key: impl Fn(&str) -> String,
    volume_group: &str,
    thin_pool: Option<&str>,
    devices: &[PathBuf],
) -> Result<(), ConfigError> {
    if !is_lvm_name(volume_group) {
        return Err(ConfigError::value(key("volume_group"), "is no name of a volume group"));
    }
    if thin_pool.is_some_and(|pool| !is_lvm_name(pool)) {
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
    Ok(())
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
    use proptest::prelude::*;
    use tether_proto::mangled;

    proptest! {
        #[test]
        fn a_damaged_config_is_refused_or_checked(text in mangled(include_str!("../../packaging/examples/storage-agent.toml"))) {
            if let Ok(config) = toml::from_str::<Config>(&text) {
                drop(config.check());
            }
        }
    }

    const FILES: &str = r#"
        [nfs]
        servers = ["10.0.0.1", "fd00::1"]
        client_networks = ["10.0.0.0/24", "fd00::/64"]
        [pool.share]
        kind = "directory"
        path = "/srv/share"
        owner_uid = 64055
        owner_gid = 64055
    "#;

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

    #[test]
    fn either_kind_of_pool_is_enough_and_needs_its_own_section() {
        for text in [FILES.to_owned(), format!("{GOOD}{FILES}")] {
            toml::from_str::<Config>(&text).unwrap().check().unwrap();
        }
        for (text, from, to, words) in [
            (FILES, "[nfs]\n", "[nfs]\nexports = 1\n", "unknown field `exports`"),
            (FILES, "servers = [\"10.0.0.1\", \"fd00::1\"]", "servers = []", "nfs.servers"),
            (FILES, "\"10.0.0.1\"", "\"10.0.0.1:2049\"", "without a port"),
            (FILES, "[\"10.0.0.0/24\", \"fd00::/64\"]", "[]", "nfs.client_networks"),
            (FILES, "10.0.0.0/24", "10.0.0.0/33", "invalid IP address syntax"),
            (FILES, "path = ", "paths = ", "path"),
            (FILES, "/srv/share", "/srv/a share", "may hold only"),
            (FILES, "/srv/share", "srv/share", "must be absolute"),
            (FILES, "owner_uid = 64055", "owner_uid = 0", "pool.share.owner_uid"),
            (FILES, "owner_gid = 64055", "owner_gid = 0", "pool.share.owner_gid"),
            (FILES, "owner_gid = 64055", "", "missing field `owner_gid`"),
        ] {
            let problem = problem(&text.replacen(from, to, 1));
            assert!(problem.contains(words), "{problem}");
        }
        let pool = |text: &str| text[text.find("[pool").unwrap()..].to_owned();
        assert!(problem(&pool(GOOD)).contains("iscsi: must be given"));
        assert!(problem(&pool(FILES)).contains("nfs: must be given"));
    }

    #[test]
    fn no_pools_directory_is_anothers_or_in_it() {
        let two = |path: &str| {
            format!(
                "{FILES}[pool.other]\nkind = \"directory\"\npath = {path:?}\nowner_uid = 1\nowner_gid = 1\n"
            )
        };
        for path in ["/srv/share", "/srv/share/deep", "/srv"] {
            assert!(problem(&two(path)).contains("must not be in the directory of pool"), "{path}");
        }
        toml::from_str::<Config>(&two("/srv/share2")).unwrap().check().unwrap();
    }
}
