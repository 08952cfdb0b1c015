//! `tether pool`: which pools there are, and their room. Not here: what is in them (`volume.rs`).

use std::fmt::Write as _;
use std::sync::Arc;

use serde::Serialize;
use tether_proto::wire;

use crate::agent::Agent;
use crate::arguments::{PoolVerb, StorageHost};
use crate::call::Session;
use crate::failure::Result;
use crate::survey::{Silent, ask_storage};
use crate::view::{Output, UnreachableView, size_text, some, table, transport_word};

/// Runs one of the pool verbs.
pub(crate) async fn run(session: &Arc<Session>, verb: &PoolVerb) -> Result<Output> {
    match verb {
        PoolVerb::List { host } => list(session, host).await,
    }
}

#[derive(Debug, Serialize)]
struct ListView<'a> {
    pools: Vec<PoolView<'a>>,
    unreachable: Vec<UnreachableView<'a>>,
}

#[derive(Debug, Serialize)]
struct PoolView<'a> {
    storage: &'a str,
    pool: &'a str,
    transport: String,
    size_bytes: u64,
    free_bytes: u64,
    provisioned_bytes: u64,
    problem: Option<&'a str>,
}

impl<'a> PoolView<'a> {
    fn new(storage: &'a str, pool: &'a wire::Pool) -> Self {
        Self {
            storage,
            pool: &pool.pool,
            transport: transport_word(pool.transport()),
            size_bytes: pool.size_bytes,
            free_bytes: pool.free_bytes,
            provisioned_bytes: pool.provisioned_bytes,
            problem: some(&pool.problem),
        }
    }

    /// An amount for people. That of a pool that cannot be used is not known; that of a full one is 0.
    fn amount(&self, bytes: u64) -> String {
        match (self.problem, bytes) {
            (None, 0) => "0 B".to_owned(),
            (None, bytes) => size_text(bytes),
            (Some(_), _) => "-".to_owned(),
        }
    }
}

async fn list(session: &Arc<Session>, host: &StorageHost) -> Result<Output> {
    let (told, silent) = ask_storage(session, host.storage.as_deref(), pools).await?;
    let all: Vec<PoolView<'_>> = told
        .iter()
        .flat_map(|told| told.answer.iter().map(|pool| PoolView::new(told.agent.name(), pool)))
        .collect();
    let mut text = table(
        ["POOL", "STORAGE", "TRANSPORT", "SIZE", "FREE", "PROVISIONED"],
        all.iter().map(|pool| {
            [
                pool.pool.to_owned(),
                pool.storage.to_owned(),
                pool.transport.clone(),
                pool.amount(pool.size_bytes),
                pool.amount(pool.free_bytes),
                pool.amount(pool.provisioned_bytes),
            ]
        }),
    );
    for pool in &all {
        if let Some(problem) = pool.problem {
            // Writing to a String does not fail.
            let _infallible =
                write!(text, "\n{} on {}: cannot be used now: {problem}", pool.pool, pool.storage);
        }
    }
    let view = ListView { pools: all, unreachable: silent.iter().map(Silent::view).collect() };
    Ok(Output::new(&view, text)?.without(&silent))
}

async fn pools(session: Arc<Session>, agent: Agent) -> Result<Vec<wire::Pool>> {
    let mut client = agent.storage();
    let reply = session.call(&agent).read(client.list_pools(wire::ListPoolsRequest {})).await?;
    Ok(reply.pools)
}
