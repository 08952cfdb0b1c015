//! The helpers that look at files, one for each mount, and those that hold and flush them, one for each file; and which mount a process that hangs and cannot be
//! ended keeps busy. Not here: what a helper does (`file_helper`), and when it is asked.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tether_agent_core::command::{CommandError, CommandLine};
use tether_agent_core::helper_process::HelperProcess;
use tether_agent_core::stuck::Stuck;
use tokio::time::timeout;

use super::file_helper::{self, Answer, Question};
use super::{Mount, MountError};

/// How long a helper that is to be ended may be busy with a question.
const END_DEADLINE: Duration = Duration::from_secs(10);

type Slot = Arc<tokio::sync::Mutex<Option<HelperProcess>>>;

/// What a helper is for. A flush may take long, and nobody who looks at another file, or flushes it, waits for it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Duty {
    Look,
    /// Of this file: what the helper holds open ends with it.
    Flush(PathBuf),
}

impl Duty {
    fn verb(&self) -> &'static str {
        match self {
            Self::Look => "look at a file",
            Self::Flush(_) => "flush",
        }
    }
}

/// All of them, by the directory of their mount.
pub(super) struct Helpers {
    slots: Mutex<HashMap<(PathBuf, Duty), Slot>>,
    pub(super) stuck: Stuck,
}

impl Helpers {
    /// None yet. Processes that the kernel does not let end are entered into `stuck`.
    pub(super) fn new(stuck: Stuck) -> Self {
        Self { slots: Mutex::default(), stuck }
    }

    /// Asks a helper of the mount. The first to ask starts it; one that died is started again, one that hangs is given up.
    pub(super) async fn ask(
        &self,
        mount: &Mount,
        question: &Question,
        deadline: Duration,
    ) -> Result<Answer, MountError> {
        self.check_not_stuck(mount)?;
        let silent = || MountError::Unresponsive { share: mount.share.clone(), deadline };
        let text = serde_json::to_string(question).map_err(|error| MountError::Report(error.to_string()))?;
        let duty = match question {
            Question::Hold(path) | Question::Flush(path) => Duty::Flush(path.clone()),
            Question::Alive(_) | Question::Look { .. } => Duty::Look,
        };
        let slot = self.slot(mount, &duty);
        let Ok(mut held) = timeout(deadline, slot.lock_owned()).await else { return Err(silent()) };
        let kept = held.take();
        let was_kept = kept.is_some();
        let mut helper = kept.map_or_else(new_helper, Ok)?;
        let mut answer = helper.ask(&text, deadline).await;
        // What a helper that died had held, another one cannot tell.
        let flushes = was_kept && matches!(question, Question::Flush(_));
        if was_kept && !flushes && matches!(answer, Err(CommandError::Io { .. })) {
            helper = new_helper()?;
            answer = helper.ask(&text, deadline).await;
        }
        match answer {
            Ok(answer) => {
                match question {
                    Question::Flush(_) => {
                        self.slots().remove(&(mount.directory.clone(), duty.clone()));
                        self.end_one(mount, &duty, helper).await;
                    }
                    _ => *held = Some(helper),
                }
                serde_json::from_str(&answer).map_err(|error| MountError::Report(error.to_string()))
            }
            Err(error) => {
                let late = matches!(error, CommandError::Deadline { .. });
                self.end_one(mount, &duty, helper).await;
                Err(if late { silent() } else { MountError::Helper(error) })
            }
        }
    }

    /// Starts the helper that looks at files, so that it is up when the share is.
    pub(super) fn start(&self, mount: &Mount) -> Result<(), MountError> {
        if let Ok(mut held) = self.slot(mount, &Duty::Look).try_lock_owned()
            && held.is_none()
        {
            *held = Some(new_helper()?);
        }
        Ok(())
    }

    /// Ends the helper that holds a file, if there is one.
    pub(super) async fn let_go(&self, mount: &Mount, path: &Path) {
        let duty = Duty::Flush(path.to_owned());
        let slot = self.slots().remove(&(mount.directory.clone(), duty.clone()));
        let Some(slot) = slot else { return };
        // One that is busy is with whoever asked it.
        let helper = slot.try_lock_owned().ok().and_then(|mut held| held.take());
        if let Some(helper) = helper {
            self.end_one(mount, &duty, helper).await;
        }
    }

    /// Ends the mount's helpers.
    pub(super) async fn end(&self, mount: &Mount) -> Result<(), MountError> {
        let of_mount: Vec<((PathBuf, Duty), Slot)> =
            self.slots().extract_if(|(directory, _), _| *directory == mount.directory).collect();
        for ((_, duty), slot) in of_mount {
            let Ok(mut held) = timeout(END_DEADLINE, slot.lock_owned()).await else {
                return Err(MountError::Unresponsive { share: mount.share.clone(), deadline: END_DEADLINE });
            };
            if let Some(helper) = held.take() {
                self.end_one(mount, &duty, helper).await;
            }
        }
        Ok(())
    }

    async fn end_one(&self, mount: &Mount, duty: &Duty, helper: HelperProcess) {
        if let Some(pid) = helper.end().await {
            self.note_stuck(mount, duty.verb(), pid);
        }
    }

    fn slot(&self, mount: &Mount, duty: &Duty) -> Slot {
        self.slots().entry((mount.directory.clone(), duty.clone())).or_default().clone()
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<(PathBuf, Duty), Slot>> {
        // Each change is one insert or remove; a panic elsewhere cannot leave it half done.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers a process that could not be ended.
    pub(super) fn note_stuck(&self, mount: &Mount, verb: &'static str, pid: u32) {
        self.stuck.enter_process(&key(mount), verb, pid);
    }

    /// One process that hangs at a share is enough: no second one is sent after it.
    pub(super) fn check_not_stuck(&self, mount: &Mount) -> Result<(), MountError> {
        self.stuck.check(&key(mount)).map_err(|failure| MountError::Stuck(Box::new(failure)))
    }
}

/// Names a mount among all that can hang. A share may be mounted twice, with other options.
fn key(mount: &Mount) -> String {
    format!("{} at {}", mount.share, mount.directory.display())
}

fn new_helper() -> Result<HelperProcess, MountError> {
    let program = CommandLine::new("/proc/self/exe").arg(file_helper::ARGUMENT);
    HelperProcess::start(&program).map_err(MountError::Helper)
}
