//! The command behind `tests/lab`: takes the lab up and down, shows it, and goes into its hosts.
//!
//! Not here: how any of it is done (see the library).

use std::convert::Infallible;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{Parser, Subcommand};
use serde_json::json;
use tether_tests::instance::{self, Instance};
use tether_tests::progress::say;
use tether_tests::qemu::MACHINES;
use tether_tests::{Lab, Options, State, Tether, bench, cache, lab, soak};

/// Two emulated hosts with real LVM, LIO, open-iscsi and libvirt, and Linux guests, to try Tether on.
///
/// It needs no KVM, no kernel module and no fixed port. The first `up` installs Debian packages into an image and boots
/// it (a few minutes); every other one starts from a saved state (seconds).
#[derive(Parser)]
#[command(name = "lab", version)]
struct Cli {
    /// Which lab: several can be up at a time, tests use their own.
    #[arg(long, global = true, env = "TETHER_LAB_NAME", default_value = "default")]
    name: String,
    #[command(subcommand)]
    command: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Take it up, or say that it is.
    Up {
        /// Throw away what was done in it and start again from the first saved state.
        #[arg(long)]
        fresh: bool,
    },
    /// End both hosts and remove their disks and saved states. Cached images stay.
    Down,
    /// Show what runs, where it is reached, and what was saved.
    Status {
        /// For scripts.
        #[arg(long)]
        json: bool,
    },
    /// A shell on a host, or one command on it.
    Ssh {
        /// `storage` or `compute`.
        host: String,
        /// The command; without one, a shell.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Copy files: `lab copy FILE storage:/tmp/` or `lab copy compute:/etc/hosts .`
    Copy {
        /// From where, and last to where.
        #[arg(required = true, num_args = 2..)]
        paths: Vec<String>,
    },
    /// Run one command in a Linux guest: ping, list, write, checksum, read, hold, release.
    Guest {
        /// `c2` or `c3`.
        guest: String,
        /// The command.
        #[arg(required = true, trailing_var_arg = true)]
        command: Vec<String>,
    },
    /// Install the agents that were built beside this command on both hosts, and print how to reach them.
    Install,
    /// Time Tether beside the same calls by hand, in a lab of its own; fails when it is over its limits.
    Bench {
        /// How often each is timed, 7 or more.
        #[arg(long, default_value_t = 9)]
        rounds: usize,
        /// For scripts.
        #[arg(long)]
        json: bool,
    },
    /// Random verbs of several controllers at once, with agents killed, the network cut and pools full, compared with a
    /// model, in a lab of its own. That stays up when something is not as predicted.
    Soak {
        /// No new round begins after so many seconds.
        #[arg(long, default_value_t = 60)]
        seconds: u64,
        /// The same seed gives the same orders.
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// For scripts.
        #[arg(long)]
        json: bool,
    },
    /// Save both hosts, memory and disks, under a name.
    Save {
        /// 1 to 24 of a-z, 0-9 and '-'.
        state: String,
    },
    /// Put both hosts back to a saved state; without a name to `ready`, or else `booted`.
    Restore {
        /// As `lab status` lists them.
        state: Option<String>,
    },
    /// Remove everything that was cached. Labs that are up must be taken down first.
    Clean,
}

#[tokio::main]
async fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            let usage = e.use_stderr();
            if e.print().is_err() {
                return ExitCode::FAILURE;
            }
            return if usage { ExitCode::from(64) } else { ExitCode::SUCCESS };
        }
    };
    match run(&cli).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            say(format_args!("error: {e:#}"));
            ExitCode::FAILURE
        }
    }
}

async fn run(cli: &Cli) -> anyhow::Result<()> {
    let name = cli.name.as_str();
    match &cli.command {
        Verb::Up { fresh } => {
            Lab::up(name, Options { fresh: *fresh, owned: false }).await?;
            status(name, false)
        }
        Verb::Down => {
            lab::down(name).await?;
            say(format_args!("'{name}' is down"));
            Ok(())
        }
        Verb::Status { json } => status(name, *json),
        Verb::Ssh { host, command } => {
            let program = "/usr/bin/ssh";
            replace_with(program, name, std::iter::once(host.clone()).chain(command.iter().cloned()))
                .map(|_| ())
        }
        Verb::Copy { paths } => {
            let paths = paths.iter().cloned();
            replace_with("/usr/bin/scp", name, std::iter::once("-r".to_string()).chain(paths)).map(|_| ())
        }
        Verb::Guest { guest, command } => {
            println!("{}", Lab::running(name).await?.guest(guest)?.command(&command.join(" ")).await?);
            Ok(())
        }
        Verb::Install => {
            println!("{}", Tether::install(&Lab::running(name).await?).await?.typed());
            Ok(())
        }
        Verb::Bench { rounds, json } => {
            let results = bench::run(*rounds).await?;
            if *json {
                println!("{}", serde_json::to_string_pretty(&results)?);
            } else {
                print!("{results}");
            }
            anyhow::ensure!(results.within_limits(), "over the limits");
            Ok(())
        }
        Verb::Soak { seconds, seed, json } => soak(Duration::from_secs(*seconds), *seed, *json).await,
        Verb::Save { state } => Lab::running(name).await?.save(state).await,
        Verb::Restore { state } => {
            let lab = Lab::running(name).await?;
            let has_ready = lab.instance().record()?.states.contains_key(State::Ready.name());
            let state = state.as_deref().unwrap_or(if has_ready { "ready" } else { "booted" });
            lab.restore(&State::from(state)).await
        }
        Verb::Clean => clean(),
    }
}

async fn soak(time: Duration, seed: u64, as_json: bool) -> anyhow::Result<()> {
    let lab = Lab::up("soak", Options { fresh: true, owned: false }).await?;
    let tether = Tether::install(&lab).await?;
    let results = soak::run(&lab, &tether, soak::Length::Time(time), seed).await?;
    if as_json {
        println!("{}", serde_json::to_string_pretty(&results)?);
    } else {
        print!("{results}");
    }
    anyhow::ensure!(
        results.mismatch.is_none(),
        "not as predicted; the lab is left up: tests/lab --name soak ssh compute, and at last tests/lab --name soak down"
    );
    lab.down().await
}

/// Becomes ssh or scp, so that terminal, signals and exit code are theirs.
fn replace_with(
    program: &str,
    name: &str,
    arguments: impl Iterator<Item = String>,
) -> anyhow::Result<Infallible> {
    let instance = Instance::open(name)?;
    let config = instance.file("ssh.config");
    anyhow::ensure!(config.exists(), "the lab '{name}' is not up: tests/lab up");
    #[expect(
        clippy::disallowed_methods,
        reason = "this process becomes the other: there is nothing left to watch over it"
    )]
    let mut command = std::process::Command::new(program);
    Err(command.arg("-F").arg(config).args(arguments).exec())
        .with_context(|| format!("cannot start {program}"))
}

fn status(name: &str, as_json: bool) -> anyhow::Result<()> {
    let instance = Instance::open(name)?;
    let record = instance.record()?;
    let config = instance.file("ssh.config");
    let hosts: Vec<_> =
        MACHINES.iter().map(|m| (m.name, m.pid(&instance), record.ports.get(m.name))).collect();
    let up = hosts.iter().all(|(_, pid, _)| pid.is_some());
    if as_json {
        let hosts: serde_json::Map<_, _> = hosts
            .iter()
            .map(|(host, pid, ports)| {
                let ports = ports.filter(|_| pid.is_some());
                let facts = json!({
                    "running": pid.is_some(),
                    "pid": pid.map(nix::unistd::Pid::as_raw),
                    "ssh_port": ports.map(|p| p.ssh),
                    "agent_port": ports.map(|p| p.agent),
                    "console": instance.file(&format!("{host}.console")),
                });
                ((*host).to_string(), facts)
            })
            .collect();
        let states: Vec<_> = record.states.keys().collect();
        let all = json!({"name": name, "up": up, "hosts": hosts, "states": states, "ssh_config": config});
        println!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(());
    }
    println!("lab '{name}': {}", if up { "up" } else { "not up" });
    for (host, pid, ports) in hosts {
        match (pid, ports) {
            (Some(pid), Some(ports)) => println!(
                "  {host:<8} process {pid}, ssh on 127.0.0.1:{}, agent (7440) on 127.0.0.1:{}",
                ports.ssh, ports.agent
            ),
            _ => println!("  {host:<8} not running"),
        }
    }
    if up {
        let states: Vec<_> = record.states.keys().map(String::as_str).collect();
        println!("  saved states: {}", states.join(", "));
        println!(
            "  try: tests/lab ssh storage vgs    tests/lab ssh compute virsh list    tests/lab guest c2 list"
        );
        println!(
            "  ssh, scp and others: -F {}    consoles: {}/*.console",
            config.display(),
            instance.runtime.display()
        );
    }
    Ok(())
}

fn clean() -> anyhow::Result<()> {
    for name in instance::names()? {
        let instance = Instance::open(&name)?;
        let running = MACHINES.iter().any(|m| m.pid(&instance).is_some());
        anyhow::ensure!(!running, "the lab '{name}' is up: tests/lab --name {name} down");
        instance.remove()?;
    }
    let folder: PathBuf = cache::folder()?;
    std::fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    say(format_args!("removed {}", folder.display()));
    Ok(())
}
