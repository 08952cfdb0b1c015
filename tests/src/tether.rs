//! Tether in the lab: installs the packages on the hosts, with certificates and configs, and runs the `tether` command of
//! its package against them, on this machine.
//!
//! Not here: building (`tests/lab`, `tests/run` and the quickstart do that before), and what tests do with it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde_json::Value;
use tether_agent_core::command::{CommandLine, Output};
use tether_proto::wire::compute_agent_client::ComputeAgentClient;
use tether_proto::wire::storage_agent_client::StorageAgentClient;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use crate::agents::{Agents, HostSetup};
use crate::cache;
use crate::lab::Lab;

/// The thick pool in the lab: all of the volume group `tether`.
pub const THICK_POOL: &str = "thick";
/// The thin pool in the lab: `tether/thinpool`.
pub const THIN_POOL: &str = "thin";
/// The pool of files in the lab: the directory [`SHARE`].
pub const SHARE_POOL: &str = "share";
/// The directory of that pool on `storage`, a file system of its own.
pub const SHARE: &str = "/srv/share";
/// Where the compute agent mounts shares.
pub const MOUNTS: &str = "/var/lib/tether/compute-agent/mnt";
/// What the targets' names begin with.
pub const IQN_PREFIX: &str = "iqn.2026-11.internal.tether.lab:storage";
/// The file on a host that says at which step an agent built for tests is to fail.
pub const FAULT_FILE: &str = "/run/tether/fault";
/// How long one `tether` command may take.
const COMMAND_DEADLINE: Duration = Duration::from_secs(180);

/// The `tether` command, set up for one lab.
#[derive(Debug, Clone)]
pub struct Tether {
    program: PathBuf,
    config: PathBuf,
    pki: PathBuf,
    storage_port: u16,
    compute_port: u16,
}

impl Tether {
    /// Installs the packages of this build in the lab, and writes a config for the `tether` command. Goes back to the
    /// state `ready` when just these packages are in it.
    ///
    /// # Errors
    /// When something was not built, or the agents do not start.
    pub async fn install(lab: &Lab) -> anyhow::Result<Self> {
        let binaries = binaries()?;
        let program = unpacked_command(&binaries).await?;
        let pki = pki(&program).await?;
        let agents = Agents {
            storage: host_setup(&binaries, &pki, "storage", &storage_config())?,
            compute: host_setup(&binaries, &pki, "compute", COMPUTE_CONFIG)?,
        };
        lab.install(&agents).await?;
        let config = lab.instance().file("tether.toml");
        let text = format!(
            "# Written by tether-lab at each install.\n\
             [tls]\nca = {ca:?}\ncertificate = {certificate:?}\nkey = {key:?}\n\n\
             [storage.storage]\naddress = \"127.0.0.1:{storage}\"\n\n\
             [compute.compute]\naddress = \"127.0.0.1:{compute}\"\n",
            ca = pki.join("ca.crt"),
            certificate = pki.join("lab.crt"),
            key = pki.join("lab.key"),
            storage = lab.storage.agent_port,
            compute = lab.compute.agent_port,
        );
        std::fs::write(&config, text).with_context(|| format!("{}", config.display()))?;
        Ok(Self {
            program,
            config,
            pki,
            storage_port: lab.storage.agent_port,
            compute_port: lab.compute.agent_port,
        })
    }

    /// The `tether` command itself.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// The command as a person types it to reach this lab.
    pub fn typed(&self) -> String {
        format!("{} --config {}", self.program.display(), self.config.display())
    }

    /// A gRPC client of the storage agent, for what the command does not do.
    ///
    /// # Errors
    /// When the agent cannot be reached.
    pub async fn storage(&self) -> anyhow::Result<StorageAgentClient<Channel>> {
        Ok(StorageAgentClient::new(self.channel("storage", self.storage_port, Some("lab")).await?))
    }

    /// A gRPC client of the compute agent.
    ///
    /// # Errors
    /// When the agent cannot be reached.
    pub async fn compute(&self) -> anyhow::Result<ComputeAgentClient<Channel>> {
        Ok(ComputeAgentClient::new(self.channel("compute", self.compute_port, Some("lab")).await?))
    }

    /// A client of the compute agent whose certificate is a reader's.
    ///
    /// # Errors
    /// When the agent cannot be reached.
    pub async fn reader(&self) -> anyhow::Result<ComputeAgentClient<Channel>> {
        Ok(ComputeAgentClient::new(self.channel("compute", self.compute_port, Some("reader")).await?))
    }

    /// A client of the compute agent that has no certificate.
    ///
    /// # Errors
    /// When the agent cannot be reached at all.
    pub async fn stranger(&self) -> anyhow::Result<ComputeAgentClient<Channel>> {
        Ok(ComputeAgentClient::new(self.channel("compute", self.compute_port, None).await?))
    }

    /// Both agents' connections by service name, for other services than Tether's own.
    ///
    /// # Errors
    /// When an agent cannot be reached.
    pub async fn channels(&self) -> anyhow::Result<[(&'static str, Channel); 2]> {
        Ok([
            ("StorageAgent", self.channel("storage", self.storage_port, Some("lab")).await?),
            ("ComputeAgent", self.channel("compute", self.compute_port, Some("lab")).await?),
        ])
    }

    async fn channel(&self, name: &str, port: u16, certificate: Option<&str>) -> anyhow::Result<Channel> {
        let read = |file: &str| std::fs::read(self.pki.join(file)).with_context(|| file.to_owned());
        let mut tls =
            ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read("ca.crt")?)).domain_name(name);
        if let Some(client) = certificate {
            tls = tls.identity(Identity::from_pem(
                read(&format!("{client}.crt"))?,
                read(&format!("{client}.key"))?,
            ));
        }
        let endpoint = Endpoint::from_shared(format!("https://127.0.0.1:{port}"))?.tls_config(tls)?;
        Ok(endpoint.connect_timeout(Duration::from_secs(10)).connect().await?)
    }

    /// Runs `tether --json …` and gives what it printed.
    ///
    /// # Errors
    /// When it fails; the error holds what it printed.
    pub async fn json(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        let output = self.output(arguments).await?;
        ensure!(
            output.exit_code == Some(0),
            "tether {}: exit code {:?}: {}{}",
            arguments.join(" "),
            output.exit_code,
            output.stdout.trim(),
            output.stderr.trim()
        );
        serde_json::from_str(&output.stdout).with_context(|| output.stdout.clone())
    }

    /// Runs `tether --json …`, which is to fail, and gives its exit code and the error that it printed.
    ///
    /// # Errors
    /// When it succeeds, or prints no error.
    pub async fn error(&self, arguments: &[&str]) -> anyhow::Result<(i32, Value)> {
        let output = self.output(arguments).await?;
        let code = output.exit_code.context("tether was killed")?;
        if code == 0 {
            bail!("tether {} should have failed, and printed {}", arguments.join(" "), output.stdout.trim());
        }
        let all: Value = serde_json::from_str(&output.stdout)
            .with_context(|| format!("exit code {code}: {}{}", output.stdout, output.stderr))?;
        Ok((code, all["error"].clone()))
    }

    /// Runs `tether --json …` and gives all of it.
    ///
    /// # Errors
    /// When it cannot be started or takes longer than three minutes.
    pub async fn output(&self, arguments: &[&str]) -> anyhow::Result<Output> {
        let command = CommandLine::new(&self.program).arg("--json").arg("--config").arg(&self.config);
        Ok(command.args(arguments).deadline(COMMAND_DEADLINE).output().await?)
    }
}

/// The folder with this build's binaries: that of this program, or the one above `deps`. Tests that run in another
/// profile name it in `TETHER_BINARIES`.
fn binaries() -> anyhow::Result<PathBuf> {
    let folder = match std::env::var_os("TETHER_BINARIES") {
        Some(folder) => PathBuf::from(folder),
        None => {
            let program = std::env::current_exe()?;
            let folder = program.parent().context("this program is in no folder")?;
            if folder.ends_with("deps") { folder.parent().unwrap_or(folder) } else { folder }.to_path_buf()
        }
    };
    for name in ["tether", "tether-storage-agent", "tether-compute-agent"] {
        let path = folder.join(name);
        ensure!(
            path.exists(),
            "{} was not built: run tests/run lab, or packaging/quickstart",
            path.display()
        );
    }
    Ok(folder)
}

/// The `tether` command out of its package, as it gets to a user.
async fn unpacked_command(binaries: &Path) -> anyhow::Result<PathBuf> {
    let (_, content) = package(binaries, "tether")?;
    let key = cache::key([content.as_slice()]);
    let folder = cache::entry("command", &key, async |folder| {
        let archive = folder.join("tether.deb");
        std::fs::write(&archive, &content)?;
        CommandLine::new("dpkg-deb").arg("--extract").arg(&archive).arg(&folder).run().await?;
        Ok(std::fs::remove_file(&archive)?)
    });
    Ok(folder.await?.join("usr/bin/tether"))
}

/// Certificates for the lab, made once by `tether pki` itself.
async fn pki(program: &Path) -> anyhow::Result<PathBuf> {
    // Made anew for another version of the command, so that what it makes is what is used.
    let key = cache::key([std::fs::read(program)?.as_slice()]);
    cache::entry("pki", &key, async |folder| {
        let issue = |arguments: &[&str]| {
            CommandLine::new(program).arg("pki").args(arguments).arg("--directory").arg(&folder).run()
        };
        issue(&["init"]).await?;
        for name in ["storage", "compute"] {
            issue(&["issue", "agent", name, "--address", "127.0.0.1"]).await?;
        }
        issue(&["issue", "controller", "lab"]).await?;
        issue(&["issue", "reader", "reader"]).await?;
        Ok(())
    })
    .await
}

fn host_setup(binaries: &Path, pki: &Path, host: &str, config: &str) -> anyhow::Result<HostSetup> {
    let agent = format!("tether-{host}-agent");
    let read = |path: PathBuf| std::fs::read(&path).with_context(|| format!("{}", path.display()));
    // Agents that were not built for tests do not look at the variable.
    let fault = format!("[Service]\nEnvironment=TETHER_FAULT_FILE={FAULT_FILE}\n");
    let files = vec![
        (format!("/etc/tether/{host}-agent.toml"), 0o644, config.as_bytes().to_vec()),
        ("/etc/tether/pki/ca.crt".to_owned(), 0o644, read(pki.join("ca.crt"))?),
        (format!("/etc/tether/pki/{host}.crt"), 0o644, read(pki.join(format!("{host}.crt")))?),
        (format!("/etc/tether/pki/{host}.key"), 0o600, read(pki.join(format!("{host}.key")))?),
        (format!("/etc/systemd/system/{agent}.service.d/fault.conf"), 0o644, fault.into_bytes()),
    ];
    let commands = vec![
        format!("{agent} --check-config"),
        format!("systemctl daemon-reload && systemctl enable --quiet --now {agent}"),
    ];
    // The command is on both hosts, too: for root, who reaches an agent by its socket.
    let packages = [agent.as_str(), "tether"].map(|package| self::package(binaries, package));
    Ok(HostSetup { packages: packages.into_iter().collect::<anyhow::Result<_>>()?, files, commands })
}

/// A package of this build, which `packaging/build` put beside the folder of the binaries: its file name and content. It must
/// be of these very binaries.
fn package(binaries: &Path, name: &str) -> anyhow::Result<(String, Vec<u8>)> {
    let folder = binaries.parent().context("the binaries are in no folder")?.join("packages");
    let make = "make them: tests/run lab, or packaging/build";
    let entries =
        std::fs::read_dir(&folder).with_context(|| format!("no packages in {}; {make}", folder.display()))?;
    let paths: Vec<PathBuf> =
        entries.map(|entry| anyhow::Ok(entry?.path())).collect::<anyhow::Result<_>>()?;
    let found = paths.into_iter().find_map(|path| {
        let file = path.file_name()?.to_str()?;
        (file.starts_with(&format!("{name}_")) && file.ends_with(".deb"))
            .then(|| (file.to_owned(), path.clone()))
    });
    let (file, path) = found.with_context(|| format!("no package {name} in {}; {make}", folder.display()))?;
    let changed = |path: &Path| std::fs::metadata(path)?.modified();
    ensure!(
        changed(&path)? >= changed(&binaries.join(name))?,
        "{} is older than the program in it; {make}",
        path.display()
    );
    Ok((file, std::fs::read(&path).with_context(|| format!("{}", path.display()))?))
}

fn storage_config() -> String {
    format!(
        r#"[server]
listen = "[::]:7440"
socket = "/run/tether/storage-agent.sock"
certificate = "/etc/tether/pki/storage.crt"
key = "/etc/tether/pki/storage.key"
ca = "/etc/tether/pki/ca.crt"

[iscsi]
portals = ["10.99.0.1:3260", "[fd99::1]:3260"]
iqn_prefix = "{IQN_PREFIX}"

[nfs]
servers = ["10.99.0.1", "fd99::1"]
client_networks = ["10.99.0.0/24", "fd99::/64"]

[pool.{THICK_POOL}]
kind = "lvm"
volume_group = "tether"
devices = ["/dev/vdb"]

[pool.{THIN_POOL}]
kind = "lvm"
volume_group = "tether"
thin_pool = "thinpool"
devices = ["/dev/vdb"]

[pool.{SHARE_POOL}]
kind = "directory"
path = "{SHARE}"
owner_uid = 64055
owner_gid = 64055
"#
    )
}

const COMPUTE_CONFIG: &str = r#"guest_deadline_milliseconds = 20000

[server]
listen = "[::]:7440"
socket = "/run/tether/compute-agent.sock"
certificate = "/etc/tether/pki/compute.crt"
key = "/etc/tether/pki/compute.key"
ca = "/etc/tether/pki/ca.crt"
"#;
