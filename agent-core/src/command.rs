//! The one place that starts external programs.
//!
//! Here: a program with its arguments, standard input and deadline; its own process group; kill and bounded
//! reap when the deadline passes; the tail of standard error in the error. Not here: what any program's exit
//! code means, that belongs to the adapter which calls it.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Child;
use tokio::time::timeout;

/// How long a program may take when its caller says nothing.
pub const DEFAULT_DEADLINE: Duration = Duration::from_secs(30);
/// How long a program gets between SIGTERM and SIGKILL, and again to be reaped after SIGKILL.
const GRACE: Duration = Duration::from_secs(2);
/// How much of standard error goes into an error, in bytes.
const STDERR_TAIL: usize = 2048;
/// How much of either output stream is kept, in bytes; the rest is read and thrown away.
const OUTPUT_LIMIT: u64 = 64 * 1024 * 1024;

/// A program about to be started.
#[derive(Clone)]
pub struct CommandLine {
    program: PathBuf,
    args: Vec<OsString>,
    stdin: Vec<u8>,
    deadline: Duration,
    kill: bool,
    user: Option<(u32, u32)>,
}

/// What a program left behind.
#[derive(Debug, Clone)]
pub struct Output {
    /// The exit code; `None` when a signal ended it.
    pub exit_code: Option<i32>,
    /// Standard output, invalid UTF-8 replaced.
    pub stdout: String,
    /// Standard error, invalid UTF-8 replaced.
    pub stderr: String,
}

/// Why a program did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The program could not be started.
    #[error("{command}: cannot be started")]
    Start {
        /// The command as a person would type it.
        command: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// It ran and ended with another exit code than 0.
    #[error("{command}: {exit}: {stderr}")]
    Failed {
        /// The command as a person would type it.
        command: String,
        /// The exit code; `None` when a signal ended it.
        exit_code: Option<i32>,
        /// `exit code 5` or `killed by a signal`.
        exit: String,
        /// The end of its standard error.
        stderr: String,
    },
    /// It was still running at its deadline.
    #[error("{command}: still running after {} ms{}", deadline.as_millis(), match stuck_pid { Some(pid) => format!("; process {pid} is still there"), None => String::new() })]
    Deadline {
        /// The command as a person would type it.
        command: String,
        /// The deadline it missed.
        deadline: Duration,
        /// The process that could not be reaped, if it is still there.
        stuck_pid: Option<u32>,
    },
    /// Talking to it failed.
    #[error("{command}: reading its output failed")]
    Io {
        /// The command as a person would type it.
        command: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
}

impl CommandError {
    /// The command as a person would type it.
    pub fn command(&self) -> &str {
        match self {
            Self::Start { command, .. }
            | Self::Failed { command, .. }
            | Self::Deadline { command, .. }
            | Self::Io { command, .. } => command,
        }
    }

    /// The exit code, when the program ended by itself.
    pub fn exit_code(&self) -> Option<i32> {
        match self {
            Self::Failed { exit_code, .. } => *exit_code,
            _ => None,
        }
    }
}

impl fmt::Display for CommandLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.program.display())?;
        for arg in &self.args {
            let arg = arg.to_string_lossy();
            if arg.is_empty() || arg.contains(|c: char| c.is_whitespace() || "'\"$`\\".contains(c)) {
                write!(f, " '{}'", arg.replace('\'', r"'\''"))?;
            } else {
                write!(f, " {arg}")?;
            }
        }
        Ok(())
    }
}

impl CommandLine {
    /// A program by its absolute path. Arguments must never hold a secret: they are logged.
    pub fn new(program: impl AsRef<Path>) -> Self {
        Self {
            program: program.as_ref().to_path_buf(),
            args: Vec::new(),
            stdin: Vec::new(),
            deadline: DEFAULT_DEADLINE,
            kill: true,
            user: None,
        }
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    /// Bytes for its standard input; the one way to hand over a secret.
    #[must_use]
    pub fn stdin(mut self, bytes: Vec<u8>) -> Self {
        self.stdin = bytes;
        self
    }

    /// How long it may take before it is ended.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Runs it as another user with that one group: for programs that read what others may have written.
    #[must_use]
    pub fn user(mut self, uid: u32, gid: u32) -> Self {
        self.user = Some((uid, gid));
        self
    }

    /// Past the deadline it gets no signal: for programs that hold a lock or a half-done change which any signal would
    /// leave behind for everyone (`iscsiadm`, F24; LVM). It ends by itself, and the runtime reaps it.
    #[must_use]
    pub fn never_kill(mut self) -> Self {
        self.kill = false;
        self
    }

    /// Runs it and wants exit code 0.
    ///
    /// # Errors
    /// [`CommandError`], `Failed` for any other exit code.
    pub async fn run(self) -> Result<Output, CommandError> {
        let command = self.to_string();
        let output = self.output().await?;
        if output.exit_code == Some(0) {
            return Ok(output);
        }
        Err(CommandError::Failed {
            command,
            exit_code: output.exit_code,
            exit: match output.exit_code {
                Some(code) => format!("exit code {code}"),
                None => "killed by a signal".into(),
            },
            stderr: tail(&output.stderr),
        })
    }

    /// Runs it and hands back whatever its exit code was.
    ///
    /// # Errors
    /// [`CommandError`] when it cannot be started, read from, or misses its deadline.
    pub async fn output(self) -> Result<Output, CommandError> {
        let command = self.to_string();
        tracing::debug!(%command, "start");
        #[expect(clippy::disallowed_methods, reason = "this is the one runner")]
        let mut builder = tokio::process::Command::new(&self.program);
        if let Some((uid, gid)) = self.user {
            // Root's other groups go with it (std::os::unix::process::CommandExt::uid).
            builder.uid(uid).gid(gid);
        }
        let mut child = builder
            .args(&self.args)
            .env("LC_ALL", "C")
            .current_dir("/")
            .process_group(0)
            .stdin(if self.stdin.is_empty() { Stdio::null() } else { Stdio::piped() })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|source| CommandError::Start { command: command.clone(), source })?;

        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        // Tasks of their own: whoever goes on after the deadline finds somebody who reads, and does not die of a broken pipe.
        let (stdout, stderr) = (tokio::spawn(collect(stdout)), tokio::spawn(collect(stderr)));
        let work = async {
            let feed = async {
                if let Some(mut pipe) = stdin {
                    // A program that does not read all of its input decides by its exit code, not by a broken pipe.
                    match pipe.write_all(&self.stdin).await {
                        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => return Err(e),
                        _ => {}
                    }
                }
                Ok(())
            };
            let (fed, out, err) = tokio::join!(feed, stdout, stderr);
            fed?;
            let status = child.wait().await?;
            Ok::<_, std::io::Error>(Output { exit_code: status.code(), stdout: out??, stderr: err?? })
        };
        match timeout(self.deadline, work).await {
            Ok(Ok(output)) => {
                tracing::debug!(%command, exit_code = ?output.exit_code, "end");
                Ok(output)
            }
            Ok(Err(source)) => {
                let _stuck = self.end(&mut child).await;
                Err(CommandError::Io { command, source })
            }
            Err(_) => {
                let stuck_pid = self.end(&mut child).await;
                Err(CommandError::Deadline { command, deadline: self.deadline, stuck_pid })
            }
        }
    }

    async fn end(&self, child: &mut Child) -> Option<u32> {
        let signals: &[Signal] = if self.kill { &[Signal::SIGTERM, Signal::SIGKILL] } else { &[] };
        end_group(child, signals).await
    }

    /// Starts it as a helper that stays: one line in, one line out (see [`crate::helper_process`]). Its standard error is the
    /// agent's own.
    pub(crate) fn start_helper(&self) -> std::io::Result<Child> {
        #[expect(clippy::disallowed_methods, reason = "this is the one runner")]
        let mut builder = tokio::process::Command::new(&self.program);
        builder
            .args(&self.args)
            .env("LC_ALL", "C")
            .current_dir("/")
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
    }
}

/// Ends a whole process group with one signal after the other. Gives the pid back when the process is still there
/// afterwards (F25); the runtime reaps it once it ends.
pub(crate) async fn end_group(child: &mut Child, signals: &[Signal]) -> Option<u32> {
    let pid = child.id()?;
    let group = Pid::from_raw(i32::try_from(pid).ok()?);
    for signal in signals {
        if let Err(error) = killpg(group, *signal) {
            tracing::debug!(pid, %error, "signal not delivered");
        }
        if timeout(GRACE, child.wait()).await.is_ok() {
            // Its children may have ignored what ended it; the group is still theirs.
            if let Err(error) = killpg(group, Signal::SIGKILL) {
                tracing::debug!(pid, %error, "nobody is left in the group");
            }
            return None;
        }
    }
    tracing::error!(pid, "process is still running");
    Some(pid)
}

async fn collect(pipe: Option<impl tokio::io::AsyncRead + Unpin>) -> std::io::Result<String> {
    let Some(mut pipe) = pipe else {
        return Ok(String::new());
    };
    let mut bytes = Vec::new();
    (&mut pipe).take(OUTPUT_LIMIT).read_to_end(&mut bytes).await?;
    tokio::io::copy(&mut pipe, &mut tokio::io::sink()).await?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The last part of what a program said, cut at a character, on one line.
fn tail(text: &str) -> String {
    let text = text.trim();
    let mut start = text.len().saturating_sub(STDERR_TAIL);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    let lines: Vec<&str> = text[start..].lines().map(str::trim).filter(|l| !l.is_empty()).collect();
    if lines.is_empty() { "it said nothing".into() } else { lines.join("; ") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    /// Only root can become somebody else; for everybody else it is a failure and never the wrong user.
    #[tokio::test]
    async fn runs_as_another_user_or_not_at_all() {
        let outcome = shell("id -u; id -g; id -G").user(65534, 65534).run().await;
        match outcome {
            Ok(output) => assert_eq!(output.stdout, "65534\n65534\n65534\n"),
            Err(error) => assert!(!nix::unistd::geteuid().is_root(), "{error}"),
        }
    }

    fn shell(script: &str) -> CommandLine {
        CommandLine::new("/bin/sh").args(["-c", script])
    }

    #[tokio::test]
    async fn hands_over_standard_input_and_keeps_both_outputs() {
        let output = shell("cat; echo oops >&2").stdin(b"secret".to_vec()).run().await.unwrap();
        assert_eq!((output.stdout.as_str(), output.stderr.as_str()), ("secret", "oops\n"));
    }

    #[tokio::test]
    async fn a_failure_names_command_exit_code_and_stderr() {
        let error = shell("echo 'no such volume' >&2; exit 5").run().await.unwrap_err();
        assert_eq!(error.exit_code(), Some(5));
        let text = error.to_string();
        assert!(text.contains("exit code 5") && text.contains("no such volume"), "{text}");
    }

    #[tokio::test]
    async fn a_missing_program_is_told() {
        let error = CommandLine::new("/nonexistent/program").run().await.unwrap_err();
        assert!(matches!(error, CommandError::Start { .. }));
    }

    /// F25: a program that ignores SIGTERM is killed with its children, and the caller has its answer in time.
    #[tokio::test]
    async fn f25_a_program_that_ignores_sigterm_is_killed_with_its_group() {
        let began = Instant::now();
        let error = shell("trap '' TERM; sleep 60 & sleep 60")
            .deadline(Duration::from_millis(100))
            .run()
            .await
            .unwrap_err();
        assert!(matches!(error, CommandError::Deadline { stuck_pid: None, .. }), "{error}");
        assert!(began.elapsed() < Duration::from_secs(10));
    }

    /// F24: what holds a lock gets no signal, ends its work, and is reported while it stays.
    #[tokio::test]
    async fn f24_a_program_that_must_not_be_killed_is_reported_and_ends_its_work() {
        let folder = tempfile::tempdir().unwrap();
        let done = folder.path().join("done");
        let error = shell(&format!("sleep 1; echo it goes on; echo so >&2; touch {}", done.display()))
            .deadline(Duration::from_millis(100))
            .never_kill()
            .run()
            .await
            .unwrap_err();
        assert!(matches!(error, CommandError::Deadline { stuck_pid: Some(_), .. }), "{error}");
        let began = Instant::now();
        while !done.exists() {
            assert!(began.elapsed() < Duration::from_secs(10), "it was ended");
            tokio::task::yield_now().await;
        }
    }

    #[test]
    fn the_tail_is_short_and_whole_characters() {
        let long = "ä".repeat(5000);
        assert!(tail(&long).len() <= STDERR_TAIL);
        assert_eq!(tail("  \n"), "it said nothing");
    }
}
