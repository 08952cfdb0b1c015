//! Attach: the order of its steps. From connection info to a disk that was read back from the running domain. How the volume
//! gets to this host is in `over_iscsi` and `over_nfs`.
//!
//! Every step looks whether its effect is there already, so the same steps make an attachment, finish one that was cut
//! off, and repair one. A failure undoes all by the same steps that Detach has, unless the attachment was whole
//! before: a disk that a guest uses is not taken away because a repair failed.

use tether_agent_core::failure::{Failure, Reason};
use tether_agent_core::force::Force;
use tether_agent_core::steps::Steps;
use tether_proto::wire::{AttachmentStatus, Outcome};
use tether_proto::{AccessMode, AttachmentId, ByteSize, ConnectionInfo, DiskOptions, DomainName, Transport};

use crate::attachments::{Attachments, Views};
use crate::detach::buffered;
use crate::hypervisor::domain_xml::{DiskKind, DiskPlan, PlaceError, alias_of, choose_place, disk_element};
use crate::hypervisor::libvirt::{Affect, DomainState, LibvirtError, is_lost_connection};
use crate::record::{Attachment, AttachmentRecord, Phase};
use crate::sizes::Sizes;

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
        steps.about_domain(&domain);
        let size = connection.size;
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
            self.check_journal("this attachment's").map_err(|failure| failure.at("validate"))?;
            check_cache(&attachment)?;
        }
        self.claim(id, &attachment)?;
        if fresh
            && let Transport::Iscsi(iscsi) = &attachment.connection.transport
            && let Err(failure) = self.check_nobody_elses(iscsi)
        {
            self.release(id);
            return Err(failure);
        }
        // A disk that the domain has may be in use: a failure from here on does not take it away.
        let in_use = phase == Some(Phase::Attached) || Views::of(&state)?.in_live(id);
        let made = async {
            if fresh {
                // The turn at the share ends when the record is on disk: whoever counts its users then counts this one.
                let _turn = self.choose_mount(steps, id, &mut attachment).await?;
                let record = AttachmentRecord::new(id, Phase::Attaching, &attachment);
                self.write(steps, "write-journal", &record).await?;
            }
            let known = Known {
                fresh,
                in_live: Views::of(&state)?.in_live(id),
                phase: phase.unwrap_or(Phase::Attaching),
                size,
                may_be_larger: false,
            };
            let recorded_size = attachment.connection.size;
            let (changed, views) = self.converge(steps, id, &mut attachment, known).await?;
            if phase != Some(Phase::Attached) || attachment.connection.size != recorded_size {
                let record = AttachmentRecord::new(id, Phase::Attached, &attachment);
                self.write(steps, "close-journal", &record).await?;
                self.hold_no_more(id, &attachment).await;
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
            Err(failure) => {
                let failure = self.undo(steps, id, attachment, fresh, failure).await;
                // What has no record has nothing any more. A write that hangs may still bring one.
                if failure.reason != Reason::Stuck && self.journal.get(&id.to_string()).is_none() {
                    self.release(id);
                }
                Err(failure)
            }
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
        let disk = match attachment.connection.transport.clone() {
            Transport::Iscsi(iscsi) => self.connect_iscsi(steps, id, attachment, &iscsi, known).await?,
            Transport::Nfs(nfs) => self.connect_nfs(steps, id, attachment, &nfs, known).await?,
        };
        if !known.in_live {
            // A volume that was extended since the first call has another size by now. A guest that has the disk already
            // does not know that: ResizeAttachment tells it.
            attachment.connection.size = disk.size;
        }
        let (plugged, views) = self.plug(steps, id, attachment, known.phase, &disk).await?;
        Ok((disk.connected || plugged, views))
    }

    /// The disk in the domain, live and persistent as wished. True when it had to be plugged in.
    async fn plug(
        &self,
        steps: &Steps,
        id: AttachmentId,
        attachment: &mut Attachment,
        phase: Phase,
        disk: &HostDisk,
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
        let plan = plan(id, attachment, &views, disk, affect).map_err(|failure| failure.at("plan-disk"))?;
        let element = disk_element(&plan).map_err(|error| Failure::from(error).at("plan-disk"))?;
        attachment.plan = Some(plan);
        // Where the disk goes is on disk before it goes there: whoever takes it away later knows that it was plugged in.
        let record = AttachmentRecord::new(id, phase, attachment);
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
        let path = self.source_path(attachment);
        let format = attachment.connection.transport.format().as_str();
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
            let asked = (path.as_deref(), Some(serial.as_str()), Some(cache), read_only);
            if found != asked || disk.format.as_deref() != Some(format) || disk.bus != options.bus.as_str() {
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
        fresh: bool,
        mut failure: Failure,
    ) -> Failure {
        if matches!(failure.reason, Reason::OutcomeUnknown | Reason::Stuck) {
            // What may still be coming must find its storage, and its record.
            failure.undo.push("nothing was undone: the call may still succeed".to_owned());
            return failure;
        }
        if failure.reason == Reason::NotOurs {
            // The session or mount is somebody else's.
            if let Transport::Iscsi(iscsi) = &attachment.connection.transport
                && let Err(error) = self.delete_node_record(steps, iscsi).await
            {
                failure.undo.push(error.to_string());
            }
            if attachment.plan.is_some() || !fresh {
                failure.undo.push("what an earlier call made stays, and is recorded".to_owned());
                return failure;
            }
            return self.forget(steps, id, failure).await;
        }
        let mut stops = Force::off();
        let undone = self.take_away(steps, id, &attachment, self.guest_deadline, &mut stops).await;
        if let Err(error) = undone {
            let step = error.step.unwrap_or("undo");
            failure.undo.push(format!("{step}: {error}"));
            failure.undo.extend(self.keep_losses(steps, id, &attachment, &stops).await);
            return failure;
        }
        self.forget(steps, id, failure).await
    }

    /// The last step of an undo: no record.
    async fn forget(&self, steps: &Steps, id: AttachmentId, mut failure: Failure) -> Failure {
        let (journal, key) = (self.journal.clone(), id.to_string());
        let removed = steps.run_blocking("undo-write-journal", move || journal.remove(&key)).await;
        failure.undo.extend(removed.err().map(|error| error.to_string()));
        failure
    }
}

/// What is known before the first step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Known {
    /// The id was never used before.
    pub(crate) fresh: bool,
    /// The running domain has the disk.
    pub(crate) in_live: bool,
    /// Where the attachment is in its life; the journal keeps it until all is done.
    pub(crate) phase: Phase,
    /// The volume's size as this call says it; the record may be older than an extension.
    pub(crate) size: ByteSize,
    /// Nobody has said the size anew: the volume may have been extended since it was recorded.
    pub(crate) may_be_larger: bool,
}

impl Known {
    /// The sizes that the volume may have, when the record says this one.
    pub(crate) fn sizes(&self, recorded: ByteSize) -> Sizes {
        Sizes { any_of: [recorded, self.size], or_larger: self.may_be_larger }
    }
}

/// A volume that this host is connected to and that was compared with what the storage host said (rule 1).
#[derive(Debug)]
pub(crate) struct HostDisk {
    /// What goes into the domain.
    pub(crate) path: String,
    /// What is there.
    pub(crate) kind: DiskKind,
    /// The size that was found.
    pub(crate) size: ByteSize,
    /// Something had to be done to connect it.
    pub(crate) connected: bool,
}

/// Nobody knows whether it was done, or will be.
pub(crate) fn unknown(error: &dyn std::error::Error) -> Failure {
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

/// What one host keeps in its cache the others do not see.
fn check_cache(attachment: &Attachment) -> Result<(), Failure> {
    if !attachment.connection.multi_attach || !buffered(attachment.options.cache) {
        return Ok(());
    }
    Err(Failure::new(
        Reason::InvalidArgument,
        format!(
            "cache: a multi_attach volume is not cached by its hosts, got {}",
            attachment.options.cache.as_str()
        ),
    )
    .at("validate")
    .next("attach it with cache none or directsync"))
}

/// Where the disk goes, and all that its element says. A disk that is in one face already has the same place in the
/// other.
fn plan(
    id: AttachmentId,
    attachment: &Attachment,
    views: &Views,
    disk: &HostDisk,
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
        device_path: disk.path.clone(),
        kind: disk.kind,
        serial: attachment.serial(),
        read_only: attachment.connection.access_mode == AccessMode::ReadOnly,
        shareable: attachment.connection.multi_attach,
        keep_allocated: attachment.connection.transport.keeps_allocated(),
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
        mount: None,
        resizing_to: None,
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
