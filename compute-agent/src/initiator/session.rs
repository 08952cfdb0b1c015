//! iSCSI sessions as sysfs shows them (the kernel's `scsi_transport_iscsi`). Reads only; login and logout are in
//! `iscsi`.

use std::fs;
use std::path::{Path, PathBuf};

use tether_proto::Iqn;

/// A tree that looks like `/sys`.
#[derive(Debug, Clone)]
pub(crate) struct Sysfs {
    root: PathBuf,
}

/// One session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Session {
    /// The kernel's name, `session7`.
    pub(crate) name: String,
    /// The SCSI host's number.
    pub(crate) host: u32,
    /// Its folder, `…/devices/platform/host3/session7`.
    folder: PathBuf,
    class_folder: PathBuf,
}

impl Sysfs {
    /// The tree at a root.
    pub(crate) fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The session to a target among `candidates`, which are the device paths of uevents
    /// (`/devices/platform/host3/session7/iscsi_session/session7`). Looks at nothing else.
    pub(crate) fn session_among(&self, target: &Iqn, candidates: &[String]) -> Option<Session> {
        candidates
            .iter()
            .filter_map(|path| path.rsplit('/').next())
            .find_map(|name| self.session(name, target))
    }

    /// The session to a target, by looking at all of them. For what a restart or somebody else left; an attach that
    /// saw its session come does not need it.
    pub(crate) fn find_session(&self, target: &Iqn) -> Option<Session> {
        let entries = fs::read_dir(self.root.join("class/iscsi_session")).ok()?;
        entries.flatten().find_map(|entry| self.session(entry.file_name().to_str()?, target))
    }

    /// A session by its name, if it is one to this target.
    pub(crate) fn session(&self, name: &str, target: &Iqn) -> Option<Session> {
        let class_folder = self.root.join("class/iscsi_session").join(name);
        if read(&class_folder.join("targetname"))? != target.as_str() {
            return None;
        }
        let folder = fs::canonicalize(class_folder.join("device")).ok()?;
        let host = folder.parent()?.file_name()?.to_str()?.strip_prefix("host")?.parse().ok()?;
        Some(Session { name: name.to_owned(), host, folder, class_folder })
    }

    /// Where the kernel takes orders to scan a SCSI host.
    pub(crate) fn scan_file(&self, session: &Session) -> PathBuf {
        self.root.join(format!("class/scsi_host/host{}/scan", session.host))
    }

    /// `/sys/class/block`.
    pub(crate) fn block(&self) -> PathBuf {
        self.root.join("class/block")
    }
}

impl Session {
    /// Is it logged in? A session whose connection is lost is `FAILED`, and I/O on it waits.
    pub(crate) fn logged_in(&self) -> bool {
        read(&self.class_folder.join("state")).as_deref() == Some("LOGGED_IN")
    }

    /// Is it still there?
    pub(crate) fn exists(&self) -> bool {
        self.class_folder.exists()
    }

    /// The folder of LUN 0.
    pub(crate) fn lun_folder(&self) -> PathBuf {
        let host = self.host;
        self.folder.join(format!("target{host}:0:0/{host}:0:0:0"))
    }

    /// The kernel's name of LUN 0's disk, `sdb`, once it is there.
    pub(crate) fn disk(&self) -> Option<String> {
        let entry = fs::read_dir(self.lun_folder().join("block")).ok()?.flatten().next()?;
        entry.file_name().into_string().ok()
    }
}

/// A small file's text without the newline.
pub(crate) fn read(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim_end().to_owned())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A recorded tree with one session to `target` and `disk` behind it, `wwid` and `sectors` as sysfs shows them.
    pub(crate) fn recorded(target: &str, disk: &str, wwid: &str, sectors: u64) -> (tempfile::TempDir, Sysfs) {
        let root = tempfile::tempdir().unwrap();
        let session = root.path().join("devices/platform/host3/session7");
        let class = session.join("iscsi_session/session7");
        let lun = session.join("target3:0:0/3:0:0:0");
        let block = lun.join("block").join(disk);
        for folder in
            [&class, &block, &root.path().join("class/iscsi_session"), &root.path().join("class/block")]
        {
            fs::create_dir_all(folder).unwrap();
        }
        symlink(&class, root.path().join("class/iscsi_session/session7")).unwrap();
        symlink(&block, root.path().join("class/block").join(disk)).unwrap();
        symlink(&session, class.join("device")).unwrap();
        symlink(&lun, block.join("device")).unwrap();
        fs::write(class.join("targetname"), format!("{target}\n")).unwrap();
        fs::write(class.join("state"), "LOGGED_IN\n").unwrap();
        fs::write(lun.join("wwid"), format!("{wwid}\n")).unwrap();
        fs::write(block.join("size"), format!("{sectors}\n")).unwrap();
        let sysfs = Sysfs::at(root.path());
        (root, sysfs)
    }

    #[test]
    fn a_session_is_found_by_its_target_and_leads_to_its_disk() {
        let iqn: Iqn = "iqn.2026-11.io.example:x".parse().unwrap();
        let (_root, sysfs) = recorded(iqn.as_str(), "sdb", "naa.6", 8);
        let path = "/devices/platform/host3/session7/iscsi_session/session7".to_owned();
        let session = sysfs.session_among(&iqn, &[path]).unwrap();
        assert_eq!((session.host, session.logged_in(), session.disk().as_deref()), (3, true, Some("sdb")));
        assert_eq!(sysfs.find_session(&iqn), Some(session));
        let other: Iqn = "iqn.2026-11.io.example:y".parse().unwrap();
        assert_eq!(sysfs.find_session(&other), None);
    }
}
