//! The files of a pool's directory: make one under a name that is no volume's, give it its own name, measure it, make it
//! larger, remove it. No order of steps here.
//!
//! A path is safe in this directory: nobody but root can put anything there (`directory`).

use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Read};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::libc::O_NOFOLLOW;
use tether_agent_core::failure::Failure;
use tether_agent_core::qcow2;
use tether_proto::{FileName, VolumeFormat};

use super::{Directory, DirectoryError, FileIdentity, failed};

/// What a file's name begins with until it is whole. Hidden, so it is no volume's name.
const CREATING_PREFIX: &str = ".tether-creating-";

/// A file as it is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Found {
    /// Which file it is.
    pub(crate) identity: FileIdentity,
    /// The size that the guest sees, in bytes.
    pub(crate) size: u64,
}

impl Directory {
    /// Where a volume's file is.
    pub(crate) fn file(&self, name: &FileName) -> PathBuf {
        Path::new(self.path.as_str()).join(name.as_str())
    }

    /// Where it is until it is whole.
    pub(crate) fn unfinished(&self, name: &FileName) -> PathBuf {
        Path::new(self.path.as_str()).join(format!("{CREATING_PREFIX}{name}"))
    }

    /// Makes an empty file under the name for unfinished ones, for the owner alone, and hands it over. What an earlier call
    /// left under that name is removed.
    pub(crate) fn make(&self, name: &FileName) -> Result<(File, FileIdentity), DirectoryError> {
        let path = self.unfinished(name);
        remove(&path)?;
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(O_NOFOLLOW)
            .open(&path)
            .map_err(failed("making", &path))?;
        file.set_permissions(Permissions::from_mode(0o600)).map_err(failed("setting the mode of", &path))?;
        fchown(&file, Some(self.owner_uid), Some(self.owner_gid)).map_err(failed("giving away", &path))?;
        let identity = FileIdentity::of(&file.metadata().map_err(failed("reading", &path))?);
        Ok((file, identity))
    }

    /// Gives an unfinished file its own name. Whatever has that name already stays.
    pub(crate) fn name(&self, name: &FileName) -> Result<(), DirectoryError> {
        let (from, to) = (self.unfinished(name), self.file(name));
        match renameat2(AT_FDCWD, &from, AT_FDCWD, &to, RenameFlags::RENAME_NOREPLACE) {
            Ok(()) => self.sync(),
            Err(nix::errno::Errno::EEXIST) => Err(DirectoryError::Taken { path: to }),
            Err(errno) => Err(failed("renaming", &from)(errno.into())),
        }
    }

    /// Is there anything under a volume's file name, of whatever kind?
    pub(crate) fn is_taken(&self, name: &FileName) -> Result<bool, DirectoryError> {
        Ok(look(&self.file(name))?.is_some())
    }

    /// The file of a volume, if it is the one that was recorded. Links are not followed.
    pub(crate) fn measure(
        &self,
        name: &FileName,
        format: VolumeFormat,
        recorded: FileIdentity,
    ) -> Result<Found, DirectoryError> {
        let path = self.file(name);
        let wrong =
            |problem: &str| DirectoryError::WrongFile { path: path.clone(), problem: problem.to_owned() };
        let Some(metadata) = look(&path)? else {
            return Err(wrong("is gone"));
        };
        check(&path, &metadata, recorded)?;
        let identity = FileIdentity::of(&metadata);
        let size = match format {
            VolumeFormat::Raw => metadata.len(),
            VolumeFormat::Qcow2 => {
                let mut header = [0; qcow2::HEADER_LENGTH];
                let mut file = OpenOptions::new()
                    .read(true)
                    .custom_flags(O_NOFOLLOW)
                    .open(&path)
                    .map_err(failed("opening", &path))?;
                match file.read_exact(&mut header) {
                    Ok(()) => qcow2::virtual_size(&header).map_err(wrong)?,
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                        return Err(wrong("has no qcow2 header"));
                    }
                    Err(source) => return Err(failed("reading", &path)(source)),
                }
            }
        };
        Ok(Found { identity, size })
    }

    /// Is a volume's file there? Another file under its name is an error.
    pub(crate) fn is_ours(&self, name: &FileName, recorded: FileIdentity) -> Result<bool, DirectoryError> {
        let path = self.file(name);
        match look(&path)? {
            Some(metadata) => check(&path, &metadata, recorded).map(|()| true),
            None => Ok(false),
        }
    }

    /// Removes a volume's file, if it is the one that was recorded; true when it was there.
    pub(crate) fn remove(&self, name: &FileName, recorded: FileIdentity) -> Result<bool, DirectoryError> {
        let there = self.is_ours(name, recorded)?;
        if there {
            remove(&self.file(name))?;
            self.sync()?;
        }
        Ok(there)
    }

    /// Removes what a creation that was cut off has left: the unfinished file, and the named one if it is ours.
    pub(crate) fn remove_leftovers(
        &self,
        name: &FileName,
        recorded: Option<FileIdentity>,
    ) -> Result<(), DirectoryError> {
        remove(&self.unfinished(name))?;
        let path = self.file(name);
        if let (Some(recorded), Some(metadata)) = (recorded, look(&path)?)
            && check(&path, &metadata, recorded).is_ok()
        {
            remove(&path)?;
        }
        self.sync()
    }

    /// Opens a volume's file for making it larger.
    pub(crate) fn open(&self, name: &FileName) -> Result<File, DirectoryError> {
        let path = self.file(name);
        OpenOptions::new().write(true).custom_flags(O_NOFOLLOW).open(&path).map_err(failed("opening", &path))
    }

    fn sync(&self) -> Result<(), DirectoryError> {
        let path = Path::new(self.path.as_str());
        File::open(path).and_then(|directory| directory.sync_all()).map_err(failed("syncing", path))
    }
}

/// Gives a raw file a length. What was never written reads as zeroes.
pub(crate) fn set_length(file: &File, path: &Path, size: u64) -> Result<(), DirectoryError> {
    file.set_len(size).map_err(failed("setting the length of", path))
}

/// Puts a file's content and length on disk.
pub(crate) fn sync(file: &Arc<File>, path: &Path) -> Result<(), DirectoryError> {
    file.sync_all().map_err(failed("syncing", path))
}

/// The failure when room for a file cannot be taken.
pub(crate) fn no_room(path: &Path, source: io::Error) -> Failure {
    failed("taking room for", path)(source).into()
}

fn look(path: &Path) -> Result<Option<std::fs::Metadata>, DirectoryError> {
    match std::fs::symlink_metadata(path) {
        Ok(metadata) => Ok(Some(metadata)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(failed("reading", path)(source)),
    }
}

fn check(path: &Path, metadata: &std::fs::Metadata, recorded: FileIdentity) -> Result<(), DirectoryError> {
    let problem = if !metadata.is_file() {
        "is no regular file".to_owned()
    } else if !FileIdentity::of(metadata).is(recorded) {
        let found = FileIdentity::of(metadata).inode;
        format!(
            "is another file than the one that Tether made: inode {found} and not {}, or made at another time",
            recorded.inode
        )
    } else {
        return Ok(());
    };
    Err(DirectoryError::WrongFile { path: path.to_owned(), problem })
}

fn remove(path: &Path) -> Result<(), DirectoryError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("removing", path)(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tether_agent_core::stuck::Stuck;

    fn pool() -> (tempfile::TempDir, Directory) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().canonicalize().unwrap().display().to_string().parse().unwrap();
        // The test's own ids: giving a file to oneself needs no rights.
        let own = std::fs::metadata(folder.path()).unwrap();
        use std::os::unix::fs::MetadataExt;
        (folder, Directory::new(path, own.uid(), own.gid(), Stuck::default()))
    }

    fn name(text: &str) -> FileName {
        text.parse().unwrap()
    }

    #[test]
    fn a_file_is_made_unfinished_named_measured_and_removed() {
        let (_folder, pool) = pool();
        let name = name("a.raw");
        let (file, identity) = pool.make(&name).unwrap();
        assert!(!pool.is_taken(&name).unwrap());
        set_length(&file, &pool.unfinished(&name), 1 << 20).unwrap();
        pool.name(&name).unwrap();
        let found = pool.measure(&name, VolumeFormat::Raw, identity).unwrap();
        assert_eq!((found.size, found.identity), (1 << 20, identity));
        let mode = std::fs::metadata(pool.file(&name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);
        assert!(pool.remove(&name, identity).unwrap());
        assert!(!pool.remove(&name, identity).unwrap());
    }

    #[test]
    fn what_somebody_else_made_is_never_overwritten_taken_or_removed() {
        let (folder, pool) = pool();
        let name = name("a.raw");
        let target = folder.path().join("precious");
        std::fs::write(&target, "data").unwrap();
        std::os::unix::fs::symlink(&target, pool.file(&name)).unwrap();
        let (_file, identity) = pool.make(&name).unwrap();
        assert!(matches!(pool.name(&name), Err(DirectoryError::Taken { .. })));
        for outcome in [
            pool.measure(&name, VolumeFormat::Raw, identity).map(drop),
            pool.remove(&name, identity).map(drop),
        ] {
            assert!(matches!(outcome, Err(DirectoryError::WrongFile { .. })));
        }
        pool.remove_leftovers(&name, Some(identity)).unwrap();
        assert_eq!(std::fs::read_to_string(&target).unwrap(), "data");
        assert!(pool.is_taken(&name).unwrap() && !pool.unfinished(&name).exists());
    }

    #[test]
    fn f1_a_file_that_was_put_in_the_volumes_place_is_the_wrong_one() {
        let (_folder, pool) = pool();
        let name = name("a.raw");
        let (_file, identity) = pool.make(&name).unwrap();
        pool.name(&name).unwrap();
        let other = FileIdentity { inode: identity.inode + 1, ..identity };
        let error = Failure::from(pool.measure(&name, VolumeFormat::Raw, other).unwrap_err());
        assert_eq!(error.reason, tether_agent_core::failure::Reason::WrongDevice);
        assert!(error.next.unwrap().contains("mv "));
    }

    /// F4: a header that a guest wrote into its raw volume changes nothing, and a qcow2 volume without one is refused.
    #[test]
    fn f4_the_format_is_told_and_a_raw_file_is_not_looked_into() {
        let (_folder, pool) = pool();
        let name = name("a.raw");
        let (_file, identity) = pool.make(&name).unwrap();
        pool.name(&name).unwrap();
        let mut header = vec![0; 512];
        header[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        header[24..32].copy_from_slice(&(1u64 << 40).to_be_bytes());
        std::fs::write(pool.file(&name), &header).unwrap();
        assert_eq!(pool.measure(&name, VolumeFormat::Raw, identity).unwrap().size, 512);
        assert_eq!(pool.measure(&name, VolumeFormat::Qcow2, identity).unwrap().size, 1 << 40);
        std::fs::write(pool.file(&name), "short").unwrap();
        assert!(pool.measure(&name, VolumeFormat::Qcow2, identity).is_err());
    }
}
