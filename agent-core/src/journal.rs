//! The journal: one small JSON file per export or attachment, written before the first side effect (rule 6).
//!
//! A file is replaced as a whole: temporary file, fsync, rename, fsync of the directory; mode 0600, for it may hold
//! a CHAP secret. All records are read once at start and kept in memory, so that no operation reads the directory.
//! Not here: what the records mean, and the repair that follows from them.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// What went wrong with a journal file.
#[derive(Debug, thiserror::Error)]
#[error("journal: {action} {} failed", path.display())]
pub struct JournalError {
    action: &'static str,
    path: PathBuf,
    #[source]
    source: std::io::Error,
}

/// Records of one kind, by a key that is a legal file name.
pub struct Journal<R> {
    directory: PathBuf,
    records: Mutex<BTreeMap<String, R>>,
    damaged: Vec<PathBuf>,
}

/// The version in each file; a file of another version is set aside.
const VERSION: u32 = 1;

#[derive(serde::Serialize)]
struct FileOut<'a, R> {
    version: u32,
    record: &'a R,
}

#[derive(serde::Deserialize)]
struct FileIn<R> {
    version: u32,
    record: R,
}

impl<R: Serialize + DeserializeOwned + Clone> Journal<R> {
    /// Opens a journal, makes its directory (0700) when it is not there, and reads all records. A file that cannot
    /// be understood is renamed to `….damaged`, logged, and listed by [`Journal::damaged`].
    ///
    /// # Errors
    /// When the directory cannot be made, listed or read.
    pub fn open(directory: &Path) -> Result<Self, JournalError> {
        let fail = |action, path: &Path| {
            let path = path.to_owned();
            move |source| JournalError { action, path, source }
        };
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(fail("making directory", directory))?;
        let mut records = BTreeMap::new();
        let mut damaged = Vec::new();
        for entry in fs::read_dir(directory).map_err(fail("listing", directory))? {
            let path = entry.map_err(fail("listing", directory))?.path();
            let extension = path.extension().and_then(|e| e.to_str());
            if extension == Some("damaged") {
                damaged.push(path);
                continue;
            }
            let Some(key) = path.file_stem().and_then(|s| s.to_str()).filter(|_| extension == Some("json"))
            else {
                if extension == Some("tmp") {
                    // Of a write that was cut off: the record it was to replace is still whole.
                    fs::remove_file(&path).map_err(fail("removing", &path))?;
                } else {
                    tracing::warn!(file = %path.display(), "this is none of the journal's files, and is left where it is");
                }
                continue;
            };
            let read = fs::read(&path).map_err(|error| format!("it cannot be read: {error}"));
            match read.and_then(|text| parse::<R>(&text)) {
                Ok(record) => {
                    records.insert(key.to_owned(), record);
                }
                Err(problem) => {
                    let aside = free_name(&path);
                    fs::rename(&path, &aside).map_err(fail("setting aside", &path))?;
                    tracing::error!(file = %aside.display(), %problem, "damaged journal file set aside");
                    damaged.push(aside);
                }
            }
        }
        Ok(Self { directory: directory.to_owned(), records: Mutex::new(records), damaged })
    }

    /// Files that could not be understood.
    pub fn damaged(&self) -> &[PathBuf] {
        &self.damaged
    }

    /// One record.
    pub fn get(&self, key: &str) -> Option<R> {
        self.lock().get(key).cloned()
    }

    /// All records, by key.
    pub fn list(&self) -> Vec<R> {
        self.lock().values().cloned().collect()
    }

    /// Puts a record in place of what was there. It is on disk when this returns. Blocks for two fsyncs.
    ///
    /// # Errors
    /// When the file cannot be written; the old record then still stands. When only the directory cannot be synced, the new one
    /// does, as on disk.
    pub fn put(&self, key: &str, record: &R) -> Result<(), JournalError> {
        let path = self.directory.join(format!("{key}.json"));
        let temporary = self.directory.join(format!("{key}.tmp"));
        let fail = |action, path: &Path| {
            let path = path.to_owned();
            move |source| JournalError { action, path, source }
        };
        let mut text = serde_json::to_vec_pretty(&FileOut { version: VERSION, record })
            .map_err(|error| fail("encoding", &path)(error.into()))?;
        text.push(b'\n');
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)
            .map_err(fail("making", &temporary))?;
        file.write_all(&text).map_err(fail("writing", &temporary))?;
        file.sync_all().map_err(fail("syncing", &temporary))?;
        fs::rename(&temporary, &path).map_err(fail("renaming", &temporary))?;
        self.lock().insert(key.to_owned(), record.clone());
        File::open(&self.directory)
            .and_then(|directory| directory.sync_all())
            .map_err(fail("syncing", &self.directory))
    }

    /// Forgets a record, as if it had never been. It is gone from disk when this returns.
    ///
    /// # Errors
    /// When the file cannot be removed; the record then still stands. When only the directory cannot be synced, it is gone.
    pub fn remove(&self, key: &str) -> Result<(), JournalError> {
        let path = self.directory.join(format!("{key}.json"));
        match fs::remove_file(&path) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                return Err(JournalError { action: "removing", path, source });
            }
            _ => {}
        }
        self.lock().remove(key);
        File::open(&self.directory)
            .and_then(|directory| directory.sync_all())
            .map_err(|source| JournalError { action: "syncing", path: self.directory.clone(), source })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, R>> {
        // A panic elsewhere cannot leave the map half changed: each change is one insert.
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A name beside a record for what is set aside. An earlier one keeps its own: it may be all that is left of the record.
fn free_name(path: &Path) -> PathBuf {
    let names = std::iter::once("json.damaged".to_owned()).chain((1..).map(|n| format!("json.{n}.damaged")));
    let mut free = names.map(|name| path.with_extension(name)).filter(|name| !name.exists());
    free.next().unwrap_or_else(|| path.with_extension("json.damaged"))
}

/// A record, or what is wrong with the file.
fn parse<R: DeserializeOwned>(text: &[u8]) -> Result<R, String> {
    match serde_json::from_slice::<FileIn<R>>(text) {
        Ok(file) if file.version == VERSION => Ok(file.record),
        Ok(file) => Err(format!("version {} and not {VERSION}", file.version)),
        // The error's own text may quote the file, and with it a secret.
        Err(error) => Err(format!("not a record, line {} column {}", error.line(), error.column())),
    }
}

/// One record of a journal that is not opened: for somebody who only looks. None when there is none, or it is damaged.
///
/// # Errors
/// When its file cannot be read.
pub fn look_up<R: DeserializeOwned>(directory: &Path, key: &str) -> std::io::Result<Option<R>> {
    match fs::read(directory.join(format!("{key}.json"))) {
        Ok(text) => Ok(parse(&text).ok()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The files in a journal's directory that cannot be understood, also those set aside before, each with what is wrong.
/// Changes nothing; a directory that is not there has none.
///
/// # Errors
/// When the directory or a file in it cannot be read.
pub fn find_damaged<R: DeserializeOwned>(directory: &Path) -> std::io::Result<Vec<(PathBuf, String)>> {
    let mut damaged = Vec::new();
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(damaged),
        entries => entries?,
    };
    for entry in entries {
        let path = entry?.path();
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("damaged") => damaged.push((path, "set aside by the agent".to_owned())),
            Some("json") => match fs::read(&path) {
                Ok(text) => damaged.extend(parse::<R>(&text).err().map(|problem| (path, problem))),
                // The agent removed it meanwhile.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            },
            _ => {}
        }
    }
    damaged.sort();
    Ok(damaged)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tether_proto::mangled;

    proptest! {
        /// A damaged file is the record of its version or none, and what is wrong with it does not quote it (F44).
        #[test]
        fn a_damaged_file_is_told_without_its_content(text in mangled("{\n  \"version\": 1,\n  \"record\": \"canary-canary\"\n}\n")) {
            if let Err(problem) = parse::<String>(text.as_bytes()) {
                prop_assert!(!problem.contains("canary"), "{}", problem);
            }
        }
    }
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn what_was_put_is_there_after_a_restart_and_only_its_owner_may_read_it() {
        let folder = tempfile::tempdir().unwrap();
        let directory = folder.path().join("exports");
        let journal = Journal::<String>::open(&directory).unwrap();
        journal.put("a", &"one".into()).unwrap();
        journal.put("a", &"two".into()).unwrap();
        drop(journal);
        assert_eq!(look_up::<String>(&directory, "a").unwrap().as_deref(), Some("two"));
        assert_eq!(look_up::<String>(&directory, "b").unwrap(), None);
        let journal = Journal::<String>::open(&directory).unwrap();
        assert_eq!(journal.get("a").as_deref(), Some("two"));
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&directory), mode(&directory.join("a.json"))), (0o700, 0o600));
    }

    #[test]
    fn a_damaged_file_is_set_aside_and_told_and_a_cut_off_write_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::<String>::open(folder.path()).unwrap();
        journal.put("good", &"one".into()).unwrap();
        fs::write(folder.path().join("good.tmp"), "{\"vers").unwrap();
        fs::write(folder.path().join("bad.json"), "{\"version\":1,").unwrap();
        fs::write(folder.path().join("new.json"), "{\"version\":9,\"record\":\"x\"}").unwrap();
        assert_eq!(find_damaged::<String>(folder.path()).unwrap().len(), 2);
        assert!(folder.path().join("bad.json").exists(), "looking changes nothing");
        for _ in 0..2 {
            let journal = Journal::<String>::open(folder.path()).unwrap();
            assert_eq!(find_damaged::<String>(folder.path()).unwrap().len(), 2);
            assert_eq!(journal.list(), ["one"]);
            let mut damaged: Vec<_> = journal.damaged().iter().filter_map(|p| p.file_name()).collect();
            damaged.sort();
            assert_eq!(damaged, ["bad.json.damaged", "new.json.damaged"]);
        }
        assert!(!folder.path().join("good.tmp").exists());
        // A repair that was none replaces nothing.
        fs::write(folder.path().join("bad.json"), "repaired").unwrap();
        Journal::<String>::open(folder.path()).unwrap();
        let aside = |name: &str| fs::read_to_string(folder.path().join(name)).unwrap();
        assert_eq!(aside("bad.json.damaged"), "{\"version\":1,");
        assert_eq!(aside("bad.json.1.damaged"), "repaired");
    }
}
