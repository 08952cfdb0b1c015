//! What a failure at any step means for those who look from outside (rule 8): what the `tether` command says and undoes, what a
//! guest reads. The agents are built with `fault-injection`: a file says at which step, and whether before or after its
//! effect, they fail. Not here: the table of all steps and verbs (`step_failures`).

use serde_json::Value;
use tether_proto::wire;
use tether_tests::tether::FAULT_FILE;
use tether_tests::{Disk, Guest, Host};

use crate::matrix::moments;
use crate::{Fixture, SEEN, leftovers, new_id, text};

async fn plant(host: &Host, step: &str, moment: &str) {
    host.put(format!("{step} {moment}\n"), FAULT_FILE, 0o644).await.unwrap();
}

async fn mend(host: &Host) {
    host.run(&format!("rm -f {FAULT_FILE}")).await.unwrap();
}

/// The names of the steps in a report.
fn steps(report: &Value) -> Vec<String> {
    let steps = report["steps"].as_array().unwrap_or_else(|| panic!("no steps in {report:#}"));
    steps.iter().map(|step| text(step, "/step").to_owned()).collect()
}

/// An attach that fails before or after any step is undone.
async fn attach_failing(volume: &str) {
    let fixture = Fixture::new().await;
    let serial = text(&fixture.volume(volume).await, "/serial").to_owned();
    let good = fixture.attach(&[volume, "c2"]).await;
    let halves =
        [(&fixture.lab.storage, steps(&good["export"])), (&fixture.lab.compute, steps(&good["attach"]))];
    fixture.tether.json(&["detach", volume, "c2"]).await.unwrap();
    let xml = fixture.xml("c2", "--inactive").await;

    let mut tried = 0;
    for (host, steps) in &halves {
        assert!(steps.len() >= 4, "{steps:?}");
        for step in steps {
            for moment in moments(step) {
                plant(host, step, moment).await;
                let id = new_id();
                let (_, error) = fixture.tether.error(&["attach", volume, "c2", "--id", &id]).await.unwrap();
                mend(host).await;
                let when = format!("{moment} {step}");
                assert_eq!(text(&error, "/step"), step, "{when}: {error:#}");
                assert!(text(&error, "/message").contains("planted fault"), "{when}: {error:#}");
                // The command tells what it undid itself; a part that the agent could not undo would stand there, too.
                let undo = error["undo"].as_str().unwrap_or("nothing is left");
                assert!(undo.ends_with("nothing is left"), "{when}: {error:#}");
                if step == "write-journal" && !error["undo_error"].is_null() {
                    // The agent has nothing to undo, but the command spends the id, too: writing that down
                    // fails as well while the fault is there, is told, and is finished by the detach it names.
                    assert!(text(&error, "/undo_error/message").contains("planted fault"), "{error:#}");
                    assert!(text(&error, "/next").ends_with(&format!("tether detach {id}")), "{error:#}");
                    fixture.tether.json(&["detach", &id]).await.unwrap();
                } else {
                    assert!(error["undo_error"].is_null(), "{when}: {error:#}");
                }
                assert_eq!(leftovers(&fixture.lab).await, "", "{when}");
                tried += 1;
            }
        }
    }
    println!("{tried} failures, each undone");
    assert!(tried >= 2, "one at least on each host");
    assert_eq!(fixture.xml("c2", "--inactive").await, xml);
    assert!(fixture.lab.guest("c2").unwrap().disks().await.unwrap().is_empty());
    // And it was the faults: without one it works.
    fixture.attach(&[volume, "c2"]).await;
    fixture.sees("c2", &serial).await;
}

#[tokio::test]
#[ignore = "lab"]
async fn attach_failing_before_or_after_any_step_undoes_everything() {
    attach_failing("thick/undo").await;
}

/// An undo that fails is told beside the cause, stays recorded, and is finished by a detach.
#[tokio::test]
#[ignore = "lab"]
async fn an_undo_that_fails_is_told_beside_the_cause_and_finished_later() {
    let fixture = Fixture::new().await;
    for (volume, last) in [("thick/both", "logout"), ("share/both", "unmount-share")] {
        fixture.volume(volume).await;
        let id = new_id();
        let faults = format!("verify-domain after\n{last} before\n");
        fixture.lab.compute.put(faults, FAULT_FILE, 0o644).await.unwrap();
        let (_, error) = fixture.tether.error(&["attach", volume, "c2", "--id", &id]).await.unwrap();
        mend(&fixture.lab.compute).await;
        assert_eq!(text(&error, "/step"), "verify-domain", "{error:#}");
        assert!(text(&error, "/undo").contains(last), "{error:#}");
        let shown = fixture.tether.json(&["show", &id]).await.unwrap();
        assert_eq!(text(&shown, "/attachment/phase"), "attaching", "{shown:#}");
        fixture.tether.json(&["detach", &id]).await.unwrap();
        fixture.assert_nothing_left("after the detach").await;
    }
}

/// An extension that failed at any step goes on when it is called again, and meanwhile the volume is as it was: its data, and
/// nothing of somebody else's, whatever size a guest sees (F5).
async fn extend_failing(volume: &str) {
    let fixture = Fixture::new().await;
    let storage = &fixture.lab.storage;
    let serial = text(&fixture.create(volume, "8M", &[]).await, "/serial").to_owned();
    let known = fixture.tether.json(&["volume", "extend", volume, "12M"]).await.unwrap();
    let steps = steps(&known["report"]);
    assert!(steps.len() >= 3, "{steps:?}");
    let guest = fixture.lab.guest("c2").unwrap();
    fixture.attach(&[volume, "c2"]).await;
    let disk = fixture.sees("c2", &serial).await;
    guest.write(&disk, "kept", 12 << 20).await.unwrap();
    let sum = guest.checksum(&disk, 12 << 20).await.unwrap();
    fixture.tether.json(&["detach", volume, "c2"]).await.unwrap();
    // Whatever is free in the volume group has been somebody's before.
    let dirty = "lvcreate -qy -Wn -L 256m -n old tether && yes secret | head -c 256M | \
                 dd of=/dev/tether/old bs=1M oflag=direct iflag=fullblock status=none && lvremove -qy tether/old";
    storage.run(dirty).await.unwrap();
    let mut size = 12;
    for step in &steps {
        for moment in moments(step) {
            size += 4;
            let arguments = ["volume", "extend", volume, &format!("{size}M")];
            plant(storage, step, moment).await;
            let (_, error) = fixture.tether.error(&arguments).await.unwrap();
            assert!(text(&error, "/message").contains("planted fault"), "{moment} {step}: {error:#}");
            mend(storage).await;
            // Whoever has the LV open sees its size change at once: nothing of somebody else's is ever in it.
            let old = format!(
                "dd if=/dev/tether/{} bs=1M skip=12 iflag=direct status=none | tr -d '\\0' | wc -c",
                volume.split_once('/').unwrap().1
            );
            assert_eq!(storage.run(&old).await.unwrap().trim(), "0", "{moment} {step}");
            fixture.attach(&[volume, "c2"]).await;
            let disk = fixture.sees("c2", &serial).await;
            assert_eq!(guest.checksum(&disk, 12 << 20).await.unwrap(), sum, "{moment} {step}");
            all_zero(&guest, &disk, 12 << 20, &format!("{moment} {step}")).await;
            fixture.tether.json(&["detach", volume, "c2"]).await.unwrap();
            fixture.tether.json(&arguments).await.expect("the next call finishes it");
        }
    }
    fixture.attach(&[volume, "c2"]).await;
    let disk = fixture.sees("c2", &serial).await;
    assert_eq!(disk.size, size << 20);
    assert_eq!(guest.checksum(&disk, 12 << 20).await.unwrap(), sum);
    all_zero(&guest, &disk, 12 << 20, "at the end").await;
    fixture.tether.json(&["detach", volume, "c2"]).await.unwrap();
    assert_eq!(leftovers(&fixture.lab).await, "");
}

/// From here on the guest reads zeros.
async fn all_zero(guest: &Guest, disk: &Disk, start: u64, when: &str) {
    let zeros =
        format!("run dd if=/dev/{} bs=1M skip={} 2>/dev/null | tr -d '\\0' | wc -c", disk.name, start >> 20);
    assert_eq!(guest.command(&zeros).await.unwrap().trim_end_matches(';'), "0", "{when}");
}

/// Left out of a run for its time, not for what it shows: `tests/run long`.
mod long {
    use super::*;

    #[tokio::test]
    #[ignore = "lab"]
    async fn f5_an_extension_failing_at_any_step_shows_no_old_data_and_is_finished_by_the_next_call() {
        extend_failing("thick/longer").await;
    }

    /// Telling the guest fails at any step: it is told by the next call, and is none the worse.
    #[tokio::test]
    #[ignore = "lab"]
    async fn a_resize_failing_at_any_step_is_finished_by_the_next_call() {
        let fixture = Fixture::new().await;
        let compute = &fixture.lab.compute;
        for (volume, options) in [("thin/told", &[][..]), ("share/told", &["--format", "qcow2"])] {
            let serial = text(&fixture.create(volume, "16M", options).await, "/serial").to_owned();
            let id = text(&fixture.attach(&[volume, "c2"]).await, "/attachment_id").to_owned();
            let disk = fixture.sees("c2", &serial).await;
            let guest = fixture.lab.guest("c2").unwrap();
            guest.write(&disk, "kept", 1 << 20).await.unwrap();
            let sum = guest.checksum(&disk, 16 << 20).await.unwrap();
            let extend = async |size: u64| {
                let (pool, volume) = volume.split_once('/').unwrap();
                let request =
                    wire::ExtendVolumeRequest { pool: pool.into(), volume: volume.into(), size_bytes: size };
                fixture.tether.storage().await.unwrap().extend_volume(request).await.expect("it is extended");
            };
            let resize = async |size: u64| {
                let request = wire::ResizeAttachmentRequest { attachment_id: id.clone(), size_bytes: size };
                fixture.tether.compute().await.unwrap().resize_attachment(request).await
            };
            let mut size = 20 << 20;
            extend(size).await;
            let report = resize(size).await.expect("it is told").into_inner().report;
            let steps: Vec<String> =
                crate::share::steps(report.as_ref()).into_iter().map(str::to_owned).collect();
            assert!(steps.iter().any(|step| step == "resize-disk"), "{steps:?}");
            for step in &steps {
                for moment in moments(step) {
                    size += 4 << 20;
                    extend(size).await;
                    plant(compute, step, moment).await;
                    let failed = resize(size).await.expect_err("a planted fault");
                    mend(compute).await;
                    assert!(failed.message().contains("planted fault"), "{moment} {step}: {failed:?}");
                    resize(size).await.expect("the next call");
                    guest.wait_size(&serial, size, SEEN).await.unwrap();
                    assert_eq!(guest.checksum(&disk, 16 << 20).await.unwrap(), sum, "{moment} {step}");
                }
            }
            fixture.detach(&id).await;
            assert_eq!(leftovers(&fixture.lab).await, "");
        }
    }
}
