//! What every agent offers beside its own service: health (grpc.health.v1) and reflection, so that grpcurl works;
//! and the stream of an operation's steps.

use std::pin::Pin;

use tether_proto::wire;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::server::NamedService;
use tonic::service::Routes;

use crate::operations::Operations;

/// Puts health and reflection beside an agent's service.
///
/// # Errors
/// When the descriptor set cannot be read, a defect of the build.
pub async fn with_health_and_reflection<S>(service: S) -> Result<Routes, tonic_reflection::server::Error>
where
    S: tower::Service<
            tonic::codegen::http::Request<tonic::body::Body>,
            Response = tonic::codegen::http::Response<tonic::body::Body>,
            Error = std::convert::Infallible,
        > + NamedService
        + Clone
        + Send
        + Sync
        + 'static,
    S::Future: Send + 'static,
{
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<S>().await;
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(tether_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    // Older clients speak v1alpha only.
    let (current, older) = (reflection().build_v1()?, reflection().build_v1alpha()?);
    Ok(Routes::new(service).add_service(health_service).add_service(current).add_service(older))
}

/// The answer of `WatchOperation`.
pub type StepStream = Pin<Box<dyn Stream<Item = Result<wire::StepEvent, Status>> + Send>>;

/// The steps of the operation under `key`, or of the next one to start. Ends with the agent, too.
pub fn step_stream(operations: Operations, key: String, shutdown: CancellationToken) -> StepStream {
    let (sender, receiver) = tokio::sync::mpsc::channel(64);
    tokio::spawn(async move {
        tokio::select! { () = operations.watch(&key, sender) => (), () = shutdown.cancelled() => () }
    });
    Box::pin(ReceiverStream::new(receiver).map(Ok))
}
