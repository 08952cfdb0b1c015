//! Asking all hosts at once, and what they know of attachments, joined by id. An unreachable host hides nothing: it is
//! an answer of its own. Not here: what follows from it (`overview.rs`, `detach.rs`).

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;

use tether_proto::wire;
use tokio::task::JoinSet;
use tonic::Code;

use crate::agent::{Agent, Kind};
use crate::call::Session;
use crate::failure::{Failure, Result};
use crate::view::UnreachableView;

/// A host that did not answer, or not as it should.
#[derive(Debug, Clone)]
pub(crate) struct Silent {
    pub(crate) kind: Kind,
    pub(crate) host: String,
    pub(crate) failure: Box<Failure>,
}

impl Silent {
    pub(crate) fn view(&self) -> UnreachableView<'_> {
        UnreachableView { kind: self.kind.to_string(), host: &self.host, error: self.failure.view() }
    }

    pub(crate) fn warning(&self) -> String {
        let next = self.failure.next.as_ref().map(|next| format!("\n  next: {next}")).unwrap_or_default();
        format!("warning: {}{next}", self.failure.message)
    }
}

/// The names of hosts that did not answer, for a sentence.
pub(crate) fn names<'a>(silent: impl IntoIterator<Item = &'a Silent>) -> String {
    silent.into_iter().map(|silent| silent.host.as_str()).collect::<Vec<_>>().join(", ")
}

/// A host's answer; the agent is still connected.
pub(crate) struct Told<T> {
    pub(crate) agent: Agent,
    pub(crate) answer: T,
}

/// Asks all hosts of a kind at the same time. Answers come in the order of the hosts' names.
pub(crate) async fn ask_all<T, F>(
    session: &Arc<Session>,
    kind: Kind,
    ask: impl Fn(Arc<Session>, Agent) -> F,
) -> (Vec<Told<T>>, Vec<Silent>)
where
    T: Send + 'static,
    F: Future<Output = Result<T>> + Send + 'static,
{
    let (mut told, mut silent) = (Vec::new(), Vec::new());
    let mut connecting = JoinSet::new();
    for host in session.config.hosts(kind).values().cloned() {
        let session = session.clone();
        connecting.spawn(async move { (host.name.clone(), session.connect(kind, &host).await) });
    }
    let mut asking = JoinSet::new();
    while let Some(connected) = connecting.join_next().await {
        match connected {
            Ok((_, Ok(agent))) => {
                let answer = ask(session.clone(), agent.clone());
                asking.spawn(async move { (agent, answer.await) });
            }
            Ok((host, Err(failure))) => silent.push(Silent { kind, host, failure }),
            Err(error) => silent.push(broken(kind, &error)),
        }
    }
    while let Some(asked) = asking.join_next().await {
        match asked {
            Ok((agent, Ok(answer))) => told.push(Told { agent, answer }),
            Ok((agent, Err(failure))) => silent.push(Silent { kind, host: agent.name().to_owned(), failure }),
            Err(error) => silent.push(broken(kind, &error)),
        }
    }
    told.sort_by(|a, b| a.agent.name().cmp(b.agent.name()));
    silent.sort_by(|a, b| a.host.cmp(&b.host));
    (told, silent)
}

fn broken(kind: Kind, error: &tokio::task::JoinError) -> Silent {
    Silent { kind, host: "?".into(), failure: Failure::new(Code::Internal, "INTERNAL", error.to_string()) }
}

/// Asks the storage host that is named, or all of them. The one that is named fails the command; one of many is an answer
/// of its own.
pub(crate) async fn ask_storage<T, F>(
    session: &Arc<Session>,
    named: Option<&str>,
    ask: impl Fn(Arc<Session>, Agent) -> F,
) -> Result<(Vec<Told<T>>, Vec<Silent>)>
where
    T: Send + 'static,
    F: Future<Output = Result<T>> + Send + 'static,
{
    if named.is_none() && !session.config.hosts(Kind::Storage).is_empty() {
        return Ok(ask_all(session, Kind::Storage, ask).await);
    }
    let host = session.config.host(Kind::Storage, named)?;
    let agent = session.connect(Kind::Storage, host).await?;
    let answer = ask(session.clone(), agent.clone()).await?;
    Ok((vec![Told { agent, answer }], Vec::new()))
}

/// A part of an attachment that was found on a host.
pub(crate) struct Found<T> {
    pub(crate) agent: Agent,
    pub(crate) status: T,
}

/// What the hosts know of one attachment.
#[derive(Default)]
pub(crate) struct Known {
    pub(crate) export: Option<Found<wire::ExportStatus>>,
    pub(crate) attachment: Option<Found<wire::AttachmentStatus>>,
}

/// What was found, and who could not be asked.
pub(crate) struct Survey {
    pub(crate) found: BTreeMap<String, Known>,
    pub(crate) silent: Vec<Silent>,
    /// The compute agents that answered.
    pub(crate) compute: Vec<Agent>,
}

impl Survey {
    /// The hosts of a kind that could not be asked.
    pub(crate) fn silent_of(&self, kind: Kind) -> impl Iterator<Item = &Silent> {
        self.silent.iter().filter(move |silent| silent.kind == kind)
    }

    /// The first failure of a host that could not be asked.
    pub(crate) fn first_silent(&self) -> Option<&Silent> {
        self.silent.first()
    }
}

/// All attachments and exports of all hosts, without those that ended.
pub(crate) async fn all(session: &Arc<Session>) -> Survey {
    let exports = ask_all(session, Kind::Storage, |session, agent| async move {
        let mut client = agent.storage();
        let reply = session.call(&agent).read(client.list_exports(wire::ListExportsRequest {})).await?;
        Ok(reply.exports)
    });
    let attachments = ask_all(session, Kind::Compute, |session, agent| async move {
        let mut client = agent.compute();
        let reply =
            session.call(&agent).read(client.list_attachments(wire::ListAttachmentsRequest {})).await?;
        Ok(reply.attachments)
    });
    let (exports, attachments) = tokio::join!(exports, attachments);
    join(exports, attachments)
}

/// What all hosts know of one attachment, also when it ended.
pub(crate) async fn one(session: &Arc<Session>, id: &str) -> Survey {
    let (storage_id, compute_id) = (id.to_owned(), id.to_owned());
    let exports = ask_all(session, Kind::Storage, move |session, agent| {
        let request = wire::GetExportRequest { attachment_id: storage_id.clone() };
        async move {
            let mut client = agent.storage();
            absent_is_none(session.call(&agent).read(client.get_export(request)).await)
        }
    });
    let attachments = ask_all(session, Kind::Compute, move |session, agent| {
        let request = wire::GetAttachmentRequest { attachment_id: compute_id.clone() };
        async move {
            let mut client = agent.compute();
            absent_is_none(session.call(&agent).read(client.get_attachment(request)).await)
        }
    });
    let (exports, attachments) = tokio::join!(exports, attachments);
    join(exports, attachments)
}

fn absent_is_none<T>(outcome: Result<T>) -> Result<Vec<T>> {
    match outcome {
        Ok(found) => Ok(vec![found]),
        Err(failure) if failure.code == Code::NotFound => Ok(Vec::new()),
        Err(failure) => Err(failure),
    }
}

type Answers<T> = (Vec<Told<Vec<T>>>, Vec<Silent>);

fn join(exports: Answers<wire::ExportStatus>, attachments: Answers<wire::AttachmentStatus>) -> Survey {
    let mut found: BTreeMap<String, Known> = BTreeMap::new();
    for Told { agent, answer } in exports.0 {
        for status in answer {
            let known = found.entry(status.attachment_id.clone()).or_default();
            known.export = Some(Found { agent: agent.clone(), status });
        }
    }
    let compute = attachments.0.iter().map(|told| told.agent.clone()).collect();
    for Told { agent, answer } in attachments.0 {
        for status in answer {
            let known = found.entry(status.attachment_id.clone()).or_default();
            known.attachment = Some(Found { agent: agent.clone(), status });
        }
    }
    let silent = exports.1.into_iter().chain(attachments.1).collect();
    Survey { found, silent, compute }
}
