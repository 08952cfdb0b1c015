//! What no host sees by itself: whether storage hosts are reached from compute hosts, whether two have one initiator name
//! (F42), and how far their clocks are apart. Judges what agents told; asks nobody.

use std::collections::{BTreeMap, BTreeSet};

use tether_proto::{Finding, wire};

use super::Found;

const REACHED: &str = "reachability";
const NAMES: &str = "initiator-names";
const CLOCKS: &str = "clocks";
/// Hosts that are kept synchronised are within milliseconds.
const APART: i64 = 2_000_000;
/// From here on a fresh certificate may be not valid yet.
const FAR_APART: i64 = 60_000_000;
const WHY_REACHED: &str =
    "attaching a volume of that storage host to a domain there fails; guests that have one wait";
const WHY_NAMES: &str =
    "two hosts with one name are one to the target: each can use, and destroy, what is exported to the other";
const WHY_CLOCKS: &str = "certificates are valid by the clock, and logs of two hosts are put in order by it";
/// A host with sessions would not get back into them by its new name.
const NEW_NAME: &str = "iscsiadm -m session || { echo \"InitiatorName=$(iscsi-iname)\" >/etc/iscsi/initiatorname.iscsi && systemctl \
     restart iscsid; }   # does nothing while sessions are there: detach all disks of this host first";

/// A host that answered.
#[derive(Debug)]
pub(super) struct Diagnosed {
    /// Its name in the config.
    pub(super) host: String,
    pub(super) diagnosis: wire::DiagnoseResponse,
    pub(super) clock: ClockReading,
}

/// A host that a storage host has an export for.
#[derive(Debug)]
pub(super) struct ExportedTo {
    pub(super) storage: String,
    pub(super) hostname: String,
    pub(super) initiator_iqn: String,
}

/// When a question left and its answer was back by our clock, and when it was there by the host's. In microseconds.
#[derive(Debug, Clone, Copy)]
pub(super) struct ClockReading {
    pub(super) sent: i64,
    pub(super) received: i64,
    pub(super) answered: i64,
    pub(super) back: i64,
}

impl ClockReading {
    /// How far the host's clock is ahead of ours (RFC 5905 section 8): right as if both ways take the same time.
    fn ahead(self) -> i64 {
        ((self.received - self.sent) + (self.answered - self.back)) / 2
    }
}

/// From each compute host, each address of each storage host.
pub(super) fn reached(storage: &[Diagnosed], compute: &[Diagnosed]) -> Vec<Found> {
    let mut found = Vec::new();
    for from in compute {
        let mut good = Vec::new();
        for to in storage {
            for endpoint in &to.diagnosis.endpoints {
                let tried = from.diagnosis.reached.iter().find(|reached| reached.address == endpoint.address);
                let Some(tried) = tried else { continue };
                match not_reached(to, endpoint, tried) {
                    Some(finding) => found.push((from.host.clone(), finding)),
                    None => good.push(endpoint.address.as_str()),
                }
            }
        }
        if !good.is_empty() {
            found.push((from.host.clone(), Finding::ok(REACHED, format!("it reaches {}", good.join(", ")))));
        }
    }
    found
}

fn not_reached(to: &Diagnosed, endpoint: &wire::Endpoint, tried: &wire::Reached) -> Option<Finding> {
    // The kernel's target listens only while there is an export: a host that says no is there.
    let idle_portal = endpoint.transport() == wire::Transport::Iscsi && !endpoint.listening;
    if tried.answered || (tried.refused && idle_portal) {
        return None;
    }
    let found = format!("{} of {} is not reached from here: {}", endpoint.address, to.host, tried.problem);
    let port = endpoint.address.rsplit(':').next().unwrap_or_default();
    let mend = match (endpoint.transport(), endpoint.listening) {
        (wire::Transport::Nfs, false) => format!("systemctl enable --now nfs-server   # on {}", to.host),
        _ => {
            format!("nft list ruleset | grep -n {port}; ip route   # on both hosts: a firewall, or no route?")
        }
    };
    Some(Finding::error(REACHED, found, WHY_REACHED).mend(mend))
}

/// Compute hosts that answered, and hosts that have exports.
pub(super) fn initiator_names(compute: &[Diagnosed], exported_to: &[ExportedTo]) -> Vec<Found> {
    let mut found = Vec::new();
    let mut hosts: BTreeMap<&str, Vec<&Diagnosed>> = BTreeMap::new();
    for host in compute.iter().filter(|host| !host.diagnosis.initiator_iqn.is_empty()) {
        hosts.entry(&host.diagnosis.initiator_iqn).or_default().push(host);
    }
    let named = hosts.len();
    for (name, same) in &hosts {
        if let [first, others @ ..] = same.as_slice() {
            for other in others {
                let text = format!("{} and {} have one initiator name: {name}", first.host, other.host);
                found.push((other.host.clone(), Finding::error(NAMES, text, WHY_NAMES).mend(NEW_NAME)));
            }
            let strangers: BTreeSet<(&str, &str)> = exported_to
                .iter()
                .filter(|export| export.initiator_iqn == **name)
                .filter(|export| !same.iter().any(|host| host.diagnosis.hostname == export.hostname))
                .map(|export| (export.hostname.as_str(), export.storage.as_str()))
                .collect();
            for (hostname, storage) in strangers {
                let text = format!(
                    "{} has the initiator name {name}, under which {storage} exports to a host named {hostname}",
                    first.host
                );
                found.push((first.host.clone(), Finding::error(NAMES, text, WHY_NAMES).mend(NEW_NAME)));
            }
        }
    }
    if found.is_empty() && named > 0 {
        let text = format!("{named} compute hosts, each with a name of its own");
        found.push(("-".to_owned(), Finding::ok(NAMES, text)));
    }
    found
}

/// All hosts' clocks against each other, and against ours.
pub(super) fn clocks(storage: &[Diagnosed], compute: &[Diagnosed]) -> Vec<Found> {
    let mut ahead: Vec<(i64, &str)> =
        storage.iter().chain(compute).map(|host| (host.clock.ahead(), host.host.as_str())).collect();
    ahead.sort_unstable();
    let (Some((least, behind)), Some((most, before))) = (ahead.first(), ahead.last()) else {
        return Vec::new();
    };
    let seconds = |microseconds: i64| microseconds as f64 / 1_000_000.0;
    let apart = most - least;
    let found = match ahead.len() {
        1 => Finding::ok(CLOCKS, format!("{:+.1} s from here", seconds(*most))),
        _ => {
            let text = format!("the clock of {before} is {:.1} s ahead of that of {behind}", seconds(apart));
            match apart {
                apart if apart > FAR_APART => Finding::error(CLOCKS, text, WHY_CLOCKS),
                apart if apart > APART => Finding::warning(CLOCKS, text, WHY_CLOCKS),
                _ => return vec![("-".to_owned(), Finding::ok(CLOCKS, within(ahead.len(), seconds(apart))))],
            }
            .mend("timedatectl set-ntp true; timedatectl   # on both hosts")
        }
    };
    vec![("-".to_owned(), found)]
}

fn within(hosts: usize, seconds: f64) -> String {
    format!("those of {hosts} hosts are within {seconds:.1} s")
}

#[cfg(test)]
mod tests {
    use super::*;
    use tether_proto::Severity;

    fn host(name: &str) -> Diagnosed {
        Diagnosed {
            host: name.to_owned(),
            diagnosis: wire::DiagnoseResponse { hostname: name.to_owned(), ..Default::default() },
            clock: ClockReading { sent: 0, received: 0, answered: 0, back: 0 },
        }
    }

    fn compute(name: &str, initiator_iqn: &str) -> Diagnosed {
        let mut host = host(name);
        host.diagnosis.initiator_iqn = initiator_iqn.to_owned();
        host
    }

    fn severities(found: &[Found]) -> Vec<(&str, Severity)> {
        found.iter().map(|(host, finding)| (host.as_str(), finding.severity)).collect()
    }

    #[test]
    fn f42_two_hosts_with_one_initiator_name_are_found_and_told_how_to_get_another() {
        let hosts = [compute("c1", "iqn.a"), compute("c2", "iqn.b"), compute("c3", "iqn.a")];
        let found = initiator_names(&hosts, &[]);
        assert_eq!(severities(&found), [("c3", Severity::Error)]);
        assert!(
            found[0].1.found.contains("c1 and c3") && found[0].1.mend.contains("iscsi-iname"),
            "{found:?}"
        );
        assert_eq!(severities(&initiator_names(&hosts[..2], &[])), [("-", Severity::Ok)]);
    }

    #[test]
    fn f42_a_host_that_is_known_by_its_exports_alone_counts_too() {
        let hosts = [compute("c1", "iqn.a")];
        let export = |hostname: &str| ExportedTo {
            storage: "s1".into(),
            hostname: hostname.into(),
            initiator_iqn: "iqn.a".into(),
        };
        assert_eq!(severities(&initiator_names(&hosts, &[export("c1")])), [("-", Severity::Ok)]);
        let found = initiator_names(&hosts, &[export("c1"), export("clone"), export("clone")]);
        assert_eq!(severities(&found), [("c1", Severity::Error)]);
        assert!(found[0].1.found.contains("a host named clone"), "{found:?}");
    }

    #[test]
    fn an_address_that_is_not_reached_is_an_error_unless_nobody_has_to_listen_there() {
        let mut storage = host("s1");
        let endpoint = |address: &str, transport: wire::Transport, listening| wire::Endpoint {
            address: address.to_owned(),
            transport: transport.into(),
            listening,
        };
        storage.diagnosis.endpoints = vec![
            endpoint("10.0.0.1:3260", wire::Transport::Iscsi, false),
            endpoint("10.0.0.2:3260", wire::Transport::Iscsi, true),
            endpoint("10.0.0.1:2049", wire::Transport::Nfs, true),
        ];
        let try_all = |answers: [(bool, bool); 3]| {
            let mut from = host("c1");
            from.diagnosis.reached = storage
                .diagnosis
                .endpoints
                .iter()
                .zip(answers)
                .map(|(endpoint, (answered, refused))| wire::Reached {
                    address: endpoint.address.clone(),
                    answered,
                    refused,
                    problem: "why".into(),
                })
                .collect();
            reached(std::slice::from_ref(&storage), &[from])
        };
        let good = try_all([(false, true), (true, false), (true, false)]);
        assert_eq!(severities(&good), [("c1", Severity::Ok)]);
        // Silence is a network's; a refusal where somebody listens, a firewall's.
        let bad = try_all([(false, false), (false, true), (false, true)]);
        assert_eq!(severities(&bad), [("c1", Severity::Error); 3]);
        assert!(bad[0].1.found.contains("10.0.0.1:3260 of s1") && bad[0].1.mend.contains("3260"), "{bad:?}");
    }

    #[test]
    fn clocks_are_compared_without_the_time_that_the_diagnosis_takes() {
        let at = |name: &str, ahead: i64| {
            let mut host = host(name);
            // Two seconds of checks, and 10 ms each way.
            let (sent, way, work) = (1_000_000_000, 10_000, 2_000_000);
            host.clock = ClockReading {
                sent,
                received: sent + way + ahead,
                answered: sent + way + work + ahead,
                back: sent + 2 * way + work,
            };
            host
        };
        let judge = |one, other| clocks(&[at("s1", one)], &[at("c1", other)]).remove(0).1;
        assert_eq!(judge(0, 1_000_000).severity, Severity::Ok);
        let warned = judge(0, 5_000_000);
        assert_eq!(warned.severity, Severity::Warning);
        assert!(warned.found.contains("clock of c1 is 5.0 s ahead of that of s1"), "{warned:?}");
        assert_eq!(judge(120_000_000, 0).severity, Severity::Error);
        // Both wrong by as much: only against ours it shows, and ours may be the wrong one.
        assert_eq!(judge(120_000_000, 120_000_000).severity, Severity::Ok);
    }
}
