//! The engine of attachments: what both verbs share. Attach's order of steps is in `attach`, Detach's and the undo's in
//! `detach`; nobody else knows an order.
//!
//! Each Attach and Detach is a task of its own under the attachment's id (`Operations`). The journal says what an
//! attachment is to be; sysfs and libvirt say what is. Two attachments meet only at their domain, for the time of a
//! call (`Libvirt::turn`), and in open-iscsi's database, whose own lock is theirs to wait for; nothing is locked
//! host-wide (F23, F28).
//!
//! Phases of a record: `attaching` (side effects may have begun) → `attached` → `detaching` → `ended` (a tombstone).
//! A failed attach that was undone leaves no record; one that could not be undone stays `attaching`, and a retry of
//! Attach or a Detach goes on from there.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tether_agent_core::failure::{Failure, Reason};
use tether_agent_core::journal::Journal;
use tether_agent_core::operations::{Operations, Steps};
use tether_proto::wire::{self, OperationReport};
use tether_proto::{AttachmentId, ConnectionInfo, Connector, DiskOptions, DomainName};
use tokio::sync::OnceCell;

use crate::config::Config;
use crate::connector;
use crate::hypervisor::domain_xml::{DomainView, DomainXmlError, alias_of};
use crate::hypervisor::libvirt::{DomainState, Libvirt};
use crate::initiator::session::Sysfs;
use crate::initiator::{device, iscsi, node_record};
use crate::kernel_events::KernelEvents;
use crate::record::{Attachment, AttachmentRecord, Phase};

/// All attachments of this agent.
pub(crate) struct Attachments {
    pub(crate) journal: Arc<Journal<AttachmentRecord>>,
    operations: Operations,
    pub(crate) libvirt: Libvirt,
    pub(crate) events: KernelEvents,
    pub(crate) sysfs: Sysfs,
    pub(crate) nodes: PathBuf,
    pub(crate) by_id: PathBuf,
    pub(crate) guest_deadline: Duration,
    iscsi_version: OnceCell<Option<String>>,
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
        Ok(Self {
            journal: Arc::new(Journal::open(&config.state_directory.join("attachments"))?),
            operations: Operations::default(),
            libvirt: Libvirt::new(&config.libvirt_uri)?,
            events,
            sysfs: Sysfs::at("/sys"),
            nodes: node_record::NODE_DIRECTORY.into(),
            by_id: device::BY_ID.into(),
            guest_deadline: Duration::from_millis(config.guest_deadline_milliseconds),
            iscsi_version: OnceCell::new(),
        })
    }

    /// The operations under way, for those who watch.
    pub(crate) fn operations(&self) -> &Operations {
        &self.operations
    }

    /// What this host tells about itself.
    pub(crate) async fn connector(&self) -> Result<Connector, Failure> {
        let iscsi_version = self.iscsi_version.get_or_init(iscsi::version).await;
        connector::read(iscsi_version.clone(), self.libvirt.versions().await)
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
                let outcome = this.do_attach(&steps, id, domain, connection, options).await?;
                let report = steps.report(outcome);
                Ok((this.get(id).await?, report))
            })
            .await
    }

    /// Unplugs and disconnects.
    pub(crate) async fn detach(
        self: &Arc<Self>,
        id: AttachmentId,
        guest_deadline: Option<Duration>,
    ) -> Result<OperationReport, Failure> {
        let this = self.clone();
        let guest_deadline = guest_deadline.unwrap_or(self.guest_deadline);
        self.operations
            .run(&id.to_string(), "detach", String::new(), move |steps| async move {
                let outcome = this.do_detach(&steps, id, guest_deadline).await?;
                Ok(steps.report(outcome))
            })
            .await
    }

    /// One attachment that has not ended.
    pub(crate) async fn get(&self, id: AttachmentId) -> Result<wire::AttachmentStatus, Failure> {
        let record = self.journal.get(&id.to_string());
        let Some((phase, attachment)) = record.and_then(live_record) else {
            return Err(Failure::new(
                Reason::AttachmentNotFound,
                format!("attachment {id} is not on this host"),
            ));
        };
        let views = self.views_of(&attachment).await?;
        Ok(self.status(id, phase, &attachment, &views))
    }

    /// All attachments that have not ended, by id. Each domain is read once.
    pub(crate) async fn list(&self) -> Result<Vec<wire::AttachmentStatus>, Failure> {
        let mut domains: HashMap<uuid::Uuid, Views> = HashMap::new();
        let mut statuses = Vec::new();
        for record in self.journal.list() {
            let id = record.id;
            let Some((phase, attachment)) = live_record(record) else { continue };
            let views = match domains.entry(attachment.domain_uuid) {
                Entry::Occupied(entry) => entry.into_mut(),
                Entry::Vacant(entry) => entry.insert(self.views_of(&attachment).await?),
            };
            statuses.push(self.status(id, phase, &attachment, views));
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

    fn status(
        &self,
        id: AttachmentId,
        phase: Phase,
        attachment: &Attachment,
        views: &Views,
    ) -> wire::AttachmentStatus {
        let connection = &attachment.connection;
        let session = self.sysfs.find_session(&connection.iscsi.target_iqn);
        let plan = attachment.plan.as_ref();
        wire::AttachmentStatus {
            attachment_id: id.to_string(),
            domain: attachment.domain_name.clone(),
            domain_uuid: attachment.domain_uuid.to_string(),
            phase: phase.as_str().to_owned(),
            device_path: plan.map(|plan| plan.device_path.clone()).unwrap_or_default(),
            target_device: plan.map(|plan| plan.target_device.to_string()).unwrap_or_default(),
            bus: wire::DiskBus::from(attachment.options.bus).into(),
            serial: attachment.serial().to_string(),
            size_bytes: connection.size.bytes(),
            target_iqn: connection.iscsi.target_iqn.to_string(),
            portal: attachment.portal.map(|portal| portal.to_string()).unwrap_or_default(),
            connected: session.is_some_and(|session| session.logged_in()),
            in_live_domain: views.in_live(id),
            in_persistent_definition: views.in_persistent(id),
        }
    }
}

fn live_record(record: AttachmentRecord) -> Option<(Phase, Attachment)> {
    let attachment = record.attachment.filter(|_| record.phase != Phase::Ended)?;
    Some((record.phase, attachment))
}
