//! Exports as they are shown: what is recorded, and what the kernel says of it. Changes nothing.

use tether_agent_core::failure::{Failure, Reason};
use tether_proto::{AttachmentId, Transport, VolumeKey};

use super::{Exports, nfs};
use crate::record::{Export, ExportRecord, Phase};

/// An export as it is recorded and as the kernel shows it.
pub(crate) struct ExportView {
    pub(crate) id: AttachmentId,
    pub(crate) phase: Phase,
    pub(crate) export: Option<Export>,
    pub(crate) enabled: bool,
    pub(crate) connected: bool,
    pub(crate) may_be_lost: Vec<String>,
}

impl Exports {
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

    /// The volume of an export that has not ended.
    pub(crate) fn volume(&self, id: AttachmentId) -> Option<VolumeKey> {
        Some(self.recorded(id)?.volume)
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
        let ExportRecord { id, phase, export, may_be_lost, .. } = record;
        // Whoever looks at what hangs in the kernel hangs beside it.
        let hangs = self.operations.stuck().check(&id.to_string()).is_err();
        let export_seen = export.as_ref().filter(|_| !hangs);
        let state = match (export_seen.map(|export| (export, &export.connection.transport)), seen) {
            (Some((export, Transport::Iscsi(iscsi))), _) => self.iscsi.state(export, &iscsi.target_iqn).await,
            (Some((export, Transport::Nfs(nfs))), Some(seen)) => self.nfs.state(export, nfs, seen).await,
            _ => Ok((false, false)),
        };
        let (enabled, connected) = state.unwrap_or_else(|failure| {
            tracing::warn!(attachment = %id, error = %failure, "the state of this export cannot be read");
            (false, false)
        });
        ExportView { id, phase, export, enabled, connected, may_be_lost }
    }
}
