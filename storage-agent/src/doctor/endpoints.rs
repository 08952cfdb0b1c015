//! Where hypervisors reach this host: which of the configured addresses it has, and where somebody listens. Whether they are
//! reached from the other side, only the other side can say.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};

use tether_agent_core::doctor::{Check, reach};
use tether_proto::{Finding, wire};

use crate::addresses;
use crate::config::Config;

const PORTALS: &str = "portals";
const SERVERS: &str = "nfs-addresses";
/// Where NFS 4 listens (RFC 8881 section 2.9.3).
const NFS_PORT: u16 = 2049;

/// Are the configured addresses this host's?
pub(super) fn checks(config: &Config) -> Vec<Check> {
    let portals = config.iscsi.as_ref().map(|iscsi| iscsi.portals.iter().map(|p| p.address()).collect());
    let servers = config.nfs.as_ref().map(|nfs| nfs.servers.iter().map(|s| s.address()).collect());
    let mut checks = Vec::new();
    for (name, key, addresses) in [(PORTALS, "[iscsi] portals", portals), (SERVERS, "[nfs] servers", servers)]
    {
        let Some(addresses): Option<Vec<IpAddr>> = addresses else { continue };
        checks.push(Check::reading(name, move || match addresses::own() {
            Ok(own) => vec![judge(name, key, &addresses, &own)],
            Err(failure) => {
                vec![Finding::warning(name, failure.to_string(), "not known whether it is reached")]
            }
        }));
    }
    checks
}

fn judge(check: &str, key: &str, configured: &[IpAddr], own: &HashSet<IpAddr>) -> Finding {
    let list =
        |addresses: &[&IpAddr]| addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let (here, elsewhere): (Vec<_>, Vec<_>) = configured.iter().partition(|address| own.contains(address));
    if elsewhere.is_empty() {
        return Finding::ok(check, format!("this host has {}", list(&here)));
    }
    let found = format!("this host has not: {}", list(&elsewhere));
    let mend =
        format!("ip address add {}/PREFIX dev INTERFACE   # or correct {key} in the config", elsewhere[0]);
    match here.is_empty() {
        true => Finding::error(check, found, "nobody can reach an export: none can be made").mend(mend),
        false => {
            Finding::warning(check, found, "exports leave it out, so nobody reaches them there").mend(mend)
        }
    }
}

/// The configured addresses with whether somebody listens there now.
pub(super) async fn of(config: &Config) -> Vec<wire::Endpoint> {
    let portals = config.iscsi.iter().flat_map(|iscsi| &iscsi.portals);
    let portals = portals.map(|portal| (portal.socket_address(), wire::Transport::Iscsi));
    let servers = config.nfs.iter().flat_map(|nfs| &nfs.servers);
    let servers = servers.map(|server| (SocketAddr::new(server.address(), NFS_PORT), wire::Transport::Nfs));
    let (addresses, transports): (Vec<SocketAddr>, Vec<wire::Transport>) = portals.chain(servers).unzip();
    let reached = reach(&addresses).await;
    let endpoint = |(reached, transport): (wire::Reached, wire::Transport)| wire::Endpoint {
        address: reached.address,
        transport: transport.into(),
        listening: reached.answered,
    };
    reached.into_iter().zip(transports).map(endpoint).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tether_proto::Severity;

    #[test]
    fn an_address_that_the_host_has_not_is_told() {
        let [one, two]: [IpAddr; 2] = ["10.0.0.1", "fd00::1"].map(|text| text.parse().unwrap());
        let judge =
            |own: &[IpAddr]| judge(PORTALS, "[iscsi] portals", &[one, two], &own.iter().copied().collect());
        assert_eq!(judge(&[one, two]).severity, Severity::Ok);
        let some = judge(&[one]);
        assert_eq!(some.severity, Severity::Warning);
        assert!(
            some.found.contains("fd00::1") && some.mend.starts_with("ip address add fd00::1/"),
            "{some:?}"
        );
        assert_eq!(judge(&[]).severity, Severity::Error);
    }
}
