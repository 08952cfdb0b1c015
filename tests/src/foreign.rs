//! What somebody else made on the hosts of the lab, for tests that it is not touched: a target, a session, a disk in a
//! guest and a node record; a shared directory, and its mount.

use crate::lab::Lab;

/// The name of their target.
pub const THEIR_TARGET: &str = "iqn.2020-01.com.example:theirs";

/// Puts all of it there. The guest `c2` sees the disk under the serial `theirs`.
///
/// # Errors
/// When a command fails.
pub async fn plant(lab: &Lab) -> anyhow::Result<()> {
    lab.storage
        .run(&format!(
            "set -e; lvcreate -qy -Wy -L 16m -n foreign tether >/dev/null; T=/sys/kernel/config/target; \
             mkdir -p $T/core/iblock_0/foreign; echo -n udev_path=/dev/tether/foreign >$T/core/iblock_0/foreign/control; \
             echo -n /dev/tether/foreign >$T/core/iblock_0/foreign/udev_path; echo -n deadbeef >$T/core/iblock_0/foreign/wwn/vpd_unit_serial; \
             echo 1 >$T/core/iblock_0/foreign/enable; G=$T/iscsi/{THEIR_TARGET}/tpgt_1; mkdir -p $G; \
             echo 0 >$G/attrib/authentication; echo 1 >$G/attrib/generate_node_acls; echo 0 >$G/attrib/demo_mode_write_protect; \
             mkdir $G/lun/lun_0; ln -s $T/core/iblock_0/foreign $G/lun/lun_0/theirs; mkdir $G/np/10.99.0.1:3260; echo 1 >$G/enable; \
             mkdir -p /srv/theirs /etc/exports.d; echo theirs >/srv/theirs/file; \
             echo '/srv/theirs 10.99.0.2(ro,all_squash,no_subtree_check,fsid=4711)' >/etc/exports.d/theirs.exports; exportfs -a"
        ))
        .await?;
    lab.compute
        .run(&format!(
            "set -e; iscsiadm -m node -T {THEIR_TARGET} -p 10.99.0.1:3260 -o new >/dev/null; \
             iscsiadm -m node -T {THEIR_TARGET} -p 10.99.0.1:3260 --login >/dev/null; udevadm settle; \
             virsh -q attach-disk c2 /dev/disk/by-path/ip-10.99.0.1:3260-iscsi-{THEIR_TARGET}-lun-0 vdz --live --config --serial theirs; \
             mkdir /mnt/theirs; mount -t nfs4 -o ro,retry=0 10.99.0.1:/srv/theirs /mnt/theirs"
        ))
        .await
        .map(drop)
}

/// All that can be seen of it, on `storage` and on `compute`.
///
/// # Errors
/// When a command fails: then some of it is gone.
pub async fn seen(lab: &Lab) -> anyhow::Result<(String, String)> {
    let storage = format!(
        "cd /sys/kernel/config/target; find iscsi/{THEIR_TARGET} core/iblock_0/foreign | sort; cat iscsi/{THEIR_TARGET}/tpgt_1/enable; \
         cat /etc/exports.d/theirs.exports; grep ^/srv/theirs /var/lib/nfs/etab"
    );
    let compute = format!(
        "cd /sys/class/iscsi_session; for s in *; do grep -qx {THEIR_TARGET} $s/targetname && echo $s $(cat $s/state); done; \
         find /etc/iscsi/nodes/{THEIR_TARGET} -type f | xargs cat; virsh -q domblklist c2 | grep vdz; virsh -q domblklist --inactive c2 | grep vdz; \
         grep -o ' /mnt/theirs .*' /proc/self/mountinfo && timeout 60 cat /mnt/theirs/file"
    );
    tokio::try_join!(lab.storage.run(&storage), lab.compute.run(&compute))
}
