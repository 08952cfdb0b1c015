//! Attach: the order of its steps. From connection info to a disk that was read back from the running domain.
//!
//! Every step looks whether its effect is there already, so the same steps make an attachment, finish one that was cut
//! off, and repair one. A failure undoes all by the same steps that Detach has, unless the attachment was whole
//! before: a disk that a guest uses is not taken away because a repair failed.

use std::time::Duration;

use tether_agent_core::failure::{Failure, Reason};
use tether_agent_core::steps::Steps;
use tether_proto::wire::{AttachmentStatus, Outcome};
use tether_proto::{AccessMode, AttachmentId, ConnectionInfo, DiskOptions, DomainName};
use virt::error::ErrorNumber;

use crate::attachments::{Attachments, Views, unreadable};
use crate::hypervisor::domain_xml::{DiskPlan, PlaceError, alias_of, choose_place, disk_element};
use crate::hypervisor::libvirt::{Affect, DomainState, LibvirtError};
use crate::initiator::iscsi::IscsiError;
use crate::initiator::session::Session;
use crate::initiator::{device, iscsi, node_record};
use crate::record::{Attachment, AttachmentRecord, Phase};

/// How long the kernel and udev may take for the disk and its names, each.
const EVENT_DEADLINE: Duration = Duration::from_secs(30);

impl Attachments {
    /// Attaches, or finds that it is done, or finishes what was begun.
    pub(crate) async fn do_attach(
        &self,
        steps: &Steps,
        id: AttachmentId,
        domain: DomainName,
        connection: ConnectionInfo,
        options: DiskOptions,
    ) -> Result<(Outcome, AttachmentStatus), Failure> {
        let recorded = self.journal.get(&id.to_string());
        if let Some(record) = &recorded {
            record.check_retry(&domain, &connection, &options)?;
        }
        let state =
            steps.run("find-domain", async { Ok::<_, Failure>(self.libvirt.find(&domain).await?) }).await?;
        let (phase, mut attachment) = match recorded {
            Some(AttachmentRecord { phase, attachment: Some(attachment), .. }) => (Some(phase), attachment),
            _ => (None, new_attachment(domain, &state, connection, options)),
        };
        check_domain(id, &attachment, &state)?;
        let fresh = phase.is_none();
        if fresh {
            self.check_journal()?;
        }
        self.claim(id, &attachment)?;
        if fresh && let Err(failure) = self.check_nobody_elses(&attachment) {
            self.release(id);
            return Err(failure);
        }
        // A disk that the domain has may be in use: a failure from here on does not take it away.
        let in_use = phase == Some(Phase::Attached) || Views::of(&state)?.in_live(id);
        let made = async {
            if fresh {
                let record =
                    AttachmentRecord { id, phase: Phase::Attaching, attachment: Some(attachment.clone()) };
                self.write(steps, "write-journal", &record).await?;
            }
            let known = Known {
                fresh,
                in_live: Views::of(&state)?.in_live(id),
                phase: phase.unwrap_or(Phase::Attaching),
            };
            let (changed, views) = self.converge(steps, id, &mut attachment, known).await?;
            if phase != Some(Phase::Attached) {
                let record =
                    AttachmentRecord { id, phase: Phase::Attached, attachment: Some(attachment.clone()) };
                self.write(steps, "close-journal", &record).await?;
            }
            Ok((changed, self.status(id, Phase::Attached, &attachment, &views)?))
        }
        .await;
        match made {
            Ok((changed, status)) => {
                tracing::info!(domain = %state.name, target_device = %status.target_device, changed, "attached");
                let outcome = match (fresh, changed) {
                    (true, _) => Outcome::Created,
                    (false, true) => Outcome::Repaired,
                    (false, false) => Outcome::Unchanged,
                };
                Ok((outcome, status))
            }
            Err(failure) if in_use => Err(failure),
            Err(failure) => Err(self.undo(steps, id, attachment, failure).await),
        }
    }

    /// A target that open-iscsi knows before we ever used it is somebody else's, whatever its name (rule 6).
    fn check_nobody_elses(&self, attachment: &Attachment) -> Result<(), Failure> {
        let target = &attachment.connection.iscsi.target_iqn;
        let folder = self.nodes.join(target.as_str());
        match folder.try_exists() {
            Ok(false) => Ok(()),
            Ok(true) => Err(Failure::new(
                Reason::NotOurs,
                format!("open-iscsi has a node record for {target} that this agent did not make"),
            )
            .at("validate")
            .next(format!("if nobody uses it: iscsiadm -m node -T {target} -o delete"))),
            Err(error) => Err(unreadable(error).at("validate")),
        }
    }

    /// Connects and plugs in, as far as it is not done. True when something had to be done.
    async fn converge(
        &self,
        steps: &Steps,
        id: AttachmentId,
        attachment: &mut Attachment,
        known: Known,
    ) -> Result<(bool, Views), Failure> {
        let (session, connected) = self.connect(steps, id, attachment, known).await?;
        let disk = self.find_disk(steps, &session).await?;
        let (wwn, size) = (attachment.connection.iscsi.wwn, attachment.connection.size);
        let (sysfs, verified, name) = (self.sysfs.clone(), session, disk.clone());
        steps
            .run_blocking("verify-device", move || device::verify(&sysfs, &verified, &name, wwn, size))
            .await?;
        let path = device::stable_path(&self.by_id, wwn);
        steps
            .run("find-stable-path", async {
                let leads = || device::leads_to(&path, &disk).then_some(());
                let found = self.events.subscribe().wait_until(EVENT_DEADLINE, leads).await;
                found.ok_or_else(|| {
                    Failure::new(
                        Reason::DeviceMissing,
                        format!("udev made no {} that leads to {disk}", path.display()),
                    )
                    .next("see that systemd-udevd runs and has its 60-persistent-storage.rules")
                })
            })
            .await?;
        let (plugged, views) =
            self.plug(steps, id, attachment, known.phase, path.display().to_string()).await?;
        Ok((connected || plugged, views))
    }

    /// A session to the target: the one that is there and ours, or a new one. True when it is new.
    async fn connect(
        &self,
        steps: &Steps,
        id: AttachmentId,
        attachment: &Attachment,
        known: Known,
    ) -> Result<(Session, bool), Failure> {
        let iscsi = attachment.connection.iscsi.clone();
        let target = iscsi.target_iqn.clone();
        if !known.fresh
            && let Some(session) = self.sysfs.find_session(&target).map_err(unreadable)?
        {
            if session.logged_in().map_err(unreadable)? {
                return Ok((session, false));
            }
            return Err(Failure::new(
                Reason::PortalUnreachable,
                format!("the session to {target} is lost, and open-iscsi is trying to get it back"),
            )
            .at("login"));
        }
        if known.in_live {
            // A new session would bring a new device; QEMU holds on to the old one, which is dead.
            return Err(Failure::new(
                Reason::DeviceInUse,
                format!("domain {} still has the disk of a session that has ended", attachment.domain_name),
            )
            .at("login")
            .next(format!("detach it, then attach anew: tether detach {id}")));
        }
        let portal = steps.run("probe-portals", iscsi::probe(&iscsi.portals)).await?;
        let (nodes, connection) = (self.nodes.clone(), iscsi);
        steps
            .run_blocking("write-node-record", move || node_record::write(&nodes, &connection, portal))
            .await?;
        let mut events = self.events.subscribe();
        let session = steps
            .run("login", async {
                match iscsi::login(&target, portal).await {
                    // A login that an earlier call began has come to its end meanwhile.
                    Err(IscsiError::SessionExists { .. }) if !known.fresh => {}
                    outcome => outcome?,
                }
                let seen = match events.added("iscsi_session") {
                    Some(paths) => self.sysfs.session_among(&target, &paths).map_err(unreadable)?,
                    None => None,
                };
                let found = match seen {
                    Some(session) => Some(session),
                    None => self.sysfs.find_session(&target).map_err(unreadable)?,
                };
                found.ok_or_else(|| {
                    Failure::new(
                        Reason::LoginFailed,
                        format!("the login to {target} succeeded, but sysfs has no session"),
                    )
                })
            })
            .await?;
        Ok((session, true))
    }

    /// The disk behind a session.
    async fn find_disk(&self, steps: &Steps, session: &Session) -> Result<String, Failure> {
        if let Some(disk) = session.disk().map_err(unreadable)? {
            return Ok(disk);
        }
        let mut events = self.events.subscribe();
        let (sysfs, scanned) = (self.sysfs.clone(), session.clone());
        steps.run_blocking("scan", move || device::scan(&sysfs, &scanned)).await?;
        steps
            .run("wait-device", async {
                // Not to be able to look is no reason to stop waiting: the deadline is.
                let found = events.wait_until(EVENT_DEADLINE, || session.disk().ok().flatten()).await;
                found.ok_or_else(|| {
                    Failure::new(Reason::DeviceMissing, format!("LUN 0 of {} did not appear", session.name))
                })
            })
            .await
    }

    /// The disk in the domain, live and persistent as wished. True when it had to be plugged in.
    async fn plug(
        &self,
        steps: &Steps,
        id: AttachmentId,
        attachment: &mut Attachment,
        phase: Phase,
        device_path: String,
    ) -> Result<(bool, Views), Failure> {
        let uuid = attachment.domain_uuid;
        let turn = steps.run("wait-turn", async { Ok::<_, Failure>(self.libvirt.turn(uuid).await?) }).await?;
        let state =
            steps.run("read-domain", async { Ok::<_, Failure>(self.libvirt.get(uuid).await?) }).await?;
        check_domain(id, attachment, &state)?;
        let views = Views::of(&state)?;
        let affect = Affect {
            live: views.live.is_some() && !views.in_live(id),
            persistent: views.persistent.is_some()
                && !attachment.options.live_only
                && !views.in_persistent(id),
        };
        if !affect.live && !affect.persistent {
            drop(turn);
            steps.run("verify-domain", async { self.verify_domain(id, attachment, &views) }).await?;
            return Ok((false, views));
        }
        let plan =
            plan(id, attachment, &views, device_path, affect).map_err(|failure| failure.at("plan-disk"))?;
        let element = disk_element(&plan).map_err(|error| Failure::from(error).at("plan-disk"))?;
        attachment.plan = Some(plan);
        // Where the disk goes is on disk before it goes there: whoever takes it away later knows that it was plugged in.
        let record = AttachmentRecord { id, phase, attachment: Some(attachment.clone()) };
        self.write(steps, "write-plan", &record).await?;
        let turn = steps
            .run("hot-plug", async {
                self.libvirt.attach(uuid, element, affect, turn).await.map_err(|error| match error {
                    LibvirtError::Deadline { .. } => unknown(&error),
                    LibvirtError::Refused { code, .. } if is_lost_connection(code) => unknown(&error),
                    other => Failure::from(other),
                })
            })
            .await?;
        let state = steps.run("read-back", async { Ok::<_, Failure>(self.libvirt.get(uuid).await?) }).await?;
        drop(turn);
        let views = Views::of(&state)?;
        steps.run("verify-domain", async { self.verify_domain(id, attachment, &views) }).await?;
        Ok((true, views))
    }

    /// Is the disk in the XML as it was asked for (rules 1 and 7)?
    fn verify_domain(&self, id: AttachmentId, attachment: &Attachment, views: &Views) -> Result<(), Failure> {
        let alias = alias_of(id);
        let path = device::stable_path(&self.by_id, attachment.connection.iscsi.wwn).display().to_string();
        let options = &attachment.options;
        let read_only = options.read_only || attachment.connection.access_mode == AccessMode::ReadOnly;
        let (serial, cache) = (attachment.serial(), options.cache.as_str());
        let faces = [
            ("running domain", views.live.as_ref(), true),
            ("definition", views.persistent.as_ref(), !options.live_only),
        ];
        for (face, view, wanted) in faces {
            let Some(view) = view.filter(|_| wanted) else { continue };
            let Some(disk) = view.disk_by_alias(&alias) else {
                return Err(Failure::new(
                    Reason::HypervisorRefused,
                    format!("libvirt said yes, but the {face} has no disk {alias}"),
                ));
            };
            let found =
                (disk.source.as_deref(), disk.serial.as_deref(), disk.cache.as_deref(), disk.read_only);
            let asked = (Some(path.as_str()), Some(serial.as_str()), Some(cache), read_only);
            if found != asked || disk.format.as_deref() != Some("raw") || disk.bus != options.bus.as_str() {
                return Err(Failure::new(
                    Reason::WrongDevice,
                    format!("disk {alias} of the {face} is {found:?} on {} and not {asked:?}", disk.bus),
                ));
            }
        }
        Ok(())
    }

    /// Takes back all that an attach did, and says beside the cause what could not be taken back (rule 8).
    async fn undo(
        &self,
        steps: &Steps,
        id: AttachmentId,
        attachment: Attachment,
        mut failure: Failure,
    ) -> Failure {
        if matches!(failure.reason, Reason::OutcomeUnknown | Reason::Stuck) {
            // What may still be coming must find its storage, and its record.
            failure.undo.push("nothing was undone: the call may still succeed".to_owned());
            return failure;
        }
        if failure.reason == Reason::NotOurs {
            // The session is somebody else's; only the node record is ours.
            let (nodes, target) = (self.nodes.clone(), attachment.connection.iscsi.target_iqn.clone());
            let deleted =
                steps.run_blocking("delete-node-record", move || node_record::delete(&nodes, &target)).await;
            if let Err(error) = deleted {
                failure.undo.push(error.to_string());
            }
            return self.forget(steps, id, failure).await;
        }
        if let Err(error) = self.take_away(steps, id, &attachment, self.guest_deadline).await {
            let step = error.step.unwrap_or("undo");
            failure.undo.push(format!("{step}: {error}"));
            return failure;
        }
        self.forget(steps, id, failure).await
    }

    /// The last step of an undo: no record, no claim.
    async fn forget(&self, steps: &Steps, id: AttachmentId, mut failure: Failure) -> Failure {
        let (journal, key) = (self.journal.clone(), id.to_string());
        if let Err(error) = steps.run_blocking("undo-write-journal", move || journal.remove(&key)).await {
            failure.undo.push(error.to_string());
            return failure;
        }
        self.release(id);
        failure
    }
}

/// What is known before the first step.
#[derive(Debug, Clone, Copy)]
struct Known {
    /// The id was never used before.
    fresh: bool,
    /// The running domain has the disk.
    in_live: bool,
    /// Where the attachment is in its life; the journal keeps it until all is done.
    phase: Phase,
}

/// Did the connection to libvirt break during a call?
fn is_lost_connection(code: ErrorNumber) -> bool {
    use ErrorNumber::{GnutlsError, InvalidConn, NoConnect, OperationTimeout, Rpc, SystemError};
    matches!(code, GnutlsError | InvalidConn | NoConnect | OperationTimeout | Rpc | SystemError)
}

/// Nobody knows whether it was done, or will be.
fn unknown(error: &dyn std::error::Error) -> Failure {
    Failure::from_error(Reason::OutcomeUnknown, error)
}

/// What can be known of the domain before anything is touched.
fn check_domain(id: AttachmentId, attachment: &Attachment, state: &DomainState) -> Result<(), Failure> {
    let refuse = |reason, message| Err(Failure::new(reason, message).at("validate"));
    if attachment.domain_uuid != state.uuid {
        let (name, now, then) = (&state.name, state.uuid, attachment.domain_uuid);
        return refuse(
            Reason::DifferentParameters,
            format!("domain {name} is another one now ({now}) than when attachment {id} began ({then})"),
        );
    }
    if attachment.options.live_only && state.live.is_none() {
        return refuse(
            Reason::DomainNotRunning,
            format!("domain {} is shut off, and the disk is to be live only", state.name),
        );
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

/// Where the disk goes, and all that its element says. A disk that is in one face already has the same place in the
/// other.
fn plan(
    id: AttachmentId,
    attachment: &Attachment,
    views: &Views,
    device_path: String,
    affect: Affect,
) -> Result<DiskPlan, Failure> {
    let alias = alias_of(id);
    let there =
        [&views.live, &views.persistent].into_iter().flatten().find_map(|view| view.disk_by_alias(&alias));
    let place = match there {
        Some(disk) => disk.target_device.parse().ok().zip(disk.address),
        None => None,
    };
    let (target_device, address) = match place {
        Some(place) => place,
        None => {
            let live = views.live.as_ref().filter(|_| affect.live);
            let persistent = views.persistent.as_ref().filter(|_| affect.persistent);
            choose_place(&attachment.options, live, persistent).map_err(|error| no_place(&error))?
        }
    };
    Ok(DiskPlan {
        attachment: id,
        options: attachment.options.clone(),
        device_path,
        serial: attachment.serial(),
        read_only: attachment.connection.access_mode == AccessMode::ReadOnly,
        target_device,
        address,
    })
}

fn new_attachment(
    requested_domain: DomainName,
    state: &DomainState,
    connection: ConnectionInfo,
    options: DiskOptions,
) -> Attachment {
    Attachment {
        requested_domain,
        domain_uuid: state.uuid,
        domain_name: state.name.clone(),
        connection,
        options,
        plan: None,
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
