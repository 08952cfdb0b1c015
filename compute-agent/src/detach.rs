//! Detach, and the undo of Attach: the order of the steps that take a disk away.
//!
//! Live first, then persistent (F18); the guest's word or the XML is the proof (F29); then flush and disconnect
//! (`over_iscsi`, `over_nfs`), each step observed (F15). What is not there is passed over, so an attachment in any
//! state of disrepair can be taken away, and a Detach that was cut off goes on where it was.

use std::time::Duration;

use tether_agent_core::failure::{Failure, Reason};
use tether_agent_core::steps::Steps;
use tether_proto::wire::Outcome;
use tether_proto::{AttachmentId, DiskCache, Transport};

use crate::attachments::{Attachments, Views};
use crate::hypervisor::domain_xml::alias_of;
use crate::hypervisor::libvirt::Unplug;
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
    ) -> Result<Outcome, Failure> {
        let recorded = self.journal.get(&id.to_string());
        let Some(AttachmentRecord { phase, attachment: Some(attachment), .. }) = recorded else {
            if recorded.is_none() {
                self.check_journal()?;
                // A late Attach with this id must find it spent (rule 3).
                self.write(steps, "write-journal", &AttachmentRecord::ended(id)).await?;
            }
            self.release(id);
            return Ok(Outcome::Unchanged);
        };
        if phase != Phase::Detaching {
            let record =
                AttachmentRecord { id, phase: Phase::Detaching, attachment: Some(attachment.clone()) };
            self.write(steps, "write-journal", &record).await?;
        }
        self.take_away(steps, id, &attachment, guest_deadline).await?;
        let closed = self.write(steps, "close-journal", &AttachmentRecord::ended(id)).await;
        // What the journal has as ended has nothing any more, whatever became of the step.
        if self.journal.get(&id.to_string()).is_some_and(|record| record.phase == Phase::Ended) {
            self.release(id);
        }
        closed?;
        tracing::info!(domain = %attachment.domain_name, "detached");
        Ok(Outcome::Removed)
    }

    /// Takes away whatever there is of an attachment. Stops where something does not let go: what is below it stays.
    pub(crate) async fn take_away(
        &self,
        steps: &Steps,
        id: AttachmentId,
        attachment: &Attachment,
        guest_deadline: Duration,
    ) -> Result<(), Failure> {
        let transport = &attachment.connection.transport;
        match transport {
            Transport::Iscsi(iscsi) => self.give_up_lost_session(steps, id, attachment, iscsi).await?,
            Transport::Nfs(_) => self.check_server(steps, attachment).await?,
        }
        let was_plugged = self.unplug(steps, id, attachment, guest_deadline).await?;
        let was_plugged = was_plugged || attachment.plan.is_some();
        match transport {
            Transport::Iscsi(iscsi) => self.disconnect_iscsi(steps, attachment, iscsi, was_plugged).await,
            Transport::Nfs(nfs) => self.disconnect_nfs(steps, id, attachment, nfs, was_plugged).await,
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
    ) -> Result<bool, Failure> {
        let path = self.source_path(attachment);
        let mut was_plugged = false;
        for _ in 0..LOOKS {
            let turn = self
                .libvirt
                .turn(attachment.domain_uuid)
                .await
                .map_err(|error| Failure::from(error).at("wait-turn"))?;
            let views = self.views_of(attachment).await.map_err(|failure| failure.at("read-domain"))?;
            if views.in_live(id) {
                drop(turn);
                self.unplug_live(steps, id, attachment, guest_deadline).await?;
            } else if views.in_persistent(id) {
                let alias = alias_of(id);
                let removal = self.libvirt.detach_persistent(attachment.domain_uuid, alias, turn);
                steps.run("unplug-persistent", async { Ok::<_, Failure>(removal.await?) }).await?;
            } else {
                return self.check_unused(attachment, &views, path.as_deref()).map(|()| was_plugged);
            }
            was_plugged = true;
        }
        Err(Failure::new(
            Reason::StillThere,
            format!("disk {} keeps coming back to domain {}", alias_of(id), attachment.domain_name),
        )
        .at("unplug-persistent"))
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
                let word = self.libvirt.detach_live(attachment.domain_uuid, &alias, guest_deadline).await?;
                // The XML has the last word: an event may have been missed, or have come for another reason.
                if !self.views_of(attachment).await?.in_live(id) {
                    return Ok(());
                }
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

/// Does the host keep writes of the guest in its own memory?
pub(crate) fn buffered(cache: DiskCache) -> bool {
    match cache {
        DiskCache::Writeback | DiskCache::Writethrough => true,
        DiskCache::None | DiskCache::Directsync => false,
    }
}
