//! The wire of the storage agent: decode and validate, hand over to the engines, encode. No order of steps here.

use std::sync::Arc;

use tether_agent_core::failure::Failure;
use tether_agent_core::operations::Operations;
use tether_agent_core::services::{StepStream, step_stream};
use tether_proto::wire::storage_agent_server::StorageAgent;
use tether_proto::{AccessMode, AttachmentId, ByteSize, Connector, ParseError, Transport, VolumeKey, wire};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use crate::export::{ExportView, Exports};
use crate::identity::Provisioning;
use crate::volume::{PoolView, VolumeView, Volumes, Wanted};

/// The gRPC service.
pub(crate) struct Service {
    exports: Arc<Exports>,
    volumes: Arc<Volumes>,
    shutdown: CancellationToken,
}

impl Service {
    /// The service in front of the engines.
    pub(crate) fn new(exports: Arc<Exports>, volumes: Arc<Volumes>, shutdown: CancellationToken) -> Self {
        Self { exports, volumes, shutdown }
    }
}

fn key(pool: &str, volume: &str) -> Result<VolumeKey, Failure> {
    Ok(VolumeKey { pool: pool.parse()?, volume: volume.parse()? })
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
    Ok(Wanted { size: request.size_bytes.try_into()?, format: request.format.try_into()?, provisioning })
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
        let request = request.into_inner();
        let wanted = wanted(&request).map_err(Failure::from)?;
        let (volume, report) = self.volumes.create(key(&request.pool, &request.volume)?, wanted).await?;
        Ok(Response::new(wire::CreateVolumeResponse { volume: Some(volume.into()), report: Some(report) }))
    }

    async fn delete_volume(
        &self,
        request: Request<wire::DeleteVolumeRequest>,
    ) -> Result<Response<wire::DeleteVolumeResponse>, Status> {
        let request = request.into_inner();
        let report = self.volumes.delete(key(&request.pool, &request.volume)?).await?;
        Ok(Response::new(wire::DeleteVolumeResponse { report: Some(report) }))
    }

    async fn extend_volume(
        &self,
        request: Request<wire::ExtendVolumeRequest>,
    ) -> Result<Response<wire::ExtendVolumeResponse>, Status> {
        let request = request.into_inner();
        let size = ByteSize::try_from(request.size_bytes).map_err(Failure::from)?;
        let (volume, report) = self.volumes.extend(key(&request.pool, &request.volume)?, size).await?;
        Ok(Response::new(wire::ExtendVolumeResponse { volume: Some(volume.into()), report: Some(report) }))
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
        let request = request.into_inner();
        let id = attachment_id(&request.attachment_id)?;
        let volume = key(&request.pool, &request.volume)?;
        let connector =
            request.connector.as_ref().ok_or_else(|| Failure::from(ParseError::missing("connector")))?;
        let connector = Connector::try_from(connector).map_err(Failure::from)?;
        let access_mode = AccessMode::try_from(request.access_mode).map_err(Failure::from)?;
        let (connection, report) = self.exports.export(id, volume, connector, access_mode).await?;
        Ok(Response::new(wire::ExportResponse {
            connection_info: Some((&connection).into()),
            report: Some(report),
        }))
    }

    async fn unexport(
        &self,
        request: Request<wire::UnexportRequest>,
    ) -> Result<Response<wire::UnexportResponse>, Status> {
        let report = self.exports.unexport(attachment_id(&request.into_inner().attachment_id)?).await?;
        Ok(Response::new(wire::UnexportResponse { report: Some(report) }))
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

    type WatchOperationStream = StepStream;

    async fn watch_operation(
        &self,
        request: Request<wire::WatchOperationRequest>,
    ) -> Result<Response<Self::WatchOperationStream>, Status> {
        use wire::watch_operation_request::Key;
        let (operations, key): (&Operations, String) = match request.into_inner().key {
            Some(Key::AttachmentId(id)) => (self.exports.operations(), attachment_id(&id)?.to_string()),
            Some(Key::Volume(volume)) => {
                let volume = VolumeKey::try_from(&volume).map_err(Failure::from)?;
                (self.volumes.operations(), volume.to_string())
            }
            None => return Err(Failure::from(ParseError::missing("key")).into()),
        };
        Ok(Response::new(step_stream(operations.clone(), key, self.shutdown.clone())))
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
            exported_for: view.exported_for.map(|id| id.to_string()).unwrap_or_default(),
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
