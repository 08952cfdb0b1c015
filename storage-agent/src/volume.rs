//! The engine of volumes: which operations there are, who may do what to which volume, what is shown. The order of steps
//! is the pool's kind's: `volume/logical` and `volume/file`. Not here: exports.

mod file;
pub(crate) mod find;
mod logical;
mod reconcile;
pub(crate) mod record;

use std::sync::Arc;

pub(crate) use file::settle;
use tether_agent_core::failure::{Failure, Reason};
use tether_agent_core::operations::Operations;
use tether_agent_core::steps::Steps;
use tether_proto::wire::{self, OperationReport};
use tether_proto::{AttachmentId, ByteSize, PoolName, VolumeFormat, VolumeKey};

use crate::claims::Claims;
use crate::identity::{Provisioning, VolumeIdentity};
use crate::nfs::Nfs;
use crate::pool::{Pool, Pools, not_found};
use record::FilePhase;

/// A volume as it is now.
#[derive(Debug, Clone)]
pub(crate) struct VolumeView {
    pub(crate) key: VolumeKey,
    pub(crate) identity: VolumeIdentity,
    pub(crate) format: VolumeFormat,
    pub(crate) provisioning: Provisioning,
    pub(crate) transport: wire::Transport,
    pub(crate) ours: bool,
    pub(crate) exported_for: Vec<AttachmentId>,
    pub(crate) multi_attach: bool,
}

/// What a new volume is to be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    pub(crate) size: ByteSize,
    pub(crate) format: VolumeFormat,
    /// Left out, the pool decides.
    pub(crate) provisioning: Option<Provisioning>,
    pub(crate) multi_attach: bool,
}

/// A pool and its room.
#[derive(Debug, Clone)]
pub(crate) struct PoolView {
    pub(crate) name: PoolName,
    pub(crate) transport: wire::Transport,
    /// What a full one means: nothing but no new volumes when it is `thick`, and guests that stop when it is `thin` or `file`.
    pub(crate) provisioning: &'static str,
    /// The room, or why the pool cannot be used now.
    pub(crate) room: Result<PoolRoom, Failure>,
}

/// The room in a pool, in bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PoolRoom {
    pub(crate) size: u64,
    pub(crate) free: u64,
    pub(crate) provisioned: u64,
    /// How much of a thin pool's metadata is taken, in percent.
    pub(crate) metadata_percent: Option<f64>,
}

/// All volumes of this agent.
pub(crate) struct Volumes {
    pools: Arc<Pools>,
    nfs: Nfs,
    claims: Claims,
    operations: Operations,
}

impl Volumes {
    /// The volumes of the config's pools.
    pub(crate) fn new(pools: Arc<Pools>, claims: Claims, operations: Operations) -> Self {
        Self { pools, nfs: Nfs::at("/"), claims, operations }
    }

    /// Makes a volume.
    pub(crate) async fn create(
        self: &Arc<Self>,
        key: VolumeKey,
        wanted: Wanted,
    ) -> Result<(VolumeView, OperationReport), Failure> {
        let (this, name) = (self.clone(), key.to_string());
        self.operations
            .run(&name, "create-volume", format!("{wanted:?}"), move |steps| async move {
                match this.pools.of(&key)? {
                    Pool::Logical(lvm) => this.create_logical(&steps, &key, lvm, wanted).await,
                    Pool::Directory(directory) => this.create_file(&steps, &key, directory, wanted).await,
                }
            })
            .await
    }

    /// Makes a volume larger.
    pub(crate) async fn extend(
        self: &Arc<Self>,
        key: VolumeKey,
        size: ByteSize,
    ) -> Result<(VolumeView, OperationReport), Failure> {
        let (this, name) = (self.clone(), key.to_string());
        self.operations
            .run(&name, "extend-volume", size.bytes().to_string(), move |steps| async move {
                let extended = this.do_extend(&steps, &key, size).await?;
                if extended.1.outcome() != wire::Outcome::Unchanged {
                    let size = extended.0.identity.size;
                    let message = format!("the volume has {size} ({} bytes) now", size.bytes());
                    let (kind, pool) = (wire::EventKind::Resized.into(), key.pool.to_string());
                    let volume = key.volume.to_string();
                    let event = wire::Event { kind, pool, volume, message, ..Default::default() };
                    this.operations.events().happened(event);
                }
                Ok(extended)
            })
            .await
    }

    /// Deletes a volume that this agent made.
    pub(crate) async fn delete(
        self: &Arc<Self>,
        key: VolumeKey,
        uuid: Option<String>,
    ) -> Result<OperationReport, Failure> {
        let (this, name) = (self.clone(), key.to_string());
        self.operations
            .run(&name, "delete-volume", uuid.clone().unwrap_or_default(), move |steps| async move {
                match this.pools.of(&key)? {
                    Pool::Logical(lvm) => this.delete_logical(&steps, &key, lvm, uuid.as_deref()).await,
                    Pool::Directory(directory) => {
                        this.delete_file(&steps, &key, directory, uuid.as_deref()).await
                    }
                }
            })
            .await
    }

    /// One volume.
    pub(crate) async fn get(&self, key: &VolumeKey) -> Result<VolumeView, Failure> {
        match self.pools.of(key)? {
            Pool::Logical(lvm) => match lvm.find(key.volume.as_str()).await? {
                Some(lv) => Ok(self.logical_view(key.clone(), lvm, lv)),
                None => Err(not_found(key)),
            },
            Pool::Directory(directory) => match self.pools.file(key) {
                Some(record) if record.phase == FilePhase::Ready => {
                    // What is recorded is no proof that it is there.
                    self.pools.look_at_directory(&key.pool, directory).await?;
                    find::measure(directory, &record).await?;
                    Ok(self.file_view(&record))
                }
                Some(record) if find::is_volume(&record) => Ok(self.file_view(&record)),
                record => Err(find::no_file(directory, key, record).await),
            },
        }
    }

    /// The volumes of one pool or of all, by pool and name. Files come from the journal, and no directory is walked
    /// through: a file that we did not make is none of our volumes.
    pub(crate) async fn list(&self, only: Option<&PoolName>) -> Result<Vec<VolumeView>, Failure> {
        if let Some(name) = only {
            self.pools.get(name)?;
        }
        let mut views = Vec::new();
        for (name, pool) in self.pools.iter().filter(|(name, _)| only.is_none_or(|only| only == *name)) {
            match pool {
                Pool::Logical(lvm) => views.extend(self.list_logical(name, lvm).await?),
                Pool::Directory(_) => views.extend(self.list_files(name)),
            }
        }
        views.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(views)
    }

    /// The pools and their room, by name. One that cannot be read does not hide the others.
    pub(crate) async fn list_pools(&self) -> Vec<PoolView> {
        let mut views = Vec::new();
        for (name, pool) in self.pools.iter() {
            let room = match pool {
                Pool::Logical(lvm) => self.logical_room(lvm).await,
                Pool::Directory(directory) => self.directory_room(name, directory).await,
            };
            if let Err(failure) = &room {
                tracing::warn!(pool = %name, error = %failure, "this pool cannot be used now");
            }
            let provisioning = match pool {
                Pool::Directory(_) => "file",
                Pool::Logical(lvm) if lvm.provisioning() == Provisioning::Thin => "thin",
                Pool::Logical(_) => "thick",
            };
            views.push(PoolView { name: name.clone(), transport: pool.transport(), provisioning, room });
        }
        views
    }

    async fn do_extend(
        &self,
        steps: &Steps,
        key: &VolumeKey,
        size: ByteSize,
    ) -> Result<(VolumeView, OperationReport), Failure> {
        let pool = self.pools.of(key)?;
        let place = pool.place(&key.volume);
        let exported_for = self.claims.begin_extension(&place).map_err(|failure| failure.at("validate"))?;
        let outcome = match pool {
            Pool::Logical(lvm) => self.extend_logical(steps, key, lvm, size).await,
            Pool::Directory(directory) => {
                self.extend_file(steps, key, directory, size, !exported_for.is_empty()).await
            }
        };
        self.claims.end_extension(&place);
        outcome
    }

    /// Writes to a journal, or forgets; on a thread that may block.
    async fn journal(
        &self,
        steps: &Steps,
        step: &'static str,
        change: impl FnOnce(&Pools) -> Result<(), tether_agent_core::journal::JournalError> + Send + 'static,
    ) -> Result<(), Failure> {
        let pools = self.pools.clone();
        steps.run_blocking(step, move || change(&pools)).await
    }
}

fn check_room(key: &VolumeKey, needed: u64, room: u64) -> Result<(), Failure> {
    if needed <= room {
        return Ok(());
    }
    Err(Failure::new(
        Reason::PoolFull,
        format!("pool {} has room for {room} bytes, and {key} needs {needed}", key.pool),
    )
    .at("validate"))
}

/// Rounds a size up to a pool's unit.
fn round_up(size: ByteSize, unit: u64) -> Result<ByteSize, Failure> {
    // A file's size is a signed number (off_t), and so is what LVM and the kernel take.
    size.round_up(unit).filter(|size| i64::try_from(size.bytes()).is_ok()).ok_or_else(|| {
        Failure::new(Reason::InvalidArgument, format!("size {size} is too large")).at("validate")
    })
}

/// A call that the kernel holds, or a tool that missed its deadline and was not killed, may come to its end later.
fn may_still_be_done(failure: &Failure) -> bool {
    failure.reason == Reason::Stuck || (failure.command.is_some() && failure.exit.is_none())
}

fn shrink_refused(key: &VolumeKey, present: u64, wanted: ByteSize) -> Failure {
    Failure::new(
        Reason::ShrinkRefused,
        format!("volume {key} has {present} bytes already, and {} were asked for", wanted.bytes()),
    )
    .at("validate")
}

fn different(key: &VolumeKey, what: &str) -> Failure {
    Failure::new(Reason::DifferentParameters, format!("volume {key} is there and {what}")).at("validate")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_rounded_up_and_never_past_what_a_file_can_have() {
        let size = |bytes: u64| ByteSize::try_from(bytes).unwrap();
        assert_eq!(round_up(size(1), 1 << 20).unwrap(), size(1 << 20));
        assert_eq!(round_up(size(1 << 20), 1 << 20).unwrap(), size(1 << 20));
        for huge in [u64::MAX, i64::MAX as u64] {
            assert_eq!(round_up(size(huge), 1 << 20).unwrap_err().reason, Reason::InvalidArgument);
        }
    }
}
