//! Trouble with the mount itself: a `mount` that hangs, somebody else's mount on our directory, somebody in it at the last
//! detach, and an agent killed when it has just mounted (rules 6, 8 and 9, F11, F25, F46).

use std::time::{Duration, Instant};

use tether_tests::tether::MOUNTS;
use tonic::Code;

use crate::share::{attachment, mount_of, mounts, nfs};
use crate::{Fixture, SEEN, attach_with, export, left_on_compute, leftovers, reason, text, unexport};

/// Puts a script in the place of mount.nfs, which stays as mount.nfs.real.
async fn replace_mount(fixture: &Fixture, script: &str) {
    let compute = &fixture.lab.compute;
    compute.run("mv /usr/sbin/mount.nfs /usr/sbin/mount.nfs.real").await.unwrap();
    compute.put(script, "/usr/sbin/mount.nfs", 0o755).await.unwrap();
}

async fn mend_mount(fixture: &Fixture) {
    fixture.lab.compute.run("mv -f /usr/sbin/mount.nfs.real /usr/sbin/mount.nfs").await.unwrap();
}

/// F25: a `mount` that hangs and ignores SIGTERM fails in the caller's time and leaves no process; an iSCSI attach beside it
/// is not held up; and once it is mended the same call succeeds.
#[tokio::test]
#[ignore = "lab"]
async fn f25_a_mount_that_ignores_sigterm_is_told_in_time_and_leaves_nothing() {
    let fixture = Fixture::new().await;
    let serial = text(&fixture.volume("share/hung").await, "/serial").to_owned();
    let healthy = text(&fixture.volume("thick/healthy").await, "/serial").to_owned();
    let (id, info) = export(&fixture, "share/hung").await;
    let hangs = "#!/bin/sh\ntrap '' TERM INT HUP\necho $$ >>/run/hanging\nwhile :; do sleep 1000; done\n";
    replace_mount(&fixture, hangs).await;
    let compute = &fixture.lab.compute;
    let failing = async {
        let began = Instant::now();
        let refused = attach_with(&fixture, &id, "c2", info.clone()).await.unwrap_err();
        (refused, began.elapsed())
    };
    let beside = async {
        compute.run("until [ -s /run/hanging ]; do sleep 0.1; done").await.expect("the mount hangs");
        fixture.attach(&["thick/healthy", "c2"]).await;
        // It hangs still: nobody waited for it.
        compute
            .run("kill -0 $(head -n 1 /run/hanging)")
            .await
            .expect("the attach came back before the mount did");
        let disk = fixture.sees("c2", &healthy).await;
        fixture.lab.guest("c2").unwrap().write(&disk, "beside", 1 << 20).await.unwrap();
    };
    let ((refused, took), ()) = tokio::join!(failing, beside);
    let (reason, step, next) = reason(&refused);
    assert_eq!((reason.as_str(), step.as_str()), ("MOUNT_FAILED", "mount-share"), "{refused:?}");
    assert!(!next.is_empty() && took < Duration::from_secs(60), "{took:?}: {refused:?}");
    let left =
        "for process in $(cat /run/hanging); do [ ! -e /proc/$process ] || cat /proc/$process/status; done";
    assert_eq!(compute.run(left).await.unwrap(), "", "no process is left");
    assert_eq!(mounts(&fixture).await, "");
    assert!(!fixture.xml("c2", "").await.contains(&id));
    mend_mount(&fixture).await;
    attach_with(&fixture, &id, "c2", info).await.expect("the same call, once mount is mended");
    fixture.sees("c2", &serial).await;
    fixture.detach(&id).await;
    fixture.tether.json(&["detach", "thick/healthy", "c2"]).await.unwrap();
    fixture.assert_nothing_left("after both").await;
}

/// Attaches with the server's first address alone, so that the directory is the same each time.
async fn attach_by_ipv4(fixture: &Fixture, volume: &str, domain: &str) -> String {
    let (id, mut info) = export(fixture, volume).await;
    nfs(&mut info).servers.truncate(1);
    attach_with(fixture, &id, domain, info).await.expect("the volume is attached");
    id
}

/// F46, F16: whatever somebody mounted on our directory is not used and not taken away: another file system, the same share
/// with other options, or something over our own mount while it is in use.
#[tokio::test]
#[ignore = "lab"]
async fn f46_somebody_elses_mount_on_our_directory_is_refused_and_stays() {
    let fixture = Fixture::new().await;
    let compute = &fixture.lab.compute;
    let serial = text(&fixture.volume("share/first").await, "/serial").to_owned();
    fixture.volume("share/second").await;
    let first = attach_by_ipv4(&fixture, "share/first", "c2").await;
    let folder = mount_of(&fixture, &first).await;
    fixture.detach(&first).await;
    fixture.assert_nothing_left("after the first detach").await;

    for mount in [
        "mount -t tmpfs theirs",
        "mount -t nfs -o vers=4.1,soft,retry=0,nosharecache,nosuid,nodev,noexec 10.99.0.1:/srv/share",
        "mount -t nfs -o vers=4.2,hard,retry=0,nosharecache,nodev,noexec 10.99.0.1:/srv/share",
        "mount -t nfs -o vers=4.2,hard,retry=0,nosharecache,nosuid,nodev,noexec,nocto 10.99.0.1:/srv/share",
    ] {
        let (id, mut info) = export(&fixture, "share/second").await;
        nfs(&mut info).servers.truncate(1);
        compute.run(&format!("mkdir -p {folder} && timeout 20 {mount} {folder}")).await.unwrap();
        let before = mounts(&fixture).await;
        let refused = attach_with(&fixture, &id, "c2", info).await.unwrap_err();
        assert_eq!(reason(&refused).0, "NOT_OURS", "{mount}: {refused:?}");
        assert!(refused.message().contains(&folder), "{mount}: {refused:?}");
        assert_eq!(refused.code(), Code::FailedPrecondition, "{mount}");
        assert_eq!(mounts(&fixture).await, before, "{mount}");
        assert!(!fixture.xml("c2", "").await.contains("ua-tether"), "{mount}");
        compute.run(&format!("umount {folder} && (rmdir {folder} || true)")).await.unwrap();
        unexport(&fixture, &id).await;
        fixture.assert_nothing_left(mount).await;
    }

    // Over a mount in use: the guest's disk goes on, nothing new is plugged in, theirs stays.
    let first = attach_by_ipv4(&fixture, "share/first", "c2").await;
    let disk = fixture.sees("c2", &serial).await;
    compute.run(&format!("mount -t tmpfs theirs {folder}")).await.unwrap();
    let before = mounts(&fixture).await;
    let (second, mut info) = export(&fixture, "share/second").await;
    nfs(&mut info).servers.truncate(1);
    let refused = attach_with(&fixture, &second, "c3", info).await.unwrap_err();
    assert_eq!(reason(&refused).0, "NOT_OURS", "{refused:?}");
    assert_eq!(mounts(&fixture).await, before);
    assert!(!attachment(&fixture, &first).await.connected, "what is on the directory is not the share");
    fixture.lab.guest("c2").unwrap().write(&disk, "covered", 1 << 20).await.unwrap();
    // The last detach cannot take the mount away from under theirs, and says so.
    let (_, error) = fixture.tether.error(&["detach", &first]).await.unwrap();
    assert!(["NOT_OURS", "DEVICE_IN_USE"].contains(&text(&error, "/reason")), "{error:#}");
    assert_eq!(mounts(&fixture).await, before);
    compute.run(&format!("umount {folder}")).await.unwrap();
    fixture.detach(&first).await;
    unexport(&fixture, &second).await;
    fixture.assert_nothing_left("once theirs is gone").await;
}

/// Left out of a run for its time, not for what it shows: `tests/run long`.
mod long {
    use super::*;

    /// A `mount` that fails is told with its own words, and one that says yes and mounts nothing is not believed (rule 7).
    #[tokio::test]
    #[ignore = "lab"]
    async fn a_mount_that_fails_or_lies_is_told_and_leaves_nothing() {
        let fixture = Fixture::new().await;
        fixture.volume("share/lie").await;
        let (id, info) = export(&fixture, "share/lie").await;
        for (script, words) in [
            ("#!/bin/sh\necho 'mount.nfs: the dog ate it' >&2\nexit 32\n", "the dog ate it"),
            ("#!/bin/sh\nexit 0\n", ""),
        ] {
            replace_mount(&fixture, script).await;
            let refused = attach_with(&fixture, &id, "c2", info.clone()).await.unwrap_err();
            mend_mount(&fixture).await;
            let (reason, step, next) = reason(&refused);
            assert_eq!((reason.as_str(), step.as_str()), ("MOUNT_FAILED", "mount-share"), "{refused:?}");
            assert!(refused.message().contains(words) && !next.is_empty(), "{refused:?}");
            let left = leftovers(&fixture.lab).await;
            assert!(
                !left.contains(MOUNTS) && !left.contains("ua-tether") && !left.contains("process"),
                "{left}"
            );
        }
        unexport(&fixture, &id).await;
        fixture.assert_nothing_left("after the unexport").await;
    }

    /// Somebody is in the mount when its last disk goes: it is told and not torn out, and the same detach ends it later.
    #[tokio::test]
    #[ignore = "lab"]
    async fn a_mount_that_somebody_is_in_is_told_and_unmounted_by_the_next_detach() {
        let fixture = Fixture::new().await;
        let compute = &fixture.lab.compute;
        let serial = text(&fixture.volume("share/busy").await, "/serial").to_owned();
        let id = text(&fixture.attach(&["share/busy", "c2"]).await, "/attachment_id").to_owned();
        fixture.sees("c2", &serial).await;
        let folder = mount_of(&fixture, &id).await;
        let mounted = mounts(&fixture).await;
        compute
            .run(&format!("systemd-run -q --unit=holder -p WorkingDirectory={folder} sleep infinity"))
            .await
            .unwrap();
        compute
            .run(&format!(
                "until [ \"$(readlink /proc/$(systemctl show -P MainPID holder)/cwd)\" = {folder} ]; do :; done"
            ))
            .await
            .unwrap();
        let (code, error) = fixture.tether.error(&["detach", &id]).await.unwrap();
        assert_eq!(
            (text(&error, "/reason"), text(&error, "/step"), code),
            ("DEVICE_IN_USE", "unmount-share", 4),
            "{error:#}"
        );
        assert_eq!(mounts(&fixture).await, mounted, "no lazy unmount");
        fixture.lab.guest("c2").unwrap().wait_gone(&serial, SEEN).await.expect("the guest has let go");
        compute.run("systemctl stop holder").await.unwrap();
        fixture.detach(&id).await;
        fixture.assert_nothing_left("after the second detach").await;
    }

    /// F11: the agent is killed when the share is mounted and the disk is not plugged in yet. What it left is in its journal, and
    /// a detach takes it away.
    #[tokio::test]
    #[ignore = "lab"]
    async fn f11_an_agent_killed_between_mount_and_plug_leaves_nothing_once_it_is_back() {
        let fixture = Fixture::new().await;
        let compute = &fixture.lab.compute;
        fixture.volume("share/cut").await;
        let (id, mut info) = export(&fixture, "share/cut").await;
        nfs(&mut info).servers.truncate(1);
        let waits = "#!/bin/sh\n: >/run/mounting\nuntil [ -e /run/go-on ]; do sleep 0.1; done\nexec /usr/sbin/mount.nfs.real \"$@\"\n";
        replace_mount(&fixture, waits).await;
        let attach = attach_with(&fixture, &id, "c2", info);
        let kill = async {
            // A libvirt that does not answer holds the attach up after the mount.
            compute.run("until [ -e /run/mounting ]; do sleep 0.1; done").await.unwrap();
            compute.run("kill -STOP $(systemctl show -P MainPID libvirtd) && : >/run/go-on").await.unwrap();
            compute
                .run(&format!("until grep -q ' {MOUNTS}/' /proc/self/mountinfo; do sleep 0.1; done"))
                .await
                .unwrap();
            compute
                .run(
                    "kill -KILL $(systemctl show -P MainPID tether-compute-agent); \
                 kill -CONT $(systemctl show -P MainPID libvirtd); systemctl restart tether-compute-agent",
                )
                .await
                .unwrap();
        };
        let (outcome, ()) = tokio::join!(attach, kill);
        outcome.expect_err("the agent was killed in the middle");
        mend_mount(&fixture).await;
        // The mount was there when the agent died; the next one takes it away.
        fixture.tether.json(&["reconcile"]).await.unwrap();
        assert_eq!(left_on_compute(&fixture.lab).await, "");
        assert!(!fixture.xml("c2", "").await.contains(&id), "the disk was not plugged in yet");
        fixture.detach(&id).await;
        fixture.assert_nothing_left("after the detach").await;
    }
}
