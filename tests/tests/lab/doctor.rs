//! The doctor: a healthy lab has no error, and what is broken by hand is found with the command that mends it. Each test breaks
//! one thing, looks, runs that very command, and looks again.

use std::time::{Duration, Instant};

use serde_json::Value;
use tether_tests::Host;

use crate::{Fixture, export_to, text, unexport};
use tether_proto::wire;

/// What is broken is found within this: a lock counts as stale after some seconds.
const FOUND: Duration = Duration::from_secs(60);

/// What `tether doctor` finds, and its exit code.
async fn doctor(fixture: &Fixture) -> (i32, Value) {
    let output = fixture.tether.output(&["doctor"]).await.unwrap();
    let found = serde_json::from_str(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"));
    (output.exit_code.unwrap(), found)
}

/// What an agent's own `doctor` finds on its host, and its exit code.
async fn own_doctor(host: &Host) -> (i32, Value) {
    let output = host.try_run(&format!("tether-{}-agent doctor --json", host.name)).await.unwrap();
    let found = serde_json::from_str(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"));
    (output.exit_code.unwrap(), found)
}

fn findings(found: &Value) -> &Vec<Value> {
    found["findings"].as_array().unwrap_or_else(|| panic!("no findings: {found:#}"))
}

/// The worst finding of a check, on one host unless it is the host's own doctor.
fn of<'a>(found: &'a Value, host: &str, check: &str) -> &'a Value {
    let rank = |finding: &Value| {
        let words = ["ok", "note", "warning", "error"];
        words.iter().position(|word| finding["severity"] == *word)
    };
    findings(found)
        .iter()
        .filter(|finding| finding["check"] == check)
        .filter(|finding| finding["host"].is_null() || finding["host"] == host)
        .max_by_key(|finding| rank(finding))
        .unwrap_or_else(|| panic!("no {check} of {host} in {found:#}"))
}

/// Waits until a check finds an error, then runs the command that mends it on its host, and wants it mended.
async fn found_and_mended(fixture: &Fixture, host: &Host, check: &str, words: &str) {
    let begin = Instant::now();
    let mend = loop {
        let (exit, found) = doctor(fixture).await;
        let finding = of(&found, &host.name, check);
        if finding["severity"] == "error" {
            assert_eq!(exit, 2, "{found:#}");
            assert!(text(finding, "/found").contains(words), "{finding:#}");
            assert_ne!(text(finding, "/why"), "", "{finding:#}");
            break text(finding, "/mend").to_owned();
        }
        assert!(begin.elapsed() < FOUND, "not found: {found:#}");
    };
    host.run(&mend).await.unwrap_or_else(|error| panic!("{mend}: {error:#}"));
    let (_, found) = doctor(fixture).await;
    let name = if check == "initiator-names" { "-" } else { &host.name };
    assert_eq!(of(&found, name, check)["severity"], "ok", "after {mend}: {found:#}");
}

#[tokio::test]
#[ignore = "lab"]
async fn a_healthy_lab_has_no_error() {
    let fixture = Fixture::new().await;
    fixture.volume("thick/healthy").await;
    let attached = fixture.attach(&["thick/healthy", "c2"]).await;
    let (exit, found) = doctor(&fixture).await;
    println!("{found:#}");
    let errors: Vec<&Value> =
        findings(&found).iter().filter(|finding| finding["severity"] == "error").collect();
    assert!(errors.is_empty() && exit <= 1, "exit code {exit}: {errors:#?}");
    for (host, check) in [
        ("storage", "kernel-modules"),
        ("storage", "configfs"),
        ("storage", "pools"),
        ("storage", "portals"),
        ("storage", "nfs-addresses"),
        ("storage", "certificates"),
        ("storage", "guests-volume-groups"),
        ("storage", "journal"),
        ("compute", "iscsid"),
        ("compute", "open-iscsi"),
        ("compute", "initiator-name"),
        ("compute", "open-iscsi-lock"),
        ("compute", "multipathd"),
        ("compute", "libvirt"),
        ("compute", "security-driver"),
        ("compute", "state-directory"),
        ("compute", "reachability"),
        ("-", "initiator-names"),
        ("-", "clocks"),
    ] {
        assert_eq!(of(&found, host, check)["severity"], "ok", "{host} {check}: {found:#}");
    }
    for host in [&fixture.lab.storage, &fixture.lab.compute] {
        let (exit, found) = own_doctor(host).await;
        let errors: Vec<_> =
            findings(&found).iter().filter(|finding| finding["severity"] == "error").collect();
        assert!(errors.is_empty() && exit <= 1, "exit code {exit}: {errors:#?}");
        assert_eq!(of(&found, &host.name, "agent")["severity"], "ok", "{found:#}");
        let shown = host.try_run(&format!("tether-{}-agent doctor", host.name)).await.unwrap();
        println!("{}", shown.stdout);
        // A command is not broken into lines.
        let prose = shown.stdout.lines().filter(|line| !line.contains("mend: "));
        assert_eq!(prose.filter(|line| line.chars().count() > 120).count(), 0, "{}", shown.stdout);
    }
    // It looked, and changed nothing.
    fixture.detach(text(&attached, "/attachment_id")).await;
    fixture.assert_nothing_left("after the doctor").await;
}

#[tokio::test]
#[ignore = "lab"]
async fn f24_a_lock_that_a_killed_iscsiadm_left_is_found_and_mended() {
    let fixture = Fixture::new().await;
    // As open-iscsi makes it: a link to its lock file.
    let lock = "cd /run/lock/iscsi && touch lock && ln lock lock.write";
    fixture.lab.compute.run(&format!("mkdir -p /run/lock/iscsi; {lock}")).await.unwrap();
    found_and_mended(&fixture, &fixture.lab.compute, "open-iscsi-lock", "no living process holds it").await;
    fixture.volume("thick/unlocked").await;
    fixture.attach(&["thick/unlocked", "c2"]).await;
}

/// Left out of a run for its time, not for what it shows: `tests/run long`.
mod long {
    use super::*;

    #[tokio::test]
    #[ignore = "lab"]
    async fn f10_a_guests_volume_group_on_an_attached_disk_is_found_and_hidden() {
        let fixture = Fixture::new().await;
        fixture.volume("thick/nested").await;
        // What the guest would do with its disk, done where it is quick.
        let inside = "--config 'devices { scan_lvs = 1 }'";
        let (storage, compute) = (&fixture.lab.storage, &fixture.lab.compute);
        storage
            .run(&format!(
                "set -e; lvchange -ay tether/nested; pvcreate -qq {inside} /dev/tether/nested; \
                 vgcreate -qq {inside} guestvg /dev/tether/nested; lvcreate -qq -y {inside} -Zn -Wn -l 1 -n inner guestvg; \
                 vgchange -qq -an {inside} guestvg"
            ))
            .await
            .unwrap();
        let attached = fixture.attach(&["thick/nested", "c2"]).await;
        let (_, found) = doctor(&fixture).await;
        assert_eq!(of(&found, "storage", "guests-volume-groups")["severity"], "ok", "{found:#}");
        // What a boot, or udev, does on a host that nobody told otherwise.
        compute.run("udevadm settle; vgchange -qq -ay guestvg; test -e /dev/guestvg/inner").await.unwrap();
        found_and_mended(&fixture, compute, "guests-volume-groups", "guestvg of a guest on sd").await;
        compute.run("test ! -e /dev/guestvg/inner").await.unwrap();
        assert_eq!(compute.run("vgs --noheadings -o vg_name").await.unwrap().trim(), "");
        // Nothing holds the disk any more, and it is hidden from the first moment when it comes again.
        fixture.detach(text(&attached, "/attachment_id")).await;
        fixture.attach(&["thick/nested", "c2"]).await;
        compute.run("udevadm settle").await.unwrap();
        assert_eq!(of(&doctor(&fixture).await.1, "compute", "guests-volume-groups")["severity"], "ok");
    }

    #[tokio::test]
    #[ignore = "lab"]
    async fn f42_two_hosts_with_one_initiator_name_are_found_and_mended() {
        let fixture = Fixture::new().await;
        fixture.volume("thick/cloned").await;
        let connector = fixture
            .tether
            .compute()
            .await
            .unwrap()
            .get_connector(wire::GetConnectorRequest {})
            .await
            .unwrap();
        let clone = wire::Connector { hostname: "clone".into(), ..connector.into_inner() };
        let (id, _) = export_to(&fixture, "thick/cloned", clone, wire::AccessMode::ReadWrite).await.unwrap();
        found_and_mended(&fixture, &fixture.lab.compute, "initiator-names", "a host named clone").await;
        unexport(&fixture, &id).await;
        fixture.volume("thick/renamed").await;
        fixture.attach(&["thick/renamed", "c2"]).await;
    }

    #[tokio::test]
    #[ignore = "lab"]
    async fn f48_a_full_thin_pool_is_found_and_extended() {
        let fixture = Fixture::new().await;
        let storage = &fixture.lab.storage;
        storage
            .run(
                "lvremove -qq -y tether/thinpool && lvcreate -qq -y --type thin-pool --zero y --size 64m \
             --poolmetadatasize 4m --name thinpool tether",
            )
            .await
            .unwrap();
        fixture.create("thin/full", "64M", &[]).await;
        let fill = "lvchange -ay tether/full; dd if=/dev/zero of=/dev/tether/full bs=1M count=64 oflag=direct status=none";
        storage.run(fill).await.unwrap();
        let (_, found) = doctor(&fixture).await;
        assert!(
            text(of(&found, "storage", "thin-pools"), "/found").contains("100 % of its data"),
            "{found:#}"
        );
        // Extended it is no error; that nothing extends it by itself stays a note.
        let finding = of(&found, "storage", "thin-pools");
        assert_eq!(finding["severity"], "error");
        storage.run(text(finding, "/mend")).await.unwrap();
        let (_, found) = doctor(&fixture).await;
        assert_eq!(of(&found, "storage", "thin-pools")["severity"], "note", "{found:#}");
    }

    #[tokio::test]
    #[ignore = "lab"]
    async fn f32_the_open_iscsi_whose_logins_hang_is_found() {
        let fixture = Fixture::new().await;
        let script = "#!/bin/sh\necho 'iscsiadm version 2.1.10'\n";
        fixture.lab.compute.put(script, "/usr/local/sbin/iscsiadm-2.1.10", 0o755).await.unwrap();
        let iscsiadm = "$(readlink -f /sbin/iscsiadm)";
        fixture
            .lab
            .compute
            .run(&format!("mount --bind /usr/local/sbin/iscsiadm-2.1.10 {iscsiadm}"))
            .await
            .unwrap();
        // The agent's mounts are the host's; both ways see it.
        for (exit, found) in [doctor(&fixture).await, own_doctor(&fixture.lab.compute).await] {
            let finding = of(&found, "compute", "open-iscsi");
            assert_eq!((exit, finding["severity"].as_str()), (2, Some("error")), "{found:#}");
            assert!(text(finding, "/mend").contains("apt-get install open-iscsi"), "{finding:#}");
        }
        fixture.lab.compute.run(&format!("umount {iscsiadm}")).await.unwrap();
        assert_eq!(of(&doctor(&fixture).await.1, "compute", "open-iscsi")["severity"], "ok");
    }

    #[tokio::test]
    #[ignore = "lab"]
    async fn f10_lvm_that_looks_into_volumes_on_the_storage_host_is_found_and_mended() {
        let fixture = Fixture::new().await;
        fixture.volume("thick/nested").await;
        let storage = &fixture.lab.storage;
        // As an older default, or a well-meant example, has it.
        storage
        .run(
            "set -e; sed -i 's/^devices {/devices {\\n\\tscan_lvs = 1/' /etc/lvm/lvm.conf; lvchange -ay tether/nested; \
             pvcreate -qq /dev/tether/nested; vgcreate -qq guestvg /dev/tether/nested",
        )
        .await
        .unwrap();
        found_and_mended(&fixture, storage, "guests-volume-groups", "guestvg of a guest on dm-").await;
        assert_eq!(storage.run("vgs --noheadings -o vg_name").await.unwrap().trim(), "tether");
    }

    #[tokio::test]
    #[ignore = "lab"]
    async fn an_iscsid_that_was_stopped_is_found_and_mended() {
        let fixture = Fixture::new().await;
        fixture.lab.compute.run("systemctl stop iscsid.socket iscsid.service").await.unwrap();
        found_and_mended(&fixture, &fixture.lab.compute, "iscsid", "neither iscsid.socket nor").await;
    }

    #[tokio::test]
    #[ignore = "lab"]
    async fn a_key_that_is_another_certificates_one_that_others_may_read_and_an_expired_certificate_are_found()
     {
        let fixture = Fixture::new().await;
        let (storage, compute) = (&fixture.lab.storage, &fixture.lab.compute);
        let [own, other] = [
            compute.run("cat /etc/tether/pki/compute.key").await.unwrap(),
            storage.run("cat /etc/tether/pki/storage.key").await.unwrap(),
        ];
        let key = "/etc/tether/pki/compute.key";
        compute.put(other, key, 0o600).await.unwrap();
        let (exit, found) = own_doctor(compute).await;
        assert_eq!((exit, &of(&found, "", "config")["severity"]), (2, &"error".into()), "{found:#}");
        assert!(text(of(&found, "", "certificates"), "/found").contains("server.certificate"), "{found:#}");
        compute.put(own, key, 0o644).await.unwrap();
        found_and_mended(&fixture, compute, "certificates", "may be read by others").await;

        // Certificates are valid for two years.
        compute.run("date -s '+3 years' >/dev/null").await.unwrap();
        let (exit, found) = own_doctor(compute).await;
        compute.run("date -s '-3 years' >/dev/null").await.unwrap();
        let expired = of(&found, "", "certificates");
        assert_eq!((exit, expired["severity"].as_str()), (2, Some("error")), "{found:#}");
        assert!(text(expired, "/found").contains("expired"), "{expired:#}");
        let mend = text(expired, "/mend");
        assert!(mend.starts_with("tether pki issue agent compute --address 127.0.0.1"), "{mend}");
    }

    #[tokio::test]
    #[ignore = "lab"]
    async fn a_broken_config_and_an_agent_that_does_not_run_are_findings_and_hide_nothing() {
        let fixture = Fixture::new().await;
        let storage = &fixture.lab.storage;
        let config = "/etc/tether/storage-agent.toml";
        storage
            .run(&format!(
                "systemctl stop tether-storage-agent; cp {config} /run/good; echo 'nonsense = 1' >>{config}"
            ))
            .await
            .unwrap();
        let (exit, found) = own_doctor(storage).await;
        assert_eq!(exit, 2, "{found:#}");
        let broken = of(&found, "", "config");
        assert_eq!(broken["severity"], "error", "{found:#}");
        assert!(text(broken, "/found").contains("nonsense"), "{broken:#}");
        assert!(text(broken, "/mend").contains("tether-storage-agent --check-config"), "{broken:#}");
        assert_eq!(of(&found, "", "state-directory")["severity"], "ok", "{found:#}");
        // From outside the host is an error of its own, and the other one is looked at all the same.
        let (exit, found) = doctor(&fixture).await;
        assert_eq!((exit, &of(&found, "storage", "agent")["severity"]), (2, &"error".into()), "{found:#}");
        assert_eq!(of(&found, "compute", "libvirt")["severity"], "ok", "{found:#}");

        storage.run(&format!("cp /run/good {config}")).await.unwrap();
        let (_, found) = own_doctor(storage).await;
        assert_eq!(of(&found, "", "config")["severity"], "ok", "{found:#}");
        let stopped = of(&found, "", "agent");
        assert_eq!(stopped["severity"], "error", "{found:#}");
        storage.run(text(stopped, "/mend")).await.unwrap();
        assert_eq!(of(&own_doctor(storage).await.1, "", "agent")["severity"], "ok");
    }
}
