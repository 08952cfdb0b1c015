//! The wire of the storage agent: decode and validate, hand over to the engines, encode. No order of steps here.
//! What may change something is done under `Change`, which writes its line in the audit.

use std::sync::Arc;

use tether_agent_core::audit::Change;
use tether_agent_core::doctor::diagnose;
use tether_agent_core::events::{EventStream, Source};
use tether_agent_core::failure::Failure;
use tether_agent_core::services::{StepStream, step_stream};
use tether_proto::wire::storage_agent_server::StorageAgent;
use tether_proto::{AccessMode, AttachmentId, ByteSize, Connector, ParseError, Transport, VolumeKey, wire};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use crate::config::Config;
use crate::doctor;
use crate::export::{ExportView, Exports};
use crate::identity::Provisioning;
use crate::volume::{PoolView, VolumeView, Volumes, Wanted};
use crate::watch;

/// The gRPC service.
pub(crate) struct Service {
    config: Config,
    exports: Arc<Exports>,
    volumes: Arc<Volumes>,
    /// What is looked at while somebody watches.
    sources: Vec<Source>,
    shutdown: CancellationToken,
}

impl Service {
    /// The service in front of the engines.
    pub(crate) fn new(
        config: Config,
        exports: Arc<Exports>,
        volumes: Arc<Volumes>,
        shutdown: CancellationToken,
    ) -> Self {
        let sources = watch::sources(&config, &exports, &volumes);
        Self { config, exports, volumes, sources, shutdown }
    }
}

/// All that the journals know, exports first: guests wait for them.
pub(crate) async fn reconcile(
    exports: &Arc<Exports>,
    volumes: &Arc<Volumes>,
    dry_run: bool,
) -> wire::ReconcileResponse {
    let mut findings = exports.reconcile(dry_run).await;
    findings.join(volumes.reconcile(dry_run).await);
    findings.into_response()
}

fn key(pool: &str, volume: &str) -> Result<VolumeKey, Failure> {
    Ok(VolumeKey { pool: pool.parse()?, volume: volume.parse()? })
}

/// A volume as the audit names it, whether it has a legal name or not.
fn volume_text(pool: &str, volume: &str) -> String {
    format!("{pool}/{volume}")
}

/// What a new volume is to be; provisioning that is not said is the pool's.
fn wanted(request: &wire::CreateVolumeRequest) -> Result<Wanted, ParseError> {
    let provisioning = match wire::Provisioning::try_from(request.provisioning) {
        Ok(wire::Provisioning::Unspecified) => None,
        Ok(wire::Provisioning::Thick) => Some(Provisioning::Thick),
        Ok(wire::Provisioning::Thin) => Some(Provisioning::Thin),
        Err(_) => {
            let problem = "must be PROVISIONING_THICK or PROVISIONING_THIN";
            return Err(ParseError::new("provisioning", problem, &request.provisioning.to_string()));
        }
    };
    Ok(Wanted {
        size: request.size_bytes.try_into()?,
        format: request.format.try_into()?,
        provisioning,
        multi_attach: request.multi_attach,
    })
}

fn attachment_id(text: &str) -> Result<AttachmentId, Failure> {
    Ok(text.parse()?)
}

#[tonic::async_trait]
impl StorageAgent for Service {
    async fn create_volume(
        &self,
        request: Request<wire::CreateVolumeRequest>,
    ) -> Result<Response<wire::CreateVolumeResponse>, Status> {
        let change = Change::of(&request);
        let request = request.into_inner();
        let volumes = self.volumes.clone();
        change
            .volume(&volume_text(&request.pool, &request.volume))
            .run(
                async move {
                    let wanted = wanted(&request)?;
                    let key = key(&request.pool, &request.volume)?;
                    let (volume, report) = volumes.create(key, wanted).await?;
                    Ok(wire::CreateVolumeResponse { volume: Some(volume.into()), report: Some(report) })
                },
                |reply| reply.report.as_ref(),
            )
            .await
    }

    async fn delete_volume(
        &self,
        request: Request<wire::DeleteVolumeRequest>,
    ) -> Result<Response<wire::DeleteVolumeResponse>, Status> {
        let change = Change::of(&request);
        let request = request.into_inner();
        let volumes = self.volumes.clone();
        change
            .volume(&volume_text(&request.pool, &request.volume))
            .run(
                async move {
                    let uuid = Some(request.uuid).filter(|uuid| !uuid.is_empty());
                    let report = volumes.delete(key(&request.pool, &request.volume)?, uuid).await?;
                    Ok(wire::DeleteVolumeResponse { report: Some(report) })
                },
                |reply| reply.report.as_ref(),
            )
            .await
    }

    async fn extend_volume(
        &self,
        request: Request<wire::ExtendVolumeRequest>,
    ) -> Result<Response<wire::ExtendVolumeResponse>, Status> {
        let change = Change::of(&request);
        let request = request.into_inner();
        let volumes = self.volumes.clone();
        change
            .volume(&volume_text(&request.pool, &request.volume))
            .run(
                async move {
                    let size = ByteSize::try_from(request.size_bytes)?;
                    let (volume, report) = volumes.extend(key(&request.pool, &request.volume)?, size).await?;
                    Ok(wire::ExtendVolumeResponse { volume: Some(volume.into()), report: Some(report) })
                },
                |reply| reply.report.as_ref(),
            )
            .await
    }

    async fn get_volume(
        &self,
        request: Request<wire::GetVolumeRequest>,
    ) -> Result<Response<wire::Volume>, Status> {
        let request = request.into_inner();
        let volume = self.volumes.get(&key(&request.pool, &request.volume)?).await?;
        Ok(Response::new(volume.into()))
    }

    async fn list_volumes(
        &self,
        request: Request<wire::ListVolumesRequest>,
    ) -> Result<Response<wire::ListVolumesResponse>, Status> {
        let pool = match request.into_inner().pool.as_str() {
            "" => None,
            name => Some(name.parse().map_err(Failure::from)?),
        };
        let volumes = self.volumes.list(pool.as_ref()).await?.into_iter().map(Into::into).collect();
        Ok(Response::new(wire::ListVolumesResponse { volumes }))
    }

    async fn list_pools(
        &self,
        _request: Request<wire::ListPoolsRequest>,
    ) -> Result<Response<wire::ListPoolsResponse>, Status> {
        let pools = self.volumes.list_pools().await.into_iter().map(Into::into).collect();
        Ok(Response::new(wire::ListPoolsResponse { pools }))
    }

    async fn export(
        &self,
        request: Request<wire::ExportRequest>,
    ) -> Result<Response<wire::ExportResponse>, Status> {
        let change = Change::of(&request);
        let request = request.into_inner();
        let exports = self.exports.clone();
        change
            .attachment(&request.attachment_id)
            .volume(&volume_text(&request.pool, &request.volume))
            .run(
                async move {
                    let id = attachment_id(&request.attachment_id)?;
                    let volume = key(&request.pool, &request.volume)?;
                    let connector =
                        request.connector.as_ref().ok_or_else(|| ParseError::missing("connector"))?;
                    let connector = Connector::try_from(connector)?;
                    let access_mode = AccessMode::try_from(request.access_mode)?;
                    let (connection, report) = exports.export(id, volume, connector, access_mode).await?;
                    Ok(wire::ExportResponse {
                        connection_info: Some((&connection).into()),
                        report: Some(report),
                    })
                },
                |reply| reply.report.as_ref(),
            )
            .await
    }

    async fn unexport(
        &self,
        request: Request<wire::UnexportRequest>,
    ) -> Result<Response<wire::UnexportResponse>, Status> {
        let mut change = Change::of(&request);
        let request = request.into_inner();
        // The request does not say which volume it is; afterwards nobody knows.
        if let Some(volume) =
            attachment_id(&request.attachment_id).ok().and_then(|id| self.exports.volume(id))
        {
            change = change.volume(&volume.to_string());
        }
        let exports = self.exports.clone();
        change
            .attachment(&request.attachment_id)
            .run(
                async move {
                    let id = attachment_id(&request.attachment_id)?;
                    let (report, may_be_lost) = exports.unexport(id, request.force).await?;
                    Ok(wire::UnexportResponse { report: Some(report), may_be_lost })
                },
                |reply| reply.report.as_ref(),
            )
            .await
    }

    async fn get_export(
        &self,
        request: Request<wire::GetExportRequest>,
    ) -> Result<Response<wire::ExportStatus>, Status> {
        let id = attachment_id(&request.into_inner().attachment_id)?;
        Ok(Response::new(self.exports.get(id).await?.into()))
    }

    async fn list_exports(
        &self,
        _request: Request<wire::ListExportsRequest>,
    ) -> Result<Response<wire::ListExportsResponse>, Status> {
        let exports = self.exports.list().await.into_iter().map(Into::into).collect();
        Ok(Response::new(wire::ListExportsResponse { exports }))
    }

    async fn reconcile(
        &self,
        request: Request<wire::ReconcileRequest>,
    ) -> Result<Response<wire::ReconcileResponse>, Status> {
        let change = Change::of(&request);
        let dry_run = request.into_inner().dry_run;
        let (exports, volumes) = (self.exports.clone(), self.volumes.clone());
        change.reconcile(async move { reconcile(&exports, &volumes, dry_run).await }).await
    }

    async fn list_objects(
        &self,
        _request: Request<wire::ListObjectsRequest>,
    ) -> Result<Response<wire::ListObjectsResponse>, Status> {
        Ok(Response::new(wire::ListObjectsResponse { objects: self.exports.objects().await? }))
    }

    async fn diagnose(
        &self,
        request: Request<wire::DiagnoseRequest>,
    ) -> Result<Response<wire::DiagnoseResponse>, Status> {
        let (checks, about) =
            (doctor::checks(&self.config, self.exports.operations().stuck()), doctor::about(&self.config));
        Ok(Response::new(diagnose(request.into_inner(), checks, about).await?))
    }

    type WatchStream = EventStream;

    async fn watch(&self, _request: Request<wire::WatchRequest>) -> Result<Response<EventStream>, Status> {
        let events = self.exports.operations().events();
        Ok(Response::new(events.watch(self.sources.clone(), self.shutdown.clone())))
    }

    type WatchOperationStream = StepStream;

    async fn watch_operation(
        &self,
        request: Request<wire::WatchOperationRequest>,
    ) -> Result<Response<Self::WatchOperationStream>, Status> {
        use wire::watch_operation_request::Key;
        let key = match request.into_inner().key {
            Some(Key::AttachmentId(id)) => attachment_id(&id)?.to_string(),
            Some(Key::Volume(volume)) => VolumeKey::try_from(&volume).map_err(Failure::from)?.to_string(),
            None => return Err(Failure::from(ParseError::missing("key")).into()),
        };
        Ok(Response::new(step_stream(self.exports.operations().clone(), key, self.shutdown.clone())))
    }
}

impl From<VolumeView> for wire::Volume {
    fn from(view: VolumeView) -> Self {
        let provisioning = match view.provisioning {
            Provisioning::Thick => wire::Provisioning::Thick,
            Provisioning::Thin => wire::Provisioning::Thin,
        };
        Self {
            pool: view.key.pool.to_string(),
            volume: view.key.volume.to_string(),
            size_bytes: view.identity.size.bytes(),
            // Nothing answers to a WWN over NFS.
            wwn: match view.transport {
                wire::Transport::Nfs => String::new(),
                _ => view.identity.wwn().to_string(),
            },
            serial: view.identity.serial().to_string(),
            uuid: view.identity.uuid,
            provisioning: provisioning.into(),
            created_by_tether: view.ours,
            exported_for: view.exported_for.iter().map(ToString::to_string).collect(),
            multi_attach: view.multi_attach,
            format: wire::VolumeFormat::from(view.format).into(),
            transport: view.transport.into(),
        }
    }
}

impl From<PoolView> for wire::Pool {
    fn from(view: PoolView) -> Self {
        let pool = Self { pool: view.name.to_string(), transport: view.transport.into(), ..Self::default() };
        match view.room {
            Ok(room) => Self {
                size_bytes: room.size,
                free_bytes: room.free,
                provisioned_bytes: room.provisioned,
                ..pool
            },
            Err(failure) => {
                let next = failure.next.iter().map(|next| format!("; {next}"));
                Self { problem: failure.to_string() + &next.collect::<String>(), ..pool }
            }
        }
    }
}

impl From<ExportView> for wire::ExportStatus {
    fn from(view: ExportView) -> Self {
        let status = Self {
            attachment_id: view.id.to_string(),
            phase: view.phase.as_str().to_owned(),
            enabled: view.enabled,
            connected: view.connected,
            may_be_lost: view.may_be_lost,
            ..Self::default()
        };
        let Some(export) = view.export else { return status };
        let transport = &export.connection.transport;
        let file_path = export.file().map(|path| path.display().to_string()).unwrap_or_default();
        Self {
            pool: export.volume.pool.to_string(),
            volume: export.volume.volume.to_string(),
            hostname: export.connector.hostname.clone(),
            initiator_iqn: export.connector.initiator_iqn.to_string(),
            target_iqn: match transport {
                Transport::Iscsi(iscsi) => iscsi.target_iqn.to_string(),
                Transport::Nfs(_) => String::new(),
            },
            transport: wire::Transport::from(transport).into(),
            file_path,
            client_addresses: export.client_addresses().iter().map(ToString::to_string).collect(),
            access_mode: wire::AccessMode::from(export.connection.access_mode).into(),
            ..status
        }
    }
}
