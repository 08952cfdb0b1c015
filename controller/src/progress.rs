//! What an agent is doing, one line for each step that ended: `  storage   create-backstore      3.1 ms`. The same lines
//! for terminals and logs. Not here: where the events come from (`call.rs`).

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use tether_proto::wire::{OperationReport, StepEvent, StepState};

use crate::agent::Kind;
use crate::console::{Console, time_text};

/// Shows the steps of one call.
pub(crate) struct Progress<'a> {
    console: &'a Console,
    kind: Kind,
    /// Events that were shown; a watch that is opened again begins at the first step.
    seen: HashSet<(String, i32, u64)>,
    /// When a step that runs started, and whether it was said that it takes long.
    running: HashMap<String, (u64, bool)>,
    /// How often a step of that name was shown as ended.
    ended: HashMap<String, usize>,
}

impl<'a> Progress<'a> {
    pub(crate) fn new(console: &'a Console, kind: Kind) -> Self {
        Self { console, kind, seen: HashSet::new(), running: HashMap::new(), ended: HashMap::new() }
    }

    /// Shows one event.
    pub(crate) fn event(&mut self, event: &StepEvent) {
        if !self.seen.insert((event.step.clone(), event.state, event.at_microseconds)) {
            return;
        }
        match event.state() {
            StepState::Started => {
                self.running.insert(event.step.clone(), (event.at_microseconds, false));
            }
            StepState::Progress => self.line(&event.step, &event.progress),
            StepState::Done | StepState::Failed => {
                let started = self.running.remove(&event.step).map_or(event.at_microseconds, |(at, _)| at);
                let mut text = time(event.at_microseconds.saturating_sub(started));
                if event.state() == StepState::Failed {
                    text.push_str("  failed");
                }
                self.end(&event.step, &text);
            }
            StepState::Unspecified => {}
        }
    }

    /// Nothing was heard for a while: says once of each running step that it runs.
    pub(crate) fn still_running(&mut self) {
        let mut slow: Vec<String> = Vec::new();
        for (step, (_, said)) in &mut self.running {
            if !std::mem::replace(said, true) {
                slow.push(step.clone());
            }
        }
        for step in slow {
            self.line(&step, "running");
        }
    }

    /// Shows the steps of a reply whose events did not come.
    pub(crate) fn report(&mut self, report: &OperationReport) {
        let mut passed: HashMap<&str, usize> = HashMap::new();
        for timing in &report.steps {
            let nth = passed.entry(&timing.step).or_default();
            *nth += 1;
            if self.ended.get(&timing.step).is_none_or(|ended| *ended < *nth) {
                self.end(&timing.step, &time(timing.duration_microseconds));
            }
        }
    }

    fn end(&mut self, step: &str, text: &str) {
        *self.ended.entry(step.to_owned()).or_default() += 1;
        self.line(step, text);
    }

    fn line(&self, step: &str, text: &str) {
        self.console.note(&format!("  {:<9} {step:<20} {text:>8}", self.kind));
    }
}

fn time(microseconds: u64) -> String {
    time_text(Duration::from_micros(microseconds))
}
