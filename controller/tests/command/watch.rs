//! `tether watch`: events of all hosts, and hosts that go away.

use tether_proto::wire::{Event, EventKind, EventState};

use crate::fakes::{Lab, Trouble, lock, refusal};

const AT: i64 = 1_790_000_000_250_000;

fn event(kind: EventKind, state: EventState) -> Event {
    Event { kind: kind.into(), state: state.into(), at_unix_microseconds: AT, ..Event::default() }
}

fn watching() -> Event {
    event(EventKind::Watching, EventState::Happened)
}

fn filling(state: EventState) -> Event {
    let message = "91 % of its room are taken; its threshold is 80 %".into();
    Event { pool: "thin".into(), message, ..event(EventKind::PoolFilling, state) }
}

fn io_error() -> Event {
    Event {
        attachment_id: "5f1c0e0a-7d1f-4a53-9d3c-0b7f3c0f7d11".into(),
        domain: "c2".into(),
        message: "an I/O of the guest failed: the guest was paused".into(),
        ..event(EventKind::GuestIoError, EventState::Happened)
    }
}

#[tokio::test]
async fn events_of_all_hosts_are_told_a_line_each_until_ctrl_c() {
    let lab = Lab::up().await;
    *lock(&lab.storage.agent.events) = [vec![filling(EventState::Began), watching()]].into();
    *lock(&lab.compute.agent.events) = [vec![watching(), io_error()]].into();
    let said = ["pool filling began", "guest io error", "storage1 is watched", "compute1 is watched"];
    let ran = lab.tether_until_said(&["watch"], &said).await;
    assert_eq!(ran.exit, 130, "{ran:?}");
    for line in [
        "2026-09-21T14:13:20.250Z storage1: pool filling began: pool thin: 91 % of its room are taken; its threshold is 80 %",
        "2026-09-21T14:13:20.250Z compute1: guest io error: domain c2, attachment \
         5f1c0e0a-7d1f-4a53-9d3c-0b7f3c0f7d11: an I/O of the guest failed: the guest was paused",
    ] {
        assert!(ran.out.lines().any(|told| told == line), "{line}: {}", ran.out);
    }
    assert!(ran.err.contains("nothing was changed"), "{}", ran.err);
    assert!(lab.mutations().iter().all(|call| call == "Watch"));
}

#[tokio::test]
async fn a_host_that_goes_away_is_told_once_and_asked_again() {
    let lab = Lab::up().await;
    *lock(&lab.storage.agent.events) =
        [vec![watching()], vec![filling(EventState::Ended), watching()]].into();
    let said = ["the agent of storage1 has ended", "\"state\":\"ended\""];
    let ran = lab.tether_until_said(&["--json", "watch"], &said).await;
    assert_eq!(ran.exit, 130, "{ran:?}");
    let told: Vec<serde_json::Value> =
        ran.out.lines().map(|line| serde_json::from_str(line).expect("one object a line")).collect();
    let gone: Vec<_> = told.iter().filter(|told| told["error"]["reason"] == "AGENT_UNREACHABLE").collect();
    assert_eq!(gone.len(), 1, "{told:?}");
    assert_eq!(gone[0]["host"], "storage1");
    let ended = told.iter().find(|told| told["state"] == "ended").expect("told after it came back");
    assert_eq!((&ended["kind"], &ended["pool"]), (&"pool_filling".into(), &"thin".into()));
}

#[tokio::test]
async fn a_watch_that_no_host_lets_in_ends() {
    let lab = Lab::up().await;
    let refused = || Trouble::Refuse(refusal(tonic::Code::PermissionDenied, "WRONG_ROLE", "no role", &[]));
    lab.storage.agent.trouble("Watch", refused());
    lab.compute.agent.trouble("Watch", refused());
    let ran = lab.tether(&["watch"]).await;
    assert_eq!(ran.exit, 7, "{ran:?}");
    assert_eq!(ran.err.matches("no role").count(), 2, "{}", ran.err);
}
