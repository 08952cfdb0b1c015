//! Lists and single views, with hosts that are away and attachments that are half made.

use tether_proto::wire;

use crate::fakes::{Lab, lock, nobody};

const ID: &str = "5f1c0e0a-7d1f-4a53-9d3c-0b7f3c0f7d11";

#[tokio::test]
async fn attachments_are_joined_by_id_and_half_states_are_told() {
    let lab = Lab::up().await;
    assert_eq!(lab.tether(&["attach", "tether/v1", "c2", "--id", ID]).await.exit, 0);
    let ran = lab.tether(&["list"]).await;
    let row = ran.out.lines().nth(1).unwrap();
    for cell in [ID, "tether/v1", "storage1", "c2", "compute1", "vdb", "1 GiB", "attached"] {
        assert!(row.contains(cell), "{cell}: {}", ran.out);
    }
    let json = lab.tether(&["list", "--json"]).await.json();
    assert_eq!(json["attachments"][0]["state"], "attached");
    assert_eq!(json["attachments"][0]["size_bytes"], 1u64 << 30);
    assert_eq!(json["attachments"][0]["export"]["access_mode"], "read_write");
    assert_eq!(json["unreachable"].as_array().unwrap().len(), 0);

    let attachment = lock(&lab.compute.attachments).remove(ID).unwrap();
    let ran = lab.tether(&["list"]).await;
    assert!(ran.out.contains(&format!("{ID}: exported only: tether detach {ID}")), "{}", ran.out);
    lock(&lab.compute.attachments).insert(ID.into(), attachment);
    lock(&lab.storage.exports).clear();
    let ran = lab.tether(&["list"]).await;
    assert!(ran.out.contains("attached without export: tether detach"), "{}", ran.out);
}

#[tokio::test]
async fn a_host_that_is_away_is_told_and_hides_nothing() {
    let lab = Lab::up().await;
    assert_eq!(lab.tether(&["attach", "tether/v1", "c2", "--id", ID]).await.exit, 0);
    let dead = nobody().await;
    lab.configure(&format!(
        "[storage.storage2]\naddress = \"{dead}\"\n[compute.compute2]\naddress = \"{dead}\"\n"
    ));
    for verb in [vec!["list"], vec!["volume", "list"], vec!["show", ID]] {
        let ran = lab.tether(&verb).await;
        assert_eq!(ran.exit, 5, "{ran:?}");
        assert!(ran.out.contains("tether/v1"), "{}", ran.out);
        assert!(
            ran.err.contains("warning: storage host storage2") && ran.err.contains("refused"),
            "{}",
            ran.err
        );
    }
    lab.compute.agent.link.down();
    let json = lab.tether(&["list", "--json"]).await.json();
    assert_eq!(json["attachments"][0]["state"], "exported_compute_unknown");
    assert_eq!(json["unreachable"].as_array().unwrap().len(), 3);
    let unknown = "00000000-0000-4000-8000-000000000001";
    assert_eq!(lab.tether(&["show", unknown]).await.exit, 5);
}

#[tokio::test]
async fn show_tells_of_what_has_ended_only_that_and_what_may_be_lost() {
    let lab = Lab::up().await;
    let ended = wire::AttachmentStatus {
        attachment_id: ID.into(),
        phase: "ended".into(),
        may_be_lost: vec!["what the guest wrote last".into()],
        ..Default::default()
    };
    lock(&lab.compute.attachments).insert(ID.into(), ended);
    let ran = lab.tether(&["show", ID]).await;
    let lines: Vec<Vec<&str>> =
        ran.out.lines().map(|line| line.split("  ").filter(|w| !w.is_empty()).collect()).collect();
    assert_eq!(
        lines[1..]
            .iter()
            .map(|line| line.iter().map(|word| word.trim()).collect())
            .collect::<Vec<Vec<&str>>>(),
        [
            ["state", "ended"],
            ["compute host", "compute1"],
            ["attachment", "ended"],
            ["may be lost", "what the guest wrote last"]
        ]
    );
    let json = lab.tether(&["show", ID, "--json"]).await.json();
    assert_eq!(json["attachment"]["may_be_lost"][0], "what the guest wrote last");
}

#[tokio::test]
async fn show_tells_both_sides() {
    let lab = Lab::up().await;
    assert_eq!(lab.tether(&["attach", "tether/v1", "c2", "--id", ID]).await.exit, 0);
    let ran = lab.tether(&["show", ID]).await;
    assert_eq!(ran.exit, 0, "{ran:?}");
    for part in
        ["state                    attached", "tether/v1", "vdb on virtio", "initiator logged in", "1 GiB"]
    {
        assert!(ran.out.contains(part), "{part}: {}", ran.out);
    }
    let json = lab.tether(&["--json", "show", ID]).await.json();
    assert_eq!(json["attachment"]["in_live_domain"], true);
    assert_eq!(lab.tether(&["show", "00000000-0000-4000-8000-000000000001"]).await.exit, 3);
}

#[tokio::test]
async fn volumes_are_made_shown_listed_and_deleted() {
    let lab = Lab::up().await;
    let ran = lab.tether(&["volume", "create", "tether/v2", "10G"]).await;
    assert_eq!(ran.exit, 0, "{ran:?}");
    assert!(ran.out.starts_with("created tether/v2 (10 GiB, thick) on storage1 in "), "{}", ran.out);
    assert!(ran.err.contains("  storage   create-volume"), "{}", ran.err);
    assert!(lab.tether(&["volume", "create", "tether/v2", "10G"]).await.out.starts_with("was there already"));
    let json = lab.tether(&["volume", "show", "tether/v2", "--json"]).await.json();
    assert_eq!((json["size_bytes"].as_u64(), json["provisioning"].as_str()), (Some(10 << 30), Some("thick")));
    assert_eq!(lab.tether(&["volume", "show", "tether/none"]).await.exit, 3);
    assert!(lab.tether(&["volume", "list", "--pool", "tether"]).await.out.contains("tether/v2"));
    assert_eq!(lab.tether(&["attach", "tether/v2", "c2", "--id", ID]).await.exit, 0);
    let ran = lab.tether(&["volume", "delete", "tether/v2"]).await;
    assert_eq!(ran.exit, 4);
    assert!(
        ran.err.contains("delete tether/v2: tether/v2 is exported\n  next: detach it first"),
        "{}",
        ran.err
    );
    assert_eq!(lab.tether(&["detach", ID]).await.exit, 0);
    assert!(lab.tether(&["volume", "delete", "tether/v2"]).await.out.starts_with("deleted tether/v2"));
    assert!(lab.tether(&["volume", "delete", "tether/v2"]).await.out.starts_with("tether/v2 was not there"));
    lab.mutations();
    for bad in ["0", "-1G", "many", "10X"] {
        assert_eq!(lab.tether(&["volume", "create", "tether/v3", bad]).await.exit, 64, "{bad}");
    }
    assert!(lab.mutations().is_empty());
}

#[tokio::test]
async fn an_attachment_over_nfs_is_told_in_its_own_words() {
    let lab = Lab::up().await;
    assert_eq!(lab.tether(&["volume", "create", "share/v2", "1G", "--format", "qcow2"]).await.exit, 0);
    assert_eq!(lab.tether(&["attach", "share/v2", "c2", "--id", ID]).await.exit, 0);
    let ran = lab.tether(&["show", ID]).await;
    assert_eq!(ran.exit, 0, "{ran:?}");
    for line in [
        "file on the storage host /srv/share/v2.qcow2",
        "shared with              192.0.2.2",
        "directory shared         yes",
        "file open by a client    no",
        "format                   qcow2",
        "share                    192.0.2.1:/srv/share",
        "mounted                  yes",
    ] {
        assert!(ran.out.lines().any(|shown| shown.trim_start() == line), "{line}: {}", ran.out);
    }
    for word in ["target", "portal", "session", "initiator logged in"] {
        assert!(!ran.out.contains(word), "{word}: {}", ran.out);
    }
    let json = lab.tether(&["--json", "show", ID]).await.json();
    let (export, attachment) = (&json["export"], &json["attachment"]);
    assert_eq!((export["transport"].as_str(), attachment["transport"].as_str()), (Some("nfs"), Some("nfs")));
    assert_eq!(export["client_addresses"][0], "192.0.2.2");
    assert_eq!(attachment["format"], "qcow2");
    for none in [&export["target_iqn"], &attachment["target_iqn"], &attachment["portal"]] {
        assert!(none.is_null(), "{json}");
    }

    lock(&lab.compute.attachments).values_mut().for_each(|attachment| attachment.connected = false);
    let ran = lab.tether(&["list"]).await;
    assert!(ran.out.contains(&format!("{ID}: attached share lost: tether show {ID}")), "{}", ran.out);
    lock(&lab.compute.attachments).values_mut().for_each(|attachment| {
        attachment.transport = tether_proto::wire::Transport::Iscsi.into();
    });
    let ran = lab.tether(&["list"]).await;
    assert!(ran.out.contains("attached session lost"), "{}", ran.out);
}

#[tokio::test]
async fn an_attachment_over_iscsi_has_no_share() {
    let lab = Lab::up().await;
    assert_eq!(lab.tether(&["attach", "tether/v1", "c2", "--id", ID]).await.exit, 0);
    let json = lab.tether(&["--json", "show", ID]).await.json();
    assert_eq!(
        (json["export"]["transport"].as_str(), json["attachment"]["format"].as_str()),
        (Some("iscsi"), Some("raw"))
    );
    assert!(json["export"]["file_path"].is_null() && json["attachment"]["share"].is_null(), "{json}");
    assert_eq!(json["export"]["client_addresses"].as_array().unwrap().len(), 0);
    assert_eq!(json["attachment"]["portal"], "192.0.2.1:3260");
}

#[tokio::test]
async fn f16_all_lists_objects_with_whose_they_are_and_what_to_do_about_orphans() {
    let lab = Lab::up().await;
    assert_eq!(lab.tether(&["attach", "tether/v1", "c2", "--id", ID]).await.exit, 0);
    let ran = lab.tether(&["list", "--all"]).await;
    assert_eq!(ran.exit, 0, "{ran:?}");
    for line in [
        vec!["storage1", "target", "iqn.a:orphan", "orphaned"],
        vec!["compute1", "session", "iqn.b:other", "foreign"],
        vec!["compute1", "disk", "c2 vdb", "owned"],
        vec![ID, "attached"],
        vec!["target iqn.a:orphan on storage1: because it is OWNERSHIP_ORPHANED"],
    ] {
        let found = ran.out.lines().any(|row| line.iter().all(|cell| row.contains(cell)));
        assert!(found, "{line:?}: {}", ran.out);
    }
    let json = lab.tether(&["list", "--all", "--json"]).await.json();
    assert_eq!(json["objects"].as_array().unwrap().len(), 3);
    assert_eq!(json["objects"][0]["ownership"], "orphaned");
    assert_eq!(json["attachments"][0]["attachment_id"], ID);
}
