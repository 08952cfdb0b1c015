//! Reconciling: what is missing comes back, a dry run changes nothing, a reboot loses nothing (rule 6, F12, F14, F21, F22).

use std::time::Duration;

use serde_json::Value;
use tether_tests::tether::IQN_PREFIX;

use crate::share::mounts;
use crate::{Fixture, SEEN, leftovers, text};

/// What `tether reconcile` says of a key: action and whether it was done.
fn item(told: &Value, key: &str) -> (String, bool) {
    let items = told["items"].as_array().unwrap_or_else(|| panic!("no items in {told:#}"));
    let item = items.iter().find(|item| item["key"] == key).unwrap_or_else(|| panic!("no {key} in {told:#}"));
    (text(item, "/action").to_owned(), item["done"] == true)
}

/// F12: parts of an export, a session and a mount that somebody took away are named by a dry run, which changes nothing, and
/// brought back by a real one; a second one finds nothing.
#[tokio::test]
#[ignore = "lab"]
async fn f12_what_is_missing_is_told_by_a_dry_run_and_brought_back() {
    let fixture = Fixture::new().await;
    let (storage, compute) = (&fixture.lab.storage, &fixture.lab.compute);
    compute.run("virsh -q destroy c3").await.unwrap();
    let mut ids = Vec::new();
    for volume in ["thick/one", "share/two"] {
        fixture.volume(volume).await;
        ids.push(text(&fixture.attach(&[volume, "c3"]).await, "/attachment_id").to_owned());
    }
    let [iscsi, nfs] = [&ids[0], &ids[1]];
    let told = fixture.tether.json(&["reconcile", "--dry-run"]).await.unwrap();
    assert_eq!(told["items"].as_array().map(Vec::len), Some(0), "{told:#}");
    let whole = leftovers(&fixture.lab).await;

    let target = format!("/sys/kernel/config/target/iscsi/{IQN_PREFIX}:{iscsi}/tpgt_1");
    compute
        .run(&format!("iscsiadm -m session -o show | grep -q {iscsi} && iscsiadm -m node -T {IQN_PREFIX}:{iscsi} --logout >/dev/null; umount {}", mounts(&fixture).await.split_whitespace().nth(4).expect("a mount")))
        .await
        .unwrap();
    // Of the export over iscsi one portal alone, and of the other what would be needed after a boot.
    storage.run(&format!("rmdir {target}/np/*; rm /etc/exports.d/tether-*")).await.unwrap();
    let broken = leftovers(&fixture.lab).await;
    assert_ne!(broken, whole);
    let told = fixture.tether.json(&["reconcile", "--dry-run"]).await.unwrap();
    for (id, lacking) in [(iscsi, format!("{target}/np/")), (nfs, " shared with ".to_owned())] {
        assert_eq!(item(&told, id), ("restore".to_owned(), false), "{told:#}");
        assert!(told.to_string().contains(&lacking), "{lacking}: {told:#}");
    }
    assert_eq!(leftovers(&fixture.lab).await, broken, "a dry run changes nothing");
    // Now nobody is served any more.
    storage.run(&format!("echo 0 >{target}/enable; exportfs -r")).await.unwrap();
    // Exports first: sessions need them.
    fixture.lab.storage.run("systemctl reload tether-storage-agent").await.unwrap();
    let there = format!(
        "for i in $(seq 100); do [ $(cat {target}/enable) = 1 ] && ls -d {target}/np/* >/dev/null && ls /etc/exports.d/tether-* >/dev/null 2>&1 && exit 0; sleep 0.1; done; exit 1"
    );
    storage.run(&there).await.expect("SIGHUP brings the exports back");
    let told = fixture.tether.json(&["reconcile"]).await.unwrap();
    for id in [iscsi, nfs] {
        assert_eq!(item(&told, id), ("restore".to_owned(), true), "{told:#}");
    }
    let told = fixture.tether.json(&["reconcile"]).await.unwrap();
    assert_eq!(told["items"].as_array().map(Vec::len), Some(0), "{told:#}");
    let session = format!(
        "iscsiadm -m node -T {IQN_PREFIX}:{iscsi} --logout >/dev/null && systemctl reload tether-compute-agent && \
         for i in $(seq 100); do grep -qs {iscsi} /sys/class/iscsi_session/*/targetname && exit 0; sleep 0.1; done; exit 1"
    );
    compute.run(&session).await.expect("SIGHUP brings the session back");
    for id in &ids {
        let shown = fixture.tether.json(&["show", id]).await.unwrap();
        assert_eq!(shown["attachment"]["connected"], true, "{shown:#}");
    }
    for id in &ids {
        fixture.detach(id).await;
    }
    fixture.assert_nothing_left("at the end").await;
}

/// F14, F22: the storage host's agent is started with nothing in the kernel and one volume gone: the others come back, the
/// broken one is named, and a guest that wrote all the time goes on with its data.
#[tokio::test]
#[ignore = "lab"]
async fn f14_exports_come_back_at_start_and_a_broken_one_holds_up_none() {
    let fixture = Fixture::new().await;
    let storage = &fixture.lab.storage;
    let serial = text(&fixture.volume("thick/works").await, "/serial").to_owned();
    fixture.volume("thick/gone").await;
    fixture.volume("thick/late").await;
    let works = text(&fixture.attach(&["thick/works", "c2"]).await, "/attachment_id").to_owned();
    let (gone, _) = crate::export(&fixture, "thick/gone").await;
    let (late, _) = crate::export(&fixture, "thick/late").await;
    let disk = fixture.sees("c2", &serial).await;
    let guest = fixture.lab.guest("c2").unwrap();
    guest.write(&disk, "before", 1 << 20).await.unwrap();
    let sum = guest.checksum(&disk, 1 << 20).await.unwrap();
    storage
        .run(&format!(
            "systemctl stop tether-storage-agent; cd /sys/kernel/config/target; for t in iscsi/{IQN_PREFIX}*; do \
             echo 0 >$t/tpgt_1/enable; rm -f $t/tpgt_1/acls/*/lun_0/* $t/tpgt_1/lun/lun_0/*[!a-z_]*; \
             find $t/tpgt_1/acls -mindepth 2 -maxdepth 2 -name 'lun_*' -exec find {{}} -type l -delete \\; -exec rmdir {{}} \\; ; \
             rmdir $t/tpgt_1/acls/*; find $t/tpgt_1/lun -type l -delete; rmdir $t/tpgt_1/lun/* $t/tpgt_1/np/* $t/tpgt_1 $t; done; \
             rmdir core/iblock_7440/tether-*; lvremove -qy tether/gone >/dev/null; \
             lvrename -q tether/late tether/elsewhere >/dev/null; ls -d iscsi/{IQN_PREFIX}* 2>/dev/null; true"
        ))
        .await
        .unwrap();
    storage.run("systemctl start tether-storage-agent").await.unwrap();
    let told = fixture.tether.output(&["reconcile"]).await.unwrap();
    let told: Value = serde_json::from_str(&told.stdout).unwrap();
    for broken in [&gone, &late] {
        let items = told["items"].as_array().unwrap();
        let problem = items.iter().find(|item| item["key"] == broken.as_str());
        let problem = problem.unwrap_or_else(|| panic!("{told:#}"));
        assert!(text(problem, "/problem").contains("VOLUME_NOT_FOUND"), "{problem:#}");
    }
    // It comes late, and nobody says so.
    storage.run("lvrename -q tether/elsewhere tether/late").await.unwrap();
    let back = format!(
        "for i in $(seq 400); do [ \"$(cat /sys/kernel/config/target/iscsi/{IQN_PREFIX}:{late}/tpgt_1/enable 2>/dev/null)\" = 1 ] \
         && exit 0; sleep 0.1; done; exit 1"
    );
    storage.run(&back).await.expect("it is tried again, and exported by itself");
    let shown = fixture.tether.json(&["show", &works]).await.unwrap();
    assert_eq!(shown["export"]["enabled"], true, "{shown:#}");
    guest
        .command_within(&format!("write {} after {}", disk.name, 1 << 20), Duration::from_secs(120))
        .await
        .unwrap();
    guest
        .command_within(&format!("write {} before {}", disk.name, 1 << 20), Duration::from_secs(120))
        .await
        .unwrap();
    assert_eq!(guest.checksum(&disk, 1 << 20).await.unwrap(), sum);
    fixture.detach(&works).await;
    crate::unexport(&fixture, &gone).await;
    crate::unexport(&fixture, &late).await;
    fixture.assert_nothing_left("at the end").await;
}

/// Left out of a run for its time, not for what it shows: `tests/run long`.
mod long {
    use super::*;

    /// A disk that somebody took out of its domain is told and not put back: that is not the agent's to decide.
    #[tokio::test]
    #[ignore = "lab"]
    async fn a_disk_that_somebody_took_out_is_told_and_not_put_back() {
        let fixture = Fixture::new().await;
        let serial = text(&fixture.volume("thick/out").await, "/serial").to_owned();
        let id = text(&fixture.attach(&["thick/out", "c2"]).await, "/attachment_id").to_owned();
        fixture.sees("c2", &serial).await;
        fixture.lab.compute.run("virsh -q detach-disk c2 vda --live --config").await.unwrap();
        fixture.lab.guest("c2").unwrap().wait_gone(&serial, SEEN).await.unwrap();
        let told = fixture.tether.json(&["reconcile", "--dry-run"]).await.unwrap();
        assert_eq!(item(&told, &id), ("report".to_owned(), false), "{told:#}");
        let output = fixture.tether.output(&["reconcile"]).await.unwrap();
        assert_ne!(output.exit_code, Some(0));
        assert!(output.stdout.contains(&format!("tether detach {id}")), "{}", output.stdout);
        assert!(!fixture.xml("c2", "").await.contains(&id));
        fixture.detach(&id).await;
        fixture.assert_nothing_left("at the end").await;
    }
}
