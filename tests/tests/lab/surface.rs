//! What generic tools see of the agents: health, and reflection as grpcurl uses it; and the stream of steps.

use tether_proto::wire::watch_operation_request::Key;
use tether_proto::wire::{self, StepState};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

use crate::{Fixture, new_id};

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
