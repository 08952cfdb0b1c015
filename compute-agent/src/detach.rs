//! Detach, and the undo of Attach: the order of the steps that take a disk away.
//!
//! Live first, then persistent (F18); the guest's word or the XML is the proof (F29); then flush, the SCSI device, the
//! session, the record, each observed to be gone (F15). What is not there is passed over, so an attachment in any
//! state of disrepair can be taken away, and a Detach that was cut off goes on where it was.

use std::time::Duration;

use tether_agent_core::failure::{Failure, Reason};
use tether_agent_core::steps::{Steps, blocking};
use tether_proto::wire::Outcome;
use tether_proto::{AttachmentId, DiskCache};

use crate::attachments::{Attachments, Views, unreadable};
use crate::hypervisor::domain_xml::alias_of;
use crate::hypervisor::libvirt::Unplug;
use crate::initiator::session::Session;
use crate::initiator::{device, iscsi, node_record};
use crate::record::{Attachment, AttachmentRecord, Phase};

/// How long the host's cache may take to reach the storage host.
const FLUSH_DEADLINE: Duration = Duration::from_secs(60);
/// How long the kernel may take to show that a disk or a session is gone.
const EVENT_DEADLINE: Duration = Duration::from_secs(30);
/// How long a lost session may take to come back before it is looked into.
const RECOVERY_DEADLINE: Duration = Duration::from_secs(8);
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
        self.give_up_lost_session(steps, id, attachment).await?;
        let was_plugged = self.unplug(steps, id, attachment, guest_deadline).await?;
        self.disconnect(steps, attachment, was_plugged || attachment.plan.is_some()).await
    }

    /// A session that is lost holds every I/O until its timeout, and QEMU with it: it would not let go of the disk.
    /// When the storage host answers and still the session does not come back, its target is gone, and the session is
    /// ended first (F17). When the storage host is away, nobody knows, and nothing is taken away.
    async fn give_up_lost_session(
        &self,
        steps: &Steps,
        id: AttachmentId,
        attachment: &Attachment,
    ) -> Result<(), Failure> {
        let target = &attachment.connection.iscsi.target_iqn;
        let lost = || {
            Ok::<_, Failure>(match self.sysfs.find_session(target).map_err(unreadable)? {
                Some(session) if !session.logged_in().map_err(unreadable)? => Some(session),
                _ => None,
            })
        };
        let Some(session) = lost()? else { return Ok(()) };
        steps
            .run("end-lost-session", async {
                let back = || matches!(lost(), Ok(None)).then_some(());
                if self.events.subscribe().wait_until(RECOVERY_DEADLINE, back).await.is_some() {
                    return Ok(());
                }
                match iscsi::probe(&attachment.connection.iscsi.portals).await {
                    Ok(_) => {}
                    // The host answers on every portal, and says that nobody listens.
                    Err(error) if error.is_refused() => {}
                    Err(error) => {
                        let next = "the guest's last writes may still reach the storage: bring the storage host back, \
                                    then detach again";
                        return Err(Failure::from(error).next(next));
                    }
                }
                // open-iscsi tries again every few seconds; a target that is there has its session back by now.
                if self.events.subscribe().wait_until(RECOVERY_DEADLINE, back).await.is_some() {
                    return Ok(());
                }
                if buffered(attachment.options.cache) && attachment.plan.is_some() {
                    return Err(Failure::new(
                        Reason::FlushFailed,
                        format!("target {target} is gone, and the host may hold writes that are not on the storage"),
                    )
                    .next(format!(
                        "bring the target back, then detach again; or give those writes up: on the compute host \
                         iscsiadm -m session -r {} -u, then tether detach {id}",
                        session.number()
                    )));
                }
                // With cache none or directsync the host holds nothing back: what the guest was told is written is on
                // the storage host, and what was not, the guest is told now.
                tracing::warn!(%target, "the target is gone: its session ends before the guest lets go");
                self.log_out(attachment, &session).await
            })
            .await
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
        let path = device::stable_path(&self.by_id, attachment.connection.iscsi.wwn).display().to_string();
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
                return self.check_unused(attachment, &views, &path).map(|()| was_plugged);
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
    fn check_unused(&self, attachment: &Attachment, views: &Views, path: &str) -> Result<(), Failure> {
        if !views.uses(path) {
            return Ok(());
        }
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

    async fn disconnect(
        &self,
        steps: &Steps,
        attachment: &Attachment,
        was_plugged: bool,
    ) -> Result<(), Failure> {
        let target = &attachment.connection.iscsi.target_iqn;
        if was_plugged
            && buffered(attachment.options.cache)
            && self.sysfs.find_session(target).map_err(unreadable)?.is_none()
        {
            tracing::error!(%target, "the session was ended before the flush: writes that the host held are lost");
        }
        while let Some(session) = self.sysfs.find_session(target).map_err(unreadable)? {
            if !session.logged_in().map_err(unreadable)? {
                return Err(Failure::new(
                    Reason::FlushFailed,
                    format!("the session to {target} was lost meanwhile"),
                )
                .at("flush")
                .next("detach again"));
            }
            self.remove_disk(steps, attachment, &session, was_plugged).await?;
            steps.run("logout", self.log_out(attachment, &session)).await?;
        }
        let (nodes, target) = (self.nodes.clone(), target.clone());
        steps.run_blocking("delete-node-record", move || node_record::delete(&nodes, &target).map(drop)).await
    }

    /// Flushes what a domain may have written, and takes the disk off the host.
    async fn remove_disk(
        &self,
        steps: &Steps,
        attachment: &Attachment,
        session: &Session,
        was_plugged: bool,
    ) -> Result<(), Failure> {
        let Some(disk) = session.disk().map_err(unreadable)? else { return Ok(()) };
        let what = format!("disk {disk} of {}", attachment.domain_name);
        if was_plugged {
            let flush = blocking(FLUSH_DEADLINE, move || {
                device::flush(&disk).map_err(|error| Failure::from_error(Reason::FlushFailed, &error))
            });
            steps
                .run("flush", async {
                    flush.await.map_err(|failure| Failure { reason: Reason::FlushFailed, ..failure })
                })
                .await?;
        }
        let mut events = self.events.subscribe();
        let removed = session.clone();
        steps
            .run("remove-device", async {
                blocking(EVENT_DEADLINE, move || device::remove(&removed)).await?;
                let gone = || session.lun_folder().try_exists().is_ok_and(|exists| !exists).then_some(());
                events
                    .wait_until(EVENT_DEADLINE, gone)
                    .await
                    .ok_or_else(|| Failure::new(Reason::StillThere, format!("{what} did not go away")))
            })
            .await
    }

    async fn log_out(&self, attachment: &Attachment, session: &Session) -> Result<(), Failure> {
        let target = &attachment.connection.iscsi.target_iqn;
        let mut events = self.events.subscribe();
        iscsi::logout(target, session).await?;
        let gone = || session.exists().is_ok_and(|exists| !exists).then_some(());
        events.wait_until(EVENT_DEADLINE, gone).await.ok_or_else(|| {
            Failure::new(
                Reason::StillThere,
                format!("{} to {target} is still there after the logout", session.name),
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
