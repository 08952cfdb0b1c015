//! The crash matrix of ResizeAttachment: the compute agent is killed at each step of it, while a guest has the disk. Each row
//! needs a volume of its own, for a volume never shrinks.

use tether_proto::wire;
use tonic::Status;

use super::{
    Agent, MIB, Row, assert_nothing_left, fixture_with_theirs, get_attachment, names, outcome, theirs, write,
};
use crate::matrix::moments;
use crate::{Fixture, SEEN, attach_with, export, text};

const OLD: u64 = 16 * MIB;
const NEW: u64 = 32 * MIB;

/// A volume that the guest `c3` has, and that its storage host has made larger.
struct Extended {
    id: String,
    serial: String,
}

impl Extended {
    async fn new(fixture: &Fixture, pool: &str, options: &[&str]) -> Self {
        let volume = format!("{pool}/crash");
        let serial = text(&fixture.create(&volume, "16M", options).await, "/serial").to_owned();
        let (id, info) = export(fixture, &volume).await;
        attach_with(fixture, &id, "c3", info).await.unwrap();
        fixture.lab.guest("c3").unwrap().wait_size(&serial, OLD, SEEN).await.unwrap();
        let request =
            wire::ExtendVolumeRequest { pool: pool.into(), volume: "crash".into(), size_bytes: NEW };
        fixture.tether.storage().await.unwrap().extend_volume(request).await.unwrap();
        Self { id, serial }
    }

    async fn resize(&self, fixture: &Fixture) -> Result<wire::ResizeAttachmentResponse, Status> {
        let request = wire::ResizeAttachmentRequest { attachment_id: self.id.clone(), size_bytes: NEW };
        Ok(fixture.tether.compute().await.unwrap().resize_attachment(request).await?.into_inner())
    }

    async fn remove(self, fixture: &Fixture, pool: &str, when: &str) {
        fixture.detach(&self.id).await;
        assert_nothing_left(fixture, when).await;
        let request =
            wire::DeleteVolumeRequest { pool: pool.into(), volume: "crash".into(), ..Default::default() };
        fixture.tether.storage().await.unwrap().delete_volume(request).await.unwrap();
    }
}

async fn resize_killed(pool: &str, options: &[&str], name: &str) {
    let fixture = fixture_with_theirs().await;
    let theirs_before = theirs(&fixture).await;
    let volume = Extended::new(&fixture, pool, options).await;
    let steps = names(volume.resize(&fixture).await.unwrap().report.as_ref());
    volume.remove(&fixture, pool, "without a kill").await;
    let mut rows = Vec::new();
    for step in &steps {
        for moment in moments(step) {
            let when = format!("killed {moment} {step}");
            let volume = Extended::new(&fixture, pool, options).await;
            let pid = Agent::Compute.plant(&fixture, step, moment).await;
            volume.resize(&fixture).await.expect_err(&when);
            Agent::Compute.comes_back(&fixture, &pid, &when).await;
            let guest = fixture.lab.guest("c3").unwrap();
            let found = match get_attachment(&fixture, &volume.id).await.unwrap().size_bytes {
                OLD => "not begun",
                NEW => {
                    guest.wait_size(&volume.serial, NEW, SEEN).await.unwrap();
                    "resized"
                }
                other => panic!("{when}: {other} bytes"),
            };
            let again = volume.resize(&fixture).await.unwrap_or_else(|error| panic!("{when}: {error:?}"));
            guest.wait_size(&volume.serial, NEW, SEEN).await.unwrap();
            rows.push(Row { step: step.clone(), moment, found, retry: outcome(again.report.as_ref()) });
            volume.remove(&fixture, pool, &when).await;
        }
    }
    assert_eq!(theirs(&fixture).await, theirs_before);
    write(name, &steps, &rows);
}

/// Left out of a run for its time, not for what it shows: `tests/run long`.
mod long {
    use super::*;

    #[tokio::test]
    #[ignore = "lab"]
    async fn f11_f49_a_resize_killed_at_any_step_over_iscsi() {
        resize_killed("thin", &[], "resize-iscsi").await;
    }

    #[tokio::test]
    #[ignore = "lab"]
    async fn f11_f49_a_resize_killed_at_any_step_over_nfs() {
        resize_killed("share", &[], "resize-nfs").await;
    }

    #[tokio::test]
    #[ignore = "lab"]
    async fn f11_f49_a_resize_of_a_qcow2_file_killed_at_any_step() {
        resize_killed("share", &["--format", "qcow2"], "resize-qcow2").await;
    }
}
