//! Attach: the order of calls, what is undone and what must not be.

use tonic::Code;

use crate::fakes::{Lab, Trouble, lock, refusal};

const ID: &str = "5f1c0e0a-7d1f-4a53-9d3c-0b7f3c0f7d11";

#[tokio::test]
async fn a_volume_becomes_a_disk_and_every_step_is_shown() {
    let lab = Lab::up().await;
    let ran = lab.tether(&["attach", "tether/v1", "c2", "--serial", "DATA1", "--live-only"]).await;
    assert_eq!(ran.exit, 0, "{ran:?}");
    assert_eq!(lab.mutations(), ["Export", "Attach"]);
    let id = lab.compute.attached().remove(0);
    assert!(ran.err.starts_with(&format!("attachment {id}\n")), "{}", ran.err);
    assert!(ran.err.contains("  storage   create-backstore       3.1 ms\n"), "{}", ran.err);
    assert!(ran.err.contains("  compute   hot-plug               3.1 ms\n"), "{}", ran.err);
    assert_eq!(ran.err.lines().count(), 5, "each step once: {}", ran.err);
    let begin = "attached tether/v1 to c2 as vdb (serial aabbccddeeff00112233, 1 GiB) in ";
    assert!(
        ran.out.starts_with(begin) && ran.out.contains(": export ") && ran.out.contains(&id),
        "{}",
        ran.out
    );
    let disk = lock(&lab.compute.last_attach).clone().unwrap().disk.unwrap();
    assert_eq!((disk.serial.as_str(), disk.persistence), ("DATA1", 2));
}

#[tokio::test]
async fn json_is_one_object_with_steps_and_no_secret() {
    let lab = Lab::up().await;
    let ran = lab.tether(&["attach", "tether/v1", "c2", "--json"]).await;
    let json = ran.json();
    assert_eq!((ran.exit, ran.err.as_str()), (0, ""));
    assert_eq!(json["attachment"]["target_device"], "vdb");
    assert_eq!(json["attachment"]["bus"], "virtio");
    assert_eq!(json["attachment"]["size_bytes"], 1u64 << 30);
    assert_eq!(json["outcome"], "created");
    assert_eq!(json["export"]["steps"][0]["step"], "create-backstore");
    assert_eq!(json["attach"]["steps"][1]["duration_microseconds"], 3100);
    assert!(!ran.out.contains("canary"));
}

#[tokio::test]
async fn a_watch_that_fails_disturbs_nothing_and_quiet_is_quiet() {
    let lab = Lab::up().await;
    lab.storage.agent.watch_is_broken.store(true, std::sync::atomic::Ordering::SeqCst);
    let ran = lab.tether(&["attach", "tether/v1", "c2"]).await;
    assert_eq!(ran.exit, 0, "{ran:?}");
    assert!(ran.err.contains("create-backstore"), "the reply has the steps too: {}", ran.err);
    let ran = lab.tether(&["attach", "tether/v1", "c2", "--quiet"]).await;
    assert_eq!((ran.exit, ran.err.as_str()), (0, ""));
}

#[tokio::test]
async fn a_failed_attach_takes_the_export_back_and_tells_why() {
    let lab = Lab::up().await;
    let metadata =
        [("step", "login"), ("command", "/sbin/iscsiadm -m node"), ("exit", "8"), ("next", "look there")];
    let status = refusal(Code::Unavailable, "PORTAL_UNREACHABLE", "no portal answers", &metadata);
    lab.compute.agent.trouble("Attach", Trouble::Refuse(status.clone()));
    let ran = lab.tether(&["attach", "tether/v1", "c2"]).await;
    assert_eq!(ran.exit, 5);
    assert_eq!(lab.mutations(), ["Export", "Attach", "Detach", "Unexport"]);
    assert!(lab.storage.exported().is_empty());
    for line in [
        "error: attach tether/v1 to c2: no portal answers",
        "  step: login",
        "  command: /sbin/iscsiadm -m node (exit code 8)",
        "  undo: the export was removed again; nothing is left",
        "  next: look there",
    ] {
        assert!(ran.err.lines().any(|shown| shown == line), "{line}: {}", ran.err);
    }
    lab.compute.agent.trouble("Attach", Trouble::Refuse(status));
    let error = lab.tether(&["--json", "attach", "tether/v1", "c2"]).await.json()["error"].clone();
    for (field, value) in [
        ("code", "unavailable"),
        ("reason", "PORTAL_UNREACHABLE"),
        ("message", "attach tether/v1 to c2: no portal answers"),
        ("step", "login"),
        ("command", "/sbin/iscsiadm -m node"),
        ("next", "look there"),
        ("undo", "the export was removed again; nothing is left"),
    ] {
        assert_eq!(error[field], value, "{error}");
    }
    assert_eq!((error["exit"].as_i64(), error["exit_code"].as_i64()), (Some(8), Some(5)));
}

#[tokio::test]
async fn an_undo_that_fails_is_shown_beside_the_cause() {
    let lab = Lab::up().await;
    let status = refusal(Code::NotFound, "DOMAIN_NOT_FOUND", "no domain c9", &[]);
    lab.compute.agent.trouble("Attach", Trouble::Refuse(status));
    let status = refusal(Code::Internal, "TARGET_FAILED", "configfs said no", &[("step", "remove-target")]);
    lab.storage.agent.trouble("Unexport", Trouble::Refuse(status));
    let ran = lab.tether(&["attach", "tether/v1", "c9", "--id", ID]).await;
    assert_eq!(ran.exit, 3);
    for part in
        ["no domain c9", "undo: error: remove the export", "configfs said no", &format!("tether detach {ID}")]
    {
        assert!(ran.err.contains(part), "{part}: {}", ran.err);
    }
}

/// Over NFS a late copy of the attach could still open the file: the id is spent first, or the export stays.
#[tokio::test]
async fn an_id_that_cannot_be_spent_keeps_the_export() {
    let lab = Lab::up().await;
    let status = refusal(Code::NotFound, "DOMAIN_NOT_FOUND", "no domain c9", &[]);
    lab.compute.agent.trouble("Attach", Trouble::Refuse(status));
    let status = refusal(Code::Internal, "JOURNAL_FAILED", "no room", &[("step", "write-journal")]);
    lab.compute.agent.trouble("Detach", Trouble::Refuse(status));
    let ran = lab.tether(&["attach", "tether/v1", "c9", "--id", ID]).await;
    assert_eq!(ran.exit, 3);
    assert_eq!(lab.mutations(), ["Export", "Attach", "Detach"]);
    assert_eq!(lab.storage.exported(), [ID]);
    for part in ["no domain c9", "undo: error: end attachment", "no room", &format!("tether detach {ID}")] {
        assert!(ran.err.contains(part), "{part}: {}", ran.err);
    }
}

#[tokio::test]
async fn what_the_compute_host_could_not_undo_keeps_the_export() {
    let lab = Lab::up().await;
    let metadata = [("undo", "logout failed")];
    lab.compute
        .agent
        .trouble("Attach", Trouble::Refuse(refusal(Code::Internal, "HYPERVISOR_REFUSED", "no", &metadata)));
    let ran = lab.tether(&["attach", "tether/v1", "c2", "--id", ID]).await;
    assert_eq!(ran.exit, 1);
    assert_eq!(lab.mutations(), ["Export", "Attach"]);
    assert!(
        ran.err.contains("logout failed") && ran.err.contains(&format!("tether detach {ID}")),
        "{}",
        ran.err
    );
}

#[tokio::test]
async fn a_broken_connection_is_joined_again_with_the_same_id() {
    let lab = Lab::up().await;
    lab.storage.agent.trouble("Export", Trouble::CutAfterwards);
    lab.compute.agent.trouble("Attach", Trouble::CutAfterwards);
    let ran = lab.tether(&["attach", "tether/v1", "c2"]).await;
    assert_eq!(ran.exit, 0, "{ran:?}");
    assert_eq!(lab.mutations(), ["Export", "Export", "Attach", "Attach"]);
    assert_eq!(lab.storage.exported(), lab.compute.attached());
    assert!(ran.err.contains("trying again"), "{}", ran.err);
}

#[tokio::test]
async fn an_unknown_outcome_leaves_the_export_and_says_what_to_type() {
    for trouble in [Trouble::Hold, Trouble::DownAfterwards] {
        let lab = Lab::up().await;
        lab.compute.agent.trouble("Attach", trouble);
        let arguments =
            ["--timeout", "2", "attach", "tether/v1", "c2", "--bus", "scsi", "--read-only", "--id", ID];
        let ran = lab.tether(&arguments).await;
        assert_eq!(ran.exit, 6, "{ran:?}");
        assert!(!lab.mutations().contains(&"Unexport".to_owned()));
        assert_eq!(lab.storage.exported(), [ID]);
        for part in [
            "whether the disk is in c2 is not known".to_owned(),
            format!("tether attach tether/v1 c2 --bus scsi --read-only --id {ID}"),
            format!("tether detach {ID}"),
        ] {
            assert!(ran.err.contains(&part), "{part}: {}", ran.err);
        }
    }
}

#[tokio::test]
async fn a_refusal_after_a_broken_connection_is_an_answer() {
    let lab = Lab::up().await;
    lab.compute.agent.trouble("Attach", Trouble::CutBefore);
    let status = refusal(Code::ResourceExhausted, "NO_FREE_SLOT", "no slot is free", &[]);
    lab.compute.agent.trouble("Attach", Trouble::Refuse(status));
    let ran = lab.tether(&["attach", "tether/v1", "c2"]).await;
    assert_eq!(ran.exit, 8, "{ran:?}");
    assert_eq!(lab.mutations(), ["Export", "Attach", "Attach", "Detach", "Unexport"]);
}

#[tokio::test]
async fn an_export_stays_unless_the_compute_host_says_that_no_disk_stands_on_it() {
    // The first call worked, its answer was lost, and its repeat finds something to complain about.
    let lab = Lab::up().await;
    lab.compute.agent.trouble("Attach", Trouble::CutAfterwards);
    let status =
        refusal(Code::Unavailable, "HYPERVISOR_UNAVAILABLE", "libvirt is away", &[("next", "start it")]);
    lab.compute.agent.trouble("Attach", Trouble::Refuse(status.clone()));
    let ran = lab.tether(&["attach", "tether/v1", "c2"]).await;
    assert_eq!(ran.exit, 5, "{ran:?}");
    assert_eq!(lab.mutations(), ["Export", "Attach", "Attach"]);
    assert!(
        ran.err.contains("undo: the export stays: compute1 still has this attachment, attached"),
        "{}",
        ran.err
    );
    assert!(ran.err.contains("next: start it\n    see: tether show "), "{}", ran.err);
    assert_eq!(lab.storage.exported(), lab.compute.attached());
    // It cannot be asked.
    let lab = Lab::up().await;
    lab.compute.agent.trouble("Attach", Trouble::Refuse(status));
    lab.compute.agent.trouble("GetAttachment", Trouble::CutBefore);
    let ran = lab.tether(&["attach", "tether/v1", "c2", "--id", ID]).await;
    assert_eq!(ran.exit, 5, "{ran:?}");
    assert!(
        ran.err.contains("did not say") && ran.err.contains(&format!("tether detach {ID}")),
        "{}",
        ran.err
    );
    assert_eq!(lab.storage.exported(), [ID]);
}

#[tokio::test]
async fn the_same_id_again_changes_nothing_and_another_domain_takes_nothing_away() {
    let lab = Lab::up().await;
    assert_eq!(lab.tether(&["attach", "tether/v1", "c2", "--id", ID]).await.exit, 0);
    let ran = lab.tether(&["attach", "tether/v1", "c2", "--id", ID]).await;
    assert_eq!(ran.exit, 0);
    assert!(ran.out.starts_with("already attached tether/v1 to c2"), "{}", ran.out);
    lab.mutations();
    let ran = lab.tether(&["attach", "tether/v1", "c3", "--id", ID]).await;
    assert_eq!(ran.exit, 4, "{ran:?}");
    assert_eq!(lab.mutations(), ["Export", "Attach"]);
    for (code, reason) in
        [(Code::Aborted, "OPERATION_RUNNING"), (Code::FailedPrecondition, "ATTACHMENT_ENDED")]
    {
        lab.compute.agent.trouble("Attach", Trouble::Refuse(refusal(code, reason, "no", &[])));
        assert_eq!(lab.tether(&["attach", "tether/v1", "c2", "--id", ID]).await.exit, 4);
        assert_eq!(lab.mutations(), ["Export", "Attach"], "{reason}");
    }
    assert_eq!(lab.storage.exported(), [ID]);
}

#[tokio::test]
async fn a_failed_export_is_the_end_of_it() {
    let lab = Lab::up().await;
    let ran = lab.tether(&["attach", "tether/none", "c2"]).await;
    assert_eq!(ran.exit, 3, "{ran:?}");
    assert_eq!(lab.mutations(), ["Export"]);
    lab.storage.agent.trouble("Export", Trouble::Hold);
    let ran = lab.tether(&["--timeout", "1", "attach", "tether/v1", "c2", "--id", ID]).await;
    assert_eq!(ran.exit, 6);
    assert!(ran.err.contains("no disk was attached") && ran.err.contains("tether detach"), "{}", ran.err);
}

#[tokio::test]
async fn ctrl_c_says_that_the_agents_go_on() {
    let lab = Lab::up().await;
    lab.compute.agent.trouble("Attach", Trouble::Hold);
    let held = lab.compute.agent.held.notified();
    let ran = lab.tether_until(&["attach", "tether/v1", "c2", "--id", ID], held).await;
    assert_eq!(ran.exit, 130);
    assert!(
        ran.err.contains("the agents go on") && ran.err.contains(&format!("tether show {ID}")),
        "{}",
        ran.err
    );
    let ran = lab.tether_until(&["--json", "attach", "tether/v1", "c2"], std::future::ready(())).await;
    assert_eq!((ran.exit, ran.json()["error"]["reason"].as_str()), (130, Some("INTERRUPTED")));
}

#[tokio::test]
async fn options_that_do_not_go_together_are_refused_before_any_call() {
    let lab = Lab::up().await;
    for bad in [
        vec!["tether/v1", "c2", "--bus", "virtio", "--target-device", "sdb"],
        vec!["tether/v1", "c2", "--cache", "writeback", "--io", "native"],
        vec!["tether/v1", "c2", "--bus", "ide"],
        vec!["tether/v1", "c2", "--serial", "has space"],
        vec!["tether/v1", "c/2"],
        vec!["tether/../v1", "c2"],
        vec!["v1", "c2"],
        vec!["tether/v1", "c2", "--id", "7"],
        vec!["tether/v1", "c2", "--storage", "storage9"],
    ] {
        let ran = lab.tether(&[vec!["attach"], bad.clone()].concat()).await;
        assert_eq!(ran.exit, 64, "{bad:?}: {ran:?}");
    }
    assert!(lab.mutations().is_empty());
}
