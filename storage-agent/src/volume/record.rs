//! What the journals hold of volumes and pools: directories, files, extensions that are not finished. Not here: what is
//! done with it.

use serde::{Deserialize, Serialize};
use tether_proto::{
    ByteSize, FileName, FileSystemId, ParseError, PoolName, SharePath, VolumeFormat, VolumeKey,
};
use uuid::Uuid;

use crate::directory::FileIdentity;
use crate::identity::{Provisioning, VolumeIdentity};

/// A pool's directory, from its first use on. It keeps a file system that is not mounted from being written under.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct DirectoryRecord {
    /// The pool.
    pub(crate) pool: PoolName,
    /// Where the directory is.
    pub(crate) path: SharePath,
    /// Which directory it is.
    #[serde(flatten)]
    pub(crate) identity: FileIdentity,
    /// What the NFS server shows as the id of its file system. Made at random, so a share with it is ours.
    pub(crate) file_system_id: FileSystemId,
    /// Whose the files are, uid and gid. Records of the first agents do not say.
    #[serde(default)]
    pub(crate) owner: Option<(u32, u32)>,
}

/// Where a file is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum FilePhase {
    /// Side effects may have begun.
    Creating,
    /// It is a volume.
    Ready,
    /// Removal may have begun.
    Deleting,
}

/// All that we know of a file. Its format stands here and is never guessed (F4).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileRecord {
    /// The volume.
    pub(crate) volume: VolumeKey,
    /// Where it is in its life.
    pub(crate) phase: FilePhase,
    /// What is in it.
    pub(crate) format: VolumeFormat,
    /// How its space is had.
    pub(crate) provisioning: Provisioning,
    /// The size that was told, which the guest sees.
    pub(crate) size: ByteSize,
    /// The permanent id, made with it.
    pub(crate) uuid: String,
    /// Which file it is; not known before it is made.
    pub(crate) identity: Option<FileIdentity>,
    /// Several hosts may have it at a time.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) multi_attach: bool,
    /// An extension to this size has begun and is not seen done: a raw file has any size up to it. With a size that is told
    /// already it is a qcow2 file that the compute host will make larger, or has, as far as its caller said.
    pub(crate) extending_to: Option<ByteSize>,
    /// The size of a raw file before it was extended under a hypervisor, until nobody has it any more. QEMU sets the file's length when it is told of a size: told
    /// late of one that is past, it cuts the file, and the same extension makes that good.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) grown_from: Option<ByteSize>,
}

impl FileRecord {
    /// The record of a new file.
    pub(crate) fn new(
        volume: VolumeKey,
        format: VolumeFormat,
        provisioning: Provisioning,
        size: ByteSize,
        multi_attach: bool,
    ) -> Self {
        Self {
            volume,
            phase: FilePhase::Creating,
            format,
            provisioning,
            size,
            uuid: Uuid::new_v4().to_string(),
            identity: None,
            multi_attach,
            extending_to: None,
            grown_from: None,
        }
    }

    /// The name of its file.
    pub(crate) fn file_name(&self) -> Result<FileName, ParseError> {
        file_name(&self.volume, self.format)
    }

    /// What is told of it.
    pub(crate) fn volume_identity(&self) -> VolumeIdentity {
        VolumeIdentity { uuid: self.uuid.clone(), size: self.size }
    }

    /// Says which parameter of a creation is not this file's.
    pub(crate) fn difference(&self, other: &Self) -> Option<String> {
        if self.size != other.size {
            return Some(format!("has {} bytes and not {}", self.size.bytes(), other.size.bytes()));
        }
        if self.format != other.format {
            return Some(format!("is {} and not {}", self.format, other.format));
        }
        if self.provisioning != other.provisioning {
            let [own, others] = [self, other].map(|record| record.provisioning.as_str());
            return Some(format!("is {own} and not {others}"));
        }
        if self.multi_attach != other.multi_attach {
            return Some(multi_attach_difference(self.multi_attach));
        }
        None
    }

    /// May a file of this record have this size? The error says what it has. A compute host grows a qcow2 file on its caller's
    /// word alone, which may be another than the word that was given here: the file is the same, by its inode.
    pub(crate) fn check_size(&self, found: u64) -> Result<(), String> {
        let told = self.size.bytes();
        let least = self.grown_from.map_or(told, ByteSize::bytes);
        let fits = match (self.extending_to.map(ByteSize::bytes), self.format) {
            (None, VolumeFormat::Raw) => (least..=told).contains(&found),
            (Some(most), VolumeFormat::Raw) => (least..=most).contains(&found),
            (None, VolumeFormat::Qcow2) => found >= told,
            // How far the compute host is cannot be seen here.
            (Some(_), VolumeFormat::Qcow2) => true,
        };
        if fits { Ok(()) } else { Err(format!("has {found} bytes for the guest and not {told}")) }
    }
}

/// The name of a volume's file: the format is its extension.
pub(crate) fn file_name(volume: &VolumeKey, format: VolumeFormat) -> Result<FileName, ParseError> {
    format!("{}.{format}", volume.volume).parse()
}

/// A thick LV that is being extended, by extents that are wiped before (F5).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ExtensionRecord {
    /// The volume.
    pub(crate) volume: VolumeKey,
    /// The LV's permanent id: another LV under the name has nothing to do with this.
    pub(crate) uuid: String,
    /// How large it was.
    pub(crate) from: ByteSize,
    /// How large it is to be.
    pub(crate) to: ByteSize,
}

/// Says of a volume that is there that it is multi_attach, or is not, as was not asked for.
pub(crate) fn multi_attach_difference(is: bool) -> String {
    if is { "is multi_attach".to_owned() } else { "is not multi_attach".to_owned() }
}

/// An LV that several hosts may have at a time. The record is made before the LV, and LVM knows nothing of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MultiAttachRecord {
    /// The volume.
    pub(crate) volume: VolumeKey,
    /// The LV's permanent id; not known before it is made. Another LV under the name has nothing to do with this.
    pub(crate) uuid: Option<String>,
}

/// What is about to be done to an LV. LVM does each in one go; the record says who asked for it when the agent dies meanwhile.
/// It is gone when the operation has ended, well or not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct OperationRecord {
    /// The volume.
    pub(crate) volume: VolumeKey,
    /// What is done.
    pub(crate) operation: VolumeOperation,
    /// The permanent id of an LV that is deleted: another LV under the name has nothing to do with this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) uuid: Option<String>,
}

/// See [`OperationRecord`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum VolumeOperation {
    /// It is made.
    Create,
    /// It is deleted.
    Delete,
}

/// The key of a volume's record. No pool's and no volume's name has an `@`.
pub(crate) fn journal_key(volume: &VolumeKey) -> String {
    format!("{}@{}", volume.pool, volume.volume)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(format: VolumeFormat) -> FileRecord {
        let size = ByteSize::try_from(100).unwrap();
        FileRecord::new("share/a".parse().unwrap(), format, Provisioning::Thin, size, false)
    }

    #[test]
    fn a_file_has_its_recorded_size_or_one_that_an_extension_gives_it() {
        use VolumeFormat::{Qcow2, Raw};
        for (format, grown_from, extending_to, fits, does_not) in [
            (Raw, None, None, &[100][..], &[99, 101][..]),
            (Raw, None, Some(200), &[100, 150, 200], &[99, 201]),
            (Raw, Some(50), None, &[50, 100], &[49, 101]),
            (Raw, Some(50), Some(200), &[50, 200], &[49, 201]),
            (Qcow2, None, None, &[100, 101], &[99]),
            (Qcow2, None, Some(200), &[50, 100, 200, 201], &[]),
        ] {
            let [grown_from, extending_to] =
                [grown_from, extending_to].map(|size| size.map(|size| ByteSize::try_from(size).unwrap()));
            let record = FileRecord { grown_from, extending_to, ..record(format) };
            assert!(fits.iter().all(|size| record.check_size(*size).is_ok()), "{record:?}");
            assert!(does_not.iter().all(|size| record.check_size(*size).is_err()), "{record:?}");
        }
    }

    #[test]
    fn a_repeated_creation_that_differs_is_told_in_what() {
        let one = record(VolumeFormat::Raw);
        assert_eq!(one.difference(&record(VolumeFormat::Raw)), None);
        let other = record(VolumeFormat::Qcow2);
        assert_eq!(one.difference(&other).as_deref(), Some("is raw and not qcow2"));
        let other = FileRecord { size: ByteSize::try_from(7).unwrap(), ..one.clone() };
        assert_eq!(one.difference(&other).as_deref(), Some("has 100 bytes and not 7"));
        let other = FileRecord { multi_attach: true, ..one.clone() };
        assert_eq!(one.difference(&other).as_deref(), Some("is not multi_attach"));
        let other = FileRecord { provisioning: Provisioning::Thick, ..one.clone() };
        assert_eq!(one.difference(&other).as_deref(), Some("is thin and not thick"));
    }

    #[test]
    fn a_record_comes_back_from_the_journal_as_it_went_and_names_its_file() {
        let one = FileRecord {
            identity: Some(FileIdentity { inode: 12, born: Some(7) }),
            ..record(VolumeFormat::Qcow2)
        };
        let text = serde_json::to_string(&one).unwrap();
        assert_eq!(serde_json::from_str::<FileRecord>(&text).unwrap(), one);
        assert_eq!(one.file_name().unwrap().as_str(), "a.qcow2");
        assert_eq!(journal_key(&one.volume), "share@a");
        let longest = VolumeKey { volume: "x".repeat(100).parse().unwrap(), ..one.volume };
        file_name(&longest, VolumeFormat::Qcow2).unwrap();
    }
}
