//! Unexport, and the undo of Export: the order of the steps that take an export away, by force when its caller said so (rule 10).
//! What a step does is the transport's (`iscsi`, `nfs`). Not here: who may begin it (`Exports::unexport`).

use tether_agent_core::failure::Failure;
use tether_agent_core::force::Force;
use tether_agent_core::steps::Steps;
use tether_proto::wire::{OperationReport, Outcome};
use tether_proto::{AttachmentId, Transport, VolumeFormat, VolumeKey};

use super::Exports;
use crate::pool::Pool;
use crate::record::{Export, ExportRecord, Phase};
use crate::volume::find;
use crate::volume::record::{FileRecord, journal_key};

impl Exports {
    pub(super) async fn do_unexport(
        &self,
        steps: &Steps,
        id: AttachmentId,
        force: bool,
    ) -> Result<(OperationReport, Vec<String>), Failure> {
        let record = self.journal.get(&id.to_string());
        let Some(ExportRecord { export: Some(export), phase, forced, may_be_lost, .. }) = record else {
            if record.is_none() {
                self.check_journal("whether this id is exported is not known")?;
                // A late Export with this id must find it spent (rule 3).
                let ended = ExportRecord::ended(id);
                self.write(steps, "write-journal", &ended).await?;
            }
            self.release(id);
            let lost = record.map(|record| record.may_be_lost).unwrap_or_default();
            return Ok((steps.report(Outcome::Unchanged), lost));
        };
        if phase == Phase::Ended {
            self.release(id);
            return Ok((steps.report(Outcome::Unchanged), may_be_lost));
        }
        let volume = export.volume.clone();
        steps.about_volume(&volume);
        let mut force = Force::new(force || forced, may_be_lost);
        let in_use = match &export.connection.transport {
            Transport::Nfs(nfs) => self.nfs.check_let_go(steps, &export, nfs).await,
            // One that was begun goes on: whoever logged in since is cut off like the one that it was begun for.
            Transport::Iscsi(_) if phase == Phase::Unexporting => Ok(()),
            Transport::Iscsi(iscsi) => self.iscsi.check_logged_out(steps, &export, iscsi).await,
        };
        let cost = format!("what {} had not written to {volume} is lost", export.connector.hostname);
        force.pass(in_use, (), &cost)?;
        let removing = ExportRecord { phase: Phase::Unexporting, ..ExportRecord::new(id, export.clone()) };
        let removing = removing.forced_by(&force);
        self.write(steps, "write-journal", &removing).await?;
        self.take_away(steps, id, &export).await?;
        if let Transport::Nfs(nfs) = &export.connection.transport
            && force.is_on()
        {
            self.nfs.fence(steps, &export, nfs).await?;
        }
        let ended = ExportRecord::ended(id).forced_by(&force);
        let closed = self.write(steps, "close-journal", &ended).await;
        // What the journal has as ended has nothing any more, whatever became of the step.
        if self.journal.get(&id.to_string()).is_some_and(|record| record.phase == Phase::Ended) {
            self.release(id);
        }
        closed?;
        tracing::info!(volume = %volume, forced = force.is_on(), "unexported");
        if let Err(failure) = self.close_extension(steps, &volume).await {
            tracing::warn!(volume = %volume, error = %failure, "its extension stays open until it is exported or reconciled again");
        }
        Ok((steps.report(Outcome::Removed), force.may_be_lost().to_vec()))
    }

    /// What has ended has no claim any more. A call that found its journal too slow may have left one (`STUCK`), so each that
    /// finds the end written down does this.
    pub(super) fn release(&self, id: AttachmentId) {
        self.claims.release_export(id);
        self.initiators.leave(id);
    }

    /// A file that its hypervisor has grown to its end, or that nobody can cut any more, from now on has no other size.
    async fn close_extension(&self, steps: &Steps, volume: &VolumeKey) -> Result<(), Failure> {
        let pool = self.pools.of(volume)?;
        let (Pool::Directory(directory), Some(record)) = (pool, self.pools.file(volume)) else {
            return Ok(());
        };
        let place = pool.place(&volume.volume);
        let is_open = match record.format {
            VolumeFormat::Qcow2 => record.extending_to.is_some(),
            VolumeFormat::Raw => record.grown_from.is_some() && self.claims.exported_for(&place).is_empty(),
        };
        if !is_open {
            return Ok(());
        }
        self.claims.begin_extension(&place)?;
        let closed = async {
            let file = find::file(&self.pools, directory, volume).await?;
            if file.found.size < file.record.size.bytes() {
                return Ok(());
            }
            let (pools, size) = (self.pools.clone(), file.exported_size());
            let whole = match record.format {
                VolumeFormat::Qcow2 => FileRecord { size, extending_to: None, ..file.record },
                VolumeFormat::Raw => FileRecord { grown_from: None, ..file.record },
            };
            let close = move || pools.files.put(&journal_key(&whole.volume), &whole);
            steps.run_blocking("close-extension", close).await
        };
        let closed = closed.await;
        self.claims.end_extension(&place);
        closed
    }

    /// Removes whatever there is, and then the record: the id is as if it had never been used.
    pub(super) async fn take_back(
        &self,
        steps: &Steps,
        id: AttachmentId,
        export: &Export,
    ) -> Result<(), Failure> {
        self.take_away(steps, id, export).await?;
        let (journal, key) = (self.journal.clone(), id.to_string());
        steps.run_blocking("undo-write-journal", move || journal.remove(&key)).await
    }

    /// Cuts the connector off and removes whatever there is.
    async fn take_away(&self, steps: &Steps, id: AttachmentId, export: &Export) -> Result<(), Failure> {
        match &export.connection.transport {
            Transport::Iscsi(iscsi) => self.iscsi.take_away(steps, id, export, &iscsi.target_iqn).await,
            Transport::Nfs(nfs) => self.nfs.take_away(steps, id, export, nfs).await,
        }
    }
}
