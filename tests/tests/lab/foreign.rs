//! What is not ours is not touched (rule 6, F16).

use tether_tests::foreign::{self, THEIR_TARGET};

use crate::{Fixture, attach_with, export, iscsi, text, unexport};

/// A target, a session, a disk in a guest and a node record that somebody else made.
pub(crate) async fn plant(fixture: &Fixture) {
    foreign::plant(&fixture.lab).await.unwrap();
}

/// All that can be seen of it.
pub(crate) async fn seen(fixture: &Fixture) -> (String, String) {
    foreign::seen(&fixture.lab).await.unwrap()
}

/// F16: through an attach, a failed attach and a detach beside it, somebody else's things stay as they were.
#[tokio::test]
#[ignore = "lab"]
async fn f16_a_foreign_target_session_disk_and_record_are_untouched() {
    let fixture = Fixture::new().await;
    plant(&fixture).await;
    let before = seen(&fixture).await;
    assert!(
        before.0.contains("tpgt_1") && before.1.contains("LOGGED_IN") && before.1.contains("vdz"),
        "{before:?}"
    );
    fixture.sees("c2", "theirs").await;

    let serial = text(&fixture.volume("thick/ours").await, "/serial").to_owned();
    let (id, mut info) = export(&fixture, "thick/ours").await;
    iscsi(&mut info).chap_secret = "wrong-wrong-wrong".into();
    attach_with(&fixture, &id, "c2", info).await.unwrap_err();
    assert_eq!(seen(&fixture).await, before, "after a failed attach");
    unexport(&fixture, &id).await;

    fixture.attach(&["thick/ours", "c2"]).await;
    fixture.sees("c2", &serial).await;
    for agent in [(&fixture.lab.storage, "storage"), (&fixture.lab.compute, "compute")] {
        agent.0.run(&format!("systemctl restart tether-{}-agent", agent.1)).await.unwrap();
    }
    assert_eq!(seen(&fixture).await, before, "after an attach and a restart");
    fixture.tether.json(&["detach", "thick/ours", "c2"]).await.unwrap();
    assert_eq!(seen(&fixture).await, before, "after a detach");
    let disk = fixture.sees("c2", "theirs").await;
    fixture.lab.guest("c2").unwrap().write(&disk, "still-works", 1 << 20).await.unwrap();
}

/// A target under our name that the journal does not know is refused and left alone.
#[tokio::test]
#[ignore = "lab"]
async fn a_target_of_our_name_that_we_did_not_make_is_refused() {
    let fixture = Fixture::new().await;
    fixture.volume("thick/name").await;
    let id = crate::new_id();
    let target = format!("{}:{id}", tether_tests::tether::IQN_PREFIX);
    let folder = format!("/sys/kernel/config/target/iscsi/{target}");
    fixture.lab.storage.run(&format!("mkdir -p {folder}/tpgt_1")).await.unwrap();
    let (_, error) = fixture.tether.error(&["attach", "thick/name", "c2", "--id", &id]).await.unwrap();
    assert_eq!(text(&error, "/reason"), "NOT_OURS", "{error:#}");
    fixture
        .lab
        .storage
        .run(&format!("ls -d {folder}/tpgt_1 && rmdir {folder}/tpgt_1 {folder}"))
        .await
        .unwrap();
    fixture.assert_nothing_left("after the refusal").await;
}

/// Left out of a run for its time, not for what it shows: `tests/run long`.
mod long {
    use super::*;

    /// `list --all`: what is on both hosts, and whose it is. What nobody can tell is an orphan, and stays through a reconcile.
    #[tokio::test]
    #[ignore = "lab"]
    async fn f16_all_objects_are_listed_as_owned_foreign_or_orphaned_and_orphans_stay() {
        let fixture = Fixture::new().await;
        plant(&fixture).await;
        let (storage, compute) = (&fixture.lab.storage, &fixture.lab.compute);
        for volume in ["thick/ours", "share/ours"] {
            fixture.volume(volume).await;
            fixture.attach(&[volume, "c3"]).await;
        }
        let orphan = format!("{}:{}", tether_tests::tether::IQN_PREFIX, crate::new_id());
        storage.run(&format!("mkdir -p /sys/kernel/config/target/iscsi/{orphan}/tpgt_1")).await.unwrap();
        compute.run(&format!("mkdir -p /etc/iscsi/nodes/{orphan}/10.99.0.1,3260,1")).await.unwrap();
        let objects = || async {
            let listed = fixture.tether.json(&["list", "--all"]).await.unwrap();
            let objects = listed["objects"].as_array().expect("objects").clone();
            let cells = ["host", "kind", "ownership", "name"];
            let lines: Vec<String> = objects
                .iter()
                .map(|object| cells.map(|cell| text(object, &format!("/{cell}")).to_owned()).join(" "))
                .collect();
            lines
        };
        let listed = objects().await;
        for wanted in [
            format!("storage target foreign {THEIR_TARGET}"),
            format!("storage target orphaned {orphan}"),
            "storage backstore foreign iblock_0/foreign".to_owned(),
            format!("compute session foreign {THEIR_TARGET}"),
            format!("compute node-record foreign {THEIR_TARGET}"),
            format!("compute node-record orphaned {orphan}"),
        ] {
            assert!(listed.contains(&wanted), "{wanted}: {listed:#?}");
        }
        for (owned, times) in [
            ("storage target owned", 1),
            ("storage backstore owned", 1),
            ("storage share owned", 2),
            ("compute session owned", 1),
            ("compute node-record owned", 1),
            ("compute mount owned", 1),
            ("compute disk owned", 2),
        ] {
            let found = listed.iter().filter(|line| line.starts_with(owned)).count();
            assert_eq!(found, times, "{owned}: {listed:#?}");
        }
        fixture.tether.json(&["reconcile"]).await.unwrap();
        assert_eq!(objects().await, listed, "a reconcile touches none of them");
        storage
            .run(&format!("cd /sys/kernel/config/target/iscsi && rmdir {orphan}/tpgt_1 {orphan}"))
            .await
            .unwrap();
        compute.run(&format!("rm -r /etc/iscsi/nodes/{orphan}")).await.unwrap();
    }
}
