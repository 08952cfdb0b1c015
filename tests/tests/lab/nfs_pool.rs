//! A shared directory that is full, not there, read-only or open to others, and what else may lie in it.

use std::time::Duration;

use serde_json::Value;
use tether_proto::wire;
use tether_tests::tether::SHARE;
use tonic::Code;

use crate::share::{file_facts, known};
use crate::{Fixture, SEEN, checksum_of, new_id, our_disk, reason, text};

/// What the storage agent tells of a pool.
async fn pool(fixture: &Fixture, name: &str) -> wire::Pool {
    let reply = fixture.tether.storage().await.unwrap().list_pools(wire::ListPoolsRequest {}).await.unwrap();
    let pools = reply.into_inner().pools;
    let names: Vec<&str> = pools.iter().map(|pool| pool.pool.as_str()).collect();
    assert_eq!(names, ["share", "thick", "thin"]);
    pools.into_iter().find(|pool| pool.pool == name).unwrap()
}

/// Takes all room but this much, also what is kept for root: for a user's write it is none.
pub(crate) async fn fill(fixture: &Fixture, but: &str) {
    let command = format!(
        "fallocate -l $(($(stat -f -c '%f*%S' {SHARE}) - {but})) {SHARE}/filler && test $(stat -f -c %a {SHARE}) = 0"
    );
    fixture.lab.storage.run(&command).await.unwrap();
}

/// The room of the pools is what the file system and LVM say, and what was promised is the sum of the volumes.
#[tokio::test]
#[ignore = "lab"]
async fn pools_tell_the_room_that_the_kernel_tells() {
    let fixture = Fixture::new().await;
    let storage = &fixture.lab.storage;
    fixture.create("share/thick", "64M", &["--provisioning", "thick"]).await;
    fixture.create("share/thin", "900M", &["--provisioning", "thin"]).await;
    fixture.create("share/qcow2", "800M", &["--format", "qcow2"]).await;
    fixture.volume("thick/one").await;
    let share = pool(&fixture, "share").await;
    let told = storage.run(&format!("stat -f -c '%b %f %a %S' {SHARE}")).await.unwrap();
    let told: Vec<u64> = told.split_whitespace().map(|number| number.parse().unwrap()).collect();
    let [blocks, free, available, unit] = told[..] else { panic!("{told:?}") };
    assert_eq!(share.size_bytes, blocks * unit);
    assert!((available * unit..=free * unit).contains(&share.free_bytes), "{share:?} and {told:?}");
    assert_eq!(share.provisioned_bytes, (64 + 900 + 800) << 20);
    assert_eq!((share.transport(), share.problem.as_str()), (wire::Transport::Nfs, ""));
    let thick = pool(&fixture, "thick").await;
    let told = storage.run("vgs --noheadings --units b --nosuffix -o vg_size,vg_free tether").await.unwrap();
    let told: Vec<u64> = told.split_whitespace().map(|number| number.parse().unwrap()).collect();
    assert_eq!((thick.size_bytes, thick.free_bytes), (told[0], told[1]));
    let listed = fixture.tether.output(&["pool", "list"]).await.unwrap();
    assert!(listed.stdout.contains(&share.size_bytes.to_string()), "{listed:?}");

    // Each kind of file is what it was asked to be, and only the first takes its space.
    let taken = format!("cd {SHARE} && stat -c '%n %s %b' thick.raw thin.raw");
    let taken = storage.run(&taken).await.unwrap();
    let blocks = |name: &str| -> u64 {
        let line = taken.lines().find(|line| line.starts_with(name)).unwrap();
        line.split(' ').nth(2).unwrap().parse().unwrap()
    };
    assert!(taken.contains("thick.raw 67108864") && taken.contains("thin.raw 943718400"), "{taken}");
    assert!(blocks("thick.raw") * 512 >= 64 << 20 && blocks("thin.raw") * 512 < 1 << 20, "{taken}");
    // And it keeps it, whatever the guest discards, unless that is asked for.
    for (volume, options, discard) in [
        ("share/thick", &[][..], "ignore"),
        ("share/thick", &["--discard", "unmap"], "unmap"),
        ("share/thin", &[], "unmap"),
    ] {
        let attached = fixture.attach(&[&[volume, "c2"], options].concat()).await;
        let id = text(&attached, "/attachment_id");
        let xml = fixture.xml("c2", "--inactive").await;
        assert!(our_disk(&xml, id).contains(&format!("discard='{discard}'")), "{volume} {options:?}: {xml}");
        fixture.detach(id).await;
    }
    let image = storage.run(&format!("qemu-img info --output json {SHARE}/qcow2.qcow2")).await.unwrap();
    let image: Value = serde_json::from_str(&image).unwrap();
    assert_eq!((text(&image, "/format"), image["virtual-size"].as_u64()), ("qcow2", Some(800 << 20)));
    assert_eq!(text(&image, "/format-specific/data/compat"), "1.1", "version 3");
    assert!(image["backing-filename"].is_null(), "{image:#}");
    let volume = known(&fixture, "share", "qcow2").await;
    assert_eq!(
        (volume.format(), volume.provisioning(), volume.transport()),
        (wire::VolumeFormat::Qcow2, wire::Provisioning::Thin, wire::Transport::Nfs)
    );
}

/// A directory that is not mounted, read-only, or open to others is no pool, whether the agent saw it go or finds it so at its
/// start; nothing is written to what lies under it; and it is one again when it is mended.
#[tokio::test]
#[ignore = "lab"]
async fn a_share_that_is_not_there_or_read_only_or_open_to_others_is_refused_and_untouched() {
    let fixture = Fixture::new().await;
    let storage = &fixture.lab.storage;
    fixture.volume("share/before").await;
    let list = format!("ls -A {SHARE} | sort");
    let files = storage.run(&list).await.unwrap();
    for (what, breaks, mends) in [
        ("not mounted", format!("umount {SHARE}"), format!("mount {SHARE}")),
        ("read-only", format!("mount -o remount,ro {SHARE}"), format!("mount -o remount,rw {SHARE}")),
        ("open to others", format!("chmod 733 {SHARE}"), format!("chmod 711 {SHARE}")),
        ("somebody else's", format!("chown 64055 {SHARE}"), format!("chown root {SHARE}")),
    ] {
        storage.run(&breaks).await.unwrap();
        let broken = storage.run(&list).await.unwrap();
        let looks = if what == "not mounted" { 2 } else { 1 };
        for look in 0..looks {
            if look > 0 {
                storage.run("systemctl restart tether-storage-agent").await.unwrap();
            }
            let (code, error) = fixture.tether.error(&["volume", "create", "share/new", "1M"]).await.unwrap();
            assert_eq!((text(&error, "/reason"), code), ("POOL_UNAVAILABLE", 4), "{what}: {error:#}");
            assert!(text(&error, "/message").contains(SHARE), "{what}: {error:#}");
            let arguments = ["attach", "share/before", "c2", "--id", &new_id()];
            let (_, error) = fixture.tether.error(&arguments).await.unwrap();
            assert_eq!(text(&error, "/reason"), "POOL_UNAVAILABLE", "{what}: {error:#}");
            let (_, error) =
                fixture.tether.error(&["volume", "extend", "share/before", "32M"]).await.unwrap();
            assert_eq!(text(&error, "/reason"), "POOL_UNAVAILABLE", "{what}: {error:#}");
            let told = pool(&fixture, "share").await;
            assert!(!told.problem.is_empty() && told.size_bytes == 0, "{what}: {told:?}");
            assert_eq!(pool(&fixture, "thick").await.problem, "", "{what}: the others are none the worse");
            assert_eq!(storage.run(&list).await.unwrap(), broken, "{what}");
        }
        storage.run(&mends).await.unwrap();
        assert_eq!(storage.run(&list).await.unwrap(), files, "{what}");
        assert_eq!(pool(&fixture, "share").await.problem, "", "{what}, mended");
    }
    fixture.tether.json(&["volume", "create", "share/new", "1M"]).await.expect("all is well again");
    fixture.assert_nothing_left("at the end").await;
}

/// What somebody else laid into the directory is not followed, not overwritten, not exported and not deleted.
#[tokio::test]
#[ignore = "lab"]
async fn a_symlink_or_file_of_somebody_else_in_the_pool_is_refused_and_untouched() {
    let fixture = Fixture::new().await;
    let storage = &fixture.lab.storage;
    storage
        .run(&format!(
            "cd {SHARE} && echo precious >/run/target && ln -s /run/target link.raw && ln -s /run/made-by-tether dangling.raw && \
             ln -s /run/target link.qcow2 && echo theirs >file.raw && mkdir folder.raw && mkfifo pipe.raw"
        ))
        .await
        .unwrap();
    let look = format!(
        "cd {SHARE} && ls -l --time-style=full-iso . /run/target && cat /run/target file.raw; ls /run/made-by-tether 2>&1; true"
    );
    let before = storage.run(&look).await.unwrap();
    let mut client = fixture.tether.storage().await.unwrap();
    for (volume, format) in [
        ("link", wire::VolumeFormat::Raw),
        ("dangling", wire::VolumeFormat::Raw),
        ("link", wire::VolumeFormat::Qcow2),
        ("file", wire::VolumeFormat::Raw),
        ("folder", wire::VolumeFormat::Raw),
        ("pipe", wire::VolumeFormat::Raw),
    ] {
        let request = wire::CreateVolumeRequest {
            pool: "share".into(),
            volume: volume.into(),
            size_bytes: 1 << 20,
            format: format.into(),
            provisioning: wire::Provisioning::Unspecified.into(),
            multi_attach: false,
        };
        let refused = client.create_volume(request).await.expect_err(volume);
        let (reason, step, next) = reason(&refused);
        assert!(["NOT_OURS", "DIFFERENT_PARAMETERS"].contains(&reason.as_str()), "{volume}: {refused:?}");
        assert!(!step.is_empty() && !next.is_empty(), "{volume}: {refused:?}");
        let delete =
            wire::DeleteVolumeRequest { pool: "share".into(), volume: volume.into(), ..Default::default() };
        if let Err(refused) = client.delete_volume(delete).await {
            assert_eq!(refused.code(), Code::FailedPrecondition, "{volume}: {refused:?}");
        }
        let (_, error) = fixture
            .tether
            .error(&["attach", &format!("share/{volume}"), "c2", "--id", &new_id()])
            .await
            .unwrap();
        assert!(["NOT_OURS", "VOLUME_NOT_FOUND"].contains(&text(&error, "/reason")), "{volume}: {error:#}");
    }
    assert_eq!(storage.run(&look).await.unwrap(), before);
    fixture.assert_nothing_left("after all").await;
}

/// Left out of a run for its time, not for what it shows: `tests/run long`.
mod long {
    use super::*;

    /// The file of a volume in use was moved and a link put in its place: what the link leads to is neither read nor written, and
    /// the guest goes on with its own file.
    #[tokio::test]
    #[ignore = "lab"]
    async fn a_link_in_the_place_of_a_file_in_use_leads_nobody_astray() {
        let fixture = Fixture::new().await;
        let storage = &fixture.lab.storage;
        let serial = text(&fixture.volume("share/used").await, "/serial").to_owned();
        let id = text(&fixture.attach(&["share/used", "c2"]).await, "/attachment_id").to_owned();
        let disk = fixture.sees("c2", &serial).await;
        storage
            .run(&format!(
                "cd {SHARE} && echo precious >/run/target && mv used.raw away && ln -s /run/target used.raw"
            ))
            .await
            .unwrap();
        let (_, error) = fixture.tether.error(&["volume", "extend", "share/used", "32M"]).await.unwrap();
        assert!(["WRONG_DEVICE", "NOT_OURS"].contains(&text(&error, "/reason")), "{error:#}");
        assert_eq!(storage.run("cat /run/target").await.unwrap(), "precious\n");
        fixture.lab.guest("c2").unwrap().write(&disk, "used", 1 << 20).await.unwrap();
        fixture.detach(&id).await;
        fixture.lab.guest("c2").unwrap().wait_gone(&serial, SEEN).await.unwrap();
        fixture.assert_nothing_left("after the detach").await;
        storage.run(&format!("cd {SHARE} && rm used.raw && mv away used.raw")).await.unwrap();
        assert!(file_facts(&fixture, "used.raw").await.starts_with("600 64055 64055 1 "));
        let id = text(&fixture.attach(&["share/used", "c3"]).await, "/attachment_id").to_owned();
        fixture.detach(&id).await;
    }

    /// A full share: an allocated volume is refused and leaves nothing; a guest that needs more room than there is pauses, alone,
    /// and goes on when there is room again.
    #[tokio::test]
    #[ignore = "lab"]
    async fn a_full_share_refuses_a_thick_volume_and_pauses_only_the_guest_that_needs_room() {
        let fixture = Fixture::new().await;
        let (storage, compute) = (&fixture.lab.storage, &fixture.lab.compute);
        let thick = fixture.create("share/thick", "16M", &["--provisioning", "thick"]).await;
        let thin = fixture.create("share/thin", "64M", &["--provisioning", "thin"]).await;
        let ids = [
            text(&fixture.attach(&["share/thin", "c2"]).await, "/attachment_id").to_owned(),
            text(&fixture.attach(&["share/thick", "c3"]).await, "/attachment_id").to_owned(),
        ];
        let (needs, has) = (fixture.lab.guest("c2").unwrap(), fixture.lab.guest("c3").unwrap());
        let disk = fixture.sees("c2", text(&thin, "/serial")).await;
        let other = fixture.sees("c3", text(&thick, "/serial")).await;
        fill(&fixture, "(24 << 20)").await;

        let listing = format!("ls -la --time-style=+ {SHARE}; find /var/lib/tether/storage-agent | sort");
        let before = storage.run(&listing).await.unwrap();
        let arguments = ["volume", "create", "share/too-much", "256M", "--provisioning", "thick"];
        let (code, error) = fixture.tether.error(&arguments).await.unwrap();
        assert_eq!((text(&error, "/reason"), code), ("POOL_FULL", 8), "{error:#}");
        let (code, error) = fixture.tether.error(&["volume", "extend", "share/thick", "512M"]).await.unwrap();
        assert_eq!((text(&error, "/reason"), code), ("POOL_FULL", 8), "{error:#}");
        assert_eq!(storage.run(&listing).await.unwrap(), before, "nothing is left");
        assert_eq!(known(&fixture, "share", "thick").await.size_bytes, 16 << 20);

        let command = format!("write {} full {}", disk.name, 48 << 20);
        let writing = needs.command_within(&command, Duration::from_secs(150));
        let making_room = async {
            compute
                .run("until virsh domstate c2 --reason | grep 'paused (I/O error)'; do sleep 0.2; done")
                .await
                .unwrap();
            assert!(compute.run("virsh domblkerror c2").await.unwrap().contains("no space"));
            has.write(&other, "has-room", 8 << 20).await.expect("the allocated volume has its room");
            assert_eq!(compute.run("virsh domstate c3").await.unwrap().trim(), "running");
            storage.run(&format!("rm {SHARE}/filler")).await.unwrap();
            compute.run("virsh -q resume c2").await.unwrap();
        };
        let (written, ()) = tokio::join!(writing, making_room);
        written.expect("the guest's write ends well");
        let sum = needs.checksum(&disk, 48 << 20).await.unwrap();
        for id in &ids {
            fixture.detach(id).await;
        }
        assert_eq!(checksum_of(storage, &format!("{SHARE}/thin.raw"), 0, 48 << 20).await, sum);
        fixture.assert_nothing_left("after both").await;
    }
}
