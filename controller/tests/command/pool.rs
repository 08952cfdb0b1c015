//! Pools, and volumes of formats that only some pools have.

use crate::fakes::{Lab, lock, nobody};

#[tokio::test]
async fn pools_are_listed_with_their_room() {
    let lab = Lab::up().await;
    let ran = lab.tether(&["pool", "list"]).await;
    assert_eq!(ran.exit, 0, "{ran:?}");
    let mut lines = ran.out.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "));
    assert_eq!(lines.next().unwrap(), "POOL STORAGE TRANSPORT SIZE FREE PROVISIONED");
    assert_eq!(lines.next().unwrap(), "share storage1 nfs 1 TiB 1023 GiB 1 GiB");
    assert_eq!(lines.next().unwrap(), "tether storage1 iscsi 1 TiB 1023 GiB 1 GiB");
    assert_eq!(lines.next(), None);

    // Full is 0, and not unknown.
    assert_eq!(lab.tether(&["volume", "create", "tether/v2", "1023G"]).await.exit, 0);
    let ran = lab.tether(&["volume", "create", "tether/v3", "1G"]).await;
    assert_eq!(ran.exit, 8, "{ran:?}");
    *lock(&lab.storage.share_problem) = "/srv/share is not mounted".into();
    let ran = lab.tether(&["pool", "list", "--storage", "storage1"]).await;
    assert_eq!(ran.exit, 0, "{ran:?}");
    let row = ran.out.lines().nth(2).unwrap();
    assert!(row.contains("1 TiB") && row.contains("0 B"), "{}", ran.out);
    let row = ran.out.lines().nth(1).unwrap();
    assert!(row.contains(" - ") && !row.contains("iB"), "{}", ran.out);
    let last = ran.out.lines().last().unwrap();
    assert_eq!(last, "share on storage1: cannot be used now: /srv/share is not mounted");
    let json = lab.tether(&["--json", "pool", "list"]).await.json();
    assert_eq!(json["pools"][0]["problem"], "/srv/share is not mounted");
    assert_eq!(
        (json["pools"][1]["free_bytes"].as_u64(), json["pools"][1]["transport"].as_str()),
        (Some(0), Some("iscsi"))
    );
    assert_eq!(json["pools"][1]["provisioned_bytes"], 1u64 << 40);
    assert!(json["pools"][1]["problem"].is_null());
}

#[tokio::test]
async fn a_storage_host_that_is_away_hides_no_pool() {
    let lab = Lab::up().await;
    let dead = nobody().await;
    lab.configure(&format!("[storage.storage2]\naddress = \"{dead}\"\n"));
    let ran = lab.tether(&["pool", "list"]).await;
    assert_eq!(ran.exit, 5, "{ran:?}");
    assert!(ran.out.contains("tether") && ran.err.contains("warning: storage host storage2"), "{ran:?}");
    let json = lab.tether(&["--json", "pool", "list"]).await.json();
    assert_eq!(
        (json["pools"].as_array().unwrap().len(), json["unreachable"][0]["host"].as_str()),
        (2, Some("storage2"))
    );
    assert_eq!(lab.tether(&["pool", "list", "--storage", "storage2"]).await.exit, 5);
    assert_eq!(lab.tether(&["pool", "list", "--storage", "storage3"]).await.exit, 64);
}

#[tokio::test]
async fn format_and_provisioning_reach_the_agent() {
    let lab = Lab::up().await;
    let ran = lab.tether(&["volume", "create", "share/v2", "1G", "--format", "qcow2"]).await;
    assert_eq!(ran.exit, 0, "{ran:?}");
    assert!(ran.out.starts_with("created share/v2 (1 GiB, qcow2, thin) on storage1 in "), "{}", ran.out);
    let json = lab.tether(&["--json", "volume", "show", "share/v2"]).await.json();
    assert_eq!((json["format"].as_str(), json["transport"].as_str()), (Some("qcow2"), Some("nfs")));
    assert!(json["wwn"].is_null());
    let ran = lab.tether(&["volume", "show", "share/v2"]).await;
    assert!(
        ran.out.contains("format          qcow2") && ran.out.contains("reached over    nfs"),
        "{}",
        ran.out
    );

    let ran = lab.tether(&["volume", "create", "share/v3", "1G", "--provisioning", "thick"]).await;
    assert!(ran.out.starts_with("created share/v3 (1 GiB, thick) on storage1 in "), "{ran:?}");
    // The same name with another format is another volume.
    assert_eq!(lab.tether(&["volume", "create", "share/v2", "1G", "--format", "raw"]).await.exit, 4);
    // A pool that has no such volumes, and words that nobody knows.
    assert_eq!(lab.tether(&["volume", "create", "tether/v2", "1G", "--format", "qcow2"]).await.exit, 64);
    lab.mutations();
    for bad in [["--format", "vmdk"], ["--provisioning", "fat"]] {
        let ran = lab.tether(&[vec!["volume", "create", "share/v4", "1G"], bad.to_vec()].concat()).await;
        assert_eq!(ran.exit, 64, "{ran:?}");
    }
    assert!(lab.mutations().is_empty());
}
