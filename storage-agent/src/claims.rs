//! Who has a volume now: one export, or several that may share it, or a creation, or a deletion. In memory; the journal says at start which
//! exports there are. This is where "one volume, one writer" is decided (rule 2). A volume is known here by its place,
//! volume group and LV name or directory and name, so that two pools of one group cannot both have it.
//!
//! An extension is beside the other claims and not one of them: an exported volume may be made larger, and may be
//! unexported meanwhile; but no new export and no deletion begins before the extension has ended.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tether_agent_core::failure::{Failure, Reason};
use tether_proto::{AccessMode, AttachmentId};

/// With whom an export shares its volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sharing {
    /// With nobody.
    Exclusive,
    /// With others that only read.
    ReadOnly,
    /// With others that may write: the volume was made for it.
    MultiAttach,
}

/// With whom an export of this access mode shares.
pub(crate) fn sharing(multi_attach: bool, access_mode: AccessMode) -> Sharing {
    match (multi_attach, access_mode) {
        (true, _) => Sharing::MultiAttach,
        (false, AccessMode::ReadOnly) => Sharing::ReadOnly,
        (false, AccessMode::ReadWrite) => Sharing::Exclusive,
    }
}

/// What a volume is claimed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Claim {
    /// An export.
    Export(AttachmentId, Sharing),
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
    /// More than one only of exports that share.
    claims: HashMap<String, Vec<Claim>>,
    extensions: HashSet<String>,
    /// A file of the journal that may say of any volume that it is exported.
    damaged: Option<PathBuf>,
}

impl Claims {
    /// From now on nothing is deleted: which volumes are exported is not known.
    pub(crate) fn refuse_deletions(&self, damaged: &Path) {
        self.lock().damaged = Some(damaged.to_owned());
    }

    /// Claims a volume. Claiming twice for the same export is no clash. Gives the other exports that have it.
    ///
    /// # Errors
    /// `VOLUME_EXPORTED` or `OPERATION_RUNNING`, naming who has it.
    pub(crate) fn claim(&self, place: &str, claim: Claim) -> Result<Vec<AttachmentId>, Failure> {
        let mut table = self.lock();
        if let (Claim::Deletion, Some(file)) = (claim, &table.damaged) {
            return Err(Failure::new(
                Reason::JournalFailed,
                format!("the journal has a damaged file, {}: the volume may be exported", file.display()),
            )
            .next("repair it or, when its export is gone from targetcli ls and exportfs -v, delete it; then restart the agent"));
        }
        let extended = table.extensions.contains(place);
        let held = table.claims.entry(place.to_owned()).or_default();
        // Of two that the journal has, against rule 2, the first one is served.
        let own =
            held.iter().position(|other| *other == claim).filter(|_| matches!(claim, Claim::Export(..)));
        let before = own.map_or(held.as_slice(), |own| &held[..own]);
        let clash = before.iter().find(|other| !may_share(claim, **other));
        if own.is_some() && clash.is_none() {
            return Ok(others(held, claim));
        }
        let refused = match clash {
            _ if extended => Some(being(place, "extended")),
            None => None,
            Some(Claim::Creation) => Some(being(place, "created")),
            Some(Claim::Deletion) => Some(being(place, "deleted")),
            Some(Claim::Export(id, _)) => Some(
                Failure::new(
                    Reason::VolumeExported,
                    format!("volume {place} is exported for attachment {id}"),
                )
                .next(format!("detach it first: tether detach {id}")),
            ),
        };
        let outcome = match refused {
            Some(failure) => Err(failure),
            None => {
                held.push(claim);
                Ok(others(held, claim))
            }
        };
        table.claims.retain(|_, held| !held.is_empty());
        outcome
    }

    /// Takes a claim again that the journal has, whoever else has one. True when nobody has one that clashes.
    pub(crate) fn take_again(&self, place: &str, claim: Claim) -> bool {
        let mut table = self.lock();
        let held = table.claims.entry(place.to_owned()).or_default();
        let alone = held.iter().all(|other| may_share(claim, *other));
        held.push(claim);
        alone
    }

    /// Gives a claim back; another's claim stays.
    pub(crate) fn release(&self, place: &str, claim: Claim) {
        let mut table = self.lock();
        if let Some(held) = table.claims.get_mut(place) {
            held.retain(|other| *other != claim);
            if held.is_empty() {
                table.claims.remove(place);
            }
        }
    }

    /// Gives back whatever an export that has ended may still have.
    pub(crate) fn release_export(&self, id: AttachmentId) {
        self.lock().claims.retain(|_, held| {
            held.retain(|claim| !matches!(claim, Claim::Export(of, _) if *of == id));
            !held.is_empty()
        });
    }

    /// Begins an extension; says which exports have the volume.
    ///
    /// # Errors
    /// `OPERATION_RUNNING` when it is being made, extended or deleted.
    pub(crate) fn begin_extension(&self, place: &str) -> Result<Vec<AttachmentId>, Failure> {
        let mut table = self.lock();
        let held = table.claims.get(place).map_or(&[][..], Vec::as_slice);
        for claim in held {
            match claim {
                Claim::Export(..) => {}
                Claim::Creation => return Err(being(place, "created")),
                Claim::Deletion => return Err(being(place, "deleted")),
            }
        }
        let exported_for = exports(held);
        if !table.extensions.insert(place.to_owned()) {
            return Err(being(place, "extended"));
        }
        Ok(exported_for)
    }

    /// Ends an extension.
    pub(crate) fn end_extension(&self, place: &str) {
        self.lock().extensions.remove(place);
    }

    /// The exports that have a volume.
    pub(crate) fn exported_for(&self, place: &str) -> Vec<AttachmentId> {
        exports(self.lock().claims.get(place).map_or(&[][..], Vec::as_slice))
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // Each change is one insert or remove; a panic elsewhere cannot leave it half done.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// May two have a volume at a time (rule 2)?
fn may_share(one: Claim, other: Claim) -> bool {
    match (one, other) {
        (Claim::Export(_, one), Claim::Export(_, other)) => one == other && one != Sharing::Exclusive,
        _ => false,
    }
}

fn exports(held: &[Claim]) -> Vec<AttachmentId> {
    let ids = held.iter().filter_map(|claim| match claim {
        Claim::Export(id, _) => Some(*id),
        Claim::Creation | Claim::Deletion => None,
    });
    ids.collect()
}

fn others(held: &[Claim], except: Claim) -> Vec<AttachmentId> {
    let mut held = held.to_vec();
    held.retain(|claim| *claim != except);
    exports(&held)
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
        let export = |id| Claim::Export(id, Sharing::Exclusive);
        claims.claim(volume, export(one)).unwrap();
        claims.claim(volume, export(one)).unwrap();
        let refused = claims.claim(volume, export(two)).unwrap_err();
        assert_eq!(refused.reason, Reason::VolumeExported);
        assert!(refused.message.contains("11111111"), "{refused}");
        assert!(claims.claim(volume, Claim::Deletion).is_err());
        claims.release(volume, export(two));
        assert_eq!(claims.exported_for(volume), [one]);
        claims.release(volume, export(one));
        claims.claim(volume, Claim::Deletion).unwrap();
        assert!(claims.claim(volume, Claim::Deletion).is_err());
    }

    #[test]
    fn f7_of_two_exports_in_the_journal_neither_loses_its_claim_when_the_other_ends() {
        let (claims, volume) = (Claims::default(), "vg0/a");
        let [one, two] = ["11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"]
            .map(|id| Claim::Export(id.parse().unwrap(), Sharing::Exclusive));
        assert!(claims.take_again(volume, one));
        assert!(!claims.take_again(volume, two));
        claims.claim(volume, one).unwrap();
        assert_eq!(
            claims.claim(volume, two).unwrap_err().reason,
            Reason::VolumeExported,
            "the second is not served"
        );
        claims.release(volume, one);
        assert_eq!(claims.claim(volume, Claim::Deletion).unwrap_err().reason, Reason::VolumeExported);
        claims.release(volume, two);
        claims.claim(volume, Claim::Deletion).unwrap();
    }

    #[test]
    fn f49_an_exported_volume_is_extended_and_may_go_meanwhile_but_no_new_export_begins() {
        let (claims, volume) = (Claims::default(), "/srv/share/a");
        let [one, two] = ["11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"]
            .map(|id| id.parse().unwrap());
        let export = |id| Claim::Export(id, Sharing::Exclusive);
        claims.claim(volume, export(one)).unwrap();
        assert_eq!(claims.begin_extension(volume).unwrap(), [one]);
        assert!(claims.begin_extension(volume).is_err());
        claims.claim(volume, export(one)).unwrap();
        claims.release(volume, export(one));
        for other in [export(two), Claim::Deletion, Claim::Creation] {
            assert_eq!(claims.claim(volume, other).unwrap_err().reason, Reason::OperationRunning);
        }
        claims.end_extension(volume);
        claims.claim(volume, Claim::Deletion).unwrap();
        assert!(claims.begin_extension(volume).is_err());
    }

    #[test]
    fn f7_readers_share_a_volume_among_themselves_and_writers_only_one_that_was_made_for_it() {
        use Sharing::{Exclusive, MultiAttach, ReadOnly};
        let [one, two] = ["11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"]
            .map(|id| id.parse().unwrap());
        for (first, second, both) in [
            (ReadOnly, ReadOnly, true),
            (MultiAttach, MultiAttach, true),
            (ReadOnly, Exclusive, false),
            (Exclusive, ReadOnly, false),
            (Exclusive, Exclusive, false),
        ] {
            let claims = Claims::default();
            assert!(claims.claim("vg0/a", Claim::Export(one, first)).unwrap().is_empty());
            let outcome = claims.claim("vg0/a", Claim::Export(two, second));
            assert_eq!(outcome.is_ok(), both, "{first:?} {second:?}");
            if both {
                assert_eq!(outcome.unwrap(), [one]);
                assert!(claims.claim("vg0/a", Claim::Deletion).is_err());
                claims.release("vg0/a", Claim::Export(one, first));
                assert_eq!(claims.exported_for("vg0/a"), [two]);
            }
        }
    }
}
