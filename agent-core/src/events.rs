//! What happens on a host, told to whoever watches (`Watch`): what happened once, as the engines say it, and what holds for a
//! while, as an agent looks for it as long as somebody watches. Not here: what holds, which only the agents know.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tether_proto::wire::{Event, EventKind, EventState};
use tokio::sync::{Barrier, Notify, broadcast, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, interval, timeout};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::failure::{Failure, Reason};

/// How many events a watcher may be behind.
const BEHIND: usize = 256;
/// How long those who watch wait for one look. What takes longer has shown nothing so far; it is not begun again before it ends.
const LOOK_DEADLINE: Duration = Duration::from_secs(60);

/// Where events are told. Clones are the same.
#[derive(Debug, Clone)]
pub struct Events {
    happened: broadcast::Sender<Event>,
}

impl Default for Events {
    fn default() -> Self {
        Self { happened: broadcast::channel(BEHIND).0 }
    }
}

/// What one look has shown, as events without a state and a time.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// What holds now.
    pub holds: Vec<Event>,
    /// Of what it could not be seen: it stays as it was.
    pub unknown: Vec<Event>,
}

type Look = Box<dyn Fn() -> Pin<Box<dyn Future<Output = Option<Seen>> + Send>> + Send + Sync>;

/// Something that an agent looks at again and again while somebody watches: one look at a time, however many watch. Clones are
/// the same.
#[derive(Clone)]
pub struct Source {
    every: Duration,
    /// The last look, and when it ended. Nothing was seen by one that could not.
    last: watch::Sender<(Option<Instant>, Option<Seen>)>,
    wanted: Arc<Notify>,
}

impl Source {
    /// Looks at once when somebody begins to watch, and then each time after so long. Nothing when nothing can be seen. To be
    /// called within a runtime.
    pub fn new<F>(every: Duration, look: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Option<Seen>> + Send + 'static,
    {
        let source = Self { every, last: watch::channel((None, None)).0, wanted: Arc::default() };
        tokio::spawn(source.clone().look_again(Box::new(move || Box::pin(look()))));
        source
    }

    async fn look_again(self, look: Look) {
        let mut pace = interval(self.every);
        loop {
            if self.last.receiver_count() == 0 {
                self.wanted.notified().await;
            }
            let mut looking = tokio::spawn(look());
            let seen = match timeout(LOOK_DEADLINE, &mut looking).await {
                Ok(Ok(seen)) => seen,
                Ok(Err(error)) => {
                    tracing::error!(%error, "what those who watch are to be told was not looked at");
                    None
                }
                Err(_) => {
                    tracing::error!(
                        seconds = LOOK_DEADLINE.as_secs(),
                        "what those who watch are to be told hangs: it is not known until it comes back"
                    );
                    self.last.send_replace((Some(Instant::now()), None));
                    // Each one more would hang beside it.
                    looking.await.unwrap_or_default()
                }
            };
            self.last.send_replace((Some(Instant::now()), seen));
            pace.reset();
            pace.tick().await;
        }
    }

    /// What the last look has shown, if it is young enough to be told to somebody who begins to watch.
    fn fresh(&self, (at, seen): &(Option<Instant>, Option<Seen>)) -> Option<Option<Seen>> {
        at.is_some_and(|at| at.elapsed() < self.every).then(|| seen.clone())
    }
}

/// The answer of `Watch`.
pub type EventStream = Pin<Box<dyn Stream<Item = Result<Event, Status>> + Send>>;

impl Events {
    /// Tells those who watch now what has happened once; its state and time are set here.
    pub fn happened(&self, event: Event) {
        // Nobody may be watching.
        drop(
            self.happened.send(Event { at_unix_microseconds: now(), ..event }.in_state(EventState::Happened)),
        );
    }

    /// What holds, then what changes, until the caller goes away or the agent ends.
    pub fn watch(&self, sources: Vec<Source>, shutdown: CancellationToken) -> EventStream {
        let (sender, receiver) = mpsc::channel(BEHIND);
        let happened = self.happened.subscribe();
        tokio::spawn(async move {
            tokio::select! {
                () = tell(happened, sources, &sender) => (),
                () = sender.closed() => (),
                () = shutdown.cancelled() => (),
            }
        });
        Box::pin(ReceiverStream::new(receiver))
    }
}

type Sender = mpsc::Sender<Result<Event, Status>>;

async fn tell(mut happened: broadcast::Receiver<Event>, sources: Vec<Source>, sender: &Sender) {
    let first = Arc::new(Barrier::new(sources.len() + 1));
    // They end with this set.
    let mut following = JoinSet::new();
    for source in sources {
        following.spawn(follow(source, sender.clone(), first.clone()));
    }
    first.wait().await;
    let watching =
        Event { kind: EventKind::Watching.into(), at_unix_microseconds: now(), ..Event::default() };
    let mut next = Ok(watching.in_state(EventState::Happened));
    while sender.send(next).await.is_ok() {
        next = match happened.recv().await {
            Ok(event) => Ok(event),
            Err(broadcast::error::RecvError::Lagged(count)) => {
                let missed = format!("the caller was too slow: {count} events were not told");
                // Without them the stream would not be what it says, so it ends.
                drop(sender.send(Err(Failure::new(Reason::EventsMissed, missed).into())).await);
                return;
            }
            Err(broadcast::error::RecvError::Closed) => return,
        };
    }
}

async fn follow(source: Source, sender: Sender, first: Arc<Barrier>) {
    let mut last = source.last.subscribe();
    source.wanted.notify_one();
    let mut known = BTreeMap::new();
    let mut seen = source.fresh(&last.borrow_and_update());
    let mut first = Some(first);
    loop {
        if let Some(seen) = seen.take() {
            for event in changes(&mut known, seen) {
                if sender.send(Ok(event)).await.is_err() {
                    return;
                }
            }
            if let Some(first) = first.take() {
                first.wait().await;
            }
        }
        if last.changed().await.is_err() {
            return;
        }
        seen = Some(last.borrow_and_update().1.clone());
    }
}

/// What an event is about: the same thing in another moment has the same.
type About = (i32, String, String, String);

fn about(event: &Event) -> About {
    let event = event.clone();
    (event.kind, event.attachment_id, event.pool, event.volume)
}

/// What began and what ended between two looks. What could not be seen stays as it was.
fn changes(known: &mut BTreeMap<About, Event>, seen: Option<Seen>) -> Vec<Event> {
    let Some(Seen { holds, unknown }) = seen else { return Vec::new() };
    let mut found: BTreeMap<About, Event> = holds.into_iter().map(|event| (about(&event), event)).collect();
    for about in unknown.iter().map(about) {
        match known.get(&about) {
            Some(event) => found.insert(about, event.clone()),
            None => found.remove(&about),
        };
    }
    let at = now();
    let changed = |event: &Event, state| Event { at_unix_microseconds: at, ..event.clone() }.in_state(state);
    let ended = known.iter().filter(|(about, _)| !found.contains_key(*about));
    let began = found.iter().filter(|(about, _)| !known.contains_key(*about));
    let changes = ended
        .map(|(_, event)| changed(event, EventState::Ended))
        .chain(began.map(|(_, event)| changed(event, EventState::Began)))
        .collect();
    *known = found;
    changes
}

trait InState {
    fn in_state(self, state: EventState) -> Self;
}

impl InState for Event {
    fn in_state(self, state: EventState) -> Self {
        Self { state: state.into(), ..self }
    }
}

/// Microseconds since 1970.
fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use tokio_stream::StreamExt;

    fn of(kind: EventKind, pool: &str) -> Event {
        Event { kind: kind.into(), pool: pool.into(), ..Event::default() }
    }

    /// A host on which something holds, that a test can change.
    #[derive(Clone, Default)]
    struct FakeHost(Arc<Mutex<Option<Seen>>>);

    impl FakeHost {
        fn holds(&self, holds: Vec<Event>) {
            *self.0.lock().unwrap() = Some(Seen { holds, unknown: Vec::new() });
        }

        fn shows(&self, seen: Option<Seen>) {
            *self.0.lock().unwrap() = seen;
        }

        fn source(&self) -> Source {
            let host = self.clone();
            Source::new(Duration::from_secs(1), move || {
                let found = host.0.lock().unwrap().clone();
                async move { found }
            })
        }
    }

    /// So many seconds go by.
    async fn pass(seconds: u64) {
        let nothing = timeout(Duration::from_secs(seconds), std::future::pending::<()>());
        nothing.await.expect_err("nothing happens");
    }

    async fn next(stream: &mut EventStream) -> (EventKind, EventState, String) {
        let event = timeout(Duration::from_secs(5), stream.next()).await.expect("an event").unwrap().unwrap();
        assert!(event.at_unix_microseconds > 0);
        (event.kind(), event.state(), event.pool)
    }

    #[tokio::test(start_paused = true)]
    async fn what_holds_is_told_first_then_what_begins_happens_and_ends() {
        use EventKind::{Drift, PoolFilling, Resized, Watching};
        use EventState::{Began, Ended, Happened};
        let (host, events) = (FakeHost::default(), Events::default());
        host.holds(vec![of(PoolFilling, "a")]);
        let mut stream = events.watch(vec![host.source()], CancellationToken::new());
        assert_eq!(next(&mut stream).await, (PoolFilling, Began, "a".into()));
        assert_eq!(next(&mut stream).await, (Watching, Happened, String::new()));
        events.happened(of(Resized, "b"));
        assert_eq!(next(&mut stream).await, (Resized, Happened, "b".into()));
        host.holds(vec![of(PoolFilling, "a"), of(Drift, "a")]);
        assert_eq!(next(&mut stream).await, (Drift, Began, "a".into()));
        // What cannot be seen has neither begun nor ended.
        host.shows(None);
        assert!(timeout(Duration::from_secs(10), stream.next()).await.is_err());
        host.shows(Some(Seen {
            holds: vec![of(Drift, "a"), of(Drift, "b")],
            unknown: vec![of(Drift, "b"), of(PoolFilling, "a")],
        }));
        assert!(timeout(Duration::from_secs(10), stream.next()).await.is_err());
        host.holds(vec![of(Drift, "a")]);
        assert_eq!(next(&mut stream).await, (PoolFilling, Ended, "a".into()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_look_that_hangs_holds_up_neither_the_stream_nor_its_end_and_is_not_begun_again() {
        let (events, shutdown) = (Events::default(), CancellationToken::new());
        let begun = Arc::new(Mutex::new(0));
        let count = begun.clone();
        let hanging = Source::new(Duration::from_secs(1), move || {
            *count.lock().unwrap() += 1;
            std::future::pending()
        });
        let mut stream = events.watch(vec![hanging.clone()], shutdown.clone());
        let first = timeout(LOOK_DEADLINE * 2, stream.next()).await.expect("told").unwrap().unwrap();
        assert_eq!(first.kind(), EventKind::Watching);
        events.happened(of(EventKind::Resized, "a"));
        assert_eq!(next(&mut stream).await.0, EventKind::Resized);
        let _another = events.watch(vec![hanging], shutdown.clone());
        assert!(timeout(LOOK_DEADLINE * 4, stream.next()).await.is_err());
        assert_eq!(*begun.lock().unwrap(), 1);
        shutdown.cancel();
        assert!(timeout(Duration::from_secs(5), stream.next()).await.expect("the end").is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_look_is_one_for_all_who_watch_and_none_for_nobody() {
        let looks = Arc::new(Mutex::new(0));
        let count = looks.clone();
        let source = Source::new(Duration::from_secs(10), move || {
            *count.lock().unwrap() += 1;
            async { Some(Seen::default()) }
        });
        pass(100).await;
        assert_eq!(*looks.lock().unwrap(), 0, "nobody watches");
        let events = Events::default();
        let mut streams: Vec<_> =
            (0..5).map(|_| events.watch(vec![source.clone()], CancellationToken::new())).collect();
        for stream in &mut streams {
            assert_eq!(next(stream).await.0, EventKind::Watching);
        }
        pass(95).await;
        assert_eq!(*looks.lock().unwrap(), 10, "one each ten seconds");
        drop(streams);
        pass(100).await;
        assert!(*looks.lock().unwrap() <= 11, "nobody watches any more");
        let mut late = events.watch(vec![source], CancellationToken::new());
        assert_eq!(next(&mut late).await.0, EventKind::Watching);
    }

    /// A look that panics has shown nothing, and the next one comes.
    #[tokio::test(start_paused = true)]
    async fn a_look_that_panics_shows_nothing() {
        let broken = Source::new(Duration::from_secs(1), || async { panic!("on purpose") });
        let mut stream = Events::default().watch(vec![broken], CancellationToken::new());
        assert_eq!(next(&mut stream).await.0, EventKind::Watching);
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_too_slow_is_told_so_and_has_an_end() {
        let events = Events::default();
        let mut stream = events.watch(Vec::new(), CancellationToken::new());
        assert_eq!(next(&mut stream).await.0, EventKind::Watching);
        for _ in 0..4 * BEHIND {
            events.happened(of(EventKind::Resized, "a"));
        }
        let mut told = Vec::new();
        while let Some(event) = timeout(Duration::from_secs(5), stream.next()).await.expect("the end") {
            told.push(event);
        }
        let last = told.pop().unwrap().unwrap_err();
        assert_eq!(last.code(), tonic::Code::DataLoss);
        assert!(last.message().contains("events were not told"), "{last:?}");
        assert!(told.iter().all(Result::is_ok));
    }
}
