//! `tether volume extend`: first the volume, then the guest that has it. The second part is done also when the first had
//! nothing to do: it may be what an earlier call could not finish, and the same command again finishes it. Not here: the
//! other volume verbs (`volume.rs`).

use std::sync::Arc;

use serde::Serialize;
use tether_proto::wire::watch_operation_request::Key;
use tether_proto::{AttachmentId, ByteSize, wire};
use tonic::Code;

use crate::agent::{Agent, Kind};
use crate::arguments::Extend;
use crate::call::{Answer, Session};
use crate::console::{shell_word, time_text};
use crate::failure::{Certainty, Failure, Result};
use crate::survey::{self, Found, Silent};
use crate::view::{AttachmentView, Output, ReportView, UnreachableView, VolumeView, outcome_word, size_text};
use crate::volume;

/// Makes a volume larger, and tells the guest that has it.
pub(crate) async fn extend(session: &Arc<Session>, arguments: &Extend) -> Result<Output> {
    let storage = volume::connect(session, &arguments.host).await?;
    let before = volume::get(session, &storage, &arguments.volume).await?;
    let name = arguments.volume.to_string();
    volume::begins(session, &format!("extend {name}"), &name);
    let verb = Verb { session, arguments, storage: &storage };
    let mut answer = verb.extend().await?;
    let extended = answer.reply.volume.take().ok_or_else(|| storage.incomplete("volume"))?;
    let (mut users, mut failed) = (Vec::new(), Vec::new());
    // One guest that cannot be told keeps none of the others from being told.
    for id in &extended.exported_for {
        let id = id.parse().map_err(|_| storage.incomplete("attachment id that could be read"))?;
        match verb.tell_guest(id, &extended).await {
            Ok(user) => users.push(user),
            Err(failure) => failed.push((id, failure)),
        }
    }
    match as_one(failed) {
        Some(failure) => Err(failure),
        None => verb.output(&before, &extended, &answer, &users),
    }
}

/// The first failure, with what the others say.
fn as_one(failed: Vec<(AttachmentId, Box<Failure>)>) -> Option<Box<Failure>> {
    let mut failed = failed.into_iter();
    let (id, mut first) = failed.next()?;
    for (other, failure) in failed {
        first.message.push_str(&format!("\nattachment {other}: {}", failure.message));
    }
    Some(first.attachment(id))
}

/// The command that goes on with it.
fn same_again(arguments: &Extend) -> String {
    let mut text = format!("tether volume extend {} {}", arguments.volume, size_word(arguments.size));
    if let Some(host) = &arguments.host.storage {
        text.push_str(&format!(" --storage {}", shell_word(host)));
    }
    text
}

/// A size as a person would type it: with a unit where that is exact, else in bytes.
fn size_word(size: ByteSize) -> String {
    let word = size.to_string().replace(' ', "");
    match word.parse::<ByteSize>() {
        Ok(read) if read == size => word,
        _ => size.bytes().to_string(),
    }
}

#[derive(Debug, Serialize)]
struct ExtendedView<'a> {
    volume: VolumeView<'a>,
    previous_size_bytes: u64,
    storage: &'a str,
    outcome: String,
    report: ReportView,
    guests: Vec<GuestView<'a>>,
    unreachable: Vec<UnreachableView<'a>>,
}

/// A guest that was told.
#[derive(Debug, Serialize)]
struct GuestView<'a> {
    attachment: AttachmentView<'a>,
    resize: ReportView,
}

/// Who has the volume.
struct User {
    id: AttachmentId,
    /// The attachment, and what its compute host answered.
    told: Option<(Found<wire::AttachmentStatus>, Answer<wire::ResizeAttachmentResponse>)>,
    /// The compute hosts that could not be asked, when none of the others has the attachment.
    silent: Vec<Silent>,
}

struct Verb<'a> {
    session: &'a Arc<Session>,
    arguments: &'a Extend,
    storage: &'a Agent,
}

impl Verb<'_> {
    async fn extend(&self) -> Result<Answer<wire::ExtendVolumeResponse>> {
        let volume = &self.arguments.volume;
        let request = wire::ExtendVolumeRequest {
            pool: volume.pool.to_string(),
            volume: volume.volume.to_string(),
            size_bytes: self.arguments.size.bytes(),
        };
        let send = || {
            let (mut client, request) = (self.storage.storage(), request.clone());
            async move { client.extend_volume(request).await }
        };
        self.session.call(self.storage).mutate(Key::Volume(volume.into()), send).await
    }

    /// Finds the compute host that has the attachment, and tells it the size that the volume has now.
    async fn tell_guest(&self, id: AttachmentId, extended: &wire::Volume) -> Result<User> {
        let interrupted = Failure::new(
            Code::Cancelled,
            "INTERRUPTED",
            "interrupted; the agents go on with what they were told",
        )
        .unknown();
        self.session.begins(
            self.not_seen(interrupted, id, extended)
                .attachment(id)
                .while_doing(&format!("extend {}", self.arguments.volume)),
        );
        let id_text = id.to_string();
        let mut survey = survey::one(self.session, &id_text).await;
        let known = survey.found.remove(&id_text).unwrap_or_default();
        let Some(mut found) = known.attachment else {
            let silent: Vec<Silent> =
                survey.silent.into_iter().filter(|silent| silent.kind == Kind::Compute).collect();
            let in_use = known.export.filter(|found| found.status.connected && silent.is_empty());
            return match in_use {
                Some(export) => Err(self.not_seen(used_by_a_stranger(id, &export.status), id, extended)),
                None => Ok(User { id, told: None, silent }),
            };
        };
        match found.status.phase.as_str() {
            "attached" => {}
            "ended" => return Ok(User { id, told: None, silent: Vec::new() }),
            _ => return Err(self.not_seen(unfinished(id, &found), id, extended)),
        }
        let not_seen = |failure| self.not_seen(failure, id, extended);
        let mut answer = self.resize(&id_text, extended.size_bytes, &found.agent).await.map_err(not_seen)?;
        found.status = answer
            .reply
            .attachment
            .take()
            .ok_or_else(|| self.not_seen(found.agent.incomplete("attachment"), id, extended))?;
        Ok(User { id, told: Some((found, answer)), silent: Vec::new() })
    }

    async fn resize(
        &self,
        id: &str,
        size_bytes: u64,
        compute: &Agent,
    ) -> Result<Answer<wire::ResizeAttachmentResponse>> {
        let request = wire::ResizeAttachmentRequest { attachment_id: id.to_owned(), size_bytes };
        let send = || {
            let (mut client, request) = (compute.compute(), request.clone());
            async move { client.resize_attachment(request).await }
        };
        self.session.call(compute).mutate(Key::AttachmentId(id.to_owned()), send).await
    }

    /// The volume is larger, and its guest was not told or the answer is not known.
    fn not_seen(&self, mut failure: Box<Failure>, id: AttachmentId, extended: &wire::Volume) -> Box<Failure> {
        let unknown = failure.certainty == Certainty::Unknown;
        failure.message = format!(
            "the volume is extended to {} on {}, {}: {}",
            size_text(extended.size_bytes),
            self.storage.name(),
            if unknown { "whether its guest sees it is not known" } else { "its guest does not see it yet" },
            failure.message
        );
        let again = same_again(self.arguments);
        let next = match &failure.next {
            _ if unknown => format!("see: tether show {id}\ngo on: {again}"),
            Some(next) => format!("{next}\nthen type again: {again}"),
            None => format!("type again: {again}"),
        };
        failure.next(next)
    }

    fn output(
        &self,
        before: &wire::Volume,
        extended: &wire::Volume,
        answer: &Answer<wire::ExtendVolumeResponse>,
        users: &[User],
    ) -> Result<Output> {
        let outcome = answer.reply.report.as_ref().map(wire::OperationReport::outcome).unwrap_or_default();
        // The same hosts are silent about each attachment.
        let silent: &[Silent] = users
            .iter()
            .map(|user| user.silent.as_slice())
            .find(|silent| !silent.is_empty())
            .unwrap_or_default();
        let view = ExtendedView {
            volume: VolumeView::new(self.storage.name(), extended),
            previous_size_bytes: before.size_bytes,
            storage: self.storage.name(),
            outcome: outcome_word(outcome),
            report: ReportView::new(answer.reply.report.as_ref(), answer.time),
            guests: users
                .iter()
                .filter_map(|user| user.told.as_ref())
                .map(|(found, answer)| GuestView {
                    attachment: AttachmentView::new(found.agent.name(), &found.status),
                    resize: ReportView::new(answer.reply.report.as_ref(), answer.time),
                })
                .collect(),
            unreachable: silent.iter().map(|silent| silent.view()).collect(),
        };
        let (volume, storage) = (&self.arguments.volume, self.storage.name());
        let (from, to) = (size_text(before.size_bytes), size_text(extended.size_bytes));
        let time = time_text(answer.time);
        // By the sizes first: the answer to a call that was sent again says only that nothing was left to do.
        let done = match outcome {
            _ if before.size_bytes < extended.size_bytes => {
                format!("extended {volume} from {from} to {to} on {storage} in {time}")
            }
            wire::Outcome::Unchanged => format!("{volume} has {to} already on {storage}"),
            _ => format!("repaired: extended {volume} to {to} on {storage} in {time}"),
        };
        let seen: String = users.iter().map(seen_by).collect();
        let mut output = Output::new(&view, format!("{done}{seen}"))?.without(silent);
        output.warnings.extend(users.iter().filter_map(|user| self.warning(extended, user)));
        Ok(output)
    }

    /// The volume is larger and no guest was told, because nobody that could be asked has it attached.
    fn warning(&self, extended: &wire::Volume, user: &User) -> Option<String> {
        if user.told.is_some() {
            return None;
        }
        let id = user.id;
        let again = same_again(self.arguments);
        if !user.silent.is_empty() {
            return Some(format!(
                "warning: the volume is exported, and no host that answers has it attached: its guest may not see the \
                 new size yet\n  next: bring back {}, then type again: {again}",
                survey::names(&user.silent)
            ));
        }
        // The storage host leaves the file of an exported volume to the hypervisor's QEMU, and there is none.
        (extended.format() == wire::VolumeFormat::Qcow2).then(|| {
            format!(
                "warning: the file of a qcow2 volume does not grow while it is exported but not attached\n  next: end \
                 the export: tether detach {id}\n    then type again: {again}"
            )
        })
    }
}

/// What became of a guest, as the end of a sentence.
fn seen_by(user: &User) -> String {
    match &user.told {
        Some((found, _)) => {
            let attachment = &found.status;
            let when = if attachment.in_live_domain { "" } else { " when it starts" };
            format!("; {} sees it as {}{when}", shell_word(&attachment.domain), attachment.target_device)
        }
        None if user.silent.is_empty() => "; it is exported, but not attached".to_owned(),
        None => "; whether a guest has it is not known".to_owned(),
    }
}

/// The attachment is neither there nor gone: whether its guest will see the new size depends on what becomes of it.
fn unfinished(id: AttachmentId, found: &Found<wire::AttachmentStatus>) -> Box<Failure> {
    let (phase, finish) = match found.status.phase.as_str() {
        "detaching" => ("being detached from", format!("finish that: tether detach {id}")),
        _ => (
            "being attached to",
            format!("wait until it is attached: tether show {id}\nor take it back: tether detach {id}"),
        ),
    };
    let message = format!("it is {phase} {} on {}", found.status.domain, found.agent.name());
    Failure::new(Code::FailedPrecondition, "ATTACHMENT_UNFINISHED", message).next(finish)
}

/// All compute hosts answer and none has the attachment, and yet the export is in use.
fn used_by_a_stranger(id: AttachmentId, export: &wire::ExportStatus) -> Box<Failure> {
    let message = format!(
        "the export is in use by {} ({}), and no host of the config has the attachment",
        export.hostname, export.initiator_iqn
    );
    Failure::new(Code::FailedPrecondition, "EXPORT_IN_USE", message).next(format!(
        "see: tether show {id}\nadd that compute host to the config, or end its use of the export"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_typed_again_exactly() {
        for (bytes, word) in
            [(2 << 30, "2GiB"), (3 << 29, "1.5GiB"), (10_000_000_000, "10000000000"), (700, "700B")]
        {
            assert_eq!(size_word(ByteSize::try_from(bytes).unwrap()), word);
        }
    }
}
