//! Operations: mutations that run as tasks of their own, one at a time for each key (rule 5).
//!
//! A caller that goes away stops nothing; the same call again joins the running one and gets the same answer;
//! another verb on the same key is refused with the step that runs and its age. Not here: the steps (`steps`).

use std::any::Any;
use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tether_proto::wire;
use tokio::sync::{oneshot, watch};
use tracing::Instrument;

use crate::failure::{Failure, Reason};
use crate::steps::{Log, Steps};

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
}

impl Operations {
    /// Runs `work` under `key` as a task of its own, or joins the same call that runs already, and waits for it.
    /// Dropping the returned future ends the waiting and not the work.
    ///
    /// # Errors
    /// The work's own; `OPERATION_RUNNING` when another verb runs under the key; `DIFFERENT_PARAMETERS` when the
    /// same verb runs with another request; `INTERNAL` when the work panicked.
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
            let same_verb = running.verb == verb;
            if same_verb && running.request != request {
                return Err(Failure::new(
                    Reason::DifferentParameters,
                    format!("{verb} of {key} runs already, with other parameters"),
                ));
            }
            let joined = running.result.downcast_ref::<watch::Receiver<Option<Result<T, Failure>>>>();
            return match joined.filter(|_| same_verb) {
                Some(result) => Ok(result.clone()),
                None => Err(Failure::new(
                    Reason::OperationRunning,
                    format!("{} of {key} is under way: {}", running.verb, running.steps.describe()),
                )),
            };
        }
        let steps = Steps::new();
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
        let work = work(steps);
        let task = async move {
            let outcome = work.await;
            // First out of the table, then the answer: who has the answer may start the next verb at once.
            drop(guard);
            sender.send_replace(Some(outcome));
        };
        // Every line of the log says which operation it belongs to.
        tokio::spawn(task.instrument(tracing::info_span!("operation", verb, key)));
        Ok(receiver)
    }

    /// Waits until no operation runs, at most `limit`; gives what still runs then, `verb of key: step …`.
    pub async fn wait_until_idle(&self, limit: Duration) -> Vec<String> {
        let deadline = tokio::time::Instant::now() + limit;
        loop {
            let next = self.lock().running.values().next().map(|running| running.steps.log.subscribe());
            let Some(mut log) = next else { return Vec::new() };
            if tokio::time::timeout_at(deadline, log.wait_for(|log| log.ended)).await.is_err() {
                let table = self.lock();
                let still = table.running.iter();
                return still
                    .map(|(key, running)| format!("{} of {key}: {}", running.verb, running.steps.describe()))
                    .collect();
            }
        }
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

    fn lock(&self) -> MutexGuard<'_, Table> {
        // Each change of the table is one insert or remove; a panic cannot leave it half done.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
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
        assert_eq!(differs.reason, Reason::DifferentParameters);
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
