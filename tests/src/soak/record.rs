//! What the soak writes down: its log, the last lines of it, and its counts.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use anyhow::Context;
use serde::Serialize;

/// How many commands a mismatch shows.
const LAST: usize = 20;

/// How much was done.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Counts {
    /// Rounds that were carried out and compared with the model.
    pub rounds: usize,
    /// Orders, each of them one verb on one volume.
    pub orders: usize,
    /// Calls to the agents and commands, without those that only read.
    pub calls: usize,
    /// Calls that had to be made again, because they were cut off or something was away.
    pub retries: usize,
    /// Attachments that were made.
    pub attached: usize,
    /// Agents that were killed.
    pub kills: usize,
    /// Cuts of the network.
    pub cuts: usize,
    /// Creations that the pool had no room for.
    pub full_pools: usize,
    /// Late calls of ended attachments.
    pub late: usize,
    /// Exports that were refused because another attachment had the volume.
    pub second_writers: usize,
}

/// The log and the counts.
#[derive(Debug)]
pub(crate) struct Record {
    began: Instant,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    log: File,
    last: VecDeque<String>,
    counts: Counts,
}

impl Record {
    /// A new log.
    pub(crate) fn create(path: &Path) -> anyhow::Result<Self> {
        let log = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
        let state = State { log, last: VecDeque::new(), counts: Counts::default() };
        Ok(Self { began: Instant::now(), state: Mutex::new(state) })
    }

    /// One line of the log.
    pub(crate) fn line(&self, text: impl std::fmt::Display) {
        let line = format!("{:8.3} {text}", self.began.elapsed().as_secs_f64());
        // A log that cannot be written is no reason to end: what counts is compared all the same.
        if let Err(error) = writeln!(self.lock().log, "{line}") {
            eprintln!("{error}: {line}");
        }
    }

    /// One command, for the log and for the last ones. Gives its number.
    pub(crate) fn command(&self, text: &str) -> usize {
        self.line(text);
        let seconds = self.began.elapsed().as_secs_f64();
        let mut state = self.lock();
        state.last.push_back(format!("{seconds:8.3} {text}"));
        if state.last.len() > LAST {
            state.last.pop_front();
        }
        state.counts.calls
    }

    /// Counts something.
    pub(crate) fn count(&self, change: impl FnOnce(&mut Counts)) {
        change(&mut self.lock().counts);
    }

    /// All counts.
    pub(crate) fn counts(&self) -> Counts {
        self.lock().counts.clone()
    }

    /// The last commands.
    pub(crate) fn last(&self) -> Vec<String> {
        self.lock().last.iter().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics half way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
