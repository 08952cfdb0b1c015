//! A client for QEMU's monitor (QMP): one connection, one command at a time, each with a deadline.
//!
//! Not here: what the commands mean for a lab (see `lab`).

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// How long the monitor may take for what needs no work.
const GREETING: Duration = Duration::from_secs(10);

/// A connection to the monitor of one QEMU.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects and leaves negotiation mode.
    ///
    /// # Errors
    /// When nothing listens there or it does not speak QMP.
    pub async fn connect(socket: &Path) -> anyhow::Result<Self> {
        let connect = async {
            let stream = UnixStream::connect(socket).await?;
            let mut qmp = Self { stream: BufReader::new(stream) };
            qmp.message().await?;
            anyhow::Ok(qmp)
        };
        let mut qmp = timeout(GREETING, connect)
            .await
            .context("no greeting in time")
            .and_then(|r| r)
            .with_context(|| format!("QEMU's monitor {}", socket.display()))?;
        qmp.execute("qmp_capabilities", json!({}), GREETING).await?;
        Ok(qmp)
    }

    /// Runs one command and hands back its result. Events that arrive meanwhile are skipped.
    ///
    /// # Errors
    /// When QEMU refuses, the connection breaks or the deadline passes.
    pub async fn execute(
        &mut self,
        command: &str,
        arguments: Value,
        deadline: Duration,
    ) -> anyhow::Result<Value> {
        let mut line = json!({"execute": command, "arguments": arguments}).to_string();
        line.push('\n');
        let work = async {
            self.stream.get_mut().write_all(line.as_bytes()).await?;
            loop {
                let mut message = self.message().await?;
                if let Some(result) = message.get_mut("return") {
                    return Ok(result.take());
                }
                if let Some(error) = message.get("error") {
                    bail!(
                        "refused: {}",
                        error.get("desc").and_then(Value::as_str).unwrap_or("no reason given")
                    );
                }
            }
        };
        timeout(deadline, work)
            .await
            .with_context(|| format!("no answer after {} s", deadline.as_secs()))
            .and_then(|r| r)
            .with_context(|| format!("QEMU monitor command {command}"))
    }

    /// Runs a command that has no arguments, answers at once, and whose result says nothing.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub async fn order(&mut self, command: &str) -> anyhow::Result<()> {
        self.execute(command, json!({}), GREETING).await.map(drop)
    }

    /// Whether every virtual processor is halted, waiting for an interrupt.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub async fn all_halted(&mut self) -> anyhow::Result<bool> {
        Ok(all_halted(&self.ask("info registers -a", GREETING).await?))
    }

    /// Runs a command of the human monitor and gives what it says.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub async fn ask(&mut self, command: &str, deadline: Duration) -> anyhow::Result<String> {
        let said = self.execute("human-monitor-command", json!({"command-line": command}), deadline).await?;
        Ok(said.as_str().unwrap_or_default().to_owned())
    }

    /// Runs a command of the human monitor, which says nothing when all is well.
    ///
    /// # Errors
    /// As [`Qmp::execute`], and when the command says something.
    pub async fn human(&mut self, command: &str, deadline: Duration) -> anyhow::Result<()> {
        match self.ask(command, deadline).await?.trim() {
            "" => Ok(()),
            text => bail!("QEMU monitor command {command}: {text}"),
        }
    }

    async fn message(&mut self) -> anyhow::Result<Value> {
        let mut line = String::new();
        if self.stream.read_line(&mut line).await? == 0 {
            bail!("the monitor closed the connection");
        }
        Ok(serde_json::from_str(&line)?)
    }
}

fn all_halted(registers: &str) -> bool {
    let mut states = registers.split_whitespace().filter_map(|word| word.strip_prefix("HLT=")).peekable();
    states.peek().is_some() && states.all(|halted| halted == "1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halted_means_every_processor() {
        assert!(all_halted("CPU#0\nRIP=0 II=0 A20=1 SMM=0 HLT=1\nCPU#1\n SMM=0 HLT=1"));
        assert!(!all_halted("CPU#0\nSMM=0 HLT=1\nCPU#1\nSMM=0 HLT=0"));
        assert!(!all_halted(""));
    }
}
