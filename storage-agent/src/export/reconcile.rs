//! Exports and the kernel brought back to what the journal says: at start, on SIGHUP and when asked (rule 6). Not here: the
//! steps themselves, which are those of Export and Unexport.

use std::sync::Arc;

use tether_agent_core::failure::Failure;
use tether_agent_core::operations::RECONCILE;
use tether_agent_core::reconcile::{Findings, TombstoneDays, several};
use tether_agent_core::steps::{KERNEL_DEADLINE, blocking};
use tether_proto::wire::{Outcome, ReconcileAction};
use tether_proto::{AttachmentId, Transport};

use super::Exports;
use crate::pool::Pool;
use crate::record::{Export, ExportRecord, Phase};
use crate::volume::find;

const OBJECT: &str = "export";

impl Exports {
    /// All exports, several at a time; one that fails or hangs holds up none (F14).
    pub(crate) async fn reconcile(self: &Arc<Self>, dry_run: bool) -> Findings {
        let mut findings = Findings::default();
        let mut work = Vec::new();
        for record in self.journal.list() {
            let (id, key) = (record.id, record.id.to_string());
            let Some((action, why)) = called_for(&record, self.tombstones) else {
                findings.unchanged();
                continue;
            };
            if dry_run {
                match (record.phase, &record.export) {
                    (Phase::Exported, Some(export)) => match self.lacking(id, export).await {
                        Ok(None) => findings.unchanged(),
                        Ok(Some(part)) => {
                            findings.planned(OBJECT, &key, action, &format!("{why}: {part}"));
                        }
                        Err(failure) => {
                            findings.unseen(OBJECT, &key, why, &failure);
                        }
                    },
                    _ => findings.planned(OBJECT, &key, action, why),
                }
                continue;
            }
            let this = self.clone();
            work.push(async move {
                let one = this.clone();
                let outcome = this
                    .operations
                    .run(&key, RECONCILE, String::new(), move |steps| async move {
                        one.reconcile_one(&steps, id).await
                    })
                    .await;
                (key, action, why, outcome)
            });
        }
        for (key, action, why, outcome) in several(work).await {
            match outcome {
                Ok(Outcome::Unchanged) => findings.unchanged(),
                outcome => findings.ended(OBJECT, &key, action, why, outcome.map(drop)),
            }
        }
        findings
    }

    /// What the kernel lacks of an export that is whole in the journal; none when it has all of it.
    async fn lacking(&self, id: AttachmentId, export: &Export) -> Result<Option<String>, Failure> {
        // Whoever looks at what hangs in the kernel hangs beside it.
        self.operations.stuck().check(&id.to_string())?;
        match self.pools.of(&export.volume)? {
            Pool::Logical(lvm) => {
                let (lvm, name) = (lvm.clone(), export.volume.volume.clone());
                match blocking(KERNEL_DEADLINE, move || lvm.identity(&name)).await? {
                    Some(identity) => export.check_identity(id, &identity)?,
                    None => return Ok(Some(format!("device {}", export.device))),
                }
            }
            Pool::Directory(directory) => match self.pools.file(&export.volume) {
                Some(record) => find::measure(directory, &record).await.map(drop)?,
                None => return Ok(Some(format!("file {}", export.device))),
            },
        }
        Ok(match &export.connection.transport {
            Transport::Iscsi(iscsi) => {
                let part = self.iscsi.lacking(id, export, iscsi).await?;
                part.map(|path| path.display().to_string())
            }
            Transport::Nfs(nfs) => {
                let address = self.nfs.lacking(export, nfs).await?;
                address.map(|address| format!("{} shared with {address}", nfs.path))
            }
        })
    }

    /// What was read before the operation began may be another by now.
    async fn reconcile_one(
        &self,
        steps: &tether_agent_core::steps::Steps,
        id: AttachmentId,
    ) -> Result<Outcome, Failure> {
        let Some(record) = self.journal.get(&id.to_string()) else { return Ok(Outcome::Unchanged) };
        match (record.phase, record.export) {
            (Phase::Exported, Some(export)) => {
                let mode = export.connection.access_mode;
                let made = self.do_export(steps, id, export.volume, export.connector, mode).await?;
                Ok(made.1.outcome())
            }
            (Phase::Exporting, Some(export)) => {
                let taken_back = self.take_back(steps, id, &export).await;
                if self.journal.get(&id.to_string()).is_none() {
                    self.release(id);
                }
                taken_back?;
                Ok(Outcome::Removed)
            }
            (Phase::Unexporting, Some(_)) => Ok(self.do_unexport(steps, id, false).await?.0.outcome()),
            (Phase::Ended, _) if self.tombstones.are_past(record.ended) => {
                let (journal, key) = (self.journal.clone(), id.to_string());
                steps.run_blocking("forget", move || journal.remove(&key)).await?;
                Ok(Outcome::Removed)
            }
            _ => Ok(Outcome::Unchanged),
        }
    }
}

fn called_for(record: &ExportRecord, tombstones: TombstoneDays) -> Option<(ReconcileAction, &'static str)> {
    match record.phase {
        Phase::Exported => {
            Some((ReconcileAction::Restore, "it was exported, and the kernel lacks a part of it"))
        }
        Phase::Exporting => Some((ReconcileAction::Undo, "its export was cut off")),
        Phase::Unexporting => Some((ReconcileAction::Finish, "its removal was cut off")),
        Phase::Ended if tombstones.are_past(record.ended) => {
            Some((ReconcileAction::Forget, "it ended long ago"))
        }
        Phase::Ended => None,
    }
}
