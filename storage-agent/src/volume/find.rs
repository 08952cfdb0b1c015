//! Finding a volume and proving that it is the one: for exports, extensions and deletions. Changes nothing, but for making
//! an inactive LV active.

use std::sync::Arc;

use tether_agent_core::failure::{Failure, Reason};
use tether_agent_core::steps::{KERNEL_DEADLINE, blocking};
use tether_proto::{ByteSize, FileName, VolumeFormat, VolumeKey};

use super::record::{DirectoryRecord, FilePhase, FileRecord, file_name};
use crate::directory::file::Found;
use crate::directory::{Directory, DirectoryError};
use crate::identity::VolumeIdentity;
use crate::lvm::Lvm;
use crate::pool::{Pools, not_found};

/// A file that is there and is the one that was recorded.
#[derive(Debug, Clone)]
pub(crate) struct FoundFile {
    /// What is recorded of it.
    pub(crate) record: FileRecord,
    /// Its name in the directory.
    pub(crate) name: FileName,
    /// The directory that it is in.
    pub(crate) directory: DirectoryRecord,
    /// The file itself. Its size is the recorded one unless an extension is not finished.
    pub(crate) found: Found,
}

impl FoundFile {
    /// The size that a hypervisor finds. A qcow2 file that is exported may be told larger before it is: ResizeAttachment makes it
    /// so.
    pub(crate) fn exported_size(&self) -> ByteSize {
        match self.record.format {
            VolumeFormat::Raw => self.record.size,
            VolumeFormat::Qcow2 => ByteSize::try_from(self.found.size).unwrap_or(self.record.size),
        }
    }
}

/// An LV with its device.
pub(crate) async fn logical(lvm: &Lvm, volume: &VolumeKey) -> Result<VolumeIdentity, Failure> {
    let look = || {
        let (lvm, name) = (lvm.clone(), volume.volume.clone());
        blocking(KERNEL_DEADLINE, move || lvm.identity(&name))
    };
    if let Some(identity) = look().await? {
        return Ok(identity);
    }
    // Not active, or not there: only now a process has to say which.
    if lvm.find(volume.volume.as_str()).await?.is_none() {
        return Err(not_found(volume));
    }
    lvm.activate(volume.volume.as_str()).await?;
    look().await?.ok_or_else(|| {
        Failure::new(Reason::LvmFailed, format!("volume {volume} has no device after lvchange --activate y"))
    })
}

/// A file.
pub(crate) async fn file(
    pools: &Arc<Pools>,
    directory: &Directory,
    volume: &VolumeKey,
) -> Result<FoundFile, Failure> {
    let directory_record = pools.use_directory(&volume.pool, directory).await?;
    let record = match pools.file(volume) {
        Some(record) if record.phase == FilePhase::Ready => record,
        record => return Err(no_file(directory, volume, record).await),
    };
    let (name, found) = measure(directory, &record).await?;
    let record = match record.extending_to {
        // It was grown without a word to this host: what it has is what it is to have.
        None if found.size > record.size.bytes() => {
            FileRecord { extending_to: Some(ByteSize::try_from(found.size)?), ..record }
        }
        // A hypervisor cut it to an earlier size: the extension is to be made good.
        None if found.size < record.size.bytes() => {
            // What a running guest was not told of it cannot have used, unless another host's guest was.
            let lost = record.multi_attach;
            tracing::warn!(%volume, bytes = found.size, may_be_lost = lost, "a late resize has cut the file to this size");
            FileRecord { extending_to: Some(record.size), ..record }
        }
        _ => record,
    };
    Ok(FoundFile { record, name, directory: directory_record, found })
}

/// The file of a record, compared with it.
pub(crate) async fn measure(
    directory: &Directory,
    record: &FileRecord,
) -> Result<(FileName, Found), Failure> {
    let name = record.file_name()?;
    let Some(identity) = record.identity else {
        return Err(Failure::new(
            Reason::Internal,
            format!("the record of {} knows no inode", record.volume),
        ));
    };
    let (looked, called, format) = (directory.clone(), name.clone(), record.format);
    let found = directory.look(move || looked.measure(&called, format, identity)).await?;
    record.check_size(found.size).map_err(|problem| {
        Failure::from(DirectoryError::WrongFile { path: directory.file(&name), problem })
    })?;
    Ok((name, found))
}

/// Is it a volume, or does it still take up room of one?
pub(crate) fn is_volume(record: &FileRecord) -> bool {
    record.phase != FilePhase::Creating
}

/// Why there is no such volume to use. A file that has its name is somebody else's: what is in it nobody told us, and we do
/// not guess (F4).
pub(crate) async fn no_file(
    directory: &Directory,
    volume: &VolumeKey,
    record: Option<FileRecord>,
) -> Failure {
    let failure = not_found(volume);
    match record.map(|record| record.phase) {
        Some(FilePhase::Creating) => {
            return failure.next("its creation was cut off: create it again, or delete it");
        }
        Some(FilePhase::Deleting) => return failure.next("its deletion was cut off: delete it again"),
        Some(FilePhase::Ready) | None => {}
    }
    match foreign_file(directory, volume).await {
        Ok(Some(path)) => Failure::new(
            Reason::VolumeNotFound,
            format!(
                "no volume is named {volume}: {path} is there, but its format is not known, since Tether did not make it"
            ),
        )
        .next("create a volume of another name, and copy the data into it"),
        Ok(None) => failure,
        Err(error) => error,
    }
}

/// A file with a volume's name that is in no record.
pub(crate) async fn foreign_file(
    directory: &Directory,
    volume: &VolumeKey,
) -> Result<Option<String>, Failure> {
    for format in [VolumeFormat::Raw, VolumeFormat::Qcow2] {
        let name = file_name(volume, format)?;
        let (looked, called) = (directory.clone(), name.clone());
        if directory.look(move || looked.is_taken(&called)).await? {
            return Ok(Some(directory.file(&name).display().to_string()));
        }
    }
    Ok(None)
}
