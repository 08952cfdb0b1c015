//! Detach, and the undo of Attach: the order of the steps that take a disk away.
//!
//! Live first, then persistent (F18); the guest's word or the XML is the proof (F29); then flush and disconnect
//! (`over_iscsi`, `over_nfs`), each step observed (F15). What is not there is passed over, so an attachment in any
//! state of disrepair can be taken away, and a Detach that was cut off goes on where it was.

use std::fmt::Display;
use std::time::{Duration, Instant};

use tether_agent_core::failure::{Failure, Reason};
use tether_agent_core::force::Force;
use tether_agent_core::steps::Steps;
use tether_proto::wire::Outcome;
use tether_proto::{AttachmentId, DiskCache, Transport};

use crate::attachments::{Attachments, Views};
use crate::hypervisor::domain_xml::alias_of;
use crate::hypervisor::libvirt::Unplug;
use crate::over_nfs::file_of;
use crate::record::{Attachment, AttachmentRecord, Phase};

/// How often a domain may change under a detach before it gives up.
const LOOKS: usize = 4;

impl Attachments {
    /// Detaches, or finds that it is done, or goes on with what was begun.
    pub(crate) async fn do_detach(
        &self,
        steps: &Steps,
        id: AttachmentId,
        guest_deadline: Duration,
        force: bool,
    ) -> Result<(Outcome, Vec<String>), Failure> {
        let recorded = self.journal.get(&id.to_string());
        let Some(AttachmentRecord { phase, attachment: Some(attachment), forced, may_be_lost, .. }) =
            recorded
        else {
            if recorded.is_none() {
                self.check_journal("this attachment's").map_err(|failure| failure.at("validate"))?;
                // A late Attach with this id must find it spent (rule 3).
                self.write(steps, "write-journal", &AttachmentRecord::ended(id)).await?;
            }
            self.release(id);
            return Ok((Outcome::Unchanged, recorded.map(|record| record.may_be_lost).unwrap_or_default()));
        };
        steps.about_domain(&attachment.domain_name);
        let mut force = Force::new(force || forced, may_be_lost);
        if phase != Phase::Detaching || force.is_on() != forced {
            let record = AttachmentRecord::new(id, Phase::Detaching, &attachment).forced_by(&force);
            self.write(steps, "write-journal", &record).await?;
        }
        let taken = self.take_away(steps, id, &attachment, guest_deadline, &mut force).await;
        if let Err(mut failure) = taken {
            failure.undo.extend(self.keep_losses(steps, id, &attachment, &force).await);
            return Err(failure);
        }
        let ended = AttachmentRecord::ended(id).forced_by(&force);
        let closed = self.write(steps, "close-journal", &ended).await;
        // What the journal has as ended has nothing any more, whatever became of the step.
        if self.journal.get(&id.to_string()).is_some_and(|record| record.phase == Phase::Ended) {
            self.release(id);
        }
        closed?;
        tracing::info!(domain = %attachment.domain_name, forced = force.is_on(), "detached");
        Ok((Outcome::Removed, force.may_be_lost().to_vec()))
    }

    /// Writes down what may be lost by a removal that stopped; from then on it is a detach, which people go on with. Gives what to
    /// tell beside the cause when it could not be written.
    pub(crate) async fn keep_losses(
        &self,
        steps: &Steps,
        id: AttachmentId,
        attachment: &Attachment,
        force: &Force,
    ) -> Option<String> {
        if force.may_be_lost().is_empty() {
            return None;
        }
        let kept = self.write_losses(steps, id, attachment, force).await;
        kept.err().map(|error| format!("what may be lost is not recorded: {error}"))
    }

    async fn write_losses(
        &self,
        steps: &Steps,
        id: AttachmentId,
        attachment: &Attachment,
        force: &Force,
    ) -> Result<(), Failure> {
        let record = AttachmentRecord::new(id, Phase::Detaching, attachment).forced_by(force);
        self.write(steps, "write-losses", &record).await
    }

    /// Nothing is held for a flush that is not to come.
    pub(crate) async fn hold_no_more(&self, id: AttachmentId, attachment: &Attachment) {
        self.held_disks().remove(&id);
        if let (Transport::Nfs(nfs), Some(mount)) = (&attachment.connection.transport, &attachment.mount) {
            self.mounts.let_go(mount, &file_of(mount, nfs)).await;
        }
    }

    /// Takes away whatever there is of an attachment. Stops where something does not let go, and what is below it stays,
    /// unless it is forced.
    pub(crate) async fn take_away(
        &self,
        steps: &Steps,
        id: AttachmentId,
        attachment: &Attachment,
        guest_deadline: Duration,
        force: &mut Force,
    ) -> Result<(), Failure> {
        let transport = &attachment.connection.transport;
        let ready = match transport {
            Transport::Iscsi(iscsi) => self.give_up_lost_session(steps, id, attachment, iscsi).await,
            Transport::Nfs(_) => self.check_server(steps, id, attachment).await,
        };
        let known = force.may_be_lost().len();
        if ready.is_ok() {
            self.hold_for_flush(id, attachment).await;
        }
        force.pass(ready, (), "what the guest wrote last may not be on the storage")?;
        let was_plugged = self.unplug(steps, id, attachment, guest_deadline, force).await;
        let was_plugged = force.pass(was_plugged, true, "the domain may still have the disk in its XML")?;
        if force.may_be_lost().len() > known {
            // Whoever goes on after a kill finds nothing in the way any more, and could not tell it.
            self.write_losses(steps, id, attachment, force).await?;
        }
        let was_plugged = was_plugged || attachment.plan.is_some();
        match transport {
            Transport::Iscsi(iscsi) => {
                self.disconnect_iscsi(steps, id, attachment, iscsi, was_plugged, force).await
            }
            Transport::Nfs(nfs) => self.disconnect_nfs(steps, id, attachment, nfs, was_plugged, force).await,
        }
    }

    /// Holds open what a guest writes to through this host's memory, for the flush at the end. QEMU flushes as it lets go, and
    /// ignores what comes of that; the kernel tells it to everybody who had the disk or file open, and to nobody who opens it
    /// afterwards (Documentation/core-api/errseq.rst). Held until it is flushed, also by a later call.
    async fn hold_for_flush(&self, id: AttachmentId, attachment: &Attachment) {
        if !buffered(attachment.options.cache) || attachment.plan.is_none() {
            return;
        }
        match &attachment.connection.transport {
            Transport::Iscsi(iscsi) => self.hold_disk(id, iscsi).await,
            Transport::Nfs(nfs) => self.hold_file(attachment, nfs).await,
        }
    }

    /// Takes the disk out of both faces of the domain, live first. A domain may be started, stopped or edited meanwhile, so
    /// it is looked at again after each change, until neither face leads to the device. True when one did.
    async fn unplug(
        &self,
        steps: &Steps,
        id: AttachmentId,
        attachment: &Attachment,
        guest_deadline: Duration,
        force: &mut Force,
    ) -> Result<bool, Failure> {
        let (path, began) = (self.source_path(attachment), Instant::now());
        let cost = "the guest still has the disk, loses what it has not written, and sees I/O errors";
        let (mut was_plugged, mut guest_holds, mut last) = (false, false, None);
        for _ in 0..LOOKS {
            let turn = self
                .libvirt
                .turn(attachment.domain_uuid)
                .await
                .map_err(|error| Failure::from(error).at("wait-turn"))?;
            let views = self.views_of(attachment).await.map_err(|failure| failure.at("read-domain"))?;
            if views.in_live(id) && !guest_holds {
                drop(turn);
                let unplugged = self.unplug_live(steps, id, attachment, guest_deadline).await;
                // libvirtd went away during the call: what became of it is seen in the next look, which reaches it again. A domain
                // that was busy was not asked at all.
                let looks_again = |failure: &Failure| match failure.reason {
                    Reason::HypervisorUnavailable => true,
                    Reason::DomainBusy => began.elapsed() < guest_deadline,
                    _ => false,
                };
                if unplugged.as_ref().is_err_and(looks_again) {
                    last = unplugged.err();
                    continue;
                }
                guest_holds = unplugged.is_err();
                force.pass(unplugged, (), cost)?;
            } else if views.in_persistent(id) {
                let alias = alias_of(id);
                let removal = self.libvirt.detach_persistent(attachment.domain_uuid, alias, turn);
                steps.run("unplug-persistent", async { Ok::<_, Failure>(removal.await?) }).await?;
            } else if guest_holds {
                return Ok(true);
            } else {
                return self.check_unused(attachment, &views, path.as_deref()).map(|()| was_plugged);
            }
            (was_plugged, last) = (true, None);
        }
        if let Some(failure) = last {
            return Err(failure);
        }
        let alias = alias_of(id);
        let back = format!("disk {alias} keeps coming back to domain {}", attachment.domain_name);
        Err(Failure::new(Reason::StillThere, back).at("unplug-persistent"))
    }

    /// A disk of the domain that leads to the device under another alias is somebody's doing, and in use all the same.
    fn check_unused(
        &self,
        attachment: &Attachment,
        views: &Views,
        path: Option<&str>,
    ) -> Result<(), Failure> {
        let Some(path) = path.filter(|path| views.uses(path)) else { return Ok(()) };
        Err(Failure::new(
            Reason::DeviceInUse,
            format!(
                "domain {} has a disk with {path} that this agent did not plug in",
                attachment.domain_name
            ),
        )
        .at("unplug"))
    }

    async fn unplug_live(
        &self,
        steps: &Steps,
        id: AttachmentId,
        attachment: &Attachment,
        guest_deadline: Duration,
    ) -> Result<(), Failure> {
        let alias = alias_of(id);
        steps
            .run("unplug", async {
                let asked = self.libvirt.detach_live(attachment.domain_uuid, &alias, guest_deadline).await;
                // The XML has the last word: an event may have been missed, or have come for another reason; and libvirt refuses
                // to take out what the guest has let go of a moment ago, asked by an earlier call (F30).
                let views = self.views_of(attachment).await;
                if views.as_ref().is_ok_and(|views| !views.in_live(id)) {
                    return Ok(());
                }
                let word = asked?;
                views?;
                let what = match word {
                    Unplug::Refused => "refused to let go".to_owned(),
                    Unplug::Silent | Unplug::Removed => {
                        format!("did not let go within {} ms", guest_deadline.as_millis())
                    }
                };
                Err(Failure::new(
                    Reason::GuestHoldsDevice,
                    format!("the guest of {} {what} of disk {alias}", attachment.domain_name),
                ))
            })
            .await
    }
}

/// Keeps that a flush failed: what it did not write is not there for another.
pub(crate) fn lost_by_flush(attachment: &Attachment, error: &dyn Display, force: &mut Force) {
    if buffered(attachment.options.cache) {
        force.note(format!(
            "what this host held of the writes of {} may be lost ({error})",
            attachment.domain_name
        ));
    }
}

/// Does the host keep writes of the guest in its own memory?
pub(crate) fn buffered(cache: DiskCache) -> bool {
    match cache {
        DiskCache::Writeback | DiskCache::Writethrough => true,
        DiskCache::None | DiskCache::Directsync => false,
    }
}
