//! Nonsense from outside: a precise status with reason, step and next action, before any side effect.

use tether_proto::wire;
use tonic::{Code, Status};

use crate::{Fixture, attach_with, export, iscsi, new_id, reason, text, unexport};

/// All that a call could have left behind on the hosts.
pub(crate) async fn traces(fixture: &Fixture) -> String {
    let storage = "find /sys/kernel/config/target/iscsi -mindepth 1 -maxdepth 2 | sort; find /var/lib/tether | sort; ls -lR /srv /etc/exports.d /run/tether; cat /var/lib/nfs/etab; lvs --noheadings -o lv_name tether";
    let compute = "find /etc/iscsi/nodes /var/lib/tether /sys/class/iscsi_session -mindepth 1 | sort; grep nfs /proc/self/mountinfo; virsh -q dumpxml c2";
    let (storage, compute) = tokio::join!(fixture.lab.storage.run(storage), fixture.lab.compute.run(compute));
    format!("{}{}", storage.unwrap(), compute.unwrap())
}

/// The call fails as it should, and says what is wrong and what to do.
pub(crate) fn refused<T: std::fmt::Debug>(what: &str, outcome: Result<T, Status>, code: Code, wanted: &str) {
    let status = outcome.expect_err(what);
    let (reason, step, next) = reason(&status);
    assert_eq!((status.code(), reason.as_str()), (code, wanted), "{what}: {status:?}");
    assert!(!step.is_empty() && !next.is_empty(), "{what}: step {step:?}, next {next:?}");
    assert!(!status.message().is_empty() && !status.message().contains('\u{1b}'), "{what}");
}

pub(crate) const NAMES: [&str; 8] = ["", "a/b", "..", "a b", "a\nb", "a\u{1b}[31m", "-rf", "ü"];

#[tokio::test]
#[ignore = "lab"]
async fn the_storage_agent_refuses_nonsense_before_any_side_effect() {
    let fixture = Fixture::new().await;
    let mut storage = fixture.tether.storage().await.unwrap();
    let before = traces(&fixture).await;
    let long = "x".repeat(300);
    let create = |pool: &str, volume: &str, size_bytes: u64| wire::CreateVolumeRequest {
        pool: pool.into(),
        volume: volume.into(),
        size_bytes,
        ..Default::default()
    };
    for name in NAMES.into_iter().chain([long.as_str(), "snapshot1", "tether-unwiped-x"]) {
        let outcome = storage.create_volume(create("thick", name, 1 << 20)).await;
        refused(&format!("volume {name:?}"), outcome, Code::InvalidArgument, "INVALID_ARGUMENT");
    }
    for name in NAMES.into_iter().chain([long.as_str()]) {
        let outcome = storage.create_volume(create(name, "v", 1 << 20)).await;
        refused(&format!("pool {name:?}"), outcome, Code::InvalidArgument, "INVALID_ARGUMENT");
    }
    refused(
        "an unknown pool",
        storage.create_volume(create("nope", "v", 1 << 20)).await,
        Code::NotFound,
        "POOL_NOT_FOUND",
    );
    refused(
        "size 0",
        storage.create_volume(create("thick", "v", 0)).await,
        Code::InvalidArgument,
        "INVALID_ARGUMENT",
    );
    for size in [1 << 40, u64::MAX] {
        let status = storage.create_volume(create("thick", "v", size)).await.unwrap_err();
        assert!(["POOL_FULL", "INVALID_ARGUMENT"].contains(&reason(&status).0.as_str()), "{status:?}");
    }
    refused(
        "over the free space",
        storage.create_volume(create("thick", "v", 1 << 40)).await,
        Code::ResourceExhausted,
        "POOL_FULL",
    );
    refused(
        "over a thin pool",
        storage.create_volume(create("thin", "v", 1 << 40)).await,
        Code::ResourceExhausted,
        "POOL_FULL",
    );

    let connector = wire::Connector {
        hostname: "compute".into(),
        initiator_iqn: "iqn.2026-01.org.tether.lab:compute".into(),
        ..Default::default()
    };
    let export = wire::ExportRequest {
        attachment_id: new_id(),
        pool: "thick".into(),
        volume: "missing".into(),
        connector: Some(connector.clone()),
        access_mode: 0,
    };
    refused("an unknown volume", storage.export(export.clone()).await, Code::NotFound, "VOLUME_NOT_FOUND");
    for iqn in ["", "iqn", "eui.02004567A425678D", "iqn.2026-01.x:../../y", "iqn.2026-01.org.x:a b"] {
        let connector = Some(wire::Connector { initiator_iqn: iqn.into(), ..connector.clone() });
        let request = wire::ExportRequest { connector, ..export.clone() };
        refused(
            &format!("iqn {iqn:?}"),
            storage.export(request).await,
            Code::InvalidArgument,
            "INVALID_ARGUMENT",
        );
    }
    for id in ["", "x", "../../etc/passwd", "00000000-0000-0000-0000-000000000000"] {
        let request = wire::ExportRequest { attachment_id: id.into(), ..export.clone() };
        refused(
            &format!("id {id:?}"),
            storage.export(request).await,
            Code::InvalidArgument,
            "INVALID_ARGUMENT",
        );
    }
    let request = wire::ExportRequest { connector: None, ..export };
    refused("no connector", storage.export(request).await, Code::InvalidArgument, "INVALID_ARGUMENT");
    assert_eq!(traces(&fixture).await, before);
}

#[tokio::test]
#[ignore = "lab"]
async fn the_compute_agent_refuses_nonsense_before_any_side_effect() {
    let fixture = Fixture::new().await;
    fixture.volume("thick/good").await;
    let (id, info) = export(&fixture, "thick/good").await;
    let before = traces(&fixture).await;
    refused(
        "an unknown domain",
        attach_with(&fixture, &id, "nope", info.clone()).await,
        Code::NotFound,
        "DOMAIN_NOT_FOUND",
    );
    let long = "x".repeat(300);
    for domain in ["", "a/b", "../c2", "c2\n", "a\u{1b}[31m", long.as_str()] {
        let outcome = attach_with(&fixture, &id, domain, info.clone()).await;
        refused(&format!("domain {domain:?}"), outcome, Code::InvalidArgument, "INVALID_ARGUMENT");
    }
    refused(
        "a domain with a space",
        attach_with(&fixture, &id, "c 2", info.clone()).await,
        Code::NotFound,
        "DOMAIN_NOT_FOUND",
    );
    type Change = fn(&mut wire::IscsiConnection);
    let changes: [(&str, Change); 8] = [
        ("a portal without a port", |iscsi| iscsi.portals = vec!["10.99.0.1".into()]),
        ("no portal", |iscsi| iscsi.portals.clear()),
        ("a portal that is a name", |iscsi| iscsi.portals = vec!["storage:3260".into()]),
        ("a target that is no IQN", |iscsi| iscsi.target_iqn = "../../../etc/passwd".into()),
        ("a LUN that is not 0", |iscsi| iscsi.lun = 1),
        ("a WWN that is none", |iscsi| iscsi.wwn = "naa.6001405".into()),
        ("a secret with a newline", |iscsi| {
            iscsi.chap_secret = "secret-secret\nnode.startup = automatic".into()
        }),
        ("a user name with a newline", |iscsi| iscsi.chap_username = "user\nnode.startup = automatic".into()),
    ];
    for (what, change) in changes {
        let mut wrong = info.clone();
        change(iscsi(&mut wrong));
        refused(
            what,
            attach_with(&fixture, &id, "c2", wrong).await,
            Code::InvalidArgument,
            "INVALID_ARGUMENT",
        );
    }
    let mut compute = fixture.tether.compute().await.unwrap();
    let attach = |disk: wire::DiskOptions| wire::AttachRequest {
        attachment_id: id.clone(),
        domain: "c2".into(),
        connection_info: Some(info.clone()),
        disk: Some(disk),
    };
    let disks = [
        (
            "a target device of another bus",
            wire::DiskOptions { target_device: "sdb".into(), ..Default::default() },
        ),
        (
            "a target device with markup",
            wire::DiskOptions { target_device: "vd'/><x".into(), ..Default::default() },
        ),
        ("a serial that is too long", wire::DiskOptions { serial: "x".repeat(21), ..Default::default() }),
        ("a serial with markup", wire::DiskOptions { serial: "</serial>".into(), ..Default::default() }),
        ("native I/O on a cached disk", wire::DiskOptions { cache: 3, io: 1, ..Default::default() }),
        ("an unknown bus", wire::DiskOptions { bus: 99, ..Default::default() }),
    ];
    for (what, disk) in disks {
        refused(what, compute.attach(attach(disk)).await, Code::InvalidArgument, "INVALID_ARGUMENT");
    }
    fixture.lab.compute.run("virsh -q destroy c3").await.unwrap();
    let live_only =
        wire::DiskOptions { persistence: wire::Persistence::LiveOnly.into(), ..Default::default() };
    let request = wire::AttachRequest { domain: "c3".into(), ..attach(live_only) };
    refused(
        "live only, shut off",
        compute.attach(request).await,
        Code::FailedPrecondition,
        "DOMAIN_NOT_RUNNING",
    );
    refused(
        "no connection info",
        compute
            .attach(wire::AttachRequest { connection_info: None, ..attach(wire::DiskOptions::default()) })
            .await,
        Code::InvalidArgument,
        "INVALID_ARGUMENT",
    );
    assert_eq!(traces(&fixture).await, before);
    unexport(&fixture, &id).await;
}

/// A config that cannot be used: exit code 64, and what is wrong where.
#[tokio::test]
#[ignore = "lab"]
async fn an_agent_refuses_a_config_with_an_unknown_key_or_a_missing_certificate() {
    let fixture = Fixture::new().await;
    for (change, words) in [
        ("s/^portals/portal/", "unknown field `portal`"),
        ("s/^certificate.*//", "server.certificate"),
        ("s/storage.key/missing.key/", "missing.key"),
        ("s/:3260\"/\"/", "must have a port"),
    ] {
        let command = format!(
            "sed '{change}' /etc/tether/storage-agent.toml >/run/bad.toml; tether-storage-agent --config /run/bad.toml"
        );
        let output = fixture.lab.storage.try_run(&command).await.unwrap();
        assert_eq!(output.exit_code, Some(64), "{change}: {output:?}");
        assert!(output.stderr.contains(words), "{change}: {}", output.stderr);
    }
    // A certificate and a key that do not fit may be about to: that is another exit code, after which systemd tries again.
    let key = fixture.lab.compute.run("cat /etc/tether/pki/compute.key").await.unwrap();
    fixture.lab.storage.put(key, "/etc/tether/pki/other.key", 0o600).await.unwrap();
    let other = "sed 's/storage.key/other.key/' /etc/tether/storage-agent.toml >/run/bad.toml; \
                 tether-storage-agent --config /run/bad.toml; echo $?; \
                 tether-storage-agent --config /run/bad.toml --check-config; echo $?";
    let codes = fixture.lab.storage.run(other).await.unwrap();
    assert_eq!(codes.split_whitespace().collect::<Vec<_>>(), ["1", "64"]);
    let open = "chmod 644 /etc/tether/pki/storage.key; tether-storage-agent --check-config; echo $?; chmod 600 /etc/tether/pki/storage.key";
    assert_eq!(fixture.lab.storage.run(open).await.unwrap().trim(), "64");
}

/// A file of the journal that cannot be read is set aside and named. What is known goes on; what it might be about is refused, by
/// name, until somebody has seen to it.
#[tokio::test]
#[ignore = "lab"]
async fn a_damaged_record_is_named_and_nothing_is_guessed_from_it() {
    let fixture = Fixture::new().await;
    for volume in ["thick/known", "thick/free"] {
        fixture.volume(volume).await;
    }
    let known = text(&fixture.attach(&["thick/known", "c2"]).await, "/attachment_id").to_owned();
    let lost = new_id();
    let hosts =
        [(&fixture.lab.storage, "storage", "exports"), (&fixture.lab.compute, "compute", "attachments")];
    for (host, agent, folder) in hosts {
        let folder = format!("/var/lib/tether/{agent}-agent/{folder}");
        let damage = format!(
            "printf '{{\"version\":1,\"rec' >{folder}/{lost}.json; echo notes >{folder}/notes.txt; mkdir {folder}/old; \
             systemctl restart tether-{agent}-agent; cat {folder}/{lost}.json.damaged {folder}/notes.txt; \
             journalctl -q -o cat -u tether-{agent}-agent -n 40 | grep -c '{lost}.json.damaged'"
        );
        let seen = host.run(&damage).await.expect("it starts all the same");
        assert!(seen.starts_with("{\"version\":1,\"recnotes"), "nothing is thrown away: {seen}");
    }
    let refused = |arguments: Vec<String>| {
        let fixture = &fixture;
        async move {
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            let (_, error) = fixture.tether.error(&arguments).await.unwrap();
            assert_eq!(text(&error, "/reason"), "JOURNAL_FAILED", "{arguments:?}: {error:#}");
            assert!(text(&error, "/message").contains(".json.damaged"), "{error:#}");
        }
    };
    let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
    refused(words("attach thick/free c3")).await;
    refused(words("volume delete thick/free")).await;
    for ended in [
        crate::crash::detach_rpc(&fixture, &new_id()).await.map(drop),
        crate::crash::unexport_rpc(&fixture, &new_id()).await.map(drop),
    ] {
        let error = ended.expect_err("whether it is there is not known");
        assert_eq!(reason(&error).0, "JOURNAL_FAILED", "{error:?}");
    }
    let findings = fixture.tether.output(&["doctor"]).await.unwrap();
    assert!(findings.stdout.contains(&lost), "{}", findings.stdout);
    // What is known is whole, and can end.
    assert!(crate::share::attachment(&fixture, &known).await.connected);
    for (host, agent, folder) in hosts {
        let mend = format!(
            "cd /var/lib/tether/{agent}-agent/{folder} && rm {lost}.json.damaged && rmdir old && \
                            systemctl restart tether-{agent}-agent"
        );
        host.run(&mend).await.unwrap();
    }
    fixture.detach(&known).await;
    let id = text(&fixture.attach(&["thick/free", "c3"]).await, "/attachment_id").to_owned();
    fixture.detach(&id).await;
    fixture.assert_nothing_left("at the end").await;
}
