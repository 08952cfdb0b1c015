//! Nobody in who does not belong, and secrets stay secret (rules 11 and 12).

use tether_proto::wire;

use crate::{Fixture, attach_with, export, iscsi, reason, unexport};

/// Logs in by hand with a node record as given, and gives iscsiadm's exit code.
async fn login_by_hand(fixture: &Fixture, target: &str, auth: &str, initiator: Option<&str>) -> Option<i32> {
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

/// F43: CHAP is enforced, and only the connector's initiator gets in. The control (right secret) shows that the
/// refusals are refusals.
#[tokio::test]
#[ignore = "lab"]
async fn f43_a_login_without_or_with_a_wrong_secret_or_from_another_initiator_is_refused() {
    let fixture = Fixture::new().await;
    fixture.volume("thick/locked").await;
    let (id, mut info) = export(&fixture, "thick/locked").await;
    let connection = iscsi(&mut info).clone();
    let target = connection.target_iqn.as_str();
    let auth = |secret: &str| {
        format!(
            "node.session.auth.authmethod = CHAP\nnode.session.auth.username = {}\nnode.session.auth.password = {secret}\n",
            connection.chap_username
        )
    };
    let right = auth(&connection.chap_secret);
    let other = Some("iqn.2026-01.org.tether.lab:stranger");
    assert_eq!(login_by_hand(&fixture, target, &right, None).await, Some(0), "the control gets in");
    assert_eq!(login_by_hand(&fixture, target, "", None).await, Some(24), "without a secret");
    assert_eq!(
        login_by_hand(&fixture, target, &auth("wrong-wrong-wrong"), None).await,
        Some(24),
        "wrong secret"
    );
    assert_eq!(login_by_hand(&fixture, target, &right, other).await, Some(24), "another initiator");

    // And what our own agent says of it.
    let mut wrong = info.clone();
    iscsi(&mut wrong).chap_secret = "wrong-wrong-wrong".into();
    let refused = attach_with(&fixture, &id, "c2", wrong).await.unwrap_err();
    let (reason, step, next) = reason(&refused);
    assert_eq!((reason.as_str(), step.as_str()), ("CHAP_REJECTED", "login"), "{refused:?}");
    assert!(next.contains("export again"), "{next}");
    unexport(&fixture, &id).await;
    fixture.assert_nothing_left("after a refused login").await;
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

/// F44: the secret is in the kernel, in files that only root reads, and nowhere else.
#[tokio::test]
#[ignore = "lab"]
async fn f44_the_secret_is_in_no_log_no_argument_and_no_readable_file() {
    let fixture = Fixture::new().await;
    fixture.volume("thick/secret").await;
    for unit in ["storage", "compute"] {
        let host = if unit == "storage" { &fixture.lab.storage } else { &fixture.lab.compute };
        let debug = "[Service]\nEnvironment=TETHER_LOG=debug\n";
        let path = format!("/etc/systemd/system/tether-{unit}-agent.service.d/debug.conf");
        host.put(debug, &path, 0o644).await.unwrap();
        host.run(&format!("systemctl daemon-reload && systemctl restart tether-{unit}-agent")).await.unwrap();
    }
    // Every program that is started while the attach runs is seen by its arguments.
    fixture
        .lab
        .compute
        .run("systemd-run --quiet --unit=watch sh -c 'while :; do cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null; done >/run/seen'")
        .await
        .unwrap();
    let (id, mut info) = export(&fixture, "thick/secret").await;
    let secret = iscsi(&mut info).chap_secret.clone();
    attach_with(&fixture, &id, "c2", info).await.unwrap();
    fixture.lab.compute.run("systemctl stop watch").await.unwrap();
    let seen = fixture.lab.compute.run("tr '\\0' ' ' </run/seen | grep -c iscsiadm || true").await.unwrap();
    assert_ne!(seen.trim(), "0", "the watch saw the login, or this test shows nothing");
    let search = format!(
        "tr '\\0' '\\n' </run/seen | grep -c -F '{secret}'; journalctl --no-pager | grep -c -F '{secret}'; true"
    );
    assert_eq!(fixture.lab.compute.run(&search).await.unwrap(), "0\n0\n");
    let logs = format!("journalctl --no-pager | grep -c -F '{secret}'; true");
    assert_eq!(fixture.lab.storage.run(&logs).await.unwrap(), "0\n");
    for host in [&fixture.lab.storage, &fixture.lab.compute] {
        let files =
            format!("grep -rlF '{secret}' /etc /var/lib /run /tmp 2>/dev/null | xargs -r stat -c '%a %U %n'");
        let files = host.run(&files).await.unwrap();
        let open: Vec<&str> = files
            .lines()
            .filter(|line| !line.starts_with("600 root ") && !line.contains("/run/seen"))
            .collect();
        assert!(open.is_empty(), "{open:?}");
        assert!(files.contains("/var/lib/tether/"), "the journal has it: {files}");
    }
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

    let program = std::fs::read(fixture.tether.program()).unwrap();
    fixture.lab.compute.put(program, "/usr/bin/tether", 0o755).await.unwrap();
    let config = "[compute.here]\naddress = \"unix:/run/tether/compute-agent.sock\"\n";
    fixture.lab.compute.put(config, "/etc/tether/tether.toml", 0o644).await.unwrap();
    let list = fixture.lab.compute.run("tether --json list").await.unwrap();
    assert!(list.contains('{') || list.contains('['), "{list}");
    let refused = fixture.lab.compute.try_run("su -s /bin/sh nobody -c 'tether --json list'").await.unwrap();
    assert_ne!(refused.exit_code, Some(0), "{refused:?}");
}
