//! The doctor of a storage host: which checks there are. Each reads the host as it is, with the agent running or not, and
//! changes nothing. Not here: how checks are run and what both hosts have (`tether_agent_core::doctor`), and how full thin pools
//! are judged (`thin_pool`).

mod endpoints;
mod thin_pool;

use std::path::Path;

use tether_agent_core::doctor::{About, Check, certificates, clock, lvm, modules, program, state, systemd};
use tether_agent_core::failure::Failure;
use tether_agent_core::journal::{find_damaged, look_up};
use tether_agent_core::stuck::Stuck;
use tether_proto::{Finding, PoolName, Severity, SharePath};

use crate::config::{Config, Pool};
use crate::directory::Directory;
use crate::lvm::Lvm;
use crate::nfs::Nfs;
use crate::record::ExportRecord;
use crate::target::lio;
use crate::volume::record::{
    DirectoryRecord, ExtensionRecord, FileRecord, MultiAttachRecord, OperationRecord,
};

const CONFIGFS: &str = "configfs";
const NFS: &str = "nfs-server";

/// LVM looks for no volume group in a logical volume, which is a guest's disk here.
const GUESTS: lvm::Guests = lvm::Guests {
    is_guests: |folder| {
        std::fs::read_to_string(folder.join("dm/uuid")).is_ok_and(|uuid| uuid.starts_with("LVM-"))
    },
    is_hidden: |settings| !settings.scan_lvs || settings.use_devicesfile,
    exposed: "LVM of this host looks for volume groups inside of logical volumes (devices/scan_lvs is 1)",
    setting: "scan_lvs = 0",
};

/// All checks of this host. A config that could not be read has no pools and no addresses, and they are not looked at. No file
/// system that hangs, as `stuck` says, is looked at once more.
pub(crate) fn checks(config: &Config, stuck: &Stuck) -> Vec<Check> {
    let mut checks = vec![
        certificates::check(&config.server, config.danger),
        clock::check(),
        Check::reading("kernel-modules", kernel_modules(config)),
    ];
    checks.extend(state::checks(
        &config.state_directory,
        vec![
            ("exports", find_damaged::<ExportRecord>),
            ("pools", find_damaged::<DirectoryRecord>),
            ("files", find_damaged::<FileRecord>),
            ("extensions", find_damaged::<ExtensionRecord>),
            ("operations", find_damaged::<OperationRecord>),
            ("multi-attach", find_damaged::<MultiAttachRecord>),
        ],
    ));
    if config.iscsi.is_some() {
        checks.push(Check::reading(CONFIGFS, || {
            vec![configfs(&std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default())]
        }));
        checks.push(lvm::check(GUESTS));
    }
    if config.nfs.is_some() {
        checks.push(Check::new(NFS, nfs_server()));
    }
    checks.extend(endpoints::checks(config));
    for (name, pool) in config.pool.clone() {
        let threshold = pool.threshold_percent();
        match pool {
            Pool::Lvm { volume_group, thin_pool, devices, .. } => {
                let lvm = Lvm::new(&volume_group, thin_pool.as_deref(), &devices);
                checks.push(Check::new("pools", logical(name.clone(), lvm.clone(), threshold)));
                if let Some(thin_pool) = thin_pool {
                    let place = format!("{volume_group}/{thin_pool}");
                    checks.push(Check::new(thin_pool::CHECK, thin_pool::check(name, place, lvm, threshold)));
                }
            }
            Pool::Directory { path, owner_uid, owner_gid, .. } => {
                let directory = Directory::new(path, owner_uid, owner_gid, stuck.clone());
                let state = config.state_directory.clone();
                checks.push(Check::new("pools", async move {
                    let (pool, looked) = (name.clone(), directory.clone());
                    let look = move || Ok::<_, Failure>(shared(&pool, &looked, &state, threshold));
                    vec![directory.look(look).await.unwrap_or_else(|failure| unusable(&name, &failure))]
                }));
            }
        }
    }
    checks
}

/// What the host tells about itself beside its findings.
pub(crate) async fn about(config: &Config) -> About {
    About { initiator_iqn: String::new(), endpoints: endpoints::of(config).await }
}

fn kernel_modules(config: &Config) -> impl FnOnce() -> Vec<Finding> + Send + 'static + use<> {
    let (iscsi, nfs) = (config.iscsi.is_some(), config.nfs.is_some());
    move || {
        let mut names = Vec::new();
        names.extend(lio::MODULES.iter().filter(|_| iscsi).copied());
        names.extend(["dm_mod"].iter().filter(|_| iscsi));
        names.extend(["nfsd"].iter().filter(|_| nfs));
        // The kernel loads LIO's other parts and nfsd when they are used.
        modules::judge_host(&names, &["target_core_mod", "dm_mod"], "volumes cannot be exported without them")
    }
}

/// Judges /proc/self/mountinfo: is configfs where LIO is?
fn configfs(mountinfo: &str) -> Finding {
    let is_mounted = mountinfo
        .lines()
        .any(|line| line.split(' ').nth(4) == Some("/sys/kernel/config") && line.contains(" - configfs "));
    if is_mounted {
        return Finding::ok(CONFIGFS, "mounted at /sys/kernel/config");
    }
    let why = "the kernel's iSCSI target is set up there: no volume can be exported over iSCSI";
    Finding::error(CONFIGFS, "not mounted at /sys/kernel/config", why)
        .mend("systemctl start sys-kernel-config.mount || mount -t configfs none /sys/kernel/config")
}

async fn nfs_server() -> Vec<Finding> {
    let server = Nfs::at("/");
    if let Err(error) = server.check_running() {
        let failure = Failure::from(error);
        let why = "no file can be exported, and guests with disks on this host wait";
        return vec![Finding::error(NFS, failure.to_string(), why).mend("systemctl enable --now nfs-server")];
    }
    let mut findings = Vec::new();
    if server.speaks_version_3() {
        let why = "of NFS 3 the server cannot tell who has a file open: a volume in use could be deleted. The restart lets all guests \
                   with files on this host wait for its grace period, 90 s";
        let mend =
            "printf '[nfsd]\\nvers3=n\\n' >/etc/nfs.conf.d/no-version-3.conf && systemctl restart nfs-server";
        findings.push(Finding::warning(NFS, "it speaks NFS 3 as well", why).mend(mend));
    }
    // exportfs(8) reads it at a boot; a directory in its place, or none, and the shares do not come back.
    if !Path::new("/etc/exports.d").is_dir() {
        let why = "the agent keeps its shares there, so that they come back after a boot";
        findings.push(Finding::note(NFS, "/etc/exports.d is not there", why).mend("mkdir /etc/exports.d"));
    }
    match systemd::units(&["nfs-server.service"]).await {
        Ok(units) if units.get("nfs-server.service").is_some_and(|unit| !unit.enabled) => {
            let why = "after a boot of this host guests wait until somebody starts it";
            let found = "it runs, and does not start with the host";
            findings.push(Finding::warning(NFS, found, why).mend("systemctl enable nfs-server"));
        }
        _ if findings.is_empty() => findings.push(Finding::ok(NFS, "it runs")),
        _ => {}
    }
    findings
}

async fn logical(name: PoolName, lvm: Lvm, threshold: u8) -> Vec<Finding> {
    vec![match lvm.room().await {
        Ok(room) => room_finding(&name, room.size, room.free, threshold, Severity::Note),
        Err(failure) => unusable(&name, &failure),
    }]
}

fn shared(name: &PoolName, directory: &Directory, state: &Path, threshold: u8) -> Finding {
    // Without the right to read the journal, the directory is looked at as if it were used for the first time.
    let known = look_up::<DirectoryRecord>(&state.join("pools"), name.as_str()).ok().flatten();
    if let Err(error) = directory.check(known.map(|record| record.identity)) {
        return unusable(name, &error.into());
    }
    if directory.on_root_file_system() {
        let found = format!("pool {name} is on the root file system");
        let why =
            "a client of the share can guess its way to other files there, and a full pool is a full host";
        return Finding::warning("pools", found, why).mend(mount_own(directory.path()));
    }
    match directory.room() {
        Ok(room) => room_finding(name, room.size, room.free, threshold, Severity::Warning),
        Err(error) => unusable(name, &error.into()),
    }
}

fn mount_own(path: &SharePath) -> String {
    format!("mount /dev/DEVICE {path}   # with a line in /etc/fstab; before the first volume is made")
}

fn unusable(name: &PoolName, failure: &Failure) -> Finding {
    let found = format!("pool {name} cannot be used: {failure}");
    Finding::error("pools", found, "its volumes cannot be made, exported or extended").mend(failure.advice())
}

/// `severity`: of a pool above its threshold. A file system that runs full stops guests; what is taken of a thick pool is theirs.
fn room_finding(name: &PoolName, size: u64, free: u64, threshold: u8, severity: Severity) -> Finding {
    const MIB: u64 = 1024 * 1024;
    let found = format!("pool {name}: {} of {} MiB free", free / MIB, size / MIB);
    let mend = format!("tether volume list --pool {name}");
    if free == 0 {
        let why = "no volume can be made or extended in it; thin volumes and sparse files stop their guests";
        return Finding::warning("pools", found, why).mend(mend);
    }
    if size.saturating_sub(free) / MIB * 100 >= size / MIB * u64::from(threshold) {
        let found = format!("{found}, above its threshold of {threshold} %");
        let why = "soon no volume can be made or extended in it; sparse files that grow stop their guests when it is full";
        return match severity {
            Severity::Warning => Finding::warning("pools", found, why).mend(mend),
            _ => Finding::note("pools", found, why).mend(mend),
        };
    }
    Finding::ok("pools", found)
}

/// Asks LVM for one of its settings (lvmconfig(8)), as `KEY=VALUE`.
async fn lvm_setting(key: &str) -> Option<String> {
    let asked = program("/sbin/lvmconfig").args(["--typeconfig", "full", key]).run().await.ok()?;
    asked.stdout.trim().split_once('=').map(|(_, value)| value.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configfs_is_found_where_it_is_mounted_and_nowhere_else() {
        let line = "25 22 0:20 / /sys/kernel/config rw,nosuid,nodev,noexec,relatime shared:12 - configfs configfs rw\n";
        assert_eq!(configfs(line).severity, Severity::Ok);
        for other in ["", &line.replace("/sys/kernel/config", "/mnt"), &line.replace("- configfs", "- tmpfs")]
        {
            let finding = configfs(other);
            assert_eq!(finding.severity, Severity::Error);
            assert!(finding.mend.contains("mount -t configfs"), "{finding:?}");
        }
    }

    #[test]
    fn a_pool_without_room_is_told() {
        let name: PoolName = "fast".parse().unwrap();
        let of = |free, severity| room_finding(&name, 1 << 30, free, 80, severity).severity;
        assert_eq!(of(1 << 29, Severity::Warning), Severity::Ok);
        assert_eq!(of(1 << 20, Severity::Note), Severity::Note);
        assert_eq!(of(1 << 20, Severity::Warning), Severity::Warning);
        assert_eq!(of(0, Severity::Note), Severity::Warning);
    }

    #[test]
    fn what_is_not_in_the_config_is_not_looked_at() {
        let empty: Config = toml::from_str("").unwrap();
        let whole: Config = toml::from_str(
            "[iscsi]\nportals = [\"10.0.0.1:3260\"]\niqn_prefix = \"iqn.2026-11.io.example\"\n\
             [pool.a]\nkind = \"lvm\"\nvolume_group = \"vg\"\nthin_pool = \"tp\"\ndevices = [\"/dev/sdb\"]\n",
        )
        .unwrap();
        let count = |config| checks(config, &Stuck::default()).len();
        assert!(count(&whole) > count(&empty) + 3);
    }
}
