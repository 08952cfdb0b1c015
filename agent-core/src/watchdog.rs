//! The watchdog of systemd.service(5), `WatchdogSec=`: an agent whose runtime does no work any more is ended and started
//! again. Not here: calls that hang in the kernel. They hold a thread and a key, and never the runtime (`stuck`).

use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::{MissedTickBehavior, interval};

/// Tells systemd again and again that the runtime on which this runs still works. Ends at once where nobody watches.
pub(crate) async fn watchdog() {
    let Some(limit) = sd_notify::watchdog_enabled() else { return };
    every(period(limit), || {
        if let Err(error) = sd_notify::notify(&[NotifyState::Watchdog]) {
            tracing::warn!(%error, "the watchdog was not told");
        }
    })
    .await;
}

/// sd_watchdog_enabled(3) asks for half of the limit; with a third, one that comes late does no harm.
fn period(limit: Duration) -> Duration {
    (limit / 3).max(Duration::from_millis(1))
}

async fn every(period: Duration, mut tell: impl FnMut()) {
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        tell();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn it_is_told_three_times_within_the_limit() {
        let limit = Duration::from_secs(30);
        let mut told = 0;
        let outcome =
            tokio::time::timeout(limit - Duration::from_secs(1), every(period(limit), || told += 1));
        assert!(outcome.await.is_err(), "it goes on until the agent ends");
        assert_eq!(told, 3);
    }
}
