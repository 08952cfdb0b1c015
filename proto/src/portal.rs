//! Where an iSCSI target listens, IPv4 or IPv6 (F40).

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::ParseError;

/// An address and a TCP port. Written `192.0.2.1:3260` or `[2001:db8::1]:3260`; the port is never left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Portal(SocketAddr);

impl Portal {
    /// The address with its port.
    pub fn socket_address(self) -> SocketAddr {
        self.0
    }

    /// The address.
    pub fn address(self) -> IpAddr {
        self.0.ip()
    }

    /// The TCP port, 1 to 65535.
    pub fn port(self) -> u16 {
        self.0.port()
    }
}

impl FromStr for Portal {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let refuse = |problem: &str| Err(ParseError::new("portal", problem, text));
        let address: SocketAddr = match text.parse() {
            Ok(address) => address,
            Err(_) if text.parse::<IpAddr>().is_ok() => {
                return refuse("must have a port, as in 192.0.2.1:3260 or [2001:db8::1]:3260");
            }
            Err(_) => return refuse("must be ADDRESS:PORT, as in 192.0.2.1:3260 or [2001:db8::1]:3260"),
        };
        if address.port() == 0 {
            return refuse("must have a port from 1 to 65535");
        }
        if address.ip().is_unspecified() || address.ip().is_multicast() {
            return refuse("must be the address of one host");
        }
        if matches!(address, SocketAddr::V6(v6) if v6.scope_id() != 0 || v6.ip().is_unicast_link_local()) {
            return refuse("must not be a link-local address: another host cannot reach it");
        }
        Ok(Self(address))
    }
}

impl TryFrom<String> for Portal {
    type Error = ParseError;
    fn try_from(text: String) -> Result<Self, ParseError> {
        text.parse()
    }
}

impl From<Portal> for String {
    fn from(portal: Portal) -> String {
        portal.to_string()
    }
}

impl fmt::Display for Portal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn f40_a_portal_without_a_port_or_address_is_refused() {
        for bad in [
            "",
            "10.0.0.1",
            "fd00::1",
            "[fd00::1]",
            "10.0.0.1:",
            "10.0.0.1:0",
            "10.0.0.1:65536",
            "host:3260",
            "0.0.0.0:3260",
            "[::]:3260",
            "[fe80::1]:3260",
            "[fe80::1%2]:3260",
            "fd00::1:3260",
            "224.0.0.1:3260",
        ] {
            assert!(bad.parse::<Portal>().is_err(), "{bad:?}");
        }
        assert!("10.0.0.1".parse::<Portal>().unwrap_err().to_string().contains("must have a port"));
    }

    proptest! {
        #[test]
        fn f40_portals_go_both_ways(address: IpAddr, port in 1u16..) {
            let text = SocketAddr::new(address, port).to_string();
            if let Ok(portal) = text.parse::<Portal>() {
                prop_assert_eq!(portal.to_string(), text);
                prop_assert_eq!((portal.address(), portal.port()), (address, port));
            }
        }
    }
}
