//! The wire of the compute agent: decode and validate, hand over to the engine, encode. No order of steps here.

use std::sync::Arc;
use std::time::Duration;

use tether_agent_core::failure::Failure;
use tether_agent_core::services::{StepStream, step_stream};
use tether_proto::wire::compute_agent_server::ComputeAgent;
use tether_proto::{AttachmentId, ConnectionInfo, DiskOptions, ParseError, wire};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use crate::attachments::Attachments;

/// The longest that a guest may be waited for: an hour.
const LONGEST_GUEST_DEADLINE: u64 = 3_600_000;

/// The gRPC service.
pub(crate) struct Service {
    attachments: Arc<Attachments>,
    shutdown: CancellationToken,
}

impl Service {
    /// The service in front of the engine.
    pub(crate) fn new(attachments: Arc<Attachments>, shutdown: CancellationToken) -> Self {
        Self { attachments, shutdown }
    }
}

fn attachment_id(text: &str) -> Result<AttachmentId, Failure> {
    Ok(text.parse()?)
}

#[tonic::async_trait]
impl ComputeAgent for Service {
    async fn get_connector(
        &self,
        _request: Request<wire::GetConnectorRequest>,
    ) -> Result<Response<wire::Connector>, Status> {
        Ok(Response::new((&self.attachments.connector().await?).into()))
    }

    async fn attach(
        &self,
        request: Request<wire::AttachRequest>,
    ) -> Result<Response<wire::AttachResponse>, Status> {
        let request = request.into_inner();
        let id = attachment_id(&request.attachment_id)?;
        let domain = request.domain.parse().map_err(Failure::from)?;
        let info = request
            .connection_info
            .as_ref()
            .ok_or_else(|| Failure::from(ParseError::missing("connection_info")))?;
        let connection = ConnectionInfo::try_from(info).map_err(Failure::from)?;
        let options = DiskOptions::try_from(&request.disk.unwrap_or_default()).map_err(Failure::from)?;
        let (attachment, report) = self.attachments.attach(id, domain, connection, options).await?;
        Ok(Response::new(wire::AttachResponse { attachment: Some(attachment), report: Some(report) }))
    }

    async fn detach(
        &self,
        request: Request<wire::DetachRequest>,
    ) -> Result<Response<wire::DetachResponse>, Status> {
        let request = request.into_inner();
        let id = attachment_id(&request.attachment_id)?;
        let guest_deadline = match request.guest_deadline_milliseconds {
            0 => None,
            milliseconds if milliseconds <= LONGEST_GUEST_DEADLINE => {
                Some(Duration::from_millis(milliseconds))
            }
            milliseconds => {
                let problem = format!("must be at most {LONGEST_GUEST_DEADLINE}");
                let error =
                    ParseError::new("guest_deadline_milliseconds", problem, &milliseconds.to_string());
                return Err(Failure::from(error).into());
            }
        };
        let report = self.attachments.detach(id, guest_deadline).await?;
        Ok(Response::new(wire::DetachResponse { report: Some(report) }))
    }

    async fn resize_attachment(
        &self,
        request: Request<wire::ResizeAttachmentRequest>,
    ) -> Result<Response<wire::ResizeAttachmentResponse>, Status> {
        let request = request.into_inner();
        let id = attachment_id(&request.attachment_id)?;
        let size = request.size_bytes.try_into().map_err(Failure::from)?;
        let (attachment, report) = self.attachments.resize(id, size).await?;
        let attachment = Some(attachment);
        Ok(Response::new(wire::ResizeAttachmentResponse { attachment, report: Some(report) }))
    }

    async fn get_attachment(
        &self,
        request: Request<wire::GetAttachmentRequest>,
    ) -> Result<Response<wire::AttachmentStatus>, Status> {
        let id = attachment_id(&request.into_inner().attachment_id)?;
        Ok(Response::new(self.attachments.get(id).await?))
    }

    async fn list_attachments(
        &self,
        _request: Request<wire::ListAttachmentsRequest>,
    ) -> Result<Response<wire::ListAttachmentsResponse>, Status> {
        Ok(Response::new(wire::ListAttachmentsResponse { attachments: self.attachments.list().await? }))
    }

    type WatchOperationStream = StepStream;

    async fn watch_operation(
        &self,
        request: Request<wire::WatchOperationRequest>,
    ) -> Result<Response<StepStream>, Status> {
        use wire::watch_operation_request::Key;
        let key = match request.into_inner().key {
            Some(Key::AttachmentId(id)) => attachment_id(&id)?.to_string(),
            Some(Key::Volume(_)) => {
                let error =
                    ParseError::new("key", "must be an attachment id: this host has no volumes", "volume");
                return Err(Failure::from(error).into());
            }
            None => return Err(Failure::from(ParseError::missing("key")).into()),
        };
        Ok(Response::new(step_stream(self.attachments.operations().clone(), key, self.shutdown.clone())))
    }
}
