//! Force: explicit, recorded, and told what it may cost (rule 10).

use std::time::Duration;

use tether_proto::wire;
use tether_tests::tether::FAULT_FILE;

use crate::share::shared_with;
use crate::shared::export_to_another;
use crate::{Fixture, left_on_compute, left_on_storage, reason, text, unexport_by_force};

/// A guest without an operating system never lets go. Force takes the storage away all the same, says so, and records it.
#[tokio::test]
#[ignore = "lab"]
async fn f29_a_guest_that_holds_its_disk_loses_it_only_by_force() {
    let fixture = Fixture::new().await;
    for volume in ["thick/held", "share/held"] {
        fixture.volume(volume).await;
        let id = text(&fixture.attach(&[volume, "empty", "--live-only"]).await, "/attachment_id").to_owned();
        let (_, error) = fixture.tether.error(&["detach", &id, "--guest-timeout", "2"]).await.unwrap();
        assert_eq!(text(&error, "/reason"), "GUEST_HOLDS_DEVICE", "{error:#}");
        let forced =
            fixture.tether.json(&["detach", &id, "--guest-timeout", "2", "--force"]).await.expect("forced");
        let told = forced["may_be_lost"].as_array().expect("sentences").clone();
        assert!(told.iter().any(|line| line.as_str().unwrap().contains("GUEST_HOLDS_DEVICE")), "{forced:#}");
        let request = wire::GetAttachmentRequest { attachment_id: id.clone() };
        let kept =
            fixture.tether.compute().await.unwrap().get_attachment(request).await.unwrap().into_inner();
        assert_eq!((kept.phase.as_str(), kept.may_be_lost.is_empty()), ("ended", false), "{kept:?}");
        // Only the domain's own XML still names a disk, which leads nowhere.
        fixture.lab.compute.run("virsh -q destroy empty").await.unwrap();
        fixture.assert_nothing_left("after the forced detach").await;
        fixture.lab.compute.run("virsh -q start empty").await.unwrap();
        // The volume is free, and the id is spent.
        let again = fixture.attach(&[volume, "c2"]).await;
        fixture.detach(text(&again, "/attachment_id")).await;
    }
}

/// Left out of a run for its time, not for what it shows: `tests/run long`.
mod long {
    use super::*;

    /// The compute host is lost for good: its agent does not answer, its guest still has the disk. Without force the export stays;
    /// with it the host is cut off, on both transports, and the volume goes to another host.
    #[tokio::test]
    #[ignore = "lab"]
    async fn a_host_that_is_lost_is_cut_off_only_by_force() {
        let fixture = Fixture::new().await;
        let storage = &fixture.lab.storage;
        let mut ids = Vec::new();
        for volume in ["thick/lost", "share/lost", "share/beside"] {
            fixture.volume(volume).await;
            ids.push(text(&fixture.attach(&[volume, "c2"]).await, "/attachment_id").to_owned());
        }
        fixture.lab.compute.run("systemctl stop tether-compute-agent").await.unwrap();
        for id in &ids {
            let (_, error) = fixture.tether.error(&["--timeout", "5", "detach", id]).await.unwrap();
            assert_eq!(text(&error, "/reason"), "HOST_UNREACHABLE", "{error:#}");
        }
        let forced =
            fixture.tether.json(&["detach", &ids[0], "--force"]).await.expect("the target is taken away");
        assert!(forced["may_be_lost"][0].as_str().unwrap().contains("is logged in"), "{forced:#}");
        // The share stays for the other volume, so the file stays this export's until that one is given up, too.
        let (_, error) = fixture.tether.error(&["detach", &ids[1], "--force"]).await.unwrap();
        assert_eq!(
            (text(&error, "/reason"), text(&error, "/step")),
            ("VOLUME_IN_USE", "fence-client"),
            "{error:#}"
        );
        assert!(text(&error, "/next").contains(&ids[2]), "{error:#}");
        let refused = export_to_another(&fixture, "share/lost", wire::AccessMode::ReadWrite).await;
        assert_eq!(reason(&refused.expect_err("it is not free yet")).0, "VOLUME_EXPORTED");
        fixture.tether.json(&["detach", &ids[2], "--force"]).await.expect("the last one cuts the host off");
        assert_eq!(shared_with(&fixture).await, "", "nobody has the share");
        fixture.tether.json(&["detach", &ids[1], "--force"]).await.expect("and now this one");
        assert_eq!(left_on_storage(&fixture.lab).await, "");
        for id in &ids {
            let request = wire::GetExportRequest { attachment_id: id.clone() };
            let kept =
                fixture.tether.storage().await.unwrap().get_export(request).await.unwrap().into_inner();
            assert_eq!((kept.phase.as_str(), kept.may_be_lost.is_empty()), ("ended", false), "{kept:?}");
        }
        // nfsd has forgotten the client: the file can be deleted, and the LV too.
        for volume in ["thick/lost", "share/lost", "share/beside"] {
            fixture.tether.json(&["volume", "delete", volume]).await.expect("nobody has it");
        }
        assert_eq!(
            storage.run("cat /proc/fs/nfsd/clients/*/states 2>/dev/null; true").await.unwrap().trim(),
            ""
        );

        // The host comes back: what its agent has is ended there by force, too, and nothing is left.
        fixture.lab.compute.run("systemctl start tether-compute-agent").await.unwrap();
        for id in &ids {
            let forced = fixture.tether.json(&["--timeout", "90", "detach", id, "--force"]).await;
            println!("{:#}", forced.expect("ended on the compute host, too"));
        }
        fixture.lab.compute.run("virsh -q destroy c2").await.unwrap();
        let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
        loop {
            let left = left_on_compute(&fixture.lab).await;
            if left.is_empty() || tokio::time::Instant::now() > deadline {
                assert_eq!(left, "");
                break;
            }
        }
    }

    /// A host that is logged in keeps its export: without force nobody takes the disk away from under its guest.
    #[tokio::test]
    #[ignore = "lab"]
    async fn an_export_whose_host_is_logged_in_ends_only_by_force() {
        let fixture = Fixture::new().await;
        let serial = text(&fixture.volume("thick/logged-in").await, "/serial").to_owned();
        let id = text(&fixture.attach(&["thick/logged-in", "c2"]).await, "/attachment_id").to_owned();
        let disk = fixture.sees("c2", &serial).await;
        let request = wire::UnexportRequest { attachment_id: id.clone(), force: false };
        let refused =
            fixture.tether.storage().await.unwrap().unexport(request).await.expect_err("it is in use");
        let (word, step, next) = reason(&refused);
        assert_eq!((word.as_str(), step.as_str()), ("VOLUME_IN_USE", "check-logged-out"), "{refused:?}");
        assert!(next.contains("detach it there first") && next.contains("--force"), "{next}");
        fixture
            .lab
            .guest("c2")
            .unwrap()
            .write(&disk, "still", 1 << 20)
            .await
            .expect("the guest has its disk");
        let lost = unexport_by_force(&fixture, &id).await.expect("the export is removed").may_be_lost;
        assert!(lost.len() == 1 && lost[0].contains("is logged in"), "{lost:?}");
        assert_eq!(left_on_storage(&fixture.lab).await, "");
        fixture.detach(&id).await;
        fixture.assert_nothing_left("after the detach").await;
    }

    /// F11: an agent that is killed in a forced detach ends it by itself, by force as before, and still knows what may be lost.
    #[tokio::test]
    #[ignore = "lab"]
    async fn f11_a_forced_detach_that_is_killed_is_ended_by_force_and_tells_what_may_be_lost() {
        let fixture = Fixture::new().await;
        let compute = &fixture.lab.compute;
        fixture.volume("thick/killed").await;
        let id = text(&fixture.attach(&["thick/killed", "empty", "--live-only"]).await, "/attachment_id")
            .to_owned();
        compute.put("logout before kill\n", FAULT_FILE, 0o644).await.unwrap();
        let arguments = ["--timeout", "20", "detach", &id, "--guest-timeout", "2", "--force"];
        fixture.tether.error(&arguments).await.expect("the agent dies");
        let command = "timeout 40 sh -c 'until systemctl -q is-active tether-compute-agent; do sleep 0.2; done'; \
                       timeout 40 sh -c 'until journalctl -q -o cat -u tether-compute-agent -n 20 | \
                       grep -q \"reconciled changed=1 \"; do sleep 0.5; done'";
        compute.run_within(command, Duration::from_secs(90)).await.expect("it ends what it had begun");
        let request = wire::GetAttachmentRequest { attachment_id: id.clone() };
        let kept =
            fixture.tether.compute().await.unwrap().get_attachment(request).await.unwrap().into_inner();
        assert_eq!(kept.phase, "ended", "{kept:?}");
        assert!(kept.may_be_lost.iter().any(|line| line.contains("GUEST_HOLDS_DEVICE")), "{kept:?}");
        fixture.tether.json(&["detach", &id]).await.expect("and the storage host, too");
        compute.run("virsh -q destroy empty").await.unwrap();
        fixture.assert_nothing_left("after the forced detach").await;
    }
}
