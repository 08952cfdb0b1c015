//! The crash matrix of what nobody asked for: an agent is killed while it takes back what failed, and while the one that was started
//! anew takes back what the one before it had begun. Not here: kills in what was asked for (the other files).

use tether_tests::tether::FAULT_FILE;
use tonic::Code;

use super::{
    Agent, Row, assert_nothing_left, detach_rpc, export_rpc, fixture_with_theirs, get_attachment, get_export,
    left_on_compute, names, outcome, theirs, unexport_rpc, write,
};
use crate::matrix::moments;
use crate::{Fixture, attach_with, export, new_id};

const GUEST: &str = "c3";

/// What makes the agent take back.
#[derive(Clone, Copy)]
enum Cause {
    /// The last step fails: the same call undoes.
    Failure,
    /// It is killed there: the next start undoes.
    Kill,
}

impl Cause {
    fn line(self, last: &str) -> String {
        match self {
            Self::Failure => format!("{last} before\n"),
            Self::Kill => format!("{last} before kill\n"),
        }
    }

    /// How often the agent dies for one row.
    fn deaths(self) -> u32 {
        match self {
            Self::Failure => 1,
            Self::Kill => 2,
        }
    }
}

impl Agent {
    /// It takes back from its last step on, and dies at this step of that. Gives its process id and how often it was restarted.
    async fn plant_undo(
        self,
        fixture: &Fixture,
        cause: Cause,
        last: &str,
        step: &str,
        moment: &str,
    ) -> (String, u32) {
        let host = self.host(fixture);
        let text = format!("{}{step} {moment} kill\n", cause.line(last));
        host.put(text, FAULT_FILE, 0o644).await.unwrap();
        let show = format!("systemctl show -P MainPID -P NRestarts {}", self.unit());
        let told = host.run(&show).await.unwrap();
        let mut told = told.split_whitespace();
        (told.next().unwrap().to_owned(), told.next().unwrap().parse().unwrap())
    }

    /// It died as often as it was to, and the last one has brought all to its end.
    async fn came_through(self, fixture: &Fixture, before: &(String, u32), cause: Cause, when: &str) {
        let restarts = before.1 + cause.deaths();
        let wait = format!(
            "for i in $(seq 300); do [ $(systemctl show -P NRestarts {}) -lt {restarts} ] || exit 0; sleep 0.1; done; \
             cat {FAULT_FILE}; exit 1",
            self.unit()
        );
        self.host(fixture).run(&wait).await.unwrap_or_else(|error| panic!("{when}: {error:#}"));
        self.comes_back(fixture, &before.0, when).await;
    }
}

/// Of an Attach all is taken back, whenever that is cut off.
async fn attach_undo_killed(volume: &'static str, cause: Cause, name: &str) {
    let fixture = fixture_with_theirs().await;
    fixture.volume(volume).await;
    let theirs_before = theirs(&fixture).await;
    let (id, info) = export(&fixture, volume).await;
    let attached = names(attach_with(&fixture, &id, GUEST, info).await.unwrap().report.as_ref());
    let last = attached.last().unwrap();
    let mut undo = names(detach_rpc(&fixture, &id).await.unwrap().report.as_ref());
    // A detach writes down that it begins and that it has ended; an undo that there was nothing.
    undo.retain(|step| !["check-server", "write-journal", "close-journal"].contains(&step.as_str()));
    undo.push("undo-write-journal".to_owned());
    unexport_rpc(&fixture, &id).await.unwrap();
    let mut rows = Vec::new();
    for step in &undo {
        for moment in moments(step) {
            let when = format!("killed {moment} {step} of the undo");
            let (id, info) = export(&fixture, volume).await;
            let before = Agent::Compute.plant_undo(&fixture, cause, last, step, moment).await;
            attach_with(&fixture, &id, GUEST, info.clone()).await.expect_err(&when);
            Agent::Compute.came_through(&fixture, &before, cause, &when).await;
            let status = get_attachment(&fixture, &id).await.expect_err(&when);
            assert_eq!(status.code(), Code::NotFound, "{when}: {status:?}");
            assert_eq!(left_on_compute(&fixture).await, "", "{when}");
            let again = attach_with(&fixture, &id, GUEST, info).await;
            let again = again.unwrap_or_else(|error| panic!("{when}: {error:?}"));
            let retry = outcome(again.report.as_ref());
            rows.push(Row { step: step.clone(), moment, found: "taken back", retry });
            fixture.detach(&id).await;
            assert_nothing_left(&fixture, &when).await;
        }
    }
    assert_eq!(theirs(&fixture).await, theirs_before);
    write(name, &undo, &rows);
}

/// Of an Export all is taken back, whenever that is cut off.
async fn export_undo_killed(volume: &'static str, cause: Cause, name: &str) {
    let fixture = fixture_with_theirs().await;
    fixture.volume(volume).await;
    let theirs_before = theirs(&fixture).await;
    let id = new_id();
    let exported = names(export_rpc(&fixture, &id, volume).await.unwrap().report.as_ref());
    let last = exported.last().unwrap();
    let mut undo = names(unexport_rpc(&fixture, &id).await.unwrap().report.as_ref());
    let of_unexport = ["check-logged-out", "check-closed", "write-journal", "close-journal"];
    undo.retain(|step| !of_unexport.contains(&step.as_str()));
    undo.push("undo-write-journal".to_owned());
    let mut rows = Vec::new();
    for step in &undo {
        for moment in moments(step) {
            let when = format!("killed {moment} {step} of the undo");
            let id = new_id();
            let before = Agent::Storage.plant_undo(&fixture, cause, last, step, moment).await;
            export_rpc(&fixture, &id, volume).await.expect_err(&when);
            Agent::Storage.came_through(&fixture, &before, cause, &when).await;
            let status = get_export(&fixture, &id).await.expect_err(&when);
            assert_eq!(status.code(), Code::NotFound, "{when}: {status:?}");
            assert_nothing_left(&fixture, &when).await;
            let again = export_rpc(&fixture, &id, volume).await;
            let again = again.unwrap_or_else(|error| panic!("{when}: {error:?}"));
            let retry = outcome(again.report.as_ref());
            rows.push(Row { step: step.clone(), moment, found: "taken back", retry });
            unexport_rpc(&fixture, &id).await.unwrap();
            assert_nothing_left(&fixture, &when).await;
        }
    }
    assert_eq!(theirs(&fixture).await, theirs_before);
    write(name, &undo, &rows);
}

/// Left out of a run for its time, not for what it shows: `tests/run crash`.
mod long {
    use super::*;

    #[tokio::test]
    #[ignore = "lab"]
    async fn f11_the_undo_of_an_attach_killed_at_any_step_over_iscsi() {
        attach_undo_killed("thick/crash", Cause::Failure, "attach-undo-iscsi").await;
    }

    #[tokio::test]
    #[ignore = "lab"]
    async fn f11_the_undo_of_an_attach_killed_at_any_step_over_nfs() {
        attach_undo_killed("share/crash", Cause::Failure, "attach-undo-nfs").await;
    }

    #[tokio::test]
    #[ignore = "lab"]
    async fn f11_the_reconciliation_of_an_attach_killed_at_any_step_over_iscsi() {
        attach_undo_killed("thick/crash", Cause::Kill, "attach-reconciled-iscsi").await;
    }

    #[tokio::test]
    #[ignore = "lab"]
    async fn f11_the_undo_of_an_export_killed_at_any_step_over_iscsi() {
        export_undo_killed("thick/crash", Cause::Failure, "export-undo-iscsi").await;
    }

    #[tokio::test]
    #[ignore = "lab"]
    async fn f11_the_undo_of_an_export_killed_at_any_step_over_nfs() {
        export_undo_killed("share/crash", Cause::Failure, "export-undo-nfs").await;
    }

    #[tokio::test]
    #[ignore = "lab"]
    async fn f11_the_reconciliation_of_an_export_killed_at_any_step_over_iscsi() {
        export_undo_killed("thick/crash", Cause::Kill, "export-reconciled-iscsi").await;
    }
}
