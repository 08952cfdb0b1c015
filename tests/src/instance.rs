//! One instance of the lab on this machine: its name, its folders, and the record of what runs in it.
//!
//! Sockets live in a short folder under /tmp (a Unix socket's path has at most 107 bytes), disks in the cache folder.
//! Not here: starting or stopping anything (see `qemu`, `lab`).

use std::collections::BTreeMap;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use nix::fcntl::Flock;
use serde::{Deserialize, Serialize};

use crate::cache;

/// The folders of one instance.
#[derive(Debug, Clone)]
pub struct Instance {
    /// Its name, `default` when nobody says otherwise.
    pub name: String,
    /// Sockets, process ids, consoles, the ssh configuration, the record.
    pub runtime: PathBuf,
    /// The hosts' disks, with the saved states in them.
    pub disks: PathBuf,
}

/// What was started, and where it is reached. Kept as `instance.json` in the runtime folder.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Key of the saved state that the hosts were started from.
    pub base: String,
    /// Ports on 127.0.0.1 by host name.
    pub ports: BTreeMap<String, Ports>,
    /// Saved states by name, each with the key of what is in it (empty for those saved by hand).
    pub states: BTreeMap<String, String>,
}

/// Ports on 127.0.0.1 of this machine that lead into one host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ports {
    /// To its port 22.
    pub ssh: u16,
    /// To its port 7440, where an agent listens.
    pub agent: u16,
}

impl Instance {
    /// The instance of this name. Makes its runtime folder.
    ///
    /// # Errors
    /// When the name is no good, or the folder belongs to somebody else.
    pub fn open(name: &str) -> anyhow::Result<Self> {
        check_name(name)?;
        let disks = cache::folder()?.join("instances").join(name);
        Self::with_disks(name, disks)
    }

    pub(crate) fn with_disks(name: &str, disks: PathBuf) -> anyhow::Result<Self> {
        let base = base_folder()?;
        let runtime = base.join(name);
        cache::make_folder(&runtime)?;
        Ok(Self { name: name.to_string(), runtime, disks })
    }

    /// Held while something changes the instance, or as long as a test owns it.
    ///
    /// # Errors
    /// When the lock file cannot be used.
    pub async fn lock(&self) -> anyhow::Result<Flock<std::fs::File>> {
        cache::lock(&self.runtime.with_extension("lock")).await
    }

    /// A file in the runtime folder.
    pub fn file(&self, name: &str) -> PathBuf {
        self.runtime.join(name)
    }

    /// The record; an empty one when nothing was started.
    ///
    /// # Errors
    /// When it is there and cannot be read.
    pub fn record(&self) -> anyhow::Result<Record> {
        let path = self.file("instance.json");
        match std::fs::read(&path) {
            Ok(bytes) => {
                serde_json::from_slice(&bytes).with_context(|| format!("cannot read {}", path.display()))
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Record::default()),
            Err(e) => Err(e).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    /// Keeps the record.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn keep(&self, record: &Record) -> anyhow::Result<()> {
        let (path, unfinished) = (self.file("instance.json"), self.file("instance.json.unfinished"));
        std::fs::write(&unfinished, serde_json::to_vec_pretty(record)?)
            .and_then(|()| std::fs::rename(&unfinished, &path))
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// Removes disks and sockets; nothing may run any more.
    ///
    /// # Errors
    /// When something cannot be removed.
    pub fn remove(&self) -> anyhow::Result<()> {
        cache::remove_folder(&self.disks)?;
        cache::remove_folder(&self.runtime)
    }
}

/// Every instance that has a runtime folder.
///
/// # Errors
/// When the folder cannot be read.
pub fn names() -> anyhow::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(base_folder()?)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// A name of an instance or a saved state: it becomes part of paths and monitor commands.
///
/// # Errors
/// When it has other characters than a-z, 0-9 and '-', or not 1 to 24 of them.
pub fn check_name(name: &str) -> anyhow::Result<()> {
    let good = name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
    ensure!(
        good && (1..=24).contains(&name.len()),
        "'{name}' is no good as a name: 1 to 24 of a-z, 0-9 and '-'"
    );
    Ok(())
}

/// `/tmp/tether-lab-UID`, ours alone: others could otherwise plant sockets in it.
fn base_folder() -> anyhow::Result<PathBuf> {
    let user = nix::unistd::geteuid();
    let base = Path::new("/tmp").join(format!("tether-lab-{user}"));
    match std::fs::DirBuilder::new().mode(0o700).create(&base) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(e).with_context(|| format!("cannot make {}", base.display()));
        }
        _ => {}
    }
    let found =
        std::fs::symlink_metadata(&base).with_context(|| format!("cannot read {}", base.display()))?;
    ensure!(
        found.is_dir() && found.uid() == user.as_raw() && found.mode() & 0o077 == 0,
        "{} must be a folder of this user with mode 0700",
        base.display()
    );
    Ok(base)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_become_paths_are_checked() {
        for bad in ["", "../x", "a b", "Ä", "a/b", &"x".repeat(25)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
        assert!(check_name("tests-2").is_ok());
    }
}
