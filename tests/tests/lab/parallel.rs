//! Many at once (rule 9, F19, F33, F37, F46).

use std::time::Instant;

use crate::share::mounts;
use crate::{Fixture, text};

/// F19: an attach that comes while the last detach of the share is on its way keeps its mount, or gets a new one.
#[tokio::test]
#[ignore = "lab"]
async fn f19_an_attach_beside_the_last_detach_has_its_mount() {
    let fixture = Fixture::new().await;
    let volumes = ["share/odd", "share/even"];
    let mut serials = Vec::new();
    for volume in volumes {
        serials.push(text(&fixture.volume(volume).await, "/serial").to_owned());
    }
    let mut last = text(&fixture.attach(&[volumes[0], "c2"]).await, "/attachment_id").to_owned();
    for turn in 1..=6 {
        let (domain, volume) = (["c2", "c3"][turn % 2], volumes[turn % 2]);
        let arguments = [volume, domain];
        let (attached, _) = tokio::join!(fixture.attach(&arguments), fixture.detach(&last));
        let mounted = mounts(&fixture).await;
        assert_eq!(mounted.lines().count(), 1, "turn {turn}: {mounted}");
        let disk = fixture.sees(domain, &serials[turn % 2]).await;
        fixture.lab.guest(domain).unwrap().write(&disk, "turn", 64 << 10).await.expect("it is alive");
        attached["attachment_id"].as_str().unwrap().clone_into(&mut last);
    }
    fixture.detach(&last).await;
    fixture.assert_nothing_left("after the last").await;
}

/// F33: the same call from four clients at once makes one session and one disk, and all get the same answer.
#[tokio::test]
#[ignore = "lab"]
async fn f33_the_same_attach_four_times_at_once_is_one_attachment() {
    let fixture = Fixture::new().await;
    fixture.volume("thin/once").await;
    let id = crate::new_id();
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let (tether, id) = (fixture.tether.clone(), id.clone());
        tasks.spawn(async move { tether.json(&["attach", "thin/once", "c2", "--id", &id]).await.unwrap() });
    }
    tasks.join_all().await;
    let sessions = fixture.lab.compute.run("ls /sys/class/iscsi_session | wc -l").await.unwrap();
    assert_eq!(sessions.trim(), "1");
    assert_eq!(fixture.xml("c2", "").await.matches("ua-tether").count(), 1);
    fixture.tether.json(&["detach", &id]).await.unwrap();
    fixture.assert_nothing_left("after the detach").await;
}

/// Left out of a run for its time, not for what it shows: `tests/run long`.
mod long {
    use super::*;

    /// F37: many attachments at once, of every kind to both domains; all are seen, all differ, and all go at once.
    #[tokio::test]
    #[ignore = "lab"]
    async fn f37_sixteen_attachments_at_once_over_both_transports_to_two_domains() {
        let (count, pools, domains) = (16, ["thin", "share"], ["c2", "c3"]);
        let fixture = Fixture::new().await;
        let domain = |index: usize| domains[index % domains.len()];
        // Every domain has disks of every pool.
        let pool = |index: usize| pools[index / domains.len() % pools.len()];
        let volume = |index: usize| format!("{}/p-{index}", pool(index));
        crate::make_volumes(&fixture.lab.storage, "p", 16).await;
        for index in 0..count {
            if pool(index) == "share" {
                fixture.volume(&volume(index)).await;
            }
        }
        let began = Instant::now();
        let mut tasks = tokio::task::JoinSet::new();
        for index in 0..count {
            let (tether, domain, volume) = (fixture.tether.clone(), domain(index).to_owned(), volume(index));
            let bus = if index < count / 2 { "virtio" } else { "scsi" };
            tasks.spawn(async move {
                let attached = tether.json(&["attach", &volume, &domain, "--bus", bus]).await.unwrap();
                (domain, attached)
            });
        }
        let attached = tasks.join_all().await;
        println!("{count} attachments at once: {:?}", began.elapsed());
        for (domain, attachment) in &attached {
            fixture.sees(domain, text(attachment, "/attachment/serial")).await;
        }
        let mounted = mounts(&fixture).await;
        assert_eq!(mounted.lines().count(), 1, "F46: one mount for all files: {mounted}");
        let sessions = fixture.lab.compute.run("ls /sys/class/iscsi_session | wc -l").await.unwrap();
        assert_eq!(sessions.trim(), (count / pools.len()).to_string(), "F33: one session for each LV");
        let mut tasks = tokio::task::JoinSet::new();
        for (_, attachment) in &attached {
            let (tether, id) = (fixture.tether.clone(), text(attachment, "/attachment_id").to_owned());
            tasks.spawn(async move { tether.json(&["detach", &id]).await.unwrap() });
        }
        tasks.join_all().await;
        fixture.assert_nothing_left("after all").await;
    }
}
