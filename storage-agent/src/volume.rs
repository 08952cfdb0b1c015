//! The engine of volumes: create with wipe, delete, list. The only place that knows the order of those steps.
//!
//! A thick volume's space may hold somebody's old data (F5). So a new thick LV gets a name that nobody can export,
//! is wiped, and only then gets its own name: that name never leads to old data, however the agent ends. A creation
//! that was cut off is taken up again by the same call.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::{FallocateFlags, fallocate};
use tether_agent_core::failure::{Failure, Reason};
use tether_agent_core::operations::Operations;
use tether_agent_core::steps::{Steps, blocking};
use tether_proto::wire::{OperationReport, Outcome};
use tether_proto::{AttachmentId, ByteSize, PoolName, VolumeKey};

use crate::claims::{Claim, Claims};
use crate::config::Config;
use crate::identity::VolumeIdentity;
use crate::lvm::{self, LogicalVolume, Lvm, Provisioning, UNWIPED_PREFIX};

/// How much is wiped by one call: so much that it costs nothing, so little that progress can be seen.
const WIPE_PIECE: u64 = 256 * 1024 * 1024;
/// How long one piece may take: a disk that writes 1 MiB in a second is on the brink.
const PIECE_DEADLINE: Duration = Duration::from_secs(256);

/// The pools of the config.
pub(crate) type Pools = Arc<BTreeMap<PoolName, Lvm>>;

/// A volume as it is now.
#[derive(Debug, Clone)]
pub(crate) struct VolumeView {
    pub(crate) key: VolumeKey,
    pub(crate) identity: VolumeIdentity,
    pub(crate) provisioning: Provisioning,
    pub(crate) ours: bool,
    pub(crate) exported_for: Option<AttachmentId>,
}

/// All volumes of this agent.
pub(crate) struct Volumes {
    pools: Pools,
    claims: Claims,
    operations: Operations,
}

/// The adapters of the config's pools.
pub(crate) fn pools(config: &Config) -> Pools {
    Arc::new(config.pool.iter().map(|(name, pool)| (name.clone(), Lvm::new(pool))).collect())
}

/// One pool by its name.
pub(crate) fn pool<'a>(pools: &'a Pools, name: &PoolName) -> Result<&'a Lvm, Failure> {
    pools.get(name).ok_or_else(|| {
        let known: Vec<&str> = pools.keys().map(PoolName::as_str).collect();
        Failure::new(Reason::PoolNotFound, format!("no pool is named {name}"))
            .at("validate")
            .next(format!("the pools of this host are: {}", known.join(", ")))
    })
}

/// The failure for a volume that is not there.
pub(crate) fn not_found(volume: &VolumeKey) -> Failure {
    Failure::new(Reason::VolumeNotFound, format!("no volume is named {volume}"))
        .next(format!("see: tether volume list --pool {}", volume.pool))
}

/// Does the device give discarded space back (Documentation/ABI/stable/sysfs-block, discard_max_bytes)?
pub(crate) fn takes_discards(device: &str) -> bool {
    std::fs::canonicalize(device)
        .ok()
        .and_then(|path| {
            Some(format!("/sys/class/block/{}/queue/discard_max_bytes", path.file_name()?.to_str()?))
        })
        .and_then(|path| std::fs::read_to_string(path).ok())
        .is_some_and(|bytes| bytes.trim() != "0")
}

impl Volumes {
    /// The volumes of the config's pools.
    pub(crate) fn new(config: &Config, claims: Claims) -> Self {
        Self { pools: pools(config), claims, operations: Operations::default() }
    }

    /// The operations under way, for those who watch.
    pub(crate) fn operations(&self) -> &Operations {
        &self.operations
    }

    /// Makes a volume.
    pub(crate) async fn create(
        self: &Arc<Self>,
        key: VolumeKey,
        size: ByteSize,
    ) -> Result<(VolumeView, OperationReport), Failure> {
        let this = self.clone();
        self.operations
            .run(&key.to_string(), "create-volume", size.bytes().to_string(), move |steps| {
                let key = key.clone();
                async move { this.do_create(&steps, &key, size).await }
            })
            .await
    }

    /// Deletes a volume that this agent made.
    pub(crate) async fn delete(self: &Arc<Self>, key: VolumeKey) -> Result<OperationReport, Failure> {
        let this = self.clone();
        self.operations
            .run(&key.to_string(), "delete-volume", String::new(), move |steps| {
                let key = key.clone();
                async move { this.do_delete(&steps, &key).await }
            })
            .await
    }

    /// One volume.
    pub(crate) async fn get(&self, key: &VolumeKey) -> Result<VolumeView, Failure> {
        let lvm = pool(&self.pools, &key.pool)?;
        lvm::check_name(&key.volume).map_err(|failure| failure.at("validate"))?;
        match lvm.find(key.volume.as_str()).await? {
            Some(lv) => Ok(self.view(key.clone(), lvm, lv)),
            None => Err(not_found(key)),
        }
    }

    /// The volumes of one pool or of all, by pool and name.
    pub(crate) async fn list(&self, only: Option<&PoolName>) -> Result<Vec<VolumeView>, Failure> {
        if let Some(name) = only {
            pool(&self.pools, name)?;
        }
        let mut views = Vec::new();
        for (name, lvm) in self.pools.iter().filter(|(name, _)| only.is_none_or(|only| only == *name)) {
            for lv in lvm.list().await? {
                // What is not wiped yet, and names that we could not say on the wire, are no volumes.
                if lv.name.starts_with(UNWIPED_PREFIX) {
                    continue;
                }
                if let Ok(volume) = lv.name.parse() {
                    views.push(self.view(VolumeKey { pool: name.clone(), volume }, lvm, lv));
                }
            }
        }
        views.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(views)
    }

    fn view(&self, key: VolumeKey, lvm: &Lvm, lv: LogicalVolume) -> VolumeView {
        VolumeView {
            exported_for: self.claims.exported_for(&lvm.place(key.volume.as_str())),
            key,
            identity: VolumeIdentity { uuid: lv.uuid, size: lv.size },
            provisioning: lvm.provisioning(),
            ours: lv.ours,
        }
    }

    async fn do_create(
        &self,
        steps: &Steps,
        key: &VolumeKey,
        size: ByteSize,
    ) -> Result<(VolumeView, OperationReport), Failure> {
        let lvm = pool(&self.pools, &key.pool)?;
        lvm::check_name(&key.volume).map_err(|failure| failure.at("validate"))?;
        let room = steps.run("check-pool", lvm.room()).await?;
        let too_large =
            || Failure::new(Reason::InvalidArgument, format!("size {size} is too large")).at("validate");
        let size = size.round_up(room.extent).ok_or_else(too_large)?;
        if let Some(lv) = lvm.find(key.volume.as_str()).await? {
            if lv.size != size || !lv.ours {
                let what = if lv.ours {
                    format!("has {} bytes and not {}", lv.size.bytes(), size.bytes())
                } else {
                    "was made by somebody else".to_owned()
                };
                return Err(Failure::new(
                    Reason::DifferentParameters,
                    format!("volume {key} is there and {what}"),
                )
                .at("validate"));
            }
            return Ok((self.view(key.clone(), lvm, lv), steps.report(Outcome::Unchanged)));
        }
        if !lvm.name_is_free(key.volume.as_str()).await? {
            return Err(Failure::new(
                Reason::DifferentParameters,
                format!(
                    "the volume group of pool {} has a logical volume {} outside of the pool",
                    key.pool, key.volume
                ),
            )
            .at("validate"));
        }
        let place = lvm.place(key.volume.as_str());
        self.claims.claim(&place, Claim::Creation).map_err(|failure| failure.at("validate"))?;
        let made = match lvm.provisioning() {
            Provisioning::Thin => self.create_thin(steps, lvm, key, size, room.largest).await,
            Provisioning::Thick => self.create_thick(steps, lvm, key, size, room.largest).await,
        };
        let verified = match made {
            Ok(outcome) => match steps.run("verify-volume", self.get(key)).await {
                Ok(view) => Ok((outcome, view)),
                Err(failure) => Err(self.undo_create(steps, lvm, key.volume.as_str(), failure).await),
            },
            Err(failure) => Err(failure),
        };
        self.claims.release(&place, Claim::Creation);
        let (outcome, view) = verified?;
        tracing::info!(volume = %key, bytes = view.identity.size.bytes(), "volume created");
        Ok((view, steps.report(outcome)))
    }

    async fn create_thin(
        &self,
        steps: &Steps,
        lvm: &Lvm,
        key: &VolumeKey,
        size: ByteSize,
        largest: u64,
    ) -> Result<Outcome, Failure> {
        check_room(key, size, largest)?;
        match steps.run("create-volume", lvm.create(key.volume.as_str(), size)).await {
            Ok(()) => Ok(Outcome::Created),
            Err(failure) => Err(self.undo_create(steps, lvm, key.volume.as_str(), failure).await),
        }
    }

    async fn create_thick(
        &self,
        steps: &Steps,
        lvm: &Lvm,
        key: &VolumeKey,
        size: ByteSize,
        largest: u64,
    ) -> Result<Outcome, Failure> {
        let unwiped = format!("{UNWIPED_PREFIX}{}", key.volume);
        let mut outcome = Outcome::Created;
        match lvm.find(&unwiped).await? {
            // An earlier call was cut off: the space is taken already.
            Some(lv) if lv.size == size && lv.ours => outcome = Outcome::Repaired,
            found => {
                if let Some(lv) = &found {
                    self.remove_leftover(steps, lvm, lv).await?;
                }
                let room = if found.is_some() { lvm.room().await?.largest } else { largest };
                check_room(key, size, room)?;
            }
        }
        let made = async {
            if outcome == Outcome::Repaired {
                steps.run("activate-volume", lvm.activate(&unwiped)).await?;
            } else {
                steps.run("create-volume", lvm.create(&unwiped, size)).await?;
            }
            steps.run("wipe-volume", wipe(lvm.device(&unwiped), size, steps)).await?;
            steps.run("name-volume", lvm.rename(&unwiped, key.volume.as_str())).await
        }
        .await;
        match made {
            Ok(()) => Ok(outcome),
            // The last step may have done its work before it failed: then the volume has its own name.
            Err(failure) if failure.step == Some("name-volume") => {
                let failure = self.undo_create(steps, lvm, key.volume.as_str(), failure).await;
                Err(self.undo_create(steps, lvm, &unwiped, failure).await)
            }
            Err(failure) => Err(self.undo_create(steps, lvm, &unwiped, failure).await),
        }
    }

    /// Takes back a creation: the LV goes, if it came.
    async fn undo_create(&self, steps: &Steps, lvm: &Lvm, name: &str, mut failure: Failure) -> Failure {
        let undo = async {
            match lvm.find(name).await? {
                Some(lv) if lv.ours => steps.run("undo-create-volume", lvm.remove(name)).await,
                _ => Ok(()),
            }
        };
        if let Err(error) = undo.await {
            failure.undo.push(format!("removing {}: {error}", lvm.place(name)));
        }
        failure
    }

    async fn remove_leftover(&self, steps: &Steps, lvm: &Lvm, lv: &LogicalVolume) -> Result<(), Failure> {
        if !lv.ours {
            return Err(Failure::new(
                Reason::NotOurs,
                format!("{} was not made by Tether", lvm.place(&lv.name)),
            )
            .next("rename it or remove it with the tool that made it"));
        }
        steps.run("remove-leftover", lvm.remove(&lv.name)).await
    }

    async fn do_delete(&self, steps: &Steps, key: &VolumeKey) -> Result<OperationReport, Failure> {
        let lvm = pool(&self.pools, &key.pool)?;
        lvm::check_name(&key.volume).map_err(|failure| failure.at("validate"))?;
        let place = lvm.place(key.volume.as_str());
        self.claims.claim(&place, Claim::Deletion).map_err(|failure| failure.at("validate"))?;
        let outcome = async {
            let Some(lv) = steps.run("find-volume", lvm.find(key.volume.as_str())).await? else {
                // A creation that was cut off left its space behind under the other name.
                let Some(leftover) = lvm.find(&format!("{UNWIPED_PREFIX}{}", key.volume)).await? else {
                    return Ok(Outcome::Unchanged);
                };
                self.remove_leftover(steps, lvm, &leftover).await?;
                return Ok(Outcome::Removed);
            };
            if !lv.ours {
                return Err(Failure::new(
                    Reason::NotOurs,
                    format!("volume {key} was not made by Tether: it has no tag {:?}", lvm::TAG),
                )
                .next("remove it with lvremove if you are sure"));
            }
            if lv.open {
                return Err(Failure::new(
                    Reason::VolumeInUse,
                    format!("volume {key} is open on the storage host"),
                ));
            }
            steps.run("remove-volume", lvm.remove(key.volume.as_str())).await?;
            if lvm.find(key.volume.as_str()).await?.is_some() {
                return Err(Failure::new(
                    Reason::StillThere,
                    format!("volume {key} is still there after lvremove"),
                ));
            }
            tracing::info!(volume = %key, "volume deleted");
            Ok(Outcome::Removed)
        }
        .await;
        self.claims.release(&place, Claim::Deletion);
        Ok(steps.report(outcome?))
    }
}

fn check_room(key: &VolumeKey, size: ByteSize, largest: u64) -> Result<(), Failure> {
    if size.bytes() <= largest {
        return Ok(());
    }
    Err(Failure::new(
        Reason::PoolFull,
        format!("pool {} has room for {largest} bytes, and {key} needs {}", key.pool, size.bytes()),
    )
    .at("validate"))
}

/// Zeroes a device from end to end, by the device's own means where it has them (fallocate(2), FALLOC_FL_ZERO_RANGE).
async fn wipe(device: PathBuf, size: ByteSize, steps: &Steps) -> Result<(), Failure> {
    fn fail(device: &Path, problem: &dyn std::fmt::Display) -> Failure {
        Failure::new(Reason::WipeFailed, format!("wiping {} failed: {problem}", device.display()))
    }
    let file = OpenOptions::new().write(true).open(&device).map_err(|error| fail(&device, &error))?;
    let file = Arc::new(file);
    let mut done = 0;
    while done < size.bytes() {
        let length = WIPE_PIECE.min(size.bytes() - done);
        let (Ok(offset), Ok(piece)) = (i64::try_from(done), i64::try_from(length)) else {
            return Err(fail(&device, &"the size is more than a file can have"));
        };
        let (file, path) = (file.clone(), device.clone());
        let zero = FallocateFlags::FALLOC_FL_ZERO_RANGE;
        blocking(PIECE_DEADLINE, move || {
            fallocate(&*file, zero, offset, piece).map_err(|error| fail(&path, &error))
        })
        .await?;
        done += length;
        if let Ok(done) = ByteSize::try_from(done) {
            steps.progress("wipe-volume", format!("{done} of {size}"));
        }
    }
    blocking(PIECE_DEADLINE, move || file.sync_all().map_err(|error| fail(&device, &error))).await
}
