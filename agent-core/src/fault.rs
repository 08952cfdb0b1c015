//! Failing at a chosen step, for tests of the undo. Built only with the feature `fault-injection`, which no package
//! turns on; otherwise the check below is nothing.

use crate::failure::Failure;

/// The file that says where to fail: lines of `STEP before` or `STEP after`. Named by this variable of the
/// environment.
#[cfg(feature = "fault-injection")]
const FAULT_FILE: &str = "TETHER_FAULT_FILE";

/// Fails when the fault file names this step and moment.
#[cfg(feature = "fault-injection")]
pub(crate) fn check(step: &str, moment: &str) -> Result<(), Failure> {
    use crate::failure::Reason;

    let wanted = format!("{step} {moment}");
    let faults =
        std::env::var_os(FAULT_FILE).map(std::fs::read_to_string).and_then(Result::ok).unwrap_or_default();
    if faults.lines().any(|line| line.trim() == wanted) {
        return Err(Failure::new(Reason::Internal, format!("planted fault {moment} {step}")));
    }
    Ok(())
}

#[cfg(not(feature = "fault-injection"))]
#[expect(clippy::unnecessary_wraps, reason = "the same shape as with the feature")]
pub(crate) fn check(_step: &str, _moment: &str) -> Result<(), Failure> {
    Ok(())
}
