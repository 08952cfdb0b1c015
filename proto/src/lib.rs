//! The wire of Tether, package `tether.v1`, and the domain types that it is parsed into.
//!
//! [`wire`] is generated from `proto/tether/v1/*.proto`, which document every message. All else here is what the
//! agents work with: parse once at the edge (`TryFrom` the wire message or `FromStr`), and no strings behind it.
//! No I/O lives here.

mod connection;
mod disk;
pub mod finding;
mod format;
#[cfg(fuzzing)]
pub mod fuzz;
mod identity;
mod iqn;
#[cfg(feature = "testing")]
mod mangled;
mod names;
mod nfs;
mod portal;
mod role;
mod secret;
mod share;
mod size;
mod wire_debug;

pub use connection::{AccessMode, ConnectionInfo, Connector, IscsiConnection, MutualChap, Transport};
pub use disk::{DiskBus, DiskCache, DiskDiscard, DiskIo, DiskOptions, TargetDevice};
pub use finding::{Finding, Severity};
pub use format::VolumeFormat;
pub use identity::{AttachmentId, Serial, Wwn};
pub use iqn::Iqn;
#[cfg(feature = "testing")]
pub use mangled::mangled;
pub use names::{DomainName, PoolName, VolumeKey, VolumeName};
pub use nfs::{FileSystemId, NfsConnection};
pub use portal::Portal;
pub use role::{NEEDED, Role};
pub use secret::{Secret, exposed};
pub use share::{FileName, ServerAddress, SharePath};
pub use size::ByteSize;

/// The generated messages, clients and servers.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::allow_attributes_without_reason,
    reason = "generated; the documentation is in the .proto files"
)]
pub mod wire {
    tonic::include_proto!("tether.v1");
}

/// The compiled descriptors of `tether.v1`, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// What is wrong with a value that came from outside.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}, got {value}")]
pub struct ParseError {
    /// The field or kind of value, such as `volume` or `portal`.
    pub field: &'static str,
    /// What it must be.
    pub problem: String,
    /// What it was: quoted, control characters escaped, shortened.
    pub value: String,
}

impl ParseError {
    /// An error about `value`, which is shortened to 80 characters and escaped so that it can be shown and logged.
    pub fn new(field: &'static str, problem: impl Into<String>, value: &str) -> Self {
        let shown: String = value.chars().take(80).collect();
        let more = if shown.len() < value.len() {
            format!(" ... ({} characters)", value.chars().count())
        } else {
            String::new()
        };
        Self { field, problem: problem.into(), value: format!("{shown:?}{more}") }
    }

    /// An error about a field that is missing.
    pub fn missing(field: &'static str) -> Self {
        Self { field, problem: "must be given".into(), value: "nothing".into() }
    }
}
