//! A program of our own that stays: it is asked one line and answers one line. For work that may hang in the kernel, so
//! that it hangs in a process that can be given up, and not in the agent; and that costs no start of a process each time.
//!
//! Not here: what is asked. A helper ends by itself when its standard input does, so it ends with the agent.

use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout};
use tokio::time::timeout;

use crate::command::{CommandError, CommandLine, end_group};

/// A running helper.
pub struct HelperProcess {
    command: String,
    child: Child,
    questions: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
}

impl HelperProcess {
    /// Starts one. The command's deadline and standard input are not used.
    ///
    /// # Errors
    /// `Start` when the program cannot be started.
    pub fn start(command: &CommandLine) -> Result<Self, CommandError> {
        let text = command.to_string();
        let fail = |source| CommandError::Start { command: text.clone(), source };
        let mut child = command.start_helper().map_err(fail)?;
        let pipes = child.stdin.take().zip(child.stdout.take());
        let (questions, answers) = pipes.ok_or_else(|| fail(std::io::ErrorKind::BrokenPipe.into()))?;
        Ok(Self { command: text, child, questions, answers: BufReader::new(answers).lines() })
    }

    /// Asks one line and waits for one line. After an error the helper is of no more use: what it says next may be the
    /// answer to this question.
    ///
    /// # Errors
    /// `Deadline` when there is no answer in time; `Io` when the helper has ended.
    pub async fn ask(&mut self, question: &str, deadline: Duration) -> Result<String, CommandError> {
        let exchange = async {
            self.questions.write_all(question.as_bytes()).await?;
            self.questions.write_all(b"\n").await?;
            self.answers.next_line().await?.ok_or_else(|| std::io::ErrorKind::UnexpectedEof.into())
        };
        match timeout(deadline, exchange).await {
            Ok(answer) => answer.map_err(|source| CommandError::Io { command: self.command.clone(), source }),
            Err(_) => {
                Err(CommandError::Deadline { command: self.command.clone(), deadline, stuck_pid: None })
            }
        }
    }

    /// Ends it by SIGKILL: it has nothing to lose. Gives the pid when the kernel does not let it end (F25).
    pub async fn end(mut self) -> Option<u32> {
        end_group(&mut self.child, &[Signal::SIGKILL]).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> HelperProcess {
        HelperProcess::start(&CommandLine::new("/bin/sh").args(["-c", script])).unwrap()
    }

    #[tokio::test]
    async fn one_process_answers_one_question_after_the_other() {
        let mut helper = shell("while read -r line; do echo \"$$ $line\"; done");
        let one = helper.ask("a b", Duration::from_secs(5)).await.unwrap();
        let two = helper.ask("c", Duration::from_secs(5)).await.unwrap();
        assert_eq!(one.split_once(' ').unwrap().0, two.split_once(' ').unwrap().0);
        assert!(one.ends_with(" a b") && two.ends_with(" c"), "{one} {two}");
        assert_eq!(helper.end().await, None);
    }

    /// F25: a helper that hangs is told in time, and is given up.
    #[tokio::test]
    async fn f25_a_helper_that_hangs_or_ends_is_told() {
        let mut helper = shell("trap '' TERM; read -r line; sleep 600");
        let error = helper.ask("a", Duration::from_millis(50)).await.unwrap_err();
        assert!(matches!(error, CommandError::Deadline { .. }), "{error}");
        assert_eq!(helper.end().await, None);
        let error = shell("exit 0").ask("a", Duration::from_secs(5)).await.unwrap_err();
        assert!(matches!(error, CommandError::Io { .. }), "{error}");
    }
}
