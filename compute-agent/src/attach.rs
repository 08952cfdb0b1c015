//! Attach: the order of its steps. From connection info to a disk that was read back from the running domain.
//!
//! Every step looks whether its effect is there already, so the same steps make an attachment, finish one that was cut
//! off, and repair one. A failure undoes all by the same steps that Detach has, unless the attachment was whole
//! before: a disk that a guest uses is not taken away because a repair failed.

use std::time::Duration;

use tether_agent_core::failure::{Failure, Reason};
use tether_agent_core::operations::Steps;
use tether_proto::wire::Outcome;
use tether_proto::{AttachmentId, ConnectionInfo, DiskOptions, DomainName};
use tokio::time::timeout;

use crate::attachments::{Attachments, Views};
use crate::hypervisor::domain_xml::{DiskPlan, PlaceError, alias_of, choose_place, disk_element};
use crate::hypervisor::libvirt::{Affect, DomainState};
use crate::initiator::device::{self, DeviceError};
use crate::initiator::iscsi::{self, IscsiError};
use crate::initiator::node_record::{self, NodeRecordError};
use crate::initiator::session::Session;
use crate::record::{Attachment, AttachmentRecord, Phase};

/// How long the kernel and udev may take for the session, the disk and its names, each.
const KERNEL_DEADLINE: Duration = Duration::from_secs(30);

impl Attachments {
    /// Attaches, or finds that it is done, or finishes what was begun.
    pub(crate) async fn do_attach(
        &self,
        steps: &Steps,
        id: AttachmentId,
        domain: DomainName,
        connection: ConnectionInfo,
        options: DiskOptions,
    ) -> Result<Outcome, Failure> {
        let recorded = self.journal.get(&id.to_string());
        if let Some(record) = &recorded {
            check_retry(record, &domain, &connection, &options)?;
        }
        let state =
            steps.run("find-domain", async { Ok::<_, Failure>(self.libvirt.find(&domain).await?) }).await?;
        let (mut record, fresh) = match recorded {
            Some(record) => (record, false),
            None => (new_record(id, domain, &state, connection, options), true),
        };
        let Some(attachment) = record.attachment.as_mut() else {
            return Err(Failure::new(Reason::Internal, format!("the record of {id} is empty")));
        };
        if attachment.domain_uuid != state.uuid {
            return Err(Failure::new(
                Reason::DifferentParameters,
                format!(
                    "domain {} is another one now ({}) than when attachment {id} began ({})",
                    state.name, state.uuid, attachment.domain_uuid
                ),
            ));
        }
        check_domain(id, attachment, &state)?;
        let was_attached = record.phase == Phase::Attached;
        if fresh {
            self.write(steps, "write-journal", &record).await?;
        }
        match self.converge(steps, &mut record).await {
            Ok(changed) => {
                if !was_attached {
                    record.phase = Phase::Attached;
                    self.write(steps, "close-journal", &record).await?;
                }
                tracing::info!(attachment = %id, domain = %state.name, fresh, changed, "attached");
                Ok(match (fresh, changed) {
                    (true, _) => Outcome::Created,
                    (false, true) => Outcome::Repaired,
                    (false, false) => Outcome::Unchanged,
                })
            }
            Err(failure) if was_attached => Err(failure),
            Err(failure) => Err(self.undo(steps, &record, failure).await),
        }
    }

    /// Connects and plugs in, as far as it is not done. True when something had to be done.
    async fn converge(&self, steps: &Steps, record: &mut AttachmentRecord) -> Result<bool, Failure> {
        let id = record.id;
        let Some(mut attachment) = record.attachment.clone() else { return Ok(false) };
        let (session, connected) = self.connect(steps, record, &mut attachment).await?;
        let disk = self.find_disk(steps, &session).await?;
        let (wwn, size) = (attachment.connection.iscsi.wwn, attachment.connection.size);
        steps
            .run("verify-device", async {
                device::verify(&self.sysfs, &session, &disk, wwn, size).map_err(wrong_device)
            })
            .await?;
        let path = device::stable_path(&self.by_id, wwn);
        steps
            .run("find-stable-path", async {
                let found = self
                    .events
                    .subscribe()
                    .wait_until(KERNEL_DEADLINE, || device::leads_to(&path, &disk).then_some(()))
                    .await;
                found.ok_or_else(|| {
                    Failure::new(
                        Reason::DeviceMissing,
                        format!("udev made no {} that leads to {disk}", path.display()),
                    )
                    .next("see that systemd-udevd runs and has its 60-persistent-storage.rules")
                })
            })
            .await?;
        let plugged = self.plug(steps, id, record, &mut attachment, path.display().to_string()).await?;
        Ok(connected || plugged)
    }

    /// A session to the target: the one that is there and ours, or a new one. True when it is new.
    async fn connect(
        &self,
        steps: &Steps,
        record: &mut AttachmentRecord,
        attachment: &mut Attachment,
    ) -> Result<(Session, bool), Failure> {
        let iscsi = attachment.connection.iscsi.clone();
        if attachment.portal.is_some()
            && let Some(session) = self.sysfs.find_session(&iscsi.target_iqn)
        {
            return Ok((session, false));
        }
        let portal = steps.run("probe-portals", iscsi::probe(&iscsi.portals)).await?;
        // In memory only: the target's name is in the journal already, and finds the session again after a crash.
        attachment.portal = Some(portal);
        record.attachment = Some(attachment.clone());
        let nodes = self.nodes.clone();
        let connection = iscsi.clone();
        steps
            .run_blocking("write-node-record", move || node_record::write(&nodes, &connection, portal))
            .await?;
        let mut events = self.events.subscribe();
        let session = steps
            .run("login", async {
                match iscsi::login(&iscsi.target_iqn, portal).await {
                    // After a crash it is ours: the target is for this attachment alone, and the journal knows it.
                    Ok(()) | Err(IscsiError::SessionExists { .. }) => {}
                    Err(error) => return Err(Failure::from(error)),
                }
                let found = match events.added("iscsi_session") {
                    Some(paths) => self.sysfs.session_among(&iscsi.target_iqn, &paths),
                    None => None,
                };
                found.or_else(|| self.sysfs.find_session(&iscsi.target_iqn)).ok_or_else(|| {
                    Failure::new(
                        Reason::LoginFailed,
                        format!("the login to {} succeeded, but sysfs has no session", iscsi.target_iqn),
                    )
                })
            })
            .await?;
        Ok((session, true))
    }

    /// The disk behind a session.
    async fn find_disk(&self, steps: &Steps, session: &Session) -> Result<String, Failure> {
        if let Some(disk) = session.disk() {
            return Ok(disk);
        }
        let mut events = self.events.subscribe();
        let (sysfs, scanned) = (self.sysfs.clone(), session.clone());
        let scan = steps.run_blocking("scan", move || device::scan(&sysfs, &scanned));
        let missing =
            || Failure::new(Reason::DeviceMissing, format!("LUN 0 of {} did not appear", session.name));
        timeout(KERNEL_DEADLINE, scan).await.map_err(|_| missing().at("scan"))??;
        steps
            .run("wait-device", async {
                events.wait_until(KERNEL_DEADLINE, || session.disk()).await.ok_or_else(missing)
            })
            .await
    }

    /// The disk in the domain, live and persistent as wished. True when it had to be plugged in.
    async fn plug(
        &self,
        steps: &Steps,
        id: AttachmentId,
        record: &mut AttachmentRecord,
        attachment: &mut Attachment,
        device_path: String,
    ) -> Result<bool, Failure> {
        let uuid = attachment.domain_uuid;
        let turn = steps.run("wait-turn", async { Ok::<_, Failure>(self.libvirt.turn(uuid).await?) }).await?;
        let state =
            steps.run("read-domain", async { Ok::<_, Failure>(self.libvirt.get(uuid).await?) }).await?;
        check_domain(id, attachment, &state).map_err(|failure| failure.at("plan-disk"))?;
        let views = Views::of(&state)?;
        let affect = Affect {
            live: views.live.is_some() && !views.in_live(id),
            persistent: views.persistent.is_some()
                && !attachment.options.live_only
                && !views.in_persistent(id),
        };
        if !affect.live && !affect.persistent {
            drop(turn);
            self.read_back(steps, id, attachment, &views).await?;
            return Ok(false);
        }
        let plan =
            plan(id, attachment, &views, device_path, affect).map_err(|failure| failure.at("plan-disk"))?;
        let element = disk_element(&plan).map_err(|error| Failure::from(error).at("plan-disk"))?;
        attachment.plan = Some(plan);
        record.attachment = Some(attachment.clone());
        steps
            .run("hot-plug", async { Ok::<_, Failure>(self.libvirt.attach(uuid, element, affect).await?) })
            .await?;
        let state = steps.run("read-back", async { Ok::<_, Failure>(self.libvirt.get(uuid).await?) }).await?;
        drop(turn);
        self.read_back(steps, id, attachment, &Views::of(&state)?).await?;
        Ok(true)
    }

    /// Is the disk in the XML as it was asked for (rules 1 and 7)?
    async fn read_back(
        &self,
        steps: &Steps,
        id: AttachmentId,
        attachment: &Attachment,
        views: &Views,
    ) -> Result<(), Failure> {
        let alias = alias_of(id);
        let wanted_path = device::stable_path(&self.by_id, attachment.connection.iscsi.wwn);
        let wanted_path = wanted_path.display().to_string();
        let wanted_serial = attachment.serial();
        steps
            .run("verify-domain", async {
                let faces = [
                    ("running domain", views.live.as_ref(), true),
                    ("definition", views.persistent.as_ref(), !attachment.options.live_only),
                ];
                for (face, view, wanted) in faces {
                    let Some(view) = view.filter(|_| wanted) else { continue };
                    let Some(disk) = view.disk_by_alias(&alias) else {
                        return Err(Failure::new(
                            Reason::HypervisorRefused,
                            format!("libvirt said yes, but the {face} has no disk {alias}"),
                        ));
                    };
                    let source = disk.source.as_deref().unwrap_or("nothing");
                    let serial = disk.serial.as_deref().unwrap_or("none");
                    if source != wanted_path || serial != wanted_serial.as_str() {
                        return Err(Failure::new(
                            Reason::WrongDevice,
                            format!("disk {alias} of the {face} is {source} with serial {serial}, and not {wanted_path} with serial {wanted_serial}"),
                        ));
                    }
                }
                Ok(())
            })
            .await
    }

    /// Takes back all that an attach did, and says beside the cause what could not be taken back (rule 8).
    async fn undo(&self, steps: &Steps, record: &AttachmentRecord, mut failure: Failure) -> Failure {
        if let Err(error) = self.take_away(steps, record, self.guest_deadline).await {
            let step = error.step.unwrap_or("undo");
            failure.undo.push(format!("{step}: {error}"));
            return failure;
        }
        let (journal, key) = (self.journal.clone(), record.id.to_string());
        if let Err(error) = steps.run_blocking("undo-write-journal", move || journal.remove(&key)).await {
            failure.undo.push(error.to_string());
        }
        failure
    }
}

/// What can be known of the domain before anything is touched.
fn check_domain(id: AttachmentId, attachment: &Attachment, state: &DomainState) -> Result<(), Failure> {
    if attachment.options.live_only && state.live.is_none() {
        return Err(Failure::new(
            Reason::DomainNotRunning,
            format!("domain {} is shut off, and the disk is to be live only", state.name),
        )
        .at("validate"));
    }
    let views = Views::of(state).map_err(|failure| failure.at("validate"))?;
    if views.in_live(id) || views.in_persistent(id) {
        return Ok(());
    }
    let persistent = views.persistent.as_ref().filter(|_| !attachment.options.live_only);
    choose_place(&attachment.options, views.live.as_ref(), persistent)
        .map(drop)
        .map_err(|error| no_place(&error).at("validate"))
}

/// Where the disk goes, and all that its element says. A disk that is in one face already keeps its place in the other.
fn plan(
    id: AttachmentId,
    attachment: &Attachment,
    views: &Views,
    device_path: String,
    affect: Affect,
) -> Result<DiskPlan, Failure> {
    if let Some(plan) = &attachment.plan
        && !(affect.live && affect.persistent)
    {
        return Ok(plan.clone());
    }
    let live = views.live.as_ref().filter(|_| affect.live);
    let persistent = views.persistent.as_ref().filter(|_| affect.persistent);
    let (target_device, address) =
        choose_place(&attachment.options, live, persistent).map_err(|error| no_place(&error))?;
    Ok(DiskPlan {
        attachment: id,
        options: attachment.options.clone(),
        device_path,
        serial: attachment.serial(),
        read_only: attachment.connection.access_mode == tether_proto::AccessMode::ReadOnly,
        target_device,
        address,
    })
}

fn new_record(
    id: AttachmentId,
    requested_domain: DomainName,
    state: &DomainState,
    connection: ConnectionInfo,
    options: DiskOptions,
) -> AttachmentRecord {
    let attachment = Attachment {
        requested_domain,
        domain_uuid: state.uuid,
        domain_name: state.name.clone(),
        connection,
        options,
        portal: None,
        plan: None,
    };
    AttachmentRecord { id, phase: Phase::Attaching, attachment: Some(attachment) }
}

/// May this call go on with what is recorded under its id?
fn check_retry(
    record: &AttachmentRecord,
    domain: &DomainName,
    connection: &ConnectionInfo,
    options: &DiskOptions,
) -> Result<(), Failure> {
    let ended = || {
        Failure::new(
            Reason::AttachmentEnded,
            format!("attachment {} was detached; its id is spent", record.id),
        )
    };
    match (record.phase, &record.attachment) {
        (Phase::Ended, _) | (_, None) => Err(ended()),
        (Phase::Detaching, _) => Err(ended().next("finish with Detach, then attach under a new id")),
        (Phase::Attaching | Phase::Attached, Some(attachment)) => {
            match attachment.difference(domain, connection, options) {
                None => Ok(()),
                Some(difference) => Err(Failure::new(
                    Reason::DifferentParameters,
                    format!("attachment {} has other parameters: {difference}", record.id),
                )),
            }
        }
    }
}

fn no_place(error: &PlaceError) -> Failure {
    let reason = match error {
        PlaceError::NoFreeSlot { .. } | PlaceError::NoFreeTargetDevice { .. } => Reason::NoFreeSlot,
        PlaceError::TargetDeviceTaken { .. } => Reason::TargetDeviceTaken,
        PlaceError::NoDefinition
        | PlaceError::UnsupportedMachine { .. }
        | PlaceError::NoScsiController { .. } => Reason::DomainUnsuitable,
    };
    Failure::from_error(reason, error)
}

/// What is wrong with the device: another volume, or a disk that cannot be used.
pub(crate) fn wrong_device(error: DeviceError) -> Failure {
    match &error {
        DeviceError::Wwn { .. } | DeviceError::Size { .. } => {
            Failure::from_error(Reason::WrongDevice, &error)
        }
        DeviceError::Io { .. } => Failure::from_error(Reason::DeviceMissing, &error),
    }
}

impl From<DeviceError> for Failure {
    fn from(error: DeviceError) -> Self {
        wrong_device(error)
    }
}

impl From<NodeRecordError> for Failure {
    fn from(error: NodeRecordError) -> Self {
        Failure::from_error(Reason::InitiatorFailed, &error)
    }
}

impl From<IscsiError> for Failure {
    fn from(error: IscsiError) -> Self {
        let with_command = |reason, source: &tether_agent_core::command::CommandError| {
            let mut failure = Failure::from_error(reason, &error);
            failure.command = Some(source.command().to_owned());
            failure.exit = source.exit_code();
            failure
        };
        match &error {
            IscsiError::Unreachable { .. } => Failure::from_error(Reason::PortalUnreachable, &error),
            IscsiError::Rejected { .. } => Failure::from_error(Reason::ChapRejected, &error),
            IscsiError::SessionExists { .. } => Failure::from_error(Reason::NotOurs, &error),
            IscsiError::Login { source, .. } => with_command(Reason::LoginFailed, source),
            IscsiError::Logout { source, .. } | IscsiError::Command(source) => {
                with_command(Reason::InitiatorFailed, source)
            }
        }
    }
}
