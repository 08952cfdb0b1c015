//! `tether list` and `tether show`: attachments as both hosts see them, joined by id, half states told apart and each
//! with what to do about it. Not here: asking (`survey.rs`), changing (`attach.rs`, `detach.rs`).

use std::sync::Arc;

use serde::Serialize;
use tether_proto::{AttachmentId, wire};
use tonic::Code;

use crate::agent::Kind;
use crate::call::Session;
use crate::failure::{Failure, Result};
use crate::survey::{self, Found, Known, Survey};
use crate::view::{
    AttachmentView, ExportView, Output, UnreachableView, access_mode_word, bus_word, format_word, size_text,
    some, table,
};

#[derive(Debug, Serialize)]
struct ListView<'a> {
    attachments: Vec<RowView<'a>>,
    unreachable: Vec<UnreachableView<'a>>,
}

#[derive(Debug, Serialize)]
pub(crate) struct RowView<'a> {
    attachment_id: &'a str,
    volume: Option<String>,
    storage: Option<&'a str>,
    domain: Option<&'a str>,
    compute: Option<&'a str>,
    target_device: Option<&'a str>,
    size_bytes: Option<u64>,
    state: &'static str,
    next: Option<String>,
    export: Option<ExportView<'a>>,
    attachment: Option<AttachmentView<'a>>,
}

/// All attachments of all hosts.
pub(crate) async fn list(session: &Arc<Session>) -> Result<Output> {
    let survey = survey::all(session).await;
    let rows = rows(&survey);
    let text = table_of(&rows);
    let unreachable = survey.silent.iter().map(survey::Silent::view).collect();
    Ok(Output::new(&ListView { attachments: rows, unreachable }, text)?.without(&survey.silent))
}

/// One row for each attachment.
pub(crate) fn rows(survey: &Survey) -> Vec<RowView<'_>> {
    survey.found.iter().map(|(id, known)| row(id, known, survey)).collect()
}

/// The rows as a table, and below it what to do about each that is half made.
pub(crate) fn table_of(rows: &[RowView<'_>]) -> String {
    let mut text = table(
        ["ID", "VOLUME", "STORAGE", "DOMAIN", "COMPUTE", "TARGET", "SIZE", "STATE"],
        rows.iter().map(|row| {
            let or_none = |text: Option<&str>| text.unwrap_or("-").to_owned();
            [
                row.attachment_id.to_owned(),
                or_none(row.volume.as_deref()),
                or_none(row.storage),
                or_none(row.domain),
                or_none(row.compute),
                or_none(row.target_device),
                size_text(row.size_bytes.unwrap_or_default()),
                row.state.replace('_', " "),
            ]
        }),
    );
    for row in rows {
        if let Some(next) = &row.next {
            text.push_str(&format!("\n{}: {}: {next}", row.attachment_id, row.state.replace('_', " ")));
        }
    }
    text
}

/// The phase of what is no more.
const ENDED: &str = "ended";

/// What both agents know of one attachment.
pub(crate) async fn show(session: &Arc<Session>, id: AttachmentId) -> Result<Output> {
    let id = id.to_string();
    let survey = survey::one(session, &id).await;
    let Some(known) = survey.found.get(&id) else {
        return Err(nothing_known(&id, &survey));
    };
    let row = row(&id, known, &survey);
    let mut lines: Vec<(&str, String)> = vec![("state", row.state.replace('_', " "))];
    if let Some(found) = &known.export {
        lines.extend(export_lines(found));
    }
    if let Some(found) = &known.attachment {
        lines.extend(attachment_lines(found));
    }
    if let Some(next) = &row.next {
        lines.push(("next", next.clone()));
    }
    let mut text = format!("attachment {id}");
    for (label, value) in lines {
        text.push_str(&format!("\n  {label:<24} {}", some(&value).unwrap_or("-")));
    }
    Ok(Output::new(&row, text)?.without(&survey.silent))
}

fn yes_no(value: bool) -> String {
    if value { "yes" } else { "no" }.to_owned()
}

/// What the storage host knows, in the words of the transport.
fn export_lines(found: &Found<wire::ExportStatus>) -> Vec<(&'static str, String)> {
    let export = &found.status;
    if export.phase == ENDED {
        return ended_lines(("storage host", found.agent.name()), "export", &export.may_be_lost);
    }
    let mut lines = vec![
        ("volume", format!("{}/{}", export.pool, export.volume)),
        ("storage host", found.agent.name().to_owned()),
        ("export", export.phase.clone()),
        ("access", access_mode_word(export.access_mode()).replace('_', "-")),
        ("for host", format!("{} ({})", export.hostname, export.initiator_iqn)),
    ];
    lines.extend(match export.transport() {
        wire::Transport::Nfs => vec![
            ("file on the storage host", export.file_path.clone()),
            ("shared with", export.client_addresses.join(", ")),
            ("directory shared", yes_no(export.enabled)),
            ("file open by a client", yes_no(export.connected)),
        ],
        // An agent that says nothing of it knows iSCSI alone.
        wire::Transport::Iscsi | wire::Transport::Unspecified => vec![
            ("target", export.target_iqn.clone()),
            ("target enabled", yes_no(export.enabled)),
            ("initiator logged in", yes_no(export.connected)),
        ],
    });
    lines
}

/// What the compute host knows, in the words of the transport.
fn attachment_lines(found: &Found<wire::AttachmentStatus>) -> Vec<(&'static str, String)> {
    let attachment = &found.status;
    if attachment.phase == ENDED {
        return ended_lines(("compute host", found.agent.name()), "attachment", &attachment.may_be_lost);
    }
    let mut lines = vec![
        ("domain", format!("{} ({})", attachment.domain, attachment.domain_uuid)),
        ("compute host", found.agent.name().to_owned()),
        ("attachment", attachment.phase.clone()),
        ("disk", format!("{} on {}", attachment.target_device, bus_word(attachment.bus()))),
        ("serial", attachment.serial.clone()),
        ("size", format!("{} ({} bytes)", size_text(attachment.size_bytes), attachment.size_bytes)),
    ];
    lines.extend(match attachment.transport() {
        wire::Transport::Nfs => vec![
            ("format", format_word(attachment.format())),
            ("file on the compute host", attachment.device_path.clone()),
            ("share", attachment.share.clone()),
            ("mounted", yes_no(attachment.connected)),
        ],
        wire::Transport::Iscsi | wire::Transport::Unspecified => vec![
            ("device on the host", attachment.device_path.clone()),
            ("portal", attachment.portal.clone()),
            ("session", yes_no(attachment.connected)),
        ],
    });
    lines.extend([
        ("in the running domain", yes_no(attachment.in_live_domain)),
        ("in its definition", yes_no(attachment.in_persistent_definition)),
    ]);
    lines
}

/// All that an agent keeps of what has ended.
fn ended_lines(
    (kind, host): (&'static str, &str),
    what: &'static str,
    may_be_lost: &[String],
) -> Vec<(&'static str, String)> {
    let lost = may_be_lost.iter().map(|sentence| ("may be lost", sentence.clone()));
    [(kind, host.to_owned()), (what, ENDED.to_owned())].into_iter().chain(lost).collect()
}

/// No reachable host knows the id; whether that means that it does not exist depends on the others.
pub(crate) fn nothing_known(id: &str, survey: &Survey) -> Box<Failure> {
    match survey.first_silent() {
        None => {
            Failure::new(Code::NotFound, "ATTACHMENT_NOT_FOUND", format!("no host knows the attachment {id}"))
                .next("see all with: tether list")
        }
        Some(silent) => {
            let names = survey::names(&survey.silent);
            let message =
                format!("no reachable host knows the attachment {id}; not asked: {}", silent.failure.message);
            Failure::new(silent.failure.code, "HOST_UNREACHABLE", message)
                .next(format!("bring back {names}, then type the same command again"))
        }
    }
}

fn row<'a>(id: &'a str, known: &'a Known, survey: &Survey) -> RowView<'a> {
    let (state, next) = state(id, known, survey);
    let attachment = known.attachment.as_ref();
    RowView {
        attachment_id: id,
        volume: known
            .export
            .as_ref()
            .filter(|found| !found.status.volume.is_empty())
            .map(|found| format!("{}/{}", found.status.pool, found.status.volume)),
        storage: known.export.as_ref().map(|found| found.agent.name()),
        domain: attachment.map(|found| found.status.domain.as_str()),
        compute: attachment.map(|found| found.agent.name()),
        target_device: attachment.and_then(|found| some(&found.status.target_device)),
        size_bytes: attachment.map(|found| found.status.size_bytes).filter(|size| *size > 0),
        state,
        next,
        export: known.export.as_ref().map(|found| ExportView::new(found.agent.name(), &found.status)),
        attachment: attachment.map(|found| AttachmentView::new(found.agent.name(), &found.status)),
    }
}

/// The state in one word, and what to do when it is not as it should be.
fn state(id: &str, known: &Known, survey: &Survey) -> (&'static str, Option<String>) {
    let detach = || Some(format!("tether detach {id}"));
    let bring_back =
        |kind| Some(format!("bring back {} to know more", survey::names(survey.silent_of(kind))));
    let export = known.export.as_ref().map(|found| &found.status);
    let attachment = known.attachment.as_ref().map(|found| &found.status);
    let export_ended = export.is_none_or(|export| export.phase == ENDED);
    let attachment_ended = attachment.is_none_or(|attachment| attachment.phase == ENDED);
    match (export, attachment) {
        (Some(_), Some(_)) | (Some(_), None) | (None, Some(_)) if export_ended && attachment_ended => {
            ("ended", None)
        }
        (Some(export), _) if attachment_ended => match export.phase.as_str() {
            _ if attachment.is_none() && survey.silent_of(Kind::Compute).next().is_some() => {
                ("exported_compute_unknown", bring_back(Kind::Compute))
            }
            "exporting" => ("exporting", None),
            "unexporting" => ("unexporting", detach()),
            _ => ("exported_only", detach()),
        },
        (_, Some(attachment)) => match attachment.phase.as_str() {
            "attaching" => ("attaching", None),
            "detaching" => ("detaching", detach()),
            _ if export.is_none() && survey.silent_of(Kind::Storage).next().is_some() => {
                ("attached_storage_unknown", bring_back(Kind::Storage))
            }
            _ if export_ended => ("attached_without_export", detach()),
            _ if !attachment.connected => (lost(attachment.transport()), Some(format!("tether show {id}"))),
            _ if !attachment.in_live_domain && !attachment.in_persistent_definition => {
                ("attached_disk_missing", detach())
            }
            _ if !attachment.in_live_domain => ("attached_domain_off", None),
            _ => ("attached", None),
        },
        (Some(_), None) | (None, None) => ("unknown", None),
    }
}

/// The state of a disk that has nothing under it any more.
fn lost(transport: wire::Transport) -> &'static str {
    match transport {
        wire::Transport::Nfs => "attached_share_lost",
        wire::Transport::Iscsi | wire::Transport::Unspecified => "attached_session_lost",
    }
}
