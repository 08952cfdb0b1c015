//! Detach, and the undo of Attach: the order of the steps that take a disk away.
//!
//! Live first, then persistent (F18); the guest's word or the XML is the proof (F29); then flush, the SCSI device, the
//! session, the record, each observed to be gone (F15). What is not there is passed over, so an attachment in any
//! state of disrepair can be taken away, and a Detach that was cut off goes on where it was.

use std::time::Duration;

use tether_agent_core::failure::{Failure, Reason};
use tether_agent_core::operations::Steps;
use tether_proto::wire::Outcome;
use tether_proto::{AttachmentId, DiskCache};
use tokio::time::timeout;

use crate::attachments::Attachments;
use crate::hypervisor::domain_xml::alias_of;
use crate::hypervisor::libvirt::Unplug;
use crate::initiator::session::Session;
use crate::initiator::{device, iscsi, node_record};
use crate::record::{Attachment, AttachmentRecord, Phase};

/// How long the host's cache may take to reach the storage host.
const FLUSH_DEADLINE: Duration = Duration::from_secs(60);
/// How long the kernel may take to let go of a disk or a session.
const KERNEL_DEADLINE: Duration = Duration::from_secs(30);

impl Attachments {
    /// Detaches, or finds that it is done, or goes on with what was begun.
    pub(crate) async fn do_detach(
        &self,
        steps: &Steps,
        id: AttachmentId,
        guest_deadline: Duration,
    ) -> Result<Outcome, Failure> {
        let recorded = self.journal.get(&id.to_string());
        let Some(mut record) = recorded else {
            // A late Attach with this id must find it spent (rule 3).
            let ended = AttachmentRecord { id, phase: Phase::Ended, attachment: None };
            self.write(steps, "write-journal", &ended).await?;
            return Ok(Outcome::Unchanged);
        };
        if record.phase == Phase::Ended {
            return Ok(Outcome::Unchanged);
        }
        if record.phase != Phase::Detaching {
            record.phase = Phase::Detaching;
            self.write(steps, "write-journal", &record).await?;
        }
        self.take_away(steps, &record, guest_deadline).await?;
        let ended = AttachmentRecord { id, phase: Phase::Ended, attachment: None };
        self.write(steps, "close-journal", &ended).await?;
        tracing::info!(attachment = %id, "detached");
        Ok(Outcome::Removed)
    }

    /// Takes away whatever there is of an attachment. Stops where something does not let go: what is below it stays.
    pub(crate) async fn take_away(
        &self,
        steps: &Steps,
        record: &AttachmentRecord,
        guest_deadline: Duration,
    ) -> Result<(), Failure> {
        let Some(attachment) = &record.attachment else { return Ok(()) };
        self.unplug(steps, record.id, attachment, guest_deadline).await?;
        self.disconnect(steps, attachment).await
    }

    async fn unplug(
        &self,
        steps: &Steps,
        id: AttachmentId,
        attachment: &Attachment,
        guest_deadline: Duration,
    ) -> Result<(), Failure> {
        let alias = alias_of(id);
        let uuid = attachment.domain_uuid;
        let views = self.views_of(attachment).await.map_err(|failure| failure.at("read-domain"))?;
        if views.in_live(id) {
            steps
                .run("unplug", async {
                    let word = self.libvirt.detach_live(uuid, &alias, guest_deadline).await?;
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
                .await?;
        }
        if views.in_persistent(id) {
            steps
                .run("unplug-persistent", async {
                    self.libvirt.detach_persistent(uuid, alias.clone()).await?;
                    if self.views_of(attachment).await?.in_persistent(id) {
                        return Err(Failure::new(
                            Reason::StillThere,
                            format!("disk {alias} is still in the definition of {}", attachment.domain_name),
                        ));
                    }
                    Ok(())
                })
                .await?;
        }
        Ok(())
    }

    async fn disconnect(&self, steps: &Steps, attachment: &Attachment) -> Result<(), Failure> {
        let target = &attachment.connection.iscsi.target_iqn;
        if let Some(session) = self.sysfs.find_session(target) {
            if session.logged_in() {
                self.flush_and_remove(steps, attachment, &session).await?;
            } else if buffered(attachment.options.cache) {
                return Err(Failure::new(
                    Reason::FlushFailed,
                    format!("the session to {target} is lost, and the host may hold writes that are not on the storage"),
                )
                .at("flush"));
            } else {
                // With cache none or directsync the host holds nothing back: what the guest was told is written is on
                // the storage host, and what was not, the guest knows. A disk behind a lost session is removed by the
                // logout; by itself it would wait for the session (F17).
                tracing::warn!(target = %target, "the session is lost; nothing is left to flush");
            }
            steps.run("logout", self.log_out(attachment, &session)).await?;
        }
        let (nodes, target) = (self.nodes.clone(), target.clone());
        steps.run_blocking("delete-node-record", move || node_record::delete(&nodes, &target).map(drop)).await
    }

    async fn flush_and_remove(
        &self,
        steps: &Steps,
        attachment: &Attachment,
        session: &Session,
    ) -> Result<(), Failure> {
        let Some(disk) = session.disk() else { return Ok(()) };
        let what = format!("disk {disk} of {}", attachment.domain_name);
        let flush = steps.run_blocking("flush", move || {
            device::flush(&disk).map_err(|error| Failure::from_error(Reason::FlushFailed, &error))
        });
        timeout(FLUSH_DEADLINE, flush).await.map_err(|_| {
            Failure::new(
                Reason::FlushFailed,
                format!("flushing {what} took more than {} s", FLUSH_DEADLINE.as_secs()),
            )
            .at("flush")
        })??;
        let mut events = self.events.subscribe();
        let removed = session.clone();
        let remove = steps.run_blocking("remove-device", move || device::remove(&removed));
        let still_there =
            || Failure::new(Reason::StillThere, format!("{what} did not go away")).at("remove-device");
        timeout(KERNEL_DEADLINE, remove).await.map_err(|_| still_there())??;
        let gone = || (!session.lun_folder().exists()).then_some(());
        events.wait_until(KERNEL_DEADLINE, gone).await.ok_or_else(still_there)
    }

    async fn log_out(&self, attachment: &Attachment, session: &Session) -> Result<(), Failure> {
        let iscsi = &attachment.connection.iscsi;
        let mut events = self.events.subscribe();
        // The portal is not in the journal while an attach is under way. A record is needed to log out, and every
        // portal leads to the same session.
        let portal = match attachment.portal.or_else(|| iscsi.portals.first().copied()) {
            Some(portal) => portal,
            None => return Err(Failure::new(Reason::Internal, "an attachment without a portal")),
        };
        iscsi::logout(&iscsi.target_iqn, portal).await?;
        events.wait_until(KERNEL_DEADLINE, || (!session.exists()).then_some(())).await.ok_or_else(|| {
            Failure::new(
                Reason::StillThere,
                format!("{} to {} is still there after the logout", session.name, iscsi.target_iqn),
            )
        })
    }
}

/// Does the host keep writes of the guest in its own memory?
fn buffered(cache: DiskCache) -> bool {
    match cache {
        DiskCache::Writeback | DiskCache::Writethrough => true,
        DiskCache::None | DiskCache::Directsync => false,
    }
}
