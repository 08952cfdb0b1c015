//! What every agent offers beside its own service: health (grpc.health.v1) and reflection, so that grpcurl works;
//! and the stream of an operation's steps.
//!
//! Health knows the agent's service, which serves, and [`KERNEL`], which does not while an operation hangs in the kernel.

use std::pin::Pin;

use tether_proto::wire;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::server::NamedService;
use tonic::service::Routes;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::operations::Operations;

/// What health calls the kernel: NOT_SERVING while an operation hangs there and its key is `STUCK` (F27). The agent itself
/// goes on serving all other keys.
pub const KERNEL: &str = "kernel";

/// The largest request that is read, in bytes. The largest that has a meaning is far smaller: an Attach with all portals.
pub const LARGEST_REQUEST: usize = 64 * 1024;

/// Puts health and reflection beside an agent's service.
///
/// # Errors
/// When the descriptor set cannot be read, a defect of the build.
pub async fn with_health_and_reflection<S>(
    service: S,
    operations: &Operations,
) -> Result<Routes, tonic_reflection::server::Error>
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
    health.set_service_status(KERNEL, ServingStatus::Serving).await;
    tokio::spawn(watch_kernel(health, operations.clone()));
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(tether_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    // Older clients speak v1alpha only.
    let (current, older) = (reflection().build_v1()?, reflection().build_v1alpha()?);
    Ok(Routes::new(service)
        .add_service(health_service.max_decoding_message_size(LARGEST_REQUEST))
        .add_service(current.max_decoding_message_size(LARGEST_REQUEST))
        .add_service(older.max_decoding_message_size(LARGEST_REQUEST)))
}

/// Tells health and systemd (`systemctl status`) what hangs in the kernel.
async fn watch_kernel(health: HealthReporter, operations: Operations) {
    let mut changes = operations.stuck().changes();
    while changes.changed().await.is_ok() {
        let stuck = operations.stuck().list();
        let status = if stuck.is_empty() { ServingStatus::Serving } else { ServingStatus::NotServing };
        health.set_service_status(KERNEL, status).await;
        let text = stuck.join("; ");
        // Without systemd there is nobody to tell, which is no error.
        if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Status(&text)]) {
            tracing::debug!(%error, "systemd not told");
        }
    }
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

#[cfg(test)]
mod tests {
    use prost::Message;
    use tether_proto::{NEEDED, Role};

    /// What is served beside the agents' own services has its place in the table of roles, too.
    #[test]
    fn health_and_reflection_need_a_role() {
        let mut served = Vec::new();
        for descriptors in [
            tonic_health::pb::FILE_DESCRIPTOR_SET,
            tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
            tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
        ] {
            for file in prost_types::FileDescriptorSet::decode(descriptors).unwrap().file {
                for service in &file.service {
                    let rpc = |rpc: &str| format!("/{}.{}/{rpc}", file.package(), service.name());
                    served.extend(service.method.iter().map(|method| rpc(method.name())));
                }
            }
        }
        assert!(served.iter().all(|path| Role::needed(path) == Some(Role::Reader)), "{served:?}");
        let others = NEEDED.iter().filter(|(path, _)| !path.starts_with("/tether."));
        assert_eq!(others.count(), served.len());
    }
}
