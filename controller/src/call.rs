//! Calling an agent: reads with a deadline; mutations with a deadline, live progress, and a retry of the same call when
//! the connection broke, because every mutation is idempotent and a retry joins it. Not here: which calls in what order.

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tether_proto::wire;
use tether_proto::wire::watch_operation_request::Key;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout, timeout_at};
use tonic::{Code, Response, Status, Streaming};

use crate::agent::{Agent, Kind};
use crate::config::{Config, Host};
use crate::console::Console;
use crate::failure::{Certainty, Failure, Result};
use crate::progress::Progress;

/// A call that broke is sent again at most this often: nothing announces that an agent is back.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// How long opening the step stream may take; the verb goes on without it.
const WATCH_TIME: Duration = Duration::from_secs(1);
/// How long the last steps of a failed operation may take to come in.
const DRAIN_TIME: Duration = Duration::from_millis(200);
/// After this long without an event, running steps are named.
const QUIET_TIME: Duration = Duration::from_secs(1);

/// One run of the command.
pub(crate) struct Session {
    pub(crate) console: Arc<Console>,
    pub(crate) config: Config,
    pub(crate) deadline: Instant,
    /// What goes on in the agents if this process is interrupted now.
    in_flight: Mutex<Option<Box<Failure>>>,
}

impl Session {
    pub(crate) fn new(console: Arc<Console>, config: Config, time: Duration) -> Self {
        Self { console, config, deadline: Instant::now() + time, in_flight: Mutex::new(None) }
    }

    /// From now on agents may change something: what an interrupted command says.
    pub(crate) fn begins(&self, interrupted: Box<Failure>) {
        // Each change is one store; a panic cannot leave it half done.
        *self.in_flight.lock().unwrap_or_else(PoisonError::into_inner) = Some(interrupted);
    }

    /// What an interrupted command says.
    pub(crate) fn interrupted(&self) -> Option<Box<Failure>> {
        self.in_flight.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Connects to an agent.
    pub(crate) async fn connect(&self, kind: Kind, host: &Host) -> Result<Agent> {
        match timeout_at(self.deadline, Agent::connect(&self.config, kind, host)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(late(host, "connecting").not_sent()),
        }
    }

    /// A call to an agent, until this session's deadline.
    pub(crate) fn call<'a>(&'a self, agent: &'a Agent) -> Call<'a> {
        Call { console: &self.console, agent, deadline: self.deadline }
    }
}

/// A reply that carries a report.
pub(crate) trait Reply {
    /// What was done.
    fn report(&self) -> Option<&wire::OperationReport>;
}

macro_rules! replies {
    ($($name:ident),+) => { $(impl Reply for wire::$name {
        fn report(&self) -> Option<&wire::OperationReport> {
            self.report.as_ref()
        }
    })+ };
}
replies!(
    CreateVolumeResponse,
    ExtendVolumeResponse,
    DeleteVolumeResponse,
    ExportResponse,
    UnexportResponse,
    AttachResponse,
    DetachResponse,
    ResizeAttachmentResponse
);

/// An agent's answer and how long it took from here.
pub(crate) struct Answer<T> {
    pub(crate) reply: T,
    pub(crate) time: Duration,
}

/// How to call an agent.
pub(crate) struct Call<'a> {
    console: &'a Console,
    agent: &'a Agent,
    deadline: Instant,
}

impl Call<'_> {
    /// The same with a deadline of its own.
    pub(crate) fn until(self, deadline: Instant) -> Self {
        Self { deadline, ..self }
    }

    /// A call that changes nothing.
    pub(crate) async fn read<T>(
        &self,
        call: impl Future<Output = std::result::Result<Response<T>, Status>>,
    ) -> Result<T> {
        match timeout_at(self.deadline, call).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => {
                let mut failure = self.agent.explain(&status);
                if failure.certainty == Certainty::Unknown {
                    // A read has no outcome that could be unknown: the agent was not reached.
                    failure = Failure::new(Code::Unavailable, &failure.reason, failure.message)
                        .next("try again; if it stays, see the agent's log, and that our certificate is of the agent's authority");
                }
                Err(failure)
            }
            Err(_) => Err(late(&self.agent.host, "a question")),
        }
    }

    /// A mutation. Its failure is [`Certainty::Unknown`] when it was sent and no answer came in time.
    pub(crate) async fn mutate<T: Reply, F>(&self, key: Key, send: impl Fn() -> F) -> Result<Answer<T>>
    where
        F: Future<Output = std::result::Result<Response<T>, Status>>,
    {
        let begin = Instant::now();
        let mut progress = Progress::new(self.console, self.agent.kind);
        let mut pace = interval(RETRY_INTERVAL);
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut lost: Option<Box<Failure>> = None;
        loop {
            if timeout_at(self.deadline, pace.tick()).await.is_err() {
                return Err(self.unknown(lost));
            }
            match self.attempt(&key, &send, &mut progress).await {
                None => return Err(self.unknown(lost)),
                Some(Ok(reply)) => {
                    if let Some(report) = reply.report() {
                        progress.report(report);
                    }
                    return Ok(Answer { reply, time: begin.elapsed() });
                }
                Some(Err(status)) => {
                    let failure = self.agent.explain(&status);
                    match failure.certainty {
                        Certainty::Answered => return Err(failure),
                        // Not sent this time; after a first attempt that broke, that says nothing.
                        Certainty::NotSent if lost.is_none() => return Err(failure),
                        Certainty::NotSent | Certainty::Unknown => {}
                    }
                    if lost.is_none() {
                        self.console.note(&format!("{}; trying again", failure.message));
                    }
                    lost = Some(failure);
                }
            }
        }
    }

    /// One attempt; `None` when the deadline passed.
    async fn attempt<T, F>(
        &self,
        key: &Key,
        send: &impl Fn() -> F,
        progress: &mut Progress<'_>,
    ) -> Option<std::result::Result<T, Status>>
    where
        F: Future<Output = std::result::Result<Response<T>, Status>>,
    {
        // First the watch, so that no step is missed. Without it the verb goes on all the same.
        let watching = timeout(WATCH_TIME, self.agent.watch(key.clone()));
        let mut steps = match timeout_at(self.deadline, watching).await {
            Ok(watch) => watch.ok().and_then(std::result::Result::ok),
            Err(_) => return None,
        };
        let answer = send();
        tokio::pin!(answer);
        let outcome = loop {
            tokio::select! {
                biased;
                event = next_event(&mut steps) => match event {
                    Some(event) => progress.event(&event),
                    None => progress.still_running(),
                },
                answer = &mut answer => break answer,
                () = sleep_until(self.deadline) => return None,
            }
        };
        if outcome.is_err() {
            let drain = async {
                while let Some(stream) = &mut steps {
                    match stream.message().await {
                        Ok(Some(event)) => progress.event(&event),
                        Ok(None) | Err(_) => steps = None,
                    }
                }
            };
            // What has not come by now is left out.
            drop(timeout(DRAIN_TIME, drain).await);
        }
        Some(outcome.map(Response::into_inner))
    }

    fn unknown(&self, lost: Option<Box<Failure>>) -> Box<Failure> {
        let host = self.agent.name();
        let message = match lost {
            Some(lost) => format!("no answer from {host} before the deadline passed; {}", lost.message),
            None => format!("no answer from {host} before the deadline passed"),
        };
        Failure::new(Code::DeadlineExceeded, "OUTCOME_UNKNOWN", message).unknown().next(
            "the agent goes on with it; the same command again joins it, with --timeout it waits longer",
        )
    }
}

/// The next event; `None` when none came for a while. Never comes back without a stream.
async fn next_event(steps: &mut Option<Streaming<wire::StepEvent>>) -> Option<wire::StepEvent> {
    let event = match steps {
        Some(stream) => match timeout(QUIET_TIME, stream.message()).await {
            Ok(event) => event,
            Err(_) => return None,
        },
        None => std::future::pending().await,
    };
    match event {
        Ok(Some(event)) => Some(event),
        Ok(None) | Err(_) => {
            *steps = None;
            std::future::pending().await
        }
    }
}

fn late(host: &Host, doing: &str) -> Box<Failure> {
    Failure::new(
        Code::DeadlineExceeded,
        "DEADLINE_PASSED",
        format!("the deadline passed while {} did not answer ({doing})", host.name),
    )
    .next("give more time with --timeout, or see what the host is busy with")
}
