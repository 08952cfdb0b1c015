//! What hangs in the kernel: calls that missed their deadline and whose thread has not come back (F27), and processes that
//! cannot be ended (F25). Nothing can take either out; until it is back, its key is `STUCK`, and everything else goes on. Not
//! here: the deadlines (`steps`, `command`).

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::failure::{Failure, Reason};
use crate::steps::{KERNEL_DEADLINE, answer, no_answer};

/// What has not come back from the kernel.
#[derive(Debug, Clone)]
struct Hang {
    verb: &'static str,
    what: What,
    since: Instant,
}

#[derive(Debug, Clone, Copy)]
enum What {
    /// A call of the agent's own, in this step.
    Step(&'static str),
    /// A process, by its id.
    Process(u32),
}

/// All keys of an agent where something hangs in the kernel.
#[derive(Debug, Clone, Default)]
pub struct Stuck {
    keys: Arc<Mutex<HashMap<String, Vec<Hang>>>>,
    changes: watch::Sender<()>,
}

impl Stuck {
    /// Runs what blocks, on what many operations use: a disk, a file system. Past [`KERNEL_DEADLINE`] the key is stuck until the
    /// thread comes back, and no other is begun: each would stay in the kernel beside it.
    ///
    /// # Errors
    /// The work's, `STUCK` when it misses the deadline or an earlier one still hangs, `INTERNAL` when it panicked.
    pub async fn blocking<T: Send + 'static, E: Into<Failure> + Send + 'static>(
        &self,
        key: &str,
        verb: &'static str,
        work: impl FnOnce() -> Result<T, E> + Send + 'static,
    ) -> Result<T, Failure> {
        self.check(key)?;
        let mut thread = tokio::task::spawn_blocking(work);
        match tokio::time::timeout(KERNEL_DEADLINE, &mut thread).await {
            Ok(joined) => answer(joined),
            Err(_) => {
                self.enter_call(key, verb, verb, KERNEL_DEADLINE, thread);
                Err(no_answer(KERNEL_DEADLINE))
            }
        }
    }

    /// Enters a key, and takes it out when `thread` comes back.
    pub(crate) fn enter_call<T: Send + 'static>(
        &self,
        key: &str,
        verb: &'static str,
        step: &'static str,
        deadline: Duration,
        thread: JoinHandle<T>,
    ) {
        let now = Instant::now();
        let since = now.checked_sub(deadline).unwrap_or(now);
        self.enter(key, Hang { verb, what: What::Step(step), since }, thread);
    }

    /// Enters a key where a process does not end though it was killed, and takes it out when the process has ended
    /// (pidfd_open(2)). `pid` is a child of this agent that was not waited for, so the number is still its own.
    pub fn enter_process(&self, key: &str, verb: &'static str, pid: u32) {
        let watched = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(Errno::SRCH);
        match watched.and_then(|pid| pidfd_open(pid, PidfdFlags::empty())) {
            Ok(descriptor) => {
                // The descriptor is readable when the process has ended.
                let wait = move || {
                    while poll(&mut [PollFd::new(&descriptor, PollFlags::IN)], None) == Err(Errno::INTR) {}
                };
                let thread = tokio::task::spawn_blocking(wait);
                let hang = Hang { verb, what: What::Process(pid), since: Instant::now() };
                self.enter(key, hang, thread);
            }
            Err(Errno::SRCH) => {}
            // Then the next one that is sent after it hangs, too, and is told.
            Err(error) => {
                tracing::error!(key, verb, pid, %error, "hangs in the kernel, and cannot be watched")
            }
        }
    }

    fn enter<T: Send + 'static>(&self, key: &str, hang: Hang, thread: JoinHandle<T>) {
        tracing::error!(
            key,
            verb = hang.verb,
            what = %hang.what,
            "hangs in the kernel: nothing is begun on this key until it comes back"
        );
        let (verb, what, since) = (hang.verb, hang.what, hang.since);
        self.lock().entry(key.to_owned()).or_default().push(hang);
        self.changes.send_replace(());
        let (stuck, key) = (self.clone(), key.to_owned());
        tokio::spawn(async move {
            // A panic has ended it, too.
            drop(thread.await);
            stuck.leave(&key, since);
            let milliseconds = since.elapsed().as_millis();
            tracing::warn!(key, verb, %what, milliseconds, "came back from the kernel");
            stuck.changes.send_replace(());
        });
    }

    /// May an operation begin on a key?
    ///
    /// # Errors
    /// `STUCK` while an earlier one hangs, with its step and age.
    pub fn check(&self, key: &str) -> Result<(), Failure> {
        let keys = self.lock();
        let Some(hang) = keys.get(key).and_then(|hangs| hangs.first()) else { return Ok(()) };
        let failure = Failure::new(Reason::Stuck, format!("{} ({key})", Words("", hang)));
        Err(match hang.what {
            What::Step(step) => failure.at(step),
            What::Process(_) => failure,
        })
    }

    /// What hangs now, a sentence for each key.
    pub fn list(&self) -> Vec<String> {
        let keys = self.lock();
        let first = keys.iter().filter_map(|(key, hangs)| Some(Words(key, hangs.first()?).to_string()));
        let mut list: Vec<String> = first.collect();
        list.sort();
        list
    }

    /// Tells each change of what hangs.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }

    /// One of a key's hangs has ended. Another one may still be there.
    fn leave(&self, key: &str, since: Instant) {
        let mut keys = self.lock();
        if let Some(hangs) = keys.get_mut(key) {
            if let Some(ended) = hangs.iter().position(|hang| hang.since == since) {
                hangs.remove(ended);
            }
            if hangs.is_empty() {
                keys.remove(key);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Vec<Hang>>> {
        // Each change is one insert or remove; a panic elsewhere cannot leave it half done.
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Step(step) => write!(f, "step {step}"),
            Self::Process(pid) => write!(f, "process {pid}"),
        }
    }
}

/// A hang, as a person reads it.
struct Words<'a>(&'a str, &'a Hang);

impl fmt::Display for Words<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(key, Hang { verb, what, since }) = self;
        let of = if key.is_empty() { String::new() } else { format!(" of {key}") };
        write!(f, "{verb}{of} hangs in the kernel: {what} for {} s", since.elapsed().as_secs())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[tokio::test(start_paused = true)]
    async fn f27_while_a_look_hangs_no_other_is_begun_on_the_same_and_any_on_another() {
        let (stuck, (come_back, held)) = (Stuck::default(), channel::<()>());
        let hangs = stuck.clone();
        let hanging = tokio::spawn(async move {
            hangs.blocking("directory /srv", "use", move || Ok::<_, Failure>(held.recv().ok())).await
        });
        tokio::task::yield_now().await;
        tokio::time::advance(KERNEL_DEADLINE * 2).await;
        assert_eq!(hanging.await.unwrap().unwrap_err().reason, Reason::Stuck);
        let told = stuck.list().remove(0);
        assert!(told.contains("of directory /srv hangs in the kernel"), "{told}");
        let begun = |key| stuck.blocking(key, "use", || Ok::<_, Failure>(7));
        let refused = begun("directory /srv").await.unwrap_err();
        assert!(refused.reason == Reason::Stuck && refused.message.contains("/srv"), "{refused}");
        assert_eq!(begun("directory /other").await.unwrap(), 7);
        let mut changes = stuck.changes();
        drop(come_back);
        while !stuck.list().is_empty() {
            changes.changed().await.unwrap();
        }
        assert_eq!(begun("directory /srv").await.unwrap(), 7);
    }
}
