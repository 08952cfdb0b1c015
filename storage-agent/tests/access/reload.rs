//! Certificates, key and authority change under a running agent.

use std::os::unix::fs::PermissionsExt;

use tether_proto::wire;

use crate::agent::{Agent, NAME};
use crate::pki::{Authority, Kind};

const RELOADED: &str = "are loaded anew";
const NOT_RELOADED: &str = "cannot be used: the ones from before stay";

#[tokio::test]
async fn new_certificates_count_at_once_and_old_connections_live_on() {
    let agent = Agent::start().await;
    let client = agent.client("controller");
    let mut old = agent.connect(Some(&client)).await.unwrap();

    let authority = Authority::new("the next one");
    agent.replace_certificates(&authority, &authority.issue(Kind::Server, "tether-agent", NAME));
    let fresh = authority.issue(Kind::Client, "tether-reader", "fresh");
    agent.connect_to(NAME, &authority, Some(&fresh)).await.expect("the new authority's client gets in");
    agent.line(&[RELOADED]).await;
    // The agent shows its new certificate, which the old authority did not issue …
    assert!(agent.connect(Some(&client)).await.is_err());
    // … and does not take certificates of the old one any more.
    assert!(agent.connect_to(NAME, &authority, Some(&client)).await.is_err());
    agent.line(&["audit: refused", "reason=\"UNKNOWN_AUTHORITY\""]).await;

    old.list_pools(wire::ListPoolsRequest {}).await.expect("the old connection lives on");
    agent.lines(1, &[RELOADED]).await;
    assert_eq!(agent.count(&[NOT_RELOADED]), 0);
}

#[tokio::test]
async fn files_that_cannot_be_used_change_nothing_and_the_log_says_so() {
    let agent = Agent::start().await;
    let client = agent.client("controller");
    let (certificate, key) = (agent.file("agent.crt"), agent.file("agent.key"));
    let before = std::fs::read(&certificate).unwrap();

    std::fs::write(&certificate, "no certificate").unwrap();
    for _ in 0..3 {
        agent.connect(Some(&client)).await.expect("the old certificate stays");
    }
    let line = agent.line(&["ERROR", NOT_RELOADED]).await;
    assert!(line.contains("server.certificate") && line.contains("agent.crt"), "{line}");
    // Once for each change, not for each client.
    agent.lines(1, &[NOT_RELOADED]).await;

    // Half of a renewal: a certificate whose key is not there yet.
    let renewed = agent.authority.issue(Kind::Server, "tether-agent", NAME);
    std::fs::write(&certificate, &renewed.certificate).unwrap();
    agent.connect(Some(&client)).await.expect("the old pair stays");
    agent.lines(2, &[NOT_RELOADED]).await;
    std::fs::write(&key, &renewed.key).unwrap();
    agent.connect(Some(&client)).await.expect("the new pair is used");
    agent.line(&[RELOADED]).await;

    // A key that others may read is not taken, as at the start.
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    agent.connect(Some(&client)).await.unwrap();
    agent.line(&["ERROR", NOT_RELOADED, "chmod 600"]).await;
    std::fs::remove_file(&certificate).unwrap();
    agent.connect(Some(&client)).await.unwrap();
    std::fs::write(&certificate, before).unwrap();
    agent.connect(Some(&client)).await.unwrap();
    // Its mode, the certificate gone, and the old one with the new key.
    agent.lines(5, &[NOT_RELOADED]).await;
}
