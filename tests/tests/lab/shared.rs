//! Volumes that several hosts have at a time: those made for it, and those that are only read (rule 2, F7). The lab has one
//! compute host; the second is a connector of our own, whose initiator logs in by hand.

use tether_proto::wire;
use tether_tests::Host;
use tether_tests::tether::IQN_PREFIX;
use tonic::Status;

use crate::security::login_by_hand;
use crate::{Fixture, SEEN, export, export_to, iscsi, reason, text, unexport};

const OTHER: &str = "iqn.2026-01.org.tether.lab:other";

/// Exports to a second host.
pub(crate) async fn export_to_another(
    fixture: &Fixture,
    volume: &str,
    mode: wire::AccessMode,
) -> Result<(String, wire::ConnectionInfo), Status> {
    let connector = wire::Connector {
        hostname: "other".into(),
        initiator_iqn: OTHER.into(),
        addresses: vec!["10.99.0.77".into()],
        ..Default::default()
    };
    export_to(fixture, volume, connector, mode).await
}

/// How many targets and backstores of ours there are.
async fn count(storage: &Host) -> (usize, usize) {
    let command = format!(
        "cd /sys/kernel/config/target; shopt -s nullglob; set -- iscsi/{IQN_PREFIX}*; echo $#; \
         set -- core/iblock_7440/tether-*; echo $#"
    );
    let text = storage.run(&command).await.unwrap();
    let mut numbers = text.split_whitespace().map(|number| number.parse().unwrap());
    (numbers.next().unwrap(), numbers.next().unwrap())
}

/// A multi_attach volume: two hosts, a target for each, both write; either goes without the other noticing; and one host has
/// one disk of it.
#[tokio::test]
#[ignore = "lab"]
async fn f7_a_multi_attach_volume_has_a_target_for_each_host_and_either_may_go() {
    let fixture = Fixture::new().await;
    let made = fixture.create("thick/shared", "16M", &["--multi-attach"]).await;
    assert_eq!(made["multi_attach"], true, "{made:#}");
    let serial = text(&made, "/serial").to_owned();
    let one = text(&fixture.attach(&["thick/shared", "c2"]).await, "/attachment_id").to_owned();
    let (two, mut info) = export_to_another(&fixture, "thick/shared", wire::AccessMode::ReadWrite)
        .await
        .expect("a second host");
    assert!(info.multi_attach);
    assert_eq!(count(&fixture.lab.storage).await, (2, 1), "a target each, and the kernel's one backstore");
    let shown = fixture.tether.json(&["volume", "show", "thick/shared"]).await.unwrap();
    assert_eq!(shown["exported_for"].as_array().unwrap().len(), 2, "{shown:#}");
    assert!(fixture.xml("c2", "").await.contains("<shareable/>"));

    let guest = fixture.lab.guest("c2").unwrap();
    let disk = fixture.sees("c2", &serial).await;
    guest.write(&disk, "first", 1 << 20).await.unwrap();
    let connection = iscsi(&mut info).clone();
    let auth = format!(
        "node.session.auth.authmethod = CHAP\nnode.session.auth.username = {}\nnode.session.auth.password = {}\n",
        connection.chap_username, connection.chap_secret
    );
    let in_by_its_own_name = login_by_hand(&fixture, &connection.target_iqn, &auth, Some(OTHER)).await;
    assert_eq!(in_by_its_own_name, Some(0));

    // A second disk on the host that has one would have the same WWN.
    let (_, error) = fixture.tether.error(&["attach", "thick/shared", "c3"]).await.unwrap();
    assert_eq!(text(&error, "/reason"), "VOLUME_EXPORTED", "{error:#}");
    assert!(text(&error, "/message").contains("one disk on each host"), "{error:#}");
    let (_, error) = fixture.tether.error(&["volume", "delete", "thick/shared"]).await.unwrap();
    assert_eq!(text(&error, "/reason"), "VOLUME_EXPORTED", "{error:#}");

    // The other goes: the guest writes on. Then the first goes, and nothing is left.
    unexport(&fixture, &two).await;
    assert_eq!(count(&fixture.lab.storage).await, (1, 1));
    guest.write(&disk, "second", 1 << 20).await.expect("the guest has its disk still");
    let (three, _) = export_to_another(&fixture, "thick/shared", wire::AccessMode::ReadWrite).await.unwrap();
    fixture.detach(&one).await;
    assert_eq!(count(&fixture.lab.storage).await, (1, 1), "the backstore stays for the other");
    guest.wait_gone(&serial, SEEN).await.unwrap();
    // Restarted, the agent knows who shares.
    fixture.lab.storage.run("systemctl restart tether-storage-agent").await.unwrap();
    fixture.attach(&["thick/shared", "c2"]).await;
    unexport(&fixture, &three).await;
    fixture.tether.json(&["detach", "thick/shared", "c2"]).await.unwrap();
    fixture.assert_nothing_left("after both").await;
    fixture.tether.json(&["volume", "delete", "thick/shared"]).await.unwrap();
    // A new one of the name is not shared.
    let made = fixture.volume("thick/shared").await;
    assert_eq!(made["multi_attach"], false, "{made:#}");
}

/// F42: a cloned hypervisor tells another's initiator name: it is given nothing while that one has an export.
#[tokio::test]
#[ignore = "lab"]
async fn f42_a_host_that_tells_anothers_initiator_name_is_given_nothing() {
    let fixture = Fixture::new().await;
    for volume in ["thick/first", "thick/second"] {
        fixture.volume(volume).await;
    }
    let (id, _) = export(&fixture, "thick/first").await;
    let mut compute = fixture.tether.compute().await.unwrap();
    let own = compute.get_connector(wire::GetConnectorRequest {}).await.unwrap().into_inner();
    let clone = wire::Connector { hostname: "clone".into(), ..own };
    let refused = export_to(&fixture, "thick/second", clone.clone(), wire::AccessMode::ReadWrite).await;
    let (word, step, next) = reason(&refused.expect_err("its name is taken"));
    assert_eq!((word.as_str(), step.as_str()), ("INITIATOR_NAME_TAKEN", "validate"));
    assert!(next.contains("initiatorname.iscsi"), "{next}");
    // Restarted, the agent knows it still; once the first has nothing any more, the name is free.
    fixture.lab.storage.run("systemctl restart tether-storage-agent").await.unwrap();
    let refused = export_to(&fixture, "thick/second", clone.clone(), wire::AccessMode::ReadWrite).await;
    assert_eq!(reason(&refused.expect_err("still")).0, "INITIATOR_NAME_TAKEN");
    unexport(&fixture, &id).await;
    let (id, _) = export_to(&fixture, "thick/second", clone, wire::AccessMode::ReadWrite).await.unwrap();
    unexport(&fixture, &id).await;
    fixture.assert_nothing_left("after both").await;
}

/// Left out of a run for its time, not for what it shows: `tests/run long`.
mod long {
    use super::*;

    /// Without multi_attach only readers share, over both transports, and what they are given cannot be written.
    #[tokio::test]
    #[ignore = "lab"]
    async fn f7_readers_share_a_volume_and_no_writer_comes_between() {
        let fixture = Fixture::new().await;
        for volume in ["thick/read", "share/read"] {
            let serial = text(&fixture.volume(volume).await, "/serial").to_owned();
            let one =
                text(&fixture.attach(&[volume, "c2", "--read-only"]).await, "/attachment_id").to_owned();
            let disk = fixture.sees("c2", &serial).await;
            assert!(disk.read_only, "{disk:?}");
            let exported = export_to_another(&fixture, volume, wire::AccessMode::ReadOnly).await;
            let (two, _) = exported.expect("a second reader");
            let refused =
                export_to_another(&fixture, volume, wire::AccessMode::ReadWrite).await.expect_err("a writer");
            assert_eq!(reason(&refused).0, "VOLUME_EXPORTED", "{refused:?}");
            unexport(&fixture, &two).await;
            fixture.detach(&one).await;
            // And beside a writer nobody reads.
            let one = text(&fixture.attach(&[volume, "c2"]).await, "/attachment_id").to_owned();
            let refused =
                export_to_another(&fixture, volume, wire::AccessMode::ReadOnly).await.expect_err("a reader");
            assert_eq!(reason(&refused).0, "VOLUME_EXPORTED", "{refused:?}");
            fixture.detach(&one).await;
        }
        fixture.assert_nothing_left("after the readers").await;
    }

    /// A file of several writers: the share goes to both, QEMU is told, and qcow2 and host caches are refused.
    #[tokio::test]
    #[ignore = "lab"]
    async fn a_multi_attach_file_is_raw_and_not_cached() {
        let fixture = Fixture::new().await;
        let (_, error) = fixture
            .tether
            .error(&["volume", "create", "share/no", "16M", "--multi-attach", "--format", "qcow2"])
            .await
            .unwrap();
        assert_eq!(text(&error, "/reason"), "INVALID_ARGUMENT", "{error:#}");
        let serial =
            text(&fixture.create("share/shared", "16M", &["--multi-attach"]).await, "/serial").to_owned();
        let (_, error) =
            fixture.tether.error(&["attach", "share/shared", "c2", "--cache", "writeback"]).await.unwrap();
        assert!(text(&error, "/message").contains("cache"), "{error:#}");
        let one = text(&fixture.attach(&["share/shared", "c2"]).await, "/attachment_id").to_owned();
        let (two, _) =
            export_to_another(&fixture, "share/shared", wire::AccessMode::ReadWrite).await.unwrap();
        let disk = fixture.sees("c2", &serial).await;
        fixture.lab.guest("c2").unwrap().write(&disk, "shared", 1 << 20).await.unwrap();
        unexport(&fixture, &two).await;
        fixture.detach(&one).await;
        fixture.assert_nothing_left("after both").await;
    }
}
