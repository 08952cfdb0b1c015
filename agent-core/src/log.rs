//! The agent's log: lines for people on standard error, or in the journal where that is the journal's. Not here: what is logged.

mod journal;
#[cfg(feature = "otlp")]
mod otlp;

use std::error::Error;
use std::io::IsTerminal;

use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt, registry};

/// What the log has beside its lines. To be dropped at the end, while the runtime still runs.
#[must_use]
pub(crate) struct Log {
    #[cfg(feature = "otlp")]
    _spans: Option<otlp::Sender>,
}

/// Starts it. `filter` is a level, or several for each their target: `info,h2=debug`. To be called within the runtime.
///
/// # Errors
/// When the filter is none, or the environment names a collector for spans that cannot be one.
pub(crate) fn start(service: &'static str, filter: &str) -> Result<Log, Box<dyn Error>> {
    let colours = std::io::stderr().is_terminal();
    let lines = fmt::layer().with_writer(std::io::stderr).with_ansi(colours);
    let (fields, lines) = match journal::is_there() {
        true => (Some(journal::Fields), lines.event_format(journal::Lines::new(service)).boxed()),
        false => (None, lines.with_target(false).boxed()),
    };
    let log = registry().with(fields).with(lines).with(filter.parse::<Targets>()?);
    #[cfg(feature = "otlp")]
    {
        let (sender, layer) = otlp::start(service)?.unzip();
        log.with(layer).init();
        Ok(Log { _spans: sender })
    }
    #[cfg(not(feature = "otlp"))]
    {
        log.init();
        Ok(Log {})
    }
}
