//! A compute agent with attachments in memory. Keeps the rules of the real one: idempotent, ended is ended, a guest is told
//! of no size that its device does not have.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use tether_proto::wire::compute_agent_server::ComputeAgent;
use tether_proto::wire::connection_info::Transport;
use tether_proto::wire::{self, Outcome};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status};

use super::{Agent, FakeStorageAgent, diagnosis, lock, lost, object, refusal};

pub(crate) const INITIATOR: &str = "iqn.1993-08.org.debian:01:compute1";

pub(crate) struct FakeComputeAgent {
    pub(crate) agent: Agent,
    /// Where its devices are.
    storage: Arc<FakeStorageAgent>,
    pub(crate) attachments: Mutex<BTreeMap<String, wire::AttachmentStatus>>,
    pub(crate) ended: Mutex<BTreeSet<String>>,
    /// The last request, to see what arrives.
    pub(crate) last_attach: Mutex<Option<wire::AttachRequest>>,
    pub(crate) last_detach: Mutex<Option<wire::DetachRequest>>,
    /// What a reconciliation finds.
    pub(crate) findings: Mutex<Vec<wire::ReconcileItem>>,
    /// What a diagnosis finds.
    pub(crate) diagnosis: Mutex<wire::DiagnoseResponse>,
}

impl FakeComputeAgent {
    pub(crate) fn new(agent: Agent, storage: Arc<FakeStorageAgent>) -> Self {
        Self {
            agent,
            storage,
            attachments: Mutex::default(),
            ended: Mutex::default(),
            last_attach: Mutex::default(),
            last_detach: Mutex::default(),
            findings: Mutex::default(),
            diagnosis: Mutex::default(),
        }
    }

    pub(crate) fn attached(&self) -> Vec<String> {
        lock(&self.attachments).keys().cloned().collect()
    }
}

type Reply<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl ComputeAgent for FakeComputeAgent {
    type WatchOperationStream = ReceiverStream<Result<wire::StepEvent, Status>>;
    type WatchStream = super::EventStream;

    async fn watch(&self, _: Request<wire::WatchRequest>) -> Reply<super::EventStream> {
        self.agent.watch_events().await
    }

    async fn get_connector(&self, _: Request<wire::GetConnectorRequest>) -> Reply<wire::Connector> {
        self.agent.begin("GetConnector").await?;
        Ok(Response::new(wire::Connector {
            hostname: "compute1".into(),
            initiator_iqn: INITIATOR.into(),
            addresses: vec!["192.0.2.2".into()],
            versions: Default::default(),
        }))
    }

    async fn attach(&self, request: Request<wire::AttachRequest>) -> Reply<wire::AttachResponse> {
        let trouble = self.agent.begin("Attach").await?;
        let request = request.into_inner();
        *lock(&self.last_attach) = Some(request.clone());
        let id = request.attachment_id;
        if lock(&self.ended).contains(&id) {
            return Err(refusal(Code::FailedPrecondition, "ATTACHMENT_ENDED", "the id is spent", &[]));
        }
        let before = lock(&self.attachments).get(&id).cloned();
        if before.as_ref().is_some_and(|before| before.domain != request.domain) {
            return Err(refusal(Code::AlreadyExists, "DIFFERENT_PARAMETERS", "domain differs", &[]));
        }
        let info = request.connection_info.unwrap();
        let disk = request.disk.unwrap();
        let over = match info.transport.unwrap() {
            Transport::Iscsi(iscsi) => wire::AttachmentStatus {
                device_path: format!("/dev/disk/by-id/wwn-0x{}", iscsi.wwn),
                target_iqn: iscsi.target_iqn,
                portal: iscsi.portals[0].clone(),
                transport: wire::Transport::Iscsi.into(),
                format: wire::VolumeFormat::Raw.into(),
                ..Default::default()
            },
            Transport::Nfs(nfs) => wire::AttachmentStatus {
                device_path: format!("/var/lib/tether/mnt/{}/{}", nfs.file_system_id, nfs.file),
                share: format!("{}:{}", nfs.servers[0], nfs.path),
                transport: wire::Transport::Nfs.into(),
                format: nfs.format,
                ..Default::default()
            },
        };
        let attachment = wire::AttachmentStatus {
            attachment_id: id.clone(),
            domain: request.domain,
            domain_uuid: "c2c2c2c2-0000-4000-8000-000000000001".into(),
            phase: "attached".into(),
            target_device: "vdb".into(),
            bus: if disk.bus == 0 { wire::DiskBus::Virtio.into() } else { disk.bus },
            serial: info.serial,
            size_bytes: info.size_bytes,
            connected: true,
            in_live_domain: true,
            in_persistent_definition: true,
            ..over
        };
        lock(&self.attachments).insert(id.clone(), attachment.clone());
        let (outcome, steps): (_, &[&str]) = match before {
            Some(_) => (Outcome::Unchanged, &[]),
            None => (Outcome::Created, &["login", "hot-plug"]),
        };
        let report = self.agent.steps(&id, outcome, steps).await;
        self.agent.end(trouble).await;
        Ok(Response::new(wire::AttachResponse { attachment: Some(attachment), report: Some(report) }))
    }

    async fn reconcile(&self, request: Request<wire::ReconcileRequest>) -> Reply<wire::ReconcileResponse> {
        self.agent.begin("Reconcile").await?;
        let dry_run = request.into_inner().dry_run;
        let items = lock(&self.findings).clone().into_iter();
        let items = items.map(|item| wire::ReconcileItem { done: item.done && !dry_run, ..item }).collect();
        Ok(Response::new(wire::ReconcileResponse { items, unchanged: 1, duration_microseconds: 1 }))
    }

    async fn detach(&self, request: Request<wire::DetachRequest>) -> Reply<wire::DetachResponse> {
        let trouble = self.agent.begin("Detach").await?;
        let request = request.into_inner();
        *lock(&self.last_detach) = Some(request.clone());
        let id = request.attachment_id;
        lock(&self.ended).insert(id.clone());
        let (outcome, steps): (_, &[&str]) = match lock(&self.attachments).remove(&id) {
            Some(_) => (Outcome::Removed, &["unplug", "logout"]),
            None => (Outcome::Unchanged, &[]),
        };
        let report = self.agent.steps(&id, outcome, steps).await;
        self.agent.end(trouble).await;
        let may_be_lost = lost(request.force, "the guest held its disk");
        Ok(Response::new(wire::DetachResponse { report: Some(report), may_be_lost }))
    }

    /// Reaches all but what the planned diagnosis says of.
    async fn diagnose(&self, request: Request<wire::DiagnoseRequest>) -> Reply<wire::DiagnoseResponse> {
        self.agent.begin("Diagnose").await?;
        let mut diagnosis = diagnosis(&self.diagnosis);
        // compute.proto, DiagnoseRequest.reach.
        if request.get_ref().reach.len() > 64 {
            return Err(refusal(Code::InvalidArgument, "BAD_REQUEST", "more than 64 addresses", &[]));
        }
        for address in request.into_inner().reach {
            if !diagnosis.reached.iter().any(|reached| reached.address == address) {
                diagnosis.reached.push(wire::Reached { address, answered: true, ..Default::default() });
            }
        }
        Ok(Response::new(diagnosis))
    }

    async fn list_objects(&self, _: Request<wire::ListObjectsRequest>) -> Reply<wire::ListObjectsResponse> {
        self.agent.begin("ListObjects").await?;
        let objects = vec![
            object("session", "iqn.b:other", wire::Ownership::Foreign),
            object("disk", "c2 vdb", wire::Ownership::Owned),
        ];
        Ok(Response::new(wire::ListObjectsResponse { objects }))
    }

    async fn resize_attachment(
        &self,
        request: Request<wire::ResizeAttachmentRequest>,
    ) -> Reply<wire::ResizeAttachmentResponse> {
        let trouble = self.agent.begin("ResizeAttachment").await?;
        let request = request.into_inner();
        let id = request.attachment_id;
        if lock(&self.ended).contains(&id) {
            return Err(refusal(Code::FailedPrecondition, "ATTACHMENT_ENDED", "the id is spent", &[]));
        }
        let missing = || refusal(Code::NotFound, "ATTACHMENT_NOT_FOUND", &format!("no attachment {id}"), &[]);
        let before = lock(&self.attachments).get(&id).cloned().ok_or_else(missing)?;
        if request.size_bytes < before.size_bytes {
            return Err(refusal(Code::FailedPrecondition, "SHRINK_REFUSED", "its disk is larger", &[]));
        }
        if self.storage.size_behind(&id).is_none_or(|size| size < request.size_bytes) {
            return Err(refusal(Code::FailedPrecondition, "NOT_EXTENDED", "the device is smaller", &[]));
        }
        let (outcome, steps): (_, &[&str]) = match request.size_bytes == before.size_bytes {
            true => (Outcome::Unchanged, &[]),
            false => (Outcome::Repaired, &["rescan", "resize-disk"]),
        };
        let attachment = wire::AttachmentStatus { size_bytes: request.size_bytes, ..before };
        lock(&self.attachments).insert(id.clone(), attachment.clone());
        let report = self.agent.steps(&id, outcome, steps).await;
        self.agent.end(trouble).await;
        Ok(Response::new(wire::ResizeAttachmentResponse {
            attachment: Some(attachment),
            report: Some(report),
        }))
    }

    async fn get_attachment(
        &self,
        request: Request<wire::GetAttachmentRequest>,
    ) -> Reply<wire::AttachmentStatus> {
        self.agent.begin("GetAttachment").await?;
        let id = request.into_inner().attachment_id;
        let missing = || refusal(Code::NotFound, "ATTACHMENT_NOT_FOUND", &format!("no attachment {id}"), &[]);
        lock(&self.attachments).get(&id).cloned().map(Response::new).ok_or_else(missing)
    }

    async fn list_attachments(
        &self,
        _: Request<wire::ListAttachmentsRequest>,
    ) -> Reply<wire::ListAttachmentsResponse> {
        self.agent.begin("ListAttachments").await?;
        let attachments = lock(&self.attachments).values().cloned().collect();
        Ok(Response::new(wire::ListAttachmentsResponse { attachments }))
    }

    async fn watch_operation(
        &self,
        request: Request<wire::WatchOperationRequest>,
    ) -> Reply<Self::WatchOperationStream> {
        self.agent.watch(request.into_inner()).map(Response::new)
    }
}
