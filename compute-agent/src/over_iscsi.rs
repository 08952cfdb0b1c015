//! What Attach, Detach and ResizeAttachment do for a volume over iSCSI: the order of connecting (node record, login, scan,
//! verify) and of disconnecting (flush, device, session, record), each observed (F15). Not here: the domain (`attach`,
//! `detach`, `resize`), and how each single thing is done (`initiator`).

use std::path::Path;
use std::time::Duration;

use tether_agent_core::failure::{Failure, Reason};
use tether_agent_core::force::Force;
use tether_agent_core::steps::{KERNEL_DEADLINE, Steps, blocking};
use tether_proto::{AttachmentId, ByteSize, IscsiConnection};

use crate::attach::{HostDisk, Known};
use crate::attachments::{Attachments, unreadable};
use crate::detach::{buffered, lost_by_flush};
use crate::hypervisor::domain_xml::DiskKind;
use crate::initiator::iscsi::IscsiError;
use crate::initiator::session::Session;
use crate::initiator::{device, iscsi, node_record};
use crate::record::Attachment;
use crate::sizes::Sizes;

/// How long the kernel and udev may take to show that a disk, its names or a session have come or gone, each.
const EVENT_DEADLINE: Duration = Duration::from_secs(30);
/// How long the host's cache may take to reach the storage host.
const FLUSH_DEADLINE: Duration = Duration::from_secs(60);
/// How long a lost session may take to come back before it is looked into.
const RECOVERY_DEADLINE: Duration = Duration::from_secs(8);
/// How long it may take while its storage host answers: one that was just started answers before all of its targets are back, and
/// tries those again after 15 s that it could not bring back at once.
const TARGET_DEADLINE: Duration = Duration::from_secs(30);

impl Attachments {
    /// A target that open-iscsi knows before we ever used it is somebody else's, whatever its name (rule 6).
    pub(crate) fn check_nobody_elses(&self, iscsi: &IscsiConnection) -> Result<(), Failure> {
        let target = &iscsi.target_iqn;
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

    /// A session, its disk, and the disk's stable name, compared with what the storage host said.
    pub(crate) async fn connect_iscsi(
        &self,
        steps: &Steps,
        id: AttachmentId,
        attachment: &Attachment,
        iscsi: &IscsiConnection,
        known: Known,
    ) -> Result<HostDisk, Failure> {
        let (session, connected) = self.session(steps, id, attachment, iscsi, known).await?;
        let disk = match session.disk().map_err(unreadable)? {
            Some(disk) => disk,
            // A scan would bring a new device; QEMU holds on to the old one, which is dead.
            None if known.in_live => return Err(dead_disk(id, attachment, "that is gone").at("scan")),
            None => self.find_disk(steps, &session).await?,
        };
        let (wwn, sizes) = (iscsi.wwn, known.sizes(attachment.connection.size));
        let (sysfs, verified, name) = (self.sysfs.clone(), session, disk.clone());
        let size = steps
            .run_blocking("verify-device", move || device::verify(&sysfs, &verified, &name, wwn, sizes))
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
        Ok(HostDisk { path: path.display().to_string(), kind: DiskKind::Block, size, connected })
    }

    /// A session to the target: the one that is there and ours, or a new one. True when it is new.
    async fn session(
        &self,
        steps: &Steps,
        id: AttachmentId,
        attachment: &Attachment,
        iscsi: &IscsiConnection,
        known: Known,
    ) -> Result<(Session, bool), Failure> {
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
            return Err(dead_disk(id, attachment, "of a session that has ended").at("login"));
        }
        let portal = steps.run("probe-portals", iscsi::probe(&iscsi.portals)).await?;
        let (nodes, connection) = (self.nodes.clone(), iscsi.clone());
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

    /// The disk behind a session that shows none yet.
    async fn find_disk(&self, steps: &Steps, session: &Session) -> Result<String, Failure> {
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

    /// The disk has the volume's new size: the kernel asks the target again. Returns the size that it has then.
    pub(crate) async fn rescan(
        &self,
        steps: &Steps,
        attachment: &Attachment,
        iscsi: &IscsiConnection,
        size: ByteSize,
    ) -> Result<ByteSize, Failure> {
        let target = &iscsi.target_iqn;
        let lost = || {
            Failure::new(Reason::PortalUnreachable, format!("the session to {target} is lost"))
                .at("rescan-device")
        };
        let session = self.sysfs.find_session(target).map_err(unreadable)?.ok_or_else(lost)?;
        if !session.logged_in().map_err(unreadable)? {
            return Err(lost());
        }
        let Some(disk) = session.disk().map_err(unreadable)? else { return Err(lost()) };
        let sizes = Sizes { any_of: [size, attachment.connection.size], or_larger: false };
        let (sysfs, wwn) = (self.sysfs.clone(), iscsi.wwn);
        steps
            .run_blocking("rescan-device", move || {
                device::rescan(&session)?;
                device::verify(&sysfs, &session, &disk, wwn, sizes)
            })
            .await
    }

    /// A session that is lost holds every I/O until its timeout, and QEMU with it: it would not let go of the disk.
    /// When the storage host answers and still the session does not come back, its target is gone, and the session is
    /// ended first (F17). When the storage host is away, nobody knows, and nothing is taken away.
    pub(crate) async fn give_up_lost_session(
        &self,
        steps: &Steps,
        id: AttachmentId,
        attachment: &Attachment,
        iscsi: &IscsiConnection,
    ) -> Result<(), Failure> {
        let target = &iscsi.target_iqn;
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
                // open-iscsi tries the portal of the session and no other: that another answers says nothing of this path.
                let own = session.portal().map_err(unreadable)?;
                let asked = own.map_or_else(|| iscsi.portals.clone(), |portal| vec![portal]);
                match iscsi::probe(&asked).await {
                    Ok(_) => {}
                    // The host answers, and says that nobody listens.
                    Err(error) if error.is_refused() => {}
                    Err(error) => {
                        let next = "the guest's last writes may still reach the storage: bring the storage host back, \
                                    then detach again";
                        return Err(Failure::from(error).next(next));
                    }
                }
                // open-iscsi tries again every few seconds; a target that is there has its session back by then.
                if self.events.subscribe().wait_until(TARGET_DEADLINE, back).await.is_some() {
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
                self.log_out(iscsi, &session).await
            })
            .await
    }

    /// Flushes, takes the disk off the host, logs out and forgets.
    pub(crate) async fn disconnect_iscsi(
        &self,
        steps: &Steps,
        id: AttachmentId,
        attachment: &Attachment,
        iscsi: &IscsiConnection,
        was_plugged: bool,
        force: &mut Force,
    ) -> Result<(), Failure> {
        let target = &iscsi.target_iqn;
        if was_plugged
            && buffered(attachment.options.cache)
            && self.sysfs.find_session(target).map_err(unreadable)?.is_none()
        {
            tracing::error!(%target, "the session was ended before the flush: writes that the host held are lost");
        }
        let mut seen = false;
        while let Some(session) = self.sysfs.find_session(target).map_err(unreadable)? {
            seen = true;
            let ready = if session.logged_in().map_err(unreadable)? {
                let flushed = match was_plugged {
                    true => self.flush_disk(steps, id, attachment, &session, force).await,
                    false => Ok(()),
                };
                match flushed {
                    Ok(()) => self.remove_disk(steps, attachment, &session).await,
                    Err(failure) => Err(failure),
                }
            } else {
                Err(Failure::new(Reason::FlushFailed, format!("the session to {target} is lost"))
                    .at("flush")
                    .next("detach again"))
            };
            force.pass(ready, (), "what this host had not written to the storage is lost")?;
            steps.run("logout", self.log_out(iscsi, &session)).await?;
        }
        if !seen {
            // An iscsiadm outlives the agent that started it, and may bring a session that nobody would know.
            let asked = target.clone();
            let at_work = blocking(KERNEL_DEADLINE, move || {
                Ok::<_, Failure>(iscsi::at_work_on(Path::new("/proc"), &asked))
            });
            if let Some(pid) = at_work.await? {
                let message = format!("iscsiadm, process {pid}, still logs in to {target}");
                return Err(Failure::new(Reason::OutcomeUnknown, message)
                    .at("logout")
                    .next("call again when it has ended; never kill it: its lock would stay"));
            }
        }
        self.delete_node_record(steps, iscsi).await
    }

    /// Has the disk held open until it is flushed, unless it does not answer.
    pub(crate) async fn hold_disk(&self, id: AttachmentId, iscsi: &IscsiConnection) {
        if self.held_disks().contains_key(&id) {
            return;
        }
        let Ok(Some(session)) = self.sysfs.find_session(&iscsi.target_iqn) else { return };
        // One that is being recovered lets nobody open its disk.
        if !session.logged_in().is_ok_and(|logged_in| logged_in) {
            return;
        }
        let Ok(Some(disk)) = session.disk() else { return };
        let open =
            move || device::open(&disk).map_err(|error| Failure::from_error(Reason::DeviceMissing, &error));
        match blocking(KERNEL_DEADLINE, open).await {
            Ok(file) => drop(self.held_disks().insert(id, file)),
            Err(error) => {
                tracing::warn!(%error, "not held open: its flush may not hear of what QEMU's own finds")
            }
        }
    }

    /// Flushes what a domain may have written. The kernel tells a failure once, so that it is kept for whoever tries again.
    async fn flush_disk(
        &self,
        steps: &Steps,
        id: AttachmentId,
        attachment: &Attachment,
        session: &Session,
        force: &mut Force,
    ) -> Result<(), Failure> {
        let Some(disk) = session.disk().map_err(unreadable)? else { return Ok(()) };
        let held = self.held_disks().remove(&id);
        // Not entered as STUCK: a detach by force may go on while this one still waits for a storage host that is gone.
        let flush = blocking(FLUSH_DEADLINE, move || {
            device::flush(&disk, held).map_err(|error| Failure::from_error(Reason::FlushFailed, &error))
        });
        let flushed = steps
            .run("flush", async {
                flush.await.map_err(|failure| Failure { reason: Reason::FlushFailed, ..failure })
            })
            .await;
        if let Err(failure) = &flushed {
            lost_by_flush(attachment, failure, force);
        }
        flushed
    }

    /// Takes the disk off the host.
    async fn remove_disk(
        &self,
        steps: &Steps,
        attachment: &Attachment,
        session: &Session,
    ) -> Result<(), Failure> {
        let Some(disk) = session.disk().map_err(unreadable)? else { return Ok(()) };
        let what = format!("disk {disk} of {}", attachment.domain_name);
        let mut events = self.events.subscribe();
        let removed = session.clone();
        steps
            .run("remove-device", async {
                steps.block("remove-device", EVENT_DEADLINE, move || device::remove(&removed)).await?;
                let gone = || session.lun_folder().try_exists().is_ok_and(|exists| !exists).then_some(());
                events
                    .wait_until(EVENT_DEADLINE, gone)
                    .await
                    .ok_or_else(|| Failure::new(Reason::StillThere, format!("{what} did not go away")))
            })
            .await
    }

    async fn log_out(&self, iscsi: &IscsiConnection, session: &Session) -> Result<(), Failure> {
        let target = &iscsi.target_iqn;
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

    /// Takes the target out of open-iscsi's database.
    pub(crate) async fn delete_node_record(
        &self,
        steps: &Steps,
        iscsi: &IscsiConnection,
    ) -> Result<(), Failure> {
        let (nodes, target) = (self.nodes.clone(), iscsi.target_iqn.clone());
        steps.run_blocking("delete-node-record", move || node_record::delete(&nodes, &target).map(drop)).await
    }
}

/// The running domain has a device that is no more, and would not take another in its place.
fn dead_disk(id: AttachmentId, attachment: &Attachment, which: &str) -> Failure {
    let message = format!("domain {} still has the disk {which}", attachment.domain_name);
    Failure::new(Reason::DeviceInUse, message)
        .next(format!("detach it, then attach anew: tether detach {id}"))
}
