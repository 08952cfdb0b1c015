//! The steps of one operation: run each, time it, tell those who watch. And work that blocks, with a deadline.
//!
//! Not here: which operations run (`operations`), and what the steps are.

use std::future::Future;
use std::time::{Duration, Instant};

use tether_proto::wire;
use tokio::sync::watch;

use crate::failure::{Failure, Reason};

/// What has happened in an operation so far.
#[derive(Debug, Default, Clone)]
pub(crate) struct Log {
    pub(crate) events: Vec<wire::StepEvent>,
    pub(crate) ended: bool,
}

/// Records the steps of one operation.
#[derive(Clone)]
pub struct Steps {
    began: Instant,
    pub(crate) log: watch::Sender<Log>,
}

impl Steps {
    pub(crate) fn new() -> Self {
        Self { began: Instant::now(), log: watch::Sender::new(Log::default()) }
    }

    /// Runs one step. A failure without a step of its own gets this one's name.
    ///
    /// # Errors
    /// The step's.
    pub async fn run<T, E: Into<Failure>>(
        &self,
        step: &'static str,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, Failure> {
        tracing::debug!(step, "step begins");
        self.record(step, wire::StepState::Started, String::new());
        let outcome = async {
            crate::fault::check(step, "before")?;
            let value = work.await.map_err(Into::into)?;
            crate::fault::check(step, "after")?;
            Ok(value)
        };
        match outcome.await {
            Ok(value) => {
                self.record(step, wire::StepState::Done, String::new());
                Ok(value)
            }
            Err(failure) => {
                let failure: Failure = failure;
                let failure = failure.at(step);
                tracing::warn!(step, reason = failure.reason.as_str(), error = %failure, "step failed");
                self.record(step, wire::StepState::Failed, failure.message.clone());
                Err(failure)
            }
        }
    }

    /// Runs one step that blocks, on a thread that may block, within [`KERNEL_DEADLINE`].
    ///
    /// # Errors
    /// As [`blocking`].
    pub async fn run_blocking<T: Send + 'static, E: Into<Failure> + Send + 'static>(
        &self,
        step: &'static str,
        work: impl FnOnce() -> Result<T, E> + Send + 'static,
    ) -> Result<T, Failure> {
        self.run(step, blocking(KERNEL_DEADLINE, work)).await
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

    fn record(&self, step: &str, state: wire::StepState, progress: String) {
        let event = wire::StepEvent {
            step: step.to_owned(),
            state: state.into(),
            at_microseconds: self.microseconds(),
            progress,
        };
        self.log.send_modify(|log| log.events.push(event));
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
        Ok(Ok(result)) => result.map_err(Into::into),
        Ok(Err(error)) => Err(Failure::from_error(Reason::Internal, &error)),
        Err(_) => Err(Failure::new(
            Reason::Stuck,
            format!("the kernel has not answered for {} s", deadline.as_secs()),
        )),
    }
}
