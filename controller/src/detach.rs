//! `tether detach`: first out of the guest, then off the storage. An export is never taken away from under a disk that
//! may be in use: not when the detach failed, and not when the host that may use it cannot be asked.

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tether_proto::wire::watch_operation_request::Key;
use tether_proto::{AttachmentId, DomainName, VolumeKey, wire};
use tokio::time::Instant;
use tonic::Code;

use crate::agent::{Agent, Kind};
use crate::arguments::{Detach, Subject};
use crate::call::{Answer, Session};
use crate::console::{shell_word, time_text};
use crate::failure::{Certainty, Failure, Result};
use crate::overview::nothing_known;
use crate::survey::{self, Found, Known, Survey};
use crate::view::{Output, ReportView};

/// Detaches a volume from its domain and ends its export.
pub(crate) async fn detach(session: &Arc<Session>, arguments: &Detach) -> Result<Output> {
    let begin = Instant::now();
    let (id, what) = match (&arguments.subject, &arguments.domain) {
        (Subject::Attachment(id), None) => (*id, format!("detach {id}")),
        (Subject::Volume(volume), Some(domain)) => {
            let what = format!("detach {volume} from {domain}");
            let id = find(session, volume, domain).await.map_err(|failure| failure.while_doing(&what))?;
            session.console.note(&format!("attachment {id}"));
            (id, what)
        }
        (Subject::Attachment(_), Some(_)) => {
            return Err(Failure::usage("USAGE", "an id needs no domain").next("type: tether detach ID"));
        }
        (Subject::Volume(volume), None) => {
            return Err(Failure::usage("USAGE", "a volume needs its domain")
                .next(format!("type: tether detach {volume} DOMAIN, or: tether detach ID")));
        }
    };
    let guest_time = arguments.guest_timeout.map(Duration::from_secs);
    let verb = Verb { session, id, guest_time, force: arguments.force };
    verb.run(&what, begin).await.map_err(|failure| failure.while_doing(&what).attachment(id))
}

/// The attachment of a volume in a domain.
async fn find(session: &Arc<Session>, volume: &VolumeKey, domain: &DomainName) -> Result<AttachmentId> {
    let survey = survey::all(session).await;
    let exports: Vec<(&String, &Known)> = survey
        .found
        .iter()
        .filter(|(_, known)| {
            let status = known.export.as_ref().map(|found| &found.status);
            status.is_some_and(|export| {
                export.pool == volume.pool.as_str() && export.volume == volume.volume.as_str()
            })
        })
        .collect();
    let in_domain: Vec<&String> = exports
        .iter()
        .filter(|(_, known)| {
            let status = known.attachment.as_ref().map(|found| &found.status);
            status.is_some_and(|attachment| {
                attachment.domain == domain.as_str()
                    || attachment.domain_uuid.eq_ignore_ascii_case(domain.as_str())
            })
        })
        .map(|(id, _)| *id)
        .collect();
    let commands =
        |ids: &[&String]| ids.iter().map(|id| format!("tether detach {id}")).collect::<Vec<_>>().join("\n");
    match in_domain.as_slice() {
        [id] => Ok(id.parse()?),
        [] if !survey.silent.is_empty() => Err(Failure::new(
            Code::Unavailable,
            "HOST_UNREACHABLE",
            format!(
                "no reachable host knows {volume} in {domain}; not asked: {}",
                survey::names(&survey.silent)
            ),
        )
        .next(format!("bring back {}, or detach by id", survey::names(&survey.silent)))),
        [] => {
            let others: Vec<&String> = exports.iter().map(|(id, _)| *id).collect();
            let failure = Failure::new(
                Code::NotFound,
                "ATTACHMENT_NOT_FOUND",
                format!("{volume} is not attached to {domain}"),
            );
            Err(match others.is_empty() {
                true => failure.next("see all with: tether list"),
                false => failure.next(format!("the volume is exported; to end that:\n{}", commands(&others))),
            })
        }
        several => Err(Failure::new(
            Code::FailedPrecondition,
            "AMBIGUOUS",
            format!("{volume} is attached to {domain} more than once"),
        )
        .next(format!("type one of:\n{}", commands(several)))),
    }
}

#[derive(Debug, Serialize)]
struct DetachedView {
    attachment_id: String,
    volume: Option<String>,
    domain: Option<String>,
    storage: Option<String>,
    compute: Option<String>,
    outcome: &'static str,
    may_be_lost: Vec<String>,
    detach: Option<ReportView>,
    unexport: Option<ReportView>,
    total_microseconds: u64,
}

/// How a host uses an export, in the words of the transport.
struct Use {
    /// What it does now.
    now: &'static str,
    /// Commands that show what does it.
    look: &'static str,
    /// What ends it.
    end: &'static str,
}

impl Use {
    fn of(export: &wire::ExportStatus) -> Self {
        match export.transport() {
            wire::Transport::Nfs => Self {
                now: "has the file open",
                look: "virsh domblklist DOMAIN, findmnt -t nfs4",
                end: "end what has it open",
            },
            wire::Transport::Iscsi | wire::Transport::Unspecified => Self {
                now: "is connected to the export",
                look: "virsh domblklist DOMAIN, iscsiadm -m session -P 3",
                end: "end the session",
            },
        }
    }
}

struct Verb<'a> {
    session: &'a Arc<Session>,
    id: AttachmentId,
    guest_time: Option<Duration>,
    force: bool,
}

impl Verb<'_> {
    async fn run(&self, what: &str, begin: Instant) -> Result<Output> {
        let id = self.id.to_string();
        let mut survey = survey::one(self.session, &id).await;
        let Some(known) = survey.found.remove(&id) else {
            return Err(nothing_known(&id, &survey));
        };
        let attachment = known.attachment.as_ref().filter(|found| found.status.phase != "ended");
        let export = known.export.as_ref().filter(|found| found.status.phase != "ended");
        if attachment.is_none() && export.is_none() && !survey.silent.is_empty() {
            // One side ended; the other may be on a host that cannot be asked.
            return Err(nothing_known(&id, &survey));
        }
        // Before anything is changed: may the export go when no attachment was found?
        let user = match (attachment, export, &known.attachment) {
            (None, Some(export), None) => match self.user_of(export, &survey).await {
                // The storage host cuts off whoever it is.
                Err(_) if self.force => None,
                user => user?,
            },
            _ => None,
        };
        self.session.begins(
            Failure::new(
                Code::Cancelled,
                "INTERRUPTED",
                "interrupted; the agents go on with what they were told",
            )
            .unknown()
            .while_doing(what)
            .attachment(self.id)
            .next(format!("see: tether show {id}\ngo on: tether detach {id}")),
        );
        let mut detached = None;
        if let Some(agent) = attachment.map(|found| &found.agent).or(user.as_ref()) {
            let answer = self.detach(agent).await;
            detached = Some(answer.map_err(|failure| self.storage_stays(failure, attachment, export))?);
        }
        let unexported = match export {
            Some(export) => Some(self.unexport(&export.agent, detached.is_some()).await?),
            None => None,
        };
        if known.export.is_none() && survey.silent_of(Kind::Storage).next().is_some() {
            let names = survey::names(survey.silent_of(Kind::Storage));
            let message =
                format!("the disk is detached; whether its export is gone is not known, not asked: {names}");
            return Err(Failure::new(Code::Unavailable, "HOST_UNREACHABLE", message)
                .next(format!("bring back {names}, then type: tether detach {id}")));
        }
        let mut output = self.output(&known, detached.as_ref(), unexported.as_ref(), begin.elapsed())?;
        if self.force && known.attachment.is_none() && user.is_none() && export.is_some() {
            let silent = survey::names(survey.silent_of(Kind::Compute));
            output.warnings.push(format!(
                "warning: no compute host was told{}: a guest that still runs there sees I/O errors\n  next: when that host \
                 is back, type again: tether detach {id}",
                if silent.is_empty() { String::new() } else { format!(" (not asked: {silent})") }
            ));
        }
        let lost = may_be_lost(&known, detached.as_ref(), unexported.as_ref());
        let forced = if self.force { "forced: " } else { "" };
        output.warnings.extend(lost.iter().map(|sentence| format!("warning: {forced}{sentence}")));
        Ok(output)
    }

    /// Nobody that answered has the attachment, but there is an export. Who may use it? Refuses when that is not
    /// known; else gives the compute agent for which it was made, when it is one of ours.
    async fn user_of(&self, export: &Found<wire::ExportStatus>, survey: &Survey) -> Result<Option<Agent>> {
        let export = &export.status;
        let silent = survey::names(survey.silent_of(Kind::Compute));
        for agent in &survey.compute {
            let mut client = agent.compute();
            let connector =
                self.session.call(agent).read(client.get_connector(wire::GetConnectorRequest {})).await;
            if connector.is_ok_and(|connector| connector.initiator_iqn == export.initiator_iqn) {
                if !export.connected {
                    return Ok(Some(agent.clone()));
                }
                if !silent.is_empty() {
                    return Err(self.in_use(export, &silent));
                }
                // The agent writes its record before it connects: a session, or a file that is open, without one may be
                // under a guest's disk.
                let using = Use::of(export);
                let message = format!(
                    "{} {}, and its agent has no record of the attachment; the export stays",
                    agent.name(),
                    using.now
                );
                return Err(Failure::new(Code::FailedPrecondition, "EXPORT_IN_USE", message).next(format!(
                    "see on {} what uses it ({}) and {} there; then type: tether detach {}",
                    agent.name(),
                    using.look,
                    using.end,
                    self.id
                )));
            }
        }
        match export.connected || !silent.is_empty() {
            true => Err(self.in_use(export, &silent)),
            false => Ok(None),
        }
    }

    fn in_use(&self, export: &wire::ExportStatus, silent: &str) -> Box<Failure> {
        let id = self.id;
        let host = format!("{} ({})", export.hostname, export.initiator_iqn);
        let Use { now, end, .. } = Use::of(export);
        let state = if export.connected { now } else { "may use it" };
        if silent.is_empty() {
            let message = format!("the export is for {host}, which {now} and is no host of the config");
            return Failure::new(Code::FailedPrecondition, "EXPORT_IN_USE", message).next(format!(
                "add that compute host to the config, or {end} there; then type: tether detach {id}"
            ));
        }
        let message = format!(
            "the export is for {host}, which was not found among the hosts that answer and {state}; not asked: {silent}. \
             The export stays"
        );
        Failure::new(Code::Unavailable, "HOST_UNREACHABLE", message)
            .next(format!("bring back {silent}, then type: tether detach {id}"))
    }

    async fn detach(&self, agent: &Agent) -> Result<Answer<wire::DetachResponse>> {
        let guest_time = self.guest_time.unwrap_or_default();
        let request = wire::DetachRequest {
            attachment_id: self.id.to_string(),
            guest_deadline_milliseconds: u64::try_from(guest_time.as_millis()).unwrap_or(u64::MAX),
            force: self.force,
        };
        let send = || {
            let (mut client, request) = (agent.compute(), request.clone());
            async move { client.detach(request).await }
        };
        // The guest's time comes on top.
        let call = self.session.call(agent).until(self.session.deadline + guest_time);
        call.mutate(self.key(), send).await
    }

    async fn unexport(&self, agent: &Agent, detached: bool) -> Result<Answer<wire::UnexportResponse>> {
        let request = wire::UnexportRequest { attachment_id: self.id.to_string(), force: self.force };
        let send = || {
            let (mut client, request) = (agent.storage(), request.clone());
            async move { client.unexport(request).await }
        };
        let deadline = self.session.deadline + self.guest_time.unwrap_or_default();
        let outcome = self.session.call(agent).until(deadline).mutate(self.key(), send).await;
        outcome.map_err(|mut failure| {
            if detached {
                failure.message =
                    format!("the disk is detached, its export is not ended: {}", failure.message);
            }
            let again = format!("type again: tether detach {}", self.id);
            let next =
                failure.next.as_ref().map_or_else(|| again.clone(), |next| format!("{next}; then {again}"));
            failure.next(next)
        })
    }

    /// The detach failed: the storage stays as it is, and that is said.
    fn storage_stays(
        &self,
        failure: Box<Failure>,
        attachment: Option<&Found<wire::AttachmentStatus>>,
        export: Option<&Found<wire::ExportStatus>>,
    ) -> Box<Failure> {
        let id = self.id;
        let mut failure = failure;
        if failure.certainty == Certainty::Unknown {
            let domain = attachment.map_or("the domain", |found| found.status.domain.as_str());
            let undo =
                format!("nothing: whether the disk is still in {domain} is not known; the export stays");
            return failure.undo(undo).next(format!("see: tether show {id}\ngo on: tether detach {id}"));
        }
        if export.is_some() {
            let stays = "the export stays";
            failure.undo = Some(match failure.undo.take() {
                Some(undo) => format!("{undo}; {stays}"),
                None => stays.to_owned(),
            });
        }
        match failure.next {
            Some(_) => failure,
            None => failure.next(format!("type again: tether detach {id}")),
        }
    }

    fn output(
        &self,
        known: &Known,
        detached: Option<&Answer<wire::DetachResponse>>,
        unexported: Option<&Answer<wire::UnexportResponse>>,
        time: Duration,
    ) -> Result<Output> {
        let export = known.export.as_ref().filter(|found| !found.status.volume.is_empty());
        let volume = export.map(|found| format!("{}/{}", found.status.pool, found.status.volume));
        let domain = known.attachment.as_ref().map(|found| found.status.domain.clone());
        let nothing_left = detached.is_none() && unexported.is_none();
        let view = DetachedView {
            attachment_id: self.id.to_string(),
            volume: volume.clone(),
            domain: domain.clone(),
            storage: known.export.as_ref().map(|found| found.agent.name().to_owned()),
            compute: known.attachment.as_ref().map(|found| found.agent.name().to_owned()),
            outcome: if nothing_left { "unchanged" } else { "removed" },
            may_be_lost: may_be_lost(known, detached, unexported),
            detach: detached.map(|answer| ReportView::new(answer.reply.report.as_ref(), answer.time)),
            unexport: unexported.map(|answer| ReportView::new(answer.reply.report.as_ref(), answer.time)),
            total_microseconds: u64::try_from(time.as_micros()).unwrap_or(u64::MAX),
        };
        let mut parts = Vec::new();
        if let Some(answer) = detached {
            parts.push(format!("detach {}", time_text(answer.time)));
        }
        if let Some(answer) = unexported {
            parts.push(format!("unexport {}", time_text(answer.time)));
        }
        let subject = volume.unwrap_or_else(|| "the volume".to_owned());
        let text = match (nothing_left, domain) {
            (true, _) => format!("{subject} was detached before\nid {}", self.id),
            (false, Some(domain)) => format!(
                "detached {subject} from {} in {}: {}\nid {}",
                shell_word(&domain),
                time_text(time),
                parts.join(", "),
                self.id
            ),
            (false, None) => {
                format!(
                    "ended the export of {subject} in {}: {}\nid {}",
                    time_text(time),
                    parts.join(", "),
                    self.id
                )
            }
        };
        Output::new(&view, text)
    }

    fn key(&self) -> Key {
        Key::AttachmentId(self.id.to_string())
    }
}

/// What either side says may be lost: in its answer now, or of an end that an earlier call brought about.
fn may_be_lost(
    known: &Known,
    detached: Option<&Answer<wire::DetachResponse>>,
    unexported: Option<&Answer<wire::UnexportResponse>>,
) -> Vec<String> {
    let now = detached.map(|answer| &answer.reply.may_be_lost);
    let now = now.into_iter().chain(unexported.map(|answer| &answer.reply.may_be_lost));
    let attachment = known.attachment.as_ref().map(|found| &found.status.may_be_lost);
    let export = known.export.as_ref().map(|found| &found.status.may_be_lost);
    let mut lost: Vec<String> = Vec::new();
    for sentence in now.chain(attachment).chain(export).flatten() {
        if !lost.contains(sentence) {
            lost.push(sentence.clone());
        }
    }
    lost
}
