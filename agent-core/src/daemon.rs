//! What the `main` of both agents is made of: arguments, log, config, run, exit code.

use std::error::Error;
use std::future::Future;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use serde::de::DeserializeOwned;
use tether_proto::wire;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use crate::audit;
use crate::config::{self, ConfigError, Danger, Server};
use crate::doctor::{self, Check, certificates};
use crate::failure::Failure;
use crate::log;
use crate::metrics::{self, Measure, Sample};
use crate::operations::{Operations, Stopped};
use crate::program::Program;
use crate::reconcile::Backoff;
use crate::server;
use crate::steps::blocking;
use crate::watchdog::watchdog;

/// Exit code for bad usage or config (sysexits.h, EX_USAGE).
const EXIT_USAGE: u8 = 64;
/// How long a metric may wait for the certificates' files.
const CERTIFICATES_DEADLINE: Duration = Duration::from_secs(2);
/// How long operations under way may take to end once the agent is told to stop.
const OPERATIONS_LIMIT: Duration = Duration::from_secs(20);

#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The config file
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Read the config, say what is wrong with it, and end
    #[arg(long)]
    check_config: bool,
    /// What to log: error, warn, info, debug, or several with targets: info,h2=debug
    #[arg(long, value_name = "FILTER", default_value = "info", env = "TETHER_LOG")]
    log: String,
    #[command(subcommand)]
    verb: Option<Verb>,
}

#[derive(Subcommand)]
enum Verb {
    /// Say what is wrong with this host, or may go wrong, and what mends it; changes nothing
    ///
    /// Works also when the agent does not run, and when its config is broken: then that is the first finding.
    #[command(after_help = "\
Exit codes:
  0    nothing is wrong, or no more than a note
  1    the worst finding is a warning
  2    the worst finding is an error
  64   bad usage

Examples:
  tether-storage-agent doctor
  tether-compute-agent doctor --json")]
    Doctor {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
}

/// An agent's config.
pub trait AgentConfig: DeserializeOwned {
    /// Checks all that can be wrong before the agent starts.
    ///
    /// # Errors
    /// The first thing that is wrong.
    fn check(&self) -> Result<(), ConfigError>;
    /// How the agent is reached.
    fn server(&self) -> &Server;
    /// What nobody should need.
    fn danger(&self) -> Danger;
    /// Where metrics are told.
    fn metrics(&self) -> SocketAddr;
}

/// An agent that is ready to serve.
pub struct Agent<C> {
    /// Its config.
    pub config: C,
    /// Its services.
    pub routes: Routes,
    /// Where its operations run; the end waits for them.
    pub operations: Operations,
    /// Makes what is match the journal: once it serves, and at each SIGHUP.
    pub reconcile: Reconciler,
    /// Measures what metrics tell beside operations.
    pub measure: Measure,
}

/// See [`Agent::reconcile`].
pub type Reconciler =
    Box<dyn Fn() -> Pin<Box<dyn Future<Output = wire::ReconcileResponse> + Send>> + Send + Sync>;

/// An [`Agent::reconcile`] from what an agent does.
pub fn reconciler<F>(work: impl Fn() -> F + Send + Sync + 'static) -> Reconciler
where
    F: Future<Output = wire::ReconcileResponse> + Send + 'static,
{
    Box::new(move || Box::pin(work()))
}

/// An agent's command line, for itself, its man page and completions.
pub fn command(program: &Program) -> clap::Command {
    Arguments::command().name(program.name).about(program.about).after_help(format!(
        "The config is {} when no other is named.\n\nExamples:\n  {} --check-config\n  {1} --log debug",
        program.config_file, program.name
    ))
}

/// Runs an agent from its arguments to its exit code. `build` makes the services from the config; `checks` is what `doctor`
/// looks at, and gets the config's defaults when the file cannot be read.
pub fn main<C, B, F>(program: &Program, build: B, checks: impl FnOnce(&C) -> Vec<Check>) -> ExitCode
where
    C: AgentConfig,
    B: FnOnce(C, CancellationToken) -> F,
    F: Future<Output = Result<Agent<C>, Box<dyn Error + Send + Sync>>>,
{
    let name = program.name;
    let matches = match command(program).try_get_matches() {
        Ok(matches) => matches,
        Err(error) => {
            let code = if error.use_stderr() { EXIT_USAGE } else { 0 };
            return match error.print() {
                Ok(()) => ExitCode::from(code),
                Err(_) => ExitCode::FAILURE,
            };
        }
    };
    let arguments = match Arguments::from_arg_matches(&matches) {
        Ok(arguments) => arguments,
        Err(error) => return complain(name, &error, EXIT_USAGE),
    };
    let path = arguments.config.unwrap_or_else(|| program.config_file.into());
    if let Some(Verb::Doctor { json }) = arguments.verb {
        return examine(name, &path, json, checks);
    }
    let runtime = match runtime() {
        Ok(runtime) => runtime,
        Err(error) => return complain(name, &error, 1),
    };
    let started = {
        let _within = runtime.enter();
        log::start(name, &with_audit(&arguments.log))
    };
    let log = match started {
        Ok(log) => log,
        Err(error) => return complain(name, error.as_ref(), EXIT_USAGE),
    };
    let config = match config::load::<C>(&path).and_then(|config| config.check().map(|()| config)) {
        Ok(config) => config,
        // A certificate and a key that do not fit are so for a moment when they are renewed: systemd tries again.
        Err(error @ ConfigError::File { .. }) if !arguments.check_config => return complain(name, &error, 1),
        Err(error) => return complain(name, &error, EXIT_USAGE),
    };
    if arguments.check_config {
        println!("{}: config is good", path.display());
        return ExitCode::SUCCESS;
    }
    let outcome = runtime.block_on(run(config, build));
    drop(log);
    // A thread that the kernel holds must not hold up the end.
    runtime.shutdown_timeout(Duration::from_secs(1));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => complain(name, error.as_ref(), 1),
    }
}

/// The audit is written whatever else is left out of the log, unless the filter names it.
fn with_audit(filter: &str) -> String {
    if filter.contains("audit") { filter.to_owned() } else { format!("{filter},audit=info") }
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()
}

/// `doctor`: a config that is broken is a finding, and what can be looked at without it is.
fn examine<C: AgentConfig>(
    name: &'static str,
    path: &Path,
    json: bool,
    checks: impl FnOnce(&C) -> Vec<Check>,
) -> ExitCode {
    let (config, problem) = match config::load::<C>(path) {
        Ok(config) => {
            let problem = config.check().err();
            (Some(config), problem)
        }
        // All keys have defaults.
        Err(error) => (toml::from_str("").ok(), Some(error)),
    };
    let runtime = match runtime() {
        Ok(runtime) => runtime,
        Err(error) => return complain(name, &error, 1),
    };
    let findings = runtime.block_on(async {
        let server = config.as_ref().map(AgentConfig::server);
        let mut all = doctor::of_the_agent(name, path, problem.as_ref(), server);
        all.extend(config.as_ref().map(checks).into_iter().flatten());
        doctor::run(all).await
    });
    // What hangs was told, and must not hold up the end.
    runtime.shutdown_timeout(Duration::from_millis(100));
    let (text, code) = doctor::report(&findings, json);
    println!("{text}");
    ExitCode::from(code)
}

async fn run<C, B, F>(config: C, build: B) -> Result<(), Box<dyn Error + Send + Sync>>
where
    C: AgentConfig,
    B: FnOnce(C, CancellationToken) -> F,
    F: Future<Output = Result<Agent<C>, Box<dyn Error + Send + Sync>>>,
{
    tokio::spawn(watchdog());
    let shutdown = CancellationToken::new();
    stop_on_signal(shutdown.clone())?;
    let Agent { config, routes, operations, reconcile, measure } = build(config, shutdown.clone()).await?;
    // Whoever has the address already takes nothing but the metrics away.
    let address = config.metrics();
    let watched = operations.clone();
    let server = config.server().clone();
    let known = move || {
        let (stuck, server) = (watched.stuck().list().len(), server.clone());
        async move {
            let mut samples = vec![Sample {
                name: "stuck_keys",
                help: "Attachments, volumes and mounts on which nothing can be begun, since a call or a process hangs in the kernel",
                labels: Vec::new(),
                value: u32::try_from(stuck).map_or(f64::INFINITY, f64::from),
            }];
            let expiry = move || Ok::<_, Failure>(certificates::first_expiry(&server));
            if let Ok(Some(expiry)) = blocking(CERTIFICATES_DEADLINE, expiry).await {
                samples.push(Sample {
                    name: "certificate_expiry_timestamp_seconds",
                    help: "When the first of the agent's and its authority's certificates expires, since 1970",
                    labels: Vec::new(),
                    value: u32::try_from(expiry).map_or(f64::INFINITY, f64::from),
                });
            }
            samples
        }
    };
    let measure = metrics::measure_beside(measure, known);
    if let Err(error) = metrics::serve(address, operations.metrics().clone(), measure, shutdown.clone()).await
    {
        tracing::error!(%address, %error, "no metrics: give them another address, [metrics] listen in the config");
    }
    let mut hang_ups = signal(SignalKind::hangup())?;
    let serving = Arc::new(Notify::new());
    let begun = serving.clone();
    let reconciling = tokio::spawn(async move {
        let mut backoff = Backoff::default();
        begun.notified().await;
        loop {
            let began = Instant::now();
            let found = reconcile().await;
            audit::reconciled_itself(began, &found);
            tracing::info!(
                changed = found.items.iter().filter(|item| item.done).count(),
                failed = found.items.iter().filter(|item| !item.done).count(),
                unchanged = found.unchanged,
                milliseconds = found.duration_microseconds / 1000,
                "reconciled"
            );
            let asked = match backoff.after(&found) {
                Some(pause) => timeout(pause, hang_ups.recv()).await.ok(),
                None => Some(hang_ups.recv().await),
            };
            match asked {
                None => {}
                Some(Some(())) => backoff.reset(),
                Some(None) => return,
            }
        }
    });
    let (stopping, running) = (shutdown.clone(), operations.clone());
    let stopped = tokio::spawn(async move {
        stopping.cancelled().await;
        // Nothing new is begun; what runs is waited for with all other operations.
        reconciling.abort();
        running.stop(OPERATIONS_LIMIT).await
    });
    server::serve(config.server(), config.danger(), routes, shutdown, || {
        serving.notify_one();
        tracing::info!(version = env!("CARGO_PKG_VERSION"), "ready");
        // Without systemd there is nobody to tell, which is no error.
        if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
            tracing::debug!(%error, "systemd not told");
        }
    })
    .await?;
    let mut all = stopped.await?;
    // A call that came in while the doors were closing.
    let late = operations.stop(Duration::ZERO).await;
    all.extend(
        late.into_iter()
            .filter(|(operation, _)| !all.iter().any(|(known, _)| known == operation))
            .collect::<Vec<_>>(),
    );
    for (operation, stopped) in all {
        match stopped {
            Stopped::Finished => tracing::info!(operation, "finished before the end"),
            Stopped::After(step) => {
                tracing::warn!(
                    operation,
                    after = step,
                    "stopped between two steps: the next start goes on from the journal"
                );
            }
            Stopped::In(step) => {
                tracing::warn!(
                    operation,
                    step,
                    "cut off in this step: the next start goes on from the journal"
                );
            }
        }
    }
    tracing::info!("stopped");
    Ok(())
}

fn stop_on_signal(shutdown: CancellationToken) -> std::io::Result<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::spawn(async move {
        tokio::select! { _ = terminate.recv() => (), _ = interrupt.recv() => () }
        tracing::info!("stopping");
        shutdown.cancel();
    });
    Ok(())
}

/// Says what is wrong, with all of its causes, and what to do, and gives the exit code.
fn complain(name: &str, error: &(dyn Error + 'static), code: u8) -> ExitCode {
    eprintln!("{name}: {error}");
    let mut source = error.source();
    while let Some(cause) = source {
        eprintln!("  {cause}");
        source = cause.source();
    }
    if code == EXIT_USAGE {
        eprintln!("  next: correct it; `{name} --check-config` says whether the config is good");
    } else {
        eprintln!("  next: mend that, then: systemctl restart {name}");
    }
    ExitCode::from(code)
}
