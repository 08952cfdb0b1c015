//! Who may reach a shared directory, and as whom (rules 6 and 12, F16, F47).

use std::time::Duration;

use tether_proto::wire;
use tether_tests::tether::SHARE;

use crate::share::{make_stranger, mount_of, nfs, shared_with, stranger_mounts};
use crate::{Fixture, attach_with, export, leftovers, new_id, text, unexport};

/// F47: the directory is shared with the compute host's addresses in the client networks, and another host on the network
/// cannot mount it. That it can when somebody lets it in shows that the refusals are refusals.
#[tokio::test]
#[ignore = "lab"]
async fn f47_only_the_clients_own_addresses_can_mount_and_only_while_it_has_an_export() {
    let fixture = Fixture::new().await;
    let (storage, compute) = (&fixture.lab.storage, &fixture.lab.compute);
    fixture.volume("share/one").await;
    fixture.volume("share/two").await;
    make_stranger(&fixture).await;
    let id = text(&fixture.attach(&["share/one", "c2"]).await, "/attachment_id").to_owned();
    let lines = shared_with(&fixture).await;
    let clients: Vec<&str> =
        lines.lines().map(|line| line.split(['\t', '(']).nth(1).unwrap_or_default()).collect();
    assert_eq!(clients.len(), 2, "{lines}");
    assert!(
        clients.contains(&"10.99.0.2/32") && clients.contains(&"fd99::2/128"),
        "never 10.0.2.15: {lines}"
    );
    for line in lines.lines() {
        for option in ["all_squash", "anonuid=64055", "anongid=64055", "sec=sys", "fsid=", "rw"] {
            assert!(line.split(['(', ',', ')']).any(|found| found.starts_with(option)), "{option} in {line}");
        }
        assert!(!line.contains("no_root_squash") && !line.contains("no_all_squash"), "{line}");
    }
    for address in ["10.99.0.2", "fd99--2"] {
        let file = format!("/etc/exports.d/tether-share-{address}.exports");
        let facts = format!("stat -c '%U %G' {file}; find {file} -perm /022; grep -c '^[^#]' {file}");
        assert_eq!(storage.run(&facts).await.unwrap(), "root root\n1\n");
    }
    for server in ["10.99.0.1", "[fd99::1]"] {
        let refused = stranger_mounts(&fixture, server).await.expect_err("a stranger mounts the share");
        assert!(refused.contains("access denied"), "{refused}");
    }
    storage.run(&format!("exportfs -o rw,all_squash,no_subtree_check 10.99.0.77:{SHARE}")).await.unwrap();
    stranger_mounts(&fixture, "10.99.0.1").await.expect("let in, the stranger gets in");
    storage.run(&format!("exportfs -u 10.99.0.77:{SHARE}")).await.unwrap();

    // The second export of the same client changes nothing, and the first that ends takes nothing away.
    let second = text(&fixture.attach(&["share/two", "c3"]).await, "/attachment_id").to_owned();
    assert_eq!(shared_with(&fixture).await, lines);
    fixture.detach(&id).await;
    assert_eq!(shared_with(&fixture).await, lines);
    // A mount of the hypervisor's own is cut off with the last export.
    let mount = format!(
        "mkdir /run/own && timeout 20 mount -t nfs -o vers=4.2,retry=0,nosharecache 10.99.0.1:{SHARE} /run/own"
    );
    compute.run(&mount).await.unwrap();
    let read = "timeout 20 dd if=/run/own/two.raw iflag=direct bs=4k count=1 2>&1 >/dev/null";
    compute.run(read).await.expect("the client reads while it has an export");
    fixture.detach(&second).await;
    fixture.assert_nothing_left("after the last detach").await;
    let cut_off = compute.try_run(read).await.unwrap();
    assert_ne!(cut_off.exit_code, Some(0), "{cut_off:?}");
    let again =
        "umount -f -l /run/own; timeout 20 mount -t nfs -o vers=4.2,retry=0 10.99.0.1:/srv/share /run/own";
    let refused = compute.try_run(again).await.unwrap();
    assert_eq!(refused.exit_code, Some(32), "mount(8): {refused:?}");
}

/// Root on a hypervisor is nobody on the share: it lists nothing, makes nothing, gives nothing away, and reads no file that
/// is not the pool's.
#[tokio::test]
#[ignore = "lab"]
async fn root_on_the_hypervisor_is_nobody_on_the_share() {
    let fixture = Fixture::new().await;
    fixture.volume("share/mine").await;
    let theirs = format!("cd {SHARE} && echo secret >theirs && chmod 600 theirs && mkdir -m 700 folder");
    fixture.lab.storage.run(&theirs).await.unwrap();
    let id = text(&fixture.attach(&["share/mine", "c2"]).await, "/attachment_id").to_owned();
    let folder = mount_of(&fixture, &id).await;
    let compute = &fixture.lab.compute;
    compute
        .run(&format!("test -f {folder}/mine.raw && test -e {folder}/theirs"))
        .await
        .expect("they are there");
    for attempt in [
        "ls .",
        "touch new",
        "mkdir new",
        "mknod new c 1 3",
        "chown 0 mine.raw",
        "ln mine.raw new",
        "mv mine.raw new",
        "rm -f mine.raw",
        "cat theirs",
        "echo x >theirs",
        "rm -f theirs",
        "ls folder",
        "chmod 777 .",
    ] {
        let output = compute.try_run(&format!("cd {folder} && timeout 20 sh -c '{attempt}'")).await.unwrap();
        assert_ne!(output.exit_code, Some(0), "{attempt}: {output:?}");
        let denied = ["denied", "not permitted"].iter().any(|word| output.stderr.contains(word));
        assert!(denied, "{attempt}: {output:?}");
    }
    let left = format!("cd {SHARE} && cat theirs && stat -c '%U %a' . && ls | sort");
    let left = fixture.lab.storage.run(&left).await.unwrap();
    assert_eq!(left, "secret\nroot 711\nfolder\nlost+found\nmine.raw\ntheirs\n");
    fixture.detach(&id).await;
    fixture.assert_nothing_left("after the detach").await;
}

/// The lines of other directories, and of this one that are not the client's.
pub(crate) async fn foreign_lines(fixture: &Fixture) -> String {
    let command = "cat /etc/exports.d/foreign.exports; \
                   grep -vE '^/srv/share[[:space:]](10.99.0.2/32|fd99::2/128)\\(' /var/lib/nfs/etab | sort";
    fixture.lab.storage.run(command).await.unwrap()
}

/// Left out of a run for its time, not for what it shows: `tests/run long`.
mod long {
    use super::*;

    /// A read-only export is read-only on the server, whatever the hypervisor tries, until another export of the same client is to
    /// be written to.
    #[tokio::test]
    #[ignore = "lab"]
    async fn a_read_only_file_is_refused_a_write_by_the_server_itself() {
        let fixture = Fixture::new().await;
        let serial = text(&fixture.volume("share/fixed").await, "/serial").to_owned();
        let writable = text(&fixture.volume("share/writable").await, "/serial").to_owned();
        let fixed =
            text(&fixture.attach(&["share/fixed", "c2", "--read-only"]).await, "/attachment_id").to_owned();
        let disk = fixture.sees("c2", &serial).await;
        assert!(disk.read_only, "{disk:?}");
        let file = format!("{}/fixed.raw", mount_of(&fixture, &fixed).await);
        let write = format!("timeout 20 dd if=/dev/zero of={file} bs=512 count=1 conv=notrunc,fsync 2>&1");
        let refused = fixture.lab.compute.try_run(&write).await.unwrap();
        let words = ["Read-only file system", "Permission denied"];
        assert!(words.iter().any(|words| refused.stdout.contains(words)), "{refused:?}");
        for line in shared_with(&fixture).await.lines() {
            assert!(line.split(['(', ',']).any(|option| option == "ro"), "{line}");
        }
        let other = text(&fixture.attach(&["share/writable", "c3"]).await, "/attachment_id").to_owned();
        let disk = fixture.sees("c3", &writable).await;
        fixture.lab.guest("c3").unwrap().write(&disk, "written", 1 << 20).await.unwrap();
        fixture.detach(&other).await;
        for line in shared_with(&fixture).await.lines() {
            assert!(line.split(['(', ',']).any(|option| option == "ro"), "read-only again: {line}");
        }
        fixture.detach(&fixed).await;
        let status = fixture.tether.storage().await.unwrap().list_exports(wire::ListExportsRequest {}).await;
        assert!(status.unwrap().into_inner().exports.is_empty());
        fixture.assert_nothing_left("after both").await;
    }

    /// F16: exports of somebody else stay as they are through attach, failed attach, detach and a restart of the agent: those of
    /// a file, those made by hand that are in no file, of other directories and of ours.
    #[tokio::test]
    #[ignore = "lab"]
    async fn f16_exports_of_somebody_else_are_untouched() {
        let fixture = Fixture::new().await;
        let storage = &fixture.lab.storage;
        fixture.volume("share/ours").await;
        storage
            .run(
                "mkdir -p /srv/theirs /etc/exports.d && \
                 echo '/srv/theirs 10.99.0.2(ro,no_subtree_check) 10.99.0.50(rw,no_subtree_check)' >/etc/exports.d/foreign.exports && \
                 exportfs -r && exportfs -o ro,no_subtree_check 10.99.0.51:/srv/theirs && \
                 exportfs -o ro,all_squash,no_subtree_check 10.99.0.60:/srv/share",
            )
            .await
            .unwrap();
        let before = foreign_lines(&fixture).await;
        assert_eq!(before.lines().count(), 5, "{before}");
        let (failing, mut info) = export(&fixture, "share/ours").await;
        assert_eq!(foreign_lines(&fixture).await, before, "after the export");
        nfs(&mut info).inode += 1;
        attach_with(&fixture, &failing, "c2", info).await.unwrap_err();
        unexport(&fixture, &failing).await;
        assert_eq!(foreign_lines(&fixture).await, before, "after a failed attach");
        let id = text(&fixture.attach(&["share/ours", "c2"]).await, "/attachment_id").to_owned();
        storage.run("systemctl restart tether-storage-agent").await.unwrap();
        fixture.tether.json(&["show", &id]).await.unwrap();
        assert_eq!(foreign_lines(&fixture).await, before, "after an attach and a restart");
        assert_eq!(shared_with(&fixture).await.lines().count(), 3);
        fixture.detach(&id).await;
        assert_eq!(foreign_lines(&fixture).await, before, "after the detach");
        let left = leftovers(&fixture.lab).await;
        assert!(left.contains("10.99.0.60(") && left.lines().count() == 1, "only theirs: {left}");
    }

    /// A hypervisor that has another address now is shut out, until the same attach is called again: that lets the new address in,
    /// shuts the old one out, and the guest goes on.
    #[tokio::test]
    #[ignore = "lab"]
    async fn a_hypervisor_that_has_another_address_now_is_let_in_by_the_same_attach() {
        let fixture = Fixture::new().await;
        let serial = text(&fixture.volume("share/moved").await, "/serial").to_owned();
        let id = text(&fixture.attach(&["share/moved", "c2"]).await, "/attachment_id").to_owned();
        let disk = fixture.sees("c2", &serial).await;
        let guest = fixture.lab.guest("c2").unwrap();
        guest.write(&disk, "before", 1 << 20).await.unwrap();
        let move_away = "ip address del 10.99.0.2/24 dev eth1 && ip address add 10.99.0.3/24 dev eth1 && \
                         ip -6 address del fd99::2/64 dev eth1 && ip -6 address add fd99::3/64 dev eth1 nodad && \
                         ss -K dport = 2049 >/dev/null";
        fixture.lab.compute.run(move_away).await.unwrap();
        let clients = |lines: &str| -> Vec<String> {
            lines.lines().filter_map(|line| line.split(['\t', '(']).nth(1).map(str::to_owned)).collect()
        };
        assert_eq!(clients(&shared_with(&fixture).await), ["10.99.0.2/32", "fd99::2/128"]);
        let again = fixture.attach(&["share/moved", "c2", "--id", &id]).await;
        assert_eq!(clients(&shared_with(&fixture).await), ["10.99.0.3/32", "fd99::3/128"], "{again:#}");
        let write = format!("write {} after {}", disk.name, 1 << 20);
        guest.command_within(&write, Duration::from_secs(90)).await.expect("the guest goes on");
        // What the agent has in its journal is what is there now.
        fixture.lab.storage.run("systemctl restart tether-storage-agent").await.unwrap();
        let told = fixture.tether.json(&["reconcile"]).await.unwrap();
        assert_eq!(told["items"].as_array().map(Vec::len), Some(0), "{told:#}");
        assert_eq!(clients(&shared_with(&fixture).await), ["10.99.0.3/32", "fd99::3/128"]);
        fixture.detach(&id).await;
        fixture.assert_nothing_left("after the detach").await;
    }

    /// F16: somebody shares the very directory with the very client, with options of their own. That is not ours to change.
    #[tokio::test]
    #[ignore = "lab"]
    async fn f16_an_export_of_somebody_else_to_the_same_client_is_refused_and_stays() {
        let fixture = Fixture::new().await;
        fixture.volume("share/ours").await;
        let storage = &fixture.lab.storage;
        storage.run("exportfs -o ro,root_squash,no_subtree_check 10.99.0.2:/srv/share").await.unwrap();
        let before = shared_with(&fixture).await;
        let (code, error) =
            fixture.tether.error(&["attach", "share/ours", "c2", "--id", &new_id()]).await.unwrap();
        assert_eq!((text(&error, "/reason"), code), ("NOT_OURS", 4), "{error:#}");
        assert!(text(&error, "/message").contains("10.99.0.2"), "{error:#}");
        assert_eq!(shared_with(&fixture).await, before);
        storage.run("exportfs -u 10.99.0.2:/srv/share").await.unwrap();
        fixture.assert_nothing_left("after the refusal").await;
        fixture.attach(&["share/ours", "c2"]).await;
    }
}
