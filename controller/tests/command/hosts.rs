//! Reaching the agents: config, certificates, names, and what is said when one of them is wrong.

use std::future::pending;

use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};

use crate::fakes::{Lab, make_pki, nobody, tether, tls_server};

const ID: &str = "5f1c0e0a-7d1f-4a53-9d3c-0b7f3c0f7d11";

#[tokio::test]
async fn an_agent_that_is_not_there_is_told_before_anything_is_done() {
    let lab = Lab::up().await;
    let text = std::fs::read_to_string(lab.config()).unwrap();
    let dead = nobody().await;
    let compute = lab.compute.agent.link.address.to_string();
    std::fs::write(lab.config(), text.replace(&compute, &dead)).unwrap();
    let ran = lab.tether(&["attach", "tether/v1", "c2"]).await;
    assert_eq!(ran.exit, 5, "{ran:?}");
    let message = format!("compute host compute1 ({dead}): connection refused");
    assert!(
        ran.err.contains(&message) && ran.err.contains("next: see that tether-compute-agent"),
        "{}",
        ran.err
    );
    assert!(lab.mutations().is_empty());
}

#[tokio::test]
async fn a_wrong_name_in_the_certificate_is_told_with_the_right_one() {
    let lab = Lab::up().await;
    let text = std::fs::read_to_string(lab.config()).unwrap();
    std::fs::write(lab.config(), text.replace("[storage.storage1]", "[storage.other]")).unwrap();
    let ran = lab.tether(&["volume", "list"]).await;
    assert_eq!(ran.exit, 7, "{ran:?}");
    assert!(ran.err.contains("not for the name other") && ran.err.contains("storage1"), "{}", ran.err);
    assert!(ran.err.contains("set server_name of [storage.other]"), "{}", ran.err);
    let text = std::fs::read_to_string(lab.config()).unwrap();
    let named = text.replace("[storage.other]\n", "[storage.other]\nserver_name = \"storage1\"\n");
    std::fs::write(lab.config(), named).unwrap();
    assert_eq!(lab.tether(&["volume", "list"]).await.exit, 0);
}

#[tokio::test]
async fn an_authority_that_is_not_ours_is_refused_on_both_sides() {
    let lab = Lab::up().await;
    let other = lab.directory.path().join("other");
    make_pki(&other).await;
    let ours = std::fs::read_to_string(lab.config()).unwrap();
    // We do not know the agent's authority.
    std::fs::write(lab.config(), ours.replace("pki/ca.crt", "other/ca.crt")).unwrap();
    let ran = lab.tether(&["volume", "list"]).await;
    assert_eq!(ran.exit, 7, "{ran:?}");
    assert!(ran.err.contains("its certificate is not accepted"), "{}", ran.err);
    // The agent does not know ours.
    let theirs = ours.replace("pki/controller", "other/controller");
    std::fs::write(lab.config(), &theirs).unwrap();
    for verb in [
        vec!["volume", "list"],
        vec!["attach", "tether/v1", "c2"],
        vec!["volume", "create", "tether/x", "1G"],
    ] {
        let ran = lab.tether(&verb).await;
        assert_eq!(ran.exit, 7, "{ran:?}");
        assert!(ran.err.contains("does not accept our certificate"), "{}", ran.err);
        assert!(ran.err.contains("tether pki issue controller"), "{}", ran.err);
    }
    // An agent's certificate is none for a controller.
    std::fs::write(lab.config(), ours.replace("pki/controller", "pki/compute1")).unwrap();
    assert_eq!(lab.tether(&["volume", "list"]).await.exit, 7);
    // A certificate and another's key.
    std::fs::write(lab.config(), ours.replace("pki/controller.key", "other/controller.key")).unwrap();
    let ran = lab.tether(&["volume", "show", "tether/v1"]).await;
    assert_eq!(ran.exit, 64, "{ran:?}");
    assert!(lab.mutations().is_empty());
}

#[tokio::test]
async fn a_controllers_certificate_serves_nobody() {
    let lab = Lab::up().await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let service = tether_proto::wire::storage_agent_server::StorageAgentServer::from_arc(lab.storage.clone());
    let server = tls_server(&lab.directory.path().join("pki"), "controller").add_service(service);
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    lab.configure(&format!("[storage.controller]\naddress = \"{address}\"\n"));
    let ran = lab.tether(&["volume", "list", "--storage", "controller"]).await;
    assert_eq!(ran.exit, 7, "{ran:?}");
}

#[tokio::test]
async fn a_unix_socket_needs_no_certificates() {
    let lab = Lab::up().await;
    let socket = lab.directory.path().join("s.sock");
    let listener = tokio::net::UnixListener::bind(&socket).unwrap();
    let service = tether_proto::wire::storage_agent_server::StorageAgentServer::from_arc(lab.storage.clone());
    let server = tonic::transport::Server::builder().add_service(service);
    tokio::spawn(server.serve_with_incoming(UnixListenerStream::new(listener)));
    let config = |path: &str| {
        std::fs::write(lab.config(), format!("[storage.here]\naddress = \"unix:{path}\"\n")).unwrap();
    };
    config(socket.to_str().unwrap());
    let ran = lab.tether(&["volume", "create", "tether/v2", "1G"]).await;
    assert_eq!(ran.exit, 0, "{ran:?}");
    config("/no/such/s.sock");
    let ran = lab.tether(&["volume", "list"]).await;
    assert_eq!(ran.exit, 5, "{ran:?}");
    assert!(ran.err.contains("no such socket") && ran.err.contains("systemctl start"), "{}", ran.err);
}

#[tokio::test]
async fn several_hosts_must_be_named() {
    let lab = Lab::up().await;
    let dead = nobody().await;
    lab.configure(&format!("[storage.storage2]\naddress = \"{dead}\"\n"));
    let ran = lab.tether(&["volume", "show", "tether/v1"]).await;
    assert_eq!(ran.exit, 64);
    assert!(ran.err.contains("next: name one with --storage: storage1, storage2"), "{}", ran.err);
    assert_eq!(lab.tether(&["volume", "show", "tether/v1", "--storage", "storage1"]).await.exit, 0);
    assert_eq!(lab.tether(&["volume", "list", "--storage", "storage2"]).await.exit, 5);
}

#[tokio::test]
async fn plaintext_warns_at_every_start() {
    let lab = Lab::up().await;
    lab.configure("[danger]\nplaintext = true\n");
    let ran = lab.tether(&["--timeout", "5", "volume", "list"]).await;
    assert!(ran.err.starts_with("warning: [danger] plaintext is on"), "{}", ran.err);
    assert_eq!(ran.exit, 5, "the agents speak TLS only: {ran:?}");
}

#[tokio::test]
async fn bad_usage_and_config_are_64_and_say_what_to_do() {
    let ran = tether(&["list", "--config", "/no/such/tether.toml"], pending()).await;
    assert_eq!(ran.exit, 64);
    assert!(
        ran.err.contains("/no/such/tether.toml: No such file") && ran.err.contains("next:"),
        "{}",
        ran.err
    );
    let ran = tether(&["list", "--config", "/dev/null"], pending()).await;
    assert!(ran.exit == 64 && ran.err.contains("tether pki init"), "{ran:?}");
    let ran = tether(&["--json", "attach", "v1", "c2"], pending()).await;
    assert_eq!((ran.exit, ran.json()["error"]["exit_code"].as_u64()), (64, Some(64)));
    let ran = tether(&["frobnicate"], pending()).await;
    assert_eq!(ran.exit, 64);
    assert_eq!(tether(&[], pending()).await.exit, 64);
    let ran = tether(&["--help"], pending()).await;
    assert_eq!(ran.exit, 0);
    assert!(ran.out.contains("64   bad usage or config") && ran.out.contains("Example:"), "{}", ran.out);
    let lab = Lab::up().await;
    std::fs::remove_file(lab.directory.path().join("pki/controller.key")).unwrap();
    let ran = lab.tether(&["show", ID]).await;
    assert_eq!(ran.exit, 64);
    assert!(
        ran.err.contains("line 4: key:") && ran.err.contains("tether pki issue controller"),
        "{}",
        ran.err
    );
}
