//! A server, a shared directory and a file in it, as text that is safe in exports(5), an argument and XML. Not here: what is
//! in the file (`format`), and the connection that they make (`nfs`).

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::ParseError;

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

#[cfg(test)]
mod tests {
    use super::*;

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
}
