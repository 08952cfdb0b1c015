//! The matrix of failures (rules 4 and 8, F11): each step of each verb fails, before and after its effect, in an agent that
//! lives on. The caller is told which step it was, what was begun is taken back or goes on with the same call, nothing of ours
//! is left over, and what is somebody else's is as it was. Each test writes its part of the matrix into
//! `tests/step-failures`. Not here: what the `tether` command makes of a failure (`faults`), and agents that die (`crash`).

use tether_proto::wire::{self, Outcome, VolumeFormat};
use tether_tests::Host;
use tether_tests::tether::FAULT_FILE;
use tonic::{Code, Status};

use crate::crash::{
    detach_rpc, export_rpc, fixture_with_theirs, get_attachment, get_export, left_on_compute, names, outcome,
    pool_content, theirs, unexport_rpc,
};
use crate::matrix::{moments, publish};
use crate::{Fixture, SEEN, attach_with, export, new_id, reason, text};

const MIB: u64 = 1 << 20;
const VOLUME: &str = "fails";
/// The guest that attachments are for.
const GUEST: &str = "c3";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verb {
    Export,
    Unexport,
    Attach,
    Detach,
    Create,
    Extend,
    Delete,
}

/// One verb on one kind of volume.
struct Case<'a> {
    fixture: &'a Fixture,
    verb: Verb,
    pool: &'static str,
    format: VolumeFormat,
    /// The serial of the volume, where it is there all the time.
    serial: String,
    /// What is in the pool when the volume is not.
    empty: String,
}

type Report = Option<wire::OperationReport>;

impl<'a> Case<'a> {
    async fn new(fixture: &'a Fixture, verb: Verb, pool: &'static str, format: VolumeFormat) -> Self {
        let empty = pool_content(fixture).await;
        let serial = match verb {
            Verb::Export | Verb::Unexport | Verb::Attach | Verb::Detach => {
                text(&fixture.volume(&format!("{pool}/{VOLUME}")).await, "/serial").to_owned()
            }
            Verb::Create | Verb::Extend | Verb::Delete => String::new(),
        };
        Self { fixture, verb, pool, format, serial, empty }
    }

    /// The host whose agent does the verb.
    fn host(&self) -> &Host {
        match self.verb {
            Verb::Attach | Verb::Detach => &self.fixture.lab.compute,
            _ => &self.fixture.lab.storage,
        }
    }

    fn path(&self) -> String {
        format!("{}/{VOLUME}", self.pool)
    }

    /// All that the verb needs, and the id that it is called with.
    async fn prepare(&self) -> (String, Option<wire::ConnectionInfo>) {
        match self.verb {
            Verb::Export | Verb::Create => return (new_id(), None),
            Verb::Extend | Verb::Delete => {
                self.create().await.expect("the volume");
                return (new_id(), None);
            }
            Verb::Unexport | Verb::Attach | Verb::Detach => {}
        }
        let (id, info) = export(self.fixture, &self.path()).await;
        if self.verb == Verb::Detach {
            attach_with(self.fixture, &id, GUEST, info.clone()).await.expect("the attachment");
            self.fixture.sees(GUEST, &self.serial).await;
        }
        (id, Some(info))
    }

    async fn call(&self, id: &str, info: Option<&wire::ConnectionInfo>) -> Result<Report, Status> {
        match self.verb {
            Verb::Export => Ok(export_rpc(self.fixture, id, &self.path()).await?.report),
            Verb::Unexport => Ok(unexport_rpc(self.fixture, id).await?.report),
            Verb::Attach => {
                let info = info.expect("it was exported").clone();
                Ok(attach_with(self.fixture, id, GUEST, info).await?.report)
            }
            Verb::Detach => Ok(detach_rpc(self.fixture, id).await?.report),
            Verb::Create => self.create().await,
            Verb::Extend => {
                let request = wire::ExtendVolumeRequest {
                    pool: self.pool.into(),
                    volume: VOLUME.into(),
                    size_bytes: 32 * MIB,
                };
                let mut storage = self.fixture.tether.storage().await.unwrap();
                let extended = storage.extend_volume(request).await?.into_inner();
                assert_eq!(extended.volume.map(|volume| volume.size_bytes), Some(32 * MIB));
                Ok(extended.report)
            }
            Verb::Delete => self.delete().await,
        }
    }

    async fn create(&self) -> Result<Report, Status> {
        let request = wire::CreateVolumeRequest {
            pool: self.pool.into(),
            volume: VOLUME.into(),
            size_bytes: 16 * MIB,
            format: self.format.into(),
            ..Default::default()
        };
        Ok(self.fixture.tether.storage().await.unwrap().create_volume(request).await?.into_inner().report)
    }

    async fn delete(&self) -> Result<Report, Status> {
        let request =
            wire::DeleteVolumeRequest { pool: self.pool.into(), volume: VOLUME.into(), ..Default::default() };
        Ok(self.fixture.tether.storage().await.unwrap().delete_volume(request).await?.into_inner().report)
    }

    /// What the failure left behind, in a word.
    async fn found(&self, id: &str) -> String {
        let fixture = self.fixture;
        let phase = match self.verb {
            Verb::Export | Verb::Unexport => get_export(fixture, id).await.map(|export| export.phase),
            Verb::Attach | Verb::Detach => {
                get_attachment(fixture, id).await.map(|attachment| attachment.phase)
            }
            Verb::Create | Verb::Extend | Verb::Delete => {
                let request = wire::GetVolumeRequest { pool: self.pool.into(), volume: VOLUME.into() };
                let got = fixture.tether.storage().await.unwrap().get_volume(request).await;
                got.map(|volume| format!("{} MiB", volume.into_inner().size_bytes / MIB))
            }
        };
        match phase {
            Ok(phase) => phase,
            Err(status) if status.code() == Code::NotFound => {
                let left = match self.verb {
                    Verb::Attach => left_on_compute(fixture).await,
                    Verb::Export => crate::left_on_storage(&fixture.lab).await,
                    _ => pool_content(fixture).await.replace(&self.empty, ""),
                };
                assert_eq!(left, "", "there is nothing, says the agent");
                "nothing".to_owned()
            }
            Err(status) => panic!("{status:?}"),
        }
    }

    /// Ends what the verb and its preparation made, and sees that nothing is left.
    async fn clean_up(&self, id: &str, when: &str) {
        match self.verb {
            Verb::Attach => {
                self.fixture.sees(GUEST, &self.serial).await;
                self.fixture.detach(id).await;
            }
            Verb::Detach => {
                self.fixture.lab.guest(GUEST).unwrap().wait_gone(&self.serial, SEEN).await.unwrap();
                unexport_rpc(self.fixture, id).await.map(drop).unwrap();
            }
            Verb::Export => unexport_rpc(self.fixture, id).await.map(drop).unwrap(),
            Verb::Create | Verb::Extend => self.delete().await.map(drop).unwrap(),
            Verb::Unexport | Verb::Delete => {}
        }
        assert_eq!(crate::left_on_storage(&self.fixture.lab).await, "", "{when}");
        if matches!(self.verb, Verb::Attach | Verb::Detach) {
            assert_eq!(left_on_compute(self.fixture).await, "", "{when}");
        }
        if self.serial.is_empty() {
            assert_eq!(pool_content(self.fixture).await, self.empty, "{when}");
        }
    }
}

/// Lets each step fail, and writes the part of the matrix, always the same for the same results.
async fn fail_at_each_step(case: &Case<'_>, name: &str) {
    let theirs_before = theirs(case.fixture).await;
    let (id, info) = case.prepare().await;
    let steps = names(case.call(&id, info.as_ref()).await.expect("without a failure").as_ref());
    case.clean_up(&id, "without a failure").await;
    assert!(steps.len() >= 2, "{steps:?}");
    let mut rows = Vec::new();
    for step in &steps {
        for moment in moments(step) {
            let when = format!("{:?} failed {moment} {step}", case.verb);
            let (id, info) = case.prepare().await;
            case.host().put(format!("{step} {moment}\n"), FAULT_FILE, 0o644).await.unwrap();
            let failed = case.call(&id, info.as_ref()).await.expect_err(&when);
            case.host().run(&format!("rm {FAULT_FILE}")).await.unwrap();
            let (_, told, _) = reason(&failed);
            assert_eq!(&told, step, "{when}: {failed:?}");
            assert!(failed.message().contains("planted fault"), "{when}: {failed:?}");
            let found = case.found(&id).await;
            let again = case.call(&id, info.as_ref()).await;
            let again = again.unwrap_or_else(|error| panic!("{when}, and the same call: {error:?}"));
            let retry = outcome(again.as_ref());
            assert_ne!(retry, Outcome::Unspecified, "{when}");
            let retry = retry.as_str_name().trim_start_matches("OUTCOME_");
            rows.push(format!("| {step} | {moment} | {found} | {retry} |"));
            case.clean_up(&id, &when).await;
        }
    }
    assert_eq!(theirs(case.fixture).await, theirs_before);
    let heading = "| step | fails | left behind | the same call |\n|---|---|---|---|";
    publish("step-failures", name, heading, &steps, &rows);
}

/// The four verbs of an attachment.
async fn attachment_failing(pool: &'static str, transport: &str) {
    let fixture = fixture_with_theirs().await;
    for (verb, name) in [
        (Verb::Export, "export"),
        (Verb::Attach, "attach"),
        (Verb::Detach, "detach"),
        (Verb::Unexport, "unexport"),
    ] {
        let case = Case::new(&fixture, verb, pool, VolumeFormat::Unspecified).await;
        fail_at_each_step(&case, &format!("{name}-{transport}")).await;
    }
}

#[tokio::test]
#[ignore = "lab"]
async fn f11_an_attachment_over_iscsi_failing_at_any_step_of_its_life() {
    attachment_failing("thick", "iscsi").await;
}

/// The three verbs of a volume.
async fn volume_failing(pool: &'static str, format: VolumeFormat, kind: &str) {
    let fixture = fixture_with_theirs().await;
    for (verb, name) in [(Verb::Create, "create"), (Verb::Extend, "extend"), (Verb::Delete, "delete")] {
        let case = Case::new(&fixture, verb, pool, format).await;
        fail_at_each_step(&case, &format!("{name}-{kind}")).await;
    }
}

/// Left out of a run for its time, not for what it shows: `tests/run long`.
mod long {
    use super::*;

    #[tokio::test]
    #[ignore = "lab"]
    async fn f11_a_raw_file_failing_at_any_step_of_its_life() {
        volume_failing("share", VolumeFormat::Unspecified, "raw").await;
    }

    #[tokio::test]
    #[ignore = "lab"]
    async fn f11_a_thin_volume_failing_at_any_step_of_its_life() {
        volume_failing("thin", VolumeFormat::Unspecified, "thin").await;
    }

    #[tokio::test]
    #[ignore = "lab"]
    async fn f11_an_attachment_over_nfs_failing_at_any_step_of_its_life() {
        attachment_failing("share", "nfs").await;
    }

    #[tokio::test]
    #[ignore = "lab"]
    async fn f11_a_thick_volume_failing_at_any_step_of_its_life() {
        volume_failing("thick", VolumeFormat::Unspecified, "thick").await;
    }

    #[tokio::test]
    #[ignore = "lab"]
    async fn f11_a_qcow2_file_failing_at_any_step_of_its_life() {
        volume_failing("share", VolumeFormat::Qcow2, "qcow2").await;
    }
}
