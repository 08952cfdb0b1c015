//! The wire of the compute agent: decode and validate, hand over to the engine, encode. No order of steps here.
//! What may change something is done under `Change`, which writes its line in the audit.

use std::sync::Arc;
use std::time::Duration;

use tether_agent_core::audit::Change;
use tether_agent_core::doctor::diagnose;
use tether_agent_core::events::{EventStream, Source};
use tether_agent_core::failure::Failure;
use tether_agent_core::services::{StepStream, step_stream};
use tether_proto::wire::compute_agent_server::ComputeAgent;
use tether_proto::{AttachmentId, ConnectionInfo, DiskOptions, ParseError, wire};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use crate::attachments::Attachments;
use crate::config::Config;
use crate::doctor;
use crate::watch;

/// The longest that a guest may be waited for: an hour.
const LONGEST_GUEST_DEADLINE: u64 = 3_600_000;

/// The gRPC service.
pub(crate) struct Service {
    config: Config,
    attachments: Arc<Attachments>,
    /// What is looked at while somebody watches.
    sources: Vec<Source>,
    shutdown: CancellationToken,
}

impl Service {
    /// The service in front of the engine.
    pub(crate) fn new(config: Config, attachments: Arc<Attachments>, shutdown: CancellationToken) -> Self {
        let sources = watch::sources(&attachments);
        Self { config, attachments, sources, shutdown }
    }

    /// The change of an attachment that the request names by its id alone: its volume and domain are those of the journal.
    fn change_of_known<T>(&self, request: &Request<T>, id: &str) -> Change {
        let change = Change::of(request).attachment(id);
        let recorded = id.parse::<AttachmentId>().ok().and_then(|id| self.attachments.recorded(id));
        match recorded {
            Some(known) => {
                change.volume(&known.connection.serial.to_string()).domain(known.requested_domain.as_str())
            }
            None => change,
        }
    }
}

/// How long a guest may take; 0 is the agent's own answer.
fn guest_deadline(milliseconds: u64) -> Result<Option<Duration>, ParseError> {
    match milliseconds {
        0 => Ok(None),
        1..=LONGEST_GUEST_DEADLINE => Ok(Some(Duration::from_millis(milliseconds))),
        _ => {
            let problem = format!("must be at most {LONGEST_GUEST_DEADLINE}");
            Err(ParseError::new("guest_deadline_milliseconds", problem, &milliseconds.to_string()))
        }
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
        let change = Change::of(&request);
        let request = request.into_inner();
        let serial = request.connection_info.as_ref().map_or("", |info| info.serial.as_str());
        let attachments = self.attachments.clone();
        change
            .attachment(&request.attachment_id)
            .volume(serial)
            .domain(&request.domain)
            .run(
                async move {
                    let id = attachment_id(&request.attachment_id)?;
                    let domain = request.domain.parse()?;
                    let info = request
                        .connection_info
                        .as_ref()
                        .ok_or_else(|| ParseError::missing("connection_info"))?;
                    let connection = ConnectionInfo::try_from(info)?;
                    let options = DiskOptions::try_from(&request.disk.unwrap_or_default())?;
                    let (attachment, report) = attachments.attach(id, domain, connection, options).await?;
                    Ok(wire::AttachResponse { attachment: Some(attachment), report: Some(report) })
                },
                |reply| reply.report.as_ref(),
            )
            .await
    }

    async fn detach(
        &self,
        request: Request<wire::DetachRequest>,
    ) -> Result<Response<wire::DetachResponse>, Status> {
        let change = self.change_of_known(&request, &request.get_ref().attachment_id);
        let request = request.into_inner();
        let attachments = self.attachments.clone();
        change
            .run(
                async move {
                    let id = attachment_id(&request.attachment_id)?;
                    let guest_deadline = guest_deadline(request.guest_deadline_milliseconds)?;
                    let (report, may_be_lost) = attachments.detach(id, guest_deadline, request.force).await?;
                    Ok(wire::DetachResponse { report: Some(report), may_be_lost })
                },
                |reply| reply.report.as_ref(),
            )
            .await
    }

    async fn resize_attachment(
        &self,
        request: Request<wire::ResizeAttachmentRequest>,
    ) -> Result<Response<wire::ResizeAttachmentResponse>, Status> {
        let change = self.change_of_known(&request, &request.get_ref().attachment_id);
        let request = request.into_inner();
        let attachments = self.attachments.clone();
        change
            .run(
                async move {
                    let id = attachment_id(&request.attachment_id)?;
                    let size = request.size_bytes.try_into()?;
                    let (attachment, report) = attachments.resize(id, size).await?;
                    let attachment = Some(attachment);
                    Ok(wire::ResizeAttachmentResponse { attachment, report: Some(report) })
                },
                |reply| reply.report.as_ref(),
            )
            .await
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

    async fn reconcile(
        &self,
        request: Request<wire::ReconcileRequest>,
    ) -> Result<Response<wire::ReconcileResponse>, Status> {
        let change = Change::of(&request);
        let dry_run = request.into_inner().dry_run;
        let attachments = self.attachments.clone();
        change.reconcile(async move { attachments.reconcile(dry_run).await }).await
    }

    async fn list_objects(
        &self,
        _request: Request<wire::ListObjectsRequest>,
    ) -> Result<Response<wire::ListObjectsResponse>, Status> {
        Ok(Response::new(wire::ListObjectsResponse { objects: self.attachments.objects().await? }))
    }

    async fn diagnose(
        &self,
        request: Request<wire::DiagnoseRequest>,
    ) -> Result<Response<wire::DiagnoseResponse>, Status> {
        let checks = doctor::checks(&self.config, Ok(self.attachments.libvirt.clone()));
        Ok(Response::new(diagnose(request.into_inner(), checks, doctor::about()).await?))
    }

    type WatchStream = EventStream;

    async fn watch(&self, _request: Request<wire::WatchRequest>) -> Result<Response<EventStream>, Status> {
        let events = self.attachments.operations().events();
        Ok(Response::new(events.watch(self.sources.clone(), self.shutdown.clone())))
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
