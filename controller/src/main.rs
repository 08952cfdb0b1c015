//! The `tether` command: the process's arguments, standard streams, Ctrl-C and exit code. All else is in the library.

// A fuzzer brings its own.
#![cfg_attr(fuzzing, no_main)]
#![cfg_attr(fuzzing, allow(dead_code, unused_imports, reason = "a fuzzer calls the parser alone"))]

use std::process::ExitCode;

use rustix::process::{Resource, Rlimit, setrlimit};
use tether_controller::{Console, Environment, Exit, run};

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|data: &[u8]| tether_controller::fuzz::config(&String::from_utf8_lossy(data)));

#[cfg(not(fuzzing))]
fn main() -> ExitCode {
    // What is exported comes with CHAP secrets, and a private key is read: no core dump is to have them.
    let nothing = Rlimit { current: Some(0), maximum: Some(0) };
    let console = Console::new(std::io::stdout(), std::io::stderr());
    if let Err(error) = setrlimit(Resource::Core, nothing) {
        console.complain(&format!("warning: a crash may leave secrets in a core dump: {error}"));
    }
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            console.complain(&format!("error: cannot start: {error}"));
            return ExitCode::from(Exit::Other as u8);
        }
    };
    let environment = Environment::of_this_process();
    let exit = runtime.block_on(run(std::env::args_os().collect(), &environment, console, interrupt()));
    // A name that is still being resolved on another thread is not waited for.
    runtime.shutdown_background();
    ExitCode::from(exit as u8)
}

/// Ends at Ctrl-C; never when that cannot be listened for.
async fn interrupt() {
    if tokio::signal::ctrl_c().await.is_err() {
        std::future::pending::<()>().await;
    }
}
