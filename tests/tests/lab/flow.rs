//! The main job: a volume becomes a disk of a guest, keeps its data, and is gone again.

use std::time::Duration;

use serde_json::Value;
use tether_tests::guest::pattern;

use crate::{Fixture, SEEN, checksum_on_storage, our_disk, text};

const BYTES: u64 = 4 << 20;

/// Attach, write in the guest, find it on the LV, detach, attach elsewhere: the data is the same.
async fn whole_flow(pool: &str, volume: &str, first: (&str, &str), second: (&str, &str)) {
    let fixture = Fixture::new().await;
    let name = format!("{pool}/{volume}");
    let made = fixture.volume(&name).await;
    let serial = text(&made, "/serial");

    let attached = fixture.attach(&[&name, first.0, "--bus", first.1]).await;
    let disk = fixture.sees(first.0, serial).await;
    assert_eq!((disk.size, disk.read_only), (16 << 20, false));
    assert!(disk.name.starts_with(if first.1 == "virtio" { "vd" } else { "sd" }), "{disk:?}");
    let guest = fixture.lab.guest(first.0).unwrap();
    guest.write(&disk, "tether", BYTES).await.unwrap();
    let sum = guest.checksum(&disk, BYTES).await.unwrap();
    assert_eq!(checksum_on_storage(&fixture.lab.storage, volume, BYTES).await, sum);
    let head = guest.command(&format!("read {} 0 16", disk.name)).await.unwrap();
    let wanted: String = pattern("tether", 512)[..16].iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(head, wanted);
    let alias = format!("ua-tether-{}", text(&attached, "/attachment_id"));
    for flag in ["", "--inactive"] {
        let xml = fixture.xml(first.0, flag).await;
        assert!(xml.contains(&alias) && xml.contains("/dev/disk/by-id/wwn-0x6001405"), "F3: {xml}");
        assert!(!xml.contains("/dev/sd"), "F3: {xml}");
    }

    fixture.tether.json(&["detach", &name, first.0]).await.unwrap();
    guest.wait_gone(serial, SEEN).await.unwrap();
    fixture.assert_nothing_left("after the detach").await;

    fixture.attach(&[&name, second.0, "--bus", second.1]).await;
    let disk = fixture.sees(second.0, serial).await;
    assert_eq!(fixture.lab.guest(second.0).unwrap().checksum(&disk, BYTES).await.unwrap(), sum);
    fixture.tether.json(&["detach", &name, second.0]).await.unwrap();
    fixture.assert_nothing_left("after the second detach").await;
    fixture.tether.json(&["volume", "delete", &name]).await.unwrap();
}

#[tokio::test]
#[ignore = "lab"]
async fn a_thick_volume_on_virtio_keeps_its_data_through_detach_and_attach_on_scsi() {
    whole_flow("thick", "data-1", ("c2", "virtio"), ("c3", "scsi")).await;
}

/// F38: what we do not know in a domain's XML stays as it was, byte for byte.
#[tokio::test]
#[ignore = "lab"]
async fn f38_the_rest_of_the_domain_xml_is_unchanged_byte_for_byte() {
    let fixture = Fixture::new().await;
    fixture.volume("thick/xml").await;
    let (live, persistent) = (fixture.xml("c2", "").await, fixture.xml("c2", "--inactive").await);
    assert!(
        persistent.contains("lab:ticket Priority=\"high\"") && persistent.contains("Grüße"),
        "{persistent}"
    );
    for bus in ["virtio", "scsi"] {
        let id = text(&fixture.attach(&["thick/xml", "c2", "--bus", bus]).await, "/attachment_id").to_owned();
        for (before, flag) in [(&live, ""), (&persistent, "--inactive")] {
            let with = fixture.xml("c2", flag).await;
            assert_eq!(&with.replacen(our_disk(&with, &id), "", 1), before, "{flag}");
        }
        fixture.tether.json(&["detach", &id]).await.unwrap();
        assert_eq!(fixture.xml("c2", "").await, live);
        assert_eq!(fixture.xml("c2", "--inactive").await, persistent);
    }
}

/// Any LV of the pool can be exported; only ours can be deleted, and never while exported.
#[tokio::test]
#[ignore = "lab"]
async fn somebody_elses_volume_can_be_attached_and_never_deleted() {
    let fixture = Fixture::new().await;
    fixture.lab.storage.run("lvcreate -qy -Wy -L 16m -n theirs tether").await.unwrap();
    let shown = fixture.tether.json(&["volume", "show", "thick/theirs"]).await.unwrap();
    assert_eq!(
        shown.pointer("/volume/created_by_tether").or(shown.pointer("/created_by_tether")),
        Some(&Value::Bool(false)),
        "{shown:#}"
    );
    fixture.attach(&["thick/theirs", "c2"]).await;
    let (_, error) = fixture.tether.error(&["volume", "delete", "thick/theirs"]).await.unwrap();
    assert_eq!(text(&error, "/reason"), "VOLUME_EXPORTED");
    fixture.tether.json(&["detach", "thick/theirs", "c2"]).await.unwrap();
    let (_, error) = fixture.tether.error(&["volume", "delete", "thick/theirs"]).await.unwrap();
    assert_eq!(text(&error, "/reason"), "NOT_OURS");
    fixture.lab.storage.run("lvs tether/theirs").await.expect("it is still there");
}

/// Left out of a run for its time, not for what it shows: `tests/run long`.
mod long {
    use super::*;

    /// F5: a new thick volume in the place of an old one shows nothing of it.
    #[tokio::test]
    #[ignore = "lab"]
    async fn f5_a_new_volume_shows_nothing_of_an_old_one() {
        let fixture = Fixture::new().await;
        let storage = &fixture.lab.storage;
        storage.run("lvcreate -qy -Wn -L 16m -n old tether && yes secret | head -c 16M | dd of=/dev/tether/old bs=1M oflag=direct iflag=fullblock 2>&1 && lvremove -qy tether/old").await.unwrap();
        fixture.volume("thick/new").await;
        let zeros = "cmp -n 16777216 /dev/tether/new /dev/zero";
        storage.run(zeros).await.expect("all of it is zero");
        fixture.tether.json(&["volume", "create", "thin/new-thin", "16M"]).await.unwrap();
        storage.run("cmp -n 16777216 /dev/tether/new-thin /dev/zero").await.expect("all of it is zero");
    }

    #[tokio::test]
    #[ignore = "lab"]
    async fn disk_options_reach_the_guest() {
        let fixture = Fixture::new().await;
        fixture.volume("thin/options").await;
        fixture
            .attach(&[
                "thin/options",
                "c2",
                "--bus",
                "scsi",
                "--target-device",
                "sdq",
                "--serial",
                "MY_serial.1",
                "--read-only",
                "--cache",
                "writethrough",
                "--io",
                "threads",
                "--discard",
                "ignore",
                "--live-only",
            ])
            .await;
        let disk = fixture.sees("c2", "MY_serial.1").await;
        assert!(disk.read_only);
        let write = fixture.lab.guest("c2").unwrap().write(&disk, "x", 512).await;
        assert!(write.is_err(), "a read-only disk takes no write");
        let xml = fixture.xml("c2", "").await;
        for part in [
            "cache='writethrough'",
            "io='threads'",
            "discard='ignore'",
            "<readonly/>",
            "dev='sdq' bus='scsi'",
            "type='raw'",
        ] {
            assert!(xml.contains(part), "{part} in {xml}");
        }
        assert!(!fixture.xml("c2", "--inactive").await.contains("ua-tether"), "live only");
        fixture.tether.json(&["detach", "thin/options", "c2"]).await.unwrap();
        fixture.assert_nothing_left("after the detach").await;
    }

    /// F10: a guest's volume group inside a volume is not the host's matter.
    #[tokio::test]
    #[ignore = "lab"]
    async fn f10_a_volume_group_inside_a_volume_stays_inside() {
        let fixture = Fixture::new().await;
        let name = "thick/nested";
        let serial = text(&fixture.volume(name).await, "/serial").to_owned();
        // Made as a careless host would, with LVM looking into its own LVs; then forgotten by LVM's cache.
        fixture
            .lab
            .storage
            .run(
                "vgcreate -q --config 'devices{scan_lvs=1}' --devices /dev/tether/nested guest-vg /dev/tether/nested && \
                 vgchange -q -an --config 'devices{scan_lvs=1}' --devices /dev/tether/nested guest-vg",
            )
            .await
            .unwrap();
        fixture.attach(&[name, "c2"]).await;
        fixture.sees("c2", &serial).await;
        let list = fixture.tether.json(&["volume", "list"]).await.unwrap();
        assert!(!list.to_string().contains("guest-vg"), "{list:#}");
        for host in [&fixture.lab.storage, &fixture.lab.compute] {
            let mapped = host.run("ls /dev/mapper").await.unwrap();
            assert!(!mapped.contains("guest"), "{mapped}");
        }
        fixture.tether.json(&["detach", name, "c2"]).await.unwrap();
        fixture.tether.json(&["volume", "delete", name]).await.unwrap();
        fixture.assert_nothing_left("after the delete").await;
    }

    /// A shut-off domain gets the persistent part alone; the guest sees the disk once it runs.
    #[tokio::test]
    #[ignore = "lab"]
    async fn a_shut_off_domain_has_the_disk_when_it_starts() {
        let fixture = Fixture::new().await;
        let serial = text(&fixture.volume("thick/later").await, "/serial").to_owned();
        fixture.lab.compute.run("virsh -q destroy c3").await.unwrap();
        for bus in ["virtio", "scsi"] {
            let attached = fixture.attach(&["thick/later", "c3", "--bus", bus]).await;
            let id = text(&attached, "/attachment_id");
            assert!(fixture.xml("c3", "--inactive").await.contains(id));
            let shown = fixture.tether.json(&["show", id]).await.unwrap();
            let attachment = &shown["attachment"];
            assert_eq!(attachment["in_live_domain"], Value::Bool(false), "{shown:#}");
            assert_eq!(attachment["in_persistent_definition"], Value::Bool(true), "{shown:#}");
            if bus == "scsi" {
                fixture.lab.compute.run_within("virsh -q start c3", Duration::from_secs(60)).await.unwrap();
                fixture.lab.guest("c3").unwrap().wait_up(Duration::from_secs(120)).await.unwrap();
                let disk = fixture.sees("c3", &serial).await;
                assert_eq!(disk.size, 16 << 20);
            }
            fixture.tether.json(&["detach", id]).await.unwrap();
            fixture.assert_nothing_left("after the detach").await;
        }
    }

    #[tokio::test]
    #[ignore = "lab"]
    async fn a_thin_volume_on_scsi_keeps_its_data_through_detach_and_attach_to_the_same_guest() {
        whole_flow("thin", "data.2", ("c2", "scsi"), ("c2", "virtio")).await;
    }
}
