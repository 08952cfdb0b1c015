//! `tether list --all`: attachments, and all objects on the hosts with whose they are: owned, foreign or orphaned. Not here: how
//! that is found out, which the agents know.

use std::sync::Arc;

use serde::Serialize;
use tether_proto::wire;

use crate::agent::{Agent, Kind};
use crate::call::Session;
use crate::failure::Result;
use crate::overview;
use crate::survey::{self, Silent, Told, ask_all};
use crate::view::{Output, UnreachableView, table};

#[derive(Debug, Serialize)]
struct AllView<'a> {
    attachments: Vec<overview::RowView<'a>>,
    objects: Vec<ObjectView<'a>>,
    unreachable: Vec<UnreachableView<'a>>,
}

#[derive(Debug, Serialize)]
struct ObjectView<'a> {
    host: &'a str,
    kind: &'a str,
    name: &'a str,
    ownership: String,
    attachment_ids: &'a [String],
    reason: &'a str,
}

/// Attachments and objects of all hosts.
pub(crate) async fn list(session: &Arc<Session>) -> Result<Output> {
    let storage = ask_all(session, Kind::Storage, |session: Arc<Session>, agent: Agent| async move {
        let mut client = agent.storage();
        session.call(&agent).read(client.list_objects(wire::ListObjectsRequest {})).await
    });
    let compute = ask_all(session, Kind::Compute, |session: Arc<Session>, agent: Agent| async move {
        let mut client = agent.compute();
        session.call(&agent).read(client.list_objects(wire::ListObjectsRequest {})).await
    });
    let (survey, (mut told, silent), (more, others)) = tokio::join!(survey::all(session), storage, compute);
    told.extend(more);
    let objects = views(&told);
    let attachments = overview::rows(&survey);
    let mut text = overview::table_of(&attachments);
    text.push_str("\n\n");
    text.push_str(&table(
        ["HOST", "OBJECT", "NAME", "WHOSE", "ATTACHMENT"],
        objects.iter().map(|object| {
            [
                object.host.to_owned(),
                object.kind.to_owned(),
                object.name.to_owned(),
                object.ownership.clone(),
                if object.attachment_ids.is_empty() {
                    "-".to_owned()
                } else {
                    object.attachment_ids.join(", ")
                },
            ]
        }),
    ));
    for object in objects.iter().filter(|object| object.ownership == "orphaned") {
        text.push_str(&format!("\n{} {} on {}: {}", object.kind, object.name, object.host, object.reason));
    }
    // A host that is away was asked twice, and told of once.
    let mut silent: Vec<Silent> = silent.into_iter().chain(others).collect();
    silent.retain(|one| !survey.silent.iter().any(|other| other.host == one.host && other.kind == one.kind));
    let all = || survey.silent.iter().chain(&silent);
    let unreachable = all().map(Silent::view).collect();
    Ok(Output::new(&AllView { attachments, objects, unreachable }, text)?.without(all()))
}

fn views(told: &[Told<wire::ListObjectsResponse>]) -> Vec<ObjectView<'_>> {
    let objects =
        told.iter().flat_map(|told| told.answer.objects.iter().map(|object| (told.agent.name(), object)));
    objects
        .map(|(host, object)| ObjectView {
            host,
            kind: &object.kind,
            name: &object.name,
            ownership: object.ownership().as_str_name().trim_start_matches("OWNERSHIP_").to_lowercase(),
            attachment_ids: &object.attachment_ids,
            reason: &object.reason,
        })
        .collect()
}
