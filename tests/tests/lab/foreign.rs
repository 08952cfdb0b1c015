//! What is not ours is not touched (rule 6, F16).

use crate::{Fixture, attach_with, export, iscsi, text, unexport};

const THEIR_TARGET: &str = "iqn.2020-01.com.example:theirs";

/// A target, a session, a disk in a guest and a node record that somebody else made.
async fn plant(fixture: &Fixture) {
    let (storage, compute) = (&fixture.lab.storage, &fixture.lab.compute);
    storage
        .run(&format!(
            "set -e; lvcreate -qy -Wy -L 16m -n foreign tether >/dev/null; T=/sys/kernel/config/target; \
             mkdir -p $T/core/iblock_0/foreign; echo -n udev_path=/dev/tether/foreign >$T/core/iblock_0/foreign/control; \
             echo -n /dev/tether/foreign >$T/core/iblock_0/foreign/udev_path; echo -n deadbeef >$T/core/iblock_0/foreign/wwn/vpd_unit_serial; \
             echo 1 >$T/core/iblock_0/foreign/enable; G=$T/iscsi/{THEIR_TARGET}/tpgt_1; mkdir -p $G; \
             echo 0 >$G/attrib/authentication; echo 1 >$G/attrib/generate_node_acls; echo 0 >$G/attrib/demo_mode_write_protect; \
             mkdir $G/lun/lun_0; ln -s $T/core/iblock_0/foreign $G/lun/lun_0/theirs; mkdir $G/np/10.99.0.1:3260; echo 1 >$G/enable"
        ))
        .await
        .unwrap();
    compute
        .run(&format!(
            "set -e; iscsiadm -m node -T {THEIR_TARGET} -p 10.99.0.1:3260 -o new >/dev/null; \
             iscsiadm -m node -T {THEIR_TARGET} -p 10.99.0.1:3260 --login >/dev/null; udevadm settle; \
             virsh -q attach-disk c2 /dev/disk/by-path/ip-10.99.0.1:3260-iscsi-{THEIR_TARGET}-lun-0 vdz --live --config --serial theirs"
        ))
        .await
        .unwrap();
}

/// All that can be seen of it.
async fn seen(fixture: &Fixture) -> (String, String) {
    let storage = format!(
        "cd /sys/kernel/config/target; find iscsi/{THEIR_TARGET} core/iblock_0/foreign | sort; cat iscsi/{THEIR_TARGET}/tpgt_1/enable"
    );
    let compute = format!(
        "cd /sys/class/iscsi_session; for s in *; do grep -qx {THEIR_TARGET} $s/targetname && echo $s $(cat $s/state); done; \
         find /etc/iscsi/nodes/{THEIR_TARGET} -type f | xargs cat; virsh -q domblklist c2 | grep vdz; virsh -q domblklist --inactive c2 | grep vdz"
    );
    let (storage, compute) =
        tokio::join!(fixture.lab.storage.run(&storage), fixture.lab.compute.run(&compute));
    (storage.unwrap(), compute.unwrap())
}

/// F16: through an attach, a failed attach and a detach beside it, somebody else's things stay as they were.
#[tokio::test]
#[ignore = "lab"]
async fn f16_a_foreign_target_session_disk_and_record_are_untouched() {
    let fixture = Fixture::new().await;
    plant(&fixture).await;
    let before = seen(&fixture).await;
    assert!(
        before.0.contains("tpgt_1") && before.1.contains("LOGGED_IN") && before.1.contains("vdz"),
        "{before:?}"
    );
    fixture.sees("c2", "theirs").await;

    let serial = text(&fixture.volume("thick/ours").await, "/serial").to_owned();
    let (id, mut info) = export(&fixture, "thick/ours").await;
    iscsi(&mut info).chap_secret = "wrong-wrong-wrong".into();
    attach_with(&fixture, &id, "c2", info).await.unwrap_err();
    assert_eq!(seen(&fixture).await, before, "after a failed attach");
    unexport(&fixture, &id).await;

    fixture.attach(&["thick/ours", "c2"]).await;
    fixture.sees("c2", &serial).await;
    for agent in [(&fixture.lab.storage, "storage"), (&fixture.lab.compute, "compute")] {
        agent.0.run(&format!("systemctl restart tether-{}-agent", agent.1)).await.unwrap();
    }
    assert_eq!(seen(&fixture).await, before, "after an attach and a restart");
    fixture.tether.json(&["detach", "thick/ours", "c2"]).await.unwrap();
    assert_eq!(seen(&fixture).await, before, "after a detach");
    let disk = fixture.sees("c2", "theirs").await;
    fixture.lab.guest("c2").unwrap().write(&disk, "still-works", 1 << 20).await.unwrap();
}

/// A target under our name that the journal does not know is refused and left alone.
#[tokio::test]
#[ignore = "lab"]
async fn a_target_of_our_name_that_we_did_not_make_is_refused() {
    let fixture = Fixture::new().await;
    fixture.volume("thick/name").await;
    let id = crate::new_id();
    let target = format!("{}:{id}", tether_tests::tether::IQN_PREFIX);
    let folder = format!("/sys/kernel/config/target/iscsi/{target}");
    fixture.lab.storage.run(&format!("mkdir -p {folder}/tpgt_1")).await.unwrap();
    let (_, error) = fixture.tether.error(&["attach", "thick/name", "c2", "--id", &id]).await.unwrap();
    assert_eq!(text(&error, "/reason"), "NOT_OURS", "{error:#}");
    fixture
        .lab
        .storage
        .run(&format!("ls -d {folder}/tpgt_1 && rmdir {folder}/tpgt_1 {folder}"))
        .await
        .unwrap();
    fixture.assert_nothing_left("after the refusal").await;
}
