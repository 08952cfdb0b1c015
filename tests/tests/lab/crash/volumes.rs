//! The crash matrix of a volume's life: the storage agent is killed at each step of making, extending and deleting it.

use tether_proto::wire::{self, VolumeFormat};
use tonic::{Code, Status};

use super::{Agent, MIB, Row, fixture_with_theirs, names, outcome, pool_content, theirs, write};
use crate::matrix::moments;

async fn volume_killed(pool: &str, format: VolumeFormat, name: &str) {
    let fixture = fixture_with_theirs().await;
    let theirs_before = theirs(&fixture).await;
    let empty = pool_content(&fixture).await;
    let create = || async {
        let request = wire::CreateVolumeRequest {
            pool: pool.into(),
            volume: "crash".into(),
            size_bytes: 16 * MIB,
            format: format.into(),
            ..Default::default()
        };
        Ok::<_, Status>(fixture.tether.storage().await.unwrap().create_volume(request).await?.into_inner())
    };
    let extend = || async {
        let request =
            wire::ExtendVolumeRequest { pool: pool.into(), volume: "crash".into(), size_bytes: 32 * MIB };
        Ok::<_, Status>(fixture.tether.storage().await.unwrap().extend_volume(request).await?.into_inner())
    };
    let delete = || async {
        let request =
            wire::DeleteVolumeRequest { pool: pool.into(), volume: "crash".into(), ..Default::default() };
        Ok::<_, Status>(fixture.tether.storage().await.unwrap().delete_volume(request).await?.into_inner())
    };
    let get = || async {
        let request = wire::GetVolumeRequest { pool: pool.into(), volume: "crash".into() };
        fixture.tether.storage().await.unwrap().get_volume(request).await.map(tonic::Response::into_inner)
    };
    let creating = names(create().await.unwrap().report.as_ref());
    let extending = names(extend().await.unwrap().report.as_ref());
    let deleting = names(delete().await.unwrap().report.as_ref());
    let mut rows = Vec::new();
    for step in &creating {
        for moment in moments(step) {
            let when = format!("create killed {moment} {step}");
            let pid = Agent::Storage.plant(&fixture, step, moment).await;
            create().await.expect_err(&when);
            Agent::Storage.comes_back(&fixture, &pid, &when).await;
            let found = match get().await {
                Ok(volume) if volume.size_bytes == 16 * MIB => "created",
                Err(status) if status.code() == Code::NotFound => {
                    assert_eq!(pool_content(&fixture).await, empty, "{when}");
                    "taken back"
                }
                other => panic!("{when}: {other:?}"),
            };
            let again = create().await.unwrap_or_else(|error| panic!("{when}: {error:?}"));
            rows.push(Row { step: step.clone(), moment, found, retry: outcome(again.report.as_ref()) });
            delete().await.unwrap();
            assert_eq!(pool_content(&fixture).await, empty, "{when}");
        }
    }
    write(&format!("create-{name}"), &creating, &rows);
    rows.clear();
    for step in &extending {
        for moment in moments(step) {
            let when = format!("extend killed {moment} {step}");
            create().await.unwrap();
            let pid = Agent::Storage.plant(&fixture, step, moment).await;
            extend().await.expect_err(&when);
            Agent::Storage.comes_back(&fixture, &pid, &when).await;
            let found = match get().await.unwrap().size_bytes / MIB {
                16 => "not begun",
                32 => "extended",
                other => panic!("{when}: {other} MiB"),
            };
            let again = extend().await.unwrap_or_else(|error| panic!("{when}: {error:?}"));
            assert_eq!(again.volume.as_ref().map(|volume| volume.size_bytes), Some(32 * MIB), "{when}");
            rows.push(Row { step: step.clone(), moment, found, retry: outcome(again.report.as_ref()) });
            delete().await.unwrap();
            assert_eq!(pool_content(&fixture).await, empty, "{when}");
        }
    }
    write(&format!("extend-{name}"), &extending, &rows);
    rows.clear();
    for step in &deleting {
        for moment in moments(step) {
            let when = format!("delete killed {moment} {step}");
            create().await.unwrap();
            let pid = Agent::Storage.plant(&fixture, step, moment).await;
            delete().await.expect_err(&when);
            Agent::Storage.comes_back(&fixture, &pid, &when).await;
            let found = match get().await {
                Ok(_) => "not begun",
                Err(status) if status.code() == Code::NotFound => "deleted",
                other => panic!("{when}: {other:?}"),
            };
            let again = delete().await.unwrap_or_else(|error| panic!("{when}: {error:?}"));
            rows.push(Row { step: step.clone(), moment, found, retry: outcome(again.report.as_ref()) });
            assert_eq!(pool_content(&fixture).await, empty, "{when}");
        }
    }
    assert_eq!(theirs(&fixture).await, theirs_before);
    write(&format!("delete-{name}"), &deleting, &rows);
}

#[tokio::test]
#[ignore = "lab"]
async fn f11_a_file_killed_at_any_step_of_its_life() {
    volume_killed("share", VolumeFormat::Unspecified, "file").await;
}

/// Left out of a run for its time, not for what it shows: `tests/run long`.
mod long {
    use super::*;

    #[tokio::test]
    #[ignore = "lab"]
    async fn f11_a_thin_volume_killed_at_any_step_of_its_life() {
        volume_killed("thin", VolumeFormat::Unspecified, "thin").await;
    }

    #[tokio::test]
    #[ignore = "lab"]
    async fn f11_a_qcow2_file_killed_at_any_step_of_its_life() {
        volume_killed("share", VolumeFormat::Qcow2, "qcow2").await;
    }

    #[tokio::test]
    #[ignore = "lab"]
    async fn f11_a_thick_volume_killed_at_any_step_of_its_life() {
        volume_killed("thick", VolumeFormat::Unspecified, "thick").await;
    }
}
