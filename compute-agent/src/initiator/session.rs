//! iSCSI sessions as sysfs shows them (the kernel's `scsi_transport_iscsi`). Reads only; login and logout are in
//! `iscsi`.

use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use tether_proto::{Iqn, Portal};

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
    pub(crate) fn session_among(&self, target: &Iqn, candidates: &[String]) -> io::Result<Option<Session>> {
        let names = candidates.iter().filter_map(|path| path.rsplit('/').next()).map(str::to_owned);
        self.first_to(target, names)
    }

    /// The session to a target, by looking at all of them. For what a restart or somebody else left, and before
    /// something is taken away; an attach that saw its session come does not need it.
    pub(crate) fn find_session(&self, target: &Iqn) -> io::Result<Option<Session>> {
        let names = names(&self.root.join("class/iscsi_session"))?;
        self.first_to(target, names.into_iter())
    }

    /// The targets of all sessions, each with the session's state, for somebody who asks what is on the host.
    pub(crate) fn states(&self) -> io::Result<Vec<(String, String)>> {
        let class = self.root.join("class/iscsi_session");
        let mut states = Vec::new();
        for name in names(&class)? {
            let session = class.join(name);
            // One that ends meanwhile is none.
            states.extend(read(&session.join("targetname"))?.zip(read(&session.join("state"))?));
        }
        Ok(states)
    }

    fn first_to(&self, target: &Iqn, names: impl Iterator<Item = String>) -> io::Result<Option<Session>> {
        for name in names {
            if let Some(session) = self.session(&name, target)? {
                return Ok(Some(session));
            }
        }
        Ok(None)
    }

    /// A session by its name, if it is one to this target.
    fn session(&self, name: &str, target: &Iqn) -> io::Result<Option<Session>> {
        let class_folder = self.root.join("class/iscsi_session").join(name);
        if read(&class_folder.join("targetname"))?.as_deref() != Some(target.as_str()) {
            return Ok(None);
        }
        let folder = match fs::canonicalize(class_folder.join("device")) {
            Ok(folder) => folder,
            Err(error) if is_absence(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        let host =
            folder.parent().and_then(|host| host.file_name()?.to_str()?.strip_prefix("host")?.parse().ok());
        let host =
            host.ok_or_else(|| io::Error::other(format!("{} is under no SCSI host", folder.display())))?;
        Ok(Some(Session { name: name.to_owned(), host, folder, class_folder }))
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
    /// The number that open-iscsi knows it by: 7 of `session7`.
    pub(crate) fn number(&self) -> &str {
        self.name.trim_start_matches("session")
    }

    /// Is it logged in? A session whose connection is lost is `FAILED`, and I/O on it waits.
    pub(crate) fn logged_in(&self) -> io::Result<bool> {
        Ok(read(&self.class_folder.join("state"))?.as_deref() == Some("LOGGED_IN"))
    }

    /// Is it still there?
    pub(crate) fn exists(&self) -> io::Result<bool> {
        self.class_folder.try_exists()
    }

    /// The portal that it was made to.
    pub(crate) fn portal(&self) -> io::Result<Option<Portal>> {
        let connection = format!("connection{}:0", self.number());
        let folder = self.folder.join(&connection).join("iscsi_connection").join(&connection);
        let address = read(&folder.join("persistent_address"))?.and_then(|text| text.parse::<IpAddr>().ok());
        let port = read(&folder.join("persistent_port"))?.and_then(|text| text.parse::<u16>().ok());
        let portal = address.zip(port).map(|(address, port)| SocketAddr::new(address, port).to_string());
        Ok(portal.and_then(|text| text.parse().ok()))
    }

    /// The folder of LUN 0.
    pub(crate) fn lun_folder(&self) -> PathBuf {
        let host = self.host;
        self.folder.join(format!("target{host}:0:0/{host}:0:0:0"))
    }

    /// The kernel's name of LUN 0's disk, `sdb`, once it is there.
    pub(crate) fn disk(&self) -> io::Result<Option<String>> {
        Ok(names(&self.lun_folder().join("block"))?.into_iter().next())
    }
}

/// Is this how the kernel says that something is not there, or has just gone?
fn is_absence(error: &io::Error) -> bool {
    const ENODEV: i32 = 19;
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(ENODEV)
}

/// The names in a folder; none when it is not there. Every other error is one: not to be able to look is not absence.
fn names(folder: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if is_absence(&error) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

/// A small file's text without the newline; `None` when it is not there.
pub(crate) fn read(path: &Path) -> io::Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text.trim_end().to_owned())),
        Err(error) if is_absence(&error) => Ok(None),
        Err(error) => Err(error),
    }
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
        let (root, sysfs) = recorded(iqn.as_str(), "sdb", "naa.6", 8);
        let path = "/devices/platform/host3/session7/iscsi_session/session7".to_owned();
        let session = sysfs.session_among(&iqn, &[path]).unwrap().unwrap();
        assert_eq!((session.host, session.number(), session.logged_in().unwrap()), (3, "7", true));
        assert_eq!(session.disk().unwrap().as_deref(), Some("sdb"));
        assert_eq!(session.portal().unwrap(), None);
        let connection =
            root.path().join("devices/platform/host3/session7/connection7:0/iscsi_connection/connection7:0");
        fs::create_dir_all(&connection).unwrap();
        fs::write(connection.join("persistent_address"), "fd00::1\n").unwrap();
        fs::write(connection.join("persistent_port"), "3260\n").unwrap();
        assert_eq!(session.portal().unwrap().unwrap().to_string(), "[fd00::1]:3260");
        assert_eq!(sysfs.find_session(&iqn).unwrap(), Some(session));
        assert_eq!(sysfs.states().unwrap(), [(iqn.to_string(), "LOGGED_IN".to_owned())]);
        let other: Iqn = "iqn.2026-11.io.example:y".parse().unwrap();
        assert_eq!(sysfs.find_session(&other).unwrap(), None);
    }

    /// F15: not to be able to look is an error, and never "it is gone".
    #[test]
    fn f15_what_cannot_be_read_is_not_absent() {
        let iqn: Iqn = "iqn.2026-11.io.example:x".parse().unwrap();
        let (root, sysfs) = recorded(iqn.as_str(), "sdb", "naa.6", 8);
        let name = root.path().join("class/iscsi_session/session7/targetname");
        fs::remove_file(&name).unwrap();
        fs::create_dir(&name).unwrap();
        assert!(sysfs.find_session(&iqn).is_err());
        assert_eq!(Sysfs::at("/nonexistent").find_session(&iqn).unwrap(), None);
    }
}
