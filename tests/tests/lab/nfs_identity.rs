//! Right file or no file (rule 1, F1): what was exported is what is plugged in, or nothing is.

use tether_proto::wire;
use tether_tests::tether::SHARE;
use tonic::Code;

use crate::share::{file_facts, mounts, nfs};
use crate::{Fixture, attach_with, export, leftovers, new_id, reason, text, unexport};

/// Another file under the same name, with the same content, owner and mode: what a careless restore leaves.
fn replace(file: &str) -> String {
    format!("cd {SHARE} && cp -a --sparse=always {file} new && mv new {file} && sync -f .")
}

/// The attach is refused, and neither guest nor host have anything of it.
async fn refused(fixture: &Fixture, what: &str, id: &str, info: wire::ConnectionInfo) {
    let (xml, mounted) = (fixture.xml("c2", "").await, mounts(fixture).await);
    let status = attach_with(fixture, id, "c2", info).await.expect_err(what);
    let (reason, step, next) = reason(&status);
    assert_eq!((reason.as_str(), step.as_str()), ("WRONG_DEVICE", "verify-file"), "{what}: {status:?}");
    assert_eq!(status.code(), Code::DataLoss, "{what}");
    assert!(next.contains("do not use it"), "{what}: {next}");
    assert_eq!(fixture.xml("c2", "").await, xml, "{what}: the guest got nothing");
    assert_eq!(mounts(fixture).await, mounted, "{what}: no mount is left, and none that was there is gone");
    unexport(fixture, id).await;
}

/// F1: each part of a file's identity is looked at: inode, size, the share's file system. First with the attach's own
/// mount, then in one that is in use and whose client remembers the old file.
#[tokio::test]
#[ignore = "lab"]
async fn f1_a_file_that_was_replaced_between_export_and_attach_is_refused() {
    let fixture = Fixture::new().await;
    let storage = &fixture.lab.storage;
    fixture.volume("share/right").await;
    let other = fixture.create("share/other", "16M", &[]).await;

    let (id, info) = export(&fixture, "share/right").await;
    storage.run(&replace("right.raw")).await.unwrap();
    refused(&fixture, "another inode", &id, info).await;
    assert_eq!(leftovers(&fixture.lab).await, "");

    // The pool has no volume any more that anybody may trust under this name; the rest is tried with the other.
    let (id, mut info) = export(&fixture, "share/other").await;
    nfs(&mut info).file_system_id = "67e55044-10b1-426f-9247-bb680e5fe0c8".into();
    refused(&fixture, "another file system", &id, info).await;
    let (id, mut info) = export(&fixture, "share/other").await;
    info.size_bytes += 1 << 20;
    refused(&fixture, "another size", &id, info).await;
    let (id, info) = export(&fixture, "share/other").await;
    storage.run(&format!("truncate -s 20M {SHARE}/other.raw")).await.unwrap();
    refused(&fixture, "a file that has grown", &id, info).await;
    storage.run(&format!("truncate -s 16M {SHARE}/other.raw")).await.unwrap();
    assert_eq!(leftovers(&fixture.lab).await, "");

    // The very file, and in it a smaller disk.
    fixture.create("share/layered", "16M", &["--format", "qcow2"]).await;
    let (id, info) = export(&fixture, "share/layered").await;
    let smaller =
        format!("cd {SHARE} && qemu-img create -q -f qcow2 /run/small 8M && cat /run/small >layered.qcow2");
    storage.run(&smaller).await.unwrap();
    refused(&fixture, "a smaller disk in the same qcow2 file", &id, info).await;
    assert_eq!(leftovers(&fixture.lab).await, "");

    // The client has just used the file, and remembers its attributes.
    fixture.volume("share/first").await;
    let first = text(&fixture.attach(&["share/first", "c3"]).await, "/attachment_id").to_owned();
    fixture.attach(&["share/other", "c2"]).await;
    fixture.sees("c2", text(&other, "/serial")).await;
    fixture.tether.json(&["detach", "share/other", "c2"]).await.unwrap();
    let (id, info) = export(&fixture, "share/other").await;
    storage.run(&replace("other.raw")).await.unwrap();
    refused(&fixture, "another inode in a mount that is in use", &id, info).await;
    fixture.detach(&first).await;
    assert_eq!(leftovers(&fixture.lab).await, "");
}

/// Left out of a run for its time, not for what it shows: `tests/run long`.
mod long {
    use super::*;

    /// F20, F7: a file has one writer, and the same file at another export has the same identity.
    #[tokio::test]
    #[ignore = "lab"]
    async fn f7_a_file_has_one_writer_and_one_identity() {
        let fixture = Fixture::new().await;
        let made = fixture.volume("share/one").await;
        let id = text(&fixture.attach(&["share/one", "c2"]).await, "/attachment_id").to_owned();
        for _ in 0..2 {
            let (code, error) = fixture.tether.error(&["attach", "share/one", "c3"]).await.unwrap();
            assert_eq!((text(&error, "/reason"), code), ("VOLUME_EXPORTED", 4), "{error:#}");
            assert!(text(&error, "/message").contains(&id), "{error:#}");
            let (_, error) = fixture.tether.error(&["volume", "delete", "share/one"]).await.unwrap();
            assert_eq!(text(&error, "/reason"), "VOLUME_EXPORTED", "{error:#}");
            fixture.lab.storage.run("systemctl restart tether-storage-agent").await.unwrap();
        }
        // Another attachment of the very same export would be a second writer, too.
        let mut compute = fixture.tether.compute().await.unwrap();
        let connector = compute.get_connector(wire::GetConnectorRequest {}).await.unwrap().into_inner();
        let again = wire::ExportRequest {
            attachment_id: id.clone(),
            pool: "share".into(),
            volume: "one".into(),
            connector: Some(connector),
            access_mode: wire::AccessMode::ReadWrite.into(),
        };
        let mut storage = fixture.tether.storage().await.unwrap();
        let mut info = storage.export(again).await.unwrap().into_inner().connection_info.unwrap();
        let second = attach_with(&fixture, &new_id(), "c3", info.clone()).await.unwrap_err();
        assert_eq!(reason(&second).0, "TARGET_ATTACHED", "{second:?}");
        assert!(second.message().contains(&id), "{second:?}");
        let inode = fixture.lab.storage.run(&format!("stat -c %i {SHARE}/one.raw")).await.unwrap();
        assert_eq!(nfs(&mut info).inode.to_string(), inode.trim());
        assert_eq!(info.serial, text(&made, "/serial"));
        fixture.detach(&id).await;
        let (id, mut later) = export(&fixture, "share/one").await;
        assert_eq!((nfs(&mut later).clone(), later.serial), (nfs(&mut info).clone(), info.serial));
        unexport(&fixture, &id).await;
        fixture.assert_nothing_left("at the end").await;
    }

    /// A file that is gone or replaced when it is to be exported is refused by the storage agent, and nothing is shared.
    #[tokio::test]
    #[ignore = "lab"]
    async fn f1_a_file_that_was_replaced_before_the_export_is_refused_by_the_storage_agent() {
        let fixture = Fixture::new().await;
        let storage = &fixture.lab.storage;
        let secret = "echo do-not-touch >/run/secret && chmod 600 /run/secret";
        storage.run(secret).await.unwrap();
        for (volume, change) in [
            ("copied", replace("copied.raw")),
            ("gone", format!("rm {SHARE}/gone.raw")),
            ("linked", format!("ln -sf /run/secret {SHARE}/linked.raw")),
            ("folder", format!("rm {SHARE}/folder.raw && mkdir {SHARE}/folder.raw")),
            ("pipe", format!("rm {SHARE}/pipe.raw && mkfifo -m 600 {SHARE}/pipe.raw")),
            ("shorter", format!("truncate -s 1M {SHARE}/shorter.raw")),
        ] {
            let name = format!("share/{volume}");
            fixture.volume(&name).await;
            storage.run(&change).await.unwrap();
            let (code, error) =
                fixture.tether.error(&["attach", &name, "c2", "--id", &new_id()]).await.unwrap();
            let reason = text(&error, "/reason");
            assert!(
                ["WRONG_DEVICE", "VOLUME_NOT_FOUND", "NOT_OURS"].contains(&reason),
                "{volume}: exit code {code}: {error:#}"
            );
            assert_ne!(
                error["step"], "verify-file",
                "{volume}: the storage agent should have noticed: {error:#}"
            );
            assert_eq!(leftovers(&fixture.lab).await, "", "{volume}");
        }
        // A delete follows no link, and takes no file that is not the volume's.
        let delete = fixture.tether.output(&["volume", "delete", "share/linked"]).await.unwrap();
        println!("delete of a volume that is a link: {}", delete.stdout);
        let there = storage.run("cat /run/secret; stat -c '%a %U' /run/secret").await.unwrap();
        assert_eq!(there, "do-not-touch\n600 root\n");
        let (_, error) = fixture.tether.error(&["volume", "delete", "share/copied"]).await.unwrap();
        assert!(["WRONG_DEVICE", "NOT_OURS"].contains(&text(&error, "/reason")), "{error:#}");
        assert!(file_facts(&fixture, "copied.raw").await.ends_with(" 16777216"));
    }
}
