//! `tether attach`: connector, export, attach, and what happens when a part of it fails. The rule: an export is taken
//! back only when this very call made it and no disk can stand on it. Not here: the other way round (`detach.rs`).

use std::fmt::Write as _;
use std::time::Duration;

use serde::Serialize;
use tether_proto::wire::watch_operation_request::Key;
use tether_proto::{AttachmentId, DiskOptions, wire};
use tokio::time::Instant;
use tonic::Code;
use uuid::Uuid;

use crate::agent::{Agent, Kind};
use crate::arguments::Attach;
use crate::call::{Answer, Session};
use crate::console::{shell_word, time_text};
use crate::failure::{Certainty, Failure, Result};
use crate::view::{AttachmentView, Output, ReportView, outcome_word, size_text};

/// The undo has this time, also when the deadline has passed.
const UNDO_TIME: Duration = Duration::from_secs(30);

/// Attaches a volume to a domain.
pub(crate) async fn attach(session: &Session, arguments: &Attach) -> Result<Output> {
    let begin = Instant::now();
    let disk = disk_options(arguments)?;
    let storage_host = session.config.host(Kind::Storage, arguments.storage.as_deref())?;
    let compute_host = session.config.host(Kind::Compute, arguments.compute.as_deref())?;
    let id = match arguments.id {
        Some(id) => id,
        None => AttachmentId::new(Uuid::new_v4())?,
    };
    session.console.note(&format!("attachment {id}"));
    let (storage, compute) = tokio::try_join!(
        session.connect(Kind::Storage, storage_host),
        session.connect(Kind::Compute, compute_host)
    )?;
    let verb = Verb { session, arguments, id, storage: &storage, compute: &compute };
    let what = format!("attach {} to {}", arguments.volume, arguments.domain);
    verb.run(disk, begin).await.map_err(|failure| failure.while_doing(&what).attachment(id))
}

/// The options, checked against each other before any agent is asked.
fn disk_options(arguments: &Attach) -> Result<wire::DiskOptions> {
    let persistence =
        if arguments.live_only { wire::Persistence::LiveOnly } else { wire::Persistence::Persistent };
    let options = wire::DiskOptions {
        bus: arguments.bus.map(|bus| wire::DiskBus::from(bus).into()).unwrap_or_default(),
        target_device: arguments.target_device.as_ref().map(ToString::to_string).unwrap_or_default(),
        cache: arguments.cache.map(|cache| wire::DiskCache::from(cache).into()).unwrap_or_default(),
        io: arguments.io.map(|io| wire::DiskIo::from(io).into()).unwrap_or_default(),
        discard: arguments.discard.map(|discard| wire::DiskDiscard::from(discard).into()).unwrap_or_default(),
        read_only: arguments.read_only,
        serial: arguments.serial.as_ref().map(ToString::to_string).unwrap_or_default(),
        persistence: persistence.into(),
    };
    DiskOptions::try_from(&options)?;
    Ok(options)
}

/// The command that goes on with an attachment: the same options, the same id.
fn same_again(arguments: &Attach, id: AttachmentId) -> String {
    let domain = shell_word(&arguments.domain.to_string());
    let mut text = format!("tether attach {} {domain}", arguments.volume);
    let options = [
        ("storage", arguments.storage.clone()),
        ("compute", arguments.compute.clone()),
        ("bus", arguments.bus.map(|value| value.to_string())),
        ("target-device", arguments.target_device.as_ref().map(ToString::to_string)),
        ("cache", arguments.cache.map(|value| value.to_string())),
        ("io", arguments.io.map(|value| value.to_string())),
        ("discard", arguments.discard.map(|value| value.to_string())),
        ("serial", arguments.serial.as_ref().map(ToString::to_string)),
    ];
    // Writing to a String does not fail.
    for (name, value) in options.into_iter().filter_map(|(name, value)| Some((name, value?))) {
        let _infallible = write!(text, " --{name} {}", shell_word(&value));
    }
    for (name, given) in [("read-only", arguments.read_only), ("live-only", arguments.live_only)] {
        if given {
            let _infallible = write!(text, " --{name}");
        }
    }
    let _infallible = write!(text, " --id {id}");
    text
}

#[derive(Debug, Serialize)]
struct AttachedView<'a> {
    attachment_id: String,
    volume: String,
    storage: &'a str,
    outcome: String,
    attachment: AttachmentView<'a>,
    export: ReportView,
    attach: ReportView,
    total_microseconds: u64,
}

struct Verb<'a> {
    session: &'a Session,
    arguments: &'a Attach,
    id: AttachmentId,
    storage: &'a Agent,
    compute: &'a Agent,
}

impl Verb<'_> {
    async fn run(&self, disk: wire::DiskOptions, begin: Instant) -> Result<Output> {
        let connector = self.connector().await?;
        self.session.begins(
            Failure::new(
                Code::Cancelled,
                "INTERRUPTED",
                "interrupted; the agents go on with what they were told",
            )
            .unknown()
            .while_doing(&format!("attach {} to {}", self.arguments.volume, self.arguments.domain))
            .attachment(self.id)
            .next(self.follow()),
        );
        let mut export = self.export(connector).await?;
        let Some(connection_info) = export.reply.connection_info.take() else {
            let failure = self.storage.incomplete("connection info");
            return Err(self.take_back(failure, &export.reply).await);
        };
        let attach = match self.plug(connection_info, disk).await {
            Ok(attach) => attach,
            Err(failure) => return Err(self.after_failed_attach(failure, &export.reply).await),
        };
        self.output(&export, &attach, begin.elapsed())
    }

    /// The connector. The storage agent is asked something harmless at the same time, so that a certificate that it
    /// does not accept is noticed before anything was done.
    async fn connector(&self) -> Result<wire::Connector> {
        let (mut storage, mut compute) = (self.storage.storage(), self.compute.compute());
        let request = wire::GetExportRequest { attachment_id: self.id.to_string() };
        let (storage_call, compute_call) = (self.session.call(self.storage), self.session.call(self.compute));
        let (connector, export) = tokio::join!(
            compute_call.read(compute.get_connector(wire::GetConnectorRequest {})),
            storage_call.read(storage.get_export(request))
        );
        match export {
            Err(failure) if failure.code != Code::NotFound => Err(failure),
            Ok(_) | Err(_) => connector,
        }
    }

    async fn export(&self, connector: wire::Connector) -> Result<Answer<wire::ExportResponse>> {
        let mode =
            if self.arguments.read_only { wire::AccessMode::ReadOnly } else { wire::AccessMode::ReadWrite };
        let request = wire::ExportRequest {
            attachment_id: self.id.to_string(),
            pool: self.arguments.volume.pool.to_string(),
            volume: self.arguments.volume.volume.to_string(),
            connector: Some(connector),
            access_mode: mode.into(),
        };
        let send = || {
            let (mut client, request) = (self.storage.storage(), request.clone());
            async move { client.export(request).await }
        };
        let outcome = self.session.call(self.storage).mutate(self.key(), send).await;
        outcome.map_err(|failure| match failure.certainty {
            Certainty::Unknown => failure
                .undo(format!(
                    "nothing: {} may have exported the volume; no disk was attached",
                    self.storage.name()
                ))
                .next(self.follow()),
            Certainty::Answered | Certainty::NotSent => failure,
        })
    }

    async fn plug(
        &self,
        connection_info: wire::ConnectionInfo,
        disk: wire::DiskOptions,
    ) -> Result<Answer<wire::AttachResponse>> {
        let request = wire::AttachRequest {
            attachment_id: self.id.to_string(),
            domain: self.arguments.domain.to_string(),
            connection_info: Some(connection_info),
            disk: Some(disk),
        };
        let send = || {
            let (mut client, request) = (self.compute.compute(), request.clone());
            async move { client.attach(request).await }
        };
        self.session.call(self.compute).mutate(self.key(), send).await
    }

    /// Takes the export back, or says why it stays and what to type.
    async fn after_failed_attach(
        &self,
        failure: Box<Failure>,
        export: &wire::ExportResponse,
    ) -> Box<Failure> {
        let compute = self.compute.name();
        if failure.certainty == Certainty::Unknown {
            let known = format!(
                "nothing: the volume is exported; whether the disk is in {} is not known",
                self.arguments.domain
            );
            return failure.undo(known).next(self.follow());
        }
        if matches!(failure.code, Code::AlreadyExists | Code::Aborted) {
            return keep(
                failure,
                &format!("the export stays: {compute} has this attachment already"),
                &self.follow(),
            );
        }
        if let Some(left) = failure.undo.clone() {
            let undo = format!("{compute} could not undo all: {left}; the export stays until that is gone");
            let next = format!("{}then type: tether detach {}", sentence(failure.next.as_deref()), self.id);
            return failure.undo(undo).next(next);
        }
        if failure.certainty == Certainty::Answered {
            // A repair that fails leaves the disk where it is, and a retry may have found what the first call made: only
            // the agent's record says that no disk stands on the export.
            if let Some(state) = self.still_there().await {
                return keep(failure, &format!("the export stays: {state}"), &self.follow());
            }
        }
        self.take_back(failure, export).await
    }

    /// What the compute agent still has of the attachment after it failed; nothing when it says so itself.
    async fn still_there(&self) -> Option<String> {
        let mut client = self.compute.compute();
        let request = wire::GetAttachmentRequest { attachment_id: self.id.to_string() };
        let call = self.session.call(self.compute).until(Instant::now() + UNDO_TIME);
        let compute = self.compute.name();
        match call.read(client.get_attachment(request)).await {
            Ok(status) if status.phase == "ended" => None,
            Ok(status) => Some(format!("{compute} still has this attachment, {}", status.phase)),
            Err(failure) if failure.code == Code::NotFound => None,
            Err(failure) => Some(format!(
                "{compute} did not say whether it still has this attachment: {}",
                failure.message
            )),
        }
    }

    async fn take_back(&self, failure: Box<Failure>, export: &wire::ExportResponse) -> Box<Failure> {
        let outcome = export.report.as_ref().map(wire::OperationReport::outcome);
        // A new id: no earlier call can have made this export.
        let ours = self.arguments.id.is_none() || outcome == Some(wire::Outcome::Created);
        if !ours {
            let next = format!("tether detach {} removes it", self.id);
            return keep(failure, "the export was there before this call and stays", &next);
        }
        let undone = match self.spend(failure.certainty).await {
            Ok(()) => self.unexport().await,
            Err(undo) => Err(undo),
        };
        match undone {
            Ok(()) => failure.undo("the export was removed again; nothing is left"),
            Err(undo) => {
                let next = format!(
                    "{}then finish the undo: tether detach {}",
                    sentence(failure.next.as_deref()),
                    self.id
                );
                let mut failure = failure.next(next);
                failure.undo_failure = Some(undo);
                failure
            }
        }
    }

    /// Makes sure that no copy of the attach that comes late finds the volume given to somebody else: the compute host
    /// refuses an id that was detached (rule 3). Over NFS the share may outlive this export.
    async fn spend(&self, certainty: Certainty) -> Result<()> {
        if certainty != Certainty::Answered {
            return Ok(());
        }
        let request = wire::DetachRequest { attachment_id: self.id.to_string(), ..Default::default() };
        let send = || {
            let (mut client, request) = (self.compute.compute(), request.clone());
            async move { client.detach(request).await }
        };
        let call = self.session.call(self.compute).until(Instant::now() + UNDO_TIME);
        let spent = call.mutate(self.key(), send).await;
        spent.map(drop).map_err(|undo| undo.while_doing(&format!("end attachment {}", self.id)))
    }

    async fn unexport(&self) -> Result<()> {
        let request = wire::UnexportRequest { attachment_id: self.id.to_string(), ..Default::default() };
        let send = || {
            let (mut client, request) = (self.storage.storage(), request.clone());
            async move { client.unexport(request).await }
        };
        let call = self.session.call(self.storage).until(Instant::now() + UNDO_TIME);
        let unexported = call.mutate(self.key(), send).await;
        unexported.map(drop).map_err(|undo| undo.while_doing(&format!("remove the export {}", self.id)))
    }

    fn output(
        &self,
        export: &Answer<wire::ExportResponse>,
        attach: &Answer<wire::AttachResponse>,
        time: Duration,
    ) -> Result<Output> {
        let attachment =
            attach.reply.attachment.as_ref().ok_or_else(|| self.compute.incomplete("attachment"))?;
        let outcome = attach.reply.report.as_ref().map(wire::OperationReport::outcome).unwrap_or_default();
        let done = match outcome {
            wire::Outcome::Unchanged => "already attached",
            wire::Outcome::Repaired => "repaired: attached",
            _ => "attached",
        };
        let view = AttachedView {
            attachment_id: self.id.to_string(),
            volume: self.arguments.volume.to_string(),
            storage: self.storage.name(),
            outcome: outcome_word(outcome),
            attachment: AttachmentView::new(self.compute.name(), attachment),
            export: ReportView::new(export.reply.report.as_ref(), export.time),
            attach: ReportView::new(attach.reply.report.as_ref(), attach.time),
            total_microseconds: u64::try_from(time.as_micros()).unwrap_or(u64::MAX),
        };
        let text = format!(
            "{done} {} to {} as {} (serial {}, {}) in {}: export {}, attach {}\nid {}",
            self.arguments.volume,
            attachment.domain,
            attachment.target_device,
            attachment.serial,
            size_text(attachment.size_bytes),
            time_text(time),
            time_text(export.time),
            time_text(attach.time),
            self.id
        );
        Output::new(&view, text)
    }

    fn key(&self) -> Key {
        Key::AttachmentId(self.id.to_string())
    }

    fn follow(&self) -> String {
        let id = self.id;
        let again = same_again(self.arguments, id);
        format!("see: tether show {id}\ngo on: {again}\nor take it back: tether detach {id}")
    }
}

/// Says why the export stays. The agent's advice comes first, then what to type.
fn keep(failure: Box<Failure>, undo: &str, commands: &str) -> Box<Failure> {
    let next = match &failure.next {
        Some(next) => format!("{next}\n{commands}"),
        None => commands.to_owned(),
    };
    failure.undo(undo).next(next)
}

fn sentence(next: Option<&str>) -> String {
    next.map(|next| format!("{next}; ")).unwrap_or_default()
}
