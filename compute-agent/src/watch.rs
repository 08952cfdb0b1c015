//! What a compute host tells those who watch: ways to storage that are lost, what is not as the journal has it, and I/O errors of
//! guests. Not here: how it is told (`agent_core::events`), nor resizes, which the engine tells.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Display;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tether_agent_core::events::{Seen, Source};
use tether_agent_core::failure::Failure;
use tether_agent_core::reconcile::{drift, several};
use tether_agent_core::steps::{KERNEL_DEADLINE, blocking};
use tether_agent_core::tcp_probe::first_to_answer;
use tether_proto::wire::{Event, EventKind, ReconcileAction};
use tether_proto::{AttachmentId, ServerAddress, Transport};
use tokio::sync::broadcast;
use tokio::time::{MissedTickBehavior, interval};
use virt::sys;

use crate::attachments::Attachments;
use crate::hypervisor::domain_xml::attachment_of;
use crate::hypervisor::libvirt::DeviceWord;
use crate::mount::{NFS_PORT, State};
use crate::record::{Attachment, Phase};

const CONNECTIONS_EVERY: Duration = Duration::from_secs(2);
const DRIFT_EVERY: Duration = Duration::from_secs(15);
/// How often it is seen to that libvirt tells of I/O errors.
const LISTEN_EVERY: Duration = Duration::from_secs(10);
/// A guest that tries again and again has an error each time; of one disk it is told so often.
const SAME_ERROR_AFTER: Duration = Duration::from_secs(10);

/// What is looked at while somebody watches.
pub(crate) fn sources(attachments: &Arc<Attachments>) -> Vec<Source> {
    let (connected, whole) = (attachments.clone(), attachments.clone());
    vec![
        Source::new(CONNECTIONS_EVERY, move || {
            let attachments = connected.clone();
            async move { lost(&attachments).await }
        }),
        Source::new(DRIFT_EVERY, move || {
            let attachments = whole.clone();
            async move { Some(drifted(&attachments).await) }
        }),
    ]
}

/// An event about an attachment.
pub(crate) fn about(id: AttachmentId, attachment: &Attachment, kind: EventKind, message: String) -> Event {
    Event {
        kind: kind.into(),
        attachment_id: id.to_string(),
        domain: attachment.domain_name.clone(),
        message,
        ..Event::default()
    }
}

/// Attachments whose session is not logged in, or whose server does not answer. Nothing here touches a mount.
async fn lost(attachments: &Arc<Attachments>) -> Option<Seen> {
    let records = attachments.journal.list();
    let mounts = records.iter().filter_map(|record| record.attachment.as_ref()?.mount.as_ref());
    let servers: BTreeSet<_> = mounts.map(|mount| mount.server).collect();
    let asked = servers.into_iter().map(|server| async move {
        let answer = first_to_answer(&[SocketAddr::new(server.address(), NFS_PORT)]).await;
        (server, answer.err().map(|silent| format!("its NFS server does not answer: {silent}")))
    });
    let silent: BTreeMap<_, _> = several(asked).await.into_iter().collect();
    let (this, before) = (attachments.clone(), attachments.operations().running());
    let look = move || Ok::<_, Failure>(compare(&this, &silent));
    let mut seen = blocking(KERNEL_DEADLINE, look).await.ok().flatten()?;
    // What an operation works on may be lost for good reasons.
    let after = attachments.operations().running();
    let (known, busy): (Vec<_>, Vec<_>) = seen
        .holds
        .into_iter()
        .partition(|event| !before.contains(&event.attachment_id) && !after.contains(&event.attachment_id));
    seen.holds = known;
    seen.unknown.extend(busy);
    Some(seen)
}

/// The journal, sysfs and mountinfo as they are now, and the servers as they were asked.
fn compare(attachments: &Attachments, silent: &BTreeMap<ServerAddress, Option<String>>) -> Option<Seen> {
    let unseen = |error: &dyn Display| tracing::warn!(%error, "lost connections cannot be seen");
    let states = attachments.sysfs.states().inspect_err(|error| unseen(error)).ok()?;
    let states: HashMap<String, String> = states.into_iter().collect();
    let mut seen = Seen::default();
    for record in attachments.journal.list() {
        let Some(attachment) = record.attachment else { continue };
        let about = |message| about(record.id, &attachment, EventKind::ConnectionLost, message);
        if record.phase != Phase::Attached {
            seen.unknown.push(about(String::new()));
            continue;
        }
        let problem = match &attachment.connection.transport {
            Transport::Iscsi(iscsi) => match states.get(iscsi.target_iqn.as_str()).map(String::as_str) {
                Some("LOGGED_IN") => None,
                Some(_) => Some(format!("the session to {} has lost its connection", iscsi.target_iqn)),
                None => Some(format!("there is no session to {}", iscsi.target_iqn)),
            },
            Transport::Nfs(_) => {
                let Some(mount) = attachment.mount.as_ref() else { continue };
                match attachments.mounts.state(mount).inspect_err(|error| unseen(error)).ok()? {
                    State::Mounted { .. } => silent.get(&mount.server).cloned().flatten(),
                    State::Absent | State::Other(_) => Some(format!("{} is not mounted", mount.share)),
                }
            }
        };
        seen.holds.extend(problem.map(about));
    }
    Some(seen)
}

/// What a reconciliation would do, but for what is told as a lost connection already.
async fn drifted(attachments: &Arc<Attachments>) -> Seen {
    let plan = || async {
        let mut found = attachments.reconcile(true).await;
        found.items.retain(|item| item.action() != ReconcileAction::Restore);
        found
    };
    let Seen { holds, unknown } = drift(attachments.operations(), plan).await;
    let of = |event: Event| match event.attachment_id.parse().ok().and_then(|id| attachments.recorded(id)) {
        Some(known) => Event { domain: known.domain_name, ..event },
        None => event,
    };
    Seen { holds: holds.into_iter().map(of).collect(), unknown }
}

/// Tells I/O errors of guests on disks of ours, for as long as the agent runs.
pub(crate) async fn tell_io_errors(attachments: Arc<Attachments>) {
    let mut words = attachments.libvirt.events();
    let mut told: HashMap<AttachmentId, Instant> = HashMap::new();
    let mut pace = interval(LISTEN_EVERY);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let word = tokio::select! {
            word = words.recv() => word,
            _ = pace.tick() => {
                // libvirt forgets who listens when it is started anew.
                if !attachments.journal.list().iter().any(|record| record.phase == Phase::Attached) {
                    continue;
                }
                if let Err(error) = attachments.libvirt.listen().await {
                    tracing::debug!(%error, "nobody tells of guests' I/O errors now");
                }
                continue;
            }
        };
        let event = match word {
            Ok(event) => event,
            Err(broadcast::error::RecvError::Lagged(_)) => continue,
            Err(broadcast::error::RecvError::Closed) => return,
        };
        let (DeviceWord::IoError { action, reason }, Some(id)) = (event.word, attachment_of(&event.alias))
        else {
            continue;
        };
        told.retain(|_, at| at.elapsed() < SAME_ERROR_AFTER);
        if told.contains_key(&id) {
            continue;
        }
        let Some(attachment) = attachments.recorded(id) else { continue };
        told.insert(id, Instant::now());
        let message = io_error(action, &reason);
        tracing::warn!(attachment = %id, domain = %attachment.domain_name, "{message}");
        attachments.operations().events().happened(about(id, &attachment, EventKind::GuestIoError, message));
    }
}

fn io_error(action: u32, reason: &str) -> String {
    let did = match action {
        sys::VIR_DOMAIN_EVENT_IO_ERROR_PAUSE => "the guest was paused; virsh resume lets it try again",
        sys::VIR_DOMAIN_EVENT_IO_ERROR_REPORT => "the guest was told",
        _ => "the guest was not told",
    };
    let why = match reason {
        "" => String::new(),
        "enospc" => " (no space is left)".to_owned(),
        other => format!(" ({other})"),
    };
    format!("an I/O of the guest failed{why}: {did}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_io_error_says_why_and_what_the_guest_knows() {
        let paused = io_error(sys::VIR_DOMAIN_EVENT_IO_ERROR_PAUSE, "enospc");
        assert!(paused.contains("no space is left") && paused.contains("virsh resume"), "{paused}");
        assert_eq!(
            io_error(sys::VIR_DOMAIN_EVENT_IO_ERROR_REPORT, ""),
            "an I/O of the guest failed: the guest was told"
        );
        assert!(io_error(sys::VIR_DOMAIN_EVENT_IO_ERROR_NONE, "eio").contains("(eio)"));
    }
}
