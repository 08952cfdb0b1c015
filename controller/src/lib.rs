//! The `tether` command as a library: [`run`] takes the arguments and gives the exit code. The binary hands it the
//! process's own; tests hand it theirs; packaging asks [`command`] for the man page and completions.

use std::ffi::OsString;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use clap::{CommandFactory, Parser};
use tonic::Code;

mod agent;
mod arguments;
mod attach;
mod call;
mod config;
mod console;
mod detach;
mod doctor;
mod extend;
mod failure;
#[cfg(fuzzing)]
pub mod fuzz;
mod objects;
mod overview;
mod pki;
mod pool;
mod progress;
mod reconcile;
mod survey;
mod transport;
mod view;
mod volume;
mod watch;

pub use config::Environment;
pub use console::Console;
pub use failure::Exit;

use arguments::{Arguments, Verb};
use call::Session;
use config::Config;
use failure::{Failure, Result};
use view::Output;

/// The command line, for man pages and completions.
pub fn command() -> clap::Command {
    Arguments::command()
}

/// Runs one command, arguments with the program's name first. `interrupt` ends when a person wants to stop waiting.
pub async fn run(
    arguments: Vec<OsString>,
    environment: &Environment,
    mut console: Console,
    interrupt: impl Future<Output = ()>,
) -> Exit {
    let json = arguments.iter().any(|argument| argument == "--json");
    let arguments = match Arguments::try_parse_from(arguments) {
        Ok(arguments) => arguments,
        Err(error) => return misused(&console, json, &error),
    };
    console.style(arguments.json, arguments.quiet);
    let console = Arc::new(console);
    let outcome = execute(&arguments, environment, &console, interrupt).await;
    tell(&console, outcome)
}

async fn execute(
    arguments: &Arguments,
    environment: &Environment,
    console: &Arc<Console>,
    interrupt: impl Future<Output = ()>,
) -> Result<Output> {
    if let Verb::Pki(verb) = &arguments.verb {
        return pki::run(verb);
    }
    let config = Config::load(arguments.config.as_deref(), environment)?;
    if config.plaintext {
        console.complain(
            "warning: [danger] plaintext is on: whoever is on the way reads and changes what is said",
        );
    }
    let session = Arc::new(Session::new(console.clone(), config, Duration::from_secs(arguments.timeout)));
    tokio::select! {
        outcome = verb(&session, &arguments.verb) => outcome,
        () = interrupt => Err(interrupted(&session)),
    }
}

async fn verb(session: &Arc<Session>, verb: &Verb) -> Result<Output> {
    match verb {
        Verb::Volume(verb) => volume::run(session, verb).await,
        Verb::Pool(verb) => pool::run(session, verb).await,
        Verb::Attach(arguments) => attach::attach(session, arguments).await,
        Verb::Detach(arguments) => detach::detach(session, arguments).await,
        Verb::List { all: false } => overview::list(session).await,
        Verb::List { all: true } => objects::list(session).await,
        Verb::Show { id } => overview::show(session, *id).await,
        Verb::Reconcile { dry_run } => reconcile::reconcile(session, *dry_run).await,
        Verb::Doctor => doctor::doctor(session).await,
        Verb::Watch => watch::watch(session).await,
        Verb::Pki(verb) => pki::run(verb),
    }
}

fn interrupted(session: &Session) -> Box<Failure> {
    let failure = session
        .interrupted()
        .unwrap_or_else(|| Failure::new(Code::Cancelled, "INTERRUPTED", "interrupted; nothing was begun"));
    failure.exit(Exit::Interrupted)
}

/// Says how it went.
fn tell(console: &Console, outcome: Result<Output>) -> Exit {
    let (written, exit) = match outcome {
        Ok(output) => {
            let text = if console.json() { &output.json } else { &output.text };
            let written = console.result(text);
            if !console.json() {
                output.warnings.iter().for_each(|warning| console.complain(warning));
            }
            (written, output.exit)
        }
        Err(failure) if console.json() => (console.result(&error_json(&failure)), failure.exit),
        Err(failure) => {
            console.complain(&failure.text());
            (Ok(()), failure.exit)
        }
    };
    match written {
        // Whoever reads has seen enough.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            console.complain(&format!("error: the result cannot be written: {error}"));
            Exit::Other
        }
        _ => exit,
    }
}

fn error_json(failure: &Failure) -> String {
    let error = std::collections::BTreeMap::from([("error", failure.view())]);
    // A map of texts and numbers is always JSON.
    view::to_json(&error).unwrap_or_else(|failure| failure.message)
}

/// Bad usage, `--help` or `--version`.
fn misused(console: &Console, json: bool, error: &clap::Error) -> Exit {
    let text = error.render().to_string();
    let text = text.trim_end();
    if !error.use_stderr() {
        // Help that nobody can read is no failure.
        drop(console.result(text));
        return Exit::Success;
    }
    if json {
        let failure = Failure::usage("USAGE", text.trim_start_matches("error: ")).next("see: tether --help");
        drop(console.result(&error_json(&failure)));
    } else {
        console.complain(text);
    }
    Exit::Usage
}
