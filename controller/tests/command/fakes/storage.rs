//! A storage agent with volumes and exports in memory. Keeps the rules of the real one: idempotent, ended is ended.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use tether_proto::wire::storage_agent_server::StorageAgent;
use tether_proto::wire::{self, Outcome};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status};

use super::{Agent, lock, refusal};

pub(crate) const SECRET: &str = "canary-canary-canary";

pub(crate) struct FakeStorageAgent {
    pub(crate) agent: Agent,
    pub(crate) volumes: Mutex<BTreeMap<String, u64>>,
    pub(crate) exports: Mutex<BTreeMap<String, wire::ExportStatus>>,
    pub(crate) ended: Mutex<BTreeSet<String>>,
}

impl FakeStorageAgent {
    pub(crate) fn new(agent: Agent) -> Self {
        let volumes = Mutex::new(BTreeMap::from([("tether/v1".to_owned(), 1 << 30)]));
        Self { agent, volumes, exports: Mutex::default(), ended: Mutex::default() }
    }

    pub(crate) fn exported(&self) -> Vec<String> {
        lock(&self.exports).keys().cloned().collect()
    }

    fn volume(&self, pool: &str, name: &str) -> Result<wire::Volume, Status> {
        if pool != "tether" {
            return Err(refusal(Code::NotFound, "POOL_NOT_FOUND", &format!("no pool {pool}"), &[]));
        }
        let key = format!("{pool}/{name}");
        let missing = || refusal(Code::NotFound, "VOLUME_NOT_FOUND", &format!("no volume {key}"), &[]);
        let size_bytes = lock(&self.volumes).get(&key).copied().ok_or_else(missing)?;
        let exports = lock(&self.exports);
        let exported = exports.values().find(|export| format!("{}/{}", export.pool, export.volume) == key);
        Ok(wire::Volume {
            pool: pool.to_owned(),
            volume: name.to_owned(),
            size_bytes,
            uuid: "lv-uuid".into(),
            wwn: "6".repeat(32),
            serial: "aabbccddeeff00112233".into(),
            provisioning: wire::Provisioning::Thick.into(),
            created_by_tether: true,
            exported_for: exported.map(|export| export.attachment_id.clone()).unwrap_or_default(),
        })
    }
}

type Reply<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl StorageAgent for FakeStorageAgent {
    type WatchOperationStream = ReceiverStream<Result<wire::StepEvent, Status>>;

    async fn create_volume(
        &self,
        request: Request<wire::CreateVolumeRequest>,
    ) -> Reply<wire::CreateVolumeResponse> {
        let trouble = self.agent.begin("CreateVolume").await?;
        let request = request.into_inner();
        let key = format!("{}/{}", request.pool, request.volume);
        let before = lock(&self.volumes).insert(key.clone(), request.size_bytes);
        let (outcome, steps): (_, &[&str]) = match before {
            Some(_) => (Outcome::Unchanged, &[]),
            None => (Outcome::Created, &["create-volume"]),
        };
        let report = self.agent.steps(&key, outcome, steps).await;
        self.agent.end(trouble).await;
        let volume = self.volume(&request.pool, &request.volume)?;
        Ok(Response::new(wire::CreateVolumeResponse { volume: Some(volume), report: Some(report) }))
    }

    async fn delete_volume(
        &self,
        request: Request<wire::DeleteVolumeRequest>,
    ) -> Reply<wire::DeleteVolumeResponse> {
        let trouble = self.agent.begin("DeleteVolume").await?;
        let request = request.into_inner();
        let key = format!("{}/{}", request.pool, request.volume);
        if self.volume(&request.pool, &request.volume).is_ok_and(|volume| !volume.exported_for.is_empty()) {
            let next = [("next", "detach it first")];
            return Err(refusal(
                Code::FailedPrecondition,
                "VOLUME_EXPORTED",
                &format!("{key} is exported"),
                &next,
            ));
        }
        let outcome = match lock(&self.volumes).remove(&key) {
            Some(_) => Outcome::Removed,
            None => Outcome::Unchanged,
        };
        let report = self.agent.steps(&key, outcome, &["remove-volume"]).await;
        self.agent.end(trouble).await;
        Ok(Response::new(wire::DeleteVolumeResponse { report: Some(report) }))
    }

    async fn get_volume(&self, request: Request<wire::GetVolumeRequest>) -> Reply<wire::Volume> {
        self.agent.begin("GetVolume").await?;
        let request = request.into_inner();
        self.volume(&request.pool, &request.volume).map(Response::new)
    }

    async fn list_volumes(&self, _: Request<wire::ListVolumesRequest>) -> Reply<wire::ListVolumesResponse> {
        self.agent.begin("ListVolumes").await?;
        let keys: Vec<String> = lock(&self.volumes).keys().cloned().collect();
        let split = keys.iter().filter_map(|key| key.split_once('/'));
        let volumes = split.map(|(pool, name)| self.volume(pool, name)).collect::<Result<_, _>>()?;
        Ok(Response::new(wire::ListVolumesResponse { volumes }))
    }

    async fn export(&self, request: Request<wire::ExportRequest>) -> Reply<wire::ExportResponse> {
        let trouble = self.agent.begin("Export").await?;
        let request = request.into_inner();
        let id = request.attachment_id.clone();
        if lock(&self.ended).contains(&id) {
            return Err(refusal(Code::FailedPrecondition, "ATTACHMENT_ENDED", "the id is spent", &[]));
        }
        let volume = self.volume(&request.pool, &request.volume)?;
        let connector = request.connector.unwrap();
        let export = wire::ExportStatus {
            attachment_id: id.clone(),
            pool: request.pool,
            volume: request.volume,
            hostname: connector.hostname,
            initiator_iqn: connector.initiator_iqn,
            target_iqn: format!("iqn.2026-11.io.example:{id}"),
            access_mode: request.access_mode,
            enabled: true,
            connected: false,
            phase: "exported".into(),
        };
        let info = wire::ConnectionInfo {
            transport: Some(wire::connection_info::Transport::Iscsi(wire::IscsiConnection {
                target_iqn: export.target_iqn.clone(),
                portals: vec!["192.0.2.1:3260".into()],
                target_portal_group_tag: 1,
                lun: 0,
                chap_username: "user".into(),
                chap_secret: SECRET.into(),
                wwn: volume.wwn,
            })),
            size_bytes: volume.size_bytes,
            access_mode: request.access_mode,
            serial: volume.serial,
        };
        let (outcome, steps): (_, &[&str]) = match lock(&self.exports).insert(id.clone(), export) {
            Some(_) => (Outcome::Unchanged, &[]),
            None => (Outcome::Created, &["create-backstore", "create-target"]),
        };
        let report = self.agent.steps(&id, outcome, steps).await;
        self.agent.end(trouble).await;
        Ok(Response::new(wire::ExportResponse { connection_info: Some(info), report: Some(report) }))
    }

    async fn unexport(&self, request: Request<wire::UnexportRequest>) -> Reply<wire::UnexportResponse> {
        let trouble = self.agent.begin("Unexport").await?;
        let id = request.into_inner().attachment_id;
        lock(&self.ended).insert(id.clone());
        let (outcome, steps): (_, &[&str]) = match lock(&self.exports).remove(&id) {
            Some(_) => (Outcome::Removed, &["remove-target", "remove-backstore"]),
            None => (Outcome::Unchanged, &[]),
        };
        let report = self.agent.steps(&id, outcome, steps).await;
        self.agent.end(trouble).await;
        Ok(Response::new(wire::UnexportResponse { report: Some(report) }))
    }

    async fn get_export(&self, request: Request<wire::GetExportRequest>) -> Reply<wire::ExportStatus> {
        self.agent.begin("GetExport").await?;
        let id = request.into_inner().attachment_id;
        let missing = || refusal(Code::NotFound, "EXPORT_NOT_FOUND", &format!("no export {id}"), &[]);
        lock(&self.exports).get(&id).cloned().map(Response::new).ok_or_else(missing)
    }

    async fn list_exports(&self, _: Request<wire::ListExportsRequest>) -> Reply<wire::ListExportsResponse> {
        self.agent.begin("ListExports").await?;
        let exports = lock(&self.exports).values().cloned().collect();
        Ok(Response::new(wire::ListExportsResponse { exports }))
    }

    async fn watch_operation(
        &self,
        request: Request<wire::WatchOperationRequest>,
    ) -> Reply<Self::WatchOperationStream> {
        self.agent.watch(request.into_inner()).map(Response::new)
    }
}
