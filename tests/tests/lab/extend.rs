//! Volumes grow while guests use them, on both transports (F49): the guest's kernel sees it, what was there stays, what is new
//! is zero (F5), and the end can be written to. Nothing ever shrinks.

use std::time::Duration;

use tether_proto::wire;
use tether_proto::wire::watch_operation_request::Key;
use tether_tests::tether::SHARE;
use tether_tests::{Disk, Guest};

use crate::share::{checksum_in_qcow2, known, nfs};
use crate::{Fixture, SEEN, attach_with, checksum_of, export, our_disk, reason, text, unexport};

const MIB: u64 = 1 << 20;
const OLD: u64 = 16 * MIB;
const NEW: u64 = 40 * MIB;

async fn resize(
    fixture: &Fixture,
    id: &str,
    size_bytes: u64,
) -> Result<wire::ResizeAttachmentResponse, tonic::Status> {
    let request = wire::ResizeAttachmentRequest { attachment_id: id.into(), size_bytes };
    Ok(fixture.tether.compute().await.unwrap().resize_attachment(request).await?.into_inner())
}

/// The volume grows to `NEW` under a guest that has written to it.
async fn grows(volume: &str, options: &[&str], domain: &str, bus: &str) {
    let fixture = Fixture::new().await;
    let storage = &fixture.lab.storage;
    let (pool, name) = volume.split_once('/').unwrap();
    let serial = text(&fixture.create(volume, "16M", options).await, "/serial").to_owned();
    if pool == "thick" {
        plant_old_data(&fixture).await;
    }
    let id = text(&fixture.attach(&[volume, domain, "--bus", bus]).await, "/attachment_id").to_owned();
    let disk = fixture.sees(domain, &serial).await;
    let guest = fixture.lab.guest(domain).unwrap();
    guest.write_at(&disk, "old", 4 * MIB, OLD - 4 * MIB).await.unwrap();
    let old = guest.checksum(&disk, OLD).await.unwrap();
    let (live, persistent) = (fixture.xml(domain, "").await, fixture.xml(domain, "--inactive").await);

    if !options.contains(&"qcow2") {
        let early = resize(&fixture, &id, NEW).await.expect_err("nothing was extended");
        assert_eq!(reason(&early).0, "NOT_EXTENDED", "{early:?}");
        assert!(reason(&early).2.contains("extend"), "{early:?}");
    }
    let extended = fixture.tether.json(&["volume", "extend", volume, "40M"]).await.unwrap();
    guest.wait_size(&serial, NEW, SEEN).await.expect("the guest sees the new size");
    assert_eq!(known(&fixture, pool, name).await.size_bytes, NEW);
    assert_eq!(guest.checksum(&disk, OLD).await.unwrap(), old, "what was there");
    assert_eq!(
        guest.checksum_at(&disk, NEW - OLD, OLD).await.unwrap(),
        zeros(&fixture).await,
        "what is new: {extended:#}"
    );
    guest.write_at(&disk, "new", 2 * MIB, NEW - 2 * MIB).await.expect("the end takes a write");
    let all = guest.checksum(&disk, NEW).await.unwrap();
    assert_eq!(our_disk(&fixture.xml(domain, "").await, &id), our_disk(&live, &id));
    assert_eq!(fixture.xml(domain, "--inactive").await, persistent);

    let again = fixture.tether.json(&["volume", "extend", volume, "40M"]).await.unwrap();
    assert_eq!(text(&again, "/outcome"), "unchanged", "{again:#}");
    let same = resize(&fixture, &id, NEW).await.expect("the same again");
    assert_eq!(same.report.unwrap().outcome(), wire::Outcome::Unchanged);
    shrinks_never(&fixture, volume, &id).await;
    guest.wait_size(&serial, NEW, Duration::ZERO).await.unwrap();
    assert_eq!(guest.checksum(&disk, NEW).await.unwrap(), all, "nothing of this touched the data");

    fixture.detach(&id).await;
    fixture.assert_nothing_left("after the detach").await;
    let stored = match (pool, options.contains(&"qcow2")) {
        ("share", true) => checksum_in_qcow2(storage, &format!("{name}.qcow2"), 0, NEW).await,
        ("share", false) => checksum_of(storage, &format!("{SHARE}/{name}.raw"), 0, NEW).await,
        _ => checksum_of(storage, &format!("/dev/tether/{name}"), 0, NEW).await,
    };
    assert_eq!(stored, all);
    let elsewhere = if domain == "c2" { "c3" } else { "c2" };
    fixture.attach(&[volume, elsewhere]).await;
    let disk = fixture.sees(elsewhere, &serial).await;
    assert_eq!(disk.size, NEW);
    assert_eq!(fixture.lab.guest(elsewhere).unwrap().checksum(&disk, NEW).await.unwrap(), all);
}

/// Somebody's secret lies in the volume group where the volume will grow to.
async fn plant_old_data(fixture: &Fixture) {
    let plant = "lvcreate -qy -Wn -L 64m -n old tether && yes secret | head -c 64M | \
                 dd of=/dev/tether/old bs=1M oflag=direct iflag=fullblock status=none && \
                 lvs --noheadings -o seg_pe_ranges tether/grows tether/old && lvremove -qy tether/old";
    let ranges = fixture.lab.storage.run(plant).await.unwrap();
    // The old one, `/dev/vdb:4-19`, right after `/dev/vdb:0-3`, or this shows nothing.
    let ends: Vec<(u64, u64)> = ranges
        .split_whitespace()
        .filter_map(|range| range.rsplit_once(':')?.1.split_once('-'))
        .map(|(first, last)| (first.parse().unwrap(), last.parse().unwrap()))
        .collect();
    assert!(matches!(ends[..], [grows, old] if old.0 == grows.1 + 1), "{ranges}");
}

/// SHA-256 of what is new when it is zero.
async fn zeros(fixture: &Fixture) -> String {
    let command = format!("head -c {} /dev/zero | sha256sum", NEW - OLD);
    fixture.lab.storage.run(&command).await.unwrap().split(' ').next().unwrap().to_owned()
}

async fn shrinks_never(fixture: &Fixture, volume: &str, id: &str) {
    let (code, error) = fixture.tether.error(&["volume", "extend", volume, "20M"]).await.unwrap();
    assert_eq!((text(&error, "/reason"), code), ("SHRINK_REFUSED", 4), "{error:#}");
    let refused = resize(fixture, id, OLD).await.expect_err("a smaller size");
    assert_eq!(reason(&refused).0, "SHRINK_REFUSED", "{refused:?}");
}

#[tokio::test]
#[ignore = "lab"]
async fn f49_a_qcow2_file_grows_over_nfs_under_a_guest() {
    grows("share/grows", &["--format", "qcow2"], "c3", "virtio").await;
}

async fn writes_at_the_end(guest: &Guest, disk: &Disk) {
    guest.write_at(disk, "end", MIB, disk.size - MIB).await.expect("the end takes a write");
}

/// ResizeAttachment believes what it sees and nothing else: an id that is none or has ended, a size that is none, a file that
/// was replaced, a server that is away.
#[tokio::test]
#[ignore = "lab"]
async fn a_resize_is_refused_when_what_it_needs_is_not_there() {
    let fixture = Fixture::new().await;
    let storage = &fixture.lab.storage;
    let serial = text(&fixture.volume("share/one").await, "/serial").to_owned();
    let (id, info) = export(&fixture, "share/one").await;
    let mut right = info.clone();
    let inode = nfs(&mut right).inode;
    let unknown = resize(&fixture, &id, NEW).await.expect_err("not attached yet");
    assert_eq!(reason(&unknown).0, "ATTACHMENT_NOT_FOUND", "{unknown:?}");
    attach_with(&fixture, &id, "c2", info).await.unwrap();
    let guest = fixture.lab.guest("c2").unwrap();
    fixture.sees("c2", &serial).await;
    for what in ["", "x", "../x"] {
        let refused = resize(&fixture, what, NEW).await.expect_err("nonsense");
        assert_eq!(reason(&refused).0, "INVALID_ARGUMENT", "{what}: {refused:?}");
    }
    let refused = resize(&fixture, &id, 0).await.expect_err("no size");
    assert!(["INVALID_ARGUMENT", "SHRINK_REFUSED"].contains(&reason(&refused).0.as_str()), "{refused:?}");
    let extend = wire::ExtendVolumeRequest { pool: "share".into(), volume: "one".into(), size_bytes: NEW };
    fixture.tether.storage().await.unwrap().extend_volume(extend).await.unwrap();

    storage.run("systemctl stop nfs-server").await.unwrap();
    let away = resize(&fixture, &id, NEW).await.expect_err("the server is away");
    assert_eq!(reason(&away).0, "SERVER_UNREACHABLE", "{away:?}");
    storage.run("systemctl start nfs-server").await.unwrap();
    storage
        .run(&format!("cd {SHARE} && cp -a one.raw copy && mv one.raw away && mv copy one.raw"))
        .await
        .unwrap();
    let wrong = resize(&fixture, &id, NEW).await.expect_err("another file");
    assert_eq!(reason(&wrong).0, "WRONG_DEVICE", "{wrong:?}");
    guest.wait_size(&serial, OLD, Duration::ZERO).await.expect("none of these changed the guest's size");
    storage
        .run(&format!("cd {SHARE} && mv away one.raw && [ $(stat -c %i one.raw) = {inode} ]"))
        .await
        .unwrap();
    resize(&fixture, &id, NEW).await.expect("all is as it should be");
    guest.wait_size(&serial, NEW, SEEN).await.unwrap();
    fixture.detach(&id).await;
    let ended = resize(&fixture, &id, NEW).await.expect_err("it has ended");
    assert_eq!(reason(&ended).0, "ATTACHMENT_ENDED", "{ended:?}");
    unexport(&fixture, &id).await;
    fixture.assert_nothing_left("at the end").await;
}

/// Left out of a run for its time, not for what it shows: `tests/run long`.
mod long {
    use super::*;

    #[tokio::test]
    #[ignore = "lab"]
    async fn f49_f5_a_thick_volume_grows_over_iscsi_under_a_guest_and_shows_no_old_data() {
        grows("thick/grows", &[], "c2", "virtio").await;
    }

    /// A qcow2 file that is told larger before any guest has it: Export says the size that it has, no other is believed, and it is
    /// grown once it is attached. One that is grown further than its storage host was told is still the volume.
    #[tokio::test]
    #[ignore = "lab"]
    async fn f49_a_qcow2_file_has_the_size_that_it_has_whatever_was_told_of_it() {
        const FURTHER: u64 = 48 * MIB;
        let fixture = Fixture::new().await;
        let serial =
            text(&fixture.create("share/q", "16M", &["--format", "qcow2"]).await, "/serial").to_owned();
        let (id, before) = export(&fixture, "share/q").await;
        let extend = wire::ExtendVolumeRequest { pool: "share".into(), volume: "q".into(), size_bytes: NEW };
        fixture.tether.storage().await.unwrap().extend_volume(extend).await.unwrap();
        let told = wire::ConnectionInfo { size_bytes: NEW, ..before.clone() };
        let refused = attach_with(&fixture, &id, "c2", told).await.expect_err("it is not that large");
        assert_eq!(reason(&refused).0, "WRONG_DEVICE", "{refused:?}");
        let again = fixture.tether.json(&["attach", "share/q", "c2", "--id", &id]).await.unwrap();
        assert_eq!(again["attachment"]["size_bytes"], OLD, "{again:#}");
        assert_eq!(fixture.sees("c2", &serial).await.size, OLD);
        let guest = fixture.lab.guest("c2").unwrap();
        for size in [NEW, FURTHER] {
            let resized = resize(&fixture, &id, size).await.unwrap().attachment.unwrap();
            assert_eq!(resized.size_bytes, size);
            guest.wait_size(&serial, size, SEEN).await.unwrap();
        }
        writes_at_the_end(&guest, &fixture.sees("c2", &serial).await).await;
        fixture.detach(&id).await;
        fixture.assert_nothing_left("after the detach").await;
        let reader =
            text(&fixture.attach(&["share/q", "c3", "--read-only"]).await, "/attachment_id").to_owned();
        assert_eq!(fixture.sees("c3", &serial).await.size, FURTHER);
        assert_eq!(known(&fixture, "share", "q").await.size_bytes, FURTHER);
        // Nobody who may only read it can make it larger.
        let refused = resize(&fixture, &reader, 2 * FURTHER).await.expect_err("it is read-only");
        assert_eq!(reason(&refused).0, "READ_ONLY_DISK", "{refused:?}");
        fixture.detach(&reader).await;
        fixture.assert_nothing_left("at the end").await;
    }

    /// libvirt does not resize a read-only disk: that is said before anything is written down, and the next attach sees it all.
    #[tokio::test]
    #[ignore = "lab"]
    async fn f49_a_read_only_disk_of_a_running_guest_is_larger_at_its_next_attach() {
        let fixture = Fixture::new().await;
        for volume in ["thick/fixed", "share/fixed"] {
            let serial = text(&fixture.volume(volume).await, "/serial").to_owned();
            fixture.attach(&[volume, "c2", "--read-only"]).await;
            fixture.sees("c2", &serial).await;
            let (_, error) = fixture.tether.error(&["volume", "extend", volume, "32M"]).await.unwrap();
            assert_eq!(
                (text(&error, "/reason"), text(&error, "/step")),
                ("READ_ONLY_DISK", "validate"),
                "{error:#}"
            );
            assert!(text(&error, "/message").contains("the volume is extended to 32 MiB"), "{error:#}");
            // Nobody has told this host: that makes the disk no other one.
            let reconciled = fixture.tether.json(&["reconcile"]).await.unwrap();
            assert_eq!(reconciled["items"].as_array().map(Vec::len), Some(0), "{reconciled:#}");
            fixture.tether.json(&["detach", volume, "c2"]).await.unwrap();
            fixture.attach(&[volume, "c2"]).await;
            let disk = fixture.sees("c2", &serial).await;
            assert_eq!((disk.size, disk.read_only), (32 << 20, false), "{disk:?}");
            fixture.tether.json(&["detach", volume, "c2"]).await.unwrap();
        }
        fixture.assert_nothing_left("after both").await;
    }

    /// A volume that was extended and whose guest was never told: the next attach has the new size, also of a qcow2 file, which
    /// nobody on the storage host may grow while a hypervisor writes to it.
    #[tokio::test]
    #[ignore = "lab"]
    async fn f49_an_extension_that_no_guest_was_told_of_is_there_at_the_next_attach() {
        let fixture = Fixture::new().await;
        let mut storage = fixture.tether.storage().await.unwrap();
        for (volume, options) in [("raw", &[][..]), ("qcow2", &["--format", "qcow2"])] {
            let name = format!("share/{volume}");
            let serial = text(&fixture.create(&name, "16M", options).await, "/serial").to_owned();
            let id = text(&fixture.attach(&[&name, "c2"]).await, "/attachment_id").to_owned();
            let disk = fixture.sees("c2", &serial).await;
            let guest = fixture.lab.guest("c2").unwrap();
            guest.write(&disk, "before", 4 * MIB).await.unwrap();
            let sum = guest.checksum(&disk, OLD).await.unwrap();
            let extend =
                wire::ExtendVolumeRequest { pool: "share".into(), volume: volume.into(), size_bytes: NEW };
            let extended = storage.extend_volume(extend).await.unwrap().into_inner().volume.unwrap();
            assert_eq!((extended.size_bytes, extended.exported_for.join(",").as_str()), (NEW, id.as_str()));
            let head = format!(
                "qemu-img info -U -f {volume} --output json {SHARE}/{volume}.{volume} | jq '.[\"virtual-size\"]'"
            );
            let size = fixture.lab.storage.run(&head).await.unwrap();
            assert_eq!(
                size.trim(),
                if volume == "raw" { NEW } else { OLD }.to_string(),
                "{volume}: who may grow it"
            );
            guest.write(&disk, "before", 4 * MIB).await.expect("the guest goes on");
            fixture.detach(&id).await;

            fixture.attach(&[&name, "c3"]).await;
            let disk = fixture.sees("c3", &serial).await;
            assert_eq!(disk.size, NEW, "{volume}");
            let guest = fixture.lab.guest("c3").unwrap();
            assert_eq!(guest.checksum(&disk, OLD).await.unwrap(), sum, "{volume}");
            writes_at_the_end(&guest, &disk).await;
            fixture.tether.json(&["detach", &name, "c3"]).await.unwrap();
        }
        fixture.assert_nothing_left("after both").await;
    }

    /// The volumes of a shut-off domain grow, too, and the guest sees it when it starts. So do volumes that nobody has.
    #[tokio::test]
    #[ignore = "lab"]
    async fn f49_volumes_of_a_shut_off_domain_and_of_none_grow() {
        let fixture = Fixture::new().await;
        let compute = &fixture.lab.compute;
        compute.run("virsh -q destroy c3").await.unwrap();
        let volumes: [(&str, &[&str]); 3] =
            [("thin/off", &[]), ("share/raw", &[]), ("share/qcow2", &["--format", "qcow2"])];
        let mut attached = Vec::new();
        for (volume, options) in volumes {
            let serial = text(&fixture.create(volume, "16M", options).await, "/serial").to_owned();
            let id = text(&fixture.attach(&[volume, "c3"]).await, "/attachment_id").to_owned();
            fixture.tether.json(&["volume", "extend", volume, "40M"]).await.unwrap();
            shrinks_never(&fixture, volume, &id).await;
            attached.push((id, serial));
        }
        compute.run_within("virsh -q start c3", Duration::from_secs(60)).await.unwrap();
        let guest = fixture.lab.guest("c3").unwrap();
        guest.wait_up(Duration::from_secs(120)).await.unwrap();
        for (_, serial) in &attached {
            let disk = fixture.sees("c3", serial).await;
            assert_eq!(disk.size, NEW, "{disk:?}");
            writes_at_the_end(&guest, &disk).await;
        }
        for (id, _) in &attached {
            fixture.detach(id).await;
        }
        fixture.assert_nothing_left("after all").await;

        for (volume, _) in volumes {
            fixture.tether.json(&["volume", "extend", volume, "64M"]).await.unwrap();
            fixture.attach(&[volume, "c2"]).await;
        }
        for (_, serial) in &attached {
            assert_eq!(fixture.sees("c2", serial).await.size, 64 * MIB);
        }
    }

    /// QEMU is late with the first resize, and the file was extended once more meanwhile: QEMU cuts it, and the same extension
    /// makes that good.
    #[tokio::test]
    #[ignore = "lab"]
    async fn f49_a_resize_that_comes_late_loses_no_size() {
        let fixture = Fixture::new().await;
        let serial = text(&fixture.volume("share/late").await, "/serial").to_owned();
        let id = text(&fixture.attach(&["share/late", "c2"]).await, "/attachment_id").to_owned();
        let extend = async |size_bytes| {
            let request =
                wire::ExtendVolumeRequest { pool: "share".into(), volume: "late".into(), size_bytes };
            fixture.tether.storage().await.unwrap().extend_volume(request).await.unwrap()
        };
        extend(32 * MIB).await;
        let qemu = "$(cat /run/libvirt/qemu/c2.pid)";
        let compute = &fixture.lab.compute;
        compute.run(&format!("kill -STOP {qemu}")).await.unwrap();
        let request = wire::WatchOperationRequest { key: Some(Key::AttachmentId(id.clone())) };
        let mut steps =
            fixture.tether.compute().await.unwrap().watch_operation(request).await.unwrap().into_inner();
        let late = resize(&fixture, &id, 32 * MIB);
        let meanwhile = async {
            while let Some(event) = steps.message().await.unwrap() {
                if event.step == "resize-disk" {
                    break;
                }
            }
            extend(48 * MIB).await;
            compute.run(&format!("kill -CONT {qemu}")).await.unwrap();
        };
        let (late, ()) = tokio::join!(late, meanwhile);
        late.expect("the late resize ends");
        let cut = fixture.lab.storage.run(&format!("stat -c %s {SHARE}/late.raw")).await.unwrap();
        assert_eq!(cut.trim(), (32 * MIB).to_string(), "QEMU sets the length");
        let extended = fixture.tether.json(&["volume", "extend", "share/late", "48M"]).await.unwrap();
        assert_eq!(text(&extended, "/outcome"), "repaired", "{extended:#}");
        fixture.lab.guest("c2").unwrap().wait_size(&serial, 48 * MIB, SEEN).await.unwrap();
        fixture.detach(&id).await;
        fixture.attach(&["share/late", "c3"]).await;
        assert_eq!(fixture.sees("c3", &serial).await.size, 48 * MIB);
        fixture.tether.json(&["detach", "share/late", "c3"]).await.unwrap();
        fixture.assert_nothing_left("at the end").await;
    }

    #[tokio::test]
    #[ignore = "lab"]
    async fn f49_a_thin_volume_grows_over_iscsi_under_a_guest() {
        grows("thin/grows", &[], "c3", "scsi").await;
    }

    #[tokio::test]
    #[ignore = "lab"]
    async fn f49_a_raw_file_grows_over_nfs_under_a_guest() {
        grows("share/grows", &["--provisioning", "thick"], "c2", "scsi").await;
    }
}
