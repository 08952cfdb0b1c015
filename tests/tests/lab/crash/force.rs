//! The crash matrix of forced calls (rule 10): the agent that passes over what is in the way is killed at each step of it, ends it
//! by force as it began, and still tells what may be lost.

use tether_proto::wire;
use tether_tests::Host;
use tether_tests::tether::FAULT_FILE;
use tonic::Status;

use super::{
    Agent, Row, assert_nothing_left, fixture_with_theirs, get_attachment, get_export, names, outcome, theirs,
    unexport_rpc, write,
};
use crate::matrix::moments;
use crate::{Fixture, export, left_on_storage, text, unexport_by_force};

/// A guest that never lets go: it has no operating system.
const GUEST: &str = "empty";

async fn attach(fixture: &Fixture, volume: &str) -> String {
    text(&fixture.attach(&[volume, GUEST, "--live-only"]).await, "/attachment_id").to_owned()
}

async fn detach_by_force(fixture: &Fixture, id: &str) -> Result<wire::DetachResponse, Status> {
    let request =
        wire::DetachRequest { attachment_id: id.into(), guest_deadline_milliseconds: 1000, force: true };
    Ok(fixture.tether.compute().await.unwrap().detach(request).await?.into_inner())
}

/// A step that fails, and that force passes over, has no moment after its effect: the agent lives.
async fn passed_over(
    host: &Host,
    step: &str,
    moment: &'static str,
    report: Option<&wire::OperationReport>,
) -> Row {
    assert_eq!(moment, "after", "{step}");
    host.run(&format!("rm {FAULT_FILE}")).await.unwrap();
    Row { step: step.to_owned(), moment, found: "passed over", retry: outcome(report) }
}

/// The domain's own XML alone still names the disk, which leads nowhere.
async fn start_anew(fixture: &Fixture) {
    fixture.lab.compute.run(&format!("virsh -q destroy {GUEST} && virsh -q start {GUEST}")).await.unwrap();
}

async fn detach_killed(volume: &str, name: &str) {
    let fixture = fixture_with_theirs().await;
    // What a restarted agent gives the guest to let go is this.
    let hurry = "sed -i 's/^guest_deadline_milliseconds.*/guest_deadline_milliseconds = 1000/' \
                 /etc/tether/compute-agent.toml && systemctl restart tether-compute-agent";
    fixture.lab.compute.run(hurry).await.unwrap();
    fixture.volume(volume).await;
    let theirs_before = theirs(&fixture).await;
    let id = attach(&fixture, volume).await;
    let steps = names(detach_by_force(&fixture, &id).await.unwrap().report.as_ref());
    // Over NFS the guest still has the file open.
    unexport_by_force(&fixture, &id).await.unwrap();
    let mut rows = Vec::new();
    for step in &steps {
        for moment in moments(step) {
            let when = format!("killed {moment} {step}");
            start_anew(&fixture).await;
            let id = attach(&fixture, volume).await;
            let pid = Agent::Compute.plant(&fixture, step, moment).await;
            if let Ok(done) = detach_by_force(&fixture, &id).await {
                rows.push(passed_over(&fixture.lab.compute, step, moment, done.report.as_ref()).await);
                unexport_by_force(&fixture, &id).await.unwrap();
                continue;
            }
            Agent::Compute.comes_back(&fixture, &pid, &when).await;
            let found = match get_attachment(&fixture, &id).await.unwrap() {
                status if status.phase == "ended" => {
                    assert!(!status.may_be_lost.is_empty(), "{when}: {status:?}");
                    "detached"
                }
                status if status.phase == "attached" && status.connected => "not begun",
                other => panic!("{when}: {other:?}"),
            };
            let again = detach_by_force(&fixture, &id).await;
            let again = again.unwrap_or_else(|error| panic!("{when}: {error:?}"));
            assert!(!again.may_be_lost.is_empty(), "{when}: {again:?}");
            rows.push(Row { step: step.clone(), moment, found, retry: outcome(again.report.as_ref()) });
            unexport_by_force(&fixture, &id).await.unwrap();
            assert_eq!(left_on_storage(&fixture.lab).await, "", "{when}");
        }
    }
    fixture.lab.compute.run(&format!("virsh -q destroy {GUEST}")).await.unwrap();
    assert_nothing_left(&fixture, "at the end").await;
    assert_eq!(theirs(&fixture).await, theirs_before);
    write(name, &steps, &rows);
}

/// The compute host is logged in, or has the file open, and its agent is not asked.
async fn unexport_killed(volume: &str, name: &str) {
    let fixture = fixture_with_theirs().await;
    fixture.volume(volume).await;
    let theirs_before = theirs(&fixture).await;
    let id = attach(&fixture, volume).await;
    let steps = names(unexport_by_force(&fixture, &id).await.unwrap().report.as_ref());
    detach_by_force(&fixture, &id).await.unwrap();
    let mut rows = Vec::new();
    for step in &steps {
        for moment in moments(step) {
            let when = format!("killed {moment} {step}");
            start_anew(&fixture).await;
            let id = attach(&fixture, volume).await;
            let pid = Agent::Storage.plant(&fixture, step, moment).await;
            if let Ok(done) = unexport_by_force(&fixture, &id).await {
                rows.push(passed_over(&fixture.lab.storage, step, moment, done.report.as_ref()).await);
                detach_by_force(&fixture, &id).await.unwrap();
                continue;
            }
            Agent::Storage.comes_back(&fixture, &pid, &when).await;
            let found = match get_export(&fixture, &id).await.unwrap() {
                status if status.phase == "ended" => {
                    assert!(!status.may_be_lost.is_empty(), "{when}: {status:?}");
                    assert_eq!(left_on_storage(&fixture.lab).await, "", "{when}");
                    "removed"
                }
                status if status.phase == "exported" && status.enabled => "not begun",
                other => panic!("{when}: {other:?}"),
            };
            let again = unexport_by_force(&fixture, &id).await;
            let again = again.unwrap_or_else(|error| panic!("{when}: {error:?}"));
            assert!(!again.may_be_lost.is_empty(), "{when}: {again:?}");
            rows.push(Row { step: step.clone(), moment, found, retry: outcome(again.report.as_ref()) });
            // The volume is free at once.
            let (next, _) = export(&fixture, volume).await;
            unexport_rpc(&fixture, &next).await.unwrap();
            detach_by_force(&fixture, &id).await.unwrap();
        }
    }
    fixture.lab.compute.run(&format!("virsh -q destroy {GUEST}")).await.unwrap();
    assert_nothing_left(&fixture, "at the end").await;
    assert_eq!(theirs(&fixture).await, theirs_before);
    write(name, &steps, &rows);
}

/// Left out of a run for its time, not for what it shows: `tests/run long`.
mod long {
    use super::*;

    #[tokio::test]
    #[ignore = "lab"]
    async fn f11_f29_a_forced_detach_killed_at_any_step_over_iscsi() {
        detach_killed("thick/crash", "detach-forced-iscsi").await;
    }

    #[tokio::test]
    #[ignore = "lab"]
    async fn f11_f29_a_forced_detach_killed_at_any_step_over_nfs() {
        detach_killed("share/crash", "detach-forced-nfs").await;
    }

    #[tokio::test]
    #[ignore = "lab"]
    async fn f11_a_forced_unexport_killed_at_any_step_over_iscsi() {
        unexport_killed("thick/crash", "unexport-forced-iscsi").await;
    }

    #[tokio::test]
    #[ignore = "lab"]
    async fn f11_a_forced_unexport_killed_at_any_step_over_nfs() {
        unexport_killed("share/crash", "unexport-forced-nfs").await;
    }
}
