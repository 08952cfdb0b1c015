//! The one failure that the soak is for: what is seen is not what the model expects.

use std::fmt;

use serde::Serialize;

use super::record::Record;

/// What was expected, what was seen, and how it came to that.
#[derive(Debug, Clone, Serialize)]
pub struct Mismatch {
    /// How many calls were made before.
    pub step: usize,
    /// The call, or the thing that was looked at.
    pub what: String,
    /// What the model says.
    pub expected: String,
    /// What came.
    pub seen: String,
    /// The last commands of all controllers.
    pub last_commands: Vec<String>,
}

impl Mismatch {
    /// A mismatch as an error, with the last commands of the record.
    pub(crate) fn error(
        step: usize,
        what: &str,
        expected: &str,
        seen: &str,
        record: &Record,
    ) -> anyhow::Error {
        let mismatch = Self {
            step,
            what: what.to_owned(),
            expected: expected.to_owned(),
            seen: seen.to_owned(),
            last_commands: record.last(),
        };
        record.line(&mismatch);
        anyhow::Error::new(mismatch)
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { step, what, expected, seen, last_commands } = self;
        write!(
            f,
            "mismatch at step {step}: {what}\n  expected: {expected}\n  seen:     {seen}\nthe last commands:"
        )?;
        last_commands.iter().try_for_each(|line| write!(f, "\n  {line}"))
    }
}

impl std::error::Error for Mismatch {}
