//! What the tests of NFS have in common: the shared directory as the storage host's kernel and files show it, the mount
//! as the compute host's kernel shows it, and a stranger on the same network.
//!
//! Nothing here touches a mount, unless it says so: its server may be away.

use tether_proto::wire;
use tether_tests::Host;
use tether_tests::tether::{MOUNTS, SHARE};

use crate::Fixture;

/// The unit of the compute agent, and its control group.
const UNIT: &str = "tether-compute-agent";

/// The NFS part of connection info.
pub(crate) fn nfs(info: &mut wire::ConnectionInfo) -> &mut wire::NfsConnection {
    match info.transport.as_mut() {
        Some(wire::connection_info::Transport::Nfs(nfs)) => nfs,
        other => panic!("no NFS in {other:?}"),
    }
}

/// The mounts under the agent's folder, one line each, from the kernel's table.
pub(crate) async fn mounts(fixture: &Fixture) -> String {
    let command = format!("grep ' {MOUNTS}/' /proc/self/mountinfo || true");
    fixture.lab.compute.run(&command).await.unwrap()
}

/// With whom the directory is shared, one line each, from the server's own table.
pub(crate) async fn shared_with(fixture: &Fixture) -> String {
    let command = format!("grep '^{SHARE}[[:space:]]' /var/lib/nfs/etab | sort");
    fixture.lab.storage.run(&command).await.unwrap()
}

/// Mode, owner, group, number of names and bytes of a file of the share.
pub(crate) async fn file_facts(fixture: &Fixture, file: &str) -> String {
    let facts = fixture.lab.storage.run(&format!("stat -c '%a %u %g %h %s' {SHARE}/{file}")).await;
    facts.unwrap().trim().to_owned()
}

/// SHA-256 of a part of what a guest sees in a qcow2 file, as QEMU's own tool reads it.
pub(crate) async fn checksum_in_qcow2(host: &Host, file: &str, start: u64, bytes: u64) -> String {
    let (skip, count) = (start / 65536, (start + bytes) / 65536);
    let command = format!(
        "qemu-img check -q -f qcow2 {SHARE}/{file} && \
         qemu-img dd -f qcow2 -O raw bs=64k skip={skip} count={count} if={SHARE}/{file} of=/run/part >/dev/null && \
         sha256sum /run/part && rm /run/part"
    );
    host.run(&command).await.unwrap().split_whitespace().next().unwrap_or_default().to_owned()
}

/// What the storage agent knows of a volume.
pub(crate) async fn known(fixture: &Fixture, pool: &str, volume: &str) -> wire::Volume {
    let request = wire::GetVolumeRequest { pool: pool.into(), volume: volume.into() };
    fixture.tether.storage().await.unwrap().get_volume(request).await.expect("the volume").into_inner()
}

/// What the compute agent knows of an attachment.
pub(crate) async fn attachment(fixture: &Fixture, id: &str) -> wire::AttachmentStatus {
    let request = wire::GetAttachmentRequest { attachment_id: id.into() };
    fixture
        .tether
        .compute()
        .await
        .unwrap()
        .get_attachment(request)
        .await
        .expect("the attachment")
        .into_inner()
}

/// The names of the steps in a report from the wire.
pub(crate) fn steps(report: Option<&wire::OperationReport>) -> Vec<&str> {
    report.expect("a report").steps.iter().map(|step| step.step.as_str()).collect()
}

/// The directory of a mount that has the file of this attachment.
pub(crate) async fn mount_of(fixture: &Fixture, id: &str) -> String {
    let path = attachment(fixture, id).await.device_path;
    let (folder, _) = path.rsplit_once('/').unwrap_or_else(|| panic!("{path:?} is no file"));
    assert!(folder.starts_with(MOUNTS), "{path}");
    folder.to_owned()
}

/// From here on the kernel of the compute host writes down each process that the compute agent starts, also by way of its
/// children, and each mount(2) of theirs.
pub(crate) async fn watch_agent(fixture: &Fixture) {
    let command = format!(
        "mountpoint -q /sys/kernel/tracing || mount -t tracefs nodev /sys/kernel/tracing; cd /sys/kernel/tracing && \
         echo 0 >tracing_on && echo >trace && echo 1 >options/event-fork && \
         for process in $(cat /sys/fs/cgroup/system.slice/{UNIT}.service/cgroup.procs); do \
         ls /proc/$process/task; done >set_event_pid && \
         echo 1 >events/task/task_newtask/enable && echo 1 >events/syscalls/sys_enter_mount/enable && echo 1 >tracing_on"
    );
    fixture.lab.compute.run(&command).await.unwrap();
}

/// What was seen since [`watch_agent`]: how many processes (threads are none) and how many mounts.
pub(crate) async fn unwatch_and_count(fixture: &Fixture) -> (usize, usize) {
    let command = r"cd /sys/kernel/tracing && echo 0 >tracing_on && echo 0 >events/enable &&
        perl -ne '$p++ if /task_newtask.* clone_flags=([0-9a-f]+)/ && !(hex($1) & 0x10000);
                  $m++ if /sys_mount\(/; END { printf qq(%d %d\n), $p, $m }' trace";
    let output = fixture.lab.compute.run(command).await.unwrap();
    let (processes, mounts) = output.trim().split_once(' ').expect("two numbers");
    (processes.parse().unwrap(), mounts.parse().unwrap())
}

/// The stack of every thread of the agent itself that waits for NFS in the kernel: rule 9 says that there is none.
pub(crate) async fn threads_in_nfs(fixture: &Fixture) -> String {
    let command = format!(
        "for task in /proc/$(systemctl show -P MainPID {UNIT})/task/*; do \
         if grep -qE 'nfs|rpc_|sunrpc' $task/stack; then echo $task; cat $task/stack; fi; done"
    );
    fixture.lab.compute.run(&command).await.unwrap()
}

/// Another host on the same network, by a name and addresses of its own: 10.99.0.77 and fd99::77.
pub(crate) async fn make_stranger(fixture: &Fixture) {
    let command = "set -e; lan=$(ip -o addr show to 10.99.0.2 | awk '{print $2}'); ip netns add stranger; \
                   ip link add link $lan name stranger0 type macvlan mode bridge; \
                   ip link set stranger0 netns stranger; ip -n stranger link set stranger0 up; \
                   ip -n stranger addr add 10.99.0.77/24 dev stranger0; \
                   ip -n stranger addr add fd99::77/64 nodad dev stranger0; mkdir -p /run/stranger; \
                   ip netns exec stranger ping -q -c 1 -W 5 10.99.0.1 >/dev/null";
    fixture.lab.compute.run(command).await.unwrap();
}

/// The stranger mounts the share from this address of the server and takes it down again. What it said, if it failed.
pub(crate) async fn stranger_mounts(fixture: &Fixture, server: &str) -> Result<(), String> {
    let command = format!(
        "ip netns exec stranger unshare --uts --mount sh -c 'hostname stranger && \
         timeout 20 mount -t nfs -o vers=4.2,hard,retry=0 {server}:{SHARE} /run/stranger && umount /run/stranger'"
    );
    let output = fixture.lab.compute.try_run(&command).await.unwrap();
    if output.exit_code == Some(0) { Ok(()) } else { Err(output.stderr) }
}
