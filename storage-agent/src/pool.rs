//! The pools of the config, and what the agent has recorded of their volumes. Exports and volumes share it. Not here: the
//! order of any steps, and what LVM or a directory do.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use tether_agent_core::failure::{Failure, Reason};
use tether_agent_core::journal::Journal;
use tether_agent_core::stuck::Stuck;
use tether_proto::{FileSystemId, PoolName, VolumeKey, VolumeName, wire};
use uuid::Uuid;

use crate::config::{self, Config};
use crate::directory::{Directory, DirectoryError};
use crate::lvm::{self, Lvm};
use crate::volume::record::{
    DirectoryRecord, ExtensionRecord, FileRecord, MultiAttachRecord, OperationRecord, VolumeOperation,
    journal_key,
};

/// Where volumes live.
#[derive(Debug, Clone)]
pub(crate) enum Pool {
    /// Logical volumes, reached over iSCSI.
    Logical(Lvm),
    /// Files in a directory, reached over NFS.
    Directory(Directory),
}

impl Pool {
    /// Where a volume is on this host: what claims go by. `VG/LV`, or a path without the format's extension.
    pub(crate) fn place(&self, volume: &VolumeName) -> String {
        match self {
            Self::Logical(lvm) => lvm.place(volume.as_str()),
            Self::Directory(directory) => format!("{}/{volume}", directory.path()),
        }
    }

    /// How its volumes are reached.
    pub(crate) fn transport(&self) -> wire::Transport {
        match self {
            Self::Logical(_) => wire::Transport::Iscsi,
            Self::Directory(_) => wire::Transport::Nfs,
        }
    }
}

/// The pools, and the journals that go with them.
pub(crate) struct Pools {
    pools: BTreeMap<PoolName, Pool>,
    /// What hangs in the kernel.
    pub(crate) stuck: Stuck,
    /// The directories that were used, by pool.
    directories: Journal<DirectoryRecord>,
    /// Two that use a directory for the first time at once must not give it two ids.
    first_use: Mutex<()>,
    /// The files that we made, by `POOL@VOLUME`.
    pub(crate) files: Journal<FileRecord>,
    /// The extensions of thick LVs that are not finished, by `POOL@VOLUME`.
    pub(crate) extensions: Journal<ExtensionRecord>,
    /// What is about to be done to LVs, by `POOL@VOLUME`.
    pub(crate) operations: Journal<OperationRecord>,
    /// The LVs that are multi_attach, by `POOL@VOLUME`.
    pub(crate) multi_attach: Journal<MultiAttachRecord>,
}

impl Pools {
    /// The config's pools. A directory that is not fit is told in the log now and to each caller later.
    ///
    /// # Errors
    /// When a journal cannot be opened.
    pub(crate) async fn open(config: &Config) -> Result<Arc<Self>, Failure> {
        let stuck = Stuck::default();
        let pools = config.pool.iter().map(|(name, pool)| {
            let pool = match pool {
                config::Pool::Lvm { volume_group, thin_pool, devices, .. } => {
                    Pool::Logical(Lvm::new(volume_group, thin_pool.as_deref(), devices))
                }
                config::Pool::Directory { path, owner_uid, owner_gid, .. } => {
                    let stuck = stuck.clone();
                    Pool::Directory(Directory::new(path.clone(), *owner_uid, *owner_gid, stuck))
                }
            };
            (name.clone(), pool)
        });
        let state = &config.state_directory;
        let pools = Arc::new(Self {
            pools: pools.collect(),
            stuck,
            directories: Journal::open(&state.join("pools"))?,
            first_use: Mutex::default(),
            files: Journal::open(&state.join("files"))?,
            extensions: Journal::open(&state.join("extensions"))?,
            operations: Journal::open(&state.join("operations"))?,
            multi_attach: Journal::open(&state.join("multi-attach"))?,
        });
        for (name, pool) in &pools.pools {
            let Pool::Directory(directory) = pool else { continue };
            if let Err(failure) = pools.look_at_directory(name, directory).await {
                tracing::error!(pool = %name, error = %failure, "this pool cannot be used yet");
            }
            let looked = directory.clone();
            // A file system that hangs keeps its own pool waiting, and not the agent.
            let beside = directory.look(move || Ok::<_, Failure>(looked.on_root_file_system())).await;
            if beside.unwrap_or(false) {
                tracing::warn!(
                    pool = %name, path = %directory.path(),
                    "this pool is on the root file system: a client of the share can guess its way to other files there; \
                     give the pool a file system of its own"
                );
            }
        }
        Ok(pools)
    }

    /// One pool by its name.
    pub(crate) fn get(&self, name: &PoolName) -> Result<&Pool, Failure> {
        self.pools.get(name).ok_or_else(|| {
            let known: Vec<&str> = self.pools.keys().map(PoolName::as_str).collect();
            Failure::new(Reason::PoolNotFound, format!("no pool is named {name}"))
                .at("validate")
                .next(format!("the pools of this host are: {}", known.join(", ")))
        })
    }

    /// The pool of a volume, whose name it allows.
    pub(crate) fn of(&self, key: &VolumeKey) -> Result<&Pool, Failure> {
        let pool = self.get(&key.pool)?;
        if let Pool::Logical(_) = pool {
            lvm::check_name(&key.volume).map_err(|failure| failure.at("validate"))?;
        }
        Ok(pool)
    }

    /// All pools, by name.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&PoolName, &Pool)> {
        self.pools.iter()
    }

    /// A file of these journals that could not be understood.
    pub(crate) fn damaged(&self) -> Option<&PathBuf> {
        let all = [
            self.directories.damaged(),
            self.files.damaged(),
            self.extensions.damaged(),
            self.operations.damaged(),
            self.multi_attach.damaged(),
        ];
        all.into_iter().flatten().next()
    }

    /// Is a pool's directory fit, and the one that was used before? Records nothing.
    pub(crate) async fn look_at_directory(
        self: &Arc<Self>,
        name: &PoolName,
        directory: &Directory,
    ) -> Result<(), Failure> {
        let (this, name, looked) = (self.clone(), name.clone(), directory.clone());
        directory.look(move || this.check(&name, &looked).map(drop)).await
    }

    /// The same, and the record of it, which the first use makes.
    pub(crate) async fn use_directory(
        self: &Arc<Self>,
        name: &PoolName,
        directory: &Directory,
    ) -> Result<DirectoryRecord, Failure> {
        let (this, name, looked) = (self.clone(), name.clone(), directory.clone());
        let work = move || {
            let (record, known) = this.check(&name, &looked)?;
            if known { Ok(record) } else { this.record_first_use(&name, record) }
        };
        directory.look(work).await
    }

    /// Keeps the record of a directory, unless another operation was first: then its record counts.
    fn record_first_use(&self, name: &PoolName, record: DirectoryRecord) -> Result<DirectoryRecord, Failure> {
        let _alone = self.first_use.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(first) = self.directories.get(name.as_str()) {
            return Ok(first);
        }
        self.directories.put(name.as_str(), &record)?;
        Ok(record)
    }

    /// The record of a pool's directory, and whether it is in the journal.
    fn check(&self, name: &PoolName, directory: &Directory) -> Result<(DirectoryRecord, bool), Failure> {
        let known = self.directories.get(name.as_str());
        if let Some(record) = known.as_ref().filter(|record| record.path != *directory.path()) {
            return Err(DirectoryError::Unfit {
                path: directory.path().to_string(),
                problem: format!("is not the one that pool {name} was used with, {}", record.path),
                mend: "put that path back into the agent's config; another directory needs a pool of another name"
                    .into(),
            }
            .into());
        }
        let owner = directory.owner();
        if let Some(of) = known.as_ref().and_then(|record| record.owner).filter(|of| *of != owner) {
            // Its files and the lines of its exports are the first one's: guests would lose their disks.
            return Err(DirectoryError::Unfit {
                path: directory.path().to_string(),
                problem: format!(
                    "has files of uid {} and gid {}, and pool {name} is configured with {} and {} now",
                    of.0, of.1, owner.0, owner.1
                ),
                mend: "put owner_uid and owner_gid back into the agent's config; another owner needs a pool of another name"
                    .into(),
            }
            .into());
        }
        let identity = directory.check(known.as_ref().map(|record| record.identity))?;
        match known {
            Some(record) => Ok((record, true)),
            None if !self.directories.damaged().is_empty() => Err(Failure::new(
                Reason::JournalFailed,
                format!("which directory pool {name} was used with is not known: its record may be the damaged one"),
            )
            .next("repair the damaged file in pools/ under the agent's state directory, then restart the agent")),
            None => {
                let file_system_id = FileSystemId::new(Uuid::new_v4())?;
                let path = directory.path().clone();
                let pool = name.clone();
                Ok((DirectoryRecord { pool, path, identity, file_system_id, owner: Some(owner) }, false))
            }
        }
    }

    /// The ids of the file systems that we share.
    pub(crate) fn file_system_ids(&self) -> Vec<FileSystemId> {
        self.directories.list().into_iter().map(|record| record.file_system_id).collect()
    }

    /// What is recorded of a file.
    pub(crate) fn file(&self, volume: &VolumeKey) -> Option<FileRecord> {
        self.files.get(&journal_key(volume))
    }

    /// A volume of which the deletion was cut off may go at any moment: it is used for nothing.
    ///
    /// # Errors
    /// `VOLUME_NOT_FOUND`, for then it counts as gone.
    pub(crate) fn check_not_deleting(&self, volume: &VolumeKey) -> Result<(), Failure> {
        let record = self.operations.get(&journal_key(volume));
        if record.is_some_and(|record| record.operation == VolumeOperation::Delete) {
            return Err(not_found(volume).at("validate").next("its deletion was cut off: delete it again"));
        }
        Ok(())
    }

    /// The permanent id of a volume that several hosts may have at a time; nothing for any other.
    pub(crate) fn multi_attach(&self, volume: &VolumeKey) -> Option<String> {
        match self.file(volume) {
            Some(record) => Some(record.uuid).filter(|_| record.multi_attach),
            None => self.multi_attach.get(&journal_key(volume))?.uuid,
        }
    }

    /// The extension of an LV that is not finished.
    pub(crate) fn extension(&self, volume: &VolumeKey, uuid: &str) -> Option<ExtensionRecord> {
        self.extensions.get(&journal_key(volume)).filter(|record| record.uuid == uuid)
    }
}

/// The failure for a volume that is not there.
pub(crate) fn not_found(volume: &VolumeKey) -> Failure {
    Failure::new(Reason::VolumeNotFound, format!("no volume is named {volume}"))
        .next(format!("see: tether volume list --pool {}", volume.pool))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pools(state: &tempfile::TempDir) -> Arc<Pools> {
        let open = |name: &str| state.path().join(name);
        Arc::new(Pools {
            stuck: Stuck::default(),
            pools: BTreeMap::new(),
            directories: Journal::open(&open("pools")).unwrap(),
            first_use: Mutex::default(),
            files: Journal::open(&open("files")).unwrap(),
            extensions: Journal::open(&open("extensions")).unwrap(),
            operations: Journal::open(&open("operations")).unwrap(),
            multi_attach: Journal::open(&open("multi-attach")).unwrap(),
        })
    }

    #[tokio::test]
    async fn a_directory_that_is_another_one_than_before_is_not_written_to() {
        let state = tempfile::tempdir().unwrap();
        let root = state.path().canonicalize().unwrap();
        let make = |name: &str| {
            let path = root.join(name);
            std::fs::create_dir(&path).unwrap();
            Directory::new(path.display().to_string().parse().unwrap(), 64055, 64055, Stuck::default())
        };
        let (directory, other) = (make("share"), make("other"));
        let name: PoolName = "share".parse().unwrap();
        let metadata = std::fs::metadata(other.path().as_str()).unwrap();
        let record = DirectoryRecord {
            pool: name.clone(),
            path: directory.path().clone(),
            identity: crate::directory::FileIdentity::of(&metadata),
            file_system_id: FileSystemId::new(Uuid::from_u128(1)).unwrap(),
            owner: Some((64055, 64055)),
        };
        let pools = pools(&state);
        pools.directories.put(name.as_str(), &record).unwrap();
        let refused = pools.use_directory(&name, &directory).await.unwrap_err();
        assert_eq!(refused.reason, Reason::PoolUnavailable);
        assert!(refused.message.contains("is its file system mounted?"), "{refused}");
        let refused = pools.use_directory(&name, &other).await.unwrap_err();
        assert!(refused.message.contains("was used with"), "{refused}");
        let others = Directory::new(directory.path().clone(), 64055, 64056, Stuck::default());
        let refused = pools.use_directory(&name, &others).await.unwrap_err();
        assert!(refused.message.contains("gid 64055"), "{refused}");
    }

    /// F20: two first volumes at once.
    #[test]
    fn f20_a_directory_that_several_use_first_at_once_has_one_id() {
        let state = tempfile::tempdir().unwrap();
        let (pools, name) = (pools(&state), "share".parse::<PoolName>().unwrap());
        let identity = crate::directory::FileIdentity::of(&std::fs::metadata(state.path()).unwrap());
        let ready = std::sync::Barrier::new(8);
        let ids: std::collections::BTreeSet<String> = std::thread::scope(|scope| {
            let uses: Vec<_> = (1..=8)
                .map(|number| {
                    let file_system_id = FileSystemId::new(Uuid::from_u128(number)).unwrap();
                    let path = "/srv/share".parse().unwrap();
                    let record =
                        DirectoryRecord { pool: name.clone(), path, identity, file_system_id, owner: None };
                    let (pools, name, ready) = (&pools, &name, &ready);
                    scope.spawn(move || {
                        ready.wait();
                        pools.record_first_use(name, record).unwrap().file_system_id.to_string()
                    })
                })
                .collect();
            uses.into_iter().map(|one| one.join().unwrap()).collect()
        });
        assert_eq!(ids.len(), 1, "{ids:?}");
    }

    #[test]
    fn an_unfinished_extension_is_of_one_lv_and_not_of_the_next_with_its_name() {
        let state = tempfile::tempdir().unwrap();
        let pools = pools(&state);
        let volume: VolumeKey = "thick/a".parse().unwrap();
        let size = |bytes: u64| bytes.try_into().unwrap();
        let record =
            ExtensionRecord { volume: volume.clone(), uuid: "one".into(), from: size(1), to: size(2) };
        pools.extensions.put(&journal_key(&volume), &record).unwrap();
        assert_eq!(pools.extension(&volume, "one"), Some(record));
        assert_eq!(pools.extension(&volume, "two"), None);
    }
}
