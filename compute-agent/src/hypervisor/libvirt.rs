//! libvirt: find a domain, read its XML, plug and unplug (rule 9: another domain never waits for a slow one).
//!
//! libvirt's calls block, so each runs on a blocking thread of its own with a deadline; they share one connection,
//! which libvirt multiplexes. One thread runs libvirt's event loop. A lock per domain keeps two attachments from
//! choosing the same place; it is held for one call or two, never while a guest thinks. Not here: what the XML says
//! (`domain_xml`) and the order of steps.

mod event_shim;

use std::sync::Arc;
use std::time::Duration;

use tether_agent_core::failure::{Failure, Reason};
use tether_agent_core::turns::{Turn, Turns};
use tether_proto::DomainName;
use tokio::sync::{Semaphore, broadcast};
use tokio::time::{Instant, timeout, timeout_at};
use uuid::Uuid;
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::ErrorNumber;
use virt::sys;

pub(crate) use event_shim::{DeviceEvent, DeviceWord};

/// How long one libvirt call may take.
const CALL_DEADLINE: Duration = Duration::from_secs(60);
/// How long opening a connection may take.
const OPEN_DEADLINE: Duration = Duration::from_secs(15);
/// How many calls may be under way: each has a thread, and a libvirtd that hangs must not have them all.
const CALLS: usize = 128;
/// How long an attachment waits for its turn at a domain.
const TURN_DEADLINE: Duration = Duration::from_secs(120);

/// Why libvirt did not do it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LibvirtError {
    /// libvirt cannot be reached.
    #[error("libvirt at {uri} cannot be reached: {message}")]
    Unavailable { uri: String, message: String },
    /// It knows no such domain.
    #[error("libvirt knows no domain {domain}")]
    NoDomain { domain: String },
    /// It refused.
    #[error("libvirt refused to {action}: {message}")]
    Refused { action: &'static str, message: String, code: ErrorNumber },
    /// It did not answer in time.
    #[error("libvirt did not {action} within {} s", within.as_secs())]
    Deadline { action: &'static str, within: Duration },
    /// Others were busy with the domain all the time.
    #[error("domain {domain} was busy for {} s", TURN_DEADLINE.as_secs())]
    Busy { domain: Uuid },
    /// Somebody else's job at the domain did not end.
    #[error("libvirt waited for another job at the domain: {message}")]
    Held { message: String },
}

impl From<LibvirtError> for Failure {
    fn from(error: LibvirtError) -> Self {
        let reason = match &error {
            LibvirtError::Unavailable { .. } | LibvirtError::Deadline { .. } => Reason::HypervisorUnavailable,
            LibvirtError::NoDomain { .. } => Reason::DomainNotFound,
            LibvirtError::Refused { .. } => Reason::HypervisorRefused,
            LibvirtError::Busy { .. } | LibvirtError::Held { .. } => Reason::DomainBusy,
        };
        Failure::from_error(reason, &error)
    }
}

/// A domain as libvirt has it now.
#[derive(Debug, Clone)]
pub(crate) struct DomainState {
    /// Its UUID, which stays when it is renamed.
    pub(crate) uuid: Uuid,
    /// Its name.
    pub(crate) name: String,
    /// The XML of the running domain; nothing when it is shut off.
    pub(crate) live: Option<String>,
    /// The XML of its definition; nothing when it is transient.
    pub(crate) persistent: Option<String>,
}

/// Which of a domain's two faces a change is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Affect {
    /// The running domain.
    pub(crate) live: bool,
    /// Its definition.
    pub(crate) persistent: bool,
}

impl Affect {
    fn flags(self) -> u32 {
        let live = if self.live { sys::VIR_DOMAIN_AFFECT_LIVE } else { 0 };
        let persistent = if self.persistent { sys::VIR_DOMAIN_AFFECT_CONFIG } else { 0 };
        live | persistent
    }
}

/// What became of an unplug.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unplug {
    /// libvirt said that the device is gone.
    Removed,
    /// The guest refused.
    Refused,
    /// The guest said nothing in time.
    Silent,
}

/// A connection over which libvirt tells what becomes of devices.
struct Listening {
    connection: Arc<Connect>,
    subscribed: Vec<i32>,
}

/// A way to libvirt.
#[derive(Clone)]
pub(crate) struct Libvirt {
    uri: String,
    connection: Arc<tokio::sync::Mutex<Option<Listening>>>,
    calls: Arc<Semaphore>,
    events: broadcast::Sender<DeviceEvent>,
    turns: Turns<Uuid>,
}

impl Libvirt {
    /// Starts libvirt's event loop; connects at the first call.
    ///
    /// # Errors
    /// When the event loop's thread cannot be started.
    pub(crate) fn new(uri: &str) -> Result<Self, Failure> {
        let fail = |error: &dyn std::fmt::Display| {
            Failure::new(
                Reason::HypervisorUnavailable,
                format!("libvirt's event loop cannot be started: {error}"),
            )
        };
        virt::error::clear_error_callback();
        virt::event::event_register_default_impl().map_err(|error| fail(&error))?;
        std::thread::Builder::new()
            .name("libvirt-events".into())
            .spawn(|| {
                while let Ok(()) = virt::event::event_run_default_impl() {}
                tracing::error!("libvirt's event loop ended; unplugs are seen by their deadline only");
            })
            .map_err(|error| fail(&error))?;
        let (events, _) = broadcast::channel(1024);
        Ok(Self {
            uri: uri.to_owned(),
            connection: Arc::default(),
            calls: Arc::new(Semaphore::new(CALLS)),
            events,
            turns: Turns::default(),
        })
    }

    /// Finds a domain by its name, or else by its UUID, with its XML.
    pub(crate) async fn find(&self, domain: &DomainName) -> Result<DomainState, LibvirtError> {
        let name = domain.as_str().to_owned();
        self.call("find the domain", move |connection| {
            let found = connection.lookup_domain_by_name(&name);
            let found = found.or_else(|error| match Uuid::parse_str(&name) {
                Ok(uuid) => connection.lookup_domain_by_uuid(uuid),
                Err(_) => Err(error),
            });
            state(&found?)
        })
        .await
        .map_err(|error| no_domain(error, domain.as_str()))
    }

    /// A domain by its UUID, with its XML.
    pub(crate) async fn get(&self, uuid: Uuid) -> Result<DomainState, LibvirtError> {
        self.call("read the domain", move |connection| state(&connection.lookup_domain_by_uuid(uuid)?))
            .await
            .map_err(|error| no_domain(error, &uuid.to_string()))
    }

    /// All domains with their XML, for somebody who asks what is on the host.
    pub(crate) async fn list(&self) -> Result<Vec<DomainState>, LibvirtError> {
        self.call("list the domains", move |connection| {
            // One that goes away meanwhile is none.
            let gone = |error: &virt::error::Error| {
                error.code().unwrap_or(ErrorNumber::InternalError) == ErrorNumber::NoDomain
            };
            let states = connection.list_all_domains(0)?.into_iter().map(|domain| state(&domain));
            states.filter(|state| !state.as_ref().is_err_and(gone)).collect()
        })
        .await
    }

    /// Waits for a turn at a domain. Two who choose a place in the same XML would choose the same one.
    pub(crate) async fn turn(&self, domain: Uuid) -> Result<Turn, LibvirtError> {
        self.turns.wait(domain, TURN_DEADLINE).await.ok_or(LibvirtError::Busy { domain })
    }

    /// Plugs a device in. libvirt does both faces or none. The turn is over when libvirt's call is, however long that
    /// takes: nobody chooses a place in the domain while this one may still be taken.
    pub(crate) async fn attach(
        &self,
        domain: Uuid,
        element: String,
        affect: Affect,
        turn: Turn,
    ) -> Result<Turn, LibvirtError> {
        self.call("attach the disk", move |connection| {
            connection.lookup_domain_by_uuid(domain)?.attach_device_flags(&element, affect.flags())?;
            Ok(turn)
        })
        .await
    }

    /// Tells the guest that a disk is larger, and gives the size that it has then, in bytes. QEMU grows a qcow2 file itself;
    /// a device or raw file must have the size already.
    pub(crate) async fn resize(
        &self,
        domain: Uuid,
        target_device: String,
        bytes: u64,
        turn: Turn,
    ) -> Result<u64, LibvirtError> {
        let device = target_device.clone();
        let turn = self
            .call("resize the disk", move |connection| {
                let domain = connection.lookup_domain_by_uuid(domain)?;
                domain.block_resize(&device, bytes, sys::VIR_DOMAIN_BLOCK_RESIZE_BYTES)?;
                Ok(turn)
            })
            .await?;
        self.call("read the disk's size", move |connection| {
            let domain = connection.lookup_domain_by_uuid(domain)?;
            let found = domain.block_info(&target_device, 0)?.capacity;
            drop(turn);
            Ok(found)
        })
        .await
    }

    /// Takes a device out of the definition.
    pub(crate) async fn detach_persistent(
        &self,
        domain: Uuid,
        alias: String,
        turn: Turn,
    ) -> Result<Turn, LibvirtError> {
        self.call("take the disk out of the definition", move |connection| {
            let domain = connection.lookup_domain_by_uuid(domain)?;
            event_shim::detach_alias(&domain, &alias, sys::VIR_DOMAIN_AFFECT_CONFIG)?;
            Ok(turn)
        })
        .await
    }

    /// Asks the guest to let go of a device and waits for libvirt's word on it. An unplug that is under way already
    /// is waited for and not asked for again (F30).
    pub(crate) async fn detach_live(
        &self,
        domain: Uuid,
        alias: &str,
        within: Duration,
    ) -> Result<Unplug, LibvirtError> {
        let deadline = Instant::now() + within;
        let mut events = self.events.subscribe();
        let wanted = alias.to_owned();
        let asked = self
            .call("unplug the disk", move |connection| {
                let domain = connection.lookup_domain_by_uuid(domain)?;
                event_shim::detach_alias(&domain, &wanted, sys::VIR_DOMAIN_AFFECT_LIVE)
            })
            .await;
        match asked {
            Ok(()) => {}
            Err(LibvirtError::Refused { message, .. })
                if message.contains("already in the process of unplug") =>
            {
                tracing::debug!(%domain, alias, "an unplug is under way already");
            }
            Err(LibvirtError::Refused { code: ErrorNumber::DeviceMissing, .. }) => {
                return Ok(Unplug::Removed);
            }
            // Whether it was asked is not known; asking again does no harm.
            Err(LibvirtError::Refused { code, message, .. }) if is_lost_connection(code) => {
                return Err(self.unavailable(&message));
            }
            Err(error) => return Err(error),
        }
        loop {
            match timeout_at(deadline, events.recv()).await {
                Ok(Ok(event)) if event.domain == domain && event.alias == alias => match event.word {
                    DeviceWord::Removed => return Ok(Unplug::Removed),
                    DeviceWord::Refused => return Ok(Unplug::Refused),
                    DeviceWord::IoError { .. } => {}
                },
                Ok(Ok(_)) => {}
                // The caller looks at the XML in any case.
                Ok(Err(broadcast::error::RecvError::Lagged(_))) => {}
                Ok(Err(broadcast::error::RecvError::Closed)) | Err(_) => return Ok(Unplug::Silent),
            }
        }
    }

    /// Sees to it that there is a connection, over which libvirt tells what becomes of devices.
    pub(crate) async fn listen(&self) -> Result<(), LibvirtError> {
        self.connect().await.map(drop)
    }

    /// libvirt's words on devices from now on, for as long as there is a connection.
    pub(crate) fn events(&self) -> broadcast::Receiver<DeviceEvent> {
        self.events.subscribe()
    }

    /// libvirt's and QEMU's versions, as people write them, for somebody who waits no longer than that for them.
    pub(crate) async fn versions(&self, within: Duration) -> Result<[String; 2], LibvirtError> {
        let text =
            |version: u32| format!("{}.{}.{}", version / 1_000_000, version / 1000 % 1000, version % 1000);
        let asked = self.call("tell its version", move |connection| {
            Ok([text(connection.lib_version()?), text(connection.hyp_version()?)])
        });
        timeout(within, asked)
            .await
            .unwrap_or(Err(LibvirtError::Deadline { action: "tell its version", within }))
    }

    /// What libvirt says of the host, as XML (<https://libvirt.org/formatcaps.html>).
    pub(crate) async fn capabilities(&self) -> Result<String, LibvirtError> {
        self.call("tell what the host can", |connection| connection.capabilities()).await
    }

    /// Runs a call on a thread that may block, with a deadline.
    async fn call<T: Send + 'static>(
        &self,
        action: &'static str,
        work: impl FnOnce(&Connect) -> Result<T, virt::error::Error> + Send + 'static,
    ) -> Result<T, LibvirtError> {
        let connection = self.connect().await?;
        // The permit goes where the thread goes: a call that hangs keeps its place until it ends.
        let Ok(permit) = timeout(CALL_DEADLINE, self.calls.clone().acquire_owned()).await else {
            return Err(self.unavailable(&format!("{CALLS} calls are under way and none ends")));
        };
        let work = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            work(&connection).map_err(|error| {
                // QEMU's words may have several lines; the log has one for each of ours.
                let message = error.message().trim().replace('\n', "; ");
                match error.code().unwrap_or(ErrorNumber::InternalError) {
                    // Another job had the domain for 30 s (libvirt's src/qemu/qemu_domainjob.c): nothing was begun.
                    ErrorNumber::OperationTimeout => LibvirtError::Held { message },
                    code => LibvirtError::Refused { action, message, code },
                }
            })
        });
        match timeout(CALL_DEADLINE, work).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_panicked)) => Err(self.unavailable("the call died of a panic")),
            Err(_) => Err(LibvirtError::Deadline { action, within: CALL_DEADLINE }),
        }
    }

    /// The connection, opened anew when libvirtd went away meanwhile. One opens at a time; who waits for it has a
    /// deadline.
    async fn connect(&self) -> Result<Arc<Connect>, LibvirtError> {
        let Ok(mut held) = timeout(OPEN_DEADLINE, self.connection.clone().lock_owned()).await else {
            return Err(self.unavailable("it does not answer"));
        };
        if let Some(Listening { connection, .. }) =
            held.as_ref().filter(|held| held.connection.is_alive().unwrap_or(false))
        {
            return Ok(connection.clone());
        }
        let (uri, events) = (self.uri.clone(), self.events.clone());
        let open = tokio::task::spawn_blocking(move || {
            if let Some(Listening { connection, subscribed }) = held.take() {
                event_shim::unsubscribe(&connection, &subscribed);
            }
            let connection = Connect::open(Some(&uri))?;
            // Pings find a dead libvirtd, so that no call hangs on one. The local test driver knows none.
            if let Err(error) = connection.set_keep_alive(5, 3) {
                tracing::debug!(message = error.message(), "libvirt without keep-alive");
            }
            let subscribed = event_shim::subscribe(&connection, &events)?;
            let connection = Arc::new(connection);
            *held = Some(Listening { connection: connection.clone(), subscribed });
            Ok::<_, virt::error::Error>(connection)
        });
        match timeout(OPEN_DEADLINE, open).await {
            Ok(Ok(Ok(connection))) => Ok(connection),
            Ok(Ok(Err(error))) => Err(self.unavailable(error.message())),
            Ok(Err(_panicked)) => Err(self.unavailable("opening died of a panic")),
            Err(_) => Err(self.unavailable("it does not answer")),
        }
    }

    fn unavailable(&self, message: &str) -> LibvirtError {
        LibvirtError::Unavailable { uri: self.uri.clone(), message: message.to_owned() }
    }
}

fn state(domain: &Domain) -> Result<DomainState, virt::error::Error> {
    let live = if domain.is_active()? { Some(domain.xml_desc(0)?) } else { None };
    let persistent =
        if domain.is_persistent()? { Some(domain.xml_desc(sys::VIR_DOMAIN_XML_INACTIVE)?) } else { None };
    Ok(DomainState { uuid: domain.uuid()?, name: domain.name()?, live, persistent })
}

/// Did the connection to libvirt break during a call?
pub(crate) fn is_lost_connection(code: ErrorNumber) -> bool {
    use ErrorNumber::{GnutlsError, InvalidConn, NoConnect, Rpc, SystemError};
    matches!(code, GnutlsError | InvalidConn | NoConnect | Rpc | SystemError)
}

fn no_domain(error: LibvirtError, domain: &str) -> LibvirtError {
    match error {
        LibvirtError::Refused { code: ErrorNumber::NoDomain, .. } => {
            LibvirtError::NoDomain { domain: domain.to_owned() }
        }
        other => other,
    }
}
