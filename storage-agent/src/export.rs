//! The engine of exports: the only place that knows the order of steps, their undo and the journal.
//!
//! Each Export and Unexport is a task of its own under the attachment's id (`Operations`). The journal says what an
//! export is to be, configfs says what is. Making and repairing are the same steps, each of which changes only what
//! differs; undoing and removing are the same steps too. `Claims` decides who has a volume: it is taken before the
//! first side effect and given back after the last.
//!
//! Phases of a record: `exporting` (side effects may have begun) → `exported` → `unexporting` → `ended` (a tombstone).
//! A failed export that was undone leaves no record; one that could not be undone stays `exporting`, and a retry of
//! Export or an Unexport goes on from there.

use std::sync::Arc;

use tether_agent_core::failure::{Failure, Reason};
use tether_agent_core::journal::Journal;
use tether_agent_core::operations::Operations;
use tether_agent_core::steps::{KERNEL_DEADLINE, Steps, blocking};
use tether_proto::wire::{OperationReport, Outcome};
use tether_proto::{AccessMode, AttachmentId, ConnectionInfo, Connector, Iqn, VolumeKey};

use crate::claims::{Claim, Claims};
use crate::config::{Config, Iscsi};
use crate::identity::VolumeIdentity;
use crate::lvm::{self, Lvm};
use crate::record::{Export, ExportRecord, Phase};
use crate::target::lio::{self, Lio, Target};
use crate::volume;

/// All exports of this agent.
pub(crate) struct Exports {
    journal: Arc<Journal<ExportRecord>>,
    operations: Operations,
    claims: Claims,
    lio: Lio,
    iscsi: Iscsi,
    pools: volume::Pools,
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
    /// Opens the journal, takes its claims again, and makes the kernel's target ready. A kernel that lacks it is
    /// told in the log now and to each caller later: volumes can be made all the same.
    ///
    /// # Errors
    /// When the journal cannot be opened.
    pub(crate) async fn open(config: &Config) -> Result<Self, Failure> {
        let journal = Journal::<ExportRecord>::open(&config.state_directory.join("exports"))?;
        let claims = Claims::default();
        for record in journal.list() {
            if let Some(export) = record.export.filter(|_| record.phase != Phase::Ended) {
                // Two records of one volume are a defect, but none that should keep the others from being served.
                if let Err(clash) = claims.claim(export.place(), Claim::Export(record.id)) {
                    tracing::error!(attachment = %record.id, %clash, "the journal has two exports of one volume");
                }
            }
        }
        let lio = Lio::at(lio::ROOT);
        if let Err(failure) = lio.make_ready().await {
            tracing::error!(error = %failure, "this host cannot export yet");
        }
        Ok(Self {
            journal: Arc::new(journal),
            operations: Operations::default(),
            claims,
            lio,
            iscsi: config.iscsi.clone(),
            pools: volume::pools(config),
        })
    }

    /// Who has which volume; volumes' creation and deletion ask too.
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
            Some(record) => self.view(record).await,
            None => {
                Err(Failure::new(Reason::ExportNotFound, format!("attachment {id} is not exported here"))
                    .at("find-export"))
            }
        }
    }

    /// All exports that have not ended, by attachment id.
    pub(crate) async fn list(&self) -> Result<Vec<ExportView>, Failure> {
        let mut views = Vec::new();
        for record in self.journal.list().into_iter().filter(|record| record.phase != Phase::Ended) {
            views.push(self.view(record).await?);
        }
        Ok(views)
    }

    async fn view(&self, record: ExportRecord) -> Result<ExportView, Failure> {
        let ExportRecord { id, phase, export } = record;
        let Some(export) = export else {
            return Ok(ExportView { id, phase, export: None, enabled: false, connected: false });
        };
        let (lio, iqn) = (self.lio.clone(), export.connection.iscsi.target_iqn.clone());
        let initiator = export.connector.initiator_iqn.clone();
        let look = move || Ok::<_, Failure>((lio.enabled(&iqn)?, lio.connected(&iqn, &initiator)?));
        let (enabled, connected) = blocking(KERNEL_DEADLINE, look).await?;
        Ok(ExportView { id, phase, export: Some(export), enabled, connected })
    }

    async fn do_export(
        &self,
        steps: &Steps,
        id: AttachmentId,
        volume: VolumeKey,
        connector: Connector,
        access_mode: AccessMode,
    ) -> Result<(ConnectionInfo, OperationReport), Failure> {
        let pool = volume::pool(&self.pools, &volume.pool)?.clone();
        lvm::check_name(&volume.volume).map_err(|failure| failure.at("validate"))?;
        let recorded = self.journal.get(&id.to_string());
        if let Some(record) = &recorded {
            record.check_retry(&volume, &connector, access_mode)?;
        } else if let Some(file) = self.journal.damaged().first() {
            // It may have held the export that has this very volume (rule 2).
            return Err(Failure::new(
                Reason::JournalFailed,
                format!(
                    "the journal has a damaged file, {}: no new exports until it is seen to",
                    file.display()
                ),
            )
            .at("validate")
            .next(
                "repair it or, when its export is gone from targetcli ls, delete it; then restart the agent",
            ));
        }
        let (place, claim) = (pool.place(volume.volume.as_str()), Claim::Export(id));
        self.claims.claim(&place, claim).map_err(|failure| failure.at("validate"))?;
        let outcome = async {
            let identity = steps.run("find-volume", find_volume(pool.clone(), volume.clone())).await?;
            let device = pool.device(volume.volume.as_str()).display().to_string();
            match recorded {
                Some(record) => self.put_in_place(steps, record, &identity, false).await,
                None => {
                    let record = ExportRecord::new(
                        id,
                        &self.iscsi,
                        device,
                        &volume,
                        &identity,
                        connector,
                        access_mode,
                    )?;
                    self.put_in_place(steps, record, &identity, true).await
                }
            }
        }
        .await;
        if outcome.is_err() && self.journal.get(&id.to_string()).is_none() {
            self.claims.release(&place, claim);
        }
        outcome
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
        let iqn = export.connection.iscsi.target_iqn.clone();
        let lio = self.lio.clone();
        let there = steps.run("make-ready", async move { lio.make_ready().await?.exists(iqn).await }).await?;
        if fresh && there {
            // Nobody else makes targets of this name: the prefix is ours and the id was never used.
            let iqn = &export.connection.iscsi.target_iqn;
            return Err(Failure::new(
                Reason::NotOurs,
                format!("target {iqn} is there, but it is not in the journal"),
            )
            .next(format!("if nobody uses it: targetcli /iscsi delete {iqn}")));
        }
        let made = async {
            if fresh {
                self.write(steps, "write-journal", &record).await?;
            }
            let changed = self.converge(steps, &export.target(id)).await?;
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
                Ok((export.connection, steps.report(outcome)))
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

    async fn converge(&self, steps: &Steps, target: &Target) -> Result<bool, Failure> {
        type Ensure = fn(&Lio, &Target) -> Result<bool, Failure>;
        let order: [(&'static str, Ensure); 6] = [
            ("create-backstore", |lio, target| lio.ensure_backstore(target)),
            ("create-target", |lio, target| Ok(lio.ensure_target(target)?)),
            ("create-lun", |lio, target| Ok(lio.ensure_lun(target)?)),
            ("create-acl", |lio, target| Ok(lio.ensure_acl(target)?)),
            ("create-portals", Lio::ensure_portals),
            ("enable-target", |lio, target| Ok(lio.ensure_enabled(&target.iqn)?)),
        ];
        let mut changed = false;
        for (step, ensure) in order {
            let (lio, target) = (self.lio.clone(), target.clone());
            changed |= steps.run_blocking(step, move || ensure(&lio, &target)).await?;
        }
        Ok(changed)
    }

    async fn undo(&self, steps: &Steps, id: AttachmentId, export: &Export, mut failure: Failure) -> Failure {
        match self.take_away(steps, id, &export.connection.iscsi.target_iqn).await {
            Ok(_) => {
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

    /// Fences and removes whatever there is of a target and its backstore. True when there was something.
    async fn take_away(&self, steps: &Steps, id: AttachmentId, iqn: &Iqn) -> Result<bool, Failure> {
        type Remove = fn(&Lio, AttachmentId, &Iqn) -> Result<bool, Failure>;
        let order: [(&'static str, Remove); 3] = [
            ("fence-target", |lio, _, iqn| Ok(lio.fence(iqn)?)),
            ("remove-target", |lio, _, iqn| Ok(lio.remove_target(iqn)?)),
            ("remove-backstore", |lio, id, _| Ok(lio.remove_backstore(id)?)),
        ];
        let mut removed = false;
        for (step, remove) in order {
            let (lio, iqn) = (self.lio.clone(), iqn.clone());
            removed |= steps.run_blocking(step, move || remove(&lio, id, &iqn)).await?;
        }
        Ok(removed)
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
        let (volume, place) = (export.volume.clone(), export.place().to_owned());
        let iqn = export.connection.iscsi.target_iqn.clone();
        let removing = ExportRecord { id, phase: Phase::Unexporting, export: Some(export) };
        self.write(steps, "write-journal", &removing).await?;
        self.take_away(steps, id, &iqn).await?;
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

async fn find_volume(pool: Lvm, volume: VolumeKey) -> Result<VolumeIdentity, Failure> {
    let look = |pool: &Lvm| {
        let (pool, name) = (pool.clone(), volume.volume.clone());
        blocking(KERNEL_DEADLINE, move || pool.identity(&name))
    };
    if let Some(identity) = look(&pool).await? {
        return Ok(identity);
    }
    // Not active, or not there: only now a process has to say which.
    if pool.find(volume.volume.as_str()).await?.is_none() {
        return Err(volume::not_found(&volume));
    }
    pool.activate(volume.volume.as_str()).await?;
    look(&pool).await?.ok_or_else(|| {
        Failure::new(Reason::LvmFailed, format!("volume {volume} has no device after lvchange --activate y"))
    })
}
