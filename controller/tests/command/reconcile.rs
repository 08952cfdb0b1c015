//! `tether reconcile` over several hosts, one of which may be away.

use tether_proto::wire::{ReconcileAction, ReconcileItem};

use crate::fakes::{Lab, lock};

const ID: &str = "5f1c0e0a-7d1f-4a53-9d3c-0b7f3c0f7d11";

fn item(action: ReconcileAction, done: bool, problem: &str) -> ReconcileItem {
    ReconcileItem {
        key: ID.into(),
        object: "export".into(),
        action: action.into(),
        why: "its export was cut off".into(),
        done,
        problem: problem.into(),
    }
}

#[tokio::test]
async fn what_was_found_and_done_is_told_and_a_dry_run_says_what_would_be() {
    let lab = Lab::up().await;
    let ran = lab.tether(&["reconcile"]).await;
    assert_eq!(ran.exit, 0, "{ran:?}");
    assert!(ran.out.contains("everything is as the journals have it"), "{}", ran.out);
    assert!(ran.out.contains("2 as they should be"), "{}", ran.out);
    *lock(&lab.storage.findings) = vec![item(ReconcileAction::Undo, true, "")];
    let ran = lab.tether(&["reconcile"]).await;
    let row = ran.out.lines().nth(1).unwrap();
    for cell in ["storage1", "export", ID, "undo", "done", "its export was cut off"] {
        assert!(row.contains(cell), "{cell}: {}", ran.out);
    }
    let ran = lab.tether(&["reconcile", "--dry-run"]).await;
    assert_eq!(ran.exit, 0, "{ran:?}");
    assert!(ran.out.lines().nth(1).unwrap().contains("planned"), "{}", ran.out);
    let json = lab.tether(&["--json", "reconcile", "--dry-run"]).await.json();
    assert_eq!((json["dry_run"].as_bool(), json["unchanged"].as_u64()), (Some(true), Some(2)));
    assert_eq!(
        (json["items"][0]["action"].as_str(), json["items"][0]["done"].as_bool()),
        (Some("undo"), Some(false))
    );
}

#[tokio::test]
async fn what_could_not_be_done_fails_the_command_and_says_why() {
    let lab = Lab::up().await;
    let problem = "PORTAL_UNREACHABLE: no portal answers; see that the storage host is up";
    *lock(&lab.compute.findings) = vec![item(ReconcileAction::Restore, false, problem)];
    let ran = lab.tether(&["reconcile"]).await;
    assert_eq!(ran.exit, 1, "{ran:?}");
    assert!(ran.out.contains("failed") && ran.out.contains(problem), "{}", ran.out);
    let json = lab.tether(&["--json", "reconcile"]).await.json();
    assert_eq!(json["items"][0]["problem"], problem);
}
