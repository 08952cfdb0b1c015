//! What of ours is on the hosts of the lab: after a detach there must be nothing. Not here: volumes, they are kept.
//!
//! Nothing here touches a mount: its server may be away.

use crate::lab::Lab;
use crate::tether::{IQN_PREFIX, MOUNTS, SHARE};

/// Target, backstore, line of a shared directory and its file; session, node record, SCSI disk, mount, its directory,
/// process, domain XML. One line each.
///
/// # Errors
/// When a host cannot be reached.
pub async fn on_both(lab: &Lab) -> anyhow::Result<String> {
    let (storage, compute) = tokio::try_join!(on_storage(lab), on_compute(lab))?;
    Ok(format!("{storage}\n{compute}").trim().to_owned())
}

/// [`on_both`] without the SCSI disk that `foreign` plants.
///
/// # Errors
/// When a host cannot be reached.
pub async fn without_theirs(lab: &Lab) -> anyhow::Result<String> {
    let left = on_both(lab).await?;
    Ok(left.lines().filter(|line| !line.contains("deadbeef")).collect::<Vec<_>>().join("\n"))
}

/// The storage host's part of [`on_both`].
///
/// # Errors
/// When it cannot be reached.
pub async fn on_storage(lab: &Lab) -> anyhow::Result<String> {
    let command = format!(
        "ls -d /sys/kernel/config/target/iscsi/{IQN_PREFIX}* \
         /sys/kernel/config/target/core/iblock_7440/tether-* /etc/exports.d/tether-* 2>/dev/null; \
         grep '^{SHARE}[[:space:]]' /var/lib/nfs/etab; true"
    );
    Ok(lab.storage.run(&command).await?.trim().to_owned())
}

/// The compute host's part of [`on_both`].
///
/// # Errors
/// When it cannot be reached.
pub async fn on_compute(lab: &Lab) -> anyhow::Result<String> {
    let command = format!(
        "grep -l {IQN_PREFIX} /sys/class/iscsi_session/*/targetname 2>/dev/null; \
         ls -d /etc/iscsi/nodes/{IQN_PREFIX}* 2>/dev/null; ls /dev/disk/by-id 2>/dev/null | grep wwn-0x6001405; \
         grep ' {MOUNTS}/' /proc/self/mountinfo; shopt -s nullglob dotglob; printf '%s\\n' {MOUNTS}/*; \
         agent=$(systemctl show -P MainPID tether-compute-agent); \
         for process in $(cat /sys/fs/cgroup/system.slice/tether-compute-agent.service/cgroup.procs); do \
         [ $process = $agent ] || echo process $process $(tr '\\0' ' ' </proc/$process/cmdline); done; \
         virsh -q version >/dev/null || echo libvirt does not answer; virsh -q \"$(for d in c2 c3 empty; do echo \"dumpxml $d; dumpxml --inactive $d;\"; done)\" | grep ua-tether; \
         true"
    );
    Ok(lab.compute.run(&command).await?.trim().to_owned())
}
