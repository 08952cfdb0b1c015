//! Hosts that are booted anew under guest I/O, cleanly and by power cut, with a disk on each transport (F21, F22). Not here:
//! an agent that is started anew on a host that stays up (`crash`, `reconcile`).

use std::time::{Duration, Instant};

use tether_tests::guest::pattern;
use tether_tests::tether::{IQN_PREFIX, SHARE};
use tether_tests::{Disk, Down, Guest};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::share::{attachment, mounts};
use crate::{Fixture, SEEN, text};

/// One write of a guest, down to the storage, in bytes.
pub(crate) const PIECE: u64 = 256 << 10;
/// So many fit on a disk of 64 MiB.
const ROOM: u64 = 256;
/// A write waits for a host to boot, and for the grace period of its NFS server.
const WRITE: Duration = Duration::from_secs(300);

/// A guest that fills a disk, piece by piece.
pub(crate) struct Writer {
    /// How many pieces the guest was told of that they are on the storage.
    written: watch::Receiver<u64>,
    enough: watch::Sender<bool>,
    task: JoinHandle<anyhow::Result<()>>,
}

impl Writer {
    pub(crate) fn start(guest: Guest, disk: Disk) -> Self {
        let (told, written) = watch::channel(0);
        let (enough, wanted) = watch::channel(false);
        let task = tokio::spawn(async move {
            for piece in 0..ROOM {
                if *wanted.borrow() {
                    return Ok(());
                }
                let command = format!("write {} reboot {PIECE} {}", disk.name, piece * PIECE);
                guest.command_within(&command, WRITE).await?;
                told.send_replace(piece + 1);
            }
            anyhow::bail!("{disk:?} is full before the host was back")
        });
        Self { written, enough, task }
    }

    /// Waits until so many more pieces are written than just now.
    pub(crate) async fn more(&mut self, pieces: u64) {
        let wanted = *self.written.borrow() + pieces;
        let mut written = self.written.clone();
        tokio::select! {
            biased;
            ended = &mut self.task => panic!("the guest writes no more: {ended:?}"),
            reached = tokio::time::timeout(WRITE, written.wait_for(|written| *written >= wanted)) => {
                drop(reached.expect("the guest writes").expect("the guest goes on writing"));
            }
        }
    }

    /// Lets it finish, and gives how many pieces it wrote.
    pub(crate) async fn finish(self) -> u64 {
        self.enough.send_replace(true);
        tokio::time::timeout(WRITE, self.task)
            .await
            .expect("it comes to its end")
            .unwrap()
            .expect("no write fails");
        *self.written.borrow()
    }
}

/// SHA-256 of so many pieces, as they should be.
pub(crate) async fn wanted(fixture: &Fixture, pieces: u64) -> String {
    let storage = &fixture.lab.storage;
    let bytes = usize::try_from(pieces * PIECE).unwrap();
    storage.put(pattern("reboot", bytes), "/var/tmp/wanted", 0o600).await.unwrap();
    let sum = storage.run("sha256sum </var/tmp/wanted").await.unwrap();
    sum.split(' ').next().unwrap_or_default().to_owned()
}

/// F22: the storage host goes down and boots while two guests write, one over each transport. Its agent brings the exports
/// back by itself, the guests go on, and each write that they were told of is there.
async fn storage_rebooted(down: Down) {
    let fixture = Fixture::new().await;
    let (storage, compute) = (&fixture.lab.storage, &fixture.lab.compute);
    let mut attached = Vec::new();
    for (volume, guest, path) in
        [("thick/reboot", "c2", "/dev/tether/reboot"), ("share/reboot", "c3", "/srv/share/reboot.raw")]
    {
        let serial = text(&fixture.create(volume, "64M", &[]).await, "/serial").to_owned();
        let id = text(&fixture.attach(&[volume, guest]).await, "/attachment_id").to_owned();
        let disk = fixture.sees(guest, &serial).await;
        let guest = fixture.lab.guest(guest).unwrap();
        let mut writer = Writer::start(guest.clone(), disk.clone());
        writer.more(2).await;
        attached.push((id, guest, disk, path, writer));
    }
    let ids: Vec<String> = attached.iter().map(|(id, ..)| id.clone()).collect();
    // nfsdcld deletes its database's journal last, and does not wait until that is on disk: for some seconds a power cut takes
    // the client out of it again, and its guests are paused. That is told in the README and is not what is shown here.
    storage.run("sync").await.unwrap();
    fixture.lab.reboot(storage, down).await.unwrap();
    let mut done = Vec::new();
    for (id, guest, disk, path, mut writer) in attached {
        // All of what was on its way when the host went down, and what comes after.
        writer.more(4).await;
        done.push((id, guest, disk, path, writer.finish().await));
    }
    for domain in ["c2", "c3"] {
        let state = compute.run(&format!("virsh domstate {domain}")).await.unwrap();
        assert_eq!(state.trim(), "running", "{domain}");
    }
    for id in &ids {
        let shown = fixture.tether.json(&["show", id]).await.unwrap();
        assert_eq!(shown["export"]["enabled"], true, "{shown:#}");
        assert_eq!(shown["attachment"]["connected"], true, "{shown:#}");
    }
    for (id, guest, disk, path, pieces) in done {
        let (sum, bytes) = (wanted(&fixture, pieces).await, pieces * PIECE);
        println!("{}: {pieces} pieces", guest.name);
        assert_eq!(guest.checksum(&disk, bytes).await.unwrap(), sum, "in the guest {}", guest.name);
        fixture.detach(&id).await;
        assert_eq!(crate::checksum_of(storage, path, 0, bytes).await, sum, "{path}");
    }
    fixture.assert_nothing_left("after the detaches").await;
}

/// F21: the hypervisor goes down and boots while a guest writes to a disk over each transport. The guest starts by itself and
/// has both disks with each write that it was told of, and there is no device of another volume on the host. So does a domain that
/// was asked for its disk and has not let go: its definition names it still.
async fn compute_rebooted(down: Down) {
    let fixture = Fixture::new().await;
    let compute = &fixture.lab.compute;
    // Its device was here, is not any more, and must not be again.
    fixture.volume("thick/other").await;
    let other = text(&fixture.attach(&["thick/other", "c2"]).await, "/attachment_id").to_owned();
    fixture.detach(&other).await;
    fixture.volume("thick/held").await;
    let held = text(&fixture.attach(&["thick/held", "empty"]).await, "/attachment_id").to_owned();
    let (_, error) = fixture.tether.error(&["detach", &held, "--guest-timeout", "2"]).await.unwrap();
    assert_eq!(text(&error, "/reason"), "GUEST_HOLDS_DEVICE", "{error:#}");
    compute.run("virsh -q autostart c2 && virsh -q autostart empty").await.unwrap();
    let guest = fixture.lab.guest("c2").unwrap();
    let mut disks = Vec::new();
    for volume in ["thick/reboot", "share/reboot"] {
        let serial = text(&fixture.create(volume, "64M", &[]).await, "/serial").to_owned();
        let id = text(&fixture.attach(&[volume, "c2"]).await, "/attachment_id").to_owned();
        let disk = fixture.sees("c2", &serial).await;
        disks.push((id, serial, disk));
    }
    // The guest takes one command at a time, so its writes alternate.
    let mut writers: Vec<Writer> =
        disks.iter().map(|(_, _, disk)| Writer::start(guest.clone(), disk.clone())).collect();
    for writer in &mut writers {
        writer.more(4).await;
    }
    let before = devices(&fixture).await;
    assert_eq!(before.lines().count(), 5, "two devices, two sessions and a mount: {before}");
    fixture.lab.reboot(compute, down).await.unwrap();
    guest.wait_up(Duration::from_secs(120)).await.expect("the guest starts by itself");
    let mut pieces = Vec::new();
    for writer in writers {
        // Its guest was ended under it.
        writer.task.abort();
        pieces.push(*writer.written.borrow());
    }

    assert_eq!(devices(&fixture).await, before);
    let there = guest.disks().await.unwrap();
    assert_eq!(there.len(), 2, "{there:?}");
    for ((_, serial, _), pieces) in disks.iter().zip(pieces) {
        let disk = fixture.sees("c2", serial).await;
        assert_eq!(disk.size, 64 << 20);
        println!("{serial}: {pieces} pieces");
        let sum = wanted(&fixture, pieces).await;
        assert_eq!(guest.checksum(&disk, pieces * PIECE).await.unwrap(), sum, "{serial}");
        guest.write(&disk, "goes-on", 1 << 20).await.unwrap();
    }
    let held_by = "timeout 60 sh -c 'until virsh -q domstate empty | grep -q running; do sleep 0.5; done'; \
                   virsh -q domblklist empty | grep -c wwn-; virsh -q destroy empty";
    assert_eq!(
        compute.run_within(held_by, Duration::from_secs(90)).await.unwrap().trim(),
        "1",
        "it starts, with its disk"
    );
    fixture.detach(&held).await;
    let told = fixture.tether.json(&["reconcile"]).await.unwrap();
    assert_eq!(told["items"].as_array().map(Vec::len), Some(0), "{told:#}");
    for (id, serial, _) in &disks {
        assert!(attachment(&fixture, id).await.connected);
        fixture.detach(id).await;
        guest.wait_gone(serial, SEEN).await.unwrap();
    }
    fixture.assert_nothing_left("after the detaches").await;
}

/// Disks by their names for ever, targets of sessions and shares that are mounted: what of ours the host is connected to.
async fn devices(fixture: &Fixture) -> String {
    let command = format!(
        "ls /dev/disk/by-id | grep wwn-0x6001405; cat /sys/class/iscsi_session/*/targetname | grep {IQN_PREFIX} | sort"
    );
    let block = fixture.lab.compute.run(&command).await.unwrap();
    let shares: String = mounts(fixture).await.lines().map(|_| SHARE).collect();
    format!("{block}{shares}")
}

/// Left out of a run for its time, not for what it shows: `tests/run long`.
mod long {
    use super::*;

    #[tokio::test]
    #[ignore = "lab"]
    async fn f22_guests_go_on_when_the_storage_host_is_rebooted() {
        storage_rebooted(Down::Cleanly).await;
    }

    #[tokio::test]
    #[ignore = "lab"]
    async fn f21_a_guest_that_starts_with_its_host_has_its_disks_after_a_reboot() {
        compute_rebooted(Down::Cleanly).await;
    }

    #[tokio::test]
    #[ignore = "lab"]
    async fn f22_guests_go_on_when_the_storage_host_loses_power() {
        storage_rebooted(Down::ByPowerCut).await;
    }

    #[tokio::test]
    #[ignore = "lab"]
    async fn f21_a_guest_that_starts_with_its_host_has_its_disks_after_a_power_cut() {
        compute_rebooted(Down::ByPowerCut).await;
    }

    /// F21: both hosts lose power at once. The storage host is there later than the hypervisor, whose domains wait for it.
    #[tokio::test]
    #[ignore = "lab"]
    async fn f21_a_guest_that_starts_with_its_host_has_its_disk_after_both_hosts_lost_power() {
        let fixture = Fixture::new().await;
        let (storage, compute) = (&fixture.lab.storage, &fixture.lab.compute);
        compute.run("virsh -q autostart c2").await.unwrap();
        let guest = fixture.lab.guest("c2").unwrap();
        let serial = text(&fixture.create("thick/both", "64M", &[]).await, "/serial").to_owned();
        let id = text(&fixture.attach(&["thick/both", "c2"]).await, "/attachment_id").to_owned();
        let disk = fixture.sees("c2", &serial).await;
        let mut writer = Writer::start(guest.clone(), disk);
        writer.more(4).await;
        let (one, other) = tokio::join!(
            fixture.lab.reboot(storage, Down::ByPowerCut),
            fixture.lab.reboot(compute, Down::ByPowerCut)
        );
        one.unwrap();
        other.unwrap();
        guest.wait_up(Duration::from_secs(180)).await.expect("the guest starts by itself");
        writer.task.abort();
        let pieces = *writer.written.borrow();
        println!("{pieces} pieces");
        let disk = fixture.sees("c2", &serial).await;
        assert_eq!(
            guest.checksum(&disk, pieces * PIECE).await.unwrap(),
            wanted(&fixture, pieces).await,
            "each write that the guest was told of"
        );
        fixture.detach(&id).await;
        fixture.assert_nothing_left("after the detach").await;
    }

    /// F31: the hypervisor is rebooted while the storage host is out of reach and a guest waits for its disk. It goes down and
    /// comes back in a time that the session's own deadline bounds, and has the disk when the storage is there again.
    #[tokio::test]
    #[ignore = "lab"]
    async fn f31_a_reboot_with_a_dead_session_is_bounded() {
        let fixture = Fixture::new().await;
        let (storage, compute) = (&fixture.lab.storage, &fixture.lab.compute);
        let serial = text(&fixture.create("thick/dead", "64M", &[]).await, "/serial").to_owned();
        let id = text(&fixture.attach(&["thick/dead", "c2"]).await, "/attachment_id").to_owned();
        let disk = fixture.sees("c2", &serial).await;
        let guest = fixture.lab.guest("c2").unwrap();
        let mut writer = Writer::start(guest.clone(), disk);
        writer.more(1).await;
        // The agent's own bound is minutes; that it is set, and that it is what bounds the shutdown, needs no minutes.
        let bound = "cd /sys/class/iscsi_session/session*; cat recovery_tmo; echo 15 >recovery_tmo";
        assert_eq!(compute.run(bound).await.unwrap().trim(), "180", "seconds until a dead session fails I/O");
        let lan = storage.run("ip -o addr show to 10.99.0.1 | awk '{print $2}'").await.unwrap();
        storage.run(&format!("ip link set {} down", lan.trim())).await.unwrap();
        let lost = "until grep -qv LOGGED_IN /sys/class/iscsi_session/*/state; do sleep 0.2; done";
        compute.run(lost).await.unwrap();
        let began = Instant::now();
        fixture.lab.reboot(compute, Down::Cleanly).await.unwrap();
        writer.task.abort();
        println!("rebooted after {:?}", began.elapsed());
        // Less than the time that the session would have had without the bound.
        assert!(began.elapsed() < Duration::from_secs(150), "{:?}", began.elapsed());
        storage.run(&format!("ip link set {} up", lan.trim())).await.unwrap();
        let agent = "systemctl start tether-compute-agent libvirtd";
        compute.run_within(agent, Duration::from_secs(120)).await.expect("both start");
        let told = fixture.tether.json(&["reconcile"]).await.expect("it comes back");
        assert!(attachment(&fixture, &id).await.connected, "{told:#}");
        compute.run("virsh -q start c2").await.unwrap();
        guest.wait_up(Duration::from_secs(120)).await.unwrap();
        fixture.sees("c2", &serial).await;
        fixture.detach(&id).await;
        fixture.assert_nothing_left("after the detach").await;
    }
}
