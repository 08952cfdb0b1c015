//! Making a logical volume larger, the order of steps.
//!
//! What a thick LV grows by may hold somebody's old data, and whoever has the LV sees a new size at once when he looks (F5). So
//! the extents are taken by an LV of another name first, and wiped; only then are they the volume's.

use tether_agent_core::failure::{Failure, Reason};
use tether_agent_core::steps::Steps;
use tether_proto::wire::{OperationReport, Outcome};
use tether_proto::{ByteSize, VolumeKey};

use super::super::record::{ExtensionRecord, journal_key};
use super::super::{VolumeView, Volumes, check_room, find, may_still_be_done, round_up, shrink_refused};
use super::check_ours;
use crate::identity::Provisioning;
use crate::lvm::{EXTENTS_PREFIX, LogicalVolume, Lvm};
use crate::pool::not_found;
use crate::space;

impl Volumes {
    pub(in super::super) async fn extend_logical(
        &self,
        steps: &Steps,
        key: &VolumeKey,
        lvm: &Lvm,
        size: ByteSize,
    ) -> Result<(VolumeView, OperationReport), Failure> {
        self.pools.check_not_deleting(key)?;
        let room = steps.run("check-pool", lvm.room()).await?;
        let size = round_up(size, room.extent)?;
        let lv = steps
            .run("find-volume", async { lvm.find(key.volume.as_str()).await?.ok_or_else(|| not_found(key)) })
            .await?;
        check_ours(key, &lv)?;
        if size < lv.size {
            return Err(shrink_refused(key, lv.size.bytes(), size));
        }
        let pending = self.pools.extension(key, &lv.uuid);
        if size == lv.size && pending.is_none() {
            return Ok((self.logical_view(key.clone(), lvm, lv), steps.report(Outcome::Unchanged)));
        }
        let outcome = match lvm.provisioning() {
            // The pool zeroes what it hands out; what it has promised in all may be more than it has.
            Provisioning::Thin => {
                check_room(key, size.bytes(), room.largest)?;
                steps.run("extend-volume", lvm.extend(key.volume.as_str(), size)).await?;
                steps.run("verify-volume", verify(lvm, key, &lv.uuid, size)).await?;
                Outcome::Created
            }
            Provisioning::Thick => {
                // Of an extension that was cut off; its extents are room again.
                let room = if pending.is_some() {
                    self.remove_extents(steps, lvm, key).await?;
                    lvm.room().await?
                } else {
                    room
                };
                check_room(key, size.bytes() - lv.size.bytes(), room.largest)?;
                self.extend_thick(steps, key, lvm, &lv, size, pending).await?
            }
        };
        tracing::info!(volume = %key, bytes = size.bytes(), "volume extended");
        Ok((self.logical_view(key.clone(), lvm, LogicalVolume { size, ..lv }), steps.report(outcome)))
    }

    async fn extend_thick(
        &self,
        steps: &Steps,
        key: &VolumeKey,
        lvm: &Lvm,
        lv: &LogicalVolume,
        size: ByteSize,
        pending: Option<ExtensionRecord>,
    ) -> Result<Outcome, Failure> {
        let outcome = if pending.is_some() { Outcome::Repaired } else { Outcome::Created };
        let record = ExtensionRecord { volume: key.clone(), uuid: lv.uuid.clone(), from: lv.size, to: size };
        let made = async {
            if let Ok(more) = ByteSize::try_from(size.bytes() - lv.size.bytes()) {
                let put = record.clone();
                self.journal(steps, "write-journal", move |pools| {
                    pools.extensions.put(&journal_key(&put.volume), &put)
                })
                .await?;
                let extents = extents_of(key);
                steps.run("create-extents", lvm.create(&extents, more)).await?;
                let wiped = space::wipe(lvm.device(&extents), 0..more.bytes(), steps);
                steps.run("wipe-extents", wiped).await?;
                steps.run("extend-volume", lvm.extend_by(key.volume.as_str(), size, &extents)).await?;
            }
            steps.run("verify-volume", verify(lvm, key, &lv.uuid, size)).await?;
            self.forget_extension(steps, "close-journal", key).await
        }
        .await;
        match made {
            Ok(()) => Ok(outcome),
            Err(failure) => Err(self.undo_extend(steps, lvm, &record, failure).await),
        }
    }

    /// What an extension that was cut off has taken for the volume and not given to it.
    pub(in super::super) async fn remove_extents(
        &self,
        steps: &Steps,
        lvm: &Lvm,
        key: &VolumeKey,
    ) -> Result<(), Failure> {
        match lvm.find(&extents_of(key)).await? {
            Some(lv) => self.remove_leftover(steps, lvm, &lv).await,
            None => Ok(()),
        }
    }

    /// An LV that is as large as before has had no extension: the record goes. Otherwise it stays, and the same call ends it.
    async fn undo_extend(
        &self,
        steps: &Steps,
        lvm: &Lvm,
        record: &ExtensionRecord,
        mut failure: Failure,
    ) -> Failure {
        let key = &record.volume;
        if self.pools.extension(key, &record.uuid).is_none() {
            return failure;
        }
        if may_still_be_done(&failure) {
            failure.undo.push("nothing was undone: it may still be done".to_owned());
            return failure;
        }
        let undo = async {
            self.remove_extents(steps, lvm, key).await?;
            match lvm.find(key.volume.as_str()).await? {
                Some(lv) if lv.size == record.from => {
                    self.forget_extension(steps, "undo-write-journal", key).await
                }
                _ => Ok(()),
            }
        };
        failure.undo.extend(undo.await.err().map(|error| error.to_string()));
        failure
    }

    async fn forget_extension(
        &self,
        steps: &Steps,
        step: &'static str,
        key: &VolumeKey,
    ) -> Result<(), Failure> {
        let record = journal_key(key);
        self.journal(steps, step, move |pools| pools.extensions.remove(&record)).await
    }
}

/// The LV that takes the extents for a volume until they are wiped.
fn extents_of(key: &VolumeKey) -> String {
    format!("{EXTENTS_PREFIX}{}", key.volume)
}

/// The LV is the one that was found, and has its new size in the kernel, too.
async fn verify(lvm: &Lvm, key: &VolumeKey, uuid: &str, size: ByteSize) -> Result<(), Failure> {
    let identity = find::logical(lvm, key).await?;
    if identity.uuid == uuid && identity.size == size {
        return Ok(());
    }
    Err(Failure::new(
        Reason::LvmFailed,
        format!(
            "volume {key} has {} bytes and UUID {} after lvextend, and not {} and {uuid}",
            identity.size.bytes(),
            identity.uuid,
            size.bytes()
        ),
    ))
}
