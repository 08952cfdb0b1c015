//! The compute agent's lines in the audit, from a real process whose hypervisor is libvirt's own fake. That other roles are
//! refused, and everything over TCP, is shown on the storage agent: the server is the same.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends where it fails, also in its helpers"
)]

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::time::Duration;

use tether_proto::wire;
use tether_proto::wire::compute_agent_client::ComputeAgentClient;
use tokio::sync::watch;
use tokio::time::timeout;
use tonic::transport::Endpoint;

const ID: &str = "5f1c0e0a-7d1f-4a53-9d3c-0b7f3c0f7d11";
const CANARY: &str = "canary-secret-0123456789";

struct Agent(Child);

impl Drop for Agent {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[tokio::test]
async fn each_change_has_a_line_with_its_domain_and_without_its_secret() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let text = format!(
        "state_directory = {:?}\nlibvirt_uri = \"test:///default\"\n[server]\nsocket = {:?}\n",
        at("state"),
        at("agent.sock")
    );
    std::fs::write(at("agent.toml"), text).unwrap();
    #[expect(clippy::disallowed_methods, reason = "a daemon that the test stops, not a program that ends")]
    let mut process = std::process::Command::new(env!("CARGO_BIN_EXE_tether-compute-agent"))
        .arg("--config")
        .arg(at("agent.toml"))
        .args(["--log", "debug"])
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(process.stderr.take().unwrap()).lines();
    let _agent = Agent(process);
    let (sender, log) = watch::channel(Vec::<String>::new());
    std::thread::spawn(move || {
        for line in lines.map_while(Result::ok) {
            sender.send_modify(|log| log.push(line));
        }
    });
    let line = async |words: &[&str]| {
        let has_all = |line: &&String| words.iter().all(|word| line.contains(word));
        let mut log = log.clone();
        let seen = log.wait_for(|log| log.iter().any(|line| has_all(&line)));
        let seen =
            timeout(Duration::from_secs(30), seen).await.unwrap_or_else(|_| panic!("no line: {words:?}"));
        seen.unwrap().iter().find(has_all).unwrap().clone()
    };
    line(&["ready"]).await;
    let endpoint = Endpoint::from_shared(format!("unix://{}", at("agent.sock").display())).unwrap();
    let mut agent = ComputeAgentClient::new(endpoint.connect().await.unwrap());

    let iscsi = wire::IscsiConnection {
        target_iqn: "iqn.2026-11.internal.tether:storage1:x".into(),
        portals: vec!["127.0.0.1:1".into()],
        target_portal_group_tag: 1,
        lun: 0,
        chap_username: "user".into(),
        chap_secret: CANARY.into(),
        wwn: "60014050123456789012345678901234".into(),
        mutual_chap_username: "target".into(),
        mutual_chap_secret: format!("{CANARY}-in-turn"),
    };
    let connection_info = wire::ConnectionInfo {
        size_bytes: 1 << 20,
        access_mode: wire::AccessMode::ReadWrite.into(),
        serial: "0123456789abcdef0123".into(),
        multi_attach: false,
        transport: Some(wire::connection_info::Transport::Iscsi(iscsi)),
    };
    let request = wire::AttachRequest {
        attachment_id: ID.into(),
        domain: "no-such-domain".into(),
        connection_info: Some(connection_info),
        disk: None,
    };
    agent.attach(request).await.unwrap_err();
    let attach = line(&["audit: change", "rpc=\"Attach\""]).await;
    for words in [
        "role=\"controller\"",
        "peer=\"local\"",
        ID,
        "volume=\"0123456789abcdef0123\"",
        "domain=\"no-such-domain\"",
        "outcome=\"FAILED\"",
        "reason=\"DOMAIN_NOT_FOUND\"",
        "milliseconds=",
    ] {
        assert!(attach.contains(words), "{words}: {attach}");
    }
    agent.detach(wire::DetachRequest { attachment_id: ID.into(), ..Default::default() }).await.unwrap();
    line(&["audit: change", "rpc=\"Detach\"", ID, "outcome=\"UNCHANGED\""]).await;
    let resize = wire::ResizeAttachmentRequest { attachment_id: ID.into(), size_bytes: 1 << 30 };
    agent.resize_attachment(resize).await.unwrap_err();
    line(&["audit: change", "rpc=\"ResizeAttachment\"", ID, "outcome=\"FAILED\""]).await;
    let all = log.borrow().join("\n");
    assert!(!all.contains(CANARY), "{all}");
}
