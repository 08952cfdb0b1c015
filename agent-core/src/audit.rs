//! The audit: a line of the log, target `audit`, for every call that may change something, and for everybody who was refused.
//! `who` and `peer` are the caller, `rpc` is the call, `attachment`, `volume` and `domain` what it was about, `outcome` and
//! `reason` how it ended. No line is made of a whole request: none can hold a secret.
//!
//! A change has its line when it ends, also when its caller went away before that. Refusals can be caused by anybody, so there
//! is a limit to their lines in a minute; those beyond it are counted, and the count has a line.

use std::collections::HashMap;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tether_proto::wire::{OperationReport, Outcome, ReconcileResponse};
use tokio::time::timeout;
use tonic::{Request, Response, Status};

use crate::failure::{Failure, Reason};
use crate::roles::Caller;
use crate::server::one_peer;

/// How long what came from outside may be in a line, in characters.
const LONGEST: usize = 200;
/// In this time …
const WINDOW: Duration = Duration::from_secs(60);
/// … one host has this many lines of refusals …
const LINES_OF_ONE: u32 = 30;
/// … and all together have this many.
const LINES: u32 = 300;

/// A call that was let in. The gate puts it into the request.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    pub(crate) caller: Arc<Caller>,
    /// The RPC's name, without its service.
    pub(crate) rpc: String,
}

/// A call that may change something, from its beginning to its line.
#[derive(Debug)]
pub struct Change {
    call: Option<Call>,
    began: Instant,
    attachment: Option<String>,
    volume: Option<String>,
    domain: Option<String>,
    written: bool,
}

impl Change {
    /// The change that a request asks for.
    pub fn of<T>(request: &Request<T>) -> Self {
        Self::new(request.extensions().get::<Call>().cloned())
    }

    fn new(call: Option<Call>) -> Self {
        Self { call, began: Instant::now(), attachment: None, volume: None, domain: None, written: false }
    }

    /// The attachment that it is about, as the request has it.
    #[must_use]
    pub fn attachment(mut self, id: &str) -> Self {
        self.attachment = Some(shown(id));
        self
    }

    /// The volume that it is about: on the storage host `POOL/NAME`, on the compute host, which does not know that, its serial.
    #[must_use]
    pub fn volume(mut self, volume: &str) -> Self {
        self.volume = Some(shown(volume));
        self
    }

    /// The domain that it is about.
    #[must_use]
    pub fn domain(mut self, domain: &str) -> Self {
        self.domain = Some(shown(domain));
        self
    }

    /// Does the work as a task of its own, so that it has its line whoever waits for it, and waits for it.
    ///
    /// # Errors
    /// The work's own.
    pub async fn run<T: Send + 'static>(
        mut self,
        work: impl Future<Output = Result<T, Failure>> + Send + 'static,
        report: fn(&T) -> Option<&OperationReport>,
    ) -> Result<Response<T>, Status> {
        let task = tokio::spawn(async move {
            let result = work.await;
            match &result {
                Ok(reply) => {
                    let outcome = report(reply).map_or(Outcome::Unspecified, OperationReport::outcome);
                    self.end(word(outcome.as_str_name(), "OUTCOME_"), None);
                }
                Err(failure) => self.end("FAILED", Some(failure)),
            }
            result
        });
        ended(task).await
    }

    /// The same for a reconciliation, of which each thing that was put right, or could not be, has a line.
    ///
    /// # Errors
    /// `INTERNAL` when the work panicked.
    pub async fn reconcile(
        mut self,
        work: impl Future<Output = ReconcileResponse> + Send + 'static,
    ) -> Result<Response<ReconcileResponse>, Status> {
        let task = tokio::spawn(async move {
            let found = work.await;
            let call = self.call.take();
            self.written = true;
            reconciled(call, self.began, &found);
            Ok(found)
        });
        ended(task).await
    }

    fn end(&mut self, outcome: &str, failure: Option<&Failure>) {
        self.written = true;
        let Call { caller, rpc } = self.call.take().unwrap_or_else(agent_itself);
        tracing::info!(
            target: "audit",
            who = shown(&caller.who),
            role = caller.role_name(),
            peer = peer(caller.peer),
            rpc,
            attachment = self.attachment,
            volume = self.volume,
            domain = self.domain,
            outcome,
            reason = failure.map(|failure| failure.reason.as_str()),
            error = failure.map(|failure| shown(&failure.message)),
            milliseconds = milliseconds(self.began),
            "audit: change"
        );
    }
}

impl Drop for Change {
    /// It panicked, or the agent ended first: what became of it is in the journal.
    fn drop(&mut self) {
        if !self.written {
            self.end("CUT_OFF", None);
        }
    }
}

async fn ended<T>(task: tokio::task::JoinHandle<Result<T, Failure>>) -> Result<Response<T>, Status> {
    match task.await {
        Ok(result) => Ok(Response::new(result?)),
        Err(_) => Err(Failure::new(Reason::Internal, "the agent's handler died of a panic").into()),
    }
}

/// Writes the lines of what the agent put right by itself, at its start or on SIGHUP.
pub(crate) fn reconciled_itself(began: Instant, found: &ReconcileResponse) {
    reconciled(None, began, found);
}

fn reconciled(call: Option<Call>, began: Instant, found: &ReconcileResponse) {
    let Call { caller, rpc } = call.unwrap_or_else(agent_itself);
    // Of what was only looked at, as in a dry run, there is nothing to tell.
    for item in found.items.iter().filter(|item| item.done || !item.problem.is_empty()) {
        let volume = item.object == "volume";
        tracing::info!(
            target: "audit",
            who = shown(&caller.who),
            role = caller.role_name(),
            peer = peer(caller.peer),
            rpc,
            attachment = Some(item.key.as_str()).filter(|_| !volume),
            volume = Some(item.key.as_str()).filter(|_| volume),
            action = word(item.action().as_str_name(), "RECONCILE_ACTION_"),
            outcome = if item.done { "DONE" } else { "FAILED" },
            error = Some(item.problem.as_str()).filter(|problem| !problem.is_empty()),
            milliseconds = milliseconds(began),
            "audit: change"
        );
    }
}

/// Nobody called: the agent does it by itself.
fn agent_itself() -> Call {
    let caller = Caller { who: "agent".to_owned(), role: None, peer: None };
    Call { caller: Arc::new(caller), rpc: "Reconcile".to_owned() }
}

/// The word of an enum of the wire without its prefix.
fn word(name: &'static str, prefix: &str) -> &'static str {
    name.strip_prefix(prefix).unwrap_or(name)
}

fn milliseconds(began: Instant) -> u64 {
    u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX)
}

fn peer(peer: Option<SocketAddr>) -> String {
    match peer {
        None => "local".to_owned(),
        Some(peer) => SocketAddr::new(peer.ip().to_canonical(), peer.port()).to_string(),
    }
}

/// What came from outside, shortened. The log escapes it.
fn shown(text: &str) -> String {
    let mut shown: String = text.chars().take(LONGEST).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    shown
}

/// Who was refused, and why.
#[derive(Debug, Default)]
pub(crate) struct Refusal<'a> {
    /// Who it is, if that is known.
    pub(crate) caller: Option<&'a Caller>,
    /// Where it called from.
    pub(crate) peer: Option<SocketAddr>,
    /// What it called.
    pub(crate) rpc: Option<&'a str>,
    /// Why, a word as in `google.rpc.ErrorInfo`.
    pub(crate) reason: &'static str,
    /// Why, a sentence.
    pub(crate) error: &'a str,
}

/// Writes refusals down, so many in a minute.
#[derive(Debug, Clone, Default)]
pub(crate) struct Refusals(Arc<Mutex<Option<Window>>>);

/// What was written since a moment.
#[derive(Debug)]
struct Window {
    began: Instant,
    lines: u32,
    of_one: HashMap<String, u32>,
    untold: u64,
}

impl Refusals {
    /// Writes a refusal down, or counts it.
    pub(crate) fn write(&self, refusal: &Refusal<'_>) {
        let from = match (refusal.peer, refusal.caller) {
            (Some(peer), _) => one_peer(peer.ip()).to_string(),
            (None, Some(caller)) => caller.who.clone(),
            (None, None) => String::new(),
        };
        if !self.has_room(from) {
            return;
        }
        tracing::info!(
            target: "audit",
            who = refusal.caller.map(|caller| shown(&caller.who)),
            role = refusal.caller.map(Caller::role_name),
            peer = peer(refusal.peer),
            rpc = refusal.rpc,
            reason = refusal.reason,
            error = shown(refusal.error),
            "audit: refused"
        );
    }

    fn has_room(&self, from: String) -> bool {
        let mut window = self.lock();
        let now = Instant::now();
        if window.as_ref().is_none_or(|window| now.duration_since(window.began) >= WINDOW) {
            tell(window.replace(Window { began: now, lines: 0, of_one: HashMap::new(), untold: 0 }));
        }
        let Some(window) = window.as_mut() else { return true };
        // The map grows with the lines, and so has a limit too.
        if window.lines < LINES {
            let of_one = window.of_one.entry(from).or_default();
            if *of_one < LINES_OF_ONE {
                *of_one += 1;
                window.lines += 1;
                return true;
            }
        }
        window.untold += 1;
        if window.untold == 1 {
            // Nobody may be refused after this: the count is told all the same when the time is over.
            let (refusals, rest) = (self.clone(), WINDOW.saturating_sub(now.duration_since(window.began)));
            tokio::spawn(async move {
                drop(timeout(rest, std::future::pending::<()>()).await);
                let over = refusals.lock().take_if(|window| window.began.elapsed() >= WINDOW);
                tell(over);
            });
        }
        false
    }

    fn lock(&self) -> MutexGuard<'_, Option<Window>> {
        // Counters only: none of them can be half changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn tell(over: Option<Window>) {
    if let Some(Window { untold: refusals @ 1.., .. }) = over {
        tracing::info!(target: "audit", refusals, "audit: refused, and too many to have a line each");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One address cannot fill the log, nor take the lines of others.
    #[tokio::test]
    async fn refusals_have_so_many_lines() {
        let refusals = Refusals::default();
        let lines =
            |from: &str, times: u32| (0..times).filter(|_| refusals.has_room(from.to_owned())).count();
        assert_eq!(lines("192.0.2.1", 1000), LINES_OF_ONE as usize);
        assert_eq!(lines("192.0.2.2", 5), 5);
        let all: usize = (0..1000).map(|number| lines(&format!("2001:db8::{number}"), 1)).sum();
        assert_eq!(all, (LINES - LINES_OF_ONE - 5) as usize);
        let window = refusals.lock().take().unwrap();
        assert_eq!(window.untold, 970 + 1000 - all as u64);
        assert!(window.of_one.len() <= LINES as usize, "who comes from many addresses takes no memory");
        assert_eq!(lines("192.0.2.1", 1), 1, "the next minute");
    }

    #[test]
    fn what_is_long_is_cut_and_an_address_is_written_in_one_way() {
        assert_eq!(shown(&"ü".repeat(LONGEST + 1)), "ü".repeat(LONGEST) + "…");
        assert_eq!(shown("short"), "short");
        assert_eq!(peer(Some("[::ffff:192.0.2.1]:7".parse().unwrap())), "192.0.2.1:7");
        assert_eq!(peer(None), "local");
    }
}
