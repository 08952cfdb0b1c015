//! Detach: the storage stays whenever the disk might still be in use, and half states are finished.

use tonic::Code;

use crate::fakes::{Lab, Trouble, lock, nobody, refusal};

const ID: &str = "5f1c0e0a-7d1f-4a53-9d3c-0b7f3c0f7d11";

async fn attached() -> Lab {
    let lab = Lab::up().await;
    let ran = lab.tether(&["attach", "tether/v1", "c2", "--id", ID]).await;
    assert_eq!(ran.exit, 0, "{ran:?}");
    lab.mutations();
    lab
}

#[tokio::test]
async fn first_the_guest_then_the_storage() {
    let lab = attached().await;
    let ran = lab.tether(&["detach", ID, "--guest-timeout", "7"]).await;
    assert_eq!(ran.exit, 0, "{ran:?}");
    assert_eq!(lab.mutations(), ["Detach", "Unexport"]);
    assert!(lab.storage.exported().is_empty() && lab.compute.attached().is_empty());
    assert!(ran.out.starts_with("detached tether/v1 from c2 in "), "{}", ran.out);
    assert!(ran.err.contains("unplug") && ran.err.contains("remove-target"), "{}", ran.err);
    assert_eq!(lock(&lab.compute.last_detach).clone().unwrap().guest_deadline_milliseconds, 7000);
    let ran = lab.tether(&["detach", ID]).await;
    assert_eq!(ran.exit, 3);
    assert!(ran.err.contains("no host knows the attachment"), "{}", ran.err);
}

#[tokio::test]
async fn by_volume_and_domain() {
    let lab = attached().await;
    let ran = lab.tether(&["detach", "tether/v1", "c9"]).await;
    assert_eq!(ran.exit, 3);
    assert!(ran.err.contains(&format!("tether detach {ID}")), "{}", ran.err);
    let ran = lab.tether(&["--json", "detach", "tether/v1", "C2C2C2C2-0000-4000-8000-000000000001"]).await;
    assert_eq!(ran.exit, 0, "{ran:?}");
    let json = ran.json();
    assert_eq!((json["attachment_id"].as_str(), json["outcome"].as_str()), (Some(ID), Some("removed")));
    assert_eq!(json["unexport"]["outcome"], "removed");
    assert_eq!(lab.mutations(), ["Detach", "Unexport"]);
    for usage in [vec!["detach", "tether/v1"], vec!["detach", ID, "c2"], vec!["detach", "what"]] {
        assert_eq!(lab.tether(&usage).await.exit, 64);
    }
}

#[tokio::test]
async fn a_guest_that_holds_the_disk_keeps_its_storage() {
    let lab = attached().await;
    let metadata = [("step", "unplug"), ("next", "unmount it")];
    let status =
        refusal(Code::DeadlineExceeded, "GUEST_HOLDS_DEVICE", "c2 does not let go of vdb", &metadata);
    lab.compute.agent.trouble("Detach", Trouble::Refuse(status));
    let ran = lab.tether(&["detach", ID]).await;
    assert_eq!(ran.exit, 6);
    assert_eq!(lab.mutations(), ["Detach"]);
    assert_eq!(lab.storage.exported(), [ID]);
    assert!(
        ran.err.contains("undo: the export stays") && ran.err.contains("next: unmount it"),
        "{}",
        ran.err
    );
}

#[tokio::test]
async fn an_unknown_detach_keeps_the_storage_and_a_broken_connection_is_joined() {
    let lab = attached().await;
    lab.compute.agent.trouble("Detach", Trouble::Hold);
    let ran = lab.tether(&["--timeout", "1", "detach", ID]).await;
    assert_eq!(ran.exit, 6);
    assert_eq!(lab.mutations(), ["Detach"]);
    assert!(ran.err.contains("is not known; the export stays"), "{}", ran.err);
    lab.compute.agent.trouble("Detach", Trouble::CutAfterwards);
    lab.storage.agent.trouble("Unexport", Trouble::CutAfterwards);
    let ran = lab.tether(&["detach", ID]).await;
    assert_eq!(ran.exit, 0, "{ran:?}");
    assert_eq!(lab.mutations(), ["Detach", "Detach", "Unexport", "Unexport"]);
}

#[tokio::test]
async fn half_states_are_finished() {
    let lab = attached().await;
    lock(&lab.compute.attachments).clear();
    let ran = lab.tether(&["detach", ID]).await;
    assert_eq!(ran.exit, 0, "{ran:?}");
    assert_eq!(lab.mutations(), ["Detach", "Unexport"], "the id is spent on its compute host as well");

    let lab = attached().await;
    lock(&lab.storage.exports).clear();
    let ran = lab.tether(&["detach", ID]).await;
    assert_eq!(ran.exit, 0, "{ran:?}");
    assert_eq!(lab.mutations(), ["Detach"]);
}

#[tokio::test]
async fn an_unexport_that_fails_says_how_to_finish() {
    let lab = attached().await;
    let status = refusal(Code::Internal, "TARGET_FAILED", "configfs said no", &[]);
    lab.storage.agent.trouble("Unexport", Trouble::Refuse(status));
    let ran = lab.tether(&["detach", ID]).await;
    assert_eq!(ran.exit, 1);
    assert!(ran.err.contains("the disk is detached, its export is not ended"), "{}", ran.err);
    assert!(ran.err.contains(&format!("tether detach {ID}")), "{}", ran.err);
    assert_eq!(lab.tether(&["detach", ID]).await.exit, 0);
}

#[tokio::test]
async fn an_export_whose_user_cannot_be_asked_stays() {
    let lab = attached().await;
    let dead = nobody().await;
    lab.configure(&format!("[compute.compute2]\naddress = \"{dead}\"\n"));
    lock(&lab.compute.attachments).clear();
    // Connected: somebody uses it.
    lock(&lab.storage.exports).values_mut().for_each(|export| export.connected = true);
    let ran = lab.tether(&["detach", ID]).await;
    assert_eq!(ran.exit, 5, "{ran:?}");
    assert!(ran.err.contains("bring back compute2"), "{}", ran.err);
    // Not connected, but made for a host that is none of those that answer.
    lock(&lab.storage.exports).values_mut().for_each(|export| {
        export.connected = false;
        export.initiator_iqn = "iqn.1993-08.org.debian:01:compute2".into();
    });
    assert_eq!(lab.tether(&["detach", ID]).await.exit, 5);
    assert!(lab.mutations().is_empty());
    assert_eq!(lab.storage.exported(), [ID]);
    // All answer, and yet it is connected, by a host that is in no config.
    lab.configure("");
    lock(&lab.storage.exports).values_mut().for_each(|export| export.connected = true);
    let ran = lab.tether(&["detach", ID]).await;
    assert_eq!(ran.exit, 4, "{ran:?}");
    assert!(lab.mutations().is_empty());
    // Made for a host that answers and has no attachment: it may go, whoever else is away.
    lab.configure(&format!("[compute.compute2]\naddress = \"{dead}\"\n"));
    lock(&lab.storage.exports).values_mut().for_each(|export| {
        export.connected = false;
        export.initiator_iqn = "iqn.1993-08.org.debian:01:compute1".into();
    });
    assert_eq!(lab.tether(&["detach", ID]).await.exit, 0);
    assert_eq!(lab.mutations(), ["Detach", "Unexport"]);
}

#[tokio::test]
async fn an_export_host_that_is_away_does_not_stop_the_detach_but_is_told() {
    let lab = attached().await;
    lab.storage.agent.link.down();
    let ran = lab.tether(&["detach", ID]).await;
    assert_eq!(ran.exit, 5, "{ran:?}");
    assert_eq!(lab.mutations(), ["Detach"]);
    assert!(
        ran.err.contains("the disk is detached") && ran.err.contains("bring back storage1"),
        "{}",
        ran.err
    );
    let ran = lab.tether(&["detach", ID]).await;
    assert_eq!(ran.exit, 5, "{ran:?}");
    assert!(ran.err.contains("no reachable host knows"), "{}", ran.err);
}

#[tokio::test]
async fn what_uses_an_export_is_told_in_the_words_of_its_transport() {
    for (volume, using, look, stranger) in [
        (
            "tether/v1",
            "compute1 is connected to the export",
            "iscsiadm -m session -P 3",
            "end the session there",
        ),
        ("share/v1", "compute1 has the file open", "findmnt -t nfs4", "end what has it open there"),
    ] {
        let lab = Lab::up().await;
        assert_eq!(lab.tether(&["attach", volume, "c2", "--id", ID]).await.exit, 0);
        lab.mutations();
        lock(&lab.compute.attachments).clear();
        lock(&lab.storage.exports).values_mut().for_each(|export| export.connected = true);
        let ran = lab.tether(&["detach", ID]).await;
        assert_eq!(ran.exit, 4, "{ran:?}");
        for part in [using, "has no record of the attachment; the export stays", "virsh domblklist", look] {
            assert!(ran.err.contains(part), "{part}: {}", ran.err);
        }
        lock(&lab.storage.exports).values_mut().for_each(|export| {
            export.initiator_iqn = "iqn.1993-08.org.debian:01:compute2".into();
        });
        let ran = lab.tether(&["detach", ID]).await;
        assert_eq!(ran.exit, 4, "{ran:?}");
        assert!(ran.err.contains("is no host of the config") && ran.err.contains(stranger), "{}", ran.err);
        assert!(lab.mutations().is_empty());
        assert_eq!(lab.storage.exported(), [ID]);
    }
}

#[tokio::test]
async fn force_goes_to_both_hosts_and_tells_what_may_be_lost() {
    let lab = attached().await;
    let ran = lab.tether(&["detach", ID, "--force"]).await;
    assert_eq!(ran.exit, 0, "{ran:?}");
    assert_eq!(lab.mutations(), ["Detach", "Unexport"]);
    assert!(lock(&lab.compute.last_detach).clone().unwrap().force);
    for lost in ["forced: the guest held its disk", "forced: compute1 was logged in"] {
        assert!(ran.err.contains(lost), "{}", ran.err);
    }
}

#[tokio::test]
async fn an_export_of_a_host_that_is_lost_for_good_is_ended_only_by_force() {
    let lab = attached().await;
    lab.compute.agent.link.down();
    let ran = lab.tether(&["detach", ID]).await;
    assert_eq!((ran.exit, lab.storage.exported().len()), (5, 1), "{ran:?}");
    let ran = lab.tether(&["detach", ID, "--force"]).await;
    assert_eq!(ran.exit, 0, "{ran:?}");
    assert!(lab.storage.exported().is_empty());
    assert!(ran.err.contains("no compute host was told (not asked: compute1)"), "{}", ran.err);
    assert!(ran.err.contains(&format!("tether detach {ID}")), "{}", ran.err);
}
