//! One volume, one writer, where the share is the pool's directory (rule 2, F7): a hypervisor that has a file open keeps its
//! export, and a file that anybody has open is not deleted.

use std::time::Duration;

use tether_proto::wire;

use crate::share::{mount_of, mounts, shared_with};
use crate::{Fixture, SEEN, reason, text};

/// Refused while QEMU has the file, whoever asks and whatever else is exported; granted at once after the detach, though the
/// share stays for another volume.
#[tokio::test]
#[ignore = "lab"]
async fn f7_a_file_that_a_hypervisor_has_open_is_neither_unexported_nor_given_to_another() {
    let fixture = Fixture::new().await;
    let serial = text(&fixture.volume("share/one").await, "/serial").to_owned();
    fixture.volume("share/two").await;
    let one = text(&fixture.attach(&["share/one", "c2"]).await, "/attachment_id").to_owned();
    let disk = fixture.sees("c2", &serial).await;
    let mut storage = fixture.tether.storage().await.unwrap();
    let request = wire::UnexportRequest { attachment_id: one.clone(), ..Default::default() };
    // Alone on the share, and beside another volume.
    for beside in [false, true] {
        if beside {
            fixture.attach(&["share/two", "c3"]).await;
        }
        let lines = shared_with(&fixture).await;
        let refused = storage.unexport(request.clone()).await.expect_err("QEMU has it open");
        let (word, step, next) = reason(&refused);
        assert_eq!((word.as_str(), step.as_str()), ("VOLUME_IN_USE", "check-closed"), "{refused:?}");
        assert!(
            refused.message().contains("10.99.0.2") || refused.message().contains("fd99::2"),
            "{refused:?}"
        );
        assert!(next.contains("tether detach") && next.contains("/ctl"), "{next}");
        assert_eq!(shared_with(&fixture).await, lines);
        let status = wire::GetExportRequest { attachment_id: one.clone() };
        let status = storage.get_export(status).await.unwrap().into_inner();
        assert!(status.phase == "exported" && status.enabled && status.connected, "{status:?}");
        let (_, error) = fixture.tether.error(&["attach", "share/one", "c3"]).await.unwrap();
        assert_eq!(text(&error, "/reason"), "VOLUME_EXPORTED", "{error:#}");
        fixture.lab.guest("c2").unwrap().write(&disk, "on", 1 << 20).await.expect("the guest goes on");
    }
    let mounted = mounts(&fixture).await;
    let ended = fixture.detach(&one).await;
    assert_eq!(mounts(&fixture).await, mounted, "the share stays mounted for the other volume");
    let closing =
        ended.pointer("/unexport/steps").and_then(|steps| steps.as_array()).expect("the steps").clone();
    let closing = closing.iter().find(|step| step["step"] == "check-closed").expect("the step");
    let took = Duration::from_micros(closing["duration_microseconds"].as_u64().expect("a time"));
    println!("after the detach the file was closed within {took:?}");
    assert!(took < Duration::from_secs(2), "the server was told of the close: {took:?}");
    fixture.lab.guest("c2").unwrap().wait_gone(&serial, SEEN).await.unwrap();
    fixture.attach(&["share/one", "c3"]).await;
    fixture.tether.json(&["detach", "share/one", "c3"]).await.unwrap();
    fixture.tether.json(&["detach", "share/two", "c3"]).await.unwrap();
    fixture.assert_nothing_left("after all").await;
}

/// Left out of a run for its time, not for what it shows: `tests/run long`.
mod long {
    use super::*;

    /// A hypervisor that has the share for another volume can open any file of the pool: what it has open is not deleted.
    #[tokio::test]
    #[ignore = "lab"]
    async fn f7_a_file_that_somebody_has_open_is_neither_deleted_nor_exported() {
        let fixture = Fixture::new().await;
        let compute = &fixture.lab.compute;
        fixture.volume("share/victim").await;
        fixture.volume("share/other").await;
        let other = text(&fixture.attach(&["share/other", "c2"]).await, "/attachment_id").to_owned();
        let folder = mount_of(&fixture, &other).await;
        compute
            .run(&format!(
                "systemd-run --quiet --unit holder sh -c 'exec 3<>{folder}/victim.raw; echo >/run/held; sleep 600' && \
                 until [ -e /run/held ]; do sleep 0.1; done"
            ))
            .await
            .unwrap();
        let (code, error) = fixture.tether.error(&["volume", "delete", "share/victim"]).await.unwrap();
        assert_eq!(
            (text(&error, "/reason"), text(&error, "/step"), code),
            ("VOLUME_IN_USE", "check-closed", 4),
            "{error:#}"
        );
        // Nor is it given to anybody.
        let (code, error) = fixture.tether.error(&["attach", "share/victim", "c3"]).await.unwrap();
        assert_eq!(
            (text(&error, "/reason"), text(&error, "/step"), code),
            ("VOLUME_IN_USE", "check-closed", 4),
            "{error:#}"
        );
        compute.run("systemctl stop holder").await.unwrap();
        fixture.attach(&["share/victim", "c3"]).await;
        fixture.tether.json(&["detach", "share/victim", "c3"]).await.unwrap();
        fixture.tether.json(&["volume", "delete", "share/victim"]).await.unwrap();
        fixture.detach(&other).await;
        fixture.assert_nothing_left("after the deletion").await;
    }
}
