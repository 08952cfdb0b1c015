//! Logical volumes, the order of steps: create with wipe, delete, list. Making them larger is in `logical/extend`.
//!
//! A thick volume's space may hold somebody's old data (F5). So a new thick LV gets a name that nobody can export,
//! is wiped, and only then gets its own name: that name never leads to old data, however the agent ends. A creation
//! that was cut off is taken up again by the same call.

mod extend;

use tether_agent_core::failure::{Failure, Reason};
use tether_agent_core::steps::Steps;
use tether_proto::wire::{self, OperationReport, Outcome};
use tether_proto::{ByteSize, PoolName, VolumeFormat, VolumeKey};

use super::record::{MultiAttachRecord, OperationRecord, VolumeOperation, journal_key};
use super::{
    PoolRoom, VolumeView, Volumes, Wanted, check_room, different, may_still_be_done, record, round_up,
};
use crate::claims::Claim;
use crate::identity::{Provisioning, VolumeIdentity};
use crate::lvm::{self, EXTENTS_PREFIX, LogicalVolume, Lvm, UNWIPED_PREFIX};
use crate::space;

impl Volumes {
    pub(super) async fn list_logical(&self, pool: &PoolName, lvm: &Lvm) -> Result<Vec<VolumeView>, Failure> {
        let mut views = Vec::new();
        for lv in lvm.list().await? {
            // What is not wiped yet, and names that we could not say on the wire, are no volumes.
            if [UNWIPED_PREFIX, EXTENTS_PREFIX].iter().any(|prefix| lv.name.starts_with(prefix)) {
                continue;
            }
            if let Ok(volume) = lv.name.parse() {
                views.push(self.logical_view(VolumeKey { pool: pool.clone(), volume }, lvm, lv));
            }
        }
        Ok(views)
    }

    pub(super) fn logical_view(&self, key: VolumeKey, lvm: &Lvm, lv: LogicalVolume) -> VolumeView {
        let multi_attach = self.pools.multi_attach(&key).is_some_and(|uuid| uuid == lv.uuid);
        VolumeView {
            exported_for: self.claims.exported_for(&lvm.place(key.volume.as_str())),
            key,
            identity: VolumeIdentity { uuid: lv.uuid, size: lv.size },
            format: VolumeFormat::Raw,
            provisioning: lvm.provisioning(),
            transport: wire::Transport::Iscsi,
            ours: lv.ours,
            multi_attach,
        }
    }

    pub(super) async fn logical_room(&self, lvm: &Lvm) -> Result<PoolRoom, Failure> {
        let room = lvm.room().await?;
        let provisioned = lvm.list().await?.iter().map(|lv| lv.size.bytes()).fold(0, u64::saturating_add);
        let metadata_percent = room.metadata_percent;
        Ok(PoolRoom { size: room.size, free: room.free, provisioned, metadata_percent })
    }

    pub(super) async fn create_logical(
        &self,
        steps: &Steps,
        key: &VolumeKey,
        lvm: &Lvm,
        wanted: Wanted,
    ) -> Result<(VolumeView, OperationReport), Failure> {
        check_wanted(key, lvm, wanted)?;
        self.pools.check_not_deleting(key)?;
        let room = steps.run("check-pool", lvm.room()).await?;
        let size = round_up(wanted.size, room.extent)?;
        if let Some(lv) = lvm.find(key.volume.as_str()).await? {
            if !lv.ours {
                return Err(different(key, "was made by somebody else"));
            }
            if lv.size != size {
                let what = format!("has {} bytes and not {}", lv.size.bytes(), size.bytes());
                return Err(different(key, &what));
            }
            let mut outcome = Outcome::Unchanged;
            if self.is_unfinished_multi_attach(key) && wanted.multi_attach {
                // The call that made it was cut off before it knew the LV's id.
                self.record_multi_attach(steps, key, Some(lv.uuid.clone())).await?;
                outcome = Outcome::Repaired;
            }
            let view = self.logical_view(key.clone(), lvm, lv);
            if view.multi_attach != wanted.multi_attach {
                return Err(different(key, &record::multi_attach_difference(view.multi_attach)));
            }
            // The call that made it was cut off when all was done: it may be exported from now on, and is not looked at again.
            if self.pools.operations.get(&journal_key(key)).is_some() {
                self.end(steps, "close-journal", key).await?;
                outcome = Outcome::Repaired;
            }
            return Ok((view, steps.report(outcome)));
        }
        if !lvm.name_is_free(key.volume.as_str()).await? {
            return Err(Failure::new(
                Reason::DifferentParameters,
                format!(
                    "the volume group of pool {} has a logical volume {} outside of the pool",
                    key.pool, key.volume
                ),
            )
            .at("validate"));
        }
        let place = lvm.place(key.volume.as_str());
        self.claims.claim(&place, Claim::Creation).map_err(|failure| failure.at("validate"))?;
        let made = self.make_logical(steps, key, lvm, wanted, size, room.largest).await;
        self.claims.release(&place, Claim::Creation);
        let (outcome, view) = made?;
        tracing::info!(volume = %key, bytes = view.identity.size.bytes(), "volume created");
        Ok((view, steps.report(outcome)))
    }

    async fn make_logical(
        &self,
        steps: &Steps,
        key: &VolumeKey,
        lvm: &Lvm,
        wanted: Wanted,
        size: ByteSize,
        largest: u64,
    ) -> Result<(Outcome, VolumeView), Failure> {
        let verified = async {
            self.begin(steps, key, VolumeOperation::Create, None).await?;
            if wanted.multi_attach {
                self.record_multi_attach(steps, key, None).await?;
            } else {
                // Of an LV that was removed by hand.
                self.forget_multi_attach(steps, key).await?;
            }
            let outcome = match lvm.provisioning() {
                Provisioning::Thin => self.create_thin(steps, lvm, key, size, largest).await?,
                Provisioning::Thick => self.create_thick(steps, lvm, key, size, largest).await?,
            };
            let finish = async {
                let view = steps.run("verify-volume", self.get(key)).await?;
                if wanted.multi_attach {
                    self.record_multi_attach(steps, key, Some(view.identity.uuid.clone())).await?;
                }
                self.end(steps, "close-journal", key).await?;
                Ok(VolumeView { multi_attach: wanted.multi_attach, ..view })
            };
            match finish.await {
                Ok(view) => Ok((outcome, view)),
                Err(failure) => Err(self.undo_create(steps, lvm, key.volume.as_str(), failure).await),
            }
        };
        match verified.await {
            Ok(made) => Ok(made),
            // What could not be undone stays recorded.
            Err(failure) if !failure.undo.is_empty() => Err(failure),
            Err(mut failure) => {
                let undone = async {
                    if wanted.multi_attach {
                        self.forget_multi_attach(steps, key).await?;
                    }
                    self.end(steps, "undo-write-journal", key).await
                };
                failure.undo.extend(undone.await.err().map(|error| error.to_string()));
                Err(failure)
            }
        }
    }

    /// Puts on disk what is about to be done to an LV.
    async fn begin(
        &self,
        steps: &Steps,
        key: &VolumeKey,
        operation: VolumeOperation,
        uuid: Option<String>,
    ) -> Result<(), Failure> {
        let record = OperationRecord { volume: key.clone(), operation, uuid };
        let name = record::journal_key(key);
        self.journal(steps, "write-journal", move |pools| pools.operations.put(&name, &record)).await
    }

    /// It has ended.
    pub(super) async fn end(
        &self,
        steps: &Steps,
        step: &'static str,
        key: &VolumeKey,
    ) -> Result<(), Failure> {
        let name = record::journal_key(key);
        self.journal(steps, step, move |pools| pools.operations.remove(&name)).await
    }

    async fn record_multi_attach(
        &self,
        steps: &Steps,
        key: &VolumeKey,
        uuid: Option<String>,
    ) -> Result<(), Failure> {
        let step = if uuid.is_none() { "record-multi-attach" } else { "confirm-multi-attach" };
        let record = MultiAttachRecord { volume: key.clone(), uuid };
        let name = record::journal_key(key);
        self.journal(steps, step, move |pools| pools.multi_attach.put(&name, &record)).await
    }

    fn is_unfinished_multi_attach(&self, key: &VolumeKey) -> bool {
        let record = self.pools.multi_attach.get(&record::journal_key(key));
        record.is_some_and(|record| record.uuid.is_none())
    }

    pub(super) async fn forget_multi_attach(&self, steps: &Steps, key: &VolumeKey) -> Result<(), Failure> {
        let name = record::journal_key(key);
        if self.pools.multi_attach.get(&name).is_none() {
            return Ok(());
        }
        self.journal(steps, "forget-multi-attach", move |pools| pools.multi_attach.remove(&name)).await
    }

    async fn create_thin(
        &self,
        steps: &Steps,
        lvm: &Lvm,
        key: &VolumeKey,
        size: ByteSize,
        largest: u64,
    ) -> Result<Outcome, Failure> {
        check_room(key, size.bytes(), largest)?;
        match steps.run("create-volume", lvm.create(key.volume.as_str(), size)).await {
            Ok(()) => Ok(Outcome::Created),
            Err(failure) => Err(self.undo_create(steps, lvm, key.volume.as_str(), failure).await),
        }
    }

    async fn create_thick(
        &self,
        steps: &Steps,
        lvm: &Lvm,
        key: &VolumeKey,
        size: ByteSize,
        largest: u64,
    ) -> Result<Outcome, Failure> {
        let unwiped = format!("{UNWIPED_PREFIX}{}", key.volume);
        let mut outcome = Outcome::Created;
        match lvm.find(&unwiped).await? {
            // An earlier call was cut off: the space is taken already.
            Some(lv) if lv.size == size && lv.ours => outcome = Outcome::Repaired,
            found => {
                if let Some(lv) = &found {
                    self.remove_leftover(steps, lvm, lv).await?;
                }
                let room = if found.is_some() { lvm.room().await?.largest } else { largest };
                check_room(key, size.bytes(), room)?;
            }
        }
        let made = async {
            if outcome == Outcome::Repaired {
                steps.run("activate-volume", lvm.activate(&unwiped)).await?;
            } else {
                steps.run("create-volume", lvm.create(&unwiped, size)).await?;
            }
            steps.run("wipe-volume", space::wipe(lvm.device(&unwiped), 0..size.bytes(), steps)).await?;
            steps.run("name-volume", lvm.rename(&unwiped, key.volume.as_str())).await
        }
        .await;
        match made {
            Ok(()) => Ok(outcome),
            // The last step may have done its work before it failed: then the volume has its own name.
            Err(failure) if failure.step == Some("name-volume") => {
                let failure = self.undo_create(steps, lvm, key.volume.as_str(), failure).await;
                Err(self.undo_create(steps, lvm, &unwiped, failure).await)
            }
            Err(failure) => Err(self.undo_create(steps, lvm, &unwiped, failure).await),
        }
    }

    /// Takes back a creation: the LV goes, if it came.
    async fn undo_create(&self, steps: &Steps, lvm: &Lvm, name: &str, mut failure: Failure) -> Failure {
        // The record stays, and the next start or the same call looks again.
        if may_still_be_done(&failure) {
            failure.undo.push("nothing was undone: it may still be done".to_owned());
            return failure;
        }
        let undo = async {
            match lvm.find(name).await? {
                Some(lv) if lv.ours => steps.run("undo-create-volume", lvm.remove(name)).await,
                _ => Ok(()),
            }
        };
        if let Err(error) = undo.await {
            failure.undo.push(format!("removing {}: {error}", lvm.place(name)));
        }
        failure
    }

    pub(super) async fn remove_leftover(
        &self,
        steps: &Steps,
        lvm: &Lvm,
        lv: &LogicalVolume,
    ) -> Result<(), Failure> {
        if !lv.ours {
            return Err(Failure::new(
                Reason::NotOurs,
                format!("{} was not made by Tether", lvm.place(&lv.name)),
            )
            .next("rename it or remove it with the tool that made it"));
        }
        steps.run("remove-leftover", lvm.remove(&lv.name)).await
    }

    pub(super) async fn delete_logical(
        &self,
        steps: &Steps,
        key: &VolumeKey,
        lvm: &Lvm,
        uuid: Option<&str>,
    ) -> Result<OperationReport, Failure> {
        let place = lvm.place(key.volume.as_str());
        if let Err(failure) = self.claims.claim(&place, Claim::Deletion) {
            // Whoever has it may have another volume of the name.
            let found = lvm.find(key.volume.as_str()).await?;
            return match (found, uuid) {
                (Some(lv), Some(uuid)) if lv.uuid != uuid => Ok(steps.report(Outcome::Unchanged)),
                _ => Err(failure.at("validate")),
            };
        }
        let outcome = self.remove_logical(steps, key, lvm, uuid).await;
        self.claims.release(&place, Claim::Deletion);
        Ok(steps.report(outcome?))
    }

    async fn remove_logical(
        &self,
        steps: &Steps,
        key: &VolumeKey,
        lvm: &Lvm,
        uuid: Option<&str>,
    ) -> Result<Outcome, Failure> {
        let mut outcome = Outcome::Unchanged;
        match steps.run("find-volume", lvm.find(key.volume.as_str())).await? {
            Some(lv) if uuid.is_some_and(|uuid| uuid != lv.uuid) => return Ok(Outcome::Unchanged),
            Some(lv) => {
                check_ours(key, &lv)?;
                if lv.open {
                    return Err(Failure::new(
                        Reason::VolumeInUse,
                        format!("volume {key} is open on the storage host"),
                    ));
                }
                let removed = async {
                    self.begin(steps, key, VolumeOperation::Delete, Some(lv.uuid.clone())).await?;
                    remove(steps, key, lvm).await
                };
                if let Err(mut failure) = removed.await {
                    // Its caller knows that it was not done: no start of the agent does it later.
                    if !may_still_be_done(&failure) {
                        let undone = self.end(steps, "undo-write-journal", key).await;
                        failure.undo.extend(undone.err().map(|error| error.to_string()));
                    }
                    return Err(failure);
                }
                outcome = Outcome::Removed;
            }
            // A creation that was cut off left its space behind under the other name.
            None if uuid.is_some() => {}
            None => {
                if let Some(leftover) = lvm.find(&format!("{UNWIPED_PREFIX}{}", key.volume)).await? {
                    self.remove_leftover(steps, lvm, &leftover).await?;
                    outcome = Outcome::Removed;
                }
            }
        }
        let record = record::journal_key(key);
        if self.pools.extensions.get(&record).is_some() {
            self.remove_extents(steps, lvm, key).await?;
            self.journal(steps, "forget-extension", move |pools| pools.extensions.remove(&record)).await?;
        }
        self.forget_multi_attach(steps, key).await?;
        if self.pools.operations.get(&record::journal_key(key)).is_some() {
            self.end(steps, "close-journal", key).await?;
        }
        if outcome == Outcome::Removed {
            tracing::info!(volume = %key, "volume deleted");
        }
        Ok(outcome)
    }
}

async fn remove(steps: &Steps, key: &VolumeKey, lvm: &Lvm) -> Result<(), Failure> {
    steps.run("remove-volume", lvm.remove(key.volume.as_str())).await?;
    match lvm.find(key.volume.as_str()).await? {
        None => Ok(()),
        Some(_) => {
            Err(Failure::new(Reason::StillThere, format!("volume {key} is still there after lvremove")))
        }
    }
}

/// An LV is what its pool makes: raw, and thick or thin.
fn check_wanted(key: &VolumeKey, lvm: &Lvm, wanted: Wanted) -> Result<(), Failure> {
    let pool = &key.pool;
    let problem = if wanted.format != VolumeFormat::Raw {
        format!("format: pool {pool} is of kind lvm and has raw volumes only, got {}", wanted.format)
    } else {
        match wanted.provisioning {
            Some(other) if other != lvm.provisioning() => format!(
                "provisioning: pool {pool} has {} volumes only, got {}",
                lvm.provisioning().as_str(),
                other.as_str()
            ),
            _ => return Ok(()),
        }
    };
    Err(Failure::new(Reason::InvalidArgument, problem).at("validate"))
}

fn check_ours(key: &VolumeKey, lv: &LogicalVolume) -> Result<(), Failure> {
    if lv.ours {
        return Ok(());
    }
    Err(Failure::new(
        Reason::NotOurs,
        format!("volume {key} was not made by Tether: it has no tag {:?}", lvm::TAG),
    )
    .next("use the LVM tools if you are sure"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_of_kind_lvm_makes_raw_volumes_of_its_own_provisioning_only() {
        let (thick, thin) = (Lvm::new("vg0", None, &[]), Lvm::new("vg0", Some("pool"), &[]));
        let key = "fast/a".parse().unwrap();
        for (lvm, format, provisioning, words) in [
            (&thick, VolumeFormat::Raw, None, None),
            (&thick, VolumeFormat::Raw, Some(Provisioning::Thick), None),
            (&thin, VolumeFormat::Raw, Some(Provisioning::Thin), None),
            (&thick, VolumeFormat::Qcow2, None, Some("raw volumes only, got qcow2")),
            (&thick, VolumeFormat::Raw, Some(Provisioning::Thin), Some("has thick volumes only, got thin")),
            (&thin, VolumeFormat::Raw, Some(Provisioning::Thick), Some("has thin volumes only, got thick")),
        ] {
            let size = 1.try_into().unwrap();
            let wanted = Wanted { size, format, provisioning, multi_attach: false };
            match (check_wanted(&key, lvm, wanted), words) {
                (Ok(()), None) => {}
                (Err(failure), Some(words)) => {
                    assert_eq!(failure.reason, Reason::InvalidArgument);
                    assert!(failure.message.contains(words), "{failure}");
                }
                (outcome, _) => panic!("{wanted:?}: {outcome:?}"),
            }
        }
    }
}
