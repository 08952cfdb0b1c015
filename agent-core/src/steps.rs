//! The steps of one operation: run each, time it, tell those who watch. And work that blocks, with a deadline.
//!
//! Not here: which operations run (`operations`), and what the steps are.

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tether_proto::wire;
use tokio::sync::watch;
use tracing::field::{Empty, display};
use tracing::{Instrument, Span};

use crate::failure::{Failure, Reason};
use crate::metrics::Metrics;
use crate::stuck::Stuck;

/// What has happened in an operation so far.
#[derive(Debug, Default, Clone)]
pub(crate) struct Log {
    pub(crate) events: Vec<wire::StepEvent>,
    pub(crate) ended: bool,
    /// No further step begins: the agent is about to end.
    pub(crate) halted: bool,
}

impl Log {
    /// Does a step run now?
    pub(crate) fn in_step(&self) -> bool {
        let count = |wanted: &[wire::StepState]| {
            self.events.iter().filter(|event| wanted.contains(&event.state())).count()
        };
        count(&[wire::StepState::Started]) > count(&[wire::StepState::Done, wire::StepState::Failed])
    }
}

/// Records the steps of one operation.
#[derive(Clone)]
pub struct Steps {
    began: Instant,
    key: Arc<str>,
    verb: &'static str,
    stuck: Stuck,
    metrics: Metrics,
    span: Span,
    pub(crate) log: watch::Sender<Log>,
}

impl Steps {
    /// Those of `verb` of `key`; what hangs in the kernel is entered in `stuck`.
    pub(crate) fn new(verb: &'static str, key: &str, stuck: Stuck, metrics: Metrics) -> Self {
        let log = watch::Sender::new(Log::default());
        // Every line of the log says which operation it belongs to.
        // Spans of the highest level: a line that is in the log, however little is, says what it belongs to.
        let span = match key.contains('/') {
            true => tracing::error_span!("operation", verb, volume = key, attachment = Empty, domain = Empty),
            false => {
                tracing::error_span!("operation", verb, attachment = key, volume = Empty, domain = Empty)
            }
        };
        Self { began: Instant::now(), key: key.into(), verb, stuck, metrics, span, log }
    }

    /// The operation, as every line of the log names it.
    pub(crate) fn span(&self) -> &Span {
        &self.span
    }

    /// From now on the log says which volume it is about.
    pub fn about_volume(&self, volume: &impl fmt::Display) {
        self.span.record("volume", display(volume));
    }

    /// From now on the log says which domain it is about.
    pub fn about_domain(&self, domain: &impl fmt::Display) {
        self.span.record("domain", display(domain));
    }

    /// Runs one step. A failure without a step of its own gets this one's name. When the agent is about to end, it does not
    /// begin, and this does not return: the journal has what is done so far.
    ///
    /// # Errors
    /// The step's.
    pub async fn run<T, E: Into<Failure>>(
        &self,
        step: &'static str,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, Failure> {
        if !self.begin(step) {
            return std::future::pending().await;
        }
        tracing::debug!(step, "step begins");
        let began = Instant::now();
        let outcome = async {
            crate::fault::check(step, "before")?;
            let value = work.await.map_err(Into::into)?;
            crate::fault::check(step, "after")?;
            Ok(value)
        };
        // The names that OpenTelemetry has for a span that failed, for whoever collects them.
        let span =
            tracing::error_span!("step", step, otel.status_code = Empty, otel.status_description = Empty);
        match outcome.instrument(span.clone()).await {
            Ok(value) => {
                self.metrics.step(self.verb, step, began.elapsed(), None);
                self.record(step, wire::StepState::Done, String::new());
                Ok(value)
            }
            Err(failure) => {
                let failure: Failure = failure;
                let failure = failure.at(step);
                if let Some(pid) = failure.process {
                    self.stuck.enter_process(&self.key, self.verb, pid);
                }
                span.record("otel.status_code", "ERROR");
                span.record("otel.status_description", failure.reason.as_str());
                self.metrics.step(self.verb, step, began.elapsed(), Some(failure.reason.as_str()));
                tracing::warn!(step, reason = failure.reason.as_str(), error = %failure, "step failed");
                self.record(step, wire::StepState::Failed, failure.message.clone());
                Err(failure)
            }
        }
    }

    /// Runs one step that blocks, on a thread that may block, within [`KERNEL_DEADLINE`]. One that misses it keeps its key
    /// `STUCK` until it comes back.
    ///
    /// # Errors
    /// As [`blocking`].
    pub async fn run_blocking<T: Send + 'static, E: Into<Failure> + Send + 'static>(
        &self,
        step: &'static str,
        work: impl FnOnce() -> Result<T, E> + Send + 'static,
    ) -> Result<T, Failure> {
        self.run(step, self.block(step, KERNEL_DEADLINE, work)).await
    }

    /// What blocks, as a part of a step, with a deadline of its own. What misses it keeps the key `STUCK` until it comes back.
    ///
    /// # Errors
    /// As [`blocking`].
    pub async fn block<T: Send + 'static, E: Into<Failure> + Send + 'static>(
        &self,
        step: &'static str,
        deadline: Duration,
        work: impl FnOnce() -> Result<T, E> + Send + 'static,
    ) -> Result<T, Failure> {
        let mut thread = tokio::task::spawn_blocking(work);
        match tokio::time::timeout(deadline, &mut thread).await {
            Ok(joined) => answer(joined),
            Err(_) => {
                self.stuck.enter_call(&self.key, self.verb, step, deadline, thread);
                Err(no_answer(deadline))
            }
        }
    }

    /// Says how far a step is.
    pub fn progress(&self, step: &'static str, progress: String) {
        self.record(step, wire::StepState::Progress, progress);
    }

    /// The reply's report: outcome, and the steps with their times.
    pub fn report(&self, outcome: wire::Outcome) -> wire::OperationReport {
        let mut steps: Vec<wire::StepTiming> = Vec::new();
        for event in &self.log.borrow().events {
            match event.state() {
                wire::StepState::Started => steps.push(wire::StepTiming {
                    step: event.step.clone(),
                    start_microseconds: event.at_microseconds,
                    duration_microseconds: 0,
                }),
                wire::StepState::Done | wire::StepState::Failed => {
                    if let Some(timing) = steps.iter_mut().rev().find(|timing| timing.step == event.step) {
                        timing.duration_microseconds = event.at_microseconds - timing.start_microseconds;
                    }
                }
                wire::StepState::Progress | wire::StepState::Unspecified => {}
            }
        }
        wire::OperationReport { outcome: outcome.into(), steps, total_microseconds: self.microseconds() }
    }

    /// Records that a step begins, unless none may.
    fn begin(&self, step: &str) -> bool {
        let event = self.event(step, wire::StepState::Started, String::new());
        let mut begun = false;
        self.log.send_modify(|log| {
            begun = !log.halted;
            if begun {
                log.events.push(event);
            }
        });
        begun
    }

    fn record(&self, step: &str, state: wire::StepState, progress: String) {
        let event = self.event(step, state, progress);
        self.log.send_modify(|log| log.events.push(event));
    }

    fn event(&self, step: &str, state: wire::StepState, progress: String) -> wire::StepEvent {
        wire::StepEvent {
            step: step.to_owned(),
            state: state.into(),
            at_microseconds: self.microseconds(),
            progress,
        }
    }

    fn microseconds(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX)
    }
}

impl Steps {
    /// `step login for 1.2 s`.
    pub(crate) fn describe(&self) -> String {
        let now = self.microseconds();
        match self.log.borrow().events.last() {
            Some(event) => {
                let age = Duration::from_micros(now.saturating_sub(event.at_microseconds));
                format!("step {} for {:.1} s", event.step, age.as_secs_f64())
            }
            None => format!("just begun, {:.1} s ago", Duration::from_micros(now).as_secs_f64()),
        }
    }
}

/// How long one call into the kernel may take: a write to configfs or sysfs, an fsync.
pub const KERNEL_DEADLINE: Duration = Duration::from_secs(60);

/// Runs what blocks on a thread that may block. Past the deadline the caller goes on and the thread stays where it is:
/// nothing can take it out of the kernel.
///
/// # Errors
/// The work's, `STUCK` when it misses the deadline, `INTERNAL` when it panicked.
pub async fn blocking<T: Send + 'static, E: Into<Failure> + Send + 'static>(
    deadline: Duration,
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, Failure> {
    match tokio::time::timeout(deadline, tokio::task::spawn_blocking(work)).await {
        Ok(joined) => answer(joined),
        Err(_) => Err(no_answer(deadline)),
    }
}

pub(crate) fn answer<T, E: Into<Failure>>(
    joined: Result<Result<T, E>, tokio::task::JoinError>,
) -> Result<T, Failure> {
    match joined {
        Ok(result) => result.map_err(Into::into),
        Err(error) => Err(Failure::from_error(Reason::Internal, &error)),
    }
}

pub(crate) fn no_answer(deadline: Duration) -> Failure {
    Failure::new(Reason::Stuck, format!("the kernel has not answered for {} s", deadline.as_secs()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operations::Operations;

    /// A thread that the kernel holds is played by one that waits for the test.
    #[tokio::test]
    async fn f27_a_call_that_hangs_keeps_its_key_stuck_until_it_comes_back_and_no_other() {
        let operations = Operations::default();
        let (come_back, held) = std::sync::mpsc::channel::<()>();
        let hanging = operations.run("a", "unexport", String::new(), |steps| async move {
            let work = move || held.recv().map_err(|error| Failure::from_error(Reason::Internal, &error));
            steps.run("remove-target", steps.block("remove-target", Duration::from_millis(5), work)).await
        });
        assert_eq!(hanging.await.unwrap_err().reason, Reason::Stuck);
        let verb = |key: &'static str| {
            operations.run(key, "unexport", String::new(), |_| async { Ok::<_, Failure>(7) })
        };
        let refused = verb("a").await.unwrap_err();
        assert_eq!((refused.reason, refused.step), (Reason::Stuck, Some("remove-target")));
        assert!(refused.message.contains("unexport hangs in the kernel"), "{refused}");
        assert_eq!(operations.stuck().list().len(), 1);
        assert_eq!(verb("b").await.unwrap(), 7);
        let mut changes = operations.stuck().changes();
        come_back.send(()).unwrap();
        changes.changed().await.unwrap();
        assert_eq!((operations.stuck().list().len(), verb("a").await.unwrap()), (0, 7));
    }
}
