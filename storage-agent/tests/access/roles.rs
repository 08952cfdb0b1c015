//! Each role may do what is its own, over TCP and on the socket; what was done is in the audit.

use std::os::unix::fs::PermissionsExt;

use tether_proto::wire;
use tonic::Code;
use tonic_types::StatusExt;

use crate::agent::{Agent, reason};
use crate::pki::Kind;

const ID: &str = "5f1c0e0a-7d1f-4a53-9d3c-0b7f3c0f7d11";

fn create(volume: &str) -> wire::CreateVolumeRequest {
    wire::CreateVolumeRequest {
        pool: "nope".into(),
        volume: volume.into(),
        size_bytes: 1 << 20,
        ..Default::default()
    }
}

#[tokio::test]
async fn a_reader_looks_an_operator_reconciles_and_a_controller_does_everything() {
    let agent = Agent::start().await;
    let unexport = wire::UnexportRequest { attachment_id: ID.into(), force: false };
    let reconcile = wire::ReconcileRequest { dry_run: false };

    let mut reader = agent.connect(Some(&agent.client("reader"))).await.unwrap();
    reader.list_pools(wire::ListPoolsRequest {}).await.unwrap();
    let refused = reader.reconcile(reconcile).await.unwrap_err();
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::PermissionDenied, "WRONG_ROLE"));
    let words = "Reconcile needs the role operator, and CN=my-reader has the role reader";
    assert_eq!(refused.message(), words);
    let details = refused.get_error_details();
    let next = details.error_info().unwrap().metadata["next"].clone();
    assert!(next.contains("tether pki issue operator NAME") && next.contains("[server.roles]"), "{next}");
    // Nothing of the request was read: a larger one than any is refused for the role, too.
    let refused = reader.create_volume(create(&"x".repeat(1 << 20))).await.unwrap_err();
    assert_eq!(reason(&refused), "WRONG_ROLE", "{refused:?}");
    let line = agent.line(&["audit: refused", "rpc=\"CreateVolume\""]).await;
    for words in ["who=\"CN=my-reader\"", "role=\"reader\"", "peer=\"127.0.0.1:", "reason=\"WRONG_ROLE\""] {
        assert!(line.contains(words), "{words}: {line}");
    }

    let mut operator = agent.connect(Some(&agent.client("operator"))).await.unwrap();
    operator.list_exports(wire::ListExportsRequest {}).await.unwrap();
    operator.reconcile(reconcile).await.unwrap();
    let refused = operator.unexport(unexport.clone()).await.unwrap_err();
    assert_eq!(reason(&refused), "WRONG_ROLE", "{refused:?}");

    let mut controller = agent.connect(Some(&agent.client("controller"))).await.unwrap();
    controller.reconcile(reconcile).await.unwrap();
    let report = controller.unexport(unexport).await.unwrap().into_inner().report.unwrap();
    assert_eq!(report.outcome(), wire::Outcome::Unchanged);
    let line = agent.line(&["audit: change", "rpc=\"Unexport\""]).await;
    for words in
        ["who=\"CN=my-controller\"", "role=\"controller\"", ID, "outcome=\"UNCHANGED\"", "milliseconds="]
    {
        assert!(line.contains(words), "{words}: {line}");
    }
    let failed = controller.create_volume(create("v1")).await.unwrap_err();
    assert_eq!(reason(&failed), "POOL_NOT_FOUND");
    let line = agent.line(&["audit: change", "rpc=\"CreateVolume\""]).await;
    for words in ["volume=\"nope/v1\"", "outcome=\"FAILED\"", "reason=\"POOL_NOT_FOUND\""] {
        assert!(line.contains(words), "{words}: {line}");
    }
    // Every change that was let in has one line, every refusal has one.
    agent.lines(2, &["audit: change"]).await;
    agent.lines(3, &["audit: refused"]).await;
}

#[tokio::test]
async fn what_comes_from_outside_cannot_write_lines_of_its_own() {
    let agent = Agent::start().await;
    let mut controller = agent.connect(Some(&agent.client("controller"))).await.unwrap();
    let forged = "v\n2026-01-01 INFO audit: change who=\"CN=nobody\" \u{1b}[31m";
    controller.create_volume(create(forged)).await.unwrap_err();
    let line = agent.line(&["audit: change", "CN=nobody"]).await;
    assert!(line.contains("who=\"CN=my-controller\"") && !line.contains('\u{1b}'), "{line}");
    agent.lines(1, &["audit: change"]).await;
}

#[tokio::test]
async fn a_certificate_without_a_role_gets_in_and_may_do_nothing() {
    let agent = Agent::start().await;
    let stranger = agent.authority.issue(Kind::Client, "accounting", "tether-controller");
    let mut stranger = agent.connect(Some(&stranger)).await.unwrap();
    let refused = stranger.list_pools(wire::ListPoolsRequest {}).await.unwrap_err();
    assert_eq!(reason(&refused), "WRONG_ROLE");
    assert!(refused.message().ends_with("CN=tether-controller has no role"), "{}", refused.message());
    agent.line(&["audit: refused", "rpc=\"ListPools\"", "role=\"none\""]).await;
}

#[tokio::test]
async fn roles_are_given_by_the_config() {
    let agent =
        Agent::start_with("[server.roles]\ncontroller = [\"CN=plane\"]\nreader = [\"USER=4000000001\"]\n")
            .await;
    let connect = async |unit: &str, name: &str| {
        agent.connect(Some(&agent.authority.issue(Kind::Client, unit, name))).await.unwrap()
    };
    let mut plane = connect("platform", "plane").await;
    assert_eq!(reason(&plane.create_volume(create("v1")).await.unwrap_err()), "POOL_NOT_FOUND");
    // The list took the default's place.
    let mut old = connect("tether-controller", "old").await;
    assert_eq!(reason(&old.create_volume(create("v1")).await.unwrap_err()), "WRONG_ROLE");
    // Others than root have a role: they must be able to open the socket.
    let mode = std::fs::metadata(agent.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o666);
}

#[tokio::test]
async fn on_the_socket_the_agents_own_user_is_a_controller() {
    let agent = Agent::start().await;
    let mode = std::fs::metadata(agent.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut local = agent.local().await;
    let request = wire::UnexportRequest { attachment_id: ID.into(), force: false };
    local.unexport(request).await.unwrap();
    agent.line(&["audit: change", "who=\"USER=", "role=\"controller\"", "peer=\"local\"", ID]).await;
}

#[tokio::test]
async fn requests_and_headers_that_are_too_large_are_refused() {
    let agent = Agent::start().await;
    let mut controller = agent.connect(Some(&agent.client("controller"))).await.unwrap();
    let refused = controller.create_volume(create(&"x".repeat(70_000))).await.unwrap_err();
    assert_eq!(refused.code(), Code::OutOfRange, "{refused:?}");
    let mut request = tonic::Request::new(wire::ListPoolsRequest {});
    request.metadata_mut().insert("x-large", "x".repeat(20_000).parse().unwrap());
    controller.list_pools(request).await.unwrap_err();
    // The connection is as good as before.
    controller.list_pools(wire::ListPoolsRequest {}).await.unwrap();
}
