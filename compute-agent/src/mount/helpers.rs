//! The helpers that look at files, one for each mount; and the processes that hang at a mount and cannot be ended. Not here:
//! what a helper does (`file_helper`), and when it is asked.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tether_agent_core::command::{CommandError, CommandLine};
use tether_agent_core::helper_process::HelperProcess;
use tokio::time::timeout;

use super::file_helper::{self, Answer, Question};
use super::{Mount, MountError};

/// How long a helper that is to be ended may be busy with a question.
const END_DEADLINE: Duration = Duration::from_secs(10);

type Slot = Arc<tokio::sync::Mutex<Option<HelperProcess>>>;

/// All of them, by the directory of their mount.
#[derive(Default)]
pub(super) struct Helpers {
    slots: Mutex<HashMap<PathBuf, Slot>>,
    /// Processes that the kernel does not let end: pid, and when it started.
    pub(super) stuck: Mutex<HashMap<PathBuf, (u32, String)>>,
}

impl Helpers {
    /// Asks the mount's helper. The first to ask starts it; one that died is started again, one that hangs is given up.
    pub(super) async fn ask(
        &self,
        mount: &Mount,
        question: &Question,
        deadline: Duration,
    ) -> Result<Answer, MountError> {
        self.check_not_stuck(mount)?;
        let silent = || MountError::Unresponsive { share: mount.share.clone(), deadline };
        let text = serde_json::to_string(question).map_err(|error| MountError::Report(error.to_string()))?;
        let slot = self.slot(mount);
        let Ok(mut held) = timeout(deadline, slot.lock_owned()).await else { return Err(silent()) };
        let kept = held.take();
        let was_kept = kept.is_some();
        let mut helper = kept.map_or_else(new_helper, Ok)?;
        let mut answer = helper.ask(&text, deadline).await;
        if was_kept && matches!(answer, Err(CommandError::Io { .. })) {
            helper = new_helper()?;
            answer = helper.ask(&text, deadline).await;
        }
        match answer {
            Ok(answer) => {
                *held = Some(helper);
                serde_json::from_str(&answer).map_err(|error| MountError::Report(error.to_string()))
            }
            Err(error) => {
                let late = matches!(error, CommandError::Deadline { .. });
                if let Some(pid) = helper.end().await {
                    self.note_stuck(mount, pid);
                }
                Err(if late { silent() } else { MountError::Helper(error) })
            }
        }
    }

    /// Starts the mount's helper, so that it is up when the share is.
    pub(super) fn start(&self, mount: &Mount) -> Result<(), MountError> {
        if let Ok(mut held) = self.slot(mount).try_lock_owned()
            && held.is_none()
        {
            *held = Some(new_helper()?);
        }
        Ok(())
    }

    /// Ends the mount's helper.
    pub(super) async fn end(&self, mount: &Mount) -> Result<(), MountError> {
        let slot = self.slots().remove(&mount.directory);
        let Some(slot) = slot else { return Ok(()) };
        let Ok(mut held) = timeout(END_DEADLINE, slot.lock_owned()).await else {
            return Err(MountError::Unresponsive { share: mount.share.clone(), deadline: END_DEADLINE });
        };
        if let Some(helper) = held.take()
            && let Some(pid) = helper.end().await
        {
            self.note_stuck(mount, pid);
        }
        Ok(())
    }

    fn slot(&self, mount: &Mount) -> Slot {
        self.slots().entry(mount.directory.clone()).or_default().clone()
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<PathBuf, Slot>> {
        // Each change is one insert or remove; a panic elsewhere cannot leave it half done.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers a process that could not be ended.
    pub(super) fn note_stuck(&self, mount: &Mount, pid: u32) {
        tracing::error!(pid, share = %mount.share, "a process hangs in the kernel at this share");
        let Some(started) = started(pid) else { return };
        let mut stuck = self.stuck.lock().unwrap_or_else(PoisonError::into_inner);
        stuck.insert(mount.directory.clone(), (pid, started));
    }

    /// One process that hangs at a share is enough: no second one is sent after it.
    pub(super) fn check_not_stuck(&self, mount: &Mount) -> Result<(), MountError> {
        let mut stuck = self.stuck.lock().unwrap_or_else(PoisonError::into_inner);
        match stuck.get(&mount.directory) {
            Some((pid, when)) if started(*pid).as_ref() == Some(when) => {
                Err(MountError::Stuck { share: mount.share.clone(), pid: *pid })
            }
            _ => {
                stuck.remove(&mount.directory);
                Ok(())
            }
        }
    }
}

fn new_helper() -> Result<HelperProcess, MountError> {
    let program = CommandLine::new("/proc/self/exe").arg(file_helper::ARGUMENT);
    HelperProcess::start(&program).map_err(MountError::Helper)
}

/// When a process started, in clock ticks after boot: with the pid it names a process for ever (proc_pid_stat(5)).
fn started(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(19).map(str::to_owned)
}
