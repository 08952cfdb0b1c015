//! Operations: mutations that run as tasks of their own, one at a time for each key (rule 5).
//!
//! A caller that goes away stops nothing; the same call again joins the running one and gets the same answer;
//! another verb on the same key is refused with the step that runs and its age. Not here: the steps (`steps`).

use std::any::Any;
use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tether_proto::wire;
use tokio::sync::{oneshot, watch};
use tracing::Instrument;

use crate::events::Events;
use crate::failure::{Failure, Reason};
use crate::metrics::Metrics;
use crate::steps::{Log, Steps};
use crate::stuck::Stuck;

/// The verb of what an agent does by itself, see `reconcile`.
pub const RECONCILE: &str = "reconcile";

struct Running {
    verb: &'static str,
    /// The request as text, to tell a retry from another call. Never logged.
    request: String,
    steps: Steps,
    /// A `watch::Receiver<Option<Result<T, Failure>>>` of the verb's own `T`.
    result: Box<dyn Any + Send>,
}

type Waiters = HashMap<String, Vec<oneshot::Sender<watch::Receiver<Log>>>>;

#[derive(Default)]
struct Table {
    running: HashMap<String, Running>,
    waiting: Waiters,
}

/// All operations of an agent that run now, by key (an attachment id, or `pool/volume`).
#[derive(Clone, Default)]
pub struct Operations {
    table: Arc<Mutex<Table>>,
    stuck: Stuck,
    metrics: Metrics,
    events: Events,
}

/// How long a step that runs may take once no further one begins.
const LAST_STEP: Duration = Duration::from_secs(5);

/// What became of an operation that ran when the agent was told to end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stopped {
    /// It came to its end.
    Finished,
    /// It rests between two steps, the last of which this was; the journal has all of it.
    After(String),
    /// This step still runs.
    In(String),
}

impl Operations {
    /// Runs `work` under `key` as a task of its own, or joins the same call that runs already, and waits for it.
    /// Dropping the returned future ends the waiting and not the work.
    ///
    /// # Errors
    /// The work's own; `OPERATION_RUNNING` when another verb runs under the key, or the same with another request; `STUCK` while an
    /// earlier operation of the key hangs in the kernel; `INTERNAL` when
    /// the work panicked.
    pub async fn run<T, F>(
        &self,
        key: &str,
        verb: &'static str,
        request: String,
        work: impl FnOnce(Steps) -> F,
    ) -> Result<T, Failure>
    where
        T: Clone + Send + Sync + 'static,
        F: Future<Output = Result<T, Failure>> + Send + 'static,
    {
        // A caller's verb is not refused for what no caller asked for: it comes after. So does a reconciliation of another kind.
        while let Some(mut log) = self.reconciling(key, verb, &request) {
            // The sender goes away with the operation.
            drop(log.wait_for(|log| log.ended).await);
        }
        let mut result = self.start_or_join(key, verb, request, work)?;
        let outcome = match result.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone(),
            // The sender went away without a result: the task panicked.
            Err(_) => None,
        };
        outcome.unwrap_or_else(|| {
            Err(Failure::new(Reason::Internal, format!("{verb} of {key} died of a panic")))
        })
    }

    /// The reconciliation of a key that runs now, unless this call is the same and joins it.
    fn reconciling(&self, key: &str, verb: &str, request: &str) -> Option<watch::Receiver<Log>> {
        let table = self.lock();
        let running = table.running.get(key).filter(|running| running.verb == RECONCILE)?;
        (verb != RECONCILE || running.request != request).then(|| running.steps.log.subscribe())
    }

    fn start_or_join<T, F>(
        &self,
        key: &str,
        verb: &'static str,
        request: String,
        work: impl FnOnce(Steps) -> F,
    ) -> Result<watch::Receiver<Option<Result<T, Failure>>>, Failure>
    where
        T: Clone + Send + Sync + 'static,
        F: Future<Output = Result<T, Failure>> + Send + 'static,
    {
        let mut table = self.lock();
        if let Some(running) = table.running.get(key) {
            // Of the same verb with other parameters nobody knows yet whether the first will stand.
            let same = running.verb == verb && running.request == request;
            let joined = running.result.downcast_ref::<watch::Receiver<Option<Result<T, Failure>>>>();
            return match joined.filter(|_| same) {
                Some(result) => Ok(result.clone()),
                None => {
                    let other = if running.verb == verb { ", with other parameters" } else { "" };
                    Err(Failure::new(
                        Reason::OperationRunning,
                        format!(
                            "{} of {key} is under way{other}: {}",
                            running.verb,
                            running.steps.describe()
                        ),
                    ))
                }
            };
        }
        self.stuck.check(key)?;
        let steps = Steps::new(verb, key, self.stuck.clone(), self.metrics.clone());
        let (sender, receiver) = watch::channel(None);
        table.running.insert(
            key.to_owned(),
            Running { verb, request, steps: steps.clone(), result: Box::new(receiver.clone()) },
        );
        for waiter in table.waiting.remove(key).unwrap_or_default() {
            // A watcher that has gone away meanwhile is no trouble.
            drop(waiter.send(steps.log.subscribe()));
        }
        let guard = EndOfOperation { operations: self.clone(), key: key.to_owned(), steps: steps.clone() };
        let span = steps.span().clone();
        let (work, metrics, began) = (work(steps), self.metrics.clone(), Instant::now());
        let task = async move {
            let outcome = work.await;
            let word = outcome.as_ref().map_or_else(|failure| failure.reason.as_str(), |_| "ok");
            metrics.operation(verb, word, began.elapsed());
            // First out of the table, then the answer: who has the answer may start the next verb at once.
            drop(guard);
            sender.send_replace(Some(outcome));
        };
        tokio::spawn(task.instrument(span));
        Ok(receiver)
    }

    /// Ends what runs: waits until it has ended, at most `limit`; then lets no further step begin and waits for those that
    /// run. Gives `verb of key` and what became of it.
    pub async fn stop(&self, limit: Duration) -> Vec<(String, Stopped)> {
        let mut running: Vec<(String, Steps)> = {
            let table = self.lock();
            let all = table.running.iter();
            all.map(|(key, running)| (format!("{} of {key}", running.verb), running.steps.clone())).collect()
        };
        running.sort_by(|(one, _), (other, _)| one.cmp(other));
        wait_all(&running, limit, |log| log.ended).await;
        for (_, steps) in &running {
            steps.log.send_modify(|log| log.halted = true);
        }
        wait_all(&running, LAST_STEP, |log| log.ended || !log.in_step()).await;
        running
            .into_iter()
            .map(|(name, steps)| {
                let log = steps.log.borrow();
                let last = log.events.last().map_or("begin", |event| event.step.as_str()).to_owned();
                let stopped = match (log.ended, log.in_step()) {
                    (true, _) => Stopped::Finished,
                    (false, false) => Stopped::After(last),
                    (false, true) => Stopped::In(last),
                };
                (name, stopped)
            })
            .collect()
    }

    /// None yet, beside what hangs already.
    pub fn beside(stuck: Stuck) -> Self {
        Self { stuck, ..Self::default() }
    }

    /// What operations came to.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Where is told what happens.
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// What hangs in the kernel.
    pub fn stuck(&self) -> &Stuck {
        &self.stuck
    }

    /// The steps of the operation under `key` from its beginning, or of the next one to start; ends with it.
    pub async fn watch(&self, key: &str, events: tokio::sync::mpsc::Sender<wire::StepEvent>) {
        let waiter = {
            let mut table = self.lock();
            table.waiting.retain(|_, waiters| {
                waiters.retain(|waiter| !waiter.is_closed());
                !waiters.is_empty()
            });
            if let Some(running) = table.running.get(key) {
                Ok(running.steps.log.subscribe())
            } else {
                let (sender, receiver) = oneshot::channel();
                table.waiting.entry(key.to_owned()).or_default().push(sender);
                Err(receiver)
            }
        };
        let mut log = match waiter {
            Ok(log) => log,
            Err(receiver) => tokio::select! {
                log = receiver => match log { Ok(log) => log, Err(_) => return },
                () = events.closed() => return,
            },
        };
        let mut sent = 0;
        loop {
            let (fresh, ended) = {
                let log = log.borrow_and_update();
                (log.events[sent..].to_vec(), log.ended)
            };
            sent += fresh.len();
            for event in fresh {
                if events.send(event).await.is_err() {
                    return;
                }
            }
            if ended {
                return;
            }
            let changed =
                tokio::select! { changed = log.changed() => changed.is_ok(), () = events.closed() => false };
            if !changed {
                return;
            }
        }
    }

    /// The keys of all operations that run now.
    pub fn running(&self) -> HashSet<String> {
        self.lock().running.keys().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // Each change of the table is one insert or remove; a panic cannot leave it half done.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits until it holds of each, at most `limit` in all.
async fn wait_all(running: &[(String, Steps)], limit: Duration, holds: impl Fn(&Log) -> bool) {
    let deadline = tokio::time::Instant::now() + limit;
    for (_, steps) in running {
        let mut log = steps.log.subscribe();
        // Past the deadline the others are looked at without waiting.
        drop(tokio::time::timeout_at(deadline, log.wait_for(&holds)).await);
    }
}

/// Takes an operation out of the table when its task ends, also by a panic.
struct EndOfOperation {
    operations: Operations,
    key: String,
    steps: Steps,
}

impl Drop for EndOfOperation {
    fn drop(&mut self) {
        self.operations.lock().running.remove(&self.key);
        self.steps.log.send_modify(|log| log.ended = true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};
    use tokio::sync::{Notify, mpsc};

    fn held(
        gate: &Arc<Notify>,
        count: &Arc<AtomicU32>,
    ) -> impl Future<Output = Result<u32, Failure>> + use<> {
        let (gate, count) = (gate.clone(), count.clone());
        async move {
            gate.notified().await;
            Ok(count.fetch_add(1, Ordering::SeqCst) + 1)
        }
    }

    #[tokio::test]
    async fn the_same_call_joins_and_another_verb_is_told_the_step() {
        let (operations, gate, count) = (Operations::default(), Arc::new(Notify::new()), Arc::default());
        let first = operations.run("a", "attach", "r".into(), |steps| {
            let work = held(&gate, &count);
            async move { steps.run("login", work).await }
        });
        let second = operations.run("a", "attach", "r".into(), |_| held(&gate, &count));
        let other = async {
            tokio::task::yield_now().await;
            let aborted = operations.run::<u32, _>("a", "detach", "r".into(), |_| async { Ok(0) }).await;
            let differs = operations.run::<u32, _>("a", "attach", "x".into(), |_| async { Ok(0) }).await;
            gate.notify_one();
            (aborted.unwrap_err(), differs.unwrap_err())
        };
        let (first, second, (aborted, differs)) = tokio::join!(first, second, other);
        assert_eq!((first.unwrap(), second.unwrap()), (1, 1));
        assert_eq!(aborted.reason, Reason::OperationRunning);
        assert!(
            aborted.message.contains("attach of a") && aborted.message.contains("step login"),
            "{aborted}"
        );
        assert_eq!(differs.reason, Reason::OperationRunning);
        assert!(differs.message.contains("with other parameters"), "{differs}");
    }

    #[tokio::test]
    async fn a_verb_waits_for_a_reconciliation_of_its_key_and_a_reconciliation_for_nobody() {
        let (operations, gate, count) = (Operations::default(), Arc::new(Notify::new()), Arc::default());
        let reconciling = operations.run("a", RECONCILE, String::new(), |_| held(&gate, &count));
        let detaching = operations.run("a", "detach", String::new(), |_| async { Ok(7) });
        let other = async {
            tokio::task::yield_now().await;
            gate.notify_one();
        };
        let of_another_kind = operations.run("a", RECONCILE, "other".into(), |_| async { Ok(8) });
        let (first, second, third, ()) = tokio::join!(reconciling, detaching, of_another_kind, other);
        assert_eq!((first.unwrap(), second.unwrap(), third.unwrap()), (1, 7, 8));
        let attaching = operations.run("a", "attach", String::new(), |_| held(&gate, &count));
        let busy = async {
            tokio::task::yield_now().await;
            let refused = operations.run::<u32, _>("a", RECONCILE, String::new(), |_| async { Ok(0) }).await;
            gate.notify_one();
            refused.unwrap_err().reason
        };
        let (attached, reason) = tokio::join!(attaching, busy);
        assert_eq!((attached.unwrap(), reason), (2, Reason::OperationRunning));
    }

    #[tokio::test]
    async fn a_caller_that_goes_away_stops_nothing() {
        let (operations, gate, count) = (Operations::default(), Arc::new(Notify::new()), Arc::default());
        let call = operations.run("a", "attach", String::new(), |_| held(&gate, &count));
        assert!(tokio::time::timeout(Duration::from_millis(5), call).await.is_err());
        let retry = operations.run("a", "attach", String::new(), |_| async {
            Err::<u32, _>(Failure::new(Reason::Internal, "a second one ran"))
        });
        gate.notify_one();
        assert_eq!(retry.await.unwrap(), 1);
    }

    /// A step that takes so many seconds.
    async fn lasting(seconds: u64) -> Result<(), Failure> {
        let never = std::future::pending::<()>();
        let ended = tokio::time::timeout(Duration::from_secs(seconds), never).await;
        ended.or(Ok(()))
    }

    #[tokio::test(start_paused = true)]
    async fn an_end_finishes_or_halts_between_steps_and_says_which() {
        let operations = Operations::default();
        let never = |steps: Steps| async move {
            steps.run("login", std::future::pending::<Result<u32, Failure>>()).await
        };
        let between = |steps: Steps| async move {
            steps.run("probe", lasting(30)).await?;
            steps.run("scan", async { Ok::<u32, Failure>(1) }).await
        };
        let short = |steps: Steps| async move {
            steps.run("scan", lasting(3)).await?;
            Ok::<u32, Failure>(1)
        };
        let all = async {
            tokio::join!(
                operations.run("a", "attach", String::new(), never),
                operations.run("b", "attach", String::new(), between),
                operations.run("c", "attach", String::new(), short)
            )
        };
        let stopped = tokio::select! {
            _ = all => panic!("the first never ends"),
            stopped = async {
                tokio::task::yield_now().await;
                operations.stop(Duration::from_secs(26)).await
            } => stopped,
        };
        let expected = [Stopped::In("login".into()), Stopped::After("probe".into()), Stopped::Finished];
        let names = ["attach of a", "attach of b", "attach of c"].map(String::from);
        assert_eq!(stopped, names.into_iter().zip(expected).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn a_panic_is_an_answer_and_frees_the_key() {
        let operations = Operations::default();
        let outcome =
            operations.run::<u32, _>("a", "attach", String::new(), |_| async { panic!("boom") }).await;
        assert_eq!(outcome.unwrap_err().reason, Reason::Internal);
        assert_eq!(operations.run("a", "detach", String::new(), |_| async { Ok(7) }).await.unwrap(), 7);
    }

    #[tokio::test]
    async fn a_watcher_that_came_first_sees_every_step_and_the_end() {
        let operations = Operations::default();
        let (sender, mut receiver) = mpsc::channel(8);
        let watching = operations.watch("a", sender);
        let running = async {
            tokio::task::yield_now().await;
            operations
                .run("a", "attach", String::new(), |steps| async move {
                    steps.run("login", async { Ok::<_, Failure>(()) }).await?;
                    Ok(steps.report(wire::Outcome::Created))
                })
                .await
        };
        let (_, report) = tokio::join!(watching, running);
        let mut seen = Vec::new();
        while let Some(event) = receiver.recv().await {
            seen.push((event.step.clone(), event.state()));
        }
        assert_eq!(
            seen,
            [("login".into(), wire::StepState::Started), ("login".into(), wire::StepState::Done)]
        );
        assert_eq!(report.unwrap().steps.len(), 1);
    }
}
