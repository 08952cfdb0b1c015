//! The crash matrix of attachments: the compute agent is killed at each step of Attach and Detach, to a guest that runs and to one
//! that is shut off. Not here: forced ones (`force`), and resizes (`resize`).

use tether_proto::wire::{self, DiskCache};
use tonic::{Code, Status};

use super::{
    Agent, Row, assert_nothing_left, detach_rpc, fixture_with_theirs, get_attachment, left_on_compute, names,
    outcome, theirs, unexport_rpc, write,
};
use crate::matrix::moments;
use crate::{Fixture, SEEN, export, text};

const GUEST: &str = "c3";

/// What is attached, and how.
#[derive(Clone, Copy)]
struct Case {
    volume: &'static str,
    cache: DiskCache,
    /// The domain is shut off.
    shut_off: bool,
}

impl Case {
    fn of(volume: &'static str) -> Self {
        Self { volume, cache: DiskCache::Unspecified, shut_off: false }
    }

    /// The lab with the volume and the domain; gives the volume's serial.
    async fn prepare(self) -> (Fixture, String) {
        let fixture = fixture_with_theirs().await;
        let serial = text(&fixture.volume(self.volume).await, "/serial").to_owned();
        if self.shut_off {
            fixture.lab.compute.run(&format!("virsh -q destroy {GUEST}")).await.unwrap();
        }
        (fixture, serial)
    }

    async fn attach(
        self,
        fixture: &Fixture,
        id: &str,
        info: wire::ConnectionInfo,
    ) -> Result<wire::AttachResponse, Status> {
        let request = wire::AttachRequest {
            attachment_id: id.to_owned(),
            domain: GUEST.to_owned(),
            connection_info: Some(info),
            disk: Some(wire::DiskOptions { cache: self.cache.into(), ..Default::default() }),
        };
        Ok(fixture.tether.compute().await.unwrap().attach(request).await?.into_inner())
    }

    /// The domain has the disk.
    async fn has(self, fixture: &Fixture, serial: &str) {
        if self.shut_off {
            assert!(fixture.xml(GUEST, "--inactive").await.contains(serial), "not in the definition");
        } else {
            fixture.sees(GUEST, serial).await;
        }
    }

    async fn has_not(self, fixture: &Fixture, serial: &str) {
        if self.shut_off {
            assert!(!fixture.xml(GUEST, "--inactive").await.contains(serial), "still in the definition");
        } else {
            fixture.lab.guest(GUEST).unwrap().wait_gone(serial, SEEN).await.unwrap();
        }
    }
}

async fn attach_killed(case: Case, name: &str) {
    let (fixture, serial) = case.prepare().await;
    let theirs_before = theirs(&fixture).await;
    let (id, info) = export(&fixture, case.volume).await;
    let steps = names(case.attach(&fixture, &id, info).await.unwrap().report.as_ref());
    fixture.detach(&id).await;
    let mut rows = Vec::new();
    for step in &steps {
        for moment in moments(step) {
            let when = format!("killed {moment} {step}");
            let (id, info) = export(&fixture, case.volume).await;
            let pid = Agent::Compute.plant(&fixture, step, moment).await;
            case.attach(&fixture, &id, info.clone()).await.expect_err(&when);
            Agent::Compute.comes_back(&fixture, &pid, &when).await;
            let found = match get_attachment(&fixture, &id).await {
                Ok(status) if status.phase == "attached" => "attached",
                Err(status) if status.code() == Code::NotFound => {
                    assert_eq!(left_on_compute(&fixture).await, "", "{when}");
                    "taken back"
                }
                other => panic!("{when}: {other:?}"),
            };
            let again =
                case.attach(&fixture, &id, info).await.unwrap_or_else(|error| panic!("{when}: {error:?}"));
            case.has(&fixture, &serial).await;
            rows.push(Row { step: step.clone(), moment, found, retry: outcome(again.report.as_ref()) });
            fixture.detach(&id).await;
            assert_nothing_left(&fixture, &when).await;
        }
    }
    assert_eq!(theirs(&fixture).await, theirs_before);
    write(name, &steps, &rows);
}

async fn detach_killed(case: Case, name: &str) {
    let (fixture, serial) = case.prepare().await;
    let theirs_before = theirs(&fixture).await;
    let begin = async || {
        let (id, info) = export(&fixture, case.volume).await;
        case.attach(&fixture, &id, info).await.unwrap();
        id
    };
    let id = begin().await;
    let steps = names(detach_rpc(&fixture, &id).await.unwrap().report.as_ref());
    unexport_rpc(&fixture, &id).await.unwrap();
    let mut rows = Vec::new();
    for step in &steps {
        for moment in moments(step) {
            let when = format!("killed {moment} {step}");
            let id = begin().await;
            let pid = Agent::Compute.plant(&fixture, step, moment).await;
            detach_rpc(&fixture, &id).await.expect_err(&when);
            Agent::Compute.comes_back(&fixture, &pid, &when).await;
            let found = match get_attachment(&fixture, &id).await.unwrap().phase.as_str() {
                "ended" => {
                    assert_eq!(left_on_compute(&fixture).await, "", "{when}");
                    "detached"
                }
                "attached" => {
                    case.has(&fixture, &serial).await;
                    "not begun"
                }
                other => panic!("{when}: {other}"),
            };
            let again = detach_rpc(&fixture, &id).await.unwrap_or_else(|error| panic!("{when}: {error:?}"));
            case.has_not(&fixture, &serial).await;
            rows.push(Row { step: step.clone(), moment, found, retry: outcome(again.report.as_ref()) });
            unexport_rpc(&fixture, &id).await.unwrap();
            assert_nothing_left(&fixture, &when).await;
        }
    }
    assert_eq!(theirs(&fixture).await, theirs_before);
    write(name, &steps, &rows);
}

#[tokio::test]
#[ignore = "lab"]
async fn f11_attach_killed_at_any_step_over_iscsi() {
    attach_killed(Case::of("thick/crash"), "attach-iscsi").await;
}

#[tokio::test]
#[ignore = "lab"]
async fn f11_detach_killed_at_any_step_over_nfs() {
    detach_killed(Case::of("share/crash"), "detach-nfs").await;
}

/// Left out of a run for its time, not for what it shows: `tests/run long`.
mod long {
    use super::*;

    #[tokio::test]
    #[ignore = "lab"]
    async fn f11_attach_killed_at_any_step_over_nfs() {
        attach_killed(Case::of("share/crash"), "attach-nfs").await;
    }

    #[tokio::test]
    #[ignore = "lab"]
    async fn f11_detach_killed_at_any_step_over_iscsi() {
        detach_killed(Case::of("thick/crash"), "detach-iscsi").await;
    }

    #[tokio::test]
    #[ignore = "lab"]
    async fn f11_attach_to_a_domain_that_is_shut_off_killed_at_any_step() {
        attach_killed(Case { shut_off: true, ..Case::of("thick/crash") }, "attach-shut-off-iscsi").await;
    }

    #[tokio::test]
    #[ignore = "lab"]
    async fn f11_detach_from_a_domain_that_is_shut_off_killed_at_any_step() {
        detach_killed(Case { shut_off: true, ..Case::of("thick/crash") }, "detach-shut-off-iscsi").await;
    }

    #[tokio::test]
    #[ignore = "lab"]
    async fn f11_detach_of_a_file_that_the_host_cached_killed_at_any_step() {
        let case = Case { cache: DiskCache::Writeback, ..Case::of("share/crash") };
        detach_killed(case, "detach-writeback-nfs").await;
    }
}
