//! /var/lib/nfs/etab: what is shared now, as exportfs wrote it. Text in, lines out; nothing is read here.

use std::net::IpAddr;

use ipnet::IpNet;

use tether_proto::FileSystemId;

use super::Share;

/// One line of etab.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Line {
    path: String,
    /// As it stands there: an address, a network, a name or a pattern.
    client: String,
    options: Vec<String>,
}

/// Parses etab: `PATH<tab>CLIENT(OPTION,...)`. A line that is none is left out: it cannot be ours.
pub(crate) fn parse(text: &str) -> Vec<Line> {
    text.lines().filter_map(line).collect()
}

fn line(text: &str) -> Option<Line> {
    let (path, rest) = text.split_once('\t')?;
    let (client, options) = rest.strip_suffix(')')?.rsplit_once('(')?;
    Some(Line {
        path: path.to_owned(),
        client: client.to_owned(),
        options: options.split(',').map(str::to_owned).collect(),
    })
}

impl Line {
    /// Is it this directory, for this address and no others?
    pub(crate) fn is_for(&self, share: &Share) -> bool {
        self.path == share.path.as_str() && self.client == super::client(share.address)
    }

    /// Is it this directory, and may the server take this line for the address? Of a client by name, pattern or netgroup
    /// nobody knows, and the server takes it before a network (exports(5)): so it may.
    pub(crate) fn may_serve(&self, share: &Share) -> bool {
        let client = self.client.as_str();
        let covers = match (client.parse::<IpAddr>(), client.parse::<IpNet>()) {
            (Ok(address), _) => address == share.address,
            (_, Ok(network)) => network.contains(&share.address),
            (Err(_), Err(_)) => true,
        };
        self.path == share.path.as_str() && covers
    }

    /// Did we share it? The id is random and known to nobody else; and we write no bare addresses.
    pub(crate) fn is_ours(&self, share: &Share) -> bool {
        self.is_for(share) && self.has(&format!("fsid={}", share.file_system_id))
    }

    /// Is it shared as it should be?
    pub(crate) fn is_as(&self, share: &Share) -> bool {
        self.is_ours(share)
            && [share.mode(), "sync", "all_squash", "sec=sys"].iter().all(|option| self.has(option))
            && self.has(&format!("anonuid={}", share.owner_uid))
            && self.has(&format!("anongid={}", share.owner_gid))
    }

    /// `PATH CLIENT`, as exportfs -v shows it.
    pub(crate) fn name(&self) -> String {
        format!("{} {}", self.path, self.client)
    }

    /// Is it shared with this id, which is random and known to nobody else?
    pub(crate) fn has_file_system_id(&self, id: FileSystemId) -> bool {
        self.has(&format!("fsid={id}"))
    }

    /// The line as a person would look for it.
    pub(crate) fn describe(&self) -> String {
        format!("{} {}({})", self.path, self.client, self.options.join(","))
    }

    fn has(&self, option: &str) -> bool {
        self.options.iter().any(|own| own == option)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tether_proto::{AccessMode, mangled};

    /// As nfs-utils 2.6.2 writes it.
    const ETAB: &str = "/srv/share\tfd99::2/128(ro,sync,wdelay,hide,nocrossmnt,secure,root_squash,all_squash,\
        no_subtree_check,secure_locks,acl,no_pnfs,fsid=67e55044-10b1-426f-9247-bb680e5fe0c8,anonuid=64055,anongid=64055,\
        sec=sys,ro,secure,root_squash,all_squash)\n\
        /srv/share\t10.99.0.2(rw,sync,no_root_squash,fsid=1,anonuid=65534,anongid=65534,sec=sys,rw)\n\
        nonsense\n";

    fn share(address: &str) -> Share {
        Share {
            pool: "share".parse().unwrap(),
            path: "/srv/share".parse().unwrap(),
            address: address.parse().unwrap(),
            access_mode: AccessMode::ReadOnly,
            owner_uid: 64055,
            owner_gid: 64055,
            file_system_id: "67e55044-10b1-426f-9247-bb680e5fe0c8".parse().unwrap(),
        }
    }

    proptest! {
        /// A line is ours only with our id, whatever else became of the file.
        #[test]
        fn damaged_lines_are_nobodys(text in mangled(ETAB)) {
            for line in parse(&text) {
                let share = share("fd99::2");
                let _unused = (line.may_serve(&share), line.is_as(&share));
                prop_assert!(!line.is_ours(&share) || text.contains(&share.file_system_id.to_string()));
            }
        }
    }

    #[test]
    fn f40_lines_of_etab_are_found_by_path_and_address() {
        let lines = parse(ETAB);
        assert_eq!(lines.len(), 2);
        let (v6, v4) = (share("fd99::2"), share("10.99.0.2"));
        assert!(lines[0].is_for(&v6) && !lines[0].is_for(&v4));
        assert!(lines[1].may_serve(&v4) && !lines[1].may_serve(&v6));
        assert!(!lines[0].is_for(&Share { path: "/srv/other".parse().unwrap(), ..v6.clone() }));
        assert!(!lines[0].is_for(&share("fd99::3")));
        for wider in parse("/srv/share\t10.99.0.0/24(rw)\n/srv/share\t*(rw)\n") {
            assert!(wider.may_serve(&v4) && !wider.is_for(&v4));
        }
    }

    #[test]
    fn a_line_is_as_it_should_be_only_with_every_option_of_ours() {
        let (lines, v6) = (parse(ETAB), share("fd99::2"));
        assert!(lines[0].is_ours(&v6) && lines[0].is_as(&v6));
        for other in [
            Share { access_mode: AccessMode::ReadWrite, ..v6.clone() },
            Share { owner_uid: 1, ..v6.clone() },
            Share { owner_gid: 1, ..v6.clone() },
        ] {
            assert!(lines[0].is_ours(&other) && !lines[0].is_as(&other));
        }
        for (from, to) in [("all_squash", "no_all_squash"), (",sync", ",async")] {
            assert!(!parse(&ETAB.replace(from, to))[0].is_as(&v6));
        }
    }

    /// F16: what somebody shared by hand is theirs.
    #[test]
    fn f16_a_line_with_another_id_or_a_bare_address_is_somebody_elses() {
        let (lines, v4) = (parse(ETAB), share("10.99.0.2"));
        assert!(lines[1].may_serve(&v4) && !lines[1].is_ours(&v4));
        let bare = ETAB.replace("fd99::2/128", "fd99::2");
        assert!(!parse(&bare)[0].is_ours(&share("fd99::2")));
    }
}
