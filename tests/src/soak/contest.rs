//! A volume that all controllers fight over: was each answer possible, given what the others did meanwhile?
//!
//! Time is counted in ticks, one for each call that begins or ends. What a call did, it did at some moment between the two.
//! Not here: what one controller knows by itself (`model`).

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::model::{Answer, Call};

/// One shared volume, judged by all its controllers.
#[derive(Debug, Default)]
pub(crate) struct Contest(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    tick: u64,
    /// The attachment that was granted the volume and has not begun to give it back.
    holder: Option<String>,
    /// Which attachments may have had the volume, and until when.
    spans: Vec<Span>,
    /// The size at the last settlement; nothing when it was not there.
    settled: Option<u64>,
    seen: Vec<Seen>,
}

#[derive(Debug)]
struct Span {
    id: String,
    end: Option<u64>,
}

/// An answer that says that the volume had this size, or was not there, at some moment of the call.
#[derive(Debug, Clone, Copy)]
struct Seen {
    begin: u64,
    end: u64,
    size: Option<u64>,
    /// The call may have made it so.
    made: bool,
}

impl Contest {
    /// A call begins, or goes on after it was cut off. Gives its tick.
    pub(crate) fn begin(&self, call: &Call) -> u64 {
        let mut state = self.lock();
        state.tick += 1;
        let tick = state.tick;
        match call {
            Call::Export(id) if !state.spans.iter().any(|span| span.id == *id) => {
                state.spans.push(Span { id: id.clone(), end: None });
            }
            // From here on it may be somebody else's.
            Call::Unexport(id) if state.holder.as_ref() == Some(id) => state.holder = None,
            _ => {}
        }
        tick
    }

    /// A call that began at that tick was answered. Says why the answer is not possible.
    pub(crate) fn end(
        &self,
        begin: u64,
        call: &Call,
        answer: &Answer,
        size: Option<u64>,
    ) -> Result<(), String> {
        let mut state = self.lock();
        state.tick += 1;
        let end = state.tick;
        let done = matches!(answer, Answer::Done(_));
        match call {
            Call::Export(id) if done => {
                if let Some(other) = state.holder.as_ref().filter(|holder| *holder != id) {
                    return Err(format!("two writers: granted to {id} while {other} has the volume"));
                }
                state.holder = Some(id.clone());
            }
            Call::Export(id) => {
                let others = state.spans.iter().filter(|span| span.id != *id);
                let had = others.filter(|span| span.end.is_none_or(|end| end >= begin)).count();
                if state.holder.as_ref() != Some(id) {
                    state.spans.retain(|span| span.id != *id || span.end.is_some());
                }
                if *answer == Answer::Refused("VOLUME_EXPORTED".to_owned()) && had == 0 {
                    return Err(format!("refused to {id}, and nobody else has had the volume meanwhile"));
                }
            }
            Call::Unexport(id) if done => {
                state.spans.iter_mut().filter(|span| span.id == *id).for_each(|span| span.end = Some(end));
            }
            _ => {}
        }
        let made = matches!(call, Call::Create(_) | Call::Extend(_) | Call::Delete);
        if done && (made || matches!(call, Call::Export(_))) {
            let size = if *call == Call::Delete { None } else { size };
            state.seen.push(Seen { begin, end, size, made });
        }
        Ok(())
    }

    /// Everybody is quiet: this is the volume now. Says why it cannot be.
    pub(crate) fn settle(&self, size: Option<u64>) -> Result<(), String> {
        let mut state = self.lock();
        let last = state.seen.iter().filter(|seen| seen.made).map(|seen| seen.begin).max();
        let before = Seen { begin: 0, end: 0, size: state.settled, made: false };
        // What was seen before another call began that changed it may be so no more.
        let possible: Vec<Option<u64>> = state
            .seen
            .iter()
            .chain([&before])
            .filter(|seen| last.is_none_or(|last| seen.end >= last))
            .map(|seen| seen.size)
            .collect();
        if !possible.contains(&size) {
            return Err(format!(
                "its size is {size:?}, and after what was answered it can be one of {possible:?}"
            ));
        }
        state.settled = size;
        state.seen.clear();
        state.spans.retain(|span| span.end.is_none());
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics half way.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use tether_proto::wire::Outcome;

    use super::*;

    const CREATED: Answer = Answer::Done(Outcome::Created);
    const REMOVED: Answer = Answer::Done(Outcome::Removed);

    fn export(id: &str) -> Call {
        Call::Export(id.to_owned())
    }

    fn exported() -> Answer {
        Answer::Refused("VOLUME_EXPORTED".to_owned())
    }

    #[test]
    fn two_are_never_granted_a_volume_at_once() {
        let contest = Contest::default();
        let (one, two) = (contest.begin(&export("one")), contest.begin(&export("two")));
        contest.end(one, &export("one"), &CREATED, Some(8)).unwrap();
        assert!(contest.end(two, &export("two"), &CREATED, Some(8)).unwrap_err().contains("two writers"));
        let unexport = Call::Unexport("one".to_owned());
        let leaving = contest.begin(&unexport);
        let three = contest.begin(&export("three"));
        contest.end(three, &export("three"), &CREATED, Some(8)).expect("it is on its way out");
        contest.end(leaving, &unexport, &REMOVED, None).unwrap();
    }

    #[test]
    fn a_refusal_needs_somebody_who_may_have_the_volume() {
        let contest = Contest::default();
        let one = contest.begin(&export("one"));
        assert!(contest.end(one, &export("one"), &exported(), None).is_err());
        let two = contest.begin(&export("two"));
        contest.end(two, &export("two"), &CREATED, Some(8)).unwrap();
        let three = contest.begin(&export("three"));
        contest.end(three, &export("three"), &exported(), None).unwrap();
        let unexport = Call::Unexport("two".to_owned());
        let leaving = contest.begin(&unexport);
        contest.end(leaving, &unexport, &REMOVED, None).unwrap();
        let four = contest.begin(&export("four"));
        assert!(contest.end(four, &export("four"), &exported(), None).is_err(), "it was free by then");
    }

    #[test]
    fn what_is_there_in_the_end_was_made_by_one_of_the_last() {
        let contest = Contest::default();
        contest.settle(None).expect("nobody made it");
        assert!(contest.settle(Some(8)).is_err());
        let create = contest.begin(&Call::Create(8));
        contest.end(create, &Call::Create(8), &CREATED, Some(8)).unwrap();
        assert!(contest.settle(None).is_err(), "it was created");
        let (delete, create) = (contest.begin(&Call::Delete), contest.begin(&Call::Create(8)));
        contest.end(delete, &Call::Delete, &REMOVED, None).unwrap();
        contest.end(create, &Call::Create(8), &CREATED, Some(8)).unwrap();
        contest.settle(Some(8)).expect("either came last");
        let delete = contest.begin(&Call::Delete);
        contest.end(delete, &Call::Delete, &REMOVED, None).unwrap();
        assert!(contest.settle(Some(8)).is_err(), "the deletion came after");
        contest.settle(None).unwrap();
    }
}
