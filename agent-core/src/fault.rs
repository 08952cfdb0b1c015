//! Failing or dying at a chosen step, for tests of the undo and of the journal. Built only with the feature `fault-injection`, which no package
//! turns on; otherwise the check below is nothing.

use crate::failure::Failure;

/// The file that says where to fail: lines of `STEP before` or `STEP after`; with ` kill` behind it the agent dies there of
/// SIGKILL, once: the line is removed first, and with the last of these the file. Named by this variable of the environment.
#[cfg(feature = "fault-injection")]
const FAULT_FILE: &str = "TETHER_FAULT_FILE";

/// Fails or dies when the fault file names this step and moment.
#[cfg(feature = "fault-injection")]
pub(crate) fn check(step: &str, moment: &str) -> Result<(), Failure> {
    use crate::failure::Reason;

    let wanted = format!("{step} {moment}");
    let file = std::env::var_os(FAULT_FILE).unwrap_or_default();
    let faults = std::fs::read_to_string(&file).unwrap_or_default();
    let deadly = format!("{wanted} kill");
    let left: String =
        faults.lines().filter(|line| line.trim() != deadly).map(|line| format!("{line}\n")).collect();
    let forgotten = || match left.contains(" kill\n") {
        true => std::fs::write(&file, &left),
        false => std::fs::remove_file(&file),
    };
    if faults.lines().any(|line| line.trim() == deadly) && forgotten().is_ok() {
        let own = nix::unistd::Pid::this();
        if let Err(error) = nix::sys::signal::kill(own, nix::sys::signal::Signal::SIGKILL) {
            tracing::error!(%error, "it does not die");
        }
    }
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
