//! Making a logical volume larger, the order of steps.
//!
//! What a thick LV grows by may hold somebody's old data (F5), and the LV has its name already. So the part that is not
//! wiped yet is in the journal before it is there, and until it is wiped and forgotten there the volume is exported to
//! nobody new. Whoever has the volume already is told of its size only when all is done.

use tether_agent_core::failure::{Failure, Reason};
use tether_agent_core::steps::Steps;
use tether_proto::wire::{OperationReport, Outcome};
use tether_proto::{ByteSize, VolumeKey};

use super::super::record::{ExtensionRecord, journal_key};
use super::super::{VolumeView, Volumes, check_room, find, may_still_be_done, round_up, shrink_refused};
use super::check_ours;
use crate::identity::Provisioning;
use crate::lvm::{LogicalVolume, Lvm};
use crate::pool::{Pools, not_found};
use crate::space;

impl Volumes {
    pub(in super::super) async fn extend_logical(
        &self,
        steps: &Steps,
        key: &VolumeKey,
        lvm: &Lvm,
        size: ByteSize,
    ) -> Result<(VolumeView, OperationReport), Failure> {
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
        let from = pending.map_or(lv.size, |pending| pending.from.min(lv.size));
        let record = ExtensionRecord { volume: key.clone(), uuid: lv.uuid.clone(), from, to: size };
        let put = record.clone();
        let made = async {
            self.journal(steps, "write-journal", move |pools| {
                pools.extensions.put(&journal_key(&put.volume), &put)
            })
            .await?;
            if lv.size < size {
                steps.run("extend-volume", lvm.extend(key.volume.as_str(), size)).await?;
            }
            steps.run("verify-volume", verify(lvm, key, &lv.uuid, size)).await?;
            let device = lvm.device(key.volume.as_str());
            steps.run("wipe-volume", space::wipe(device, from.bytes()..size.bytes(), steps)).await?;
            self.forget_extension(steps, "close-journal", key).await
        }
        .await;
        match made {
            Ok(()) => Ok(outcome),
            Err(failure) => Err(self.undo_extend(steps, lvm, &record, failure).await),
        }
    }

    /// An LV that is as large as before has nothing to be wiped: the record goes. Otherwise it stays, and says what is to
    /// be done.
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
        let may_still_be_done = may_still_be_done(&failure);
        let undo = async {
            match lvm.find(key.volume.as_str()).await? {
                Some(lv) if lv.size == record.from && !may_still_be_done => {
                    self.forget_extension(steps, "undo-write-journal", key).await.map(|()| true)
                }
                _ => Ok(false),
            }
        };
        match undo.await {
            Ok(true) => failure,
            Ok(false) => unfinished(failure, record),
            Err(error) => {
                failure.undo.push(error.to_string());
                unfinished(failure, record)
            }
        }
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

/// Refuses a volume whose new part may show old data (F5).
pub(crate) fn check_extended(
    pools: &Pools,
    key: &VolumeKey,
    uuid: &str,
    size: ByteSize,
) -> Result<(), Failure> {
    let Some(record) = pools.extension(key, uuid) else {
        return Ok(());
    };
    let record = ExtensionRecord { to: record.to.max(size), ..record };
    let failure = Failure::new(
        Reason::ExtensionUnfinished,
        format!(
            "an extension of volume {key} from {} to {} bytes is not finished: what is behind that may show old data",
            record.from.bytes(),
            record.to.bytes()
        ),
    );
    Err(unfinished(failure.at("validate"), &record))
}

/// The failure with the command that finishes the extension.
fn unfinished(failure: Failure, record: &ExtensionRecord) -> Failure {
    let command = format!("tether volume extend {} {}", record.volume, record.to.bytes());
    failure.next(format!("finish the extension: {command}; until then nobody new gets the volume"))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f5_an_unfinished_extension_names_the_command_that_finishes_it() {
        let record = ExtensionRecord {
            volume: "thick/a".parse().unwrap(),
            uuid: "u".into(),
            from: ByteSize::try_from(4096).unwrap(),
            to: ByteSize::try_from(8192).unwrap(),
        };
        let failure = unfinished(Failure::new(Reason::WipeFailed, "wiping failed"), &record);
        assert!(failure.next.unwrap().contains("tether volume extend thick/a 8192"));
    }
}
