//! What generic tools see of the agents: health, and reflection as grpcurl uses it; and the stream of steps.

use tether_proto::wire::watch_operation_request::Key;
use tether_proto::wire::{self, StepState};
use tether_tests::Host;
use tether_tests::tether::FAULT_FILE;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

use crate::{Fixture, new_id, text};

#[tokio::test]
#[ignore = "lab"]
async fn both_agents_tell_their_health_and_their_services() {
    let fixture = Fixture::new().await;
    for (service, channel) in fixture.tether.channels().await.unwrap() {
        for name in ["", &format!("tether.v1.{service}")] {
            let request = HealthCheckRequest { service: name.to_owned() };
            let health = HealthClient::new(channel.clone()).check(request).await.unwrap().into_inner();
            assert_eq!(health.status(), ServingStatus::Serving, "{name:?}");
        }
        let ask = |message| ServerReflectionRequest { host: String::new(), message_request: Some(message) };
        let questions = [
            ask(MessageRequest::ListServices(String::new())),
            ask(MessageRequest::FileContainingSymbol(format!("tether.v1.{service}"))),
        ];
        let mut answers = ServerReflectionClient::new(channel)
            .server_reflection_info(tokio_stream::iter(questions))
            .await
            .unwrap()
            .into_inner();
        match answers.message().await.unwrap().unwrap().message_response.unwrap() {
            MessageResponse::ListServicesResponse(list) => {
                let names: Vec<String> = list.service.into_iter().map(|service| service.name).collect();
                assert!(names.contains(&format!("tether.v1.{service}")), "{names:?}");
                assert!(names.contains(&"grpc.health.v1.Health".to_owned()), "{names:?}");
            }
            other => panic!("{other:?}"),
        }
        let descriptors = answers.message().await.unwrap().unwrap().message_response.unwrap();
        assert!(matches!(descriptors, MessageResponse::FileDescriptorResponse(_)), "{descriptors:?}");
    }
}

/// What a host's agent tells Prometheus.
pub(crate) async fn metrics(host: &Host, port: u16) -> String {
    let ask = format!(
        "exec 3<>/dev/tcp/127.0.0.1/{port}; printf 'GET /metrics HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n' >&3; timeout 20 cat <&3"
    );
    host.run(&format!("bash -c \"{ask}\"")).await.unwrap()
}

/// The alerts and the dashboard in `packaging` ask for metrics that there are.
fn assert_known(told: &[&str]) {
    let monitoring = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/monitoring");
    for file in ["tether.rules.yml", "tether-dashboard.json"] {
        let text = std::fs::read_to_string(monitoring.join(file)).unwrap();
        let mut asked: Vec<&str> = text
            .split(|character: char| character != '_' && !character.is_ascii_lowercase())
            .filter(|word| word.starts_with("tether_"))
            .collect();
        asked.sort_unstable();
        asked.dedup();
        assert!(asked.len() >= 8, "{file} asks for {asked:?} alone");
        for metric in asked {
            let known = told.iter().flat_map(|told| told.lines()).any(|line| line.starts_with(metric));
            assert!(known, "{file}: nobody tells {metric}");
        }
    }
}

/// A watcher that came before the operation sees each step begin and end as it happens, and then the end of the stream.
#[tokio::test]
#[ignore = "lab"]
async fn the_steps_of_a_running_attach_are_seen_as_they_happen() {
    let fixture = Fixture::new().await;
    fixture.volume("thin/watched").await;
    let id = new_id();
    let request = wire::WatchOperationRequest { key: Some(Key::AttachmentId(id.clone())) };
    let mut stream =
        fixture.tether.compute().await.unwrap().watch_operation(request).await.unwrap().into_inner();
    let arguments = ["attach", "thin/watched", "c2", "--id", &id];
    let attach = fixture.tether.json(&arguments);
    let watch = async {
        let mut seen = Vec::new();
        while let Some(event) = stream.message().await.unwrap() {
            seen.push((event.step.clone(), event.state()));
        }
        seen
    };
    let (attached, seen) = tokio::join!(attach, watch);
    let attached = attached.unwrap();
    for step in attached["attach"]["steps"].as_array().unwrap() {
        let name = step["step"].as_str().unwrap().to_owned();
        let begun =
            seen.iter().position(|event| *event == (name.clone(), StepState::Started)).expect("it began");
        let done = seen.iter().position(|event| *event == (name.clone(), StepState::Done)).expect("it ended");
        assert!(begun < done, "{name}: {seen:?}");
    }
}

/// Left out of a run for its time, not for what it shows: `tests/run long`.
mod long {
    use super::*;

    /// Operations, steps and what is there are told as numbers, on the host's own address alone.
    #[tokio::test]
    #[ignore = "lab"]
    async fn both_agents_tell_metrics_of_what_they_did_and_have() {
        let fixture = Fixture::new().await;
        let (storage, compute) = (&fixture.lab.storage, &fixture.lab.compute);
        fixture.volume("thick/measured").await;
        let id = text(&fixture.attach(&["thick/measured", "c2"]).await, "/attachment_id").to_owned();
        fixture.tether.error(&["attach", "thick/measured", "no-such-domain"]).await.unwrap();
        // Of failed steps nothing is told before there is one.
        storage.put("create-volume before\n", FAULT_FILE, 0o644).await.unwrap();
        fixture.tether.error(&["volume", "create", "thin/fails", "16M"]).await.unwrap();
        storage.run(&format!("rm {FAULT_FILE}")).await.unwrap();
        let has = |told: &str, line: &str| {
            assert!(told.lines().any(|told| told == line), "{line} is not in:\n{told}");
        };
        let told = metrics(storage, 7441).await;
        has(&told, "tether_exports{transport=\"iscsi\",state=\"connected\"} 1.0");
        has(&told, "tether_operations_total{verb=\"export\",outcome=\"ok\"} 1");
        has(&told, "tether_pool_usable{pool=\"thick\",provisioning=\"thick\"} 1.0");
        has(&told, "tether_stuck_keys{} 0.0");
        let size = "vgs --noheadings --nosuffix --units b -o vg_size tether";
        let size: f64 = storage.run(size).await.unwrap().trim().parse().unwrap();
        has(&told, &format!("tether_pool_size_bytes{{pool=\"thick\",provisioning=\"thick\"}} {size:?}"));
        let of_storage = told;
        let told = metrics(compute, 7442).await;
        assert_known(&[&of_storage, &told]);
        has(&told, "tether_attachments{transport=\"iscsi\",state=\"attached\"} 1.0");
        has(&told, "tether_sessions{transport=\"iscsi\",state=\"logged-in\"} 1.0");
        has(&told, "tether_step_seconds_count{verb=\"attach\",step=\"login\"} 1");
        fixture.detach(&id).await;
        let told = metrics(compute, 7442).await;
        has(&told, "tether_attachments{transport=\"iscsi\",state=\"attached\"} 0.0");
        let elsewhere = "timeout 5 bash -c 'exec 3<>/dev/tcp/10.99.0.2/7442' 2>&1";
        let refused = storage.try_run(elsewhere).await.unwrap();
        assert!(refused.stdout.contains("refused"), "{refused:?}");
        let told = metrics(storage, 7441).await;
        has(&told, "tether_exports{transport=\"iscsi\",state=\"connected\"} 0.0");
    }
}
