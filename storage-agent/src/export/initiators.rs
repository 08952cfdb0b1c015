//! Which host has which initiator name: two hosts with one name would be one to LIO, and each could use the other's volumes
//! (F42). In memory, by name, so that an export costs the same however many there are; the journal says at start which there
//! are. Not here: who has a volume (`claims`).

use std::collections::{BTreeSet, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tether_agent_core::failure::{Failure, Reason};
use tether_proto::{AttachmentId, Connector, Iqn};

/// A host's name and the exports that were made for it.
type Host = (String, BTreeSet<AttachmentId>);

/// All hosts that have an export.
#[derive(Debug, Default)]
pub(super) struct Initiators {
    hosts: Mutex<HashMap<Iqn, Host>>,
}

impl Initiators {
    /// An export for this host.
    ///
    /// # Errors
    /// `INITIATOR_NAME_TAKEN` when another host has an export under the same initiator name.
    pub(super) fn enter(&self, id: AttachmentId, connector: &Connector) -> Result<(), Failure> {
        let mut hosts = self.lock();
        let (hostname, exports) = hosts
            .entry(connector.initiator_iqn.clone())
            .or_insert_with(|| (connector.hostname.clone(), BTreeSet::new()));
        if *hostname != connector.hostname {
            return Err(Failure::new(
                Reason::InitiatorNameTaken,
                format!(
                    "initiator name {} is that of {hostname}, which has exports, and {} says that it is its own",
                    connector.initiator_iqn, connector.hostname
                ),
            ));
        }
        exports.insert(id);
        Ok(())
    }

    /// The export has ended, whichever host had it.
    pub(super) fn leave(&self, id: AttachmentId) {
        self.lock().retain(|_, (_, exports)| {
            exports.remove(&id);
            !exports.is_empty()
        });
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Iqn, Host>> {
        // Each change leaves the table whole; a panic elsewhere cannot leave it half done.
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f42_one_initiator_name_is_one_hosts_while_it_has_exports() {
        let connector = |hostname: &str| Connector {
            hostname: hostname.to_owned(),
            initiator_iqn: "iqn.2026-11.io.example:cloned".parse().unwrap(),
            addresses: Vec::new(),
            versions: std::collections::BTreeMap::new(),
        };
        let [one, two, three] = ["1", "2", "3"].map(|digit| {
            format!("{digit}1111111-1111-4111-8111-111111111111").parse::<AttachmentId>().unwrap()
        });
        let initiators = Initiators::default();
        initiators.enter(one, &connector("a")).unwrap();
        initiators.enter(two, &connector("a")).unwrap();
        let refused = initiators.enter(three, &connector("b")).unwrap_err();
        assert_eq!(refused.reason, Reason::InitiatorNameTaken);
        assert!(refused.message.contains("that of a") && refused.message.contains("b says"), "{refused}");
        initiators.leave(one);
        assert!(initiators.enter(three, &connector("b")).is_err());
        initiators.leave(two);
        initiators.enter(three, &connector("b")).unwrap();
    }
}
