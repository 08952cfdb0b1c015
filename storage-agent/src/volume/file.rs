//! Files, the order of steps: create, delete, list. Making them larger is in `file/extend`.
//!
//! A file is made under a name that is no volume's and gets its own name when it is whole. Before that the journal has its
//! record, so a creation that was cut off is taken up again by the same call, or cleared away by the next one.

mod extend;

pub(crate) use extend::settle;
use tether_agent_core::command::CommandLine;
use tether_agent_core::failure::{Failure, Reason};
use tether_agent_core::qcow2;
use tether_agent_core::steps::{KERNEL_DEADLINE, Steps};
use tether_proto::wire::{self, OperationReport, Outcome};
use tether_proto::{ByteSize, FileName, PoolName, VolumeFormat, VolumeKey};

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use super::record::{FilePhase, FileRecord, journal_key};
use super::{PoolRoom, VolumeView, Volumes, Wanted, check_room, different, find, round_up};
use crate::claims::Claim;
use crate::directory::file::{no_room, set_length, sync};
use crate::directory::{Directory, DirectoryError, FileIdentity};
use crate::identity::Provisioning;
use crate::nfs::Whose;
use crate::space;

/// What a file's size is a multiple of.
const UNIT: u64 = 1024 * 1024;

impl Volumes {
    pub(super) fn list_files(&self, pool: &PoolName) -> Vec<VolumeView> {
        let records = self.pools.files.list().into_iter();
        records
            .filter(|record| record.volume.pool == *pool && find::is_volume(record))
            .map(|record| self.file_view(&record))
            .collect()
    }

    pub(super) fn file_view(&self, record: &FileRecord) -> VolumeView {
        let key = record.volume.clone();
        let place = self.pools.get(&key.pool).map(|pool| pool.place(&key.volume));
        VolumeView {
            exported_for: place.map(|place| self.claims.exported_for(&place)).unwrap_or_default(),
            key,
            identity: record.volume_identity(),
            format: record.format,
            provisioning: record.provisioning,
            transport: wire::Transport::Nfs,
            ours: true,
            multi_attach: record.multi_attach,
        }
    }

    pub(super) async fn directory_room(
        &self,
        pool: &PoolName,
        directory: &Directory,
    ) -> Result<PoolRoom, Failure> {
        self.pools.look_at_directory(pool, directory).await?;
        let looked = directory.clone();
        let room = directory.look(move || looked.room()).await?;
        let records = self.pools.files.list().into_iter().filter(|record| record.volume.pool == *pool);
        let provisioned = records.map(|record| record.size.bytes()).fold(0, u64::saturating_add);
        Ok(PoolRoom { size: room.size, free: room.free, provisioned, metadata_percent: None })
    }

    pub(super) async fn create_file(
        &self,
        steps: &Steps,
        key: &VolumeKey,
        directory: &Directory,
        wanted: Wanted,
    ) -> Result<(VolumeView, OperationReport), Failure> {
        let provisioning = check_wanted(wanted)?;
        let size = round_up(wanted.size, UNIT)?;
        steps.run("check-pool", self.pools.use_directory(&key.pool, directory)).await?;
        let new = FileRecord::new(key.clone(), wanted.format, provisioning, size, wanted.multi_attach);
        if let Some(record) = self.pools.file(key).filter(|record| record.phase == FilePhase::Ready) {
            if let Some(what) = record.difference(&new) {
                return Err(different(key, &what));
            }
            steps.run("find-volume", find::measure(directory, &record)).await?;
            return Ok((self.file_view(&record), steps.report(Outcome::Unchanged)));
        }
        let place = format!("{}/{}", directory.path(), key.volume);
        self.claims.claim(&place, Claim::Creation).map_err(|failure| failure.at("validate"))?;
        let made = self.make_file(steps, directory, new).await;
        self.claims.release(&place, Claim::Creation);
        let (record, outcome) = made?;
        tracing::info!(volume = %key, bytes = record.size.bytes(), format = %record.format, "volume created");
        Ok((self.file_view(&record), steps.report(outcome)))
    }

    async fn make_file(
        &self,
        steps: &Steps,
        directory: &Directory,
        new: FileRecord,
    ) -> Result<(FileRecord, Outcome), Failure> {
        let key = new.volume.clone();
        let (record, outcome) = match self.pools.file(&key) {
            Some(begun) if begun.phase == FilePhase::Creating && begun.difference(&new).is_none() => {
                (begun, Outcome::Repaired)
            }
            Some(leftover) => {
                self.clear_leftover(steps, directory, &leftover).await?;
                (new, Outcome::Created)
            }
            None => (new, Outcome::Created),
        };
        let name = record.file_name()?;
        let named = self.is_named(directory, &name, &record).await?;
        if !named {
            self.check_file_room(directory, &record).await?;
        }
        match self.make_steps(steps, directory, &name, record.clone(), named).await {
            Ok(record) => Ok((record, outcome)),
            Err(failure) => Err(self.undo_make(steps, directory, &name, &key, failure).await),
        }
    }

    async fn make_steps(
        &self,
        steps: &Steps,
        directory: &Directory,
        name: &FileName,
        mut record: FileRecord,
        named: bool,
    ) -> Result<FileRecord, Failure> {
        if !named {
            record.identity = None;
            self.write_file_record(steps, "write-journal", &record).await?;
            let made = steps.run("create-file", fill(directory, name, &record, steps)).await?;
            record.identity = Some(made);
            // Only with this a file under the volume's own name is known to be ours.
            self.write_file_record(steps, "record-file", &record).await?;
            let (directory, name) = (directory.clone(), name.clone());
            steps.run_blocking("name-file", move || directory.name(&name)).await?;
        }
        steps.run("verify-volume", find::measure(directory, &record)).await?;
        record.phase = FilePhase::Ready;
        self.write_file_record(steps, "close-journal", &record).await?;
        Ok(record)
    }

    /// Did an earlier call come as far as giving the file its name? Anything else under that name is somebody else's.
    async fn is_named(
        &self,
        directory: &Directory,
        name: &FileName,
        record: &FileRecord,
    ) -> Result<bool, Failure> {
        let (looked, called) = (directory.clone(), name.clone());
        if !directory.look(move || looked.is_taken(&called)).await? {
            return Ok(false);
        }
        if record.identity.is_some() && find::measure(directory, record).await.is_ok() {
            return Ok(true);
        }
        let path = directory.file(name).display().to_string();
        Err(different(&record.volume, &format!("was made by somebody else: {path}"))
            .next("use another name, or move that file away"))
    }

    async fn check_file_room(&self, directory: &Directory, record: &FileRecord) -> Result<(), Failure> {
        let looked = directory.clone();
        let room = directory.look(move || looked.room()).await?;
        let most = match record.provisioning {
            Provisioning::Thick => room.free,
            // It grows as it is written, but never past the file system.
            Provisioning::Thin => room.size,
        };
        check_room(&record.volume, record.size.bytes(), most)
    }

    /// Takes back a creation: file and record go, if they came.
    async fn undo_make(
        &self,
        steps: &Steps,
        directory: &Directory,
        name: &FileName,
        key: &VolumeKey,
        mut failure: Failure,
    ) -> Failure {
        // What the kernel may still do must find its record.
        if failure.reason == Reason::Stuck {
            failure.undo.push("nothing was undone: the kernel may still do it".to_owned());
            return failure;
        }
        let Some(record) = self.pools.file(key) else { return failure };
        let (gone, called, recorded) = (directory.clone(), name.clone(), record.identity);
        let undo = async {
            steps.run_blocking("undo-create-file", move || gone.remove_leftovers(&called, recorded)).await?;
            self.forget_file(steps, "undo-write-journal", key).await
        };
        if let Err(error) = undo.await {
            failure.undo.push(format!("removing {}: {error}", directory.file(name).display()));
        }
        failure
    }

    /// What a creation or deletion that was cut off has left.
    pub(super) async fn clear_leftover(
        &self,
        steps: &Steps,
        directory: &Directory,
        record: &FileRecord,
    ) -> Result<(), Failure> {
        let (gone, name, recorded) = (directory.clone(), record.file_name()?, record.identity);
        steps.run_blocking("remove-leftover", move || gone.remove_leftovers(&name, recorded)).await?;
        self.forget_file(steps, "forget-leftover", &record.volume).await
    }

    pub(super) async fn delete_file(
        &self,
        steps: &Steps,
        key: &VolumeKey,
        directory: &Directory,
        uuid: Option<&str>,
    ) -> Result<OperationReport, Failure> {
        // A directory whose file system is not mounted has no files, which must not be taken for an answer.
        steps.run("check-pool", self.pools.use_directory(&key.pool, directory)).await?;
        let place = format!("{}/{}", directory.path(), key.volume);
        if let Err(failure) = self.claims.claim(&place, Claim::Deletion) {
            // Whoever has it may have another volume of the name.
            return match (self.pools.file(key), uuid) {
                (Some(record), Some(uuid)) if record.uuid != uuid => Ok(steps.report(Outcome::Unchanged)),
                _ => Err(failure.at("validate")),
            };
        }
        let outcome = self.remove_file(steps, key, directory, uuid).await;
        self.claims.release(&place, Claim::Deletion);
        Ok(steps.report(outcome?))
    }

    /// No client of the share has the file open, and the server is there to know.
    async fn check_closed(&self, steps: &Steps, path: PathBuf, inode: u64) -> Result<(), Failure> {
        let server = self.nfs.clone();
        let check = move || {
            server.check_running()?;
            server.check_closed(&path, inode, &Whose::all())
        };
        steps.run_blocking("check-closed", check).await
    }

    async fn remove_file(
        &self,
        steps: &Steps,
        key: &VolumeKey,
        directory: &Directory,
        uuid: Option<&str>,
    ) -> Result<Outcome, Failure> {
        let Some(record) = self.pools.file(key) else {
            let foreign = steps.run("find-volume", find::foreign_file(directory, key)).await?;
            return match foreign {
                None => Ok(Outcome::Unchanged),
                Some(path) => Err(Failure::new(Reason::NotOurs, format!("{path} was not made by Tether"))
                    .next("remove it with rm if you are sure")),
            };
        };
        if uuid.is_some_and(|uuid| uuid != record.uuid) {
            return Ok(Outcome::Unchanged);
        }
        let Some(identity) = record.identity.filter(|_| find::is_volume(&record)) else {
            self.clear_leftover(steps, directory, &record).await?;
            return Ok(Outcome::Removed);
        };
        let name = record.file_name()?;
        let (looked, called) = (directory.clone(), name.clone());
        steps.run_blocking("find-volume", move || looked.is_ours(&called, identity)).await?;
        self.check_closed(steps, directory.file(&name), identity.inode).await?;
        let deleting = FileRecord { phase: FilePhase::Deleting, ..record };
        self.write_file_record(steps, "write-journal", &deleting).await?;
        let gone = directory.clone();
        steps.run_blocking("remove-volume", move || gone.remove(&name, identity)).await?;
        self.forget_file(steps, "close-journal", key).await?;
        tracing::info!(volume = %key, "volume deleted");
        Ok(Outcome::Removed)
    }

    async fn write_file_record(
        &self,
        steps: &Steps,
        step: &'static str,
        record: &FileRecord,
    ) -> Result<(), Failure> {
        let record = record.clone();
        self.journal(steps, step, move |pools| pools.files.put(&journal_key(&record.volume), &record)).await
    }

    async fn forget_file(&self, steps: &Steps, step: &'static str, key: &VolumeKey) -> Result<(), Failure> {
        let record = journal_key(key);
        self.journal(steps, step, move |pools| pools.files.remove(&record)).await
    }
}

/// Makes the unfinished file with all that will be in it.
async fn fill(
    directory: &Directory,
    name: &FileName,
    record: &FileRecord,
    steps: &Steps,
) -> Result<FileIdentity, Failure> {
    let (maker, called) = (directory.clone(), name.clone());
    const STEP: &str = "create-file";
    let (file, identity) = steps.block(STEP, KERNEL_DEADLINE, move || maker.make(&called)).await?;
    let (file, path, size) = (Arc::new(file), directory.unfinished(name), record.size);
    match (record.format, record.provisioning) {
        (VolumeFormat::Qcow2, _) => run(qcow2::create(&path, size.bytes(), directory.owner())).await?,
        (VolumeFormat::Raw, Provisioning::Thin) => lengthen(&file, &path, size, steps, STEP).await?,
        (VolumeFormat::Raw, Provisioning::Thick) => {
            space::take(&file, &path, 0..size.bytes(), no_room, steps, STEP).await?;
        }
    }
    steps.block(STEP, KERNEL_DEADLINE, move || sync(&file, &path)).await?;
    Ok(identity)
}

/// Runs qemu-img.
async fn run(tool: CommandLine) -> Result<(), DirectoryError> {
    tool.run().await?;
    Ok(())
}

async fn lengthen(
    file: &Arc<File>,
    path: &std::path::Path,
    size: ByteSize,
    steps: &Steps,
    step: &'static str,
) -> Result<(), Failure> {
    let (file, path) = (file.clone(), path.to_owned());
    steps.block(step, KERNEL_DEADLINE, move || set_length(&file, &path, size.bytes())).await
}

/// What a directory has; says how the space of a new file is had.
fn check_wanted(wanted: Wanted) -> Result<Provisioning, Failure> {
    if wanted.multi_attach && wanted.format == VolumeFormat::Qcow2 {
        return Err(Failure::new(
            Reason::InvalidArgument,
            "multi_attach: a qcow2 volume has one writer: its header and tables are kept in that one's memory",
        )
        .at("validate")
        .next("make it raw"));
    }
    match (wanted.format, wanted.provisioning.unwrap_or(Provisioning::Thin)) {
        (VolumeFormat::Qcow2, Provisioning::Thick) => {
            Err(Failure::new(Reason::InvalidArgument, "provisioning: a qcow2 volume is thin, got thick")
                .at("validate")
                .next("make it thin, or raw and thick"))
        }
        (_, provisioning) => Ok(provisioning),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_has_thin_and_thick_raw_files_and_thin_qcow2_files() {
        let size = ByteSize::try_from(1).unwrap();
        let check =
            |format, provisioning| check_wanted(Wanted { size, format, provisioning, multi_attach: false });
        let shared = |format| check_wanted(Wanted { size, format, provisioning: None, multi_attach: true });
        assert!(shared(VolumeFormat::Raw).is_ok() && shared(VolumeFormat::Qcow2).is_err());
        assert_eq!(check(VolumeFormat::Raw, None).unwrap(), Provisioning::Thin);
        assert_eq!(check(VolumeFormat::Qcow2, None).unwrap(), Provisioning::Thin);
        assert_eq!(check(VolumeFormat::Raw, Some(Provisioning::Thick)).unwrap(), Provisioning::Thick);
        let refused = check(VolumeFormat::Qcow2, Some(Provisioning::Thick)).unwrap_err();
        assert_eq!(refused.reason, Reason::InvalidArgument);
    }
}
