//! The kernel's NFS server: fragments of exports(5), exportfs(8), what etab says is shared, who has a file open. Not here:
//! which lines there are to be (`export/nfs`).
//!
//! A line is for one pool and one client address and has a fragment of its own in /etc/exports.d, so that a reboot shares
//! it again and an export touches nobody else's line. `exportfs -r` and `-a` would.

pub(crate) mod clients;
mod closed;
pub(crate) mod etab;

use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tether_agent_core::command::{CommandError, CommandLine};
use tether_agent_core::failure::{Failure, Reason};
use tether_proto::{AccessMode, FileSystemId, PoolName, SharePath};

pub(crate) use clients::{OpenFile, Whose};
pub(crate) use etab::Line;

/// What each of our fragments begins with; a file without it is somebody else's.
const HEADER: &str = "# Written by tether-storage-agent";
const EXPORTFS: &str = "/usr/sbin/exportfs";

/// Why the server did not do it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NfsError {
    /// The kernel or the disk refused.
    #[error("{action} {} failed", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// exportfs failed.
    #[error("exportfs")]
    Command(#[from] CommandError),
    /// A file that we did not write has our name.
    #[error("{} was not written by Tether", path.display())]
    ForeignFragment { path: PathBuf },
    /// A client has a volume's file open.
    #[error("{address} has {} open", file.display())]
    Open { file: PathBuf, address: IpAddr, client: PathBuf },
    /// The server runs, and does not know yet what its clients have open.
    #[error("the NFS server of this host was just started, and does not know yet who has files open")]
    Starting,
    /// The server does not run.
    #[error("the NFS server of this host does not run: {} says so", path.display())]
    Down { path: PathBuf },
}

impl From<NfsError> for Failure {
    fn from(error: NfsError) -> Self {
        match &error {
            NfsError::Command(command) => Self::from_program(Reason::ShareFailed, command),
            NfsError::Io { .. } => Self::from_error(Reason::ShareFailed, &error)
                .next("see the disk and the rights of that path on the storage host"),
            NfsError::ForeignFragment { path } => Self::from_error(Reason::NotOurs, &error)
                .next(format!("see who wrote it, and move it away: {}", path.display())),
            NfsError::Open { address, client, .. } => Self::from_error(Reason::VolumeInUse, &error).next(format!(
                "if a domain has it as a disk, detach it (tether detach ID); see what else has it open on {address}. A host \
                 that was refused the share for a while may have closed it unheard: when no volume of the pool is attached \
                 there any more, or when that host is off for good, on the storage host: echo expire >{}/ctl, which ends \
                 all that it has open; then call again",
                client.display()
            )),
            NfsError::Starting => Self::from_error(Reason::NfsServerStarting, &error),
            NfsError::Down { .. } => Self::from_error(Reason::NfsServerDown, &error),
        }
    }
}

/// One line: a directory that is shared with one address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Share {
    pub(crate) pool: PoolName,
    pub(crate) path: SharePath,
    pub(crate) address: IpAddr,
    pub(crate) access_mode: AccessMode,
    pub(crate) owner_uid: u32,
    pub(crate) owner_gid: u32,
    pub(crate) file_system_id: FileSystemId,
}

impl Share {
    fn mode(&self) -> &'static str {
        match self.access_mode {
            AccessMode::ReadWrite => "rw",
            AccessMode::ReadOnly => "ro",
        }
    }

    /// exports(5), "General Options".
    fn options(&self) -> String {
        format!(
            "{},sync,no_subtree_check,all_squash,anonuid={},anongid={},sec=sys,fsid={}",
            self.mode(),
            self.owner_uid,
            self.owner_gid,
            self.file_system_id
        )
    }

    fn fragment(&self) -> String {
        format!(
            "{HEADER} for its exports of pool {}. Do not change it: it is written anew.\n{} {}({})\n",
            self.pool,
            self.path,
            client(self.address),
            self.options()
        )
    }
}

/// The client of a line, as etab and exports(5) write it. It is a network of one address and no bare address: exportfs takes
/// two bare addresses for one client when DNS or /etc/hosts has one name for them, and `exportfs -u` of one took away the
/// other's line too (seen with nfs-utils 2.6.2). It asks DNS about bare addresses, and about networks never.
fn client(address: IpAddr) -> String {
    match address {
        IpAddr::V4(address) => format!("{address}/32"),
        IpAddr::V6(address) => format!("{address}/128"),
    }
}

/// The same with the path, as exportfs(8) takes it (F40).
fn client_and_path(address: IpAddr, path: &SharePath) -> String {
    match address {
        IpAddr::V4(address) => format!("{address}/32:{path}"),
        IpAddr::V6(address) => format!("[{address}]/128:{path}"),
    }
}

/// The server and its files.
#[derive(Debug, Clone)]
pub(crate) struct Nfs {
    fragments: PathBuf,
    etab: PathBuf,
    nfsd: PathBuf,
}

impl Nfs {
    /// The server of the host whose root file system is at `root`; in tests a folder.
    pub(crate) fn at(root: impl AsRef<Path>) -> Self {
        let root = root.as_ref();
        Self {
            fragments: root.join("etc/exports.d"),
            etab: root.join("var/lib/nfs/etab"),
            nfsd: root.join("proc/fs/nfsd"),
        }
    }

    /// Checks that the kernel's server has threads.
    pub(crate) fn check_running(&self) -> Result<(), NfsError> {
        let path = self.nfsd.join("threads");
        match std::fs::read_to_string(&path) {
            Ok(text) if text.trim().parse::<u32>().is_ok_and(|threads| threads > 0) => Ok(()),
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("reading", &path)(error)),
            _ => Err(NfsError::Down { path }),
        }
    }

    /// Does the server speak NFS 3, of which it cannot tell who has a file open?
    pub(crate) fn speaks_version_3(&self) -> bool {
        std::fs::read_to_string(self.nfsd.join("versions"))
            .is_ok_and(|versions| versions.split_whitespace().any(|version| version == "+3"))
    }

    /// The lines that are shared now.
    pub(crate) fn lines(&self) -> Result<Vec<Line>, NfsError> {
        match std::fs::read_to_string(&self.etab) {
            Ok(text) => Ok(etab::parse(&text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(source) => Err(failed("reading", &self.etab)(source)),
        }
    }

    /// Is a line's fragment there, as it should be?
    pub(crate) fn has_fragment(&self, share: &Share) -> Result<bool, NfsError> {
        let path = self.fragment(&share.pool, share.address);
        Ok(self.read_fragment(&path)?.is_some_and(|text| text == share.fragment()))
    }

    /// Writes a line's fragment. True when it was not there, or another.
    pub(crate) fn write_fragment(&self, share: &Share) -> Result<bool, NfsError> {
        let (path, text) = (self.fragment(&share.pool, share.address), share.fragment());
        if self.read_fragment(&path)?.as_ref() == Some(&text) {
            return Ok(false);
        }
        std::fs::create_dir_all(&self.fragments).map_err(failed("making", &self.fragments))?;
        // exportfs reads names that end with .exports and no others.
        let temporary = path.with_extension("tmp");
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o644)
            .open(&temporary)
            .map_err(failed("making", &temporary))?;
        file.set_permissions(Permissions::from_mode(0o644)).map_err(failed("opening up", &temporary))?;
        file.write_all(text.as_bytes()).map_err(failed("writing", &temporary))?;
        file.sync_all().map_err(failed("syncing", &temporary))?;
        std::fs::rename(&temporary, &path).map_err(failed("renaming", &temporary))?;
        self.sync_fragments()?;
        Ok(true)
    }

    /// Removes a line's fragment. True when it was there.
    pub(crate) fn remove_fragment(&self, pool: &PoolName, address: IpAddr) -> Result<bool, NfsError> {
        let path = self.fragment(pool, address);
        if self.read_fragment(&path)?.is_none() {
            return Ok(false);
        }
        std::fs::remove_file(&path).map_err(failed("removing", &path))?;
        self.sync_fragments()?;
        Ok(true)
    }

    /// Shares a directory with one address, or changes how it is shared.
    pub(crate) async fn share(&self, share: &Share) -> Result<(), NfsError> {
        let options = share.options();
        // -i: what others have written into /etc/exports is neither read nor waited for.
        let line = client_and_path(share.address, &share.path);
        CommandLine::new(EXPORTFS).args(["-i", "-o", &options, &line]).run().await?;
        Ok(())
    }

    /// Ends what [`Nfs::share`] began.
    pub(crate) async fn unshare(&self, path: &SharePath, address: IpAddr) -> Result<(), NfsError> {
        CommandLine::new(EXPORTFS).arg("-u").arg(client_and_path(address, path)).run().await?;
        Ok(())
    }

    /// All files that clients have open.
    pub(crate) fn open_files(&self) -> Result<Vec<OpenFile>, NfsError> {
        let clients = self.nfsd.join("clients");
        clients::open_files(&clients, &Whose::all()).map_err(failed("reading", &clients))
    }

    /// Checks that none of these clients, or of all, has a volume's file open. One that is about to close it is waited for.
    ///
    /// # Errors
    /// [`NfsError::Open`]; `Starting` and `Io` when it cannot be found out.
    pub(crate) fn check_closed(&self, file: &Path, inode: u64, whose: &Whose) -> Result<(), NfsError> {
        // Until its clients had the time to claim again what they have open, a server that was started knows nothing of it.
        let grace = self.nfsd.join("v4_end_grace");
        match std::fs::read_to_string(&grace) {
            Ok(ended) if ended.trim() == "N" => return Err(NfsError::Starting),
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed("reading", &grace)(error));
            }
            _ => {}
        }
        let clients = self.nfsd.join("clients");
        let open =
            closed::still_open(&clients, file, inode, whose).map_err(failed("looking who has open", file))?;
        match open.into_iter().next() {
            None => Ok(()),
            Some(OpenFile { address, client, .. }) => {
                Err(NfsError::Open { file: file.to_owned(), address, client })
            }
        }
    }

    /// Makes the server forget these clients that have a file open, with all that they have open (`client_ctl_write` in the
    /// kernel's fs/nfsd/nfs4state.c waits until it is done), and proves it. They must be cut off from the share before.
    pub(crate) fn expire(&self, file: &Path, inode: u64, whose: &Whose) -> Result<(), NfsError> {
        let clients = self.nfsd.join("clients");
        let look =
            || closed::still_open(&clients, file, inode, whose).map_err(failed("looking who has open", file));
        for OpenFile { client, .. } in look()? {
            let control = client.join("ctl");
            match std::fs::write(&control, "expire\n") {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                outcome => outcome.map_err(failed("writing", &control))?,
            }
        }
        match look()?.into_iter().next() {
            None => Ok(()),
            Some(OpenFile { address, client, .. }) => {
                Err(NfsError::Open { file: file.to_owned(), address, client })
            }
        }
    }

    fn fragment(&self, pool: &PoolName, address: IpAddr) -> PathBuf {
        self.fragments.join(format!("tether-{pool}-{}.exports", address.to_string().replace(':', "-")))
    }

    fn read_fragment(&self, path: &Path) -> Result<Option<String>, NfsError> {
        match std::fs::read_to_string(path) {
            Ok(text) if text.starts_with(HEADER) => Ok(Some(text)),
            Ok(_) => Err(NfsError::ForeignFragment { path: path.to_owned() }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(failed("reading", path)(source)),
        }
    }

    fn sync_fragments(&self) -> Result<(), NfsError> {
        File::open(&self.fragments)
            .and_then(|folder| folder.sync_all())
            .map_err(failed("syncing", &self.fragments))
    }
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> NfsError {
    let path = path.to_owned();
    move |source| NfsError::Io { action, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(address: &str) -> Share {
        Share {
            pool: "share".parse().unwrap(),
            path: "/srv/share".parse().unwrap(),
            address: address.parse().unwrap(),
            access_mode: AccessMode::ReadWrite,
            owner_uid: 64055,
            owner_gid: 64056,
            file_system_id: "67e55044-10b1-426f-9247-bb680e5fe0c8".parse().unwrap(),
        }
    }

    #[test]
    fn f40_f47_a_line_is_for_one_address_and_one_user() {
        let v4 = share("10.99.0.2");
        let line = "/srv/share 10.99.0.2/32(rw,sync,no_subtree_check,all_squash,anonuid=64055,anongid=64056,sec=sys,\
                    fsid=67e55044-10b1-426f-9247-bb680e5fe0c8)\n";
        assert!(v4.fragment().ends_with(line), "{}", v4.fragment());
        let v6 = Share { access_mode: AccessMode::ReadOnly, ..share("fd99::2") };
        assert!(v6.fragment().contains("/srv/share fd99::2/128(ro,sync,"), "{}", v6.fragment());
        assert_eq!(client_and_path(v6.address, &v6.path), "[fd99::2]/128:/srv/share");
        assert_eq!(client_and_path(v4.address, &v4.path), "10.99.0.2/32:/srv/share");
    }

    #[test]
    fn a_fragment_is_written_once_readable_and_removed_alone() {
        let root = tempfile::tempdir().unwrap();
        let nfs = Nfs::at(root.path());
        let (one, other) = (share("fd99::2"), share("10.99.0.2"));
        assert!(nfs.write_fragment(&one).unwrap() && nfs.write_fragment(&other).unwrap());
        assert!(!nfs.write_fragment(&one).unwrap());
        assert!(nfs.write_fragment(&Share { access_mode: AccessMode::ReadOnly, ..one.clone() }).unwrap());
        let path = root.path().join("etc/exports.d/tether-share-fd99--2.exports");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o644);
        assert!(nfs.remove_fragment(&one.pool, one.address).unwrap());
        assert!(!nfs.remove_fragment(&one.pool, one.address).unwrap());
        let left: Vec<_> = std::fs::read_dir(path.parent().unwrap()).unwrap().flatten().collect();
        assert_eq!(left.len(), 1);
        assert_eq!(left[0].file_name(), "tether-share-10.99.0.2.exports");
    }

    /// F16: a file that we did not write stays, whatever its name.
    #[test]
    fn f16_a_foreign_fragment_is_neither_overwritten_nor_removed() {
        let root = tempfile::tempdir().unwrap();
        let (nfs, share) = (Nfs::at(root.path()), share("10.99.0.2"));
        let path = root.path().join("etc/exports.d/tether-share-10.99.0.2.exports");
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, "/srv/share 10.99.0.2(rw)\n").unwrap();
        for outcome in [nfs.write_fragment(&share), nfs.remove_fragment(&share.pool, share.address)] {
            assert_eq!(Failure::from(outcome.unwrap_err()).reason, Reason::NotOurs);
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "/srv/share 10.99.0.2(rw)\n");
    }

    #[test]
    fn a_server_without_threads_is_down() {
        let root = tempfile::tempdir().unwrap();
        let nfs = Nfs::at(root.path());
        let reason = || Failure::from(nfs.check_running().unwrap_err()).reason;
        assert_eq!(reason(), Reason::NfsServerDown);
        std::fs::create_dir_all(root.path().join("proc/fs/nfsd")).unwrap();
        std::fs::write(root.path().join("proc/fs/nfsd/threads"), "0\n").unwrap();
        assert_eq!(reason(), Reason::NfsServerDown);
        std::fs::write(root.path().join("proc/fs/nfsd/threads"), "8\n").unwrap();
        nfs.check_running().unwrap();
    }
}
