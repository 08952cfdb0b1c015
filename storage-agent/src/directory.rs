//! A pool's directory: is it fit to hold volumes, what room does it have. Not here: the files in it (`directory/file`),
//! and the order of steps (`volume`).
//!
//! Clients of the share are squashed to the owner of the FILES. The directory is root's, and nobody else may write to it:
//! so root of a hypervisor can change what is in a file, and cannot make, rename, replace or link anything.

pub(crate) mod file;

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use nix::errno::Errno;
use nix::sys::statfs::{BTRFS_SUPER_MAGIC, statfs};
use nix::sys::statvfs::{FsFlags, statvfs};
use serde::{Deserialize, Serialize};
use tether_agent_core::command::CommandError;
use tether_agent_core::failure::{Failure, Reason};
use tether_agent_core::stuck::Stuck;
use tether_proto::SharePath;

/// Why a directory or a file in it cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DirectoryError {
    /// The kernel refused.
    #[error("{action} {} failed", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The directory is not as it must be.
    #[error("directory {path} {problem}")]
    Unfit { path: String, problem: String, mend: String },
    /// The file under a volume's name is not the one that we made.
    #[error("{} {problem}", path.display())]
    WrongFile { path: PathBuf, problem: String },
    /// Something has the name already.
    #[error("{} is there already, and Tether did not make it", path.display())]
    Taken { path: PathBuf },
    /// qemu-img failed.
    #[error("qemu-img")]
    Command(#[from] CommandError),
}

impl From<DirectoryError> for Failure {
    fn from(error: DirectoryError) -> Self {
        match &error {
            DirectoryError::Command(command) => Self::from_program(Reason::FileFailed, command),
            DirectoryError::Io { source, .. } => match source.raw_os_error().map(Errno::from_raw) {
                Some(Errno::ENOSPC | Errno::EDQUOT) => Self::from_error(Reason::PoolFull, &error),
                _ => Self::from_error(Reason::FileFailed, &error),
            },
            DirectoryError::Unfit { mend, .. } => {
                Self::from_error(Reason::PoolUnavailable, &error).next(format!("on the storage host: {mend}"))
            }
            DirectoryError::WrongFile { path, .. } => Self::from_error(Reason::WrongDevice, &error).next(format!(
                "see who replaced it: stat {0}; put the volume's own file back, or move the other away (mv {0} {0}.other) \
                 and delete the volume",
                path.display()
            )),
            DirectoryError::Taken { .. } => Self::from_error(Reason::DifferentParameters, &error)
                .next("use another name, or move that file away"),
        }
    }
}

/// What tells a file or directory from another one under the same name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileIdentity {
    /// The inode's number.
    pub(crate) inode: u64,
    /// When it was made, in nanoseconds since 1970: an inode's number is used again. Not every file system knows it.
    pub(crate) born: Option<u64>,
}

impl FileIdentity {
    pub(crate) fn of(metadata: &Metadata) -> Self {
        let born = metadata.created().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        Self { inode: metadata.ino(), born: born.and_then(|age| u64::try_from(age.as_nanos()).ok()) }
    }

    /// Is it the same? A birth time that one of them does not know says nothing.
    pub(crate) fn is(self, other: Self) -> bool {
        let same_birth = match (self.born, other.born) {
            (Some(one), Some(other)) => one == other,
            _ => true,
        };
        self.inode == other.inode && same_birth
    }
}

/// The room in a pool, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Room {
    /// The whole file system.
    pub(crate) size: u64,
    /// What is not taken yet.
    pub(crate) free: u64,
}

/// The directory of one pool.
#[derive(Debug, Clone)]
pub(crate) struct Directory {
    path: SharePath,
    owner_uid: u32,
    owner_gid: u32,
    stuck: Stuck,
}

impl Directory {
    /// The adapter for one pool of the config. A file system that hangs is entered into `stuck`.
    pub(crate) fn new(path: SharePath, owner_uid: u32, owner_gid: u32, stuck: Stuck) -> Self {
        Self { path, owner_uid, owner_gid, stuck }
    }

    /// Looks at the directory, on a thread that may block; not while an earlier look hangs in the kernel (F27).
    pub(crate) async fn look<T: Send + 'static, E: Into<Failure> + Send + 'static>(
        &self,
        look: impl FnOnce() -> Result<T, E> + Send + 'static,
    ) -> Result<T, Failure> {
        self.stuck.blocking(&format!("directory {}", self.path), "use", look).await
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &SharePath {
        &self.path
    }

    /// Who owns the files: user and group.
    pub(crate) fn owner(&self) -> (u32, u32) {
        (self.owner_uid, self.owner_gid)
    }

    /// Checks that the directory is fit, and the one that the pool was used with before; says which one it is.
    pub(crate) fn check(&self, before: Option<FileIdentity>) -> Result<FileIdentity, DirectoryError> {
        let path = Path::new(self.path.as_str());
        let unfit = |(problem, mend): (String, String)| DirectoryError::Unfit {
            path: self.path.to_string(),
            problem,
            mend,
        };
        let metadata = match std::fs::symlink_metadata(path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(unfit((
                    "is not there".into(),
                    format!("mount its file system, or: mkdir --mode=0711 {}", self.path),
                )));
            }
            Err(source) => return Err(failed("reading", path)(source)),
        };
        let canonical = std::fs::canonicalize(path).map_err(failed("resolving", path))?;
        if canonical != path {
            return Err(unfit((
                format!("leads through a symbolic link to {}", canonical.display()),
                format!(
                    "put the path itself into the agent's config: path = {:?}",
                    canonical.display().to_string()
                ),
            )));
        }
        let identity = FileIdentity::of(&metadata);
        // First: what else is wrong with a directory in the place of the pool's own is not to be mended.
        if before.is_some_and(|before| !before.is(identity)) {
            return Err(unfit((
                "is another directory than its pool was used with: is its file system mounted?".into(),
                format!("mount {0}; see: findmnt -T {0}", self.path),
            )));
        }
        let flags =
            statvfs(path).map_err(|errno| failed("reading the file system of", path)(errno.into()))?.flags();
        let facts = Facts {
            is_directory: metadata.is_dir(),
            owner: metadata.uid(),
            group: metadata.gid(),
            mode: metadata.mode(),
            read_only: flags.contains(FsFlags::ST_RDONLY),
            btrfs: statfs(path)
                .map_err(|errno| failed("reading the file system of", path)(errno.into()))?
                .filesystem_type()
                == BTRFS_SUPER_MAGIC,
        };
        match facts.problem(self.path.as_str(), self.owner_gid) {
            Some(problem) => Err(unfit(problem)),
            None => Ok(identity),
        }
    }

    /// What room there is.
    pub(crate) fn room(&self) -> Result<Room, DirectoryError> {
        let path = Path::new(self.path.as_str());
        let told = statvfs(path).map_err(|errno| failed("reading the room of", path)(errno.into()))?;
        let unit = told.fragment_size();
        Ok(Room { size: told.blocks() * unit, free: told.blocks_available() * unit })
    }

    /// Is it on the host's root file system? A client can guess the handles of files that are beside the directory.
    pub(crate) fn on_root_file_system(&self) -> bool {
        let device = |path: &str| std::fs::metadata(path).map(|metadata| metadata.dev()).ok();
        device(self.path.as_str()).is_some_and(|own| device("/") == Some(own))
    }
}

/// What decides whether a directory is fit.
#[derive(Debug, Clone, Copy)]
struct Facts {
    is_directory: bool,
    owner: u32,
    group: u32,
    mode: u32,
    read_only: bool,
    /// nfsd shows who has which file open by a device number that no btrfs tells of its files.
    btrfs: bool,
}

impl Facts {
    /// What is wrong, and the command that mends it.
    fn problem(&self, path: &str, owner_gid: u32) -> Option<(String, String)> {
        let may_enter = self.mode & 0o001 != 0 || (self.group == owner_gid && self.mode & 0o010 != 0);
        let (problem, mend) = if !self.is_directory {
            ("is no directory", format!("mv {path} {path}.other && mkdir --mode=0711 {path}"))
        } else if self.owner != 0 {
            ("does not belong to root", format!("chown root:root {path}"))
        } else if self.mode & 0o022 != 0 {
            ("can be written to by others than root", format!("chmod go-w {path}"))
        } else if !may_enter {
            ("cannot be entered by the owner of its files", format!("chmod go+x {path}"))
        } else if self.btrfs {
            (
                "is on btrfs, where nobody can see who has a file open over NFS",
                format!("use ext4 or xfs; see: findmnt -T {path}"),
            )
        } else if self.read_only {
            (
                "is on a file system that is read-only",
                format!(
                    "mount -o remount,rw $(findmnt -n -o TARGET -T {path}); when only the agent cannot write there, its \
                     unit does not let it: systemctl edit tether-storage-agent, [Service] ReadWritePaths={path}"
                ),
            )
        } else {
            return None;
        };
        Some((problem.to_owned(), mend))
    }
}

/// The error for what the kernel refused.
fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DirectoryError {
    let path = path.to_owned();
    move |source| DirectoryError::Io { action, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_directory_that_root_alone_can_write_to_is_fit() {
        let good =
            Facts { is_directory: true, owner: 0, group: 0, mode: 0o040_711, read_only: false, btrfs: false };
        assert_eq!(good.problem("/srv/share", 64055), None);
        assert_eq!(Facts { group: 64055, mode: 0o040_710, ..good }.problem("/srv/share", 64055), None);
        for (facts, words, mend) in [
            (Facts { is_directory: false, ..good }, "no directory", "mkdir"),
            (Facts { owner: 64055, ..good }, "belong to root", "chown root:root /srv/share"),
            (Facts { mode: 0o040_775, ..good }, "written to", "chmod go-w /srv/share"),
            (Facts { mode: 0o041_777, ..good }, "written to", "chmod go-w /srv/share"),
            (Facts { mode: 0o040_700, ..good }, "entered", "chmod go+x /srv/share"),
            (Facts { read_only: true, ..good }, "read-only", "remount,rw"),
            (Facts { btrfs: true, ..good }, "btrfs", "findmnt -T /srv/share"),
        ] {
            let (problem, command) = facts.problem("/srv/share", 64055).unwrap();
            assert!(problem.contains(words) && command.contains(mend), "{problem}: {command}");
        }
    }

    #[test]
    fn a_path_that_is_missing_or_leads_through_a_link_is_named_with_what_mends_it() {
        let folder = tempfile::tempdir().unwrap();
        let real = folder.path().canonicalize().unwrap().join("real");
        std::fs::create_dir(&real).unwrap();
        let link = real.with_file_name("link");
        std::os::unix::fs::symlink(&real, &link).unwrap();
        let check = |path: &Path| {
            let path = path.display().to_string().parse().unwrap();
            Failure::from(Directory::new(path, 64055, 64055, Stuck::default()).check(None).unwrap_err())
        };
        let missing = check(&real.join("no"));
        assert_eq!(missing.reason, Reason::PoolUnavailable);
        assert!(missing.message.contains("is not there") && missing.next.unwrap().contains("mkdir"));
        let linked = check(&link);
        assert_eq!(linked.reason, Reason::PoolUnavailable);
        assert!(linked.next.unwrap().contains(&format!("{:?}", real.display().to_string())));
    }

    #[test]
    fn a_directory_in_the_place_of_the_pools_own_is_named_as_such_before_anything_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().canonicalize().unwrap();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
        let directory =
            Directory::new(path.display().to_string().parse().unwrap(), 64055, 64055, Stuck::default());
        let before = FileIdentity { inode: 1, born: Some(1) };
        let failure = Failure::from(directory.check(Some(before)).unwrap_err());
        assert_eq!(failure.reason, Reason::PoolUnavailable);
        assert!(failure.message.contains("is its file system mounted?"), "{failure}");
    }

    #[test]
    fn an_inode_number_that_was_used_again_is_another_file() {
        let one = FileIdentity { inode: 12, born: Some(5) };
        assert!(one.is(one) && one.is(FileIdentity { born: None, ..one }));
        assert!(!one.is(FileIdentity { born: Some(6), ..one }) && !one.is(FileIdentity { inode: 13, ..one }));
    }

    #[test]
    fn a_full_file_system_is_a_full_pool() {
        let full = failed("making", Path::new("/srv/share/a.raw"))(Errno::ENOSPC.into());
        assert_eq!(Failure::from(full).reason, Reason::PoolFull);
        let broken = failed("making", Path::new("/srv/share/a.raw"))(Errno::EIO.into());
        assert_eq!(Failure::from(broken).reason, Reason::FileFailed);
    }
}
