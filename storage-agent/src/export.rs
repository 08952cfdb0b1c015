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

mod initiators;
mod iscsi;
mod nfs;
mod objects;
mod reconcile;
mod unexport;
mod views;

use std::net::IpAddr;
use std::sync::Arc;

use tether_agent_core::failure::{Failure, Reason};
use tether_agent_core::journal::Journal;
use tether_agent_core::operations::Operations;
use tether_agent_core::reconcile::TombstoneDays;
use tether_agent_core::steps::Steps;
use tether_proto::wire::{OperationReport, Outcome};
use tether_proto::{AccessMode, AttachmentId, ConnectionInfo, Connector, Transport, VolumeFormat, VolumeKey};

use crate::claims::{Claim, Claims, sharing};
use crate::config::Config;
use crate::directory::Directory;
use crate::identity::VolumeIdentity;
use crate::nfs::Nfs as NfsServer;
use crate::pool::{Pool, Pools};
use crate::record::{Clients, Export, ExportRecord, Phase};
use crate::volume::find::{self, FoundFile};
use crate::volume::settle;
use initiators::Initiators;
pub(crate) use views::ExportView;

/// All exports of this agent.
pub(crate) struct Exports {
    journal: Arc<Journal<ExportRecord>>,
    operations: Operations,
    claims: Claims,
    initiators: Initiators,
    pools: Arc<Pools>,
    iscsi: iscsi::Iscsi,
    nfs: nfs::Nfs,
    tombstones: TombstoneDays,
}

/// What a call asks for, and what the config allows of it.
struct Wish {
    id: AttachmentId,
    volume: VolumeKey,
    connector: Connector,
    access_mode: AccessMode,
    /// With whom a file's directory is to be shared; nothing for a target.
    clients: Option<Clients>,
}

/// A volume that was found, and is the one that is recorded.
struct Volume {
    identity: VolumeIdentity,
    /// Its device node or file.
    device: String,
    /// What else there is to tell of a file.
    file: Option<FoundFile>,
}

impl Exports {
    /// Opens the journal, takes its claims again, and makes ready what the config asks for.
    ///
    /// # Errors
    /// When the journal cannot be opened.
    pub(crate) async fn open(config: &Config, pools: Arc<Pools>) -> Result<Self, Failure> {
        let journal = Arc::new(Journal::<ExportRecord>::open(&config.state_directory.join("exports"))?);
        let (claims, initiators) = (Claims::default(), Initiators::default());
        if let Some(file) = journal.damaged().first() {
            claims.refuse_deletions(file);
        }
        for record in journal.list() {
            if let Some(export) = record.export.filter(|_| record.phase != Phase::Ended) {
                // Two hosts of one name were let in by an older agent; the first keeps it.
                if let Err(clash) = initiators.enter(record.id, &export.connector) {
                    tracing::error!(attachment = %record.id, %clash, "the journal has two hosts of one initiator name");
                }
                // Two records of one volume are a defect, but none that should keep the others from being served.
                if !claims.take_again(&export.place(), export.claim(record.id)) {
                    tracing::error!(attachment = %record.id, volume = %export.volume, "the journal has two exports of one volume");
                }
            }
        }
        Ok(Self {
            iscsi: iscsi::Iscsi::open(config.iscsi.as_ref(), &journal.list(), pools.stuck.clone()).await,
            nfs: nfs::Nfs::open(NfsServer::at("/"), config.nfs.as_ref(), &journal),
            journal,
            operations: Operations::beside(pools.stuck.clone()),
            claims,
            initiators,
            pools,
            tombstones: config.tombstone_days,
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
    pub(crate) async fn unexport(
        self: &Arc<Self>,
        id: AttachmentId,
        force: bool,
    ) -> Result<(OperationReport, Vec<String>), Failure> {
        let this = self.clone();
        let request = if force { "force" } else { "" };
        self.operations
            .run(&id.to_string(), "unexport", request.to_owned(), move |steps| async move {
                this.do_unexport(&steps, id, force).await
            })
            .await
    }

    async fn do_export(
        &self,
        steps: &Steps,
        id: AttachmentId,
        volume: VolumeKey,
        connector: Connector,
        access_mode: AccessMode,
    ) -> Result<(ConnectionInfo, OperationReport), Failure> {
        steps.about_volume(&volume);
        let pool = self.pools.of(&volume)?;
        let recorded = self.journal.get(&id.to_string());
        if let Some(record) = &recorded {
            record.check_retry(&volume, &connector, access_mode)?;
        } else {
            self.check_journal("no new exports until it is seen to")?;
        }
        let clients = match pool {
            // What is exported already keeps its clients until the hypervisor tells of other addresses (not the config).
            Pool::Directory(_)
                if recorded.as_ref().is_some_and(|record| record.has_addresses_of(&connector)) =>
            {
                None
            }
            Pool::Directory(directory) => Some(self.nfs.clients(&connector, directory)?),
            Pool::Logical(_) => None,
        };
        // One initiator name is one host's (F42). What an older agent has let in stays.
        if recorded.is_none() {
            self.initiators.enter(id, &connector).map_err(|failure| failure.at("validate"))?;
        }
        let wish = Wish { id, volume, connector, access_mode, clients };
        let outcome = self.export_wish(steps, pool, wish, recorded).await;
        if outcome.is_err() && self.journal.get(&id.to_string()).is_none() {
            self.initiators.leave(id);
        }
        outcome
    }

    /// The part of an export that needs the volume for itself.
    async fn export_wish(
        &self,
        steps: &Steps,
        pool: &Pool,
        wish: Wish,
        recorded: Option<ExportRecord>,
    ) -> Result<(ConnectionInfo, OperationReport), Failure> {
        let Wish { id, volume, connector, access_mode, clients } = wish;
        let multi_attach = self.pools.multi_attach(&volume);
        let claim = match recorded.as_ref().and_then(|record| record.export.as_ref()) {
            Some(export) => export.claim(id),
            None => Claim::Export(id, sharing(multi_attach.is_some(), access_mode)),
        };
        // Of one that is recorded its own, also when the config names another place for its pool by now: then its volume is not
        // found there.
        let place = match recorded.as_ref().and_then(|record| record.export.as_ref()) {
            Some(export) => export.place(),
            None => pool.place(&volume.volume),
        };
        let others = self.claims.claim(&place, claim).map_err(|failure| failure.at("validate"))?;
        let outcome = async {
            let fresh = recorded.is_none();
            let others = others.iter().map(|id| self.recorded(*id).ok_or(*id)).collect::<Result<Vec<_>, _>>();
            // Of one that is being made now it is not known for whom.
            let others = others.map_err(|id| {
                let message = format!("volume {volume} is being exported for attachment {id}");
                Failure::new(Reason::OperationRunning, message).at("validate")
            })?;
            if fresh {
                check_other_host(&volume, &connector, &others)?;
                self.pools.check_not_deleting(&volume)?;
            }
            let found = self.find(steps, pool, &volume, fresh).await?;
            if fresh && multi_attach.as_ref().is_some_and(|uuid| *uuid != found.identity.uuid) {
                return Err(Failure::new(
                    Reason::WrongDevice,
                    format!("volume {volume} is not the one of that name that was made multi_attach"),
                )
                .at("find-volume"));
            }
            let (record, moved) = match recorded {
                Some(record) => {
                    let transport = record.export.as_ref().map(|export| &export.connection.transport);
                    if let (Some(clients), Some(Transport::Nfs(nfs))) = (&clients, transport) {
                        self.nfs.check_families(nfs, &clients.addresses)?;
                    }
                    (record, clients.map(|clients| (connector, clients)))
                }
                None => {
                    let addresses = clients.as_ref().map_or(&[][..], |clients| &clients.addresses);
                    let connection = ConnectionInfo {
                        multi_attach: multi_attach.is_some(),
                        ..self.connection(id, pool, &found, addresses, access_mode)?
                    };
                    let (device, unit_serial) = (found.device, found.identity.unit_serial());
                    let export =
                        Export { volume, device, unit_serial, connector, connection, share: clients };
                    (ExportRecord::new(id, export), None)
                }
            };
            let size = found.file.as_ref().map_or(found.identity.size, FoundFile::exported_size);
            let identity = VolumeIdentity { size, ..found.identity };
            self.put_in_place(steps, record, &identity, moved, fresh, &others).await
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
                let device = lvm.device(volume.volume.as_str()).display().to_string();
                Ok(Volume { identity, device, file: None })
            }
            Pool::Directory(directory) => {
                let mut file = steps.run("find-volume", find::file(&self.pools, directory, volume)).await?;
                if fresh && file.record.extending_to.is_some() {
                    file = self.finish_extension(steps, pool, directory, volume).await?;
                }
                let device = directory.file(&file.name).display().to_string();
                Ok(Volume { identity: file.record.volume_identity(), device, file: Some(file) })
            }
        }
    }

    /// Ends an extension that was cut off, and nobody else does meanwhile.
    async fn finish_extension(
        &self,
        steps: &Steps,
        pool: &Pool,
        directory: &Directory,
        volume: &VolumeKey,
    ) -> Result<FoundFile, Failure> {
        let place = pool.place(&volume.volume);
        self.claims.begin_extension(&place).map_err(|failure| failure.at("finish-extension"))?;
        let finished = async {
            // Another may have ended it before this one's turn.
            let mut file = find::file(&self.pools, directory, volume).await?;
            if file.record.extending_to.is_some() {
                if file.record.format == VolumeFormat::Qcow2 {
                    // While the server is down nobody can say who has the file open.
                    self.nfs.make_ready(steps).await?;
                    let path = directory.file(&file.name);
                    self.nfs.check_open_nowhere(steps, path, file.found.identity.inode).await?;
                }
                let settled = settle(&self.pools, directory, &file, steps);
                file.record = steps.run("finish-extension", settled).await?;
                file.found.size = file.record.size.bytes();
            }
            Ok(file)
        };
        let finished = finished.await;
        self.claims.end_extension(&place);
        finished
    }

    /// The answer to a new Export.
    fn connection(
        &self,
        id: AttachmentId,
        pool: &Pool,
        found: &Volume,
        clients: &[IpAddr],
        access_mode: AccessMode,
    ) -> Result<ConnectionInfo, Failure> {
        let transport = match (pool, &found.file) {
            (Pool::Directory(directory), Some(file)) => {
                Transport::Nfs(self.nfs.connection(directory, file, clients)?)
            }
            _ => Transport::Iscsi(self.iscsi.connection(id, &found.identity)?),
        };
        let identity = &found.identity;
        Ok(ConnectionInfo {
            transport,
            size: identity.size,
            access_mode,
            serial: identity.serial(),
            multi_attach: false,
        })
    }

    /// From the record to the kernel. A failure is undone, unless the export was whole before: then it may be in use,
    /// and is left for the next repair.
    async fn put_in_place(
        &self,
        steps: &Steps,
        mut record: ExportRecord,
        identity: &VolumeIdentity,
        moved: Option<(Connector, Clients)>,
        fresh: bool,
        others: &[Export],
    ) -> Result<(ConnectionInfo, OperationReport), Failure> {
        let was_exported = record.phase == Phase::Exported;
        let id = record.id;
        let Some(mut export) = record.export.clone() else {
            return Err(Failure::new(Reason::Internal, format!("the record of {id} is empty")));
        };
        export.check_identity(id, identity)?;
        // Until the new addresses are let in the old ones are not shut out.
        let moved = moved.map(|(connector, clients)| export.move_to(connector, clients));
        match &export.connection.transport {
            Transport::Iscsi(iscsi) => self.iscsi.make_ready(steps, iscsi, fresh).await?,
            Transport::Nfs(nfs) => {
                self.nfs.make_ready(steps).await?;
                if fresh {
                    self.nfs.check_unused(steps, &export, nfs, others).await?;
                }
            }
        }
        let made = async {
            if fresh || moved.is_some() {
                record.export = Some(export.clone());
                self.write(steps, "write-journal", &record).await?;
            }
            let changed = match &export.connection.transport {
                Transport::Iscsi(iscsi) => self.iscsi.converge(steps, id, &export, iscsi).await?,
                Transport::Nfs(nfs) => self.nfs.converge(steps, id, &export, nfs).await?,
            };
            if let (Some(moved), Transport::Nfs(nfs)) = (&moved, &export.connection.transport) {
                self.nfs.leave_addresses(steps, id, &export, moved, nfs).await?;
            }
            if !was_exported || moved.is_some() {
                record.phase = Phase::Exported;
                record.export = moved.or(record.export.take());
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
        if let Err(error) = self.take_back(steps, id, export).await {
            failure.undo.push(error.to_string());
        }
        failure
    }

    /// A damaged file may be the record of any export that we do not know, and of the one that has this very volume (rule 2), or
    /// say that it is not wiped to its end: until somebody has looked, no id is taken for new or for gone.
    fn check_journal(&self, so: &str) -> Result<(), Failure> {
        let Some(file) = self.journal.damaged().first().or(self.pools.damaged()) else { return Ok(()) };
        Err(Failure::new(
            Reason::JournalFailed,
            format!("the journal has a damaged file, {}: {so}", file.display()),
        )
        .at("validate")
        .next(
            "repair it or, when its export is gone from targetcli ls and exportfs -v, delete it; then restart the agent",
        ))
    }

    /// What is recorded of an export that has not ended.
    fn recorded(&self, id: AttachmentId) -> Option<Export> {
        self.journal.get(&id.to_string())?.export
    }

    async fn write(&self, steps: &Steps, step: &'static str, record: &ExportRecord) -> Result<(), Failure> {
        let (journal, record) = (self.journal.clone(), record.clone());
        steps.run_blocking(step, move || journal.put(&record.id.to_string(), &record)).await
    }
}

/// Two disks of one volume on one host would have one WWN and one session's device, or one file and its locks.
fn check_other_host(volume: &VolumeKey, connector: &Connector, others: &[Export]) -> Result<(), Failure> {
    let same = |export: &&Export| export.connector.initiator_iqn == connector.initiator_iqn;
    match others.iter().find(same) {
        None => Ok(()),
        Some(_) => Err(Failure::new(
            Reason::VolumeExported,
            format!(
                "volume {volume} is exported to {} already, and has one disk on each host",
                connector.hostname
            ),
        )
        .at("validate")
        .next("attach it to a domain of another host, or detach it there first: tether list")),
    }
}
