//! What the guest wrote last: it is on the storage when a detach has succeeded, and what is not is told (F9). Not here: storage that
//! is away (`guests`, `nfs_lost`) and force (`force`).

use tether_tests::Disk;
use tether_tests::tether::SHARE;

use crate::nfs_pool::fill;
use crate::{Fixture, SEEN, checksum_on_storage, text};

/// A guest that holds the disk open keeps nothing on virtio-blk: it is gone for the guest, and the last write is on the
/// storage.
#[tokio::test]
#[ignore = "lab"]
async fn f9_what_the_guest_wrote_last_is_on_the_storage_after_the_detach() {
    let fixture = Fixture::new().await;
    let serial = text(&fixture.volume("thick/last").await, "/serial").to_owned();
    for (cache, seed) in [("none", "one"), ("writeback", "two")] {
        fixture.attach(&["thick/last", "c2", "--cache", cache]).await;
        let disk = fixture.sees("c2", &serial).await;
        let guest = fixture.lab.guest("c2").unwrap();
        guest.write(&disk, seed, 8 << 20).await.unwrap();
        let sum = guest.checksum(&disk, 8 << 20).await.unwrap();
        fixture.tether.json(&["detach", "thick/last", "c2"]).await.unwrap();
        guest.wait_gone(&serial, SEEN).await.unwrap();
        assert_eq!(checksum_on_storage(&fixture.lab.storage, "last", 8 << 20).await, sum, "{cache}");
    }
}

/// Writes from the guest that are answered once this host has them: past the guest's own memory, and without a flush.
async fn write_into_the_host(fixture: &Fixture, disk: &Disk) {
    let write =
        format!("run dd if=/dev/zero of=/dev/{} bs=64k count=32 oflag=direct conv=notrunc", disk.name);
    let answer = fixture.lab.guest("c2").unwrap().command(&write).await.unwrap();
    assert!(answer.contains("32+0 records out"), "{answer}");
}

/// The detach says that the last writes did not get to the storage, which stays connected. Once the storage works again the
/// same call ends it, and still says so: the kernel has forgotten them.
async fn a_failed_flush_is_told(fixture: &Fixture, id: &str, mend: &str) {
    let (code, error) = fixture.tether.error(&["detach", id]).await.unwrap();
    assert_eq!((text(&error, "/reason"), text(&error, "/step")), ("FLUSH_FAILED", "flush"), "{error:#}");
    assert_eq!(code, 1, "{error:#}");
    let shown = fixture.tether.json(&["show", id]).await.unwrap();
    assert_eq!(shown["attachment"]["connected"], true, "{shown:#}");
    assert_eq!(shown["attachment"]["in_live_domain"], false, "{shown:#}");
    fixture.lab.storage.run(mend).await.unwrap();
    // Nothing but another detach lets go of it.
    let reconciled = fixture.tether.output(&["reconcile"]).await.unwrap();
    assert!(reconciled.stdout.contains("flush that failed"), "{reconciled:?}");
    let shown = fixture.tether.json(&["show", id]).await.unwrap();
    assert_eq!(shown["attachment"]["connected"], true, "{shown:#}");
    let ended = fixture.tether.json(&["detach", id]).await.unwrap();
    assert!(ended["may_be_lost"].to_string().contains("writes of c2"), "{ended:#}");
    let shown = fixture.tether.json(&["show", id]).await.unwrap();
    assert!(shown["attachment"]["may_be_lost"].to_string().contains("writes of c2"), "{shown:#}");
    fixture.assert_nothing_left("after the detach").await;
}

/// F9: the device fails under the target, after the guest was told that its writes are done. QEMU's own flush, which it ignores,
/// would be the only one to hear of it.
#[tokio::test]
#[ignore = "lab"]
async fn f9_a_flush_that_fails_over_iscsi_is_told_and_the_storage_stays() {
    let fixture = Fixture::new().await;
    let serial = text(&fixture.volume("thick/lost").await, "/serial").to_owned();
    let id = text(&fixture.attach(&["thick/lost", "c2", "--cache", "writeback"]).await, "/attachment_id")
        .to_owned();
    let disk = fixture.sees("c2", &serial).await;
    fixture.lab.storage.run("dmsetup wipe_table --noflush tether-lost").await.unwrap();
    write_into_the_host(&fixture, &disk).await;
    a_failed_flush_is_told(&fixture, &id, "lvchange --refresh tether/lost").await;
}

/// F9: the file system of the pool is full, which a hypervisor hears of when it writes what it holds.
#[tokio::test]
#[ignore = "lab"]
async fn f9_a_flush_that_finds_no_space_over_nfs_is_told_and_the_share_stays() {
    let fixture = Fixture::new().await;
    let volume = fixture.create("share/lost", "16M", &["--provisioning", "thin"]).await;
    let serial = text(&volume, "/serial").to_owned();
    let id = text(&fixture.attach(&["share/lost", "c2", "--cache", "writeback"]).await, "/attachment_id")
        .to_owned();
    let disk = fixture.sees("c2", &serial).await;
    fill(&fixture, "(24 << 20)").await;
    write_into_the_host(&fixture, &disk).await;
    a_failed_flush_is_told(&fixture, &id, &format!("rm {SHARE}/filler")).await;
}
