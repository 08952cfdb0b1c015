//! Who has a volume now: one export, or a creation, or a deletion. In memory; the journal says at start which
//! exports there are. This is where "one volume, one writer" is decided (rule 2). A volume is known here by its place,
//! volume group and LV name or directory and name, so that two pools of one group cannot both have it.
//!
//! An extension is beside the other claims and not one of them: an exported volume may be made larger, and may be
//! unexported meanwhile; but no new export and no deletion begins before the extension has ended.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tether_agent_core::failure::{Failure, Reason};
use tether_proto::AttachmentId;

/// What a volume is claimed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Claim {
    /// An export.
    Export(AttachmentId),
    /// It is being made.
    Creation,
    /// It is being deleted.
    Deletion,
}

/// All claims of this agent.
#[derive(Debug, Clone, Default)]
pub(crate) struct Claims {
    table: Arc<Mutex<Table>>,
}

#[derive(Debug, Default)]
struct Table {
    claims: HashMap<String, Claim>,
    extensions: HashSet<String>,
}

impl Claims {
    /// Claims a volume. Claiming twice for the same export is no clash.
    ///
    /// # Errors
    /// `VOLUME_EXPORTED` or `OPERATION_RUNNING`, naming who has it.
    pub(crate) fn claim(&self, place: &str, claim: Claim) -> Result<(), Failure> {
        let mut table = self.lock();
        let extended = table.extensions.contains(place);
        match table.claims.entry(place.to_owned()) {
            Entry::Vacant(_) if extended => Err(being(place, "extended")),
            Entry::Vacant(entry) => {
                entry.insert(claim);
                Ok(())
            }
            Entry::Occupied(entry) if *entry.get() == claim && matches!(claim, Claim::Export(_)) => Ok(()),
            Entry::Occupied(entry) => Err(match entry.get() {
                Claim::Export(id) => Failure::new(
                    Reason::VolumeExported,
                    format!("volume {place} is exported for attachment {id}"),
                )
                .next(format!("detach it first: tether detach {id}")),
                Claim::Creation => being(place, "created"),
                Claim::Deletion => being(place, "deleted"),
            }),
        }
    }

    /// Gives a claim back; another's claim stays.
    pub(crate) fn release(&self, place: &str, claim: Claim) {
        if let Entry::Occupied(entry) = self.lock().claims.entry(place.to_owned())
            && *entry.get() == claim
        {
            entry.remove();
        }
    }

    /// Begins an extension; says which export has the volume.
    ///
    /// # Errors
    /// `OPERATION_RUNNING` when it is being made, extended or deleted.
    pub(crate) fn begin_extension(&self, place: &str) -> Result<Option<AttachmentId>, Failure> {
        let mut table = self.lock();
        let exported_for = match table.claims.get(place) {
            None => None,
            Some(Claim::Export(id)) => Some(*id),
            Some(Claim::Creation) => return Err(being(place, "created")),
            Some(Claim::Deletion) => return Err(being(place, "deleted")),
        };
        if !table.extensions.insert(place.to_owned()) {
            return Err(being(place, "extended"));
        }
        Ok(exported_for)
    }

    /// Ends an extension.
    pub(crate) fn end_extension(&self, place: &str) {
        self.lock().extensions.remove(place);
    }

    /// The export that has a volume.
    pub(crate) fn exported_for(&self, place: &str) -> Option<AttachmentId> {
        match self.lock().claims.get(place) {
            Some(Claim::Export(id)) => Some(*id),
            _ => None,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // Each change is one insert or remove; a panic elsewhere cannot leave it half done.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn being(place: &str, what: &str) -> Failure {
    Failure::new(Reason::OperationRunning, format!("volume {place} is being {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f7_a_second_export_is_refused_and_names_the_first() {
        let claims = Claims::default();
        let volume = "vg0/a";
        let [one, two] = ["11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"]
            .map(|id| id.parse().unwrap());
        claims.claim(volume, Claim::Export(one)).unwrap();
        claims.claim(volume, Claim::Export(one)).unwrap();
        let refused = claims.claim(volume, Claim::Export(two)).unwrap_err();
        assert_eq!(refused.reason, Reason::VolumeExported);
        assert!(refused.message.contains("11111111"), "{refused}");
        assert!(claims.claim(volume, Claim::Deletion).is_err());
        claims.release(volume, Claim::Export(two));
        assert_eq!(claims.exported_for(volume), Some(one));
        claims.release(volume, Claim::Export(one));
        claims.claim(volume, Claim::Deletion).unwrap();
        assert!(claims.claim(volume, Claim::Deletion).is_err());
    }

    #[test]
    fn f49_an_exported_volume_is_extended_and_may_go_meanwhile_but_no_new_export_begins() {
        let (claims, volume) = (Claims::default(), "/srv/share/a");
        let [one, two] = ["11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"]
            .map(|id| id.parse().unwrap());
        claims.claim(volume, Claim::Export(one)).unwrap();
        assert_eq!(claims.begin_extension(volume).unwrap(), Some(one));
        assert!(claims.begin_extension(volume).is_err());
        claims.claim(volume, Claim::Export(one)).unwrap();
        claims.release(volume, Claim::Export(one));
        for other in [Claim::Export(two), Claim::Deletion, Claim::Creation] {
            assert_eq!(claims.claim(volume, other).unwrap_err().reason, Reason::OperationRunning);
        }
        claims.end_extension(volume);
        claims.claim(volume, Claim::Deletion).unwrap();
        assert!(claims.begin_extension(volume).is_err());
    }
}
