//! `tether reconcile`: all agents make what is match their journals, or say what they would do. Not here: what is called for,
//! which the agents know.

use std::sync::Arc;

use serde::Serialize;
use tether_proto::wire;

use crate::agent::{Agent, Kind};
use crate::call::Session;
use crate::failure::{Exit, Result};
use crate::survey::{Silent, Told, ask_all};
use crate::view::{Output, UnreachableView, some, table};

#[derive(Debug, Serialize)]
struct ReconcileView<'a> {
    dry_run: bool,
    items: Vec<ItemView<'a>>,
    unchanged: u64,
    unreachable: Vec<UnreachableView<'a>>,
}

#[derive(Debug, Serialize)]
struct ItemView<'a> {
    host: &'a str,
    object: &'a str,
    key: &'a str,
    action: String,
    why: &'a str,
    done: bool,
    problem: Option<&'a str>,
}

/// Asks every agent of the config. Fails when something could not be done.
pub(crate) async fn reconcile(session: &Arc<Session>, dry_run: bool) -> Result<Output> {
    let request = wire::ReconcileRequest { dry_run };
    let storage = ask_all(session, Kind::Storage, move |session: Arc<Session>, agent: Agent| async move {
        let mut client = agent.storage();
        session.call(&agent).read(client.reconcile(request)).await
    });
    let compute = ask_all(session, Kind::Compute, move |session: Arc<Session>, agent: Agent| async move {
        let mut client = agent.compute();
        session.call(&agent).read(client.reconcile(request)).await
    });
    let ((mut told, mut silent), (more, others)) = tokio::join!(storage, compute);
    told.extend(more);
    silent.extend(others);
    output(dry_run, &told, &silent)
}

fn output(dry_run: bool, told: &[Told<wire::ReconcileResponse>], silent: &[Silent]) -> Result<Output> {
    let items: Vec<ItemView<'_>> = told
        .iter()
        .flat_map(|told| told.answer.items.iter().map(|item| (told.agent.name(), item)))
        .map(|(host, item)| ItemView {
            host,
            object: &item.object,
            key: &item.key,
            action: action_word(item.action()),
            why: &item.why,
            done: item.done,
            problem: some(&item.problem),
        })
        .collect();
    let unchanged: u64 = told.iter().map(|told| u64::from(told.answer.unchanged)).sum();
    let rows = items.iter().map(|item| {
        let became = match (dry_run, item.done) {
            (true, _) => "planned",
            (false, true) => "done",
            (false, false) => "failed",
        };
        let words = [item.host, item.object, item.key, &item.action, became, item.why];
        words.map(str::to_owned)
    });
    let mut text = match items.is_empty() {
        true => "everything is as the journals have it".to_owned(),
        false => table(["HOST", "OBJECT", "KEY", "ACTION", "STATE", "WHY"], rows),
    };
    for item in &items {
        if let Some(problem) = item.problem {
            text.push_str(&format!("\n{} {} on {}: {problem}", item.object, item.key, item.host));
        }
    }
    text.push_str(&format!("\n{unchanged} as they should be"));
    let failed = items.iter().any(|item| item.problem.is_some());
    let view =
        ReconcileView { dry_run, items, unchanged, unreachable: silent.iter().map(Silent::view).collect() };
    let mut output = Output::new(&view, text)?;
    if failed {
        output.exit = Exit::Other;
    }
    Ok(output.without(silent))
}

fn action_word(action: wire::ReconcileAction) -> String {
    action.as_str_name().trim_start_matches("RECONCILE_ACTION_").to_lowercase()
}
