//! LIO through configfs: one target for each export, and one backstore, which only exports that share a volume share.
//!
//! Every `ensure_…` makes what is not there, writes what differs, reads back, and says whether it changed anything;
//! so the same code makes an export and repairs one (F12). The layout is the kernel's, seen in `drivers/target` and
//! measured in the lab. Not here: the order of steps (`export`).

use std::path::{Path, PathBuf};
use std::time::Duration;

use tether_agent_core::command::CommandLine;
use tether_agent_core::failure::{Failure, Reason};
use tether_agent_core::steps::{KERNEL_DEADLINE, blocking};
use tether_proto::{AccessMode, AttachmentId, Iqn, MutualChap, Portal, Secret};

use super::configfs::{self, ConfigfsError};
use crate::claims::Sharing;

/// Where configfs shows the kernel's target.
pub(crate) const ROOT: &str = "/sys/kernel/config/target";
/// The one HBA folder that holds our backstores. Other tools count from 0, so they do not meet us there (F35).
pub(crate) const HBA: &str = "core/iblock_7440";
/// The tag of the one target portal group.
pub(crate) const PORTAL_GROUP_TAG: u16 = 1;
/// What every portal group has: CHAP is enforced, and no initiator is let in without an ACL (F43).
const GROUP: [(&str, &str); 4] = [
    ("attrib/authentication", "1"),
    ("attrib/generate_node_acls", "0"),
    ("attrib/demo_mode_write_protect", "1"),
    ("param/AuthMethod", "CHAP"),
];
/// What the kernel needs for it.
pub(crate) const MODULES: [&str; 3] = ["target_core_mod", "target_core_iblock", "iscsi_target_mod"];
/// The kernel's EBUSY: somebody else has the device open.
const EBUSY: i32 = 16;
/// The kernel's EINTR and EINVAL.
const EINTR: i32 = 4;
const EINVAL: i32 = 22;
/// How often a portal is tried again that a signal interrupted.
const INTERRUPTED_TRIES: usize = 8;
/// The kernel's EADDRINUSE: something else listens there.
const EADDRINUSE: i32 = 98;

/// The kernel's target.
#[derive(Debug, Clone)]
pub(crate) struct Lio {
    root: PathBuf,
}

/// What one target is to be.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    /// The backstore's name, see [`backstore_name`].
    pub(crate) backstore: String,
    /// The target's name.
    pub(crate) iqn: Iqn,
    /// The device to export.
    pub(crate) device: String,
    /// Its unit serial.
    pub(crate) unit_serial: String,
    /// The only initiator that may log in.
    pub(crate) initiator: Iqn,
    /// The CHAP user.
    pub(crate) chap_username: String,
    /// The CHAP secret.
    pub(crate) chap_secret: Secret,
    /// What it proves itself by in turn.
    pub(crate) mutual_chap: Option<MutualChap>,
    /// Where to listen.
    pub(crate) portals: Vec<Portal>,
    /// May it write?
    pub(crate) access_mode: AccessMode,
    /// The device takes discards.
    pub(crate) discard: bool,
}

impl Target {
    fn write_protect(&self) -> &'static str {
        if self.access_mode == AccessMode::ReadOnly { "1" } else { "0" }
    }
}

/// The backstore of an export: its own, named after the attachment. Exports that share a volume have one backstore, named
/// after the volume: the kernel opens a device for one backstore alone, and reservations hold for all who share it.
pub(crate) fn backstore_name(id: AttachmentId, sharing: Sharing, unit_serial: &str) -> String {
    match sharing {
        Sharing::Exclusive => format!("tether-{id}"),
        Sharing::ReadOnly | Sharing::MultiAttach => format!("tether-{unit_serial}"),
    }
}

impl From<ConfigfsError> for Failure {
    fn from(error: ConfigfsError) -> Self {
        let reason = match &error {
            ConfigfsError::StillThere { .. } => Reason::StillThere,
            _ => Reason::TargetFailed,
        };
        Failure::from_error(reason, &error)
    }
}

impl Lio {
    /// The kernel's target at a root; in tests a folder.
    pub(crate) fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The one place that makes ready what the kernel needs: modules, and the fabric and HBA folders.
    ///
    /// # Errors
    /// `KERNEL_LACKS_TARGET` with what to load.
    pub(crate) async fn make_ready(&self) -> Result<&Self, Failure> {
        let hba = self.hba();
        if blocking(KERNEL_DEADLINE, move || Ok::<_, Failure>(hba.is_dir())).await? {
            return Ok(self);
        }
        // The others are loaded by the kernel itself when their folders are made. The unit may load none.
        if !self.root.is_dir() {
            let loaded = CommandLine::new("/sbin/modprobe")
                .args(["--all", "--quiet"])
                .args(MODULES)
                .deadline(Duration::from_secs(30))
                .run()
                .await;
            if let Err(error) = loaded {
                return Err(Failure::from_command(Reason::KernelLacksTarget, &error));
            }
        }
        if !self.root.is_dir() {
            return Err(Failure::new(
                Reason::KernelLacksTarget,
                format!("{} is not there", self.root.display()),
            )
            .next("mount configfs: mount -t configfs none /sys/kernel/config"));
        }
        let (fabric, hba) = (self.root.join("iscsi"), self.hba());
        blocking(KERNEL_DEADLINE, move || {
            configfs::make(&fabric)
                .and_then(|_| configfs::make(&hba))
                .map_err(|error| Failure::from_error(Reason::KernelLacksTarget, &error))
        })
        .await?;
        Ok(self)
    }

    /// Is there a target of this name, whoever made it?
    pub(crate) async fn exists(&self, iqn: Iqn) -> Result<bool, Failure> {
        let path = self.target(&iqn);
        blocking(KERNEL_DEADLINE, move || configfs::is_there(&path)).await
    }

    /// Backstore: the device with its unit serial, enabled. The kernel opens it for itself alone, so a device that
    /// the host has mounted is refused.
    pub(crate) fn ensure_backstore(&self, target: &Target) -> Result<bool, Failure> {
        let path = self.backstore(&target.backstore);
        let mut changed = configfs::make(&path)?;
        if configfs::read(&path.join("enable"))? == "0" {
            configfs::write(&path.join("control"), &format!("udev_path={}", target.device))?;
            configfs::write(&path.join("udev_path"), &target.device)?;
            configfs::write(&path.join("wwn/vpd_unit_serial"), &target.unit_serial)?;
            configfs::write(&path.join("enable"), "1").map_err(|error| match error.errno() {
                Some(EBUSY) => Failure::new(
                    Reason::VolumeInUse,
                    format!("{} is in use on the storage host", target.device),
                ),
                _ => error.into(),
            })?;
            changed = true;
        }
        // Set once and never again: a backstore that says otherwise is not this export's.
        let serial = configfs::read(&path.join("wwn/vpd_unit_serial"))?;
        expect_suffix(&path.join("wwn/vpd_unit_serial"), serial, &target.unit_serial)?;
        let device = configfs::read(&path.join("udev_path"))?;
        expect_suffix(&path.join("udev_path"), device, &target.device)?;
        if target.discard {
            changed |= configfs::ensure(&path.join("attrib/emulate_tpu"), "1")?;
        }
        Ok(changed)
    }

    /// Target and portal group: CHAP enforced, no initiator without an ACL (F43), still disabled when new.
    pub(crate) fn ensure_target(&self, target: &Target) -> Result<bool, ConfigfsError> {
        let mut changed = configfs::make(&self.target(&target.iqn))?;
        let group = self.group(&target.iqn);
        changed |= configfs::make(&group)?;
        for (attribute, value) in GROUP {
            changed |= configfs::ensure(&group.join(attribute), value)?;
        }
        Ok(changed)
    }

    /// LUN 0 leads to the backstore.
    pub(crate) fn ensure_lun(&self, target: &Target) -> Result<bool, ConfigfsError> {
        let lun = self.lun(&target.iqn);
        let made = configfs::make(&lun)?;
        Ok(configfs::link(&self.backstore(&target.backstore), &lun.join("backstore"))? || made)
    }

    /// The connector's initiator, its secret, and LUN 0 for it.
    pub(crate) fn ensure_acl(&self, target: &Target) -> Result<bool, ConfigfsError> {
        let acl = self.acl(&target.iqn, &target.initiator);
        let mut changed = configfs::make(&acl)?;
        changed |= configfs::ensure(&acl.join("auth/userid"), &target.chap_username)?;
        changed |= configfs::ensure_secret(&acl.join("auth/password"), target.chap_secret.expose())?;
        // For an initiator that asks for the proof; the kernel lets in one that does not ask.
        if let Some(mutual) = &target.mutual_chap {
            changed |= configfs::ensure(&acl.join("auth/userid_mutual"), &mutual.username)?;
            changed |= configfs::ensure_secret(&acl.join("auth/password_mutual"), mutual.secret.expose())?;
        }
        let mapped = acl.join("lun_0");
        changed |= configfs::make(&mapped)?;
        changed |= configfs::link(&self.lun(&target.iqn), &mapped.join("lun"))?;
        changed |= configfs::ensure(&mapped.join("write_protect"), target.write_protect())?;
        Ok(changed)
    }

    /// The portals, all of them.
    pub(crate) fn ensure_portals(&self, target: &Target) -> Result<bool, Failure> {
        let mut changed = false;
        for portal in &target.portals {
            let path = self.group(&target.iqn).join("np").join(portal.to_string());
            // A signal that comes while the kernel waits for the group's lock is EINVAL here (`iscsit_get_tpg`), and
            // says nothing of the portal.
            let made = (0..INTERRUPTED_TRIES)
                .find_map(|_| match configfs::make(&path) {
                    Err(error) if matches!(error.errno(), Some(EINVAL | EINTR)) => None,
                    outcome => Some(outcome),
                })
                .unwrap_or_else(|| configfs::make(&path));
            changed |= made.map_err(|error| match error.errno() {
                Some(EADDRINUSE) => Failure::from_error(Reason::PortalUnavailable, &error),
                _ => error.into(),
            })?;
        }
        Ok(changed)
    }

    /// Lets initiators in; the last step of an export.
    pub(crate) fn ensure_enabled(&self, iqn: &Iqn) -> Result<bool, ConfigfsError> {
        configfs::ensure(&self.group(iqn).join("enable"), "1")
    }

    /// The first part of a target that is not there, or lets in others than the `ensure_…` make it let in; none when it is whole.
    /// Reads only.
    pub(crate) fn lacking(&self, target: &Target) -> Result<Option<PathBuf>, ConfigfsError> {
        let (group, lun) = (self.group(&target.iqn), self.lun(&target.iqn));
        let acl = self.acl(&target.iqn, &target.initiator);
        let mut values = vec![(self.backstore(&target.backstore).join("enable"), "1")];
        if target.discard {
            values.push((self.backstore(&target.backstore).join("attrib/emulate_tpu"), "1"));
        }
        values.extend(GROUP.map(|(attribute, value)| (group.join(attribute), value)));
        values.extend([
            (acl.join("auth/userid"), target.chap_username.as_str()),
            (acl.join("auth/password"), target.chap_secret.expose()),
            (acl.join("lun_0/write_protect"), target.write_protect()),
            (group.join("enable"), "1"),
        ]);
        if let Some(mutual) = &target.mutual_chap {
            values.push((acl.join("auth/userid_mutual"), &mutual.username));
            values.push((acl.join("auth/password_mutual"), mutual.secret.expose()));
        }
        for (path, value) in values {
            if configfs::read_if_there(&path)?.as_deref() != Some(value) {
                return Ok(Some(path));
            }
        }
        let portals = target.portals.iter().map(|portal| group.join("np").join(portal.to_string()));
        for path in [lun.join("backstore"), acl.join("lun_0/lun")].into_iter().chain(portals) {
            if !configfs::is_there(&path)? {
                return Ok(Some(path));
            }
        }
        Ok(None)
    }

    /// Cuts live sessions at once and lets nobody in; the first step of a removal.
    pub(crate) fn fence(&self, iqn: &Iqn) -> Result<bool, ConfigfsError> {
        let enable = self.group(iqn).join("enable");
        // A target or portal group that was never made has nobody to cut off.
        if !configfs::is_there(&enable)? {
            return Ok(false);
        }
        configfs::ensure(&enable, "0")
    }

    /// Removes the target with all that hangs on it, and proves it gone. True when there was something.
    pub(crate) fn remove_target(&self, iqn: &Iqn) -> Result<bool, ConfigfsError> {
        let group = self.group(iqn);
        for acl in configfs::list(&group.join("acls"))? {
            configfs::unlink(&acl.join("lun_0/lun"))?;
            configfs::remove(&acl.join("lun_0"))?;
            configfs::remove(&acl)?;
        }
        for portal in configfs::list(&group.join("np"))? {
            configfs::remove(&portal)?;
        }
        configfs::unlink(&self.lun(iqn).join("backstore"))?;
        configfs::remove(&self.lun(iqn))?;
        configfs::remove(&group)?;
        let removed = configfs::remove(&self.target(iqn))?;
        configfs::prove_gone(&self.target(iqn))?;
        Ok(removed)
    }

    /// Removes the backstore and proves it gone. True when it was there.
    pub(crate) fn remove_backstore(&self, name: &str) -> Result<bool, ConfigfsError> {
        let removed = configfs::remove(&self.backstore(name))?;
        configfs::prove_gone(&self.backstore(name))?;
        Ok(removed)
    }

    /// Is the target enabled?
    pub(crate) fn enabled(&self, iqn: &Iqn) -> Result<bool, ConfigfsError> {
        Ok(configfs::read_if_there(&self.group(iqn).join("enable"))?.as_deref() == Some("1"))
    }

    /// Is the initiator logged in?
    pub(crate) fn connected(&self, iqn: &Iqn, initiator: &Iqn) -> Result<bool, ConfigfsError> {
        // lio_target_nacl_info_show: "No active iSCSI Session for Initiator Endpoint: …" or a description of it.
        let info = configfs::read_if_there(&self.acl(iqn, initiator).join("info"))?;
        Ok(info.is_some_and(|info| !info.is_empty() && !info.starts_with("No active iSCSI Session")))
    }

    /// The names of all targets and of all backstores, `HBA/NAME`, whoever made them.
    pub(crate) fn list(&self) -> Result<(Vec<String>, Vec<String>), ConfigfsError> {
        let name = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
        let is_target = |name: &String| ["iqn.", "eui.", "naa."].iter().any(|kind| name.starts_with(kind));
        let found = configfs::list(&self.root.join("iscsi"))?;
        let targets = found.iter().filter_map(|path| name(path)).filter(is_target).collect();
        let mut backstores = Vec::new();
        for hba in configfs::list(&self.root.join("core"))?.iter().filter(|path| path.is_dir()) {
            for backstore in configfs::list(hba)?.iter().filter(|path| path.join("udev_path").exists()) {
                backstores.extend(name(hba).zip(name(backstore)).map(|(hba, own)| format!("{hba}/{own}")));
            }
        }
        Ok((targets, backstores))
    }

    fn hba(&self) -> PathBuf {
        self.root.join(HBA)
    }

    fn backstore(&self, name: &str) -> PathBuf {
        self.hba().join(name)
    }

    fn target(&self, iqn: &Iqn) -> PathBuf {
        self.root.join("iscsi").join(iqn.as_str())
    }

    fn group(&self, iqn: &Iqn) -> PathBuf {
        self.target(iqn).join(format!("tpgt_{PORTAL_GROUP_TAG}"))
    }

    fn lun(&self, iqn: &Iqn) -> PathBuf {
        self.group(iqn).join("lun/lun_0")
    }

    fn acl(&self, iqn: &Iqn, initiator: &Iqn) -> PathBuf {
        self.group(iqn).join("acls").join(initiator.as_str())
    }
}

/// The kernel puts words before some values, so the end of what it shows is compared.
fn expect_suffix(path: &Path, found: String, wanted: &str) -> Result<(), ConfigfsError> {
    if found.ends_with(wanted) {
        return Ok(());
    }
    Err(ConfigfsError::ReadBack { path: path.to_owned(), found })
}
