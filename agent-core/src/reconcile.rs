//! Reconciling: what an agent found that is not as its journal has it, what became of it, and when what failed is tried again.
//! Not here: what is called for, which only the engines know.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Deserialize;
use tether_proto::AttachmentId;
use tether_proto::wire::{Event, EventKind, ReconcileAction, ReconcileItem, ReconcileResponse};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::events::Seen;
use crate::failure::{Failure, Reason};
use crate::operations::Operations;

/// How long a tombstone stays: a call that is older than this does not come any more (rule 3, F8).
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(try_from = "u16")]
pub struct TombstoneDays(u16);

impl Default for TombstoneDays {
    fn default() -> Self {
        Self(90)
    }
}

impl TryFrom<u16> for TombstoneDays {
    type Error = &'static str;
    fn try_from(days: u16) -> Result<Self, Self::Error> {
        match days {
            0 => Err("tombstones must be kept for 1 day at least: a late call must find its id spent"),
            days => Ok(Self(days)),
        }
    }
}

impl TombstoneDays {
    /// Is a tombstone of this time, in seconds since 1970, old enough to be forgotten? One that knows no time is kept.
    pub fn are_past(self, ended: Option<u64>) -> bool {
        ended.is_some_and(|ended| now().saturating_sub(ended) > u64::from(self.0) * DAY)
    }
}

/// Seconds.
const DAY: u64 = 24 * 60 * 60;

/// What one reconciliation found.
#[derive(Debug)]
pub struct Findings {
    began: Instant,
    items: Vec<ReconcileItem>,
    unchanged: u32,
}

impl Default for Findings {
    fn default() -> Self {
        Self { began: Instant::now(), items: Vec::new(), unchanged: 0 }
    }
}

impl Findings {
    /// One more is as it should be.
    pub fn unchanged(&mut self) {
        self.unchanged += 1;
    }

    /// What a dry run would do.
    pub fn planned(&mut self, object: &str, key: &str, action: ReconcileAction, why: &str) {
        self.items.push(ReconcileItem {
            key: key.to_owned(),
            object: object.to_owned(),
            action: action.into(),
            why: why.to_owned(),
            done: false,
            problem: String::new(),
        });
    }

    /// What a dry run could not look at.
    pub fn unseen(&mut self, object: &str, key: &str, why: &str, failure: &Failure) {
        self.planned(object, key, ReconcileAction::Report, why);
        if let Some(item) = self.items.last_mut() {
            item.problem = problem_of(failure);
        }
    }

    /// What became of it. What another operation works on is passed over: its caller has the answer. One that waited in a step
    /// for its turn, and did not get it, has failed.
    pub fn ended(
        &mut self,
        object: &str,
        key: &str,
        action: ReconcileAction,
        why: &str,
        outcome: Result<(), Failure>,
    ) {
        let problem = match &outcome {
            Ok(()) => String::new(),
            Err(failure)
                if failure.reason == Reason::OperationRunning
                    && failure.step.is_none_or(|step| step == "validate") =>
            {
                return self.unchanged();
            }
            Err(failure) => problem_of(failure),
        };
        let word = action.as_str_name().trim_start_matches("RECONCILE_ACTION_").to_lowercase();
        if outcome.is_ok() {
            tracing::info!(object, key, action = word, why, "reconciled");
        } else {
            tracing::error!(object, key, action = word, why, %problem, "not reconciled");
        }
        self.planned(object, key, action, why);
        if let Some(item) = self.items.last_mut() {
            item.done = outcome.is_ok();
            item.problem = problem;
        }
    }

    /// The findings of several, as one.
    pub fn join(&mut self, other: Self) {
        self.items.extend(other.items);
        self.unchanged += other.unchanged;
    }

    /// As it is told.
    pub fn into_response(mut self) -> ReconcileResponse {
        self.items.sort_by(|a, b| (&a.key, &a.object).cmp(&(&b.key, &b.object)));
        let took = u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX);
        ReconcileResponse { items: self.items, unchanged: self.unchanged, duration_microseconds: took }
    }
}

fn problem_of(failure: &Failure) -> String {
    format!("{}: {failure}; {}", failure.reason.as_str(), failure.advice())
}

/// What a dry run finds, as events: what two plans in a row have found, since an operation that begins and ends meanwhile may show
/// its half. Of what an operation works on, and of what could not be looked at, nothing is known. What ended long ago nobody has to
/// look at.
pub async fn drift<F>(operations: &Operations, plan: impl Fn() -> F) -> Seen
where
    F: Future<Output = ReconcileResponse>,
{
    let mut running = operations.running();
    let once = plan().await.items;
    running.extend(operations.running());
    if once.is_empty() {
        return Seen { holds: Vec::new(), unknown: running.iter().map(|key| about(key)).collect() };
    }
    let mut items = plan().await.items;
    running.extend(operations.running());
    items.retain(|item| item.action() != ReconcileAction::Forget);
    let is_known = |item: &ReconcileItem| item.problem.is_empty() && !running.contains(&item.key);
    let (known, unseen): (Vec<_>, Vec<_>) = items.into_iter().partition(is_known);
    let twice = known.into_iter().filter(|item| once.iter().any(|other| other.key == item.key));
    let unknown = unseen.iter().map(|item| &item.key).chain(&running);
    Seen {
        holds: twice.map(|item| Event { message: item.why, ..about(&item.key) }).collect(),
        unknown: unknown.map(|key| about(key)).collect(),
    }
}

/// The drift of an attachment id, POOL/VOLUME, or a pool.
fn about(key: &str) -> Event {
    let event = Event { kind: EventKind::Drift.into(), ..Event::default() };
    match key.split_once('/') {
        Some((pool, volume)) => Event { pool: pool.into(), volume: volume.into(), ..event },
        None if key.parse::<AttachmentId>().is_ok() => Event { attachment_id: key.into(), ..event },
        None => Event { pool: key.into(), ..event },
    }
}

/// How many are worked on at a time. They wait far more than they work: as many behind a dead server hold up no other.
pub const AT_A_TIME: usize = 64;

/// Works on several at a time: one that hangs holds up no other (F14). The results come as they are there.
pub async fn several<T: Send + 'static>(
    work: impl IntoIterator<Item = impl Future<Output = T> + Send + 'static>,
) -> Vec<T> {
    let (mut tasks, turns) = (JoinSet::new(), Arc::new(Semaphore::new(AT_A_TIME)));
    for one in work {
        let turns = turns.clone();
        tasks.spawn(async move {
            // Nobody closes it.
            let _turn = turns.acquire_owned().await;
            one.await
        });
    }
    let mut results = Vec::new();
    while let Some(done) = tasks.join_next().await {
        match done {
            Ok(result) => results.push(result),
            Err(error) => tracing::error!(%error, "a reconciliation died"),
        }
    }
    results
}

/// When what could not be brought back is tried again (F14): soon, for as long as an initiator waits for a lost session before its
/// guest has errors (F22), and then each time after twice as long.
#[derive(Debug, Default)]
pub struct Backoff {
    tries: u32,
}

impl Backoff {
    const FIRST: Duration = Duration::from_secs(15);
    /// So many times that soon: for four minutes.
    const SOON: u32 = 16;
    const LONGEST: Duration = Duration::from_secs(300);

    /// How long until the next try; nothing when nothing is left that another try could mend.
    pub fn after(&mut self, found: &ReconcileResponse) -> Option<Duration> {
        let left = |item: &ReconcileItem| !item.done && item.action() != ReconcileAction::Report;
        if !found.items.iter().any(left) {
            self.tries = 0;
            return None;
        }
        let doubled = self.tries.saturating_sub(Self::SOON - 1).min(16);
        let pause = Self::FIRST.saturating_mul(1 << doubled).min(Self::LONGEST);
        self.tries = self.tries.saturating_add(1);
        Some(pause)
    }

    /// Somebody asked for it: what comes next is tried soon again.
    pub fn reset(&mut self) {
        self.tries = 0;
    }
}

/// Seconds since 1970, for a tombstone.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f8_a_tombstone_is_kept_for_its_time_and_one_without_a_time_for_ever() {
        let (kept, past) = (TombstoneDays::default(), 90 * DAY);
        assert!(
            !kept.are_past(None) && !kept.are_past(Some(now())) && !kept.are_past(Some(now() - past + 60))
        );
        assert!(kept.are_past(Some(now() - past - 60)));
        assert!(!kept.are_past(Some(now() + past)), "a clock that was wrong forgets nothing");
        assert!(TombstoneDays::try_from(1).is_ok_and(|days| days.are_past(Some(now() - 2 * DAY))));
        assert!(TombstoneDays::try_from(0).is_err());
    }

    #[test]
    fn f14_what_failed_is_tried_again_after_longer_and_longer_and_a_report_never() {
        let item = |action: ReconcileAction, done: bool| {
            let item = ReconcileItem { action: action.into(), done, ..Default::default() };
            ReconcileResponse { items: vec![item], ..Default::default() }
        };
        let mut backoff = Backoff::default();
        assert_eq!(backoff.after(&item(ReconcileAction::Report, false)), None);
        assert_eq!(backoff.after(&item(ReconcileAction::Restore, true)), None);
        let pauses: Vec<_> = (0..40)
            .map(|_| backoff.after(&item(ReconcileAction::Restore, false)).unwrap().as_secs())
            .collect();
        assert_eq!(pauses[..16], [15; 16]);
        assert_eq!(pauses[16..22], [30, 60, 120, 240, 300, 300]);
        assert_eq!(pauses[39], 300);
        assert_eq!(backoff.after(&ReconcileResponse::default()), None);
        assert_eq!(backoff.after(&item(ReconcileAction::Undo, false)), Some(Backoff::FIRST));
    }

    #[tokio::test(start_paused = true)]
    async fn f14_those_that_hang_hold_up_no_other() {
        let (sender, mut arrived) = tokio::sync::mpsc::unbounded_channel();
        let working = several((0..200).map(|number| {
            let sender = sender.clone();
            async move {
                if number < 50 {
                    std::future::pending::<()>().await;
                }
                sender.send(number).unwrap();
            }
        }));
        assert!(tokio::time::timeout(Duration::from_secs(60), working).await.is_err(), "fifty hang");
        let mut others = Vec::new();
        while let Ok(number) = arrived.try_recv() {
            others.push(number);
        }
        assert_eq!(others.len(), 150, "{others:?}");
    }

    #[test]
    fn what_somebody_works_on_is_no_finding_and_a_failure_says_what_to_do() {
        let mut findings = Findings::default();
        let action = ReconcileAction::Restore;
        findings.ended("export", "b", action, "gone", Err(Failure::new(Reason::OperationRunning, "busy")));
        findings.ended("export", "a", action, "gone", Err(Failure::new(Reason::VolumeNotFound, "no volume")));
        let no_turn = Failure::new(Reason::OperationRunning, "others were busy").at("mount-share");
        findings.ended("attachment", "c", action, "gone", Err(no_turn));
        findings.ended("export", "0", action, "gone", Ok(()));
        let response = findings.into_response();
        assert_eq!((response.items.len(), response.unchanged), (3, 1));
        assert!(response.items[0].done && response.items[0].problem.is_empty());
        assert!(response.items[1].problem.starts_with("VOLUME_NOT_FOUND: no volume; "), "{response:?}");
    }
}
