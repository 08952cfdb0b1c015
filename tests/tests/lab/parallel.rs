//! Many at once (rule 9, F33, F37).

use std::time::Instant;

use crate::{Fixture, text};

/// Eight attachments at once, spread over the given domains; all are seen, all differ, and all go at once.
async fn eight_at_once(domains: &[&str]) {
    let fixture = Fixture::new().await;
    let mut serials = Vec::new();
    for index in 0..8 {
        serials.push(text(&fixture.volume(&format!("thin/p{index}")).await, "/serial").to_owned());
    }
    let domain = |index: usize| domains[index % domains.len()];
    let began = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for index in 0..8 {
        let (tether, domain) = (fixture.tether.clone(), domain(index).to_owned());
        let bus = if index < 4 { "virtio" } else { "scsi" };
        tasks.spawn(async move {
            tether.json(&["attach", &format!("thin/p{index}"), &domain, "--bus", bus]).await.unwrap()
        });
    }
    let attached = tasks.join_all().await;
    println!("8 attachments at once to {domains:?}: {:?}", began.elapsed());
    for (index, serial) in serials.iter().enumerate() {
        fixture.sees(domain(index), serial).await;
    }
    let sessions = fixture.lab.compute.run("ls /sys/class/iscsi_session | wc -l").await.unwrap();
    assert_eq!(sessions.trim(), "8", "F33: one session each");
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
    eight_at_once(&["c2"]).await;
}

#[tokio::test]
#[ignore = "lab"]
async fn f37_eight_attachments_at_once_to_two_domains() {
    eight_at_once(&["c2", "c3"]).await;
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
