//! The main job over NFS: a file of a shared directory becomes a disk of a guest, keeps its data, and is gone again.

use std::time::Duration;

use tether_tests::guest::pattern;
use tether_tests::tether::{MOUNTS, SHARE};

use crate::share::{
    checksum_in_qcow2, file_facts, known, mount_of, mounts, nfs, shared_with, unwatch_and_count, watch_agent,
};
use crate::{Fixture, SEEN, attach_with, checksum_of, export, our_disk, text};

const BYTES: u64 = 4 << 20;

/// Attach, write in the guest, find it in the file, detach, attach elsewhere: the data is the same.
async fn whole_flow(format: &str, options: &[&str], first: (&str, &str), second: (&str, &str)) {
    let fixture = Fixture::new().await;
    let storage = &fixture.lab.storage;
    let (name, file) = (format!("share/data-1.{format}"), format!("data-1.{format}.{format}"));
    let serial = text(&fixture.create(&name, "16M", options).await, "/serial").to_owned();
    let before = file_facts(&fixture, &file).await;
    assert!(before.starts_with("600 64055 64055 1 "), "{before}");

    let attached = fixture.attach(&[&name, first.0, "--bus", first.1]).await;
    let id = text(&attached, "/attachment_id");
    let disk = fixture.sees(first.0, &serial).await;
    assert_eq!((disk.size, disk.read_only), (16 << 20, false));
    assert!(disk.name.starts_with(if first.1 == "virtio" { "vd" } else { "sd" }), "{disk:?}");
    let guest = fixture.lab.guest(first.0).unwrap();
    guest.write(&disk, "tether", BYTES).await.unwrap();
    let sum = guest.checksum(&disk, BYTES).await.unwrap();
    let head = guest.command(&format!("read {} 0 16", disk.name)).await.unwrap();
    let wanted: String = pattern("tether", 512)[..16].iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(head, wanted);
    let path = text(&attached, "/attachment/device_path");
    assert!(path.starts_with(MOUNTS) && path.ends_with(&format!("/{file}")), "{path}");
    for face in ["", "--inactive"] {
        let xml = fixture.xml(first.0, face).await;
        let element = our_disk(&xml, id);
        for part in [
            "<disk type='file' device='disk'",
            &format!("name='qemu' type='{format}'"),
            " error_policy='stop'",
            " rerror_policy='stop'",
            &format!("<source file='{path}'"),
            "<seclabel model='dac' relabel='no'/>",
        ] {
            assert!(element.contains(part), "{part} in {element}");
        }
    }
    let mounted = mounts(&fixture).await;
    assert_eq!(mounted.lines().count(), 1, "{mounted}");
    assert!(mounted.contains(&format!(":{SHARE} ")) && mounted.contains("vers=4.2,"), "{mounted}");
    assert!(mounted.contains(",hard,") && !mounted.contains(",soft"), "{mounted}");

    fixture.detach(id).await;
    guest.wait_gone(&serial, SEEN).await.unwrap();
    fixture.assert_nothing_left("after the detach").await;
    let stored = match format {
        "raw" => checksum_of(storage, &format!("{SHARE}/{file}"), 0, BYTES).await,
        _ => checksum_in_qcow2(storage, &file, 0, BYTES).await,
    };
    assert_eq!(stored, sum);
    assert!(
        file_facts(&fixture, &file).await.starts_with("600 64055 64055 1 "),
        "nobody relabelled the file"
    );
    let folder = storage.run(&format!("stat -c '%a %U %G' {SHARE}")).await.unwrap();
    assert_eq!(folder.trim(), "711 root root");

    let id = text(&fixture.attach(&[&name, second.0, "--bus", second.1]).await, "/attachment_id").to_owned();
    let disk = fixture.sees(second.0, &serial).await;
    assert_eq!(fixture.lab.guest(second.0).unwrap().checksum(&disk, BYTES).await.unwrap(), sum);
    fixture.detach(&id).await;
    fixture.assert_nothing_left("after the second detach").await;
    fixture.tether.json(&["volume", "delete", &name]).await.unwrap();
    storage.run(&format!("! ls {SHARE} | grep data-1")).await.expect("no file is left");
}

#[tokio::test]
#[ignore = "lab"]
async fn a_raw_file_on_virtio_keeps_its_data_through_detach_and_attach_on_scsi() {
    whole_flow("raw", &["--provisioning", "thick"], ("c2", "virtio"), ("c3", "scsi")).await;
}

/// F19: shut-off domains count. Their mount stays though nothing uses it, also when a running domain gives up its own
/// disk and the agent is restarted; and the guests see their disks once they run.
#[tokio::test]
#[ignore = "lab"]
async fn f19_a_shut_off_domain_keeps_its_mount_and_has_its_disks_when_it_starts() {
    let fixture = Fixture::new().await;
    let compute = &fixture.lab.compute;
    let raw = text(&fixture.volume("share/raw").await, "/serial").to_owned();
    let qcow2 =
        text(&fixture.create("share/qcow2", "16M", &["--format", "qcow2"]).await, "/serial").to_owned();
    fixture.volume("share/other").await;
    compute.run("virsh -q destroy c3").await.unwrap();
    let mut ids = Vec::new();
    for (name, domain, bus) in
        [("share/raw", "c3", "virtio"), ("share/qcow2", "c3", "scsi"), ("share/other", "c2", "virtio")]
    {
        let attached = fixture.attach(&[name, domain, "--bus", bus]).await;
        ids.push(text(&attached, "/attachment_id").to_owned());
    }
    let xml = fixture.xml("c3", "--inactive").await;
    assert!(
        our_disk(&xml, &ids[0]).contains("type='raw'") && our_disk(&xml, &ids[1]).contains("type='qcow2'")
    );
    let mounted = mounts(&fixture).await;
    compute.run("systemctl restart tether-compute-agent").await.unwrap();
    fixture.detach(&ids[2]).await;
    assert_eq!(mounts(&fixture).await, mounted, "the shut-off domain's mount");
    compute.run_within("virsh -q start c3", Duration::from_secs(60)).await.unwrap();
    let guest = fixture.lab.guest("c3").unwrap();
    guest.wait_up(Duration::from_secs(120)).await.unwrap();
    for serial in [&raw, &qcow2] {
        let disk = fixture.sees("c3", serial).await;
        assert_eq!(disk.size, 16 << 20);
        guest.write(&disk, "started", 1 << 20).await.unwrap();
    }
    fixture.detach(&ids[0]).await;
    compute.run("virsh -q destroy c3").await.unwrap();
    assert_eq!(mounts(&fixture).await, mounted, "one disk of the shut-off domain is left");
    fixture.detach(&ids[1]).await;
    fixture.assert_nothing_left("after the last detach").await;
}

/// One mount for two volumes in one guest and a third in another: the first pays for it, the others start no process and
/// mount nothing (the kernel counts), and it goes with the last.
#[tokio::test]
#[ignore = "lab"]
async fn f46_volumes_of_one_share_have_one_mount_that_goes_with_the_last() {
    let fixture = Fixture::new().await;
    let mut serials = Vec::new();
    for name in ["share/a", "share/b", "share/c"] {
        serials.push(text(&fixture.volume(name).await, "/serial").to_owned());
    }
    watch_agent(&fixture).await;
    let mut ids = vec![text(&fixture.attach(&["share/a", "c2"]).await, "/attachment_id").to_owned()];
    let (processes, mounted) = unwatch_and_count(&fixture).await;
    assert!(processes >= 1 && mounted == 1, "or the watch shows nothing: {processes}, {mounted}");
    let line = mounts(&fixture).await;
    assert_eq!(line.lines().count(), 1, "{line}");

    watch_agent(&fixture).await;
    for (name, domain) in [("share/b", "c2"), ("share/c", "c3")] {
        let attached = fixture.attach(&[name, domain]).await;
        assert!(!attached["attach"].to_string().contains("\"mount-share\""), "{attached:#}");
        ids.push(text(&attached, "/attachment_id").to_owned());
    }
    assert_eq!(unwatch_and_count(&fixture).await, (0, 0), "processes and mounts for the others");
    assert_eq!(mounts(&fixture).await, line, "the same mount");
    let folder = mount_of(&fixture, &ids[0]).await;
    for id in &ids {
        assert_eq!(mount_of(&fixture, id).await, folder);
    }

    fixture.detach(&ids[0]).await;
    fixture.detach(&ids[1]).await;
    assert_eq!(mounts(&fixture).await, line, "still there for the third");
    assert_eq!(shared_with(&fixture).await.lines().count(), 2, "and shared");
    let disk = fixture.sees("c3", &serials[2]).await;
    let guest = fixture.lab.guest("c3").unwrap();
    guest.write(&disk, "third", 1 << 20).await.unwrap();
    let sum = guest.checksum(&disk, 1 << 20).await.unwrap();
    assert_eq!(checksum_of(&fixture.lab.storage, "/srv/share/c.raw", 0, 1 << 20).await, sum);
    fixture.detach(&ids[2]).await;
    fixture.assert_nothing_left("after the last detach").await;
}

/// F4: a guest makes its raw volume look like a qcow2 file with another size and a backing file of the host. It stays 16 MiB
/// of data through detach, attach and restart, and grows as such.
#[tokio::test]
#[ignore = "lab"]
async fn f4_a_qcow2_header_that_a_guest_writes_into_a_raw_volume_stays_data() {
    let fixture = Fixture::new().await;
    let storage = &fixture.lab.storage;
    let serial = text(&fixture.volume("share/trap").await, "/serial").to_owned();
    let header = "cd /run && qemu-img create -q -f qcow2 -F raw -b /etc/passwd trap 1G && head -c 1024 trap | base64 -w 0";
    let header = storage.run(header).await.unwrap();
    let id = text(&fixture.attach(&["share/trap", "c2"]).await, "/attachment_id").to_owned();
    let disk = fixture.sees("c2", &serial).await;
    let guest = fixture.lab.guest("c2").unwrap();
    let write =
        format!("run echo {} | base64 -d | dd of=/dev/{} conv=notrunc,fsync", header.trim(), disk.name);
    guest.command(&write).await.unwrap();
    let sum = guest.checksum(&disk, 16 << 20).await.unwrap();
    fixture.detach(&id).await;
    let probed = storage.run(&format!("qemu-img info {SHARE}/trap.raw")).await.unwrap();
    assert!(probed.contains("file format: qcow2"), "the trap is set: {probed}");
    for host in [storage, &fixture.lab.compute] {
        host.run(&format!("systemctl restart tether-{}-agent", host.name)).await.unwrap();
    }
    let volume = known(&fixture, "share", "trap").await;
    assert_eq!((volume.format().as_str_name(), volume.size_bytes), ("VOLUME_FORMAT_RAW", 16 << 20));

    let id = text(&fixture.attach(&["share/trap", "c3"]).await, "/attachment_id").to_owned();
    let disk = fixture.sees("c3", &serial).await;
    let guest = fixture.lab.guest("c3").unwrap();
    assert_eq!(disk.size, 16 << 20);
    assert_eq!(guest.checksum(&disk, 16 << 20).await.unwrap(), sum);
    fixture.tether.json(&["volume", "extend", "share/trap", "32M"]).await.unwrap();
    guest.wait_size(&serial, 32 << 20, SEEN).await.unwrap();
    assert_eq!(guest.checksum(&disk, 16 << 20).await.unwrap(), sum, "the header is still data");
    assert!(our_disk(&fixture.xml("c3", "").await, &id).contains("type='raw'"));
    fixture.detach(&id).await;
    assert!(file_facts(&fixture, "trap.raw").await.ends_with(" 33554432"));
    fixture.assert_nothing_left("at the end").await;
}

/// F40: everything over IPv6 alone.
#[tokio::test]
#[ignore = "lab"]
async fn f40_the_whole_flow_of_a_file_over_ipv6_alone() {
    let fixture = Fixture::new().await;
    let serial = text(&fixture.volume("share/six").await, "/serial").to_owned();
    let (id, mut info) = export(&fixture, "share/six").await;
    assert_eq!(nfs(&mut info).servers, ["10.99.0.1", "fd99::1"]);
    nfs(&mut info).servers = vec!["fd99::1".into()];
    let attached = attach_with(&fixture, &id, "c2", info).await.unwrap().attachment.unwrap();
    assert_eq!(attached.share, format!("[fd99::1]:{SHARE}"));
    let disk = fixture.sees("c2", &serial).await;
    let guest = fixture.lab.guest("c2").unwrap();
    guest.write(&disk, "six", 1 << 20).await.unwrap();
    let sum = guest.checksum(&disk, 1 << 20).await.unwrap();
    assert_eq!(checksum_of(&fixture.lab.storage, "/srv/share/six.raw", 0, 1 << 20).await, sum);
    let mounted = mounts(&fixture).await;
    assert!(mounted.contains("[fd99::1]:/srv/share") && mounted.contains("proto=tcp6"), "{mounted}");
    let peers = fixture.lab.compute.run("ss -Htn state established '( dport = :2049 )'").await.unwrap();
    assert!(peers.contains("[fd99::1]:2049") && !peers.contains("10.99.0.1:2049"), "{peers}");
    fixture.detach(&id).await;
    fixture.assert_nothing_left("after the detach").await;
}

/// Left out of a run for its time, not for what it shows: `tests/run long`.
mod long {
    use super::*;

    /// F11: both agents are killed with a mount in use. The guest notices nothing, the next attach uses the same mount, and all
    /// goes at the end: the helpers of the killed agent, too.
    #[tokio::test]
    #[ignore = "lab"]
    async fn f11_killed_agents_find_their_share_and_mount_again() {
        let fixture = Fixture::new().await;
        let serial = text(&fixture.volume("share/before").await, "/serial").to_owned();
        fixture.volume("share/after").await;
        let first = text(&fixture.attach(&["share/before", "c2"]).await, "/attachment_id").to_owned();
        let (mounted, shared) = (mounts(&fixture).await, shared_with(&fixture).await);
        for host in [&fixture.lab.storage, &fixture.lab.compute] {
            // The agent alone: what it started lives on.
            let unit = format!("tether-{}-agent", host.name);
            let kill = format!("kill -KILL $(systemctl show -P MainPID {unit}); systemctl restart {unit}");
            host.run(&kill).await.unwrap();
        }
        assert_eq!(shared_with(&fixture).await, shared);
        let disk = fixture.sees("c2", &serial).await;
        fixture.lab.guest("c2").unwrap().write(&disk, "restarted", 1 << 20).await.unwrap();
        let second = fixture.attach(&["share/after", "c3"]).await;
        assert!(!second["attach"].to_string().contains("\"mount-share\""), "{second:#}");
        assert_eq!(mounts(&fixture).await, mounted);
        fixture.detach(&first).await;
        assert_eq!(mounts(&fixture).await, mounted);
        fixture.detach(text(&second, "/attachment_id")).await;
        fixture.assert_nothing_left("after both").await;
    }

    #[tokio::test]
    #[ignore = "lab"]
    async fn a_qcow2_file_on_scsi_keeps_its_data_through_detach_and_attach_to_the_same_guest() {
        whole_flow("qcow2", &["--format", "qcow2"], ("c2", "scsi"), ("c2", "virtio")).await;
    }
}
