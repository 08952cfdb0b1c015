//! LVM: reports as JSON, create, delete, activate, and what sysfs says of an active LV without starting a process.
//!
//! Every tool is told to see this pool's physical volumes and nothing else (`--devices`, F10). Not here: wiping and
//! the order of steps (`volume`), and what a report's text means (`report`).

pub(crate) mod report;

use std::path::{Path, PathBuf};
use std::time::Duration;

use tether_agent_core::command::{CommandError, CommandLine};
use tether_agent_core::failure::{Failure, Reason};
use tether_proto::{ByteSize, VolumeName};

pub(crate) use report::LogicalVolume;
pub(crate) use report::ThinPoolUsage;
use report::{parse_extents, parse_logical_volumes, parse_thin_pool, parse_volume_group};

use crate::identity::{Provisioning, VolumeIdentity};

/// The tag on every LV that we make; only those are deleted.
pub(crate) const TAG: &str = "tether";
/// What a thick LV's name begins with until it is wiped (F5).
pub(crate) const UNWIPED_PREFIX: &str = "tether-unwiped-";
/// What the name of an LV begins with whose extents are wiped for another one, which they will make larger (F5).
pub(crate) const EXTENTS_PREFIX: &str = "tether-extents-";
/// LVM tools wait for each other; this is for all of it.
const DEADLINE: Duration = Duration::from_secs(60);

/// Why LVM did not do it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LvmError {
    /// A tool failed.
    #[error("LVM")]
    Command(#[from] CommandError),
    /// A report that we do not understand.
    #[error("a report of LVM is not as documented: {0}")]
    Report(String),
    /// The kernel's view of an LV cannot be read.
    #[error("reading {} failed", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// What is under the LV's name is something else.
    #[error("{} is not the logical volume {expected}", path.display())]
    Mismatch { path: PathBuf, expected: String },
}

impl From<LvmError> for Failure {
    fn from(error: LvmError) -> Self {
        match error {
            LvmError::Command(error) => Failure::from_program(Reason::LvmFailed, &error),
            other => Failure::from_error(Reason::LvmFailed, &other)
                .next("see on the storage host what has the LV's name: ls -l /dev/VG; dmsetup info"),
        }
    }
}

/// The room in a pool, in bytes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Room {
    /// The unit of allocation.
    pub(crate) extent: u64,
    /// The largest volume that can be made now.
    pub(crate) largest: u64,
    /// All of it.
    pub(crate) size: u64,
    /// What is not taken yet.
    pub(crate) free: u64,
    /// How much of a thin pool's metadata is taken, in percent.
    pub(crate) metadata_percent: Option<f64>,
}

/// One pool: a volume group, or a thin pool in it.
#[derive(Debug, Clone)]
pub(crate) struct Lvm {
    volume_group: String,
    thin_pool: Option<String>,
    devices: Vec<PathBuf>,
    device_directory: PathBuf,
    block_directory: PathBuf,
}

impl Lvm {
    /// The adapter for one pool of the config.
    pub(crate) fn new(volume_group: &str, thin_pool: Option<&str>, devices: &[PathBuf]) -> Self {
        Self {
            volume_group: volume_group.to_owned(),
            thin_pool: thin_pool.map(str::to_owned),
            devices: devices.to_owned(),
            device_directory: "/dev".into(),
            block_directory: "/sys/class/block".into(),
        }
    }

    /// How this pool's volumes have their space.
    pub(crate) fn provisioning(&self) -> Provisioning {
        if self.thin_pool.is_some() { Provisioning::Thin } else { Provisioning::Thick }
    }

    /// The LV's place on this host, `VG/LV`: pools of one group share it.
    pub(crate) fn place(&self, name: &str) -> String {
        format!("{}/{name}", self.volume_group)
    }

    /// The device node of an LV of this pool.
    pub(crate) fn device(&self, name: &str) -> PathBuf {
        self.device_directory.join(&self.volume_group).join(name)
    }

    /// All LVs of this pool, also those that somebody else made. Not the thin pool itself, nor LVM's own parts.
    pub(crate) async fn list(&self) -> Result<Vec<LogicalVolume>, LvmError> {
        Ok(self.report().await?.into_iter().filter(|lv| !lv.is_pool && lv.pool == self.thin_pool).collect())
    }

    /// One LV of this pool.
    pub(crate) async fn find(&self, name: &str) -> Result<Option<LogicalVolume>, LvmError> {
        Ok(self.list().await?.into_iter().find(|lv| lv.name == name))
    }

    /// Is the name free in the whole volume group, other pools' volumes included?
    pub(crate) async fn name_is_free(&self, name: &str) -> Result<bool, LvmError> {
        Ok(!self.report().await?.iter().any(|lv| lv.name == name))
    }

    /// What room there is. A thin pool must zero what it hands out, or a new volume shows old data (F5).
    pub(crate) async fn room(&self) -> Result<Room, Failure> {
        let output = self
            .tool("vgs")
            .args(["--reportformat", "json", "--units", "b", "--nosuffix"])
            .args(["-o", "vg_extent_size,vg_size,vg_free"])
            .arg(&self.volume_group)
            .run()
            .await
            .map_err(LvmError::from)?;
        let group = parse_volume_group(&output.stdout).map_err(LvmError::Report)?;
        let Some(thin_pool) = &self.thin_pool else {
            return Ok(Room {
                extent: group.extent,
                largest: group.free,
                size: group.size,
                free: group.free,
                metadata_percent: None,
            });
        };
        let lvs = self.report().await?;
        let Some(pool) = lvs.iter().find(|lv| lv.is_pool && lv.name == *thin_pool) else {
            return Err(Failure::new(
                Reason::PoolNotFound,
                format!("volume group {} has no thin pool {thin_pool}", self.volume_group),
            )
            .next(format!("create it, or correct the config: lvs {}", self.volume_group)));
        };
        if !pool.zeroing {
            let place = format!("{}/{thin_pool}", self.volume_group);
            return Err(Failure::new(
                Reason::ThinPoolNotZeroing,
                format!("thin pool {place} does not zero new blocks: a new volume would show old data"),
            )
            .next(format!("lvchange --zero y {place}")));
        }
        let size = pool.size.bytes();
        Ok(Room {
            extent: group.extent,
            largest: size,
            size,
            free: size.saturating_sub(pool.taken),
            metadata_percent: pool.metadata_percent,
        })
    }

    /// How full the thin pool is; nothing when this pool has none.
    pub(crate) async fn thin_pool_usage(&self) -> Result<Option<ThinPoolUsage>, LvmError> {
        let Some(thin_pool) = &self.thin_pool else { return Ok(None) };
        let output = self
            .tool("lvs")
            .args(["--reportformat", "json", "--units", "b", "--nosuffix", "-o"])
            .arg("lv_size,lv_metadata_size,data_percent,metadata_percent,seg_monitor,vg_free,vg_extent_size")
            .arg(self.place(thin_pool))
            .run()
            .await?;
        parse_thin_pool(&output.stdout).map(Some).map_err(LvmError::Report)
    }

    /// Makes an LV with our tag. `size` is a multiple of the extent. Its content is whatever was there before when
    /// the pool is thick.
    pub(crate) async fn create(&self, name: &str, size: ByteSize) -> Result<(), LvmError> {
        let tool = self.tool("lvcreate").args(["--yes", "--quiet", "--wipesignatures", "n", "--addtag", TAG]);
        let bytes = format!("{}b", size.bytes());
        let tool = match &self.thin_pool {
            None => tool.args(["--zero", "n", "--size", &bytes, "--name", name]).arg(&self.volume_group),
            Some(pool) => tool
                .args(["--virtualsize", &bytes, "--name", name, "--thinpool", pool])
                .arg(&self.volume_group),
        };
        tool.never_kill().run().await?;
        Ok(())
    }

    /// Gives an LV another name.
    pub(crate) async fn rename(&self, from: &str, to: &str) -> Result<(), LvmError> {
        self.tool("lvrename").arg(&self.volume_group).args([from, to]).never_kill().run().await?;
        Ok(())
    }

    /// Makes a thick LV larger by the extents of another LV, which is removed: the new part holds what that one held. `size` is
    /// what both have together. When somebody takes an extent in between, it fails, and the LV has its old size.
    pub(crate) async fn extend_by(&self, name: &str, size: ByteSize, other: &str) -> Result<(), LvmError> {
        let output = self
            .tool("lvs")
            .args(["--reportformat", "json", "--segments", "-o", "seg_pe_ranges"])
            .arg(self.place(other))
            .run()
            .await?;
        let extents = parse_extents(&output.stdout).map_err(LvmError::Report)?;
        self.remove(other).await?;
        let tool = self.tool("lvextend").args(["--yes", "--quiet", "--size", &format!("{}b", size.bytes())]);
        tool.arg(self.place(name)).args(extents).never_kill().run().await?;
        Ok(())
    }

    /// Makes a thin LV larger. `size` is a multiple of the extent.
    pub(crate) async fn extend(&self, name: &str, size: ByteSize) -> Result<(), LvmError> {
        let tool = self.tool("lvextend").args(["--yes", "--quiet", "--size", &format!("{}b", size.bytes())]);
        tool.arg(self.place(name)).never_kill().run().await?;
        Ok(())
    }

    /// Removes an LV, whoever made it: the caller has looked.
    pub(crate) async fn remove(&self, name: &str) -> Result<(), LvmError> {
        self.tool("lvremove").args(["--yes", "--quiet"]).arg(self.place(name)).never_kill().run().await?;
        Ok(())
    }

    /// Makes the kernel's device of an LV.
    pub(crate) async fn activate(&self, name: &str) -> Result<(), LvmError> {
        self.tool("lvchange").args(["--activate", "y"]).arg(self.place(name)).never_kill().run().await?;
        Ok(())
    }

    /// What the kernel says of an active LV; `None` when this pool has no such device. Reads a few small files, starts
    /// nothing: this is on the path of every export.
    pub(crate) fn identity(&self, volume: &VolumeName) -> Result<Option<VolumeIdentity>, LvmError> {
        let link = self.device(volume.as_str());
        let target = match std::fs::read_link(&link) {
            Ok(target) => target,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(LvmError::Read { path: link, source }),
        };
        let name = format!("{}-{}", escape(&self.volume_group), escape(volume.as_str()));
        let mismatch = || LvmError::Mismatch { path: link.clone(), expected: name.clone() };
        let kernel_name = target.file_name().ok_or_else(mismatch)?;
        let folder = self.block_directory.join(kernel_name);
        if read(&folder.join("dm/name"))? != name {
            return Err(mismatch());
        }
        let uuid = lvm_uuid(&read(&folder.join("dm/uuid"))?).ok_or_else(mismatch)?;
        if self.lives_in(&folder) != self.thin_pool {
            return Ok(None);
        }
        let sectors: u64 = read(&folder.join("size"))?.parse().map_err(|_| mismatch())?;
        // The kernel counts sectors of 512 bytes whatever the device's own are (Documentation/ABI/stable/sysfs-block).
        let size = ByteSize::try_from(sectors * 512).map_err(|_| mismatch())?;
        Ok(Some(VolumeIdentity { uuid, size }))
    }

    /// The thin pool of a mapped device: LVM's thin volumes are on a device `VG-POOL-tpool`, others are not.
    fn lives_in(&self, folder: &Path) -> Option<String> {
        let group = format!("{}-", escape(&self.volume_group));
        let slaves = std::fs::read_dir(folder.join("slaves")).ok()?;
        slaves.flatten().find_map(|slave| {
            let uuid = read(&slave.path().join("dm/uuid")).ok()?;
            let name = read(&slave.path().join("dm/name")).ok()?;
            let name =
                name.strip_prefix(&group)?.strip_suffix("-tpool").filter(|_| uuid.ends_with("-tpool"))?;
            Some(name.replace("--", "-"))
        })
    }

    async fn report(&self) -> Result<Vec<LogicalVolume>, LvmError> {
        let output = self
            .tool("lvs")
            .args(["--reportformat", "json", "--units", "b", "--nosuffix"])
            .args(["-o", "lv_name,lv_uuid,lv_size,lv_tags,lv_attr,pool_lv,data_percent,metadata_percent"])
            .arg(&self.volume_group)
            .run()
            .await?;
        parse_logical_volumes(&output.stdout).map_err(LvmError::Report)
    }

    fn tool(&self, name: &str) -> CommandLine {
        let mut tool = CommandLine::new(Path::new("/sbin").join(name)).deadline(DEADLINE);
        for device in &self.devices {
            tool = tool.arg("--devices").arg(device);
        }
        tool
    }
}

/// device-mapper's spelling of a name in `VG-LV`: each hyphen twice.
fn escape(name: &str) -> String {
    name.replace('-', "--")
}

/// From `LVM-` with the VG's and the LV's 32 characters to the LV's UUID as LVM prints it.
fn lvm_uuid(dm_uuid: &str) -> Option<String> {
    let both = dm_uuid.strip_prefix("LVM-").filter(|both| both.len() == 64 && both.is_ascii())?;
    let mut rest = &both[32..];
    let mut groups = Vec::new();
    for length in [6, 4, 4, 4, 4, 4, 6] {
        let (group, more) = rest.split_at(length);
        groups.push(group);
        rest = more;
    }
    Some(groups.join("-"))
}

fn read(path: &Path) -> Result<String, LvmError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(text.trim_end().to_owned()),
        Err(source) => Err(LvmError::Read { path: path.to_owned(), source }),
    }
}

/// Names that lvm(8) keeps for itself, and those that we do.
pub(crate) fn check_name(volume: &VolumeName) -> Result<(), Failure> {
    const PREFIXES: [&str; 4] = ["snapshot", "pvmove", UNWIPED_PREFIX, EXTENTS_PREFIX];
    const PARTS: [&str; 14] = [
        "_cdata", "_cmeta", "_corig", "_cvol", "_mimage", "_mlog", "_rimage", "_rmeta", "_tdata", "_tmeta",
        "_vdata", "_vorigin", "_pmspare", "_imeta",
    ];
    let name = volume.as_str();
    let reserved = PREFIXES.iter().find(|prefix| name.starts_with(**prefix));
    match reserved.or_else(|| PARTS.iter().find(|part| name.contains(**part))) {
        None => Ok(()),
        Some(word) => Err(Failure::new(
            Reason::InvalidArgument,
            format!("volume: {word:?} is reserved by LVM or Tether in {name:?}"),
        )
        .next("use another name")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(name: &str, uuid: &str) -> (tempfile::TempDir, Lvm) {
        let root = tempfile::tempdir().unwrap();
        let (dev, block) = (root.path().join("dev"), root.path().join("block"));
        std::fs::create_dir_all(dev.join("vg-0")).unwrap();
        std::fs::create_dir_all(block.join("dm-3/dm")).unwrap();
        std::os::unix::fs::symlink("../dm-3", dev.join("vg-0/a-b")).unwrap();
        std::fs::create_dir_all(block.join("dm-3/slaves/sdb")).unwrap();
        for (file, text) in [("dm/name", name), ("dm/uuid", uuid), ("size", "8192")] {
            std::fs::write(block.join("dm-3").join(file), format!("{text}\n")).unwrap();
        }
        let lvm = Lvm::new("vg-0", None, &["/dev/sdb".into()]);
        let lvm = Lvm { device_directory: dev, block_directory: block, ..lvm };
        (root, lvm)
    }

    const UUID: &str = "LVM-abcdefghijklmnopqrstuvwxyzABCDEFYx7c2buVtqQdVNL5lb9zWMePfO4fmkQp";

    #[test]
    fn an_active_volume_is_known_without_a_process() {
        let (_root, lvm) = tree("vg--0-a--b", UUID);
        let identity = lvm.identity(&"a-b".parse().unwrap()).unwrap().unwrap();
        assert_eq!(identity.uuid, "Yx7c2b-uVtq-QdVN-L5lb-9zWM-ePfO-4fmkQp");
        assert_eq!(identity.size.bytes(), 8192 * 512);
        assert_eq!(lvm.identity(&"other".parse().unwrap()).unwrap(), None);
    }

    #[test]
    fn a_volume_of_another_pool_of_the_group_is_not_this_pools() {
        let (root, lvm) = tree("vg--0-a--b", UUID);
        let slave = root.path().join("block/dm-3/slaves/dm-2/dm");
        std::fs::create_dir_all(&slave).unwrap();
        std::fs::write(slave.join("name"), "vg--0-thin--pool-tpool\n").unwrap();
        std::fs::write(slave.join("uuid"), format!("{UUID}-tpool\n")).unwrap();
        let name = "a-b".parse().unwrap();
        assert_eq!(lvm.identity(&name).unwrap(), None);
        let thin = Lvm { thin_pool: Some("thin-pool".into()), ..lvm.clone() };
        assert!(thin.identity(&name).unwrap().is_some());
        let other = Lvm { thin_pool: Some("other".into()), ..lvm };
        assert_eq!(other.identity(&name).unwrap(), None);
    }

    #[test]
    fn f3_a_link_to_another_device_is_refused() {
        let (_root, lvm) = tree("vg--0-other", UUID);
        assert!(matches!(lvm.identity(&"a-b".parse().unwrap()), Err(LvmError::Mismatch { .. })));
        let (_root, lvm) = tree("vg--0-a--b", "CRYPT-LUKS2-0123");
        assert!(matches!(lvm.identity(&"a-b".parse().unwrap()), Err(LvmError::Mismatch { .. })));
    }

    #[test]
    fn reserved_names_are_refused() {
        for bad in ["snapshot1", "pvmove0", "a_tdata", "x_rimage_0", "tether-unwiped-a"] {
            assert!(check_name(&bad.parse().unwrap()).is_err(), "{bad}");
        }
        check_name(&"data".parse().unwrap()).unwrap();
    }
}
