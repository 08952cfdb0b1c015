//! Many at once (rule 9, F19, F33, F37, F46).

use std::time::Instant;

use crate::share::mounts;
use crate::{Fixture, text};

/// Eight attachments at once, spread over the given domains; all are seen, all differ, and all go at once.
async fn eight_at_once(pool: &str, domains: &[&str]) {
    let fixture = Fixture::new().await;
    let mut serials = Vec::new();
    for index in 0..8 {
        serials.push(text(&fixture.volume(&format!("{pool}/p{index}")).await, "/serial").to_owned());
    }
    let domain = |index: usize| domains[index % domains.len()];
    let began = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for index in 0..8 {
        let (tether, domain) = (fixture.tether.clone(), domain(index).to_owned());
        let volume = format!("{pool}/p{index}");
        let bus = if index < 4 { "virtio" } else { "scsi" };
        tasks.spawn(async move { tether.json(&["attach", &volume, &domain, "--bus", bus]).await.unwrap() });
    }
    let attached = tasks.join_all().await;
    println!("8 attachments of {pool} at once to {domains:?}: {:?}", began.elapsed());
    for (index, serial) in serials.iter().enumerate() {
        fixture.sees(domain(index), serial).await;
    }
    if pool == "share" {
        let mounted = mounts(&fixture).await;
        assert_eq!(mounted.lines().count(), 1, "F46: one mount for all: {mounted}");
    } else {
        let sessions = fixture.lab.compute.run("ls /sys/class/iscsi_session | wc -l").await.unwrap();
        assert_eq!(sessions.trim(), "8", "F33: one session each");
    }
    let mut tasks = tokio::task::JoinSet::new();
    for attachment in &attached {
        let (tether, id) = (fixture.tether.clone(), text(attachment, "/attachment_id").to_owned());
        tasks.spawn(async move { tether.json(&["detach", &id]).await.unwrap() });
    }
    tasks.join_all().await;
    fixture.assert_nothing_left("after all").await;
}

#[tokio::test]
#[ignore = "lab"]
async fn f37_eight_attachments_at_once_to_one_domain() {
    eight_at_once("thin", &["c2"]).await;
}

#[tokio::test]
#[ignore = "lab"]
async fn f37_eight_attachments_at_once_to_two_domains() {
    eight_at_once("thin", &["c2", "c3"]).await;
}

#[tokio::test]
#[ignore = "lab"]
async fn f46_eight_files_at_once_to_two_domains_have_one_mount() {
    eight_at_once("share", &["c2", "c3"]).await;
}

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
