//! Running commands and placing files on a host of the lab, through one ssh connection that stays open.
//!
//! Not here: what the commands do.

use std::fmt::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, bail, ensure};
use tether_agent_core::command::{CommandLine, Output};

use crate::instance::Instance;
use crate::instance::Ports;
use crate::progress::pause;

/// How long a command may take when nobody says otherwise.
pub const COMMAND_DEADLINE: Duration = Duration::from_secs(60);
/// The ssh client.
pub const SSH: &str = "/usr/bin/ssh";
/// Folder on the host `compute` with the guests' command sockets.
const GUEST_SOCKETS: &str = "/var/lib/libvirt/tether-lab";
/// The Linux guests, whose command sockets are brought to this machine.
pub(crate) const GUESTS: [&str; 2] = ["c2", "c3"];

/// One host.
#[derive(Debug, Clone)]
pub struct Host {
    /// `storage` or `compute`.
    pub name: String,
    /// Port on 127.0.0.1 that leads to the host's ssh server.
    pub ssh_port: u16,
    /// Port on 127.0.0.1 that leads to the host's port 7440, where an agent listens.
    pub agent_port: u16,
    ssh_config: PathBuf,
}

impl Host {
    pub(crate) fn new(name: &str, instance: &Instance, ports: Ports) -> Self {
        Self {
            name: name.to_string(),
            ssh_port: ports.ssh,
            agent_port: ports.agent,
            ssh_config: instance.file("ssh.config"),
        }
    }

    /// Runs a shell command as root and gives what it printed. Its standard error is in the error.
    ///
    /// # Errors
    /// When it fails, or takes longer than a minute.
    pub async fn run(&self, command: &str) -> anyhow::Result<String> {
        self.run_within(command, COMMAND_DEADLINE).await
    }

    /// [`Host::run`] with another deadline.
    ///
    /// # Errors
    /// When it fails, or misses the deadline.
    pub async fn run_within(&self, command: &str, deadline: Duration) -> anyhow::Result<String> {
        let output = self.ssh(command, Vec::new(), deadline).await?;
        self.succeeded(command, output)
    }

    /// Runs a shell command as root and gives its exit status and what it printed, whatever they are.
    ///
    /// # Errors
    /// When the host cannot be reached, or it takes longer than a minute.
    pub async fn try_run(&self, command: &str) -> anyhow::Result<Output> {
        self.ssh(command, Vec::new(), COMMAND_DEADLINE).await
    }

    /// Places a file, whole or not at all. Makes its folder.
    ///
    /// # Errors
    /// When it cannot be written.
    pub async fn put(&self, content: impl Into<Vec<u8>>, path: &str, mode: u32) -> anyhow::Result<()> {
        let (unfinished, path) = (quote(&format!("{path}.unfinished")), quote(path));
        let command = format!(
            "umask 077 && mkdir -p -m 755 \"$(dirname {path})\" && cat >{unfinished} && chmod {mode:o} {unfinished} && \
             mv -f {unfinished} {path}"
        );
        let output = self.ssh(&command, content.into(), COMMAND_DEADLINE).await?;
        self.succeeded(&format!("writing {path}"), output).map(drop)
    }

    async fn ssh(&self, command: &str, stdin: Vec<u8>, deadline: Duration) -> anyhow::Result<Output> {
        let ssh = CommandLine::new(SSH).arg("-F").arg(&self.ssh_config).args([&self.name, "--", command]);
        let output = ssh.stdin(stdin).deadline(deadline).output().await?;
        // ssh's own failures have a code of their own, which our commands do not use.
        if output.exit_code == Some(255) {
            bail!("host {}: ssh: {}", self.name, output.stderr.trim());
        }
        Ok(output)
    }

    fn succeeded(&self, command: &str, output: Output) -> anyhow::Result<String> {
        if output.exit_code == Some(0) {
            return Ok(output.stdout);
        }
        let code = output.exit_code.map_or_else(|| "a signal".to_string(), |c| format!("exit code {c}"));
        bail!(
            "host {}: {command}: {code}: {}{}",
            self.name,
            output.stderr.trim(),
            after(output.stdout.trim())
        )
    }

    /// Opens the connection and sets the host's clock, trying until it answers or the deadline passes.
    pub(crate) async fn connect(&self, deadline: Duration) -> anyhow::Result<()> {
        let began = Instant::now();
        loop {
            // A restored host believes that it is the time when it was saved.
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs_f64();
            let left = deadline.saturating_sub(began.elapsed()).max(Duration::from_secs(1));
            let set_clock = format!("date -s @{now:.3} >/dev/null && hostname");
            match self.ssh(&set_clock, Vec::new(), left).await {
                Ok(output) => {
                    let name = self.succeeded("setting the clock", output)?;
                    ensure!(
                        name.trim() == self.name,
                        "the host {} says that it is {}",
                        self.name,
                        name.trim()
                    );
                    return Ok(());
                }
                Err(e) if began.elapsed() >= deadline => {
                    return Err(e).with_context(|| format!("the host {} does not answer", self.name));
                }
                Err(_) => pause(Duration::from_millis(250)).await,
            }
        }
    }

    /// Closes the connection, if there is one: it does not survive a restore.
    pub(crate) async fn disconnect(&self) -> anyhow::Result<()> {
        let exit = CommandLine::new(SSH).arg("-F").arg(&self.ssh_config).args(["-O", "exit", &self.name]);
        exit.deadline(Duration::from_secs(5)).output().await?; // it fails when there is none, which is as good
        Ok(())
    }
}

/// The configuration for ssh and scp: `ssh -F FILE storage` works for everyone, and all share one connection.
pub(crate) fn ssh_config(
    instance: &Instance,
    key: &std::path::Path,
    ports: &[(&str, u16)],
) -> anyhow::Result<String> {
    let mut text = String::from("# Written by tether-lab at each start.\n");
    for (host, port) in ports {
        writeln!(text, "Host {host}\n  Port {port}")?;
        if *host == "compute" {
            for guest in GUESTS {
                let here = instance.file(&format!("{guest}.commands"));
                writeln!(text, "  LocalForward {} {GUEST_SOCKETS}/{guest}.commands", here.display())?;
            }
        }
    }
    let known_hosts = instance.file("known_hosts");
    writeln!(
        text,
        "Host *\n  HostName 127.0.0.1\n  User root\n  IdentityFile {}\n  IdentitiesOnly yes\n  BatchMode yes\n  \
         HostKeyAlias tether-lab\n  UserKnownHostsFile {}\n  StrictHostKeyChecking yes\n  LogLevel ERROR\n  \
         ConnectTimeout 3\n  ControlMaster auto\n  ControlPersist yes\n  ControlPath {}\n  StreamLocalBindUnlink yes",
        key.display(),
        known_hosts.display(),
        instance.file("%n.ssh").display()
    )?;
    Ok(text)
}

/// One word for the shell.
pub fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

fn after(stdout: &str) -> String {
    if stdout.is_empty() { String::new() } else { format!(" (it printed: {stdout})") }
}
