//! The `tether` command: the process's arguments, standard streams, Ctrl-C and exit code. All else is in the library.

use std::process::ExitCode;

use tether_controller::{Console, Environment, Exit, run};

fn main() -> ExitCode {
    let console = Console::new(std::io::stdout(), std::io::stderr());
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
