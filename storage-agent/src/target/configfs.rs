//! A folder of configfs (Documentation/filesystems/configfs.rst): make, write, read back, link, remove. Says what was
//! being done to which path when it fails. Not here: what the paths mean (`lio`).

use std::io;
use std::path::{Path, PathBuf};

/// A write, read or removal that the kernel refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigfsError {
    /// The kernel refused.
    #[error("{action} {} failed", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// Another value was read back than was written.
    #[error("{} holds {found:?} and not what was written", path.display())]
    ReadBack { path: PathBuf, found: String },
    /// What was removed is still there.
    #[error("{} is still there", path.display())]
    StillThere { path: PathBuf },
}

impl ConfigfsError {
    /// The system's error number, when the kernel refused.
    pub(crate) fn errno(&self) -> Option<i32> {
        match self {
            Self::Io { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}

fn fail(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ConfigfsError {
    let path = path.to_owned();
    move |source| ConfigfsError::Io { action, path, source }
}

/// Makes a folder, which makes the kernel's object. True when it was not there.
pub(crate) fn make(path: &Path) -> Result<bool, ConfigfsError> {
    match std::fs::create_dir(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(fail("making", path)(error)),
    }
}

/// Writes an attribute.
pub(crate) fn write(path: &Path, value: &str) -> Result<(), ConfigfsError> {
    // No O_CREAT and no O_TRUNC: an attribute is there or it is not, and each write is one value.
    std::fs::OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut file| io::Write::write_all(&mut file, value.as_bytes()))
        .map_err(fail("writing", path))
}

/// Reads an attribute, without the newline at its end.
pub(crate) fn read(path: &Path) -> Result<String, ConfigfsError> {
    let text = std::fs::read_to_string(path).map_err(fail("reading", path))?;
    Ok(text.trim_end_matches(['\n', '\0']).to_owned())
}

/// Reads an attribute of an object that may not be there. Not to be able to look is an error, and never absence.
pub(crate) fn read_if_there(path: &Path) -> Result<Option<String>, ConfigfsError> {
    if is_there(path)? { read(path).map(Some) } else { Ok(None) }
}

/// Is there such an object or attribute?
pub(crate) fn is_there(path: &Path) -> Result<bool, ConfigfsError> {
    path.try_exists().map_err(fail("looking for", path))
}

/// Writes an attribute unless it holds the value already, and reads it back. True when it was written.
pub(crate) fn ensure(path: &Path, value: &str) -> Result<bool, ConfigfsError> {
    if read(path)? == value {
        return Ok(false);
    }
    write(path, value)?;
    match read(path)? {
        found if found == value => Ok(true),
        found => Err(ConfigfsError::ReadBack { path: path.to_owned(), found }),
    }
}

/// Like [`ensure`] for a value that no error may show.
pub(crate) fn ensure_secret(path: &Path, value: &str) -> Result<bool, ConfigfsError> {
    ensure(path, value).map_err(|error| match error {
        ConfigfsError::ReadBack { path, .. } => {
            ConfigfsError::ReadBack { path, found: "something else".into() }
        }
        other => other,
    })
}

/// Links one object into another. True when the link was not there.
pub(crate) fn link(target: &Path, path: &Path) -> Result<bool, ConfigfsError> {
    match std::os::unix::fs::symlink(target, path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let found = std::fs::canonicalize(path).map_err(fail("reading link", path))?;
            let wanted = std::fs::canonicalize(target).map_err(fail("reading", target))?;
            if found == wanted {
                return Ok(false);
            }
            Err(ConfigfsError::ReadBack { path: path.to_owned(), found: found.display().to_string() })
        }
        Err(error) => Err(fail("linking", path)(error)),
    }
}

/// The names in a folder; none when it is not there.
pub(crate) fn list(path: &Path) -> Result<Vec<PathBuf>, ConfigfsError> {
    match std::fs::read_dir(path) {
        Ok(entries) => entries
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<Result<_, _>>()
            .map_err(fail("listing", path)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(fail("listing", path)(error)),
    }
}

/// Removes a folder and with it the kernel's object. True when it was there.
pub(crate) fn remove(path: &Path) -> Result<bool, ConfigfsError> {
    gone(std::fs::remove_dir(path), path)
}

/// Removes a link. True when it was there.
pub(crate) fn unlink(path: &Path) -> Result<bool, ConfigfsError> {
    gone(std::fs::remove_file(path), path)
}

fn gone(outcome: io::Result<()>, path: &Path) -> Result<bool, ConfigfsError> {
    match outcome {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(fail("removing", path)(error)),
    }
}

/// Checks that nothing is at a path any more.
pub(crate) fn prove_gone(path: &Path) -> Result<(), ConfigfsError> {
    if is_there(path)? { Err(ConfigfsError::StillThere { path: path.to_owned() }) } else { Ok(()) }
}
