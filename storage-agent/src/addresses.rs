//! This host's own addresses: which of the configured ones it has now. Not here: what is reached there.

use std::collections::HashSet;
use std::fmt::Display;
use std::net::IpAddr;

use tether_agent_core::failure::{Failure, Reason};

/// Those of the configured addresses that this host has now. LIO binds to any address (IP_FREEBIND) and nfsd to all, so
/// neither would say that nobody can reach the others. `what` is `portals` or `NFS servers`, `key` what the config calls
/// them.
pub(crate) fn here<T: Copy + Display>(
    configured: &[T],
    address: impl Fn(T) -> IpAddr,
    what: &str,
    key: &str,
) -> Result<Vec<T>, Failure> {
    let own = own()?;
    let (here, elsewhere): (Vec<T>, Vec<T>) =
        configured.iter().partition(|one| own.contains(&address(**one)));
    let list = elsewhere.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    if here.is_empty() {
        let problem = format!("this host has none of the addresses of its {what}: {list}");
        return Err(Failure::new(Reason::PortalUnavailable, problem)
            .at("validate")
            .next(format!("give the storage host that address, or correct {key} in its config")));
    }
    if !elsewhere.is_empty() {
        tracing::warn!(addresses = %list, what, "this host does not have these addresses now: left out of the export");
    }
    Ok(here)
}

/// All addresses that this host has now.
pub(crate) fn own() -> Result<HashSet<IpAddr>, Failure> {
    let interfaces = nix::ifaddrs::getifaddrs().map_err(|error| {
        Failure::new(Reason::Internal, format!("this host's addresses cannot be read: {error}"))
    })?;
    let address = |interface: nix::ifaddrs::InterfaceAddress| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
        v4.or_else(|| Some(IpAddr::V6(address.as_sockaddr_in6()?.ip())))
    };
    Ok(interfaces.filter_map(address).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_that_this_host_has_are_told() {
        let [own, other]: [IpAddr; 2] = ["127.0.0.1", "192.0.2.77"].map(|text| text.parse().unwrap());
        let found = here(&[other, own], |address| address, "NFS servers", "[nfs] servers").unwrap();
        assert_eq!(found, [own]);
        let none = here(&[other], |address| address, "NFS servers", "[nfs] servers").unwrap_err();
        assert_eq!(none.reason, Reason::PortalUnavailable);
        assert!(none.message.contains("192.0.2.77") && none.next.unwrap().contains("[nfs] servers"));
    }
}
