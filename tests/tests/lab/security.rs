//! Nobody in who does not belong, and secrets stay secret (rules 11 and 12).

use std::time::Duration;

use tether_proto::wire;
use tether_tests::tether::FAULT_FILE;

use crate::nfs_server::iscsi_cycles;
use crate::surface::metrics;
use crate::{Fixture, attach_with, export, iscsi, new_id, reason, unexport};

/// Logs in by hand with a node record as given, and gives iscsiadm's exit code.
pub(crate) async fn login_by_hand(
    fixture: &Fixture,
    target: &str,
    auth: &str,
    initiator: Option<&str>,
) -> Option<i32> {
    let iface = match initiator {
        None => "iface.iscsi_ifacename = default".to_owned(),
        Some(name) => format!("iface.iscsi_ifacename = other\niface.initiatorname = {name}"),
    };
    let record = format!(
        "# BEGIN RECORD 2.1.8\nnode.name = {target}\nnode.tpgt = 1\nnode.startup = manual\n{iface}\n\
         iface.transport_name = tcp\nnode.conn[0].address = 10.99.0.1\nnode.conn[0].port = 3260\n\
         node.conn[0].startup = manual\nnode.session.scan = manual\nnode.session.initial_login_retry_max = 1\n\
         node.conn[0].timeo.login_timeout = 5\n{auth}# END RECORD\n"
    );
    let file = if initiator.is_some() { "other" } else { "default" };
    let folder = format!("/etc/iscsi/nodes/{target}/10.99.0.1,3260,1");
    fixture.lab.compute.put(record, &format!("{folder}/{file}"), 0o600).await.unwrap();
    if let Some(name) = initiator {
        let iface = format!(
            "iface.iscsi_ifacename = other\niface.initiatorname = {name}\niface.transport_name = tcp\n"
        );
        fixture.lab.compute.put(iface, "/etc/iscsi/ifaces/other", 0o600).await.unwrap();
    }
    let command = format!("iscsiadm -m node -T {target} -p 10.99.0.1:3260 --login");
    let output = fixture.lab.compute.try_run(&command).await.unwrap();
    if output.exit_code == Some(0) {
        fixture.lab.compute.run(&format!("iscsiadm -m node -T {target} --logout")).await.unwrap();
    }
    fixture
        .lab
        .compute
        .run(&format!("rm -rf /etc/iscsi/nodes/{target} /etc/iscsi/ifaces/other"))
        .await
        .unwrap();
    output.exit_code
}

/// F43: CHAP is enforced both ways, by a digest that is not MD5, and only the connector's initiator gets in. The control (right
/// secrets) shows that the refusals are refusals.
#[tokio::test]
#[ignore = "lab"]
async fn f43_a_login_without_or_with_a_wrong_secret_or_from_another_initiator_is_refused() {
    let fixture = Fixture::new().await;
    fixture.volume("thick/locked").await;
    let (id, mut info) = export(&fixture, "thick/locked").await;
    let connection = iscsi(&mut info).clone();
    let target = connection.target_iqn.as_str();
    let one_way = |secret: &str| {
        format!(
            "node.session.auth.authmethod = CHAP\nnode.session.auth.username = {}\nnode.session.auth.password = {secret}\n",
            connection.chap_username
        )
    };
    let both_ways = |of_target: &str| {
        format!(
            "{}node.session.auth.username_in = {}\nnode.session.auth.password_in = {of_target}\n",
            one_way(&connection.chap_secret),
            connection.mutual_chap_username
        )
    };
    let right = both_ways(&connection.mutual_chap_secret);
    let other = Some("iqn.2026-01.org.tether.lab:stranger");
    assert_eq!(login_by_hand(&fixture, target, &right, None).await, Some(0), "the control gets in");
    assert_eq!(login_by_hand(&fixture, target, "", None).await, Some(24), "without a secret");
    assert_eq!(
        login_by_hand(&fixture, target, &one_way("wrong-wrong-wrong"), None).await,
        Some(24),
        "wrong secret"
    );
    let alone = one_way(&connection.chap_secret);
    // No target can make an initiator ask: that ours does is shown below.
    assert_eq!(login_by_hand(&fixture, target, &alone, None).await, Some(0), "who asks for no proof");
    let impostor = both_ways("wrong-wrong-wrong");
    assert_eq!(
        login_by_hand(&fixture, target, &impostor, None).await,
        Some(19),
        "a target without the secret"
    );
    assert_eq!(login_by_hand(&fixture, target, &right, other).await, Some(24), "another initiator");

    // And what our own agent says of it.
    type Secret = fn(&mut wire::IscsiConnection) -> &mut String;
    let wrongs: [(Secret, &str, &str); 2] = [
        (|iscsi| &mut iscsi.chap_secret, "CHAP_REJECTED", "export again"),
        (|iscsi| &mut iscsi.mutual_chap_secret, "LOGIN_FAILED", ""),
    ];
    for (wrong, word, advice) in wrongs {
        let mut info = info.clone();
        *wrong(iscsi(&mut info)) = "wrong-wrong-wrong".into();
        let refused = attach_with(&fixture, &id, "c2", info).await.unwrap_err();
        let (reason, step, next) = reason(&refused);
        assert_eq!((reason.as_str(), step.as_str()), (word, "login"), "{refused:?}");
        assert!(next.contains(advice), "{next}");
        assert!(word != "LOGIN_FAILED" || refused.message().contains("mutual CHAP"), "{refused:?}");
    }
    // The target's kernel is watched as it takes the digest that it has chosen.
    let listen = "mountpoint -q /sys/kernel/tracing || mount -t tracefs nodev /sys/kernel/tracing; cd /sys/kernel/tracing && \
                  echo 'p:digest crypto_alloc_shash name=+0(%di):string' >kprobe_events && echo 1 >events/kprobes/digest/enable";
    fixture.lab.storage.run(listen).await.unwrap();
    attach_with(&fixture, &id, "c2", info).await.expect("with the right secrets");
    let digests = "grep -o 'name=.*' /sys/kernel/tracing/trace | sort -u";
    assert_eq!(fixture.lab.storage.run(digests).await.unwrap().trim(), "name=\"sha256\"");
    fixture.detach(&id).await;
    fixture.assert_nothing_left("at the end").await;
}

/// F13: another export of the volume has another secret and another target.
#[tokio::test]
#[ignore = "lab"]
async fn f13_each_export_has_its_own_secret_and_target() {
    let fixture = Fixture::new().await;
    fixture.volume("thick/again").await;
    let (first, mut one) = export(&fixture, "thick/again").await;
    unexport(&fixture, &first).await;
    let (second, mut two) = export(&fixture, "thick/again").await;
    assert_ne!(iscsi(&mut one).chap_secret, iscsi(&mut two).chap_secret);
    assert_ne!(iscsi(&mut one).target_iqn, iscsi(&mut two).target_iqn);
    let old = attach_with(&fixture, &first, "c2", one).await.unwrap_err();
    assert!(["CHAP_REJECTED", "LOGIN_FAILED"].contains(&reason(&old).0.as_str()), "{old:?}");
    unexport(&fixture, &second).await;
    fixture.assert_nothing_left("after both").await;
}

/// Has the kernel write down with what arguments and environment each program is started, in its trace. `execve` gets the
/// registers of the system call: its second and third argument at 104 and 96 (the kernel's arch/x86/include/asm/ptrace.h).
const WATCH: &str = "mountpoint -q /sys/kernel/tracing || mount -t tracefs nodev /sys/kernel/tracing; cd /sys/kernel/tracing && \
    echo 16384 >buffer_size_kb && probe='p:programs __x64_sys_execve' && for n in $(seq 0 8 160); do \
    probe=\"$probe a$n=+u0(+u$n(+104(%di))):ustring e$n=+u0(+u$n(+96(%di))):ustring\"; done && \
    echo \"$probe\" >kprobe_events && echo 1 >events/kprobes/programs/enable";

/// Turns it off and on: who searches for secrets has them in its arguments.
const PAUSE: &str = "echo 0 >/sys/kernel/tracing/events/kprobes/programs/enable";
const GO_ON: &str = "echo 1 >/sys/kernel/tracing/events/kprobes/programs/enable";

/// Ends that, and keeps in `/run/seen` what it saw, and what everybody can see of the programs that run now.
const SEEN_OF_ALL: &str = "cd /sys/kernel/tracing && echo 0 >events/kprobes/programs/enable && cat trace >/run/seen && \
    cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null | tr '\\0' '\\n' >>/run/seen";

/// F44: through all that can become of an export the secrets are in the kernel, in files that only root reads, and nowhere else;
/// when it has ended they are nowhere.
#[tokio::test]
#[ignore = "lab"]
async fn f44_the_secrets_are_in_no_log_argument_answer_or_readable_file_through_every_flow() {
    let fixture = Fixture::new().await;
    fixture.volume("thin/secret").await;
    let hosts = [(&fixture.lab.storage, "storage", 7441), (&fixture.lab.compute, "compute", 7442)];
    for (host, unit, _) in hosts {
        let debug = "[Service]\nEnvironment=TETHER_LOG=debug\n";
        let path = format!("/etc/systemd/system/tether-{unit}-agent.service.d/debug.conf");
        host.put(debug, &path, 0o644).await.unwrap();
        host.run(&format!("systemctl daemon-reload && systemctl restart tether-{unit}-agent")).await.unwrap();
        // Every program that is started from now on is seen.
        host.run(WATCH).await.unwrap();
    }
    let (id, mut info) = export(&fixture, "thin/secret").await;
    const GIVEN: &str = "canary-that-somebody-gave";
    let mut secrets = vec![
        iscsi(&mut info).chap_secret.clone(),
        iscsi(&mut info).mutual_chap_secret.clone(),
        GIVEN.to_owned(),
    ];
    // What the callers of our own command see, whatever they ask for.
    let mut told = String::new();
    let watched = wire::WatchOperationRequest {
        key: Some(wire::watch_operation_request::Key::AttachmentId(id.clone())),
    };
    let mut compute = fixture.tether.compute().await.unwrap();
    let mut steps = compute.watch_operation(watched).await.unwrap().into_inner();
    let mut wrong = info.clone();
    iscsi(&mut wrong).chap_secret = GIVEN.into();
    told += &format!("{:?}", attach_with(&fixture, &id, "c2", wrong).await.expect_err("a wrong secret"));
    while let Ok(Some(event)) = steps.message().await {
        told += &format!("{event:?}");
    }
    assert!(told.contains("login"), "the step that fails is told: {told}");
    let mut illegal = info.clone();
    iscsi(&mut illegal).chap_secret = format!("{GIVEN} with spaces");
    told += &format!("{:?}", attach_with(&fixture, &id, "c2", illegal).await.expect_err("no secret at all"));
    for _ in 0..2 {
        told += &format!("{:?}", attach_with(&fixture, &id, "c2", info.clone()).await.unwrap());
    }
    for (host, unit, _) in hosts {
        host.run(&format!("systemctl restart tether-{unit}-agent")).await.unwrap();
        let limit = format!(
            "grep 'Max core file size' /proc/$(systemctl show -P MainPID tether-{unit}-agent)/limits"
        );
        let limit = host.run(&limit).await.unwrap();
        assert_eq!(limit.split_whitespace().skip(4).take(2).collect::<Vec<_>>(), ["0", "0"], "{limit}");
    }
    let mut compute = fixture.tether.compute().await.unwrap();
    let mut events = compute.watch(wire::WatchRequest {}).await.unwrap().into_inner();
    for arguments in [
        &["show", &id][..],
        &["list", "--all"],
        &["volume", "extend", "thin/secret", "32M"],
        &["volume", "show", "thin/secret"],
        &["reconcile", "--dry-run"],
        &["reconcile"],
        &["doctor"],
    ] {
        let output = fixture.tether.output(arguments).await.unwrap();
        assert!(!output.stdout.is_empty(), "{arguments:?}: {output:?}");
        told += &format!("{} {}", output.stdout, output.stderr);
    }
    while !told.contains("32 MiB (") {
        told += &format!("{:?}", events.message().await.unwrap().expect("that it was resized"));
    }
    for (host, unit, _) in hosts {
        host.run(PAUSE).await.unwrap();
        for secret in &secrets[..2] {
            let files = host.run(&with_secret(secret)).await.unwrap();
            let open: Vec<&str> = files.lines().filter(|line| !line.starts_with("600 root ")).collect();
            assert!(open.is_empty(), "{open:?}");
            assert!(files.contains("/var/lib/tether/"), "{unit}: the journal has it: {files}");
        }
        assert_eq!(host.run(&with_secret(GIVEN)).await.unwrap(), "");
        host.run(GO_ON).await.unwrap();
    }
    // How it ends: as it should, by force, and by a kill in the middle of an attach that is taken back.
    for (volume, ends) in [("thin/forced", "by force"), ("thin/killed", "by a kill")] {
        fixture.volume(volume).await;
        let (id, mut info) = export(&fixture, volume).await;
        secrets.extend([iscsi(&mut info).chap_secret.clone(), iscsi(&mut info).mutual_chap_secret.clone()]);
        if ends == "by force" {
            told += &format!("{:?}", attach_with(&fixture, &id, "empty", info).await.unwrap());
            let arguments = ["detach", &id, "--force", "--guest-timeout", "3"];
            let forced = fixture.tether.output(&arguments).await.unwrap();
            assert_eq!(forced.exit_code, Some(0), "{forced:?}");
            told += &format!("{} {}", forced.stdout, forced.stderr);
            // Its guest never lets go.
            fixture.lab.compute.run("virsh -q destroy empty").await.unwrap();
        } else {
            let compute = &fixture.lab.compute;
            compute.put("login after kill\n", FAULT_FILE, 0o644).await.unwrap();
            let killed = attach_with(&fixture, &id, "c2", info).await.expect_err("its agent was killed");
            told += &format!("{killed:?}");
            let back = format!(
                "timeout 60 sh -c 'until [ $(systemctl show -P NRestarts tether-compute-agent) -gt 0 ] && \
                 systemctl is-active -q tether-compute-agent && ! grep -qs {id} /sys/class/iscsi_session/*/targetname; \
                 do sleep 0.2; done'"
            );
            compute
                .run(&back)
                .await
                .expect("it was killed, is started again, and takes back what it had begun");
            unexport(&fixture, &id).await;
        }
    }
    told += &fixture.detach(&id).await.to_string();
    let patterns: String = secrets.iter().map(|secret| format!(" -e '{secret}'")).collect();
    for (host, unit, port) in hosts {
        told += &metrics(host, port).await;
        host.run(SEEN_OF_ALL).await.unwrap();
        let program = if unit == "storage" { "a0=\"/sbin/lvextend\"" } else { "iscsiadm\" .*=\"--login\"" };
        let control = format!("grep -q -a '{program}' /run/seen && grep -q -a '^TETHER_LOG=debug' /run/seen");
        host.run(&control).await.expect("the watch saw programs, or this test shows nothing");
        for place in ["cat /run/seen", "journalctl --no-pager", "dmesg"] {
            let seen = host.run(&format!("{place} | grep -a -F{patterns} | head -n 3; true")).await.unwrap();
            assert_eq!(seen, "", "{place}");
        }
        let dumps = host.run("ls -A /var/lib/systemd/coredump 2>/dev/null; true").await.unwrap();
        assert_eq!(dumps, "", "nothing died with a dump, and nothing would be dumped");
        host.run("rm /run/seen").await.unwrap();
    }
    for secret in &secrets {
        assert!(!told.contains(secret.as_str()), "{secret} in {told}");
    }
    fixture.assert_nothing_left("after the detach").await;
    for (host, unit, _) in hosts {
        for secret in &secrets {
            assert_eq!(host.run(&with_secret(secret)).await.unwrap(), "", "{unit}: it has ended");
        }
    }
}

/// Mode, owner and name of each file that has this in it.
fn with_secret(secret: &str) -> String {
    format!(
        "grep -rlF -e '{secret}' /etc /root /run /tmp /var/lib /var/log /var/tmp 2>/dev/null | xargs -r stat -c '%a %U %n'"
    )
}

/// No certificate, no entry; plaintext, no entry; on the host itself root needs none.
#[tokio::test]
#[ignore = "lab"]
async fn a_stranger_is_refused_and_root_gets_in_by_the_socket() {
    let fixture = Fixture::new().await;
    let answer = match fixture.tether.stranger().await {
        Ok(mut stranger) => {
            stranger.get_connector(wire::GetConnectorRequest {}).await.map(drop).map_err(|e| e.to_string())
        }
        Err(error) => Err(format!("{error:#}")),
    };
    answer.expect_err("a client without a certificate gets nothing");
    let plain = "printf 'PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n' | timeout 5 socat -t 3 - TCP:127.0.0.1:7440 | head -c 200 | od -c | head";
    let answer = fixture.lab.compute.run(plain).await.unwrap();
    assert!(!answer.contains("H   T   T   P"), "{answer}");
    let socket = fixture.lab.compute.run("stat -c '%a %U' /run/tether/compute-agent.sock").await.unwrap();
    assert_eq!(socket.trim(), "600 root");

    let config = "[compute.here]\naddress = \"unix:/run/tether/compute-agent.sock\"\n";
    fixture.lab.compute.put(config, "/etc/tether/tether.toml", 0o644).await.unwrap();
    let list = fixture.lab.compute.run("tether --json list").await.unwrap();
    assert!(list.contains('{') || list.contains('['), "{list}");
    let refused = fixture.lab.compute.try_run("su -s /bin/sh nobody -c 'tether --json list'").await.unwrap();
    assert_ne!(refused.exit_code, Some(0), "{refused:?}");
}

/// Connects to the port that it is given a thousand times and says nothing, connects a hundred times and sends junk; holds all of
/// it for a while, and again.
const STRANGERS: &str = "while :; do (
    for i in {1..1000}; do exec {silent}<>/dev/tcp/127.0.0.1/$1; done
    for i in {1..100}; do exec {junk}<>/dev/tcp/127.0.0.1/$1; head -c 2000 /dev/urandom >&$junk; done
    echo >>/run/strangers
    sleep 3
) done
";

/// Takes every connection, and does nothing with it.
const SOMEBODY_ELSE: &str = "import socket
server, held = socket.create_server(('', 9), backlog=4096), []
while True:
    held = held[-1100:] + [server.accept()[0]]
";

/// Each change is a line on its host, with who did it and to what; a reader changes nothing. What else is refused, and how, is
/// tested without a lab (`access` of the storage agent).
#[tokio::test]
#[ignore = "lab"]
async fn each_change_is_in_the_audit_of_its_host_and_a_reader_changes_nothing() {
    let fixture = Fixture::new().await;
    fixture.volume("thick/audited").await;
    let id = new_id();
    fixture.tether.json(&["attach", "thick/audited", "c2", "--id", &id]).await.unwrap();
    let mut reader = fixture.tether.reader().await.unwrap();
    reader.list_attachments(wire::ListAttachmentsRequest {}).await.unwrap();
    let request = wire::DetachRequest { attachment_id: id.clone(), ..Default::default() };
    let refused = reader.detach(request).await.unwrap_err();
    assert_eq!(reason(&refused).0, "WRONG_ROLE", "{refused:?}");
    fixture.tether.json(&["detach", &id]).await.unwrap();
    for (host, unit, rpcs, what) in [
        (
            &fixture.lab.storage,
            "storage",
            [("Export", "CREATED"), ("Unexport", "REMOVED")],
            "volume=\"thick/audited\"",
        ),
        (&fixture.lab.compute, "compute", [("Attach", "CREATED"), ("Detach", "REMOVED")], "domain=\"c2\""),
    ] {
        let audit = format!("journalctl --no-pager -o cat -u tether-{unit}-agent | grep -F audit:");
        let audit = host.run(&audit).await.unwrap();
        for (rpc, outcome) in rpcs {
            let (rpc, outcome) = (format!("rpc=\"{rpc}\""), format!("outcome=\"{outcome}\""));
            let lines: Vec<&str> =
                audit.lines().filter(|line| line.contains(&rpc) && line.contains(&outcome)).collect();
            let [line] = lines[..] else { panic!("one line of {rpc} in {audit}") };
            for words in ["audit: change who=\"CN=lab\"", "role=\"controller\"", &id, what, "milliseconds="] {
                assert!(line.contains(words), "{words}: {line}");
            }
        }
    }
    // Each line is found by what it is about, in the journal's own fields.
    for (host, unit, about) in [
        (&fixture.lab.storage, "storage", "TETHER_VOLUME=thick/audited"),
        (&fixture.lab.compute, "compute", "TETHER_DOMAIN=c2"),
    ] {
        let lines = format!(
            "journalctl --no-pager -o json -u tether-{unit}-agent TETHER_ATTACHMENT={id} {about} PRIORITY=6"
        );
        let lines = host.run(&lines).await.unwrap();
        assert!(lines.lines().count() >= 2, "{unit}: {lines}");
        let of_unit = format!("\"_SYSTEMD_UNIT\":\"tether-{unit}-agent.service\"");
        assert!(lines.lines().all(|line| line.contains(&of_unit) && line.contains(&id)), "{unit}: {lines}");
    }
    let refusals = "journalctl --no-pager -o cat -u tether-compute-agent | grep -F 'audit: refused'";
    let refusals = fixture.lab.compute.run(refusals).await.unwrap();
    assert!(refusals.contains("who=\"CN=reader\"") && refusals.contains("rpc=\"Detach\""), "{refusals}");
    fixture.assert_nothing_left("after an audited detach").await;
}

/// Left out of a run for its time, not for what it shows: `tests/run long`.
mod long {
    use super::*;

    /// Strangers who connect and say nothing, or everything, to both agents at once: attaches take no longer than while the same
    /// strangers are at another program of the hosts. (In the lab they take processor time there themselves.)
    #[tokio::test]
    #[ignore = "lab"]
    async fn attaches_go_on_beside_a_thousand_strangers_who_say_nothing_or_junk() {
        let fixture = Fixture::new().await;
        fixture.volume("thick/quick").await;
        let domains = ["c3", "c2", "c3"];
        let alone = iscsi_cycles(&fixture, domains).await;
        let hosts = [&fixture.lab.storage, &fixture.lab.compute];
        for host in hosts {
            host.put(STRANGERS, "/run/strangers.sh", 0o644).await.unwrap();
            host.put(SOMEBODY_ELSE, "/run/somebody-else.py", 0o644).await.unwrap();
            host.run(
                "systemd-run -q --unit=somebody-else -p LimitNOFILE=8192 python3 /run/somebody-else.py && \
                 timeout 20 sh -c 'until ss -ltn | grep -q \":9 \"; do sleep 0.2; done'",
            )
            .await
            .unwrap();
        }
        let beside = async |port: u16| {
            for host in hosts {
                let start = format!(
                    "rm -f /run/strangers; systemd-run -q --unit=strangers -p LimitNOFILE=8192 -p Nice=19 bash /run/strangers.sh {port}"
                );
                host.run(&start).await.unwrap();
            }
            for host in hosts {
                host.run("timeout 50 sh -c 'until [ -e /run/strangers ]; do sleep 0.2; done'")
                    .await
                    .expect("all have connected");
            }
            let took = iscsi_cycles(&fixture, domains).await;
            for host in hosts {
                host.run("systemctl stop strangers").await.expect("they were there all the time");
            }
            took
        };
        let (at_another, at_ours) = (beside(9).await, beside(7440).await);
        println!(
            "attach and detach: {alone:?} alone, strangers elsewhere {at_another:?}, at the agents {at_ours:?}"
        );
        assert!(
            at_ours < at_another * 5 / 4 + Duration::from_millis(400),
            "{at_another:?}, then {at_ours:?}"
        );
        fixture.assert_nothing_left("at the end").await;
    }

    /// The kernel says who is at the other end of the socket, and the config what that one may do.
    #[tokio::test]
    #[ignore = "lab"]
    async fn a_user_of_the_host_may_do_what_its_role_allows() {
        let fixture = Fixture::new().await;
        let config = "[compute.here]\naddress = \"unix:/run/tether/compute-agent.sock\"\n";
        fixture.lab.compute.put(config, "/etc/tether/tether.toml", 0o644).await.unwrap();
        let roles = "printf '[server.roles]\\nreader = [\"USER=nobody\"]\\n' >>/etc/tether/compute-agent.toml; systemctl restart tether-compute-agent";
        fixture.lab.compute.run(roles).await.unwrap();
        let run = async |user: &str, verb: &str| {
            let command = format!("su -s /bin/sh {user} -c 'tether --json {verb}'");
            fixture.lab.compute.try_run(&command).await.unwrap()
        };
        let list = run("nobody", "list").await;
        assert_eq!(list.exit_code, Some(0), "{list:?}");
        let refused = run("nobody", "reconcile").await;
        assert!(refused.exit_code == Some(7) && refused.stdout.contains("WRONG_ROLE"), "{refused:?}");
        let other = run("daemon", "list").await;
        assert_ne!(other.exit_code, Some(0), "{other:?}");
        let root = run("root", "reconcile").await;
        assert_eq!(root.exit_code, Some(0), "{root:?}");
        let audit = "journalctl --no-pager -o cat -u tether-compute-agent | grep -F 'audit: refused'";
        let audit = fixture.lab.compute.run(audit).await.unwrap();
        assert!(audit.contains("who=\"USER=nobody\" role=\"reader\""), "{audit}");
        assert!(audit.contains("who=\"USER=daemon\"") && audit.contains("reason=\"NO_ROLE\""), "{audit}");
    }
}
