//! The SCSI disk behind a session: is it the right one, where is its stable name, flush it, remove it. Not here: the
//! session itself, and when each of this is done (`attach`, `detach`).

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use tether_proto::{ByteSize, Wwn};

use super::session::{Session, Sysfs, read};
use crate::sizes::Sizes;

/// Where udev keeps the stable names.
pub(crate) const BY_ID: &str = "/dev/disk/by-id";

/// What is wrong with a disk.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DeviceError {
    /// It is another volume.
    #[error("{disk} has wwn {found} and not naa.{wanted}")]
    Wwn { disk: String, found: String, wanted: Wwn },
    /// It has another size.
    #[error("{disk} has {found} bytes and not {}", wanted.bytes())]
    Size { disk: String, found: u64, wanted: ByteSize },
    /// sysfs or the device could not be used.
    #[error("{action} {} failed", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

fn fail(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DeviceError {
    let path = path.to_owned();
    move |source| DeviceError::Io { action, path, source }
}

/// Has the kernel look for LUN 0 and no other (rule 1, F1). Blocks until the SCSI device is there.
pub(crate) fn scan(sysfs: &Sysfs, session: &Session) -> Result<(), DeviceError> {
    let path = sysfs.scan_file(session);
    fs::write(&path, "0 0 0").map_err(fail("writing", &path))
}

/// Has the kernel ask for the disk's size again. Blocks until it has.
pub(crate) fn rescan(session: &Session) -> Result<(), DeviceError> {
    let path = session.lun_folder().join("rescan");
    fs::write(&path, "1").map_err(fail("writing", &path))
}

/// Compares WWN and size with what the storage host said (rule 1, F1), and gives the size: a volume may have been extended
/// since.
pub(crate) fn verify(
    sysfs: &Sysfs,
    session: &Session,
    disk: &str,
    wwn: Wwn,
    sizes: Sizes,
) -> Result<ByteSize, DeviceError> {
    let wwid = session.lun_folder().join("wwid");
    let found = read(&wwid).map_err(fail("reading", &wwid))?.unwrap_or_else(|| "none".to_owned());
    if found != format!("naa.{wwn}") {
        return Err(DeviceError::Wwn { disk: disk.to_owned(), found, wanted: wwn });
    }
    // Sectors of 512 bytes, whatever the device's own are (Documentation/ABI/stable/sysfs-block).
    let path = sysfs.block().join(disk).join("size");
    let sectors = read(&path).map_err(fail("reading", &path))?.and_then(|text| text.parse::<u64>().ok());
    let found = sectors.unwrap_or(0).saturating_mul(512);
    let size = ByteSize::try_from(found).ok().filter(|_| sizes.allow(found));
    size.ok_or_else(|| DeviceError::Size { disk: disk.to_owned(), found, wanted: sizes.any_of[0] })
}

/// The path that goes into domain XML (F3).
pub(crate) fn stable_path(by_id: &Path, wwn: Wwn) -> PathBuf {
    by_id.join(format!("wwn-0x{wwn}"))
}

/// Does the stable path lead to this disk, now?
pub(crate) fn leads_to(path: &Path, disk: &str) -> bool {
    fs::read_link(path).is_ok_and(|target| target.file_name().is_some_and(|name| name == disk))
}

/// Opens a disk, to flush it. Blocks; hangs when the session is lost.
pub(crate) fn open(disk: &str) -> Result<File, DeviceError> {
    let path = Path::new("/dev").join(disk);
    File::open(&path).map_err(fail("opening", &path))
}

/// Writes what the host has cached of the disk, and the disk's own cache, to the storage host. Tells what failed of that since
/// `held` was opened. Blocks; hangs when the session is lost.
pub(crate) fn flush(disk: &str, held: Option<File>) -> Result<(), DeviceError> {
    let flushing = Path::new("/dev").join(disk);
    if let Some(held) = held {
        held.sync_all().map_err(fail("flushing", &flushing))?;
    }
    // What was held may have been another disk of the same name: the session may have been made anew.
    open(disk)?.sync_all().map_err(fail("flushing", &flushing))
}

/// Takes the disk off the host. Blocks until the kernel has let go of it.
pub(crate) fn remove(session: &Session) -> Result<(), DeviceError> {
    let path = session.lun_folder().join("delete");
    match fs::write(&path, "1") {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(fail("writing", &path)(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::session::tests::recorded;
    use super::*;
    use tether_proto::Iqn;

    const WWN: &str = "60014051234567890123456789012345";

    fn outcome(wwid: &str, sectors: u64) -> Result<ByteSize, DeviceError> {
        let iqn: Iqn = "iqn.2026-11.io.example:x".parse().unwrap();
        let (_root, sysfs) = recorded(iqn.as_str(), "sdb", wwid, sectors);
        let session = sysfs.find_session(&iqn).unwrap().unwrap();
        verify(
            &sysfs,
            &session,
            "sdb",
            WWN.parse().unwrap(),
            Sizes { any_of: [4096, 12288].map(|size| size.try_into().unwrap()), or_larger: false },
        )
    }

    #[test]
    fn f1_another_wwn_or_another_size_is_refused() {
        assert_eq!(outcome(&format!("naa.{WWN}"), 8).unwrap().bytes(), 4096);
        assert_eq!(outcome(&format!("naa.{WWN}"), 24).unwrap().bytes(), 12288, "F49: extended since");
        assert!(matches!(outcome(&format!("naa.{WWN}"), 16), Err(DeviceError::Size { found: 8192, .. })));
        assert!(matches!(outcome(&format!("naa.{WWN}"), 0), Err(DeviceError::Size { .. })));
        for other in ["naa.60014050000000000000000000000000", "t10.LIO-ORG", ""] {
            assert!(matches!(outcome(other, 8), Err(DeviceError::Wwn { .. })), "{other}");
        }
    }

    #[test]
    fn f3_a_stable_path_counts_only_while_it_leads_to_the_disk() {
        let folder = tempfile::tempdir().unwrap();
        let path = stable_path(folder.path(), WWN.parse().unwrap());
        assert!(!leads_to(&path, "sdb"));
        std::os::unix::fs::symlink("../../sdc", &path).unwrap();
        assert!(!leads_to(&path, "sdb") && leads_to(&path, "sdc"));
    }
}
