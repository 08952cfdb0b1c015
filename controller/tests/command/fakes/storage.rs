//! A storage agent with volumes and exports in memory: the pool `tether` is a volume group, `share` a directory. Keeps the
//! rules of the real one: idempotent, ended is ended, nothing shrinks, a full pool is full.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use tether_proto::wire::storage_agent_server::StorageAgent;
use tether_proto::wire::{self, Outcome};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status};

use super::{Agent, diagnosis, lock, lost, object, refusal};

pub(crate) const SECRET: &str = "canary-canary-canary";

/// What each pool holds in all.
const POOL_SIZE: u64 = 1 << 40;

/// A volume of the fake.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Stored {
    pub(crate) size_bytes: u64,
    pub(crate) format: wire::VolumeFormat,
    pub(crate) provisioning: wire::Provisioning,
}

pub(crate) struct FakeStorageAgent {
    pub(crate) agent: Agent,
    pub(crate) volumes: Mutex<BTreeMap<String, Stored>>,
    pub(crate) exports: Mutex<BTreeMap<String, wire::ExportStatus>>,
    pub(crate) ended: Mutex<BTreeSet<String>>,
    /// Why the pool `share` cannot be used.
    pub(crate) share_problem: Mutex<String>,
    /// What a reconciliation finds.
    pub(crate) findings: Mutex<Vec<wire::ReconcileItem>>,
    /// What a diagnosis finds.
    pub(crate) diagnosis: Mutex<wire::DiagnoseResponse>,
}

impl FakeStorageAgent {
    pub(crate) fn new(agent: Agent) -> Self {
        let stored =
            |provisioning| Stored { size_bytes: 1 << 30, format: wire::VolumeFormat::Raw, provisioning };
        let volumes = BTreeMap::from([
            ("tether/v1".to_owned(), stored(wire::Provisioning::Thick)),
            ("share/v1".to_owned(), stored(wire::Provisioning::Thin)),
        ]);
        Self {
            agent,
            volumes: Mutex::new(volumes),
            exports: Mutex::default(),
            ended: Mutex::default(),
            share_problem: Mutex::default(),
            findings: Mutex::default(),
            diagnosis: Mutex::default(),
        }
    }

    pub(crate) fn exported(&self) -> Vec<String> {
        lock(&self.exports).keys().cloned().collect()
    }

    /// How large the kernel shows the volume of an export.
    pub(crate) fn size_behind(&self, attachment_id: &str) -> Option<u64> {
        let exports = lock(&self.exports);
        let export = exports.get(attachment_id)?;
        let stored = lock(&self.volumes).get(&format!("{}/{}", export.pool, export.volume)).copied()?;
        Some(stored.size_bytes)
    }

    /// What the volumes of a pool take together.
    fn provisioned(&self, pool: &str) -> u64 {
        let volumes = lock(&self.volumes);
        let of_pool = volumes.iter().filter(|(key, _)| key.starts_with(&format!("{pool}/")));
        of_pool.map(|(_, stored)| stored.size_bytes).sum()
    }

    fn transport(pool: &str) -> Result<wire::Transport, Status> {
        match pool {
            "tether" => Ok(wire::Transport::Iscsi),
            "share" => Ok(wire::Transport::Nfs),
            _ => Err(refusal(Code::NotFound, "POOL_NOT_FOUND", &format!("no pool {pool}"), &[])),
        }
    }

    fn check_room(&self, pool: &str, more: u64) -> Result<(), Status> {
        match self.provisioned(pool).checked_add(more) {
            Some(all) if all <= POOL_SIZE => Ok(()),
            _ => Err(refusal(Code::ResourceExhausted, "POOL_FULL", &format!("{pool} is full"), &[])),
        }
    }

    fn volume(&self, pool: &str, name: &str) -> Result<wire::Volume, Status> {
        let transport = Self::transport(pool)?;
        let key = format!("{pool}/{name}");
        let missing = || refusal(Code::NotFound, "VOLUME_NOT_FOUND", &format!("no volume {key}"), &[]);
        let stored = lock(&self.volumes).get(&key).copied().ok_or_else(missing)?;
        let exports = lock(&self.exports);
        let exported = exports.values().filter(|export| format!("{}/{}", export.pool, export.volume) == key);
        Ok(wire::Volume {
            pool: pool.to_owned(),
            volume: name.to_owned(),
            size_bytes: stored.size_bytes,
            uuid: "uuid".into(),
            wwn: if transport == wire::Transport::Iscsi { "6".repeat(32) } else { String::new() },
            serial: "aabbccddeeff00112233".into(),
            provisioning: stored.provisioning.into(),
            created_by_tether: true,
            exported_for: exported.map(|export| export.attachment_id.clone()).collect(),
            multi_attach: false,
            format: stored.format.into(),
            transport: transport.into(),
        })
    }
}

type Reply<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl StorageAgent for FakeStorageAgent {
    type WatchOperationStream = ReceiverStream<Result<wire::StepEvent, Status>>;
    type WatchStream = super::EventStream;

    async fn watch(&self, _: Request<wire::WatchRequest>) -> Reply<super::EventStream> {
        self.agent.watch_events().await
    }

    async fn create_volume(
        &self,
        request: Request<wire::CreateVolumeRequest>,
    ) -> Reply<wire::CreateVolumeResponse> {
        let trouble = self.agent.begin("CreateVolume").await?;
        let request = request.into_inner();
        let key = format!("{}/{}", request.pool, request.volume);
        let transport = Self::transport(&request.pool)?;
        let format = match request.format() {
            wire::VolumeFormat::Qcow2 => wire::VolumeFormat::Qcow2,
            wire::VolumeFormat::Unspecified | wire::VolumeFormat::Raw => wire::VolumeFormat::Raw,
        };
        let provisioning = match (request.provisioning(), transport) {
            (wire::Provisioning::Unspecified, wire::Transport::Nfs) => wire::Provisioning::Thin,
            (wire::Provisioning::Unspecified, _) => wire::Provisioning::Thick,
            (asked, _) => asked,
        };
        // A volume group has thick raw volumes, and a qcow2 file is always thin.
        let unsuitable = match transport {
            wire::Transport::Nfs => {
                format == wire::VolumeFormat::Qcow2 && provisioning == wire::Provisioning::Thick
            }
            _ => format == wire::VolumeFormat::Qcow2 || provisioning == wire::Provisioning::Thin,
        };
        if unsuitable {
            let message = format!("{} has no such volumes", request.pool);
            return Err(refusal(Code::InvalidArgument, "INVALID_ARGUMENT", &message, &[]));
        }
        let wanted = Stored { size_bytes: request.size_bytes, format, provisioning };
        let before = lock(&self.volumes).get(&key).copied();
        let (outcome, steps): (_, &[&str]) = match before {
            Some(before) if before == wanted => (Outcome::Unchanged, &[]),
            Some(_) => {
                let message = format!("{key} is there with other parameters");
                return Err(refusal(Code::AlreadyExists, "DIFFERENT_PARAMETERS", &message, &[]));
            }
            None => {
                self.check_room(&request.pool, request.size_bytes)?;
                (Outcome::Created, &["create-volume"])
            }
        };
        lock(&self.volumes).insert(key.clone(), wanted);
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

    async fn extend_volume(
        &self,
        request: Request<wire::ExtendVolumeRequest>,
    ) -> Reply<wire::ExtendVolumeResponse> {
        let trouble = self.agent.begin("ExtendVolume").await?;
        let request = request.into_inner();
        let key = format!("{}/{}", request.pool, request.volume);
        let before = self.volume(&request.pool, &request.volume)?.size_bytes;
        if request.size_bytes < before {
            let message = format!("{key} has {before} bytes and is never made smaller");
            let next = [("next", "name a size that is not smaller")];
            return Err(refusal(Code::FailedPrecondition, "SHRINK_REFUSED", &message, &next));
        }
        self.check_room(&request.pool, request.size_bytes - before)?;
        if let Some(stored) = lock(&self.volumes).get_mut(&key) {
            stored.size_bytes = request.size_bytes;
        }
        let (outcome, steps): (_, &[&str]) = match request.size_bytes == before {
            true => (Outcome::Unchanged, &[]),
            false => (Outcome::Repaired, &["extend-volume"]),
        };
        let report = self.agent.steps(&key, outcome, steps).await;
        self.agent.end(trouble).await;
        let volume = self.volume(&request.pool, &request.volume)?;
        Ok(Response::new(wire::ExtendVolumeResponse { volume: Some(volume), report: Some(report) }))
    }

    async fn get_volume(&self, request: Request<wire::GetVolumeRequest>) -> Reply<wire::Volume> {
        self.agent.begin("GetVolume").await?;
        let request = request.into_inner();
        self.volume(&request.pool, &request.volume).map(Response::new)
    }

    async fn list_volumes(
        &self,
        request: Request<wire::ListVolumesRequest>,
    ) -> Reply<wire::ListVolumesResponse> {
        self.agent.begin("ListVolumes").await?;
        let wanted = request.into_inner().pool;
        let keys: Vec<String> = lock(&self.volumes).keys().cloned().collect();
        let split = keys.iter().filter_map(|key| key.split_once('/'));
        let split = split.filter(|(pool, _)| wanted.is_empty() || *pool == wanted);
        let volumes = split.map(|(pool, name)| self.volume(pool, name)).collect::<Result<_, _>>()?;
        Ok(Response::new(wire::ListVolumesResponse { volumes }))
    }

    async fn reconcile(&self, request: Request<wire::ReconcileRequest>) -> Reply<wire::ReconcileResponse> {
        self.agent.begin("Reconcile").await?;
        let dry_run = request.into_inner().dry_run;
        let items = lock(&self.findings).clone().into_iter();
        let items = items.map(|item| wire::ReconcileItem { done: item.done && !dry_run, ..item }).collect();
        Ok(Response::new(wire::ReconcileResponse { items, unchanged: 1, duration_microseconds: 1 }))
    }

    async fn list_pools(&self, _: Request<wire::ListPoolsRequest>) -> Reply<wire::ListPoolsResponse> {
        self.agent.begin("ListPools").await?;
        let pools = ["share", "tether"].map(|pool| {
            let problem = if pool == "share" { lock(&self.share_problem).clone() } else { String::new() };
            let transport = if pool == "share" { wire::Transport::Nfs } else { wire::Transport::Iscsi };
            let provisioned = self.provisioned(pool);
            let known = |bytes| if problem.is_empty() { bytes } else { 0 };
            wire::Pool {
                pool: pool.into(),
                transport: transport.into(),
                size_bytes: known(POOL_SIZE),
                free_bytes: known(POOL_SIZE - provisioned),
                provisioned_bytes: known(provisioned),
                problem: problem.clone(),
            }
        });
        Ok(Response::new(wire::ListPoolsResponse { pools: pools.to_vec() }))
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
        let over_nfs = volume.transport() == wire::Transport::Nfs;
        let file = format!("{}.{}", request.volume, if volume.format == 2 { "qcow2" } else { "raw" });
        let only = |this: bool, text: String| if this { text } else { String::new() };
        let export = wire::ExportStatus {
            attachment_id: id.clone(),
            pool: request.pool,
            volume: request.volume,
            hostname: connector.hostname,
            initiator_iqn: connector.initiator_iqn,
            target_iqn: only(!over_nfs, format!("iqn.2026-11.io.example:{id}")),
            access_mode: request.access_mode,
            enabled: true,
            connected: false,
            phase: "exported".into(),
            transport: volume.transport,
            file_path: only(over_nfs, format!("/srv/share/{file}")),
            client_addresses: if over_nfs { connector.addresses } else { Vec::new() },
            may_be_lost: Vec::new(),
        };
        let transport = match over_nfs {
            true => wire::connection_info::Transport::Nfs(wire::NfsConnection {
                servers: vec!["192.0.2.1".into()],
                path: "/srv/share".into(),
                file,
                format: volume.format,
                inode: 7,
                file_system_id: "5a5a5a5a-0000-4000-8000-000000000001".into(),
                keep_allocated: false,
            }),
            false => wire::connection_info::Transport::Iscsi(wire::IscsiConnection {
                target_iqn: export.target_iqn.clone(),
                portals: vec!["192.0.2.1:3260".into()],
                target_portal_group_tag: 1,
                lun: 0,
                chap_username: "user".into(),
                chap_secret: SECRET.into(),
                wwn: volume.wwn,
                mutual_chap_username: "target".into(),
                mutual_chap_secret: format!("{SECRET}-in-turn"),
            }),
        };
        let info = wire::ConnectionInfo {
            transport: Some(transport),
            size_bytes: volume.size_bytes,
            access_mode: request.access_mode,
            serial: volume.serial,
            multi_attach: volume.multi_attach,
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
        let wire::UnexportRequest { attachment_id: id, force } = request.into_inner();
        lock(&self.ended).insert(id.clone());
        let (outcome, steps): (_, &[&str]) = match lock(&self.exports).remove(&id) {
            Some(_) => (Outcome::Removed, &["remove-target", "remove-backstore"]),
            None => (Outcome::Unchanged, &[]),
        };
        let report = self.agent.steps(&id, outcome, steps).await;
        self.agent.end(trouble).await;
        let may_be_lost = lost(force, "compute1 was logged in");
        Ok(Response::new(wire::UnexportResponse { report: Some(report), may_be_lost }))
    }

    async fn diagnose(&self, _: Request<wire::DiagnoseRequest>) -> Reply<wire::DiagnoseResponse> {
        self.agent.begin("Diagnose").await?;
        Ok(Response::new(diagnosis(&self.diagnosis)))
    }

    async fn list_objects(&self, _: Request<wire::ListObjectsRequest>) -> Reply<wire::ListObjectsResponse> {
        self.agent.begin("ListObjects").await?;
        let objects = vec![object("target", "iqn.a:orphan", wire::Ownership::Orphaned)];
        Ok(Response::new(wire::ListObjectsResponse { objects }))
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
