//! What a share was is no more: its file is gone under a guest, its server is gone for good, its server speaks an older
//! version, its umount hangs (rules 8 and 9, F25, F26).

use std::time::{Duration, Instant};

use tether_tests::tether::SHARE;

use crate::share::{mount_of, mounts, threads_in_nfs};
use crate::{Fixture, SEEN, attach_with, export, reason, text, unexport};

/// An answer is there within this.
const TOLD: Duration = Duration::from_secs(60);

/// A stale handle: the file of a running guest goes away, for the server too when it comes back. Another
/// volume of the same share is attached, and the detach of the lost one is told or done in the caller's time.
#[tokio::test]
#[ignore = "lab"]
async fn f26_a_stale_handle_is_told_in_time_and_holds_up_nobody() {
    let fixture = Fixture::new().await;
    let (storage, compute) = (&fixture.lab.storage, &fixture.lab.compute);
    let lost = text(&fixture.volume("share/lost").await, "/serial").to_owned();
    let fine = text(&fixture.volume("share/fine").await, "/serial").to_owned();
    fixture.volume("share/next").await;
    let id = text(&fixture.attach(&["share/lost", "c2", "--cache", "writeback"]).await, "/attachment_id")
        .to_owned();
    let disk = fixture.sees("c2", &lost).await;
    fixture.lab.guest("c2").unwrap().write(&disk, "before", 1 << 20).await.unwrap();
    let (next, info) = export(&fixture, "share/next").await;
    storage
        .run(&format!("rm {SHARE}/lost.raw {SHARE}/next.raw && systemctl restart nfs-server"))
        .await
        .unwrap();
    // What QEMU has open is stale as soon as the client finds that out.
    let folder = mount_of(&fixture, &id).await;
    let began = Instant::now();
    let refused = attach_with(&fixture, &next, "c3", info).await.expect_err("its file is gone");
    let (word, step, advice) = reason(&refused);
    assert!(
        ["WRONG_DEVICE", "SERVER_UNREACHABLE"].contains(&word.as_str()) && !advice.is_empty(),
        "{step}: {refused:?}"
    );
    assert!(began.elapsed() < TOLD, "{:?}", began.elapsed());
    // Until the server's grace period is over.
    let until = Instant::now() + Duration::from_secs(60);
    while fixture.tether.json(&["attach", "share/fine", "c3"]).await.is_err() {
        assert!(Instant::now() < until, "another volume of the share cannot be attached");
    }
    fixture.sees("c3", &fine).await;
    let stat = compute.try_run(&format!("timeout 20 stat {folder}/lost.raw")).await.unwrap();
    assert!(stat.stderr.contains("Stale") || stat.stderr.contains("No such file"), "{stat:?}");

    let began = Instant::now();
    let detached = fixture.tether.json(&["detach", &id]).await;
    let took = began.elapsed();
    println!("the detach of a stale file took {took:?}: {detached:?}");
    assert!(took < TOLD, "{took:?}");
    detached.expect("nothing of it is left to be written");
    assert!(!fixture.xml("c2", "").await.contains(&id));
    assert_eq!(threads_in_nfs(&fixture).await, "");
    fixture.tether.json(&["detach", "share/fine", "c3"]).await.unwrap();
    unexport(&fixture, &next).await;
    fixture.assert_nothing_left("at the end").await;
}

/// Left out of a run for its time, not for what it shows: `tests/run long`.
mod long {
    use super::*;

    /// A server that never comes back: domains that are shut off give their disks up, and the host its mount.
    #[tokio::test]
    #[ignore = "lab"]
    async fn f26_a_server_that_is_gone_for_good_lets_go_of_domains_that_are_shut_off() {
        let fixture = Fixture::new().await;
        let (storage, compute) = (&fixture.lab.storage, &fixture.lab.compute);
        let mut ids = Vec::new();
        for (volume, domain) in [("share/a", "c2"), ("share/b", "c3")] {
            fixture.volume(volume).await;
            ids.push(text(&fixture.attach(&[volume, domain]).await, "/attachment_id").to_owned());
        }
        compute.run("virsh -q destroy c2 && virsh -q destroy c3").await.unwrap();
        storage.run("systemctl stop nfs-server").await.unwrap();

        let began = Instant::now();
        fixture.detach(&ids[0]).await;
        println!("a detach beside a dead server took {:?}", began.elapsed());
        assert!(began.elapsed() < TOLD, "{:?}", began.elapsed());
        let began = Instant::now();
        fixture.detach(&ids[1]).await;
        println!("the last detach, with its umount at a dead server, took {:?}", began.elapsed());
        assert!(began.elapsed() < TOLD, "{:?}", began.elapsed());
        assert_eq!(threads_in_nfs(&fixture).await, "");
        assert_eq!(mounts(&fixture).await, "");
        storage.run("systemctl start nfs-server").await.unwrap();
        fixture.assert_nothing_left("without the server").await;
    }

    /// F25: a `umount` that hangs and ignores SIGTERM is told in time, holds up no iSCSI detach, and the same detach ends it later.
    #[tokio::test]
    #[ignore = "lab"]
    async fn f25_a_umount_that_hangs_is_told_in_time_and_finished_by_the_next_detach() {
        let fixture = Fixture::new().await;
        let serial = text(&fixture.volume("share/last").await, "/serial").to_owned();
        fixture.volume("thick/beside").await;
        let id = text(&fixture.attach(&["share/last", "c2"]).await, "/attachment_id").to_owned();
        let beside = text(&fixture.attach(&["thick/beside", "c3"]).await, "/attachment_id").to_owned();
        let mounted = mounts(&fixture).await;
        let compute = &fixture.lab.compute;
        compute.run("mv /usr/bin/umount /usr/bin/umount.real").await.unwrap();
        let hangs = "#!/bin/sh\ntrap '' TERM INT HUP\nwhile :; do sleep 1000; done\n";
        compute.put(hangs, "/usr/bin/umount", 0o755).await.unwrap();
        let hanging = async {
            let began = Instant::now();
            let (code, error) = fixture.tether.error(&["detach", &id]).await.unwrap();
            (code, error, began.elapsed())
        };
        let healthy = async {
            let began = Instant::now();
            fixture.detach(&beside).await;
            began.elapsed()
        };
        let ((code, error, took), quick) = tokio::join!(hanging, healthy);
        assert_eq!(
            (text(&error, "/reason"), text(&error, "/step"), code),
            ("SERVER_UNREACHABLE", "unmount-share", 5),
            "{error:#}"
        );
        assert!(took < TOLD && quick < took, "{quick:?} and {took:?}");
        assert_eq!(mounts(&fixture).await, mounted);
        fixture.lab.guest("c2").unwrap().wait_gone(&serial, SEEN).await.expect("the guest's part is done");
        compute.run("mv -f /usr/bin/umount.real /usr/bin/umount").await.unwrap();
        fixture.detach(&id).await;
        fixture.assert_nothing_left("once umount is mended").await;
    }

    /// An older server is mounted with the next version of the config, and one that speaks none of them is told.
    #[tokio::test]
    #[ignore = "lab"]
    async fn a_server_without_the_first_version_is_mounted_with_the_next() {
        let fixture = Fixture::new().await;
        let storage = &fixture.lab.storage;
        let serial = text(&fixture.volume("share/old").await, "/serial").to_owned();
        let speak = |without: &str| {
            format!(
                "mkdir -p /etc/nfs.conf.d && printf '[nfsd]\\n{without}' >/etc/nfs.conf.d/versions.conf && \
             systemctl restart nfs-server && cat /proc/fs/nfsd/versions"
            )
        };
        let versions = storage.run(&speak("vers4.2=n\\n")).await.unwrap();
        assert!(versions.contains("-4.2") && versions.contains("+4.1"), "{versions}");
        let id = text(&fixture.attach(&["share/old", "c2"]).await, "/attachment_id").to_owned();
        assert!(mounts(&fixture).await.contains("vers=4.1"), "{}", mounts(&fixture).await);
        let disk = fixture.sees("c2", &serial).await;
        fixture.lab.guest("c2").unwrap().write(&disk, "old", 1 << 20).await.unwrap();
        fixture.detach(&id).await;
        fixture.assert_nothing_left("after the older version").await;

        let versions = storage.run(&speak("vers4.2=n\\nvers4.1=n\\nvers4.0=y\\n")).await.unwrap();
        assert!(versions.contains("-4.2") && versions.contains("-4.1"), "{versions}");
        let (id, info) = export(&fixture, "share/old").await;
        let refused = attach_with(&fixture, &id, "c2", info).await.expect_err("no version in common");
        let (word, step, next) = reason(&refused);
        assert_eq!((word.as_str(), step.as_str()), ("MOUNT_FAILED", "mount-share"), "{refused:?}");
        assert!(!next.is_empty(), "{refused:?}");
        unexport(&fixture, &id).await;
        fixture.assert_nothing_left("after no version").await;
    }
}
