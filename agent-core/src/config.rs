//! Reading a config file, and the parts that both agents' configs share. Every default stands here or in the agent's
//! own config module, and nowhere else.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::roles::Roles;

/// Why a config cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("config {}: cannot be read; write one (see the example beside the package) or name another with --config", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// It is no legal config. The source shows line and column.
    #[error("config {}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong where.
        #[source]
        source: toml::de::Error,
    },
    /// A value cannot be used as it is.
    #[error("config: {key}: {problem}")]
    Value {
        /// The key.
        key: String,
        /// What is wrong, and what would be right.
        problem: String,
    },
    /// A file that a value names is there, and cannot be used as it is now. Who renews it may be about to change that.
    #[error("config: {key}: {} cannot be used: {problem}", path.display())]
    File {
        /// The key.
        key: String,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
}

impl ConfigError {
    /// An error about one key.
    pub fn value(key: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Value { key: key.into(), problem: problem.into() }
    }
}

/// Reads a TOML file into a type that refuses unknown keys.
///
/// # Errors
/// When it cannot be read or is no legal config.
pub fn load<C: DeserializeOwned>(path: &Path) -> Result<C, ConfigError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    toml::from_str(&text).map_err(|source| ConfigError::Parse { path: path.to_owned(), source })
}

/// How an agent is reached.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Server {
    /// Where the agent listens for gRPC with mTLS. Left out: only on the Unix socket.
    pub listen: Option<SocketAddr>,
    /// The Unix socket for root on this host, and for users that have a role.
    pub socket: PathBuf,
    /// The agent's certificate, PEM.
    pub certificate: Option<PathBuf>,
    /// Its private key, PEM, readable by nobody else.
    pub key: Option<PathBuf>,
    /// The authority whose client certificates are let in, PEM.
    pub ca: Option<PathBuf>,
    /// Who may do what.
    #[serde(default)]
    pub roles: Roles,
}

/// `[metrics]`
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    /// Where they are told, over HTTP and to whoever asks: an address of this host alone, or of a network for it.
    pub listen: SocketAddr,
}

/// What nobody should need.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Danger {
    /// TCP without TLS: whoever reaches the port gets in, as a controller. Warns at every start.
    pub plaintext: bool,
}

impl Server {
    /// Checks what can be checked without opening anything for good.
    ///
    /// # Errors
    /// When a certificate is missing or the key is open to others, or somebody has two roles.
    pub fn check(&self, danger: Danger) -> Result<(), ConfigError> {
        if !self.socket.is_absolute() {
            return Err(ConfigError::value("server.socket", "must be an absolute path"));
        }
        self.roles.check()?;
        if self.listen.is_some() && !danger.plaintext {
            crate::tls::server_config(self)?;
        }
        Ok(())
    }
}
