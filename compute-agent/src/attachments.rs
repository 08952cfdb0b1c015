//! The engine of attachments: what all verbs share. Attach's order of steps is in `attach`, Detach's and the undo's in
//! `detach`, ResizeAttachment's in `resize`; how a volume comes to this host and leaves it is in `over_iscsi` and
//! `over_nfs`. Nobody else knows an order.
//!
//! Each Attach, Detach and ResizeAttachment is a task of its own under the attachment's id (`Operations`). The journal says what an
//! attachment is to be; sysfs and libvirt say what is. Two attachments meet only at their domain, for the time of a
//! call (`Libvirt::turn`), at their share while it is mounted or unmounted (`Mounts::turn`), and in open-iscsi's database,
//! whose own lock is theirs to wait for; nothing is locked host-wide (F23, F28).
//!
//! Phases of a record: `attaching` (side effects may have begun) → `attached` → `detaching` → `ended` (a tombstone).
//! A failed attach that was undone leaves no record; one that could not be undone stays `attaching`, and a retry of
//! Attach or a Detach goes on from there.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tether_agent_core::failure::{Failure, Reason};
use tether_agent_core::journal::Journal;
use tether_agent_core::operations::Operations;
use tether_agent_core::reconcile::TombstoneDays;
use tether_agent_core::steps::Steps;
use tether_proto::wire::{self, OperationReport};
use tether_proto::{AttachmentId, ByteSize, ConnectionInfo, Connector, DiskOptions, DomainName, Transport};
use tokio::sync::OnceCell;

use crate::config::Config;
use crate::connector;
use crate::hypervisor::domain_xml::{DomainView, DomainXmlError, alias_of};
use crate::hypervisor::libvirt::{DomainState, Libvirt};
use crate::initiator::session::Sysfs;
use crate::initiator::{device, iscsi, node_record};
use crate::kernel_events::KernelEvents;
use crate::mount::{Mounts, State};
use crate::record::{Attachment, AttachmentRecord, Phase};

/// How long a connector waits for the hypervisor's versions: they are nice to know, and no more.
const VERSIONS_DEADLINE: Duration = Duration::from_secs(3);

/// All attachments of this agent.
pub(crate) struct Attachments {
    pub(crate) journal: Arc<Journal<AttachmentRecord>>,
    operations: Operations,
    pub(crate) libvirt: Libvirt,
    pub(crate) events: KernelEvents,
    pub(crate) sysfs: Sysfs,
    pub(crate) nodes: PathBuf,
    pub(crate) by_id: PathBuf,
    pub(crate) mounts: Mounts,
    pub(crate) guest_deadline: Duration,
    pub(crate) tombstones: TombstoneDays,
    claims: Mutex<HashMap<String, AttachmentId>>,
    mount_users: Mutex<HashMap<PathBuf, BTreeSet<AttachmentId>>>,
    held_disks: Mutex<HashMap<AttachmentId, File>>,
    iscsi_version: OnceCell<String>,
}

/// The two faces of a domain, parsed.
pub(crate) struct Views {
    pub(crate) live: Option<DomainView>,
    pub(crate) persistent: Option<DomainView>,
}

impl From<DomainXmlError> for Failure {
    fn from(error: DomainXmlError) -> Self {
        Failure::from_error(Reason::DomainUnsuitable, &error)
            .next("see the domain's XML: virsh dumpxml DOMAIN")
    }
}

impl Views {
    /// Parses what libvirt has.
    pub(crate) fn of(state: &DomainState) -> Result<Self, Failure> {
        let parse = |xml: &Option<String>| xml.as_deref().map(DomainView::parse).transpose();
        Ok(Self { live: parse(&state.live)?, persistent: parse(&state.persistent)? })
    }

    /// Is the attachment's disk in the running domain?
    pub(crate) fn in_live(&self, id: AttachmentId) -> bool {
        self.live.as_ref().is_some_and(|view| view.disk_by_alias(&alias_of(id)).is_some())
    }

    /// Does any disk of the domain lead to the device, under whatever alias?
    pub(crate) fn uses(&self, device_path: &str) -> bool {
        let uses =
            |view: &DomainView| view.disks.iter().any(|disk| disk.source.as_deref() == Some(device_path));
        self.live.as_ref().is_some_and(uses) || self.persistent.as_ref().is_some_and(uses)
    }

    /// Is it in the definition?
    pub(crate) fn in_persistent(&self, id: AttachmentId) -> bool {
        self.persistent.as_ref().is_some_and(|view| view.disk_by_alias(&alias_of(id)).is_some())
    }
}

impl Attachments {
    /// Opens the journal and the sources of events. libvirt is reached at the first call that needs it.
    ///
    /// # Errors
    /// When the journal or a source of events cannot be opened.
    pub(crate) fn open(config: &Config) -> Result<Self, Failure> {
        let events = KernelEvents::open().map_err(|error| {
            Failure::new(Reason::Internal, format!("the kernel's events cannot be read: {error}"))
        })?;
        // Before the journal: who makes the state directory decides who may pass through it, and QEMU must.
        let operations = Operations::default();
        let mounts = Mounts::open(&config.state_directory, &config.nfs, operations.stuck().clone())?;
        let journal = Journal::<AttachmentRecord>::open(&config.state_directory.join("attachments"))?;
        let mut claims = HashMap::new();
        let mut mount_users = HashMap::<PathBuf, BTreeSet<AttachmentId>>::new();
        for record in journal.list() {
            if let Some(mount) = record.attachment.as_ref().and_then(|attachment| attachment.mount.as_ref()) {
                mount_users.entry(mount.directory.clone()).or_default().insert(record.id);
            }
            for claim in record.attachment.iter().flat_map(Attachment::claims) {
                claims.insert(claim, record.id);
            }
        }
        Ok(Self {
            journal: Arc::new(journal),
            operations,
            libvirt: Libvirt::new(&config.libvirt_uri)?,
            events,
            sysfs: Sysfs::at("/sys"),
            nodes: node_record::NODE_DIRECTORY.into(),
            by_id: device::BY_ID.into(),
            mounts,
            guest_deadline: Duration::from_millis(config.guest_deadline_milliseconds),
            tombstones: config.tombstone_days,
            claims: Mutex::new(claims),
            mount_users: Mutex::new(mount_users),
            held_disks: Mutex::default(),
            iscsi_version: OnceCell::new(),
        })
    }

    /// The operations under way, for those who watch.
    pub(crate) fn operations(&self) -> &Operations {
        &self.operations
    }

    /// What this host tells about itself.
    pub(crate) async fn connector(&self) -> Result<Connector, Failure> {
        let version = async || iscsi::version().await.ok_or(());
        let iscsi_version = self.iscsi_version.get_or_try_init(version).await.ok();
        connector::read(iscsi_version.cloned(), self.libvirt.versions(VERSIONS_DEADLINE).await)
    }

    /// Plugs an export into a domain.
    pub(crate) async fn attach(
        self: &Arc<Self>,
        id: AttachmentId,
        domain: DomainName,
        connection: ConnectionInfo,
        options: DiskOptions,
    ) -> Result<(wire::AttachmentStatus, OperationReport), Failure> {
        // Debug shows no secret; another secret means another export, and so another target.
        let request = format!("{domain} {connection:?} {options:?}");
        let this = self.clone();
        self.operations
            .run(&id.to_string(), "attach", request, move |steps| async move {
                let (outcome, status) = this.do_attach(&steps, id, domain, connection, options).await?;
                Ok((status, steps.report(outcome)))
            })
            .await
    }

    /// Unplugs and disconnects.
    pub(crate) async fn detach(
        self: &Arc<Self>,
        id: AttachmentId,
        guest_deadline: Option<Duration>,
        force: bool,
    ) -> Result<(OperationReport, Vec<String>), Failure> {
        let this = self.clone();
        let guest_deadline = guest_deadline.unwrap_or(self.guest_deadline);
        let request = if force { "force" } else { "" };
        self.operations
            .run(&id.to_string(), "detach", request.to_owned(), move |steps| async move {
                let (outcome, may_be_lost) = this.do_detach(&steps, id, guest_deadline, force).await?;
                Ok((steps.report(outcome), may_be_lost))
            })
            .await
    }

    /// Tells the guest that its volume is larger.
    pub(crate) async fn resize(
        self: &Arc<Self>,
        id: AttachmentId,
        size: ByteSize,
    ) -> Result<(wire::AttachmentStatus, OperationReport), Failure> {
        let this = self.clone();
        self.operations
            .run(&id.to_string(), "resize", size.bytes().to_string(), move |steps| async move {
                let (outcome, status) = this.do_resize(&steps, id, size).await?;
                Ok((status, steps.report(outcome)))
            })
            .await
    }

    /// One attachment; of one that has ended there is only the phase.
    pub(crate) async fn get(&self, id: AttachmentId) -> Result<wire::AttachmentStatus, Failure> {
        let Some(record) = self.journal.get(&id.to_string()) else {
            return Err(Failure::new(
                Reason::AttachmentNotFound,
                format!("attachment {id} is not on this host"),
            )
            .at("find-attachment"));
        };
        let Some(attachment) = &record.attachment else {
            let phase = record.phase.as_str().to_owned();
            let (attachment_id, may_be_lost) = (id.to_string(), record.may_be_lost);
            return Ok(wire::AttachmentStatus { attachment_id, phase, may_be_lost, ..Default::default() });
        };
        let views = self.views_of(attachment).await?;
        self.status(id, record.phase, attachment, &views)
    }

    /// What is recorded of an attachment that has not ended.
    pub(crate) fn recorded(&self, id: AttachmentId) -> Option<Attachment> {
        self.journal.get(&id.to_string())?.attachment
    }

    /// All attachments that have not ended, by id. Each domain is read once.
    pub(crate) async fn list(&self) -> Result<Vec<wire::AttachmentStatus>, Failure> {
        let mut domains: HashMap<uuid::Uuid, Views> = HashMap::new();
        let mut statuses = Vec::new();
        for record in self.journal.list() {
            let Some(attachment) = &record.attachment else { continue };
            let views = match domains.entry(attachment.domain_uuid) {
                Entry::Occupied(entry) => entry.into_mut(),
                Entry::Vacant(entry) => entry.insert(match self.views_of(attachment).await {
                    // One domain that nobody understands hides no other.
                    Err(failure) if failure.reason == Reason::DomainUnsuitable => {
                        tracing::warn!(domain = %attachment.domain_name, error = %failure, "its XML cannot be read");
                        Views { live: None, persistent: None }
                    }
                    views => views?,
                }),
            };
            statuses.push(self.status(record.id, record.phase, attachment, views)?);
        }
        Ok(statuses)
    }

    /// A domain that was undefined meanwhile has nothing of ours.
    pub(crate) async fn views_of(&self, attachment: &Attachment) -> Result<Views, Failure> {
        match self.libvirt.get(attachment.domain_uuid).await {
            Ok(state) => Views::of(&state),
            Err(crate::hypervisor::libvirt::LibvirtError::NoDomain { .. }) => {
                Ok(Views { live: None, persistent: None })
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Puts a record on disk.
    pub(crate) async fn write(
        &self,
        steps: &Steps,
        step: &'static str,
        record: &AttachmentRecord,
    ) -> Result<(), Failure> {
        let (journal, record) = (self.journal.clone(), record.clone());
        steps.run_blocking(step, move || journal.put(&record.id.to_string(), &record)).await
    }

    /// Takes the target and the volume for one attachment: two on one host would share a session, or have two devices
    /// with one WWN.
    pub(crate) fn claim(&self, id: AttachmentId, attachment: &Attachment) -> Result<(), Failure> {
        let mut claims = self.claims.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = attachment.claims();
        if let Some((what, other)) =
            wanted.iter().find_map(|claim| Some((claim, *claims.get(claim).filter(|other| **other != id)?)))
        {
            return Err(Failure::new(
                Reason::TargetAttached,
                format!("{what} is attached on this host already, by attachment {other}"),
            )
            .at("validate"));
        }
        claims.extend(wanted.into_iter().map(|claim| (claim, id)));
        Ok(())
    }

    /// A damaged file may be the record of any attachment that we do not know: until somebody has looked, none of those is
    /// taken for new or for gone.
    pub(crate) fn check_journal(&self, whose: &str) -> Result<(), Failure> {
        let Some(file) = self.journal.damaged().first() else { return Ok(()) };
        Err(Failure::new(
            Reason::JournalFailed,
            format!("the journal has a damaged file, {}, which may be {whose}", file.display()),
        )
        .next("repair the file or, when its disk is in no domain and its session is gone, delete it; then restart the agent"))
    }

    /// The path of the volume on this host, as it is in domain XML; nothing before a server was chosen.
    pub(crate) fn source_path(&self, attachment: &Attachment) -> Option<String> {
        let path = match &attachment.connection.transport {
            Transport::Iscsi(iscsi) => device::stable_path(&self.by_id, iscsi.wwn),
            Transport::Nfs(nfs) => attachment.mount.as_ref()?.directory.join(nfs.file.as_str()),
        };
        Some(path.display().to_string())
    }

    /// Gives back what an attachment had.
    pub(crate) fn release(&self, id: AttachmentId) {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner).retain(|_, holder| *holder != id);
        self.mount_users().retain(|_, users| {
            users.remove(&id);
            !users.is_empty()
        });
        self.held_disks().remove(&id);
    }

    /// Disks that are held open until they are flushed.
    pub(crate) fn held_disks(&self) -> MutexGuard<'_, HashMap<AttachmentId, File>> {
        // Each change is one insert or remove; a panic elsewhere cannot leave it half done.
        self.held_disks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Who uses which mount, as the journal has it: those of domains that are shut off, too (F19).
    pub(crate) fn mount_users(&self) -> MutexGuard<'_, HashMap<PathBuf, BTreeSet<AttachmentId>>> {
        // Each change is one insert or remove; a panic elsewhere cannot leave it half done.
        self.mount_users.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is recorded, and what kernel and libvirt say of it.
    pub(crate) fn status(
        &self,
        id: AttachmentId,
        phase: Phase,
        attachment: &Attachment,
        views: &Views,
    ) -> Result<wire::AttachmentStatus, Failure> {
        let connection = &attachment.connection;
        let (mut target_iqn, mut portal, mut share) = (String::new(), None, String::new());
        let connected = match &connection.transport {
            Transport::Iscsi(iscsi) => {
                target_iqn = iscsi.target_iqn.to_string();
                match self.sysfs.find_session(&iscsi.target_iqn).map_err(unreadable)? {
                    Some(session) => {
                        portal = session.portal().map_err(unreadable)?;
                        session.logged_in().map_err(unreadable)?
                            && session.disk().map_err(unreadable)?.is_some()
                    }
                    None => false,
                }
            }
            Transport::Nfs(_) => match &attachment.mount {
                Some(mount) => {
                    share.clone_from(&mount.share);
                    matches!(self.mounts.state(mount)?, State::Mounted { .. })
                }
                None => false,
            },
        };
        let plan = attachment.plan.as_ref();
        Ok(wire::AttachmentStatus {
            attachment_id: id.to_string(),
            domain: attachment.domain_name.clone(),
            domain_uuid: attachment.domain_uuid.to_string(),
            phase: phase.as_str().to_owned(),
            device_path: plan.map(|plan| plan.device_path.clone()).unwrap_or_default(),
            target_device: plan.map(|plan| plan.target_device.to_string()).unwrap_or_default(),
            bus: wire::DiskBus::from(attachment.options.bus).into(),
            serial: attachment.serial().to_string(),
            size_bytes: connection.size.bytes(),
            target_iqn,
            portal: portal.map(|portal| portal.to_string()).unwrap_or_default(),
            connected,
            in_live_domain: views.in_live(id),
            in_persistent_definition: views.in_persistent(id),
            transport: wire::Transport::from(&connection.transport).into(),
            share,
            format: wire::VolumeFormat::from(connection.transport.format()).into(),
            may_be_lost: Vec::new(),
        })
    }
}

/// sysfs does not say what is there.
pub(crate) fn unreadable(error: std::io::Error) -> Failure {
    Failure::new(Reason::InitiatorFailed, format!("sysfs cannot be read: {error}"))
        .next("see the agent's limits and the kernel's log on the compute host: journalctl -k")
}
