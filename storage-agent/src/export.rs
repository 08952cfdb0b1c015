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
use tether_agent_core::operations::{Operations, Steps};
use tether_proto::wire::{OperationReport, Outcome};
use tether_proto::{
    AccessMode, AttachmentId, ConnectionInfo, Connector, Iqn, IscsiConnection, Secret, VolumeKey,
};

use crate::claims::{Claim, Claims};
use crate::config::{Config, Iscsi};
use crate::identity::VolumeIdentity;
use crate::lvm::Lvm;
use crate::record::{Export, ExportRecord, Phase};
use crate::target::lio::{self, Lio, PORTAL_GROUP_TAG, Target};
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
    pub(crate) export: Export,
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
                claims.claim(&export.volume, Claim::Export(record.id))?;
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
        let request = format!("{volume} {connector:?} {access_mode:?}");
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

    /// One export that has not ended.
    pub(crate) fn get(&self, id: AttachmentId) -> Result<ExportView, Failure> {
        self.journal.get(&id.to_string()).and_then(|record| self.view(record)).ok_or_else(|| {
            Failure::new(Reason::ExportNotFound, format!("attachment {id} is not exported here"))
        })
    }

    /// All exports that have not ended, by attachment id.
    pub(crate) fn list(&self) -> Vec<ExportView> {
        self.journal.list().into_iter().filter_map(|record| self.view(record)).collect()
    }

    fn view(&self, record: ExportRecord) -> Option<ExportView> {
        let export = record.export.filter(|_| record.phase != Phase::Ended)?;
        let iqn = &export.connection.iscsi.target_iqn;
        Some(ExportView {
            id: record.id,
            phase: record.phase,
            enabled: self.lio.enabled(iqn),
            connected: self.lio.connected(iqn, &export.connector.initiator_iqn),
            export,
        })
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
        let recorded = self.journal.get(&id.to_string());
        let fresh = recorded.is_none();
        if let Some(record) = &recorded {
            check_retry(record, &volume, &connector, access_mode)?;
        }
        let claim = Claim::Export(id);
        self.claims.claim(&volume, claim)?;
        let outcome = async {
            let identity = steps.run("find-volume", find_volume(&pool, &volume)).await?;
            let record = match recorded {
                Some(record) => check_identity(record, &identity)?,
                None => self.new_record(id, &pool, &volume, &identity, connector, access_mode)?,
            };
            self.put_in_place(steps, record, fresh).await
        }
        .await;
        if outcome.is_err() && self.journal.get(&id.to_string()).is_none() {
            self.claims.release(&volume, claim);
        }
        outcome
    }

    /// From the record to the kernel, with undo when this is the first time.
    async fn put_in_place(
        &self,
        steps: &Steps,
        mut record: ExportRecord,
        fresh: bool,
    ) -> Result<(ConnectionInfo, OperationReport), Failure> {
        let was_exported = record.phase == Phase::Exported;
        let Some(export) = record.export.clone() else {
            return Err(Failure::new(Reason::Internal, format!("the record of {} is empty", record.id)));
        };
        let target = target_of(record.id, &export);
        if !self.lio.exists(&target.iqn) || fresh {
            self.lio.make_ready().await.map_err(|failure| failure.at("make-ready"))?;
        }
        if fresh {
            // Nobody else makes targets of this name: the prefix is ours and the id was never used.
            if self.lio.exists(&target.iqn) {
                return Err(Failure::new(
                    Reason::NotOurs,
                    format!("target {} is there, but it is not in the journal", target.iqn),
                )
                .next(format!("if nobody uses it: targetcli /iscsi delete {}", target.iqn)));
            }
            self.write(steps, "write-journal", &record).await?;
        }
        match self.converge(steps, &target).await {
            Ok(changed) => {
                if !was_exported {
                    record.phase = Phase::Exported;
                    self.write(steps, "close-journal", &record).await?;
                }
                let outcome = match (fresh, changed) {
                    (true, _) => Outcome::Created,
                    (false, true) => Outcome::Repaired,
                    (false, false) => Outcome::Unchanged,
                };
                tracing::info!(attachment = %record.id, volume = %export.volume, ?outcome, "exported");
                Ok((export.connection, steps.report(outcome)))
            }
            // An export that was whole before may be in use: it is left for the next repair, not taken away.
            Err(failure) if was_exported => Err(failure),
            Err(failure) => Err(self.undo(steps, &record, &export, failure).await),
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

    async fn undo(
        &self,
        steps: &Steps,
        record: &ExportRecord,
        export: &Export,
        mut failure: Failure,
    ) -> Failure {
        match self.take_away(steps, record.id, &export.connection.iscsi.target_iqn).await {
            Ok(_) => {
                let (journal, key) = (self.journal.clone(), record.id.to_string());
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
                let ended = ExportRecord { id, phase: Phase::Ended, export: None };
                self.write(steps, "write-journal", &ended).await?;
            }
            return Ok(steps.report(Outcome::Unchanged));
        };
        if phase == Phase::Ended {
            return Ok(steps.report(Outcome::Unchanged));
        }
        let volume = export.volume.clone();
        let iqn = export.connection.iscsi.target_iqn.clone();
        let removing = ExportRecord { id, phase: Phase::Unexporting, export: Some(export) };
        self.write(steps, "write-journal", &removing).await?;
        self.take_away(steps, id, &iqn).await?;
        let ended = ExportRecord { id, phase: Phase::Ended, export: None };
        self.write(steps, "close-journal", &ended).await?;
        self.claims.release(&volume, Claim::Export(id));
        tracing::info!(attachment = %id, volume = %volume, "unexported");
        Ok(steps.report(Outcome::Removed))
    }

    async fn write(&self, steps: &Steps, step: &'static str, record: &ExportRecord) -> Result<(), Failure> {
        let (journal, record) = (self.journal.clone(), record.clone());
        steps.run_blocking(step, move || journal.put(&record.id.to_string(), &record)).await
    }

    fn new_record(
        &self,
        id: AttachmentId,
        pool: &Lvm,
        volume: &VolumeKey,
        identity: &VolumeIdentity,
        connector: Connector,
        access_mode: AccessMode,
    ) -> Result<ExportRecord, Failure> {
        let target_iqn = format!("{}:{id}", self.iscsi.iqn_prefix).parse()?;
        let connection = ConnectionInfo {
            iscsi: IscsiConnection {
                target_iqn,
                portals: self.iscsi.portals.clone(),
                target_portal_group_tag: PORTAL_GROUP_TAG,
                chap_username: format!("tether-{id}"),
                chap_secret: random_secret()?,
                wwn: identity.wwn(),
            },
            size: identity.size,
            access_mode,
            serial: identity.serial(),
        };
        let device = pool.device(volume.volume.as_str()).display().to_string();
        let unit_serial = identity.unit_serial();
        let export = Export { volume: volume.clone(), device, unit_serial, connector, connection };
        Ok(ExportRecord { id, phase: Phase::Exporting, export: Some(export) })
    }
}

/// May this call go on with what is recorded under its id?
fn check_retry(
    record: &ExportRecord,
    volume: &VolumeKey,
    connector: &Connector,
    access_mode: AccessMode,
) -> Result<(), Failure> {
    let ended = || {
        Failure::new(
            Reason::AttachmentEnded,
            format!("attachment {} was unexported; its id is spent", record.id),
        )
    };
    match (record.phase, &record.export) {
        (Phase::Ended, _) | (_, None) => Err(ended()),
        (Phase::Unexporting, _) => Err(ended().next("finish with Unexport, then export under a new id")),
        (Phase::Exporting | Phase::Exported, Some(export)) => {
            match export.difference(volume, connector, access_mode) {
                None => Ok(()),
                Some(difference) => Err(Failure::new(
                    Reason::DifferentParameters,
                    format!("attachment {} is exported with other parameters: {difference}", record.id),
                )),
            }
        }
    }
}

/// A record made for a volume that was deleted and made again under the same name is not for the new one.
fn check_identity(mut record: ExportRecord, identity: &VolumeIdentity) -> Result<ExportRecord, Failure> {
    if let Some(export) = &mut record.export {
        if export.unit_serial != identity.unit_serial() {
            return Err(Failure::new(
                Reason::WrongDevice,
                format!(
                    "volume {} is another one than attachment {} was exported with",
                    export.volume, record.id
                ),
            ));
        }
        export.connection.size = identity.size;
    }
    Ok(record)
}

async fn find_volume(pool: &Lvm, volume: &VolumeKey) -> Result<VolumeIdentity, Failure> {
    if let Some(identity) = pool.identity(&volume.volume)? {
        return Ok(identity);
    }
    // Not active, or not there: only now a process has to say which.
    if pool.find(volume.volume.as_str()).await?.is_none() {
        return Err(volume::not_found(volume));
    }
    pool.activate(volume.volume.as_str()).await?;
    pool.identity(&volume.volume)?.ok_or_else(|| {
        Failure::new(Reason::LvmFailed, format!("volume {volume} has no device after lvchange --activate y"))
    })
}

fn target_of(id: AttachmentId, export: &Export) -> Target {
    let iscsi = &export.connection.iscsi;
    Target {
        id,
        iqn: iscsi.target_iqn.clone(),
        device: export.device.clone(),
        unit_serial: export.unit_serial.clone(),
        initiator: export.connector.initiator_iqn.clone(),
        chap_username: iscsi.chap_username.clone(),
        chap_secret: iscsi.chap_secret.clone(),
        portals: iscsi.portals.clone(),
        access_mode: export.connection.access_mode,
        discard: volume::takes_discards(&export.device),
    }
}

/// 32 characters of a 64-letter alphabet from the kernel's random numbers: 192 bits.
fn random_secret() -> Result<Secret, Failure> {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._";
    let mut bytes = [0u8; 32];
    getrandom::fill(&mut bytes)
        .map_err(|error| Failure::new(Reason::Internal, format!("no random numbers: {error}")))?;
    let text: String = bytes.iter().map(|byte| char::from(ALPHABET[usize::from(byte % 64)])).collect();
    Ok(Secret::new(text)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f43_secrets_are_long_and_never_the_same() {
        let (one, two) = (random_secret().unwrap(), random_secret().unwrap());
        assert_eq!(one.expose().len(), 32);
        assert_ne!(one, two);
    }
}
