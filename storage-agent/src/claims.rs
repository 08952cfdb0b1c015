//! Who has a volume now: one export, or a creation, or a deletion. In memory; the journal says at start which
//! exports there are. This is where "one volume, one writer" is decided (rule 2). A volume is known here by its place,
//! volume group and LV name, so that two pools of one group cannot both have it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
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
    table: Arc<Mutex<HashMap<String, Claim>>>,
}

impl Claims {
    /// Claims a volume. Claiming twice for the same export is no clash.
    ///
    /// # Errors
    /// `VOLUME_EXPORTED` or `OPERATION_RUNNING`, naming who has it.
    pub(crate) fn claim(&self, place: &str, claim: Claim) -> Result<(), Failure> {
        match self.lock().entry(place.to_owned()) {
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
                Claim::Creation => {
                    Failure::new(Reason::OperationRunning, format!("volume {place} is being created"))
                }
                Claim::Deletion => {
                    Failure::new(Reason::OperationRunning, format!("volume {place} is being deleted"))
                }
            }),
        }
    }

    /// Gives a claim back; another's claim stays.
    pub(crate) fn release(&self, place: &str, claim: Claim) {
        if let Entry::Occupied(entry) = self.lock().entry(place.to_owned())
            && *entry.get() == claim
        {
            entry.remove();
        }
    }

    /// The export that has a volume.
    pub(crate) fn exported_for(&self, place: &str) -> Option<AttachmentId> {
        match self.lock().get(place) {
            Some(Claim::Export(id)) => Some(*id),
            _ => None,
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Claim>> {
        // Each change is one insert or remove; a panic elsewhere cannot leave it half done.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
}
