//! The connector: what this host tells about itself. Reads files and asks the kernel; starts nothing.

use std::collections::BTreeMap;
use std::net::IpAddr;

use tether_agent_core::failure::{Failure, Reason};
use tether_proto::{Connector, Iqn};

use crate::hypervisor::libvirt::LibvirtError;

/// Where open-iscsi keeps the name of this host.
pub(crate) const INITIATOR_NAME: &str = "/etc/iscsi/initiatorname.iscsi";

/// Reads the connector. A libvirt that is away leaves its versions out: the export does not need them.
pub(crate) fn read(
    iscsi_version: Option<String>,
    hypervisor: Result<[String; 2], LibvirtError>,
) -> Result<Connector, Failure> {
    let missing = |why: String| {
        Failure::new(Reason::NoInitiatorName, format!("{INITIATOR_NAME}: {why}")).at("read-initiator-name")
    };
    let text = std::fs::read_to_string(INITIATOR_NAME).map_err(|error| missing(error.to_string()))?;
    let initiator_iqn = parse_initiator_name(&text).map_err(missing)?;
    let mut versions = BTreeMap::from([("tether".to_owned(), env!("CARGO_PKG_VERSION").to_owned())]);
    let kernel = nix::sys::utsname::uname().ok().map(|name| name.release().to_string_lossy().into_owned());
    let (libvirt, qemu) = match hypervisor {
        Ok([libvirt, qemu]) => (Some(libvirt), Some(qemu)),
        Err(error) => {
            tracing::warn!(%error, "connector without the hypervisor's versions");
            (None, None)
        }
    };
    for (name, version) in
        [("kernel", kernel), ("open-iscsi", iscsi_version), ("libvirt", libvirt), ("qemu", qemu)]
    {
        if let Some(version) = version {
            versions.insert(name.to_owned(), version);
        }
    }
    let hostname = nix::unistd::gethostname()
        .ok()
        .and_then(|name| name.into_string().ok())
        .ok_or_else(|| Failure::new(Reason::Internal, "this host has no name"))?;
    Ok(Connector { hostname, initiator_iqn, addresses: addresses(), versions })
}

/// `InitiatorName=iqn…`, with comments and other lines around it.
pub(crate) fn parse_initiator_name(text: &str) -> Result<Iqn, String> {
    let mut names = text.lines().filter_map(|line| line.trim().strip_prefix("InitiatorName=")).map(str::trim);
    match (names.next(), names.next()) {
        (Some(name), None) => name.parse().map_err(|error: tether_proto::ParseError| error.to_string()),
        (None, _) => Err("no line begins with InitiatorName=".to_owned()),
        (Some(_), Some(_)) => Err("more than one line begins with InitiatorName=".to_owned()),
    }
}

/// The host's addresses that another host could reach.
fn addresses() -> Vec<IpAddr> {
    let Ok(interfaces) = nix::ifaddrs::getifaddrs() else { return Vec::new() };
    let mut addresses: Vec<IpAddr> = interfaces
        .filter_map(|interface| {
            let address = interface.address?;
            if let Some(v4) = address.as_sockaddr_in() {
                return Some(IpAddr::V4(v4.ip()));
            }
            Some(IpAddr::V6(address.as_sockaddr_in6()?.ip()))
        })
        .filter(|address| match address {
            IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local(),
            IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local(),
        })
        .collect();
    addresses.sort();
    addresses.dedup();
    addresses
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tether_proto::mangled;

    proptest! {
        #[test]
        fn a_damaged_initiator_name_is_refused_or_legal(text in mangled("# name\nInitiatorName=iqn.1993-08.org.debian:01:ab\n")) {
            if let Ok(name) = parse_initiator_name(&text) {
                prop_assert!(name.as_str().parse::<Iqn>().is_ok());
            }
        }
    }

    #[test]
    fn the_initiator_name_is_read_as_debian_writes_it() {
        let text = "## DO NOT EDIT\n# InitiatorName=iqn.none\n\nInitiatorName=iqn.1993-08.org.debian:01:AB\n";
        assert_eq!(parse_initiator_name(text).unwrap().as_str(), "iqn.1993-08.org.debian:01:ab");
        assert!(parse_initiator_name("GenerateName=yes\n").unwrap_err().contains("InitiatorName="));
        assert!(parse_initiator_name("InitiatorName=x\n").is_err());
        assert!(parse_initiator_name(&text.repeat(2)).is_err());
    }
}
