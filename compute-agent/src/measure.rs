//! What the metrics tell of attachments, sessions and mounts. Not here: how they are told (`agent_core::metrics`).

use std::collections::{BTreeMap, HashMap};

use tether_agent_core::metrics::Sample;
use tether_agent_core::steps::{KERNEL_DEADLINE, blocking};
use tether_proto::Transport;

use crate::attachments::{Attachments, unreadable};
use crate::record::Phase;

/// What is in the journal, and what the kernel has of it, measured now.
pub(crate) async fn samples(attachments: &Attachments) -> Vec<Sample> {
    let mut records = attachments.journal.list();
    records.retain(|record| record.phase != Phase::Ended);
    let sysfs = attachments.sysfs.clone();
    let sessions = blocking(KERNEL_DEADLINE, move || sysfs.states().map_err(unreadable)).await;
    let sessions: Option<HashMap<String, String>> = sessions
        .inspect_err(|error| tracing::warn!(%error, "the sessions cannot be measured"))
        .ok()
        .map(|states| states.into_iter().collect());
    let mut attached = counts(&["iscsi", "nfs"], &["attaching", "attached", "detaching"]);
    let mut sessions_of_ours = counts(&["iscsi"], &["logged-in", "lost", "missing"]);
    for record in &records {
        let Some(attachment) = &record.attachment else { continue };
        match &attachment.connection.transport {
            Transport::Nfs(_) => *attached.entry(("nfs", record.phase.as_str())).or_default() += 1,
            Transport::Iscsi(iscsi) => {
                *attached.entry(("iscsi", record.phase.as_str())).or_default() += 1;
                let Some(sessions) = sessions.as_ref().filter(|_| record.phase == Phase::Attached) else {
                    continue;
                };
                let state = match sessions.get(iscsi.target_iqn.as_str()).map(String::as_str) {
                    Some("LOGGED_IN") => "logged-in",
                    Some(_) => "lost",
                    None => "missing",
                };
                *sessions_of_ours.entry(("iscsi", state)).or_default() += 1;
            }
        }
    }
    let told = |name, help, counts: BTreeMap<(&'static str, &'static str), u32>| {
        counts.into_iter().map(move |((transport, state), count)| Sample {
            name,
            help,
            labels: vec![("transport", transport.to_owned()), ("state", state.to_owned())],
            value: f64::from(count),
        })
    };
    let mut samples: Vec<Sample> =
        told("attachments", "Attachments that have not ended, by phase", attached).collect();
    if sessions.is_some() {
        let help = "Sessions of attached volumes: the guest's I/O waits on lost ones, missing ones are to be restored";
        samples.extend(told("sessions", help, sessions_of_ours));
    }
    samples
}

/// Each is told also when there is none of it: an alert waits for a number, not for its absence.
fn counts(
    transports: &[&'static str],
    states: &[&'static str],
) -> BTreeMap<(&'static str, &'static str), u32> {
    transports.iter().flat_map(|transport| states.iter().map(|state| ((*transport, *state), 0))).collect()
}
