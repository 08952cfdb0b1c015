//! Making a file larger, the order of steps.
//!
//! The journal says first what the file is to become. What was never written reads as zeroes, so there is no old data to
//! wipe. A qcow2 file that is exported is not touched: the hypervisor's QEMU writes to it, and grows it on the compute
//! host's word. Leases of NFS may have expired, so that nobody seems to hold a lock proves nothing.

use std::path::Path;
use std::sync::Arc;

use tether_agent_core::failure::{Failure, Reason};
use tether_agent_core::qcow2;
use tether_agent_core::steps::{KERNEL_DEADLINE, Steps};
use tether_proto::wire::{OperationReport, Outcome};
use tether_proto::{ByteSize, VolumeFormat, VolumeKey};

use super::super::find::FoundFile;
use super::super::record::{FileRecord, journal_key};
use super::super::{VolumeView, Volumes, check_room, find, may_still_be_done, round_up, shrink_refused};
use super::{UNIT, lengthen, run};
use crate::directory::Directory;
use crate::directory::file::{no_room, sync};
use crate::identity::Provisioning;
use crate::pool::Pools;
use crate::space;

impl Volumes {
    pub(in super::super) async fn extend_file(
        &self,
        steps: &Steps,
        key: &VolumeKey,
        directory: &Directory,
        size: ByteSize,
        exported: bool,
    ) -> Result<(VolumeView, OperationReport), Failure> {
        let size = round_up(size, UNIT)?;
        let file = steps.run("find-volume", find::file(&self.pools, directory, key)).await?;
        let record = &file.record;
        let present = record.size.bytes().max(file.found.size);
        if size.bytes() < present {
            return Err(shrink_refused(key, present, size));
        }
        let unfinished = record.extending_to.is_some();
        let others_part = exported && record.format == VolumeFormat::Qcow2;
        if size == record.size && (!unfinished || others_part) {
            return Ok((self.file_view(record), steps.report(Outcome::Unchanged)));
        }
        steps.run("check-pool", self.check_growth(directory, record, size)).await?;
        if record.format == VolumeFormat::Qcow2 && !exported {
            // Nobody is to have it, and a client may have it all the same: nfsd knows.
            let inode = file.found.identity.inode;
            self.check_closed(steps, directory.file(&file.name), inode).await?;
        }
        let pending = FileRecord { extending_to: Some(size), ..record.clone() };
        let told = if others_part {
            let told = FileRecord { size, ..pending };
            self.write_file_record(steps, "close-journal", &told).await?;
            told
        } else {
            let grown_from = exported.then(|| record.grown_from.unwrap_or(record.size));
            let grown_from = grown_from.filter(|_| record.format == VolumeFormat::Raw);
            let done = FileRecord { size, extending_to: None, grown_from, ..record.clone() };
            let made = async {
                self.write_file_record(steps, "write-journal", &pending).await?;
                steps.run("extend-volume", grow(directory, &file, size, steps, "extend-volume")).await?;
                steps.run("verify-volume", verify_grown(directory, &done)).await?;
                self.write_file_record(steps, "close-journal", &done).await
            };
            match made.await {
                Ok(()) => done,
                Err(failure) => {
                    return Err(self.undo_grow(steps, directory, &file, pending, exported, failure).await);
                }
            }
        };
        tracing::info!(volume = %key, bytes = size.bytes(), "volume extended");
        let outcome = if unfinished && !others_part { Outcome::Repaired } else { Outcome::Created };
        Ok((self.file_view(&told), steps.report(outcome)))
    }

    async fn check_growth(
        &self,
        directory: &Directory,
        record: &FileRecord,
        size: ByteSize,
    ) -> Result<(), Failure> {
        let looked = directory.clone();
        let room = directory.look(move || looked.room()).await?;
        match record.provisioning {
            Provisioning::Thin => check_room(&record.volume, size.bytes(), room.size),
            Provisioning::Thick => {
                check_room(&record.volume, size.bytes().saturating_sub(record.size.bytes()), room.free)
            }
        }
    }

    /// Takes back what this call did: nobody was told of it. A qcow2 file that has grown stays, and the journal knows.
    async fn undo_grow(
        &self,
        steps: &Steps,
        directory: &Directory,
        before: &FoundFile,
        pending: FileRecord,
        exported: bool,
        mut failure: Failure,
    ) -> Failure {
        // A guest that was started meanwhile has opened the longer file, and may have written to its end.
        if exported {
            failure
                .undo
                .push("nothing was undone, for the volume is exported: the same call finishes it".to_owned());
            return failure;
        }
        // The journal stays as it is: a file of either size is ours.
        if may_still_be_done(&failure) {
            failure.undo.push("nothing was undone: it may still be done".to_owned());
            return failure;
        }
        let record = &before.record;
        let undo = async {
            if record.format == VolumeFormat::Raw {
                steps.run("undo-extend-volume", shrink(directory, before, steps)).await?;
            } else {
                let (_, found) = find::measure(directory, &pending).await?;
                if found.size != before.found.size {
                    return self.write_file_record(steps, "undo-write-journal", &pending).await;
                }
            }
            self.write_file_record(steps, "undo-write-journal", record).await
        };
        if let Err(error) = undo.await {
            failure.undo.push(error.to_string());
        }
        failure
    }
}

/// Ends an extension that was cut off, or that was left to a compute host which did not come to it. A qcow2 file must be one that
/// nobody has: then no QEMU has it open. Gives the record as it is afterwards.
pub(crate) async fn settle(
    pools: &Arc<Pools>,
    directory: &Directory,
    file: &FoundFile,
    steps: &Steps,
) -> Result<FileRecord, Failure> {
    // What has grown already stays so, and needs no more room.
    let size = ByteSize::try_from(file.record.size.bytes().max(file.found.size))?;
    let size = round_up(size, UNIT)?;
    const STEP: &str = "finish-extension";
    grow(directory, file, size, steps, STEP).await?;
    let record = FileRecord { size, extending_to: None, ..file.record.clone() };
    verify_grown(directory, &record).await?;
    let (pools, settled) = (pools.clone(), record.clone());
    let put = move || pools.files.put(&journal_key(&settled.volume), &settled);
    steps.block(STEP, KERNEL_DEADLINE, put).await?;
    Ok(record)
}

/// The file has all of its new size. It may have been cut this very moment, by a hypervisor that was late.
async fn verify_grown(directory: &Directory, record: &FileRecord) -> Result<(), Failure> {
    let (_, found) = find::measure(directory, record).await?;
    if found.size < record.size.bytes() {
        return Err(Failure::new(
            Reason::OperationRunning,
            format!(
                "a hypervisor has just told a guest of {} an earlier size, and cut its file to {} bytes",
                record.volume, found.size
            ),
        )
        .next("call again"));
    }
    Ok(())
}

async fn grow(
    directory: &Directory,
    file: &FoundFile,
    size: ByteSize,
    steps: &Steps,
    step: &'static str,
) -> Result<(), Failure> {
    let path = directory.file(&file.name);
    if file.found.size == size.bytes() {
        return Ok(());
    }
    let (opener, name) = (directory.clone(), file.name.clone());
    let opened = Arc::new(steps.block(step, KERNEL_DEADLINE, move || opener.open(&name)).await?);
    match (file.record.format, file.record.provisioning) {
        (VolumeFormat::Qcow2, _) => run(qcow2::resize(&path, size.bytes(), directory.owner())).await?,
        (VolumeFormat::Raw, Provisioning::Thin) => lengthen(&opened, &path, size, steps, step).await?,
        (VolumeFormat::Raw, Provisioning::Thick) => {
            space::take(&opened, &path, file.found.size..size.bytes(), no_room, steps, step).await?;
        }
    }
    steps.block(step, KERNEL_DEADLINE, move || sync(&opened, &path)).await
}

/// Gives a raw file the length back that it had when the call began.
async fn shrink(directory: &Directory, before: &FoundFile, steps: &Steps) -> Result<(), Failure> {
    const STEP: &str = "undo-extend-volume";
    let (opener, name) = (directory.clone(), before.name.clone());
    let opened = Arc::new(steps.block(STEP, KERNEL_DEADLINE, move || opener.open(&name)).await?);
    let path: &Path = &directory.file(&before.name);
    lengthen(&opened, path, ByteSize::try_from(before.found.size)?, steps, STEP).await?;
    let path = path.to_owned();
    steps.block(STEP, KERNEL_DEADLINE, move || sync(&opened, &path)).await
}
