//! A file in a directory that is shared over NFS: who serves it, where it is, what it is. Wire to domain type and back.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{ParseError, wire};

/// What is in a volume. Stored, and never guessed from the content (F4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VolumeFormat {
    /// The guest's bytes and nothing else.
    #[default]
    Raw,
    /// QEMU's copy-on-write format, version 3, without a backing file.
    Qcow2,
}

impl VolumeFormat {
    /// libvirt's and QEMU's word for it; also the file name's extension.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

impl fmt::Display for VolumeFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for VolumeFormat {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        match text {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            _ => Err(ParseError::new("format", "must be one of: raw qcow2", text)),
        }
    }
}

impl TryFrom<i32> for VolumeFormat {
    type Error = ParseError;
    /// From the wire; what is not said is raw.
    fn try_from(number: i32) -> Result<Self, ParseError> {
        match wire::VolumeFormat::try_from(number) {
            Ok(wire::VolumeFormat::Unspecified | wire::VolumeFormat::Raw) => Ok(Self::Raw),
            Ok(wire::VolumeFormat::Qcow2) => Ok(Self::Qcow2),
            Err(_) => Err(ParseError::new(
                "format",
                "must be VOLUME_FORMAT_RAW or VOLUME_FORMAT_QCOW2",
                &number.to_string(),
            )),
        }
    }
}

impl From<VolumeFormat> for wire::VolumeFormat {
    fn from(format: VolumeFormat) -> Self {
        match format {
            VolumeFormat::Raw => Self::Raw,
            VolumeFormat::Qcow2 => Self::Qcow2,
        }
    }
}

/// The address of one NFS server, without a port. Written `192.0.2.1` or `2001:db8::1` (F40).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ServerAddress(IpAddr);

impl ServerAddress {
    /// The address.
    pub fn address(self) -> IpAddr {
        self.0
    }

    /// The share at `path` of this server as mount.nfs(8) takes it and the kernel shows it: `192.0.2.1:/srv/share`,
    /// `[2001:db8::1]:/srv/share`.
    pub fn share(self, path: &SharePath) -> String {
        match self.0 {
            IpAddr::V4(address) => format!("{address}:{path}"),
            IpAddr::V6(address) => format!("[{address}]:{path}"),
        }
    }
}

impl FromStr for ServerAddress {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let refuse = |problem: &str| ParseError::new("server", problem, text);
        let address: IpAddr = text.parse().map_err(|_| {
            refuse("must be an IPv4 or IPv6 address without a port, as in 192.0.2.1 or 2001:db8::1")
        })?;
        if address.is_unspecified() || address.is_multicast() {
            return Err(refuse("must be the address of one host"));
        }
        if matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local()) {
            return Err(refuse("must not be a link-local address: another host cannot reach it"));
        }
        Ok(Self(address))
    }
}

impl TryFrom<String> for ServerAddress {
    type Error = ParseError;
    fn try_from(text: String) -> Result<Self, ParseError> {
        text.parse()
    }
}

impl From<ServerAddress> for String {
    fn from(server: ServerAddress) -> String {
        server.to_string()
    }
}

impl fmt::Display for ServerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The path of a shared directory: absolute, 2 to 512 of `a-z A-Z 0-9 _ . + - /`, no empty, `.` or `..` part, no `/` at
/// its end. What is legal needs no quoting in exports(5), fstab(5), an argument or XML.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SharePath(String);

impl SharePath {
    /// The path as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Legal in names and paths alike.
fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"_.+-".contains(&byte)
}

impl FromStr for SharePath {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let refuse = |problem: &str| Err(ParseError::new("path", problem, text));
        let Some(relative) = text.strip_prefix('/') else {
            return refuse("must be absolute");
        };
        if !(2..=512).contains(&text.len()) {
            return refuse("must have 2 to 512 characters");
        }
        if !relative.split('/').all(|part| !matches!(part, "" | "." | "..") && part.bytes().all(is_plain)) {
            return refuse("may hold only a-z A-Z 0-9 _ . + - and /, and no empty, '.' or '..' part");
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for SharePath {
    type Error = ParseError;
    fn try_from(text: String) -> Result<Self, ParseError> {
        text.parse()
    }
}

impl From<SharePath> for String {
    fn from(path: SharePath) -> String {
        path.0
    }
}

impl fmt::Display for SharePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The name of a volume's file directly in its directory: 1 to 120 of `a-z A-Z 0-9 _ . + -`, beginning with a letter, digit
/// or `_`; so never a path, never hidden, never an option.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct FileName(String);

impl FileName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for FileName {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let first = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        if !(1..=120).contains(&text.len())
            || !text.bytes().all(is_plain)
            || !text.bytes().next().is_some_and(first)
        {
            return Err(ParseError::new(
                "file",
                "must have 1 to 120 of a-z A-Z 0-9 _ . + - and begin with a letter, digit or _",
                text,
            ));
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for FileName {
    type Error = ParseError;
    fn try_from(text: String) -> Result<Self, ParseError> {
        text.parse()
    }
}

impl From<FileName> for String {
    fn from(name: FileName) -> String {
        name.0
    }
}

impl fmt::Display for FileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

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
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) fn any_nfs_connection() -> impl Strategy<Value = NfsConnection> {
        (
            proptest::collection::vec(any::<IpAddr>(), 1..4),
            "(/[a-zA-Z0-9_+-][a-zA-Z0-9_.+-]{0,10}){1,4}",
            "[a-zA-Z0-9_][a-zA-Z0-9_.+-]{0,40}",
            any::<bool>(),
            1u64..,
            1u128..,
        )
            .prop_filter_map(
                "servers must be addresses of one host",
                |(servers, path, file, qcow2, inode, id)| {
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
                    })
                },
            )
    }

    #[test]
    fn paths_and_names_with_tricks_are_refused() {
        for bad in [
            "",
            "/",
            "srv/share",
            "/srv//share",
            "/srv/share/",
            "/srv/../etc",
            "/srv/./x",
            "/..",
            "/srv/a b",
            "/srv/a,b",
            "/srv/a:b",
            "/srv/$(reboot)",
            "/srv/a\nb",
            "/srv/a'b",
            "/srv/a(rw)",
            "/srv/\u{e9}",
            "/srv/*",
        ] {
            assert!(bad.parse::<SharePath>().is_err(), "{bad:?}");
        }
        for bad in ["", ".", "..", ".hidden", "-o", "a/b", "../a", "a b", "a,b", "a\0b", "a\nb", "\u{e9}"] {
            assert!(bad.parse::<FileName>().is_err(), "{bad:?}");
        }
        assert!("x".repeat(121).parse::<FileName>().is_err());
    }

    #[test]
    fn f40_servers_are_typed_and_shares_are_written_as_mount_takes_them() {
        let path: SharePath = "/srv/share".parse().unwrap();
        let share = |text: &str| text.parse::<ServerAddress>().unwrap().share(&path);
        assert_eq!(share("192.0.2.1"), "192.0.2.1:/srv/share");
        assert_eq!(share("2001:DB8::1"), "[2001:db8::1]:/srv/share");
        for bad in [
            "",
            "host",
            "192.0.2.1:2049",
            "[2001:db8::1]",
            "0.0.0.0",
            "::",
            "fe80::1",
            "fe80::1%2",
            "224.0.0.1",
            "10.0.0.1,rw",
            "-o",
        ] {
            assert!(bad.parse::<ServerAddress>().is_err(), "{bad:?}");
        }
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
            });
        }
    }
}
