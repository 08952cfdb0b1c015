//! Extend: first the volume, then the guest, and the same command again finishes what was left.

use tonic::Code;

use crate::fakes::{Lab, Trouble, lock, nobody, refusal, tether};

const ID: &str = "5f1c0e0a-7d1f-4a53-9d3c-0b7f3c0f7d11";
const AGAIN: &str = "type again: tether volume extend tether/v1 2GiB";

async fn attached(volume: &str) -> Lab {
    let lab = Lab::up().await;
    let ran = lab.tether(&["attach", volume, "c2", "--id", ID]).await;
    assert_eq!(ran.exit, 0, "{ran:?}");
    lab.mutations();
    lab
}

fn size_in_guest(lab: &Lab) -> u64 {
    lock(&lab.compute.attachments)[ID].size_bytes
}

#[tokio::test]
async fn an_attached_volume_is_larger_for_its_guest_too() {
    for volume in ["tether/v1", "share/v1"] {
        let lab = attached(volume).await;
        let ran = lab.tether(&["volume", "extend", volume, "2G"]).await;
        assert_eq!(ran.exit, 0, "{ran:?}");
        assert_eq!(lab.mutations(), ["ExtendVolume", "ResizeAttachment"]);
        assert_eq!(size_in_guest(&lab), 2 << 30);
        let begin = format!("extended {volume} from 1 GiB to 2 GiB on storage1 in ");
        assert!(ran.out.starts_with(&begin) && ran.out.ends_with("; c2 sees it as vdb\n"), "{}", ran.out);
        for step in ["  storage   extend-volume", "  compute   resize-disk"] {
            assert!(ran.err.contains(step), "{step}: {}", ran.err);
        }
        // The same again changes nothing, and asks both all the same.
        let ran = lab.tether(&["volume", "extend", volume, "2G"]).await;
        assert_eq!(ran.exit, 0, "{ran:?}");
        assert_eq!(ran.out, format!("{volume} has 2 GiB already on storage1; c2 sees it as vdb\n"));
        assert_eq!(lab.mutations(), ["ExtendVolume", "ResizeAttachment"]);
    }
}

#[tokio::test]
async fn json_has_both_reports() {
    let lab = attached("tether/v1").await;
    let ran = lab.tether(&["--json", "volume", "extend", "tether/v1", "2G", "--storage", "storage1"]).await;
    assert_eq!((ran.exit, ran.err.as_str()), (0, ""));
    let json = ran.json();
    assert_eq!(json["volume"]["size_bytes"], 2u64 << 30);
    assert_eq!(json["previous_size_bytes"], 1u64 << 30);
    assert_eq!((json["storage"].as_str(), json["outcome"].as_str()), (Some("storage1"), Some("repaired")));
    assert_eq!(json["report"]["steps"][0]["step"], "extend-volume");
    assert_eq!(json["guests"][0]["attachment"]["size_bytes"], 2u64 << 30);
    assert_eq!(json["guests"][0]["resize"]["steps"][1]["step"], "resize-disk");
    assert_eq!(json["unreachable"].as_array().unwrap().len(), 0);
    assert_eq!(lab.tether(&["detach", ID]).await.exit, 0);
    let json = lab.tether(&["--json", "volume", "extend", "tether/v1", "3G"]).await.json();
    assert!(json["guests"].as_array().is_some_and(Vec::is_empty), "{json}");
}

#[tokio::test]
async fn a_domain_that_is_shut_off_sees_it_when_it_starts() {
    let lab = attached("tether/v1").await;
    lock(&lab.compute.attachments).values_mut().for_each(|attachment| attachment.in_live_domain = false);
    let ran = lab.tether(&["volume", "extend", "tether/v1", "2G"]).await;
    assert!(ran.out.ends_with("; c2 sees it as vdb when it starts\n"), "{ran:?}");
}

#[tokio::test]
async fn a_volume_that_nobody_has_is_just_larger() {
    let lab = Lab::up().await;
    let ran = lab.tether(&["volume", "extend", "tether/v1", "2G"]).await;
    assert_eq!(ran.exit, 0, "{ran:?}");
    assert_eq!(lab.mutations(), ["ExtendVolume"]);
    assert!(ran.out.starts_with("extended tether/v1 from 1 GiB to 2 GiB on storage1 in "), "{}", ran.out);
    assert!(!ran.out.contains(';'), "{}", ran.out);
    let ran = lab.tether(&["volume", "extend", "tether/v1", "2G"]).await;
    assert_eq!(ran.out, "tether/v1 has 2 GiB already on storage1\n");
    assert_eq!(lab.tether(&["volume", "extend", "tether/none", "2G"]).await.exit, 3);
}

#[tokio::test]
async fn a_resize_that_fails_says_so_and_the_same_command_finishes_it() {
    let lab = attached("tether/v1").await;
    let metadata = [("step", "resize-disk"), ("next", "start virtqemud")];
    let status = refusal(Code::Unavailable, "HYPERVISOR_UNAVAILABLE", "libvirt is away", &metadata);
    lab.compute.agent.trouble("ResizeAttachment", Trouble::Refuse(status));
    let ran = lab.tether(&["volume", "extend", "tether/v1", "2G"]).await;
    assert_eq!(ran.exit, 5, "{ran:?}");
    assert_eq!((ran.out.as_str(), size_in_guest(&lab)), ("", 1 << 30));
    let error = "error: extend tether/v1: the volume is extended to 2 GiB on storage1, its guest does not see it yet: \
                 libvirt is away\n  step: resize-disk\n  next: start virtqemud\n    then type again: tether volume \
                 extend tether/v1 2GiB\n";
    assert!(ran.err.ends_with(error), "{}", ran.err);
    let ran = lab.tether(&["volume", "extend", "tether/v1", "2G"]).await;
    assert_eq!(ran.exit, 0, "{ran:?}");
    assert_eq!(ran.out, "tether/v1 has 2 GiB already on storage1; c2 sees it as vdb\n");
    assert_eq!(size_in_guest(&lab), 2 << 30);
}

/// One of several guests that cannot be told keeps none of the others from being told.
#[tokio::test]
async fn a_guest_that_cannot_be_told_does_not_keep_the_others_from_it() {
    let lab = attached("tether/v1").await;
    let other = "22222222-2222-4222-8222-222222222222";
    let mut export = lock(&lab.storage.exports)[ID].clone();
    other.clone_into(&mut export.attachment_id);
    lock(&lab.storage.exports).insert(other.to_owned(), export);
    let mut attachment = lock(&lab.compute.attachments)[ID].clone();
    other.clone_into(&mut attachment.attachment_id);
    lock(&lab.compute.attachments).insert(other.to_owned(), attachment);
    let status = refusal(Code::FailedPrecondition, "READ_ONLY_DISK", "the disk is read-only", &[]);
    lab.compute.agent.trouble("ResizeAttachment", Trouble::Refuse(status));
    let ran = lab.tether(&["volume", "extend", "tether/v1", "2G"]).await;
    assert_eq!(ran.exit, 4, "{ran:?}");
    assert_eq!(lab.mutations(), ["ExtendVolume", "ResizeAttachment", "ResizeAttachment"]);
    let mut sizes: Vec<u64> = lock(&lab.compute.attachments).values().map(|one| one.size_bytes).collect();
    sizes.sort_unstable();
    assert_eq!(sizes, [1 << 30, 2 << 30], "the other one was told");
    assert!(ran.err.contains("its guest does not see it yet: the disk is read-only"), "{}", ran.err);
}

#[tokio::test]
async fn broken_connections_are_joined_and_a_resize_without_answer_is_unknown() {
    let lab = attached("tether/v1").await;
    lab.storage.agent.trouble("ExtendVolume", Trouble::CutAfterwards);
    lab.compute.agent.trouble("ResizeAttachment", Trouble::CutAfterwards);
    let ran = lab.tether(&["volume", "extend", "tether/v1", "2G"]).await;
    assert_eq!(ran.exit, 0, "{ran:?}");
    assert_eq!(lab.mutations(), ["ExtendVolume", "ExtendVolume", "ResizeAttachment", "ResizeAttachment"]);
    // The second answer says that nothing was left to do; for a person the volume grew all the same.
    assert!(ran.out.starts_with("extended tether/v1 from 1 GiB to 2 GiB"), "{}", ran.out);
    lab.compute.agent.trouble("ResizeAttachment", Trouble::Hold);
    let ran = lab.tether(&["--timeout", "1", "volume", "extend", "tether/v1", "3G"]).await;
    assert_eq!(ran.exit, 6, "{ran:?}");
    let message =
        "the volume is extended to 3 GiB on storage1, whether its guest sees it is not known: no answer from";
    let next = format!("next: see: tether show {ID}\n    go on: tether volume extend tether/v1 3GiB\n");
    assert!(ran.err.contains(message) && ran.err.ends_with(&next), "{}", ran.err);
}

#[tokio::test]
async fn a_compute_host_that_is_away_is_told_and_the_same_command_finishes_it_later() {
    let lab = attached("tether/v1").await;
    let ours = std::fs::read_to_string(lab.config()).unwrap();
    let (address, dead) = (lab.compute.agent.link.address.to_string(), nobody().await);
    std::fs::write(lab.config(), ours.replace(&address, &dead)).unwrap();
    let ran = lab.tether(&["volume", "extend", "tether/v1", "2G"]).await;
    assert_eq!(ran.exit, 5, "{ran:?}");
    assert_eq!(lab.mutations(), ["ExtendVolume"]);
    assert!(ran.out.starts_with("extended tether/v1 from 1 GiB to 2 GiB on storage1 in "), "{}", ran.out);
    assert!(ran.out.ends_with("; whether a guest has it is not known\n"), "{}", ran.out);
    assert!(ran.err.contains("warning: compute host compute1"), "{}", ran.err);
    let next = format!("its guest may not see the new size yet\n  next: bring back compute1, then {AGAIN}\n");
    assert!(ran.err.ends_with(&next), "{}", ran.err);
    let ran = lab.tether(&["--json", "volume", "extend", "tether/v1", "2G"]).await;
    assert_eq!((ran.exit, ran.json()["unreachable"][0]["host"].as_str()), (5, Some("compute1")));
    lab.mutations();
    std::fs::write(lab.config(), &ours).unwrap();
    assert_eq!(lab.tether(&["volume", "extend", "tether/v1", "2G"]).await.exit, 0);
    assert_eq!((lab.mutations().len(), size_in_guest(&lab)), (2, 2 << 30));
    // Another one that is away is no matter when the one that has the attachment answers.
    lab.configure(&format!("[compute.compute2]\naddress = \"{dead}\"\n"));
    let ran = lab.tether(&["volume", "extend", "tether/v1", "3G"]).await;
    assert!(ran.exit == 0 && !ran.err.contains("warning"), "{ran:?}");
}

#[tokio::test]
async fn an_export_without_attachment_is_told() {
    let lab = attached("tether/v1").await;
    lock(&lab.compute.attachments).clear();
    let ran = lab.tether(&["volume", "extend", "tether/v1", "2G"]).await;
    assert_eq!(ran.exit, 0, "{ran:?}");
    assert_eq!(lab.mutations(), ["ExtendVolume"]);
    assert!(ran.out.ends_with("; it is exported, but not attached\n"), "{}", ran.out);
    assert!(!ran.err.contains("warning"), "{}", ran.err);
    // In use all the same: by a host that is in no config.
    lock(&lab.storage.exports).values_mut().for_each(|export| export.connected = true);
    let ran = lab.tether(&["volume", "extend", "tether/v1", "2G"]).await;
    assert_eq!(ran.exit, 4, "{ran:?}");
    for part in
        ["its guest does not see it yet: the export is in use by compute1", "add that compute host", AGAIN]
    {
        assert!(ran.err.contains(part), "{part}: {}", ran.err);
    }
    // The file of an exported qcow2 volume is not the storage host's to grow.
    let lab = Lab::up().await;
    assert_eq!(lab.tether(&["volume", "create", "share/v2", "1G", "--format", "qcow2"]).await.exit, 0);
    assert_eq!(lab.tether(&["attach", "share/v2", "c2", "--id", ID]).await.exit, 0);
    lock(&lab.compute.attachments).clear();
    let ran = lab.tether(&["volume", "extend", "share/v2", "2G"]).await;
    assert_eq!(ran.exit, 0, "{ran:?}");
    assert!(
        ran.err.contains("does not grow") && ran.err.contains(&format!("tether detach {ID}")),
        "{}",
        ran.err
    );
}

#[tokio::test]
async fn an_attachment_that_is_half_made_is_finished_first() {
    for (phase, part, next) in [
        ("attaching", "it is being attached to c2 on compute1", format!("tether show {ID}")),
        ("detaching", "it is being detached from c2 on compute1", format!("tether detach {ID}")),
    ] {
        let lab = attached("tether/v1").await;
        lock(&lab.compute.attachments).values_mut().for_each(|attachment| attachment.phase = phase.into());
        let ran = lab.tether(&["volume", "extend", "tether/v1", "2G"]).await;
        assert_eq!(ran.exit, 4, "{ran:?}");
        assert_eq!(lab.mutations(), ["ExtendVolume"]);
        for part in
            ["the volume is extended to 2 GiB on storage1, its guest does not see it yet", part, &next, AGAIN]
        {
            assert!(ran.err.contains(part), "{part}: {}", ran.err);
        }
        let error =
            lab.tether(&["--json", "volume", "extend", "tether/v1", "2G"]).await.json()["error"].clone();
        assert_eq!(
            (error["reason"].as_str(), error["attachment_id"].as_str()),
            (Some("ATTACHMENT_UNFINISHED"), Some(ID))
        );
    }
}

#[tokio::test]
async fn what_the_storage_host_refuses_reaches_no_guest() {
    let lab = attached("tether/v1").await;
    let ran = lab.tether(&["volume", "extend", "tether/v1", "512M"]).await;
    assert_eq!(ran.exit, 4, "{ran:?}");
    assert!(ran.err.contains("extend tether/v1: tether/v1 has 1073741824 bytes"), "{}", ran.err);
    assert!(ran.err.contains("next: name a size that is not smaller"), "{}", ran.err);
    let ran = lab.tether(&["volume", "extend", "tether/v1", "2T"]).await;
    assert_eq!(ran.exit, 8, "{ran:?}");
    lab.storage.agent.trouble("ExtendVolume", Trouble::Hold);
    let ran = lab.tether(&["--timeout", "1", "volume", "extend", "tether/v1", "2G"]).await;
    assert_eq!(ran.exit, 6, "{ran:?}");
    assert_eq!(lab.mutations(), ["ExtendVolume"; 3]);
    for bad in ["0", "-1G", "many"] {
        assert_eq!(lab.tether(&["volume", "extend", "tether/v1", bad]).await.exit, 64, "{bad}");
    }
    assert!(lab.mutations().is_empty());
}

#[tokio::test]
async fn ctrl_c_says_how_far_it_is() {
    let lab = attached("tether/v1").await;
    lab.storage.agent.trouble("ExtendVolume", Trouble::Hold);
    let held = lab.storage.agent.held.notified();
    let ran = lab.tether_until(&["volume", "extend", "tether/v1", "2G"], held).await;
    assert_eq!(ran.exit, 130, "{ran:?}");
    assert!(
        ran.err.contains("the agent goes on") && ran.err.contains("tether volume show tether/v1"),
        "{}",
        ran.err
    );
    lab.compute.agent.trouble("ResizeAttachment", Trouble::Hold);
    let held = lab.compute.agent.held.notified();
    let ran = lab.tether_until(&["volume", "extend", "tether/v1", "2G"], held).await;
    assert_eq!(ran.exit, 130, "{ran:?}");
    for part in [
        "the volume is extended to 2 GiB on storage1, whether its guest sees it is not known: interrupted",
        "go on: tether volume extend tether/v1 2GiB",
    ] {
        assert!(ran.err.contains(part), "{part}: {}", ran.err);
    }
}

#[tokio::test]
async fn help_says_what_is_done_in_which_order() {
    let never = std::future::pending;
    let ran = tether(&["volume", "extend", "--help"], never()).await;
    assert_eq!(ran.exit, 0);
    assert!(
        ran.out.contains("tether volume extend tether/v1 20G") && ran.out.contains("the same command"),
        "{}",
        ran.out
    );
    let ran = tether(&["volume", "create", "--help"], never()).await;
    assert!(ran.out.contains("--format qcow2") && ran.out.contains("thick takes all space"), "{}", ran.out);
    assert!(tether(&["pool", "list", "--help"], never()).await.out.contains("tether pool list"));
    let ran = tether(&["attach", "--help"], never()).await;
    assert!(ran.out.contains("native for a block device where"), "{}", ran.out);
}
