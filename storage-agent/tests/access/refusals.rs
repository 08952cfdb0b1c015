//! Everybody who does not belong is refused, and has a line in the audit.

use std::time::Duration;

use tether_proto::wire;
use tether_proto::wire::storage_agent_client::StorageAgentClient;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tonic::transport::Endpoint;

use crate::agent::{Agent, NAME};
use crate::pki::{Authority, Kind};

/// The client is refused, and the audit says why.
async fn refused(agent: &Agent, what: &str, client: Option<&crate::pki::Certified>, reason: &str) {
    assert!(agent.connect(client).await.is_err(), "{what}: was let in");
    let line = agent.line(&["audit: refused", &format!("reason=\"{reason}\"")]).await;
    assert!(line.contains("peer=\"127.0.0.1:"), "{what}: {line}");
}

#[tokio::test]
async fn certificates_that_do_not_belong_are_refused() {
    let agent = Agent::start().await;
    let unit = "tether-controller";
    // Of the same name as ours.
    let other = Authority::new("authority").issue(Kind::Client, unit, "me");
    let expired = agent.authority.issue(Kind::Expired, unit, "me");
    let early = agent.authority.issue(Kind::NotYetValid, unit, "me");
    // An agent's certificate serves, and asks nothing: who took one from a host is no controller.
    let agents = agent.authority.issue(Kind::Server, unit, "storage2");
    refused(&agent, "no certificate", None, "NO_CERTIFICATE").await;
    refused(&agent, "wrong authority", Some(&other), "UNKNOWN_AUTHORITY").await;
    refused(&agent, "expired", Some(&expired), "CERTIFICATE_EXPIRED").await;
    refused(&agent, "not yet valid", Some(&early), "CERTIFICATE_NOT_YET_VALID").await;
    refused(&agent, "an agent's", Some(&agents), "CERTIFICATE_NOT_A_CLIENTS").await;
    agent.connect(Some(&agent.client("controller"))).await.expect("the control gets in");
    assert_eq!(agent.count(&["audit: change"]), 0);
}

/// The client looks at the agent, too: one of another name or another authority is not spoken to.
#[tokio::test]
async fn an_agent_that_is_not_the_one_is_refused_by_its_client() {
    let agent = Agent::start().await;
    let client = agent.client("controller");
    assert!(agent.connect_to("storage2", &agent.authority, Some(&client)).await.is_err());
    agent.line(&["audit: refused", "reason=\"AGENT_CERTIFICATE_REFUSED\""]).await;
    assert!(agent.connect_to(NAME, &Authority::new("other"), Some(&client)).await.is_err());
    agent.connect(Some(&client)).await.expect("the control gets in");
}

/// Sends bytes and gives what comes back until the agent closes, which it must.
async fn answer(agent: &Agent, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(agent.address).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    let mut answer = Vec::new();
    let closed = timeout(Duration::from_secs(20), stream.read_to_end(&mut answer)).await;
    // A reset is an end, too.
    drop(closed.expect("the agent closes"));
    answer
}

#[tokio::test]
async fn plaintext_is_refused() {
    let agent = Agent::start().await;
    for request in [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], b"GET / HTTP/1.1\r\nHost: storage1\r\n\r\n"] {
        let answer = answer(&agent, request).await;
        assert!(!answer.windows(4).any(|bytes| bytes == b"HTTP"), "{answer:?}");
    }
    agent.line(&["audit: refused", "reason=\"NO_TLS\""]).await;
    let endpoint = Endpoint::from_shared(format!("http://{}", agent.address)).unwrap();
    let called = match endpoint.connect().await {
        Ok(channel) => StorageAgentClient::new(channel).list_pools(wire::ListPoolsRequest {}).await.is_ok(),
        Err(_) => false,
    };
    assert!(!called);
}

/// A ClientHello as a client sends it that speaks nothing above this version (RFC 5246 section 7.4.1.2): random, no session,
/// one cipher suite (ECDHE-ECDSA-AES128-GCM-SHA256, or for 1.1 ECDHE-ECDSA-AES128-CBC-SHA), no compression, the extensions for
/// curves and signatures.
fn client_hello(version: [u8; 2], suite: [u8; 2]) -> Vec<u8> {
    let extensions: &[u8] = &[
        0x00, 0x0a, 0x00, 0x04, 0x00, 0x02, 0x00, 0x17, // supported_groups: secp256r1
        0x00, 0x0b, 0x00, 0x02, 0x01, 0x00, // ec_point_formats: uncompressed
        0x00, 0x0d, 0x00, 0x04, 0x00, 0x02, 0x04, 0x03, // signature_algorithms: ecdsa_secp256r1_sha256
    ];
    let mut body = version.to_vec();
    body.extend([7; 32]);
    body.extend([0, 0, 2, suite[0], suite[1], 1, 0, 0, extensions.len() as u8]);
    body.extend(extensions);
    let mut record = vec![0x16, 3, 1, 0, body.len() as u8 + 4, 1, 0, 0, body.len() as u8];
    record.extend(body);
    record
}

#[tokio::test]
async fn older_versions_of_tls_are_refused() {
    let agent = Agent::start().await;
    for (name, version, suite) in [("1.2", [3, 3], [0xc0, 0x2b]), ("1.1", [3, 2], [0xc0, 0x09])] {
        let answer = answer(&agent, &client_hello(version, suite)).await;
        // One record: a fatal alert, protocol_version.
        assert_eq!(
            (answer.first(), answer.get(5..)),
            (Some(&21), Some(&[2, 70][..])),
            "TLS {name}: {answer:?}"
        );
    }
    agent.lines(2, &["audit: refused", "reason=\"TLS_VERSION\""]).await;
}
