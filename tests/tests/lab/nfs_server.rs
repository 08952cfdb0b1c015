//! An NFS server that is away, or that does not give the share any more (rule 9, F12, F26). What hangs is the I/O of the
//! guests that use it, and nothing else.

use std::time::{Duration, Instant};

use tether_proto::wire;
use tether_tests::guest::pattern;
use tether_tests::tether::SHARE;

use crate::portals::{BLACK_HOLE, make_black_hole};
use crate::share::{attachment, mounts, nfs, shared_with, threads_in_nfs};
use crate::{Fixture, SEEN, attach_with, export, new_id, reason, text, unexport};

/// An answer about a dead server is there within this.
const TOLD: Duration = Duration::from_secs(20);
/// One write of the guest, a multiple of 512.
const PIECE: u64 = 1 << 20;
/// How many there are.
const PIECES: u64 = 32;

/// Attaches and detaches an iSCSI volume in these domains, and gives the median time.
pub(crate) async fn iscsi_cycles(fixture: &Fixture, domains: [&str; 3]) -> Duration {
    let mut times = Vec::new();
    for domain in domains {
        let began = Instant::now();
        let id = text(&fixture.attach(&["thick/quick", domain]).await, "/attachment_id").to_owned();
        fixture.detach(&id).await;
        times.push(began.elapsed());
    }
    times.sort();
    times[1]
}

/// F26: with a server that says nothing any more, an attach and a detach over NFS are told so in time and change nothing; what is
/// asked about them is answered; iSCSI goes on as before, in the very guest whose other disk is dead, too. So it is when the
/// server is stopped. Once it is back the same detach succeeds.
#[tokio::test]
#[ignore = "lab"]
async fn f26_a_dead_server_is_told_at_attach_and_detach_and_holds_up_nobody() {
    let fixture = Fixture::new().await;
    let (storage, compute) = (&fixture.lab.storage, &fixture.lab.compute);
    let serial = text(&fixture.volume("share/held").await, "/serial").to_owned();
    fixture.volume("share/new").await;
    fixture.volume("share/later").await;
    fixture.volume("thick/quick").await;
    let held = text(&fixture.attach(&["share/held", "c2"]).await, "/attachment_id").to_owned();
    let disk = fixture.sees("c2", &serial).await;
    let mounted = mounts(&fixture).await;
    let (new, info) = export(&fixture, "share/new").await;
    let healthy = iscsi_cycles(&fixture, ["c3", "c2", "c3"]).await;
    let silence = |change: &str| {
        let rule = format!("{change} INPUT -p tcp --dport 2049 -j DROP");
        format!("iptables {rule} && ip6tables {rule}")
    };
    storage.run(&silence("-I")).await.unwrap();

    let attach = async {
        let began = Instant::now();
        let refused = attach_with(&fixture, &new, "c3", info).await.expect_err("the server is away");
        (reason(&refused), began.elapsed())
    };
    let detach = async {
        let began = Instant::now();
        let (code, error) = fixture.tether.error(&["detach", &held]).await.unwrap();
        (code, error, began.elapsed())
    };
    let (attach, detach, beside) = tokio::join!(attach, detach, iscsi_cycles(&fixture, ["c3", "c2", "c3"]));
    let ((word, step, next), took) = attach;
    assert_eq!((word.as_str(), step.as_str()), ("SERVER_UNREACHABLE", "choose-server"));
    assert!(!next.is_empty() && took < TOLD, "{took:?}");
    let (code, error, took) = detach;
    assert_eq!(
        (text(&error, "/reason"), text(&error, "/step"), code),
        ("SERVER_UNREACHABLE", "check-server", 5),
        "{error:#}"
    );
    assert!(took < TOLD, "{took:?}");
    println!("iSCSI attach and detach: {healthy:?} before, {beside:?} beside a silent NFS server");
    // What waits for the dead server waits for seconds.
    assert!(beside < healthy * 3 / 2 + Duration::from_millis(700), "{healthy:?}, then {beside:?}");
    assert!(fixture.xml("c2", "").await.contains(&held), "the guest keeps its disk");
    assert!(!fixture.xml("c3", "").await.contains(&new));
    assert_eq!(threads_in_nfs(&fixture).await, "", "the agent's own threads are not on the mount");
    assert_eq!(mounts(&fixture).await, mounted);

    // A restart does not touch the mount either, and the answers are the kernel's and libvirt's.
    storage.run(&format!("systemctl stop nfs-server && {}", silence("-D"))).await.unwrap();
    let began = Instant::now();
    compute.run("systemctl restart tether-compute-agent").await.unwrap();
    let status = attachment(&fixture, &held).await;
    assert!(began.elapsed() < TOLD, "{:?}", began.elapsed());
    assert!(status.in_live_domain && status.in_persistent_definition, "{status:?}");
    assert_eq!(status.phase, "detaching");
    let (code, error) =
        fixture.tether.error(&["attach", "share/later", "c3", "--id", &new_id()]).await.unwrap();
    assert_eq!((text(&error, "/reason"), code), ("NFS_SERVER_DOWN", 4), "{error:#}");
    assert_eq!(threads_in_nfs(&fixture).await, "", "after the restart");

    storage.run("systemctl start nfs-server").await.unwrap();
    let guest = fixture.lab.guest("c2").unwrap();
    guest
        .command_within(&format!("write {} back {}", disk.name, 1 << 20), Duration::from_secs(90))
        .await
        .unwrap();
    fixture.detach(&held).await;
    guest.wait_gone(&serial, SEEN).await.unwrap();
    unexport(&fixture, &new).await;
    fixture.assert_nothing_left("once the server is back").await;
}

/// F26: a server that swallows packets costs nothing beside one that answers, and is told soon when there is no other.
#[tokio::test]
#[ignore = "lab"]
async fn f26_a_silent_server_is_passed_over_or_told_soon() {
    let fixture = Fixture::new().await;
    make_black_hole(&fixture).await;
    let silent = BLACK_HOLE.split(':').next().unwrap().to_owned();
    let serial = text(&fixture.volume("share/silent").await, "/serial").to_owned();
    let (id, mut info) = export(&fixture, "share/silent").await;
    let mut dead = info.clone();
    nfs(&mut dead).servers = vec![silent.clone()];
    let began = Instant::now();
    let refused = attach_with(&fixture, &id, "c2", dead).await.unwrap_err();
    let (word, step, _) = reason(&refused);
    assert_eq!((word.as_str(), step.as_str()), ("SERVER_UNREACHABLE", "choose-server"), "{refused:?}");
    assert!(refused.message().contains(&silent) && began.elapsed() < TOLD, "{refused:?}");
    assert_eq!(mounts(&fixture).await, "");

    nfs(&mut info).servers.insert(0, silent.clone());
    let attached = attach_with(&fixture, &id, "c2", info).await.unwrap();
    let choice =
        attached.report.unwrap().steps.into_iter().find(|step| step.step == "choose-server").unwrap();
    assert!(choice.duration_microseconds < 1_500_000, "{choice:?}");
    assert!(!attached.attachment.unwrap().share.contains(&silent));
    fixture.sees("c2", &serial).await;
    fixture.detach(&id).await;
    fixture.assert_nothing_left("after the detach").await;
}

/// Left out of a run for its time, not for what it shows: `tests/run long`.
mod long {
    use super::*;

    /// F12: somebody took the share away behind our back. An attach is told in time, a repeated Export puts it right, and then the
    /// same attach succeeds.
    #[tokio::test]
    #[ignore = "lab"]
    async fn f12_a_share_that_was_taken_away_is_told_in_time_and_repaired_by_export() {
        let fixture = Fixture::new().await;
        let storage = &fixture.lab.storage;
        let serial = text(&fixture.volume("share/one").await, "/serial").to_owned();
        fixture.volume("share/two").await;
        let one = text(&fixture.attach(&["share/one", "c3"]).await, "/attachment_id").to_owned();
        fixture.volume("share/held").await;
        let buffered =
            text(&fixture.attach(&["share/held", "c3", "--cache", "writeback"]).await, "/attachment_id")
                .to_owned();
        let (two, info) = export(&fixture, "share/two").await;
        let shared = shared_with(&fixture).await;
        storage
            .run(&format!("rm /etc/exports.d/tether-* && exportfs -r && ! grep '^{SHARE}' /var/lib/nfs/etab"))
            .await
            .unwrap();
        let began = Instant::now();
        let refused =
            attach_with(&fixture, &two, "c2", info.clone()).await.expect_err("the server gives nothing");
        assert!(began.elapsed() < Duration::from_secs(40), "{:?}", began.elapsed());
        let (word, step, next) = reason(&refused);
        assert_eq!((word.as_str(), step.as_str()), ("MOUNT_FAILED", "verify-file"), "{refused:?}");
        assert!(refused.message().contains("does not share") && next.contains("reconcile"), "{refused:?}");
        // Nor is a guest's disk let go of whose writes this host still holds.
        let (_, error) = fixture.tether.error(&["detach", &buffered]).await.unwrap();
        assert_eq!((text(&error, "/reason"), text(&error, "/step")), ("FLUSH_FAILED", "flush"), "{error:#}");

        let mut compute = fixture.tether.compute().await.unwrap();
        let connector = compute.get_connector(wire::GetConnectorRequest {}).await.unwrap().into_inner();
        let again = wire::ExportRequest {
            attachment_id: two.clone(),
            pool: "share".into(),
            volume: "two".into(),
            connector: Some(connector),
            access_mode: wire::AccessMode::ReadWrite.into(),
        };
        let repaired = fixture.tether.storage().await.unwrap().export(again).await.unwrap().into_inner();
        assert_eq!(repaired.report.unwrap().outcome(), wire::Outcome::Repaired);
        assert_eq!(repaired.connection_info.as_ref(), Some(&info));
        assert_eq!(shared_with(&fixture).await, shared);
        attach_with(&fixture, &two, "c2", info).await.expect("the same attach");
        let disk = fixture.sees("c3", &serial).await;
        fixture.lab.guest("c3").unwrap().write(&disk, "still", 1 << 20).await.unwrap();

        fixture.detach(&two).await;
        // QEMU closed that file while the server refused to hear of it, so the server has it as open; the way out is told.
        fixture.detach(&one).await;
        let (_, error) = fixture.tether.error(&["detach", &buffered]).await.unwrap();
        assert_eq!(
            (text(&error, "/reason"), text(&error, "/step")),
            ("VOLUME_IN_USE", "check-closed"),
            "{error:#}"
        );
        let next = text(&error, "/next");
        let way_out =
            next.find("echo expire >/proc").map(|at| next[at..].split(',').next().unwrap_or_default());
        fixture.lab.storage.run(way_out.expect("a way out")).await.unwrap();
        fixture.detach(&buffered).await;
        fixture.assert_nothing_left("after all").await;
    }

    /// F26: the server is away for a minute while a guest writes, each piece down to the storage. The guest waits or is
    /// paused, and goes on when the server is back: no write that it was told of is lost, and none is somewhere else.
    #[tokio::test]
    #[ignore = "lab"]
    async fn f26_a_guest_goes_on_when_the_server_is_back_and_has_lost_nothing() {
        let fixture = Fixture::new().await;
        let storage = &fixture.lab.storage;
        let serial = text(&fixture.create("share/long", "32M", &[]).await, "/serial").to_owned();
        let id = text(&fixture.attach(&["share/long", "c2"]).await, "/attachment_id").to_owned();
        let disk = fixture.sees("c2", &serial).await;
        let (written, mut progress) = tokio::sync::watch::channel(0);
        let (guest, target) = (fixture.lab.guest("c2").unwrap(), disk.clone());
        let writing = tokio::spawn(async move {
            for piece in 0..PIECES {
                let command = format!("write {} outage {PIECE} {}", target.name, piece * PIECE);
                guest.command_within(&command, Duration::from_secs(180)).await.expect("no write fails");
                written.send_replace(piece + 1);
            }
        });
        progress.wait_for(|pieces| *pieces >= 4).await.unwrap();
        storage.run("systemctl stop nfs-server").await.unwrap();
        let at_stop = *progress.borrow_and_update();
        // Looked at all the time: the guest waits, and nothing has to be told to go on.
        let watch = "end=$((SECONDS + 60)); while [ $SECONDS -lt $end ]; do virsh domstate c2 --reason; sleep 1; done | grep . | sort -u";
        let states = fixture.lab.compute.run_within(watch, Duration::from_secs(90)).await.unwrap();
        assert!(states.lines().all(|state| state.starts_with("running")), "{states}");
        let during = *progress.borrow_and_update();
        assert!(during <= at_stop + 1 && during < PIECES, "{at_stop} and {during}: the outage came too late");
        storage.run("systemctl start nfs-server").await.unwrap();
        tokio::time::timeout(Duration::from_secs(150), writing).await.expect("the guest goes on").unwrap();
        let state = fixture.lab.compute.run("virsh domstate c2").await.unwrap();
        assert_eq!(state.trim(), "running");

        let wanted = pattern("outage", usize::try_from(PIECE * PIECES).unwrap());
        storage.put(wanted, "/var/tmp/wanted", 0o600).await.unwrap();
        let size = PIECE * PIECES;
        let wanted = storage.run("sha256sum </var/tmp/wanted").await.unwrap();
        let in_guest = fixture.lab.guest("c2").unwrap().checksum(&disk, size).await.unwrap();
        assert_eq!(in_guest, wanted.split(' ').next().unwrap(), "in the guest");
        fixture.detach(&id).await;
        storage.run(&format!("cmp /var/tmp/wanted {SHARE}/long.raw")).await.expect("in the file");
        fixture.assert_nothing_left("after the detach").await;
    }
}
