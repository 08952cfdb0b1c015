//! A file in a directory that is shared over NFS: who serves it, where it is, what it is. Wire to domain type and back. Not
//! here: how servers, paths and names are written (`share`).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{FileName, ParseError, ServerAddress, SharePath, VolumeFormat, wire};

/// The id of a file system as an NFS server shows it (RFC 8881 section 5.8.1.9): 16 bytes, written as a UUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct FileSystemId(Uuid);

impl FileSystemId {
    /// The id from a UUID; the nil UUID is refused.
    ///
    /// # Errors
    /// For the nil UUID.
    pub fn new(uuid: Uuid) -> Result<Self, ParseError> {
        if uuid.is_nil() {
            return Err(ParseError::new("file_system_id", "must not be the nil UUID", &uuid.to_string()));
        }
        Ok(Self(uuid))
    }

    /// As the kernel's client shows it in `/proc/fs/nfsfs/volumes`: two 64-bit numbers in hexadecimal, `%llx:%llx`
    /// (`nfs_volume_list_show` in the kernel's fs/nfs/client.c).
    pub fn as_kernel_shows_it(self) -> String {
        let (major, minor) = self.0.as_u64_pair();
        format!("{major:x}:{minor:x}")
    }
}

impl FromStr for FileSystemId {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        if text.is_empty() {
            return Err(ParseError::missing("file_system_id"));
        }
        let wrong = || ParseError::new("file_system_id", "must be a UUID with hyphens", text);
        if text.len() != 36 {
            return Err(wrong());
        }
        Self::new(Uuid::parse_str(text).map_err(|_| wrong())?)
    }
}

impl TryFrom<String> for FileSystemId {
    type Error = ParseError;
    fn try_from(text: String) -> Result<Self, ParseError> {
        text.parse()
    }
}

impl From<FileSystemId> for String {
    fn from(id: FileSystemId) -> String {
        id.to_string()
    }
}

impl fmt::Display for FileSystemId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

/// A file in a shared directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NfsConnection {
    /// Who serves it; at least one.
    pub servers: Vec<ServerAddress>,
    /// The shared directory on the server.
    pub path: SharePath,
    /// The file in it.
    pub file: FileName,
    /// What is in the file.
    pub format: VolumeFormat,
    /// The file's inode number, the same on both hosts, never 0.
    pub inode: u64,
    /// The id that the server shows for the share.
    pub file_system_id: FileSystemId,
    /// All of its space is taken, and a guest's discards are not to give it back.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keep_allocated: bool,
}

impl TryFrom<&wire::NfsConnection> for NfsConnection {
    type Error = ParseError;
    fn try_from(wire: &wire::NfsConnection) -> Result<Self, ParseError> {
        if wire.servers.is_empty() {
            return Err(ParseError::missing("servers"));
        }
        if wire.inode == 0 {
            return Err(ParseError::new("inode", "must be more than 0", "0"));
        }
        Ok(Self {
            servers: wire.servers.iter().map(|text| text.parse()).collect::<Result<_, _>>()?,
            path: wire.path.parse()?,
            file: wire.file.parse()?,
            format: wire.format.try_into()?,
            inode: wire.inode,
            file_system_id: wire.file_system_id.parse()?,
            keep_allocated: wire.keep_allocated,
        })
    }
}

impl From<&NfsConnection> for wire::NfsConnection {
    fn from(nfs: &NfsConnection) -> Self {
        Self {
            servers: nfs.servers.iter().map(ToString::to_string).collect(),
            path: nfs.path.to_string(),
            file: nfs.file.to_string(),
            format: wire::VolumeFormat::from(nfs.format).into(),
            inode: nfs.inode,
            file_system_id: nfs.file_system_id.to_string(),
            keep_allocated: nfs.keep_allocated,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::net::IpAddr;

    use super::*;
    use proptest::prelude::*;

    pub(crate) fn any_nfs_connection() -> impl Strategy<Value = NfsConnection> {
        (
            proptest::collection::vec(any::<IpAddr>(), 1..4),
            "(/[a-zA-Z0-9_+-][a-zA-Z0-9_.+-]{0,10}){1,4}",
            "[a-zA-Z0-9_][a-zA-Z0-9_.+-]{0,40}",
            any::<[bool; 2]>(),
            1u64..,
            1u128..,
        )
            .prop_filter_map(
                "servers must be addresses of one host",
                |(servers, path, file, [qcow2, keep_allocated], inode, id)| {
                    Some(NfsConnection {
                        servers: servers
                            .into_iter()
                            .map(|address| address.to_string().parse().ok())
                            .collect::<Option<_>>()?,
                        path: path.parse().ok()?,
                        file: file.parse().ok()?,
                        format: if qcow2 { VolumeFormat::Qcow2 } else { VolumeFormat::Raw },
                        inode,
                        file_system_id: FileSystemId::new(Uuid::from_u128(id)).ok()?,
                        keep_allocated,
                    })
                },
            )
    }

    /// Seen in the lab on kernel 6.1: `fsid=67e55044-…` is `67e5504410b1426f:9247bb680e5fe0c8` at the client.
    #[test]
    fn a_file_system_id_is_what_the_kernels_client_shows() {
        let id: FileSystemId = "67e55044-10b1-426f-9247-bb680e5fe0c8".parse().unwrap();
        assert_eq!(id.as_kernel_shows_it(), "67e5504410b1426f:9247bb680e5fe0c8");
        let small: FileSystemId = "00000000-0000-0001-0000-00000000000a".parse().unwrap();
        assert_eq!(small.as_kernel_shows_it(), "1:a");
        for bad in ["", "x", "00000000-0000-0000-0000-000000000000", "67e5504410b1426f9247bb680e5fe0c8"] {
            assert!(bad.parse::<FileSystemId>().is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn nfs_connections_go_both_ways(nfs in any_nfs_connection()) {
            prop_assert_eq!(NfsConnection::try_from(&wire::NfsConnection::from(&nfs)).unwrap(), nfs);
        }

        #[test]
        fn no_wire_message_makes_the_parser_panic(
            servers in proptest::collection::vec(".{0,30}", 0..3), text in ".{0,40}", format: i32, inode: u64
        ) {
            let _unused = NfsConnection::try_from(&wire::NfsConnection {
                servers, path: text.clone(), file: text.clone(), format, inode, file_system_id: text,
                keep_allocated: false,
            });
        }
    }
}
