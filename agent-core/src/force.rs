//! Force: going on where a Detach or Unexport would stop, when its caller said so (rule 10). What is passed over is kept, as
//! sentences for people: it is logged, answered and recorded. So is what was lost without force: a flush that failed is told to
//! whoever tries again, for the next one finds nothing to flush. Not here: what is in the way, and how it is passed over.

use crate::failure::{Failure, Reason};

/// Whether a removal is forced, and what may be lost by it.
#[derive(Debug, Default)]
pub struct Force {
    on: bool,
    may_be_lost: Vec<String>,
}

impl Force {
    /// Stops at whatever is in the way.
    pub fn off() -> Self {
        Self::default()
    }

    /// Goes on when it is asked for, by this call or by an earlier one, which cannot be taken back. `known` is what earlier ones
    /// may have lost.
    pub fn new(asked: bool, known: Vec<String>) -> Self {
        Self { on: asked, may_be_lost: known }
    }

    /// Is it forced?
    pub fn is_on(&self) -> bool {
        self.on
    }

    /// Takes a failure for passed over, and says what that may cost; nothing is left of it but that sentence.
    ///
    /// # Errors
    /// The failure, when nothing is forced; or when it is the agent's own trouble, which force does not help.
    pub fn pass<T>(&mut self, outcome: Result<T, Failure>, instead: T, cost: &str) -> Result<T, Failure> {
        match outcome {
            Err(failure)
                if self.on
                    && !matches!(
                        failure.reason,
                        Reason::JournalFailed | Reason::Internal | Reason::OperationRunning
                    ) =>
            {
                let sentence = format!("{cost} ({}: {failure})", failure.reason.as_str());
                tracing::error!(may_be_lost = %sentence, "forced");
                self.note(sentence);
                Ok(instead)
            }
            outcome => outcome,
        }
    }

    /// Keeps what may be lost although nothing was passed over.
    pub fn note(&mut self, sentence: String) {
        // The same call again loses the same.
        if !self.may_be_lost.contains(&sentence) {
            self.may_be_lost.push(sentence);
        }
    }

    /// What may be lost.
    pub fn may_be_lost(&self) -> &[String] {
        &self.may_be_lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_forced_removal_passes_over_what_is_in_the_way_and_tells_what_it_may_cost() {
        let held = || Err::<u32, _>(Failure::new(Reason::GuestHoldsDevice, "the guest did not let go"));
        let mut off = Force::off();
        assert_eq!(off.pass(held(), 7, "writes").unwrap_err().reason, Reason::GuestHoldsDevice);
        assert!(!Force::new(false, Vec::new()).is_on() && Force::new(true, Vec::new()).is_on());
        let mut told = Force::new(false, vec!["before".to_owned()]);
        assert!(told.pass(held(), 7, "writes").is_err(), "what was lost does not force what comes next");
        told.note("flush".to_owned());
        assert_eq!(told.may_be_lost(), ["before", "flush"]);
        let mut on = Force::new(true, vec!["before".to_owned()]);
        for _ in 0..2 {
            assert_eq!(on.pass(held(), 7, "the guest's writes").unwrap(), 7);
        }
        assert_eq!(on.pass(Ok(1), 7, "nothing").unwrap(), 1);
        let journal = on.pass(Err(Failure::new(Reason::JournalFailed, "disk full")), (), "nothing");
        assert_eq!(journal.unwrap_err().reason, Reason::JournalFailed);
        let [before, now] = on.may_be_lost() else { panic!("{on:?}") };
        assert!(before == "before" && now.starts_with("the guest's writes (GUEST_HOLDS_DEVICE: "), "{now}");
    }
}
