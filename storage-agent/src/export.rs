//! The engine of exports: the only place that knows the order of steps, their undo and the journal.
//!
//! Each Export and Unexport is a task of its own under the attachment's id (`Operations`). The journal says what an
//! export is to be, the kernel says what is; the steps in between are the transport's (`export/iscsi`, `export/nfs`). Making and repairing are the same steps, each of which changes only what
//! differs; undoing and removing are the same steps too. `Claims` decides who has a volume: it is taken before the
//! first side effect and given back after the last.
//!
//! Phases of a record: `exporting` (side effects may have begun) → `exported` → `unexporting` → `ended` (a tombstone).
//! A failed export that was undone leaves no record; one that could not be undone stays `exporting`, and a retry of
//! Export or an Unexport goes on from there.

mod iscsi;
mod nfs;

use std::sync::Arc;

use tether_agent_core::failure::{Failure, Reason};
use tether_agent_core::journal::Journal;
use tether_agent_core::operations::Operations;
use tether_agent_core::steps::Steps;
use tether_proto::wire::{OperationReport, Outcome};
use tether_proto::{AccessMode, AttachmentId, ConnectionInfo, Connector, Transport, VolumeKey};

use crate::claims::{Claim, Claims};
use crate::config::Config;
use crate::identity::VolumeIdentity;
use crate::nfs::Nfs as NfsServer;
use crate::pool::{Pool, Pools};
use crate::record::{Export, ExportRecord, Phase};
use crate::volume::find::{self, FoundFile};
use crate::volume::{check_extended, settle};

/// All exports of this agent.
pub(crate) struct Exports {
    journal: Arc<Journal<ExportRecord>>,
    operations: Operations,
    claims: Claims,
    pools: Arc<Pools>,
    iscsi: iscsi::Iscsi,
    nfs: nfs::Nfs,
}

/// A volume that was found, and is the one that is recorded.
struct Volume {
    identity: VolumeIdentity,
    /// Its device node or file.
    device: String,
    /// What else there is to tell of a file.
    file: Option<FoundFile>,
}

/// An export as it is recorded and as the kernel shows it.
pub(crate) struct ExportView {
    pub(crate) id: AttachmentId,
    pub(crate) phase: Phase,
    pub(crate) export: Option<Export>,
    pub(crate) enabled: bool,
    pub(crate) connected: bool,
}

impl Exports {
    /// Opens the journal, takes its claims again, and makes ready what the config asks for.
    ///
    /// # Errors
    /// When the journal cannot be opened.
    pub(crate) async fn open(config: &Config, pools: Arc<Pools>) -> Result<Self, Failure> {
        let journal = Arc::new(Journal::<ExportRecord>::open(&config.state_directory.join("exports"))?);
        let claims = Claims::default();
        for record in journal.list() {
            if let Some(export) = record.export.filter(|_| record.phase != Phase::Ended) {
                // Two records of one volume are a defect, but none that should keep the others from being served.
                if let Err(clash) = claims.claim(&export.place(), Claim::Export(record.id)) {
                    tracing::error!(attachment = %record.id, %clash, "the journal has two exports of one volume");
                }
            }
        }
        Ok(Self {
            iscsi: iscsi::Iscsi::open(config.iscsi.as_ref()).await,
            nfs: nfs::Nfs::open(NfsServer::at("/"), config.nfs.as_ref(), &journal),
            journal,
            operations: Operations::default(),
            claims,
            pools,
        })
    }

    /// Who has which volume; volumes' creation, extension and deletion ask too.
    pub(crate) fn claims(&self) -> Claims {
        self.claims.clone()
    }

    /// The operations under way, for those who watch.
    pub(crate) fn operations(&self) -> &Operations {
        &self.operations
    }

    /// Exports a volume to one connector.
    pub(crate) async fn export(
        self: &Arc<Self>,
        id: AttachmentId,
        volume: VolumeKey,
        connector: Connector,
        access_mode: AccessMode,
    ) -> Result<(ConnectionInfo, OperationReport), Failure> {
        // What tells exports apart; a connector's versions and addresses may change between a call and its retry.
        let request = format!("{volume} {} {} {access_mode:?}", connector.hostname, connector.initiator_iqn);
        let this = self.clone();
        self.operations
            .run(&id.to_string(), "export", request, move |steps| async move {
                this.do_export(&steps, id, volume, connector, access_mode).await
            })
            .await
    }

    /// Ends an export.
    pub(crate) async fn unexport(self: &Arc<Self>, id: AttachmentId) -> Result<OperationReport, Failure> {
        let this = self.clone();
        self.operations
            .run(&id.to_string(), "unexport", String::new(), move |steps| async move {
                this.do_unexport(&steps, id).await
            })
            .await
    }

    /// One export; of one that has ended there is only the phase.
    pub(crate) async fn get(&self, id: AttachmentId) -> Result<ExportView, Failure> {
        match self.journal.get(&id.to_string()) {
            Some(record) => {
                let seen = self.look(std::slice::from_ref(&record)).await;
                Ok(self.view(record, seen.as_ref()).await)
            }
            None => {
                Err(Failure::new(Reason::ExportNotFound, format!("attachment {id} is not exported here"))
                    .at("find-export"))
            }
        }
    }

    /// All exports that have not ended, by attachment id.
    pub(crate) async fn list(&self) -> Vec<ExportView> {
        let mut records = self.journal.list();
        records.retain(|record| record.phase != Phase::Ended);
        let seen = self.look(&records).await;
        let mut views = Vec::new();
        for record in records {
            views.push(self.view(record, seen.as_ref()).await);
        }
        views
    }

    /// What the NFS server shows, for all exports at once; nothing when none of them needs it or it cannot be read.
    async fn look(&self, records: &[ExportRecord]) -> Option<nfs::Seen> {
        if !records.iter().any(|record| record.export.as_ref().is_some_and(|export| export.share.is_some())) {
            return None;
        }
        let seen = self.nfs.look().await;
        seen.inspect_err(|failure| tracing::warn!(error = %failure, "what is shared cannot be read")).ok()
    }

    /// An export of which the kernel's part cannot be read is shown without it: it does not hide the others.
    async fn view(&self, record: ExportRecord, seen: Option<&nfs::Seen>) -> ExportView {
        let ExportRecord { id, phase, export } = record;
        let state = match (export.as_ref().map(|export| (export, &export.connection.transport)), seen) {
            (Some((export, Transport::Iscsi(iscsi))), _) => self.iscsi.state(export, &iscsi.target_iqn).await,
            (Some((export, Transport::Nfs(nfs))), Some(seen)) => self.nfs.state(export, nfs, seen).await,
            _ => Ok((false, false)),
        };
        let (enabled, connected) = state.unwrap_or_else(|failure| {
            tracing::warn!(attachment = %id, error = %failure, "the state of this export cannot be read");
            (false, false)
        });
        ExportView { id, phase, export, enabled, connected }
    }

    async fn do_export(
        &self,
        steps: &Steps,
        id: AttachmentId,
        volume: VolumeKey,
        connector: Connector,
        access_mode: AccessMode,
    ) -> Result<(ConnectionInfo, OperationReport), Failure> {
        let pool = self.pools.of(&volume)?;
        let recorded = self.journal.get(&id.to_string());
        if let Some(record) = &recorded {
            record.check_retry(&volume, &connector, access_mode)?;
        } else if let Some(file) = self.journal.damaged().first().or(self.pools.damaged()) {
            // It may have held the export that has this very volume (rule 2), or that it is not wiped to its end.
            return Err(Failure::new(
                Reason::JournalFailed,
                format!(
                    "the journal has a damaged file, {}: no new exports until it is seen to",
                    file.display()
                ),
            )
            .at("validate")
            .next(
                "repair it or, when its export is gone from targetcli ls and exportfs -v, delete it; then restart the agent",
            ));
        }
        let clients = match pool {
            Pool::Directory(directory) if recorded.is_none() => {
                Some(self.nfs.clients(&connector, directory)?)
            }
            _ => None,
        };
        let (place, claim) = (pool.place(&volume.volume), Claim::Export(id));
        self.claims.claim(&place, claim).map_err(|failure| failure.at("validate"))?;
        let outcome = async {
            let fresh = recorded.is_none();
            let found = self.find(steps, pool, &volume, fresh).await?;
            let record = match recorded {
                Some(record) => record,
                None => {
                    let connection = self.connection(id, pool, &found, access_mode)?;
                    let (device, unit_serial) = (found.device, found.identity.unit_serial());
                    let export =
                        Export { volume, device, unit_serial, connector, connection, share: clients };
                    ExportRecord::new(id, export)
                }
            };
            self.put_in_place(steps, record, &found.identity, fresh).await
        }
        .await;
        if outcome.is_err() && self.journal.get(&id.to_string()).is_none() {
            self.claims.release(&place, claim);
        }
        outcome
    }

    /// Finds a volume, and before its first export ends an extension that was cut off.
    async fn find(
        &self,
        steps: &Steps,
        pool: &Pool,
        volume: &VolumeKey,
        fresh: bool,
    ) -> Result<Volume, Failure> {
        match pool {
            Pool::Logical(lvm) => {
                let identity = steps.run("find-volume", find::logical(lvm, volume)).await?;
                // A repeated call, too: its answer tells the size, and a guest would be given what is not wiped.
                check_extended(&self.pools, volume, &identity.uuid, identity.size)?;
                let device = lvm.device(volume.volume.as_str()).display().to_string();
                Ok(Volume { identity, device, file: None })
            }
            Pool::Directory(directory) => {
                let mut file = steps.run("find-volume", find::file(&self.pools, directory, volume)).await?;
                if fresh && file.record.extending_to.is_some() {
                    let settled = settle(&self.pools, directory, &file, steps);
                    file.record = steps.run("finish-extension", settled).await?;
                }
                let device = directory.file(&file.name).display().to_string();
                Ok(Volume { identity: file.record.volume_identity(), device, file: Some(file) })
            }
        }
    }

    /// The answer to a new Export.
    fn connection(
        &self,
        id: AttachmentId,
        pool: &Pool,
        found: &Volume,
        access_mode: AccessMode,
    ) -> Result<ConnectionInfo, Failure> {
        let transport = match (pool, &found.file) {
            (Pool::Directory(directory), Some(file)) => Transport::Nfs(self.nfs.connection(directory, file)?),
            _ => Transport::Iscsi(self.iscsi.connection(id, &found.identity)?),
        };
        let identity = &found.identity;
        Ok(ConnectionInfo { transport, size: identity.size, access_mode, serial: identity.serial() })
    }

    /// From the record to the kernel. A failure is undone, unless the export was whole before: then it may be in use,
    /// and is left for the next repair.
    async fn put_in_place(
        &self,
        steps: &Steps,
        mut record: ExportRecord,
        identity: &VolumeIdentity,
        fresh: bool,
    ) -> Result<(ConnectionInfo, OperationReport), Failure> {
        let was_exported = record.phase == Phase::Exported;
        let id = record.id;
        let Some(export) = record.export.clone() else {
            return Err(Failure::new(Reason::Internal, format!("the record of {id} is empty")));
        };
        export.check_identity(id, identity)?;
        match &export.connection.transport {
            Transport::Iscsi(iscsi) => self.iscsi.make_ready(steps, iscsi, fresh).await?,
            Transport::Nfs(_) => self.nfs.make_ready(steps).await?,
        }
        let made = async {
            if fresh {
                self.write(steps, "write-journal", &record).await?;
            }
            let changed = match &export.connection.transport {
                Transport::Iscsi(iscsi) => self.iscsi.converge(steps, id, &export, iscsi).await?,
                Transport::Nfs(nfs) => self.nfs.converge(steps, id, &export, nfs).await?,
            };
            if !was_exported {
                record.phase = Phase::Exported;
                self.write(steps, "close-journal", &record).await?;
            }
            Ok(changed)
        }
        .await;
        match made {
            Ok(changed) => {
                let outcome = match (fresh, changed) {
                    (true, _) => Outcome::Created,
                    (false, true) => Outcome::Repaired,
                    (false, false) => Outcome::Unchanged,
                };
                tracing::info!(volume = %export.volume, ?outcome, "exported");
                // The volume may have been made larger since the record was written.
                let connection = ConnectionInfo { size: identity.size, ..export.connection };
                Ok((connection, steps.report(outcome)))
            }
            Err(failure) if was_exported => Err(failure),
            // What the kernel may still do must find its record.
            Err(mut failure) if failure.reason == Reason::Stuck => {
                failure.undo.push("nothing was undone: the kernel may still do it".to_owned());
                Err(failure)
            }
            Err(failure) => Err(self.undo(steps, id, &export, failure).await),
        }
    }

    async fn undo(&self, steps: &Steps, id: AttachmentId, export: &Export, mut failure: Failure) -> Failure {
        match self.take_away(steps, id, export).await {
            Ok(()) => {
                let (journal, key) = (self.journal.clone(), id.to_string());
                let forgotten = steps.run_blocking("undo-write-journal", move || journal.remove(&key)).await;
                if let Err(error) = forgotten {
                    failure.undo.push(error.to_string());
                }
            }
            Err(error) => failure.undo.push(error.to_string()),
        }
        failure
    }

    /// Cuts the connector off and removes whatever there is.
    async fn take_away(&self, steps: &Steps, id: AttachmentId, export: &Export) -> Result<(), Failure> {
        match &export.connection.transport {
            Transport::Iscsi(iscsi) => self.iscsi.take_away(steps, id, &iscsi.target_iqn).await,
            Transport::Nfs(nfs) => self.nfs.take_away(steps, id, export, nfs).await,
        }
    }

    async fn do_unexport(&self, steps: &Steps, id: AttachmentId) -> Result<OperationReport, Failure> {
        let record = self.journal.get(&id.to_string());
        let Some(ExportRecord { export: Some(export), phase, .. }) = record else {
            if record.is_none() {
                // A late Export with this id must find it spent (rule 3).
                let ended = ExportRecord::ended(id);
                self.write(steps, "write-journal", &ended).await?;
            }
            return Ok(steps.report(Outcome::Unchanged));
        };
        if phase == Phase::Ended {
            return Ok(steps.report(Outcome::Unchanged));
        }
        let (volume, place) = (export.volume.clone(), export.place());
        let removing = ExportRecord { id, phase: Phase::Unexporting, export: Some(export.clone()) };
        self.write(steps, "write-journal", &removing).await?;
        self.take_away(steps, id, &export).await?;
        let closed = self.write(steps, "close-journal", &ExportRecord::ended(id)).await;
        // What the journal has as ended has nothing any more, whatever became of the step.
        if self.journal.get(&id.to_string()).is_some_and(|record| record.phase == Phase::Ended) {
            self.claims.release(&place, Claim::Export(id));
        }
        closed?;
        tracing::info!(volume = %volume, "unexported");
        Ok(steps.report(Outcome::Removed))
    }

    async fn write(&self, steps: &Steps, step: &'static str, record: &ExportRecord) -> Result<(), Failure> {
        let (journal, record) = (self.journal.clone(), record.clone());
        steps.run_blocking(step, move || journal.put(&record.id.to_string(), &record)).await
    }
}
