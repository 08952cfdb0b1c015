//! Nonsense from outside that has to do with files and NFS: a precise status before any side effect.

use tether_proto::wire;
use tonic::Code;

use crate::bad_input::{NAMES, refused, traces};
use crate::share::nfs;
use crate::{Fixture, attach_with, export, new_id, unexport};

#[tokio::test]
#[ignore = "lab"]
async fn the_storage_agent_refuses_names_formats_and_clients_that_are_none() {
    let fixture = Fixture::new().await;
    fixture.volume("share/good").await;
    let mut storage = fixture.tether.storage().await.unwrap();
    let before = traces(&fixture).await;
    let create = |pool: &str, volume: &str| wire::CreateVolumeRequest {
        pool: pool.into(),
        volume: volume.into(),
        size_bytes: 1 << 20,
        ..Default::default()
    };
    let long = "x".repeat(300);
    let escapes =
        ["../x", "a/../../b", "/etc/passwd", ".", ".hidden", "a\0b", "%2e%2e%2fx", "a,b", "a:b", "a*"];
    for name in NAMES.into_iter().chain(escapes).chain([long.as_str()]) {
        let outcome = storage.create_volume(create("share", name)).await;
        refused(&format!("volume {name:?}"), outcome, Code::InvalidArgument, "INVALID_ARGUMENT");
        let extend =
            wire::ExtendVolumeRequest { pool: "share".into(), volume: name.into(), size_bytes: 1 << 30 };
        let outcome = storage.extend_volume(extend).await;
        refused(&format!("extend {name:?}"), outcome, Code::InvalidArgument, "INVALID_ARGUMENT");
        let delete =
            wire::DeleteVolumeRequest { pool: "share".into(), volume: name.into(), ..Default::default() };
        let outcome = storage.delete_volume(delete).await;
        refused(&format!("delete {name:?}"), outcome, Code::InvalidArgument, "INVALID_ARGUMENT");
    }
    let (raw, qcow2) = (wire::VolumeFormat::Raw.into(), wire::VolumeFormat::Qcow2.into());
    let (thick, thin) = (wire::Provisioning::Thick.into(), wire::Provisioning::Thin.into());
    for (what, pool, format, provisioning) in [
        ("qcow2 in a volume group", "thick", qcow2, 0),
        ("qcow2 in a thin pool", "thin", qcow2, 0),
        ("thin in a volume group", "thick", raw, thin),
        ("thick in a thin pool", "thin", raw, thick),
        ("thick qcow2", "share", qcow2, thick),
        ("a format that is none", "share", 99, 0),
        ("a provisioning that is none", "share", 0, 99),
    ] {
        let request = wire::CreateVolumeRequest { format, provisioning, ..create(pool, "v") };
        refused(what, storage.create_volume(request).await, Code::InvalidArgument, "INVALID_ARGUMENT");
    }
    for size_bytes in [0, u64::MAX] {
        let request = wire::CreateVolumeRequest { size_bytes, ..create("share", "v") };
        let status = storage.create_volume(request).await.expect_err("a size that is none");
        assert!([Code::InvalidArgument, Code::ResourceExhausted].contains(&status.code()), "{status:?}");
        let extend = wire::ExtendVolumeRequest { pool: "share".into(), volume: "good".into(), size_bytes };
        let status = storage.extend_volume(extend).await.expect_err("a size that is none");
        assert_ne!(status.code(), Code::Internal, "{status:?}");
    }

    let connector = wire::Connector {
        hostname: "compute".into(),
        initiator_iqn: "iqn.2026-01.org.tether.lab:compute".into(),
        ..Default::default()
    };
    let export = |addresses: &[&str]| wire::ExportRequest {
        attachment_id: new_id(),
        pool: "share".into(),
        volume: "good".into(),
        connector: Some(wire::Connector {
            addresses: addresses.iter().map(|&address| address.to_owned()).collect(),
            ..connector.clone()
        }),
        access_mode: 0,
    };
    for addresses in [&[][..], &["10.0.2.15"], &["192.0.2.1", "2001:db8::1"]] {
        let outcome = storage.export(export(addresses)).await;
        refused(&format!("{addresses:?}"), outcome, Code::FailedPrecondition, "NO_CLIENT_ADDRESS");
    }
    for address in [
        "",
        "compute",
        "*",
        "@everyone",
        "10.99.0.300",
        "10.99.0",
        "10.99.0.0/24",
        "10.99.0.2(rw,no_root_squash)",
        "10.99.0.2 *(rw)",
        "10.99.0.2\n/ *(rw)",
        "10.99.0.2#",
        "fd99::2%lan",
        "[fd99::2]",
        "=2",
    ] {
        // Beside one that is good, too: nothing is passed over in silence.
        for addresses in [&[address][..], &["10.99.0.2", address]] {
            let outcome = storage.export(export(addresses)).await;
            refused(&format!("{addresses:?}"), outcome, Code::InvalidArgument, "INVALID_ARGUMENT");
        }
    }
    assert_eq!(traces(&fixture).await, before);
}

/// The `tether` command: what is refused there has exit code 64 and reaches no agent.
#[tokio::test]
#[ignore = "lab"]
async fn the_command_refuses_names_sizes_and_formats_that_are_none() {
    let fixture = Fixture::new().await;
    fixture.volume("share/good").await;
    let before = traces(&fixture).await;
    for arguments in [
        &["volume", "create", "share/../x", "16M"][..],
        &["volume", "create", "share/a/../../b", "16M"],
        &["volume", "create", "share/v", "0"],
        &["volume", "create", "share/v", "16M", "--format", "vmdk"],
        &["volume", "create", "share/v", "16M", "--provisioning", "some"],
        &["volume", "extend", "share/good"],
        &["volume", "extend", "share/../good", "32M"],
        &["volume", "extend", "share/good", "-1M"],
        &["volume", "extend", "share/good", "+16M"],
        &["volume", "extend", "share/good", "0"],
    ] {
        let output = fixture.tether.output(arguments).await.unwrap();
        assert_eq!(output.exit_code, Some(64), "{arguments:?}: {output:?}");
    }
    for (arguments, reason, code) in [
        (&["volume", "extend", "share/good", "8M"][..], "SHRINK_REFUSED", 4),
        (&["volume", "extend", "share/missing", "32M"], "VOLUME_NOT_FOUND", 3),
        (&["volume", "extend", "nowhere/good", "32M"], "POOL_NOT_FOUND", 3),
        (&["volume", "create", "thick/v", "16M", "--format", "qcow2"], "INVALID_ARGUMENT", 64),
    ] {
        let (found, error) = fixture.tether.error(arguments).await.unwrap();
        assert_eq!((crate::text(&error, "/reason"), found), (reason, code), "{arguments:?}: {error:#}");
    }
    assert_eq!(traces(&fixture).await, before);
}

/// A config with mount options that are more than they seem, or a share that would give root away: exit code 64 before
/// anything is served, and the words say where.
#[tokio::test]
#[ignore = "lab"]
async fn an_agent_refuses_a_config_with_tricks_in_its_nfs_part() {
    let fixture = Fixture::new().await;
    let compute = &fixture.lab.compute;
    let config = compute.run("cat /etc/tether/compute-agent.toml").await.unwrap();
    let check = async |nfs: &str| {
        compute.put(format!("{config}\n[nfs]\n{nfs}\n"), "/run/tried.toml", 0o600).await.unwrap();
        compute.try_run("tether-compute-agent --check-config --config /run/tried.toml").await.unwrap()
    };
    let good = check("versions = [\"4.2\", \"4.1\"]\noptions = [\"nconnect=2\"]").await;
    assert_eq!(good.exit_code, Some(0), "the control: {good:?}");
    for options in [
        "nconnect=2,rw",
        "x;reboot",
        "$(id)",
        "`id`",
        "soft",
        "softerr",
        "noresvport,soft",
        "vers=3",
        "nfsvers=4.0",
        "retry=5",
        "sharecache",
        "remount",
        "bind",
        "suid",
        "dev",
        "exec",
        "nconnect=2 ",
        " ",
        "",
        "-o",
        "--bind",
        "addr=10.0.0.1",
        "proto=udp",
        "sec=none",
        "nconnect=2\\nrw",
        "X-mount.mkdir",
        "context=x",
    ] {
        let refused = check(&format!("options = [\"{options}\"]")).await;
        assert_eq!(refused.exit_code, Some(64), "option {options:?}: {refused:?}");
        assert!(refused.stderr.contains("options"), "option {options:?}: {}", refused.stderr);
    }
    for versions in ["[]", "[\"3\"]", "[\"4.2,soft\"]", "[\"\"]", "[\"4.2\", \"4.2 \"]", "[4.2]"] {
        let refused = check(&format!("versions = {versions}")).await;
        assert_eq!(refused.exit_code, Some(64), "versions {versions}: {refused:?}");
    }

    let storage = &fixture.lab.storage;
    for change in [
        "s/^owner_uid = .*/owner_uid = 0/",
        "s/^owner_gid = .*/owner_gid = 0/",
        "s/^servers = .*/servers = [\"storage\"]/",
        "s/^servers = .*/servers = [\"10.99.0.1:2049\"]/",
        "s/^servers = .*/servers = []/",
        "s/^client_networks = .*/client_networks = [\"10.99.0.0\\/33\"]/",
        "s/^client_networks = .*/client_networks = [\"*\"]/",
        "s/^client_networks = .*/client_networks = [\"10.99.0.0\\/24(rw)\"]/",
        "s/^client_networks = .*//",
        "s/^path = .*/path = \"srv\\/share\"/",
        "s/^path = .*/path = \"\\/srv\\/..\\/etc\"/",
        "s/^path = .*/path = \"\\/srv\\/sh are\"/",
        "s/^path = .*/path = \"\\/\"/",
        "/^\\[nfs\\]/,/^client_networks/d",
    ] {
        let command = format!(
            "sed '{change}' /etc/tether/storage-agent.toml >/run/bad.toml; \
             tether-storage-agent --check-config --config /run/bad.toml"
        );
        let refused = storage.try_run(&command).await.unwrap();
        assert_eq!(refused.exit_code, Some(64), "{change}: {refused:?}");
        assert!(!refused.stderr.is_empty(), "{change}");
    }
}

/// Left out of a run for its time, not for what it shows: `tests/run long`.
mod long {
    use super::*;

    #[tokio::test]
    #[ignore = "lab"]
    async fn the_compute_agent_refuses_servers_paths_and_files_that_are_none() {
        let fixture = Fixture::new().await;
        fixture.volume("share/good").await;
        let (id, info) = export(&fixture, "share/good").await;
        let before = traces(&fixture).await;
        type Change = fn(&mut wire::NfsConnection, &str);
        let server: Change = |nfs, value| nfs.servers = vec![value.into()];
        let second: Change = |nfs, value| nfs.servers.push(value.into());
        let path: Change = |nfs, value| nfs.path = value.into();
        let file: Change = |nfs, value| nfs.file = value.into();
        let fsid: Change = |nfs, value| nfs.file_system_id = value.into();
        let cases: [(&str, Change, &[&str]); 5] = [
            (
                "server",
                server,
                &[
                    "",
                    "storage",
                    "10.99.0.1:2049",
                    "10.99.0.1,rw",
                    "10.99.0.1 ",
                    "10.99.0.1;reboot",
                    "$(reboot)",
                    "-o",
                    "[fd99::1]",
                    "fd99::1%lan",
                    "10.99.0.1:/srv/share",
                ],
            ),
            ("second server", second, &["storage", "10.99.0.1,10.99.0.2"]),
            (
                "path",
                path,
                &[
                    "",
                    "/",
                    "srv/share",
                    "/srv/../etc",
                    "/srv/./share",
                    "/srv//share",
                    "/srv/share/",
                    "/srv/sh,are",
                    "/srv/sh are",
                    "/srv/sh\nare",
                    "/srv/$(reboot)",
                    "/srv/share -o rw",
                    "/srv/ümlaut",
                ],
            ),
            (
                "file",
                file,
                &[
                    "",
                    ".",
                    "..",
                    "../passwd",
                    "a/b",
                    "/etc/passwd",
                    ".hidden",
                    "a,b",
                    "a b",
                    "a'b",
                    "<x>",
                    "a\0b",
                ],
            ),
            (
                "file system",
                fsid,
                &["", "x", "67e5504410b1426f9247bb680e5fe0c8", "67e55044-10b1-426f-9247-bb680e5fe0c"],
            ),
        ];
        for (what, change, values) in cases {
            for value in values {
                let mut wrong = info.clone();
                change(nfs(&mut wrong), value);
                let outcome = attach_with(&fixture, &id, "c2", wrong).await;
                refused(&format!("{what} {value:?}"), outcome, Code::InvalidArgument, "INVALID_ARGUMENT");
            }
        }
        type Spoil = fn(&mut wire::ConnectionInfo);
        let others: [(&str, Spoil); 6] = [
            ("no server", |info| nfs(info).servers.clear()),
            ("inode 0", |info| nfs(info).inode = 0),
            ("a format that is none", |info| nfs(info).format = 99),
            ("size 0", |info| info.size_bytes = 0),
            ("a path that is too long", |info| nfs(info).path = format!("/{}", "x".repeat(512))),
            ("a file name that is too long", |info| nfs(info).file = "x".repeat(121)),
        ];
        for (what, change) in others {
            let mut wrong = info.clone();
            change(&mut wrong);
            let outcome = attach_with(&fixture, &id, "c2", wrong).await;
            refused(what, outcome, Code::InvalidArgument, "INVALID_ARGUMENT");
        }
        assert_eq!(traces(&fixture).await, before);
        unexport(&fixture, &id).await;
        fixture.assert_nothing_left("at the end").await;
    }
}
