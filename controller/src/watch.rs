//! `tether watch`: what happens on all hosts, a line for each event, until it is interrupted. A host that goes away is told, and
//! asked again until it is back. Not here: what an agent tells, and when.

use std::sync::Arc;
use std::time::Duration;

use prost_types::Timestamp;
use serde::Serialize;
use tether_proto::wire::{self, EventKind, EventState};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tonic::{Code, Streaming};

use crate::agent::{Agent, Kind};
use crate::call::Session;
use crate::config::Host;
use crate::failure::{Exit, Failure, FailureView, Result};
use crate::view::{Output, some, to_json};

/// A host that went away is asked again so often.
const AGAIN_EVERY: Duration = Duration::from_secs(5);
/// How long connecting, and opening the stream, may take.
const OPEN_TIME: Duration = Duration::from_secs(15);

/// One line for scripts.
#[derive(Debug, Serialize)]
struct EventView<'a> {
    host: &'a str,
    kind: String,
    state: String,
    at: String,
    attachment_id: Option<&'a str>,
    pool: Option<&'a str>,
    volume: Option<&'a str>,
    domain: Option<&'a str>,
    message: Option<&'a str>,
}

#[derive(Debug, Serialize)]
struct GoneView<'a> {
    host: &'a str,
    error: FailureView<'a>,
}

/// What a host has to say.
enum Word {
    Event(Box<wire::Event>),
    Gone(Box<Failure>),
}

/// Tells what happens until somebody interrupts it. Ends by itself only when no host could be asked even once.
pub(crate) async fn watch(session: &Arc<Session>) -> Result<Output> {
    session.begins(Failure::new(Code::Cancelled, "INTERRUPTED", "interrupted; nothing was changed"));
    let (sender, mut words) = mpsc::channel(64);
    // They end with this set.
    let mut asking = JoinSet::new();
    let mut never = 0;
    for kind in [Kind::Storage, Kind::Compute] {
        for host in session.config.hosts(kind).values().cloned() {
            never += 1;
            asking.spawn(ask(session.clone(), kind, host, sender.clone()));
        }
    }
    drop(sender);
    while let Some((host, first, word)) = words.recv().await {
        match word {
            Word::Event(event) => {
                if tell(session, &host, &event)? {
                    return Output::new(&(), String::new());
                }
            }
            Word::Gone(failure) => {
                never -= usize::from(first);
                if first && never == 0 {
                    return Err(failure);
                }
                gone(session, &host, &failure)?;
            }
        }
    }
    Err(Failure::usage("CONFIG_INVALID", "the config has no host")
        .next("add one under [storage] or [compute]"))
}

/// Watches one host for ever. A word comes with whether the host never answered before.
async fn ask(session: Arc<Session>, kind: Kind, host: Host, words: mpsc::Sender<(String, bool, Word)>) {
    let mut pace = interval(AGAIN_EVERY);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut first, mut told) = (true, false);
    loop {
        pace.tick().await;
        let failure = match open(&session, kind, &host).await {
            Ok((agent, mut stream)) => loop {
                let word = match stream.message().await {
                    Ok(Some(event)) => Word::Event(Box::new(event)),
                    Ok(None) => break ended(&host),
                    Err(status) => break agent.explain(&status),
                };
                (first, told) = (false, false);
                if words.send((host.name.clone(), false, word)).await.is_err() {
                    return;
                }
            },
            Err(failure) => failure,
        };
        // That it is still away is no news.
        if !std::mem::replace(&mut told, true)
            && words.send((host.name.clone(), first, Word::Gone(failure))).await.is_err()
        {
            return;
        }
    }
}

async fn open(session: &Session, kind: Kind, host: &Host) -> Result<(Agent, Streaming<wire::Event>)> {
    let opening = async {
        let agent = Agent::connect(&session.config, kind, host).await?;
        let stream = agent.watch_events().await.map_err(|status| agent.explain(&status))?;
        Ok((agent, stream))
    };
    timeout(OPEN_TIME, opening).await.unwrap_or_else(|_| {
        let message = format!("{kind} host {} did not answer within {} s", host.name, OPEN_TIME.as_secs());
        Err(Failure::new(Code::Unavailable, "AGENT_UNREACHABLE", message)
            .next("see what the host is busy with"))
    })
}

fn ended(host: &Host) -> Box<Failure> {
    let message = format!("the agent of {} has ended", host.name);
    Failure::new(Code::Unavailable, "AGENT_UNREACHABLE", message).next("see its log there, with journalctl")
}

/// Prints an event; true when nobody reads any more.
fn tell(session: &Session, host: &str, event: &wire::Event) -> Result<bool> {
    let at = time(event.at_unix_microseconds);
    let (kind, state) = (kind_word(event.kind()), state_word(event.state()));
    if event.kind() == EventKind::Watching && !session.console.json() {
        session.console.note(&format!("{at} {host} is watched"));
        return Ok(false);
    }
    let text = if session.console.json() {
        to_json(&EventView {
            host,
            kind,
            state,
            at,
            attachment_id: some(&event.attachment_id),
            pool: some(&event.pool),
            volume: some(&event.volume),
            domain: some(&event.domain),
            message: some(&event.message),
        })?
    } else {
        let mut about = Vec::new();
        match (event.pool.as_str(), event.volume.as_str()) {
            ("", _) => {}
            (pool, "") => about.push(format!("pool {pool}")),
            (pool, volume) => about.push(format!("volume {pool}/{volume}")),
        }
        about.extend(some(&event.domain).map(|domain| format!("domain {domain}")));
        about.extend(some(&event.attachment_id).map(|id| format!("attachment {id}")));
        let (kind, about) = (kind.replace('_', " "), about.join(", "));
        let state = if event.state() == EventState::Happened { String::new() } else { format!(" {state}") };
        format!("{at} {host}: {kind}{state}: {about}: {}", event.message)
    };
    written(session.console.result(&text))
}

fn gone(session: &Session, host: &str, failure: &Failure) -> Result<()> {
    if session.console.json() {
        written(session.console.result(&to_json(&GoneView { host, error: failure.view() })?))?;
    } else {
        session.console.complain(&format!(
            "{}\n  asked again every {} s",
            failure.text(),
            AGAIN_EVERY.as_secs()
        ));
    }
    Ok(())
}

fn written(outcome: std::io::Result<()>) -> Result<bool> {
    match outcome {
        Ok(()) => Ok(false),
        // Whoever reads has seen enough.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(true),
        Err(error) => {
            Err(Failure::new(Code::Internal, "OUTPUT_FAILED", format!("an event cannot be written: {error}"))
                .exit(Exit::Other))
        }
    }
}

/// As RFC 3339 has it, in UTC.
fn time(unix_microseconds: i64) -> String {
    let seconds = unix_microseconds.div_euclid(1_000_000);
    let nanos = i32::try_from(unix_microseconds.rem_euclid(1_000_000) * 1000).unwrap_or_default();
    Timestamp { seconds, nanos }.to_string()
}

fn kind_word(kind: EventKind) -> String {
    kind.as_str_name().trim_start_matches("EVENT_KIND_").to_lowercase()
}

fn state_word(state: EventState) -> String {
    state.as_str_name().trim_start_matches("EVENT_STATE_").to_lowercase()
}
