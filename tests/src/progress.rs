//! Says on standard error what is being done, how long it has taken so far, and how long it took.
//!
//! Not here: anything that a program would read; results go to standard output.

use std::future::Future;
use std::time::{Duration, Instant};

/// How often a long step says that it is still going.
const HEARTBEAT: Duration = Duration::from_secs(10);

/// Prints one line.
pub fn say(text: impl std::fmt::Display) {
    eprintln!("lab: {text}");
}

/// Does `work` and says so: when it starts, every ten seconds, and when it ends with the time it took.
///
/// # Errors
/// Those of `work`.
pub async fn step<T>(what: &str, work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    say(format_args!("{what} …"));
    let began = Instant::now();
    tokio::pin!(work);
    loop {
        match tokio::time::timeout(HEARTBEAT, &mut work).await {
            Ok(result) => {
                let seconds = began.elapsed().as_secs_f64();
                match &result {
                    Ok(_) => say(format_args!("{what}: {seconds:.1} s")),
                    Err(_) => say(format_args!("{what}: failed after {seconds:.1} s")),
                }
                return result;
            }
            Err(_) => say(format_args!("{what}: still at it after {} s", began.elapsed().as_secs())),
        }
    }
}

/// A short pause between two looks at something that offers no event (another machine's boot, another process).
pub(crate) async fn pause(duration: Duration) {
    #[expect(
        clippy::disallowed_methods,
        reason = "a back-off between two tries, inside a loop with a deadline"
    )]
    tokio::time::sleep(duration).await;
}
