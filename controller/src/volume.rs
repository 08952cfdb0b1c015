//! `tether volume`: make, show, list and delete volumes. Not here: making them larger (`extend.rs`), attaching them.

use std::sync::Arc;

use serde::Serialize;
use tether_proto::wire::watch_operation_request::Key;
use tether_proto::{PoolName, VolumeKey, wire};
use tonic::Code;

use crate::agent::{Agent, Kind};
use crate::arguments::{Create, StorageHost, VolumeVerb};
use crate::call::Session;
use crate::console::time_text;
use crate::extend::extend;
use crate::failure::{Failure, Result};
use crate::survey::{Silent, ask_storage};
use crate::view::{
    Output, ReportView, UnreachableView, VolumeView, format_word, outcome_word, provisioning_word, size_text,
    some, table, transport_word,
};

/// Runs one of the volume verbs.
pub(crate) async fn run(session: &Arc<Session>, verb: &VolumeVerb) -> Result<Output> {
    match verb {
        VolumeVerb::Create(arguments) => {
            let doing = format!("create {}", arguments.volume);
            create(session, arguments).await.map_err(|failure| failure.while_doing(&doing))
        }
        VolumeVerb::Extend(arguments) => {
            let doing = format!("extend {}", arguments.volume);
            extend(session, arguments).await.map_err(|failure| failure.while_doing(&doing))
        }
        VolumeVerb::Delete { volume, host } => {
            let doing = format!("delete {volume}");
            delete(session, volume, host).await.map_err(|failure| failure.while_doing(&doing))
        }
        VolumeVerb::Show { volume, host } => {
            let doing = format!("show {volume}");
            show(session, volume, host).await.map_err(|failure| failure.while_doing(&doing))
        }
        VolumeVerb::List { pool, host } => list(session, pool.as_ref(), host).await,
    }
}

#[derive(Debug, Serialize)]
struct ChangedView<'a> {
    outcome: String,
    storage: &'a str,
    volume: Option<VolumeView<'a>>,
    deleted: Option<String>,
    report: ReportView,
}

pub(crate) async fn connect(session: &Session, host: &StorageHost) -> Result<Agent> {
    let host = session.config.host(Kind::Storage, host.storage.as_deref())?;
    session.connect(Kind::Storage, host).await
}

/// What an interrupted command says: the same again joins it, by the volume's name.
pub(crate) fn begins(session: &Session, doing: &str, again: &str) {
    session.begins(
        Failure::new(Code::Cancelled, "INTERRUPTED", "interrupted; the agent goes on with what it was told")
            .unknown()
            .while_doing(doing)
            .next(format!("type the same again, or see: tether volume show {again}")),
    );
}

async fn create(session: &Session, arguments: &Create) -> Result<Output> {
    let volume = &arguments.volume;
    let agent = connect(session, &arguments.host).await?;
    begins(session, &format!("create {volume}"), &volume.to_string());
    let request = wire::CreateVolumeRequest {
        pool: volume.pool.to_string(),
        volume: volume.volume.to_string(),
        size_bytes: arguments.size.bytes(),
        // What is not said is the agent's to choose.
        format: arguments.format.map(|format| wire::VolumeFormat::from(format).into()).unwrap_or_default(),
        provisioning: arguments
            .provisioning
            .map(|how| wire::Provisioning::from(how).into())
            .unwrap_or_default(),
        multi_attach: arguments.multi_attach,
    };
    let send = || {
        let (mut client, request) = (agent.storage(), request.clone());
        async move { client.create_volume(request).await }
    };
    let answer = session.call(&agent).mutate(Key::Volume(volume.into()), send).await?;
    let made = answer.reply.volume.unwrap_or_default();
    let outcome = answer.reply.report.as_ref().map(wire::OperationReport::outcome).unwrap_or_default();
    let done = match outcome {
        wire::Outcome::Unchanged => "was there already:",
        wire::Outcome::Repaired => "repaired:",
        _ => "created",
    };
    let format = match made.format() {
        wire::VolumeFormat::Qcow2 => "qcow2, ",
        wire::VolumeFormat::Unspecified | wire::VolumeFormat::Raw => "",
    };
    let provisioning = provisioning_word(made.provisioning());
    let size = size_text(made.size_bytes);
    let time = time_text(answer.time);
    let text = format!("{done} {volume} ({size}, {format}{provisioning}) on {} in {time}", agent.name());
    let view = ChangedView {
        outcome: outcome_word(outcome),
        storage: agent.name(),
        volume: Some(VolumeView::new(agent.name(), &made)),
        deleted: None,
        report: ReportView::new(answer.reply.report.as_ref(), answer.time),
    };
    Output::new(&view, text)
}

async fn delete(session: &Session, volume: &VolumeKey, host: &StorageHost) -> Result<Output> {
    let agent = connect(session, host).await?;
    begins(session, &format!("delete {volume}"), &volume.to_string());
    // What is not there, or not as it should be, is for the agent to judge.
    let meant = match get(session, &agent, volume).await {
        Ok(found) => found.uuid,
        Err(failure) if matches!(failure.code, Code::Unavailable | Code::DeadlineExceeded) => {
            return Err(failure);
        }
        Err(_) => String::new(),
    };
    let request = wire::DeleteVolumeRequest {
        pool: volume.pool.to_string(),
        volume: volume.volume.to_string(),
        uuid: meant,
    };
    let send = || {
        let (mut client, request) = (agent.storage(), request.clone());
        async move { client.delete_volume(request).await }
    };
    let answer = session.call(&agent).mutate(Key::Volume(volume.into()), send).await?;
    let outcome = answer.reply.report.as_ref().map(wire::OperationReport::outcome).unwrap_or_default();
    let text = match outcome {
        wire::Outcome::Unchanged => format!("{volume} was not there on {}", agent.name()),
        _ => format!("deleted {volume} on {} in {}", agent.name(), time_text(answer.time)),
    };
    let view = ChangedView {
        outcome: outcome_word(outcome),
        storage: agent.name(),
        volume: None,
        deleted: Some(volume.to_string()),
        report: ReportView::new(answer.reply.report.as_ref(), answer.time),
    };
    Output::new(&view, text)
}

/// A volume as it is now.
pub(crate) async fn get(session: &Session, agent: &Agent, volume: &VolumeKey) -> Result<wire::Volume> {
    let mut client = agent.storage();
    let request = wire::GetVolumeRequest { pool: volume.pool.to_string(), volume: volume.volume.to_string() };
    session.call(agent).read(client.get_volume(request)).await
}

async fn show(session: &Session, volume: &VolumeKey, host: &StorageHost) -> Result<Output> {
    let agent = connect(session, host).await?;
    let found = get(session, &agent, volume).await?;
    let mut text = format!("volume {}/{}", found.pool, found.volume);
    for (label, value) in [
        ("storage host", agent.name().to_owned()),
        ("size", format!("{} ({} bytes)", size_text(found.size_bytes), found.size_bytes)),
        ("format", format_word(found.format())),
        ("provisioning", provisioning_word(found.provisioning())),
        ("reached over", transport_word(found.transport())),
        ("made by tether", if found.created_by_tether { "yes" } else { "no" }.to_owned()),
        ("uuid", found.uuid.clone()),
        ("wwn", some(&found.wwn).unwrap_or("-").to_owned()),
        ("serial", found.serial.clone()),
        ("multi-attach", if found.multi_attach { "yes" } else { "no" }.to_owned()),
        ("exported for", exported_for(&found)),
    ] {
        text.push_str(&format!("\n  {label:<15} {value}"));
    }
    Output::new(&VolumeView::new(agent.name(), &found), text)
}

fn exported_for(volume: &wire::Volume) -> String {
    match volume.exported_for.is_empty() {
        true => "-".to_owned(),
        false => volume.exported_for.join(", "),
    }
}

#[derive(Debug, Serialize)]
struct ListView<'a> {
    volumes: Vec<VolumeView<'a>>,
    unreachable: Vec<UnreachableView<'a>>,
}

async fn list(session: &Arc<Session>, pool: Option<&PoolName>, host: &StorageHost) -> Result<Output> {
    let pool = pool.map(ToString::to_string).unwrap_or_default();
    let ask = |session, agent| volumes(session, agent, pool.clone());
    let (told, silent) = ask_storage(session, host.storage.as_deref(), ask).await?;
    // A pool that is on one host only is no trouble of the others.
    let (absent, silent): (Vec<Silent>, Vec<Silent>) =
        silent.into_iter().partition(|silent| silent.failure.code == Code::NotFound);
    if let (true, true, Some(first)) = (told.is_empty(), silent.is_empty(), absent.into_iter().next()) {
        return Err(first.failure);
    }
    let all: Vec<(&str, &wire::Volume)> =
        told.iter().flat_map(|told| told.answer.iter().map(|volume| (told.agent.name(), volume))).collect();
    let text = table(
        ["STORAGE", "VOLUME", "SIZE", "FORMAT", "PROVISIONING", "OVER", "TETHER'S", "EXPORTED FOR"],
        all.iter().map(|(storage, volume)| {
            [
                (*storage).to_owned(),
                format!("{}/{}", volume.pool, volume.volume),
                size_text(volume.size_bytes),
                format_word(volume.format()),
                provisioning_word(volume.provisioning()),
                transport_word(volume.transport()),
                if volume.created_by_tether { "yes" } else { "no" }.to_owned(),
                exported_for(volume),
            ]
        }),
    );
    let view = ListView {
        volumes: all.iter().map(|(storage, volume)| VolumeView::new(storage, volume)).collect(),
        unreachable: silent.iter().map(Silent::view).collect(),
    };
    Ok(Output::new(&view, text)?.without(&silent))
}

async fn volumes(session: Arc<Session>, agent: Agent, pool: String) -> Result<Vec<wire::Volume>> {
    let mut client = agent.storage();
    let reply = session.call(&agent).read(client.list_volumes(wire::ListVolumesRequest { pool })).await?;
    Ok(reply.volumes)
}
