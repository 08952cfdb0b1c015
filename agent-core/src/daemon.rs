//! What the `main` of both agents is made of: arguments, log, config, run, exit code.

use std::error::Error;
use std::future::Future;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory, FromArgMatches, Parser};
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tracing_subscriber::EnvFilter;

use crate::config::{self, ConfigError, Danger, Server};
use crate::operations::Operations;
use crate::server;

/// Exit code for bad usage or config (sysexits.h, EX_USAGE).
const EXIT_USAGE: u8 = 64;
/// How long operations under way may take to end once the agent is told to stop.
const OPERATIONS_LIMIT: Duration = Duration::from_secs(20);

#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The config file
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Read the config, say what is wrong with it, and end
    #[arg(long)]
    check_config: bool,
    /// What to log: error, warn, info, debug, or tracing's filter syntax
    #[arg(long, value_name = "FILTER", default_value = "info", env = "TETHER_LOG")]
    log: String,
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
}

/// An agent that is ready to serve.
pub struct Agent<C> {
    /// Its config.
    pub config: C,
    /// Its services.
    pub routes: Routes,
    /// Where its operations run; the end waits for them.
    pub operations: Vec<Operations>,
}

/// Runs an agent from its arguments to its exit code. `build` makes the services from the config.
pub fn main<C, B, F>(name: &'static str, default_config: &str, build: B) -> ExitCode
where
    C: AgentConfig,
    B: FnOnce(C, CancellationToken) -> F,
    F: Future<Output = Result<Agent<C>, Box<dyn Error + Send + Sync>>>,
{
    let matches = match Arguments::command().name(name).try_get_matches() {
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
    match EnvFilter::try_new(&arguments.log) {
        Ok(filter) => tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(std::io::stderr)
            .with_ansi(std::io::stderr().is_terminal())
            .with_target(false)
            .init(),
        Err(error) => return complain(name, &error, EXIT_USAGE),
    }
    let path = arguments.config.unwrap_or_else(|| default_config.into());
    let config = match config::load::<C>(&path).and_then(|config| config.check().map(|()| config)) {
        Ok(config) => config,
        Err(error) => return complain(name, &error, EXIT_USAGE),
    };
    if arguments.check_config {
        println!("{}: config is good", path.display());
        return ExitCode::SUCCESS;
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return complain(name, &error, 1),
    };
    let outcome = runtime.block_on(run(config, build));
    // A thread that the kernel holds must not hold up the end.
    runtime.shutdown_timeout(Duration::from_secs(1));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => complain(name, error.as_ref(), 1),
    }
}

async fn run<C, B, F>(config: C, build: B) -> Result<(), Box<dyn Error + Send + Sync>>
where
    C: AgentConfig,
    B: FnOnce(C, CancellationToken) -> F,
    F: Future<Output = Result<Agent<C>, Box<dyn Error + Send + Sync>>>,
{
    let shutdown = CancellationToken::new();
    stop_on_signal(shutdown.clone())?;
    let Agent { config, routes, operations } = build(config, shutdown.clone()).await?;
    server::serve(config.server(), config.danger(), routes, shutdown, || {
        tracing::info!(version = env!("CARGO_PKG_VERSION"), "ready");
        // Without systemd there is nobody to tell, which is no error.
        if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
            tracing::debug!(%error, "systemd not told");
        }
    })
    .await?;
    for operations in operations {
        for unfinished in operations.wait_until_idle(OPERATIONS_LIMIT).await {
            tracing::warn!(%unfinished, "stopped in the middle; the same call, or its opposite, goes on from the journal");
        }
    }
    tracing::info!("stopped");
    Ok(())
}

fn stop_on_signal(shutdown: CancellationToken) -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::spawn(async move {
        tokio::select! { _ = terminate.recv() => (), _ = interrupt.recv() => () }
        tracing::info!("stopping");
        shutdown.cancel();
    });
    Ok(())
}

/// Says what is wrong, with all of its causes, and gives the exit code.
fn complain(name: &str, error: &(dyn Error + 'static), code: u8) -> ExitCode {
    eprintln!("{name}: {error}");
    let mut source = error.source();
    while let Some(cause) = source {
        eprintln!("  {cause}");
        source = cause.source();
    }
    ExitCode::from(code)
}
