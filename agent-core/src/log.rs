//! The agent's log: lines for people on standard error. Where that is the journal, each line has its priority before it (sd-daemon(3)),
//! so that `journalctl -p warning` works, and no time of its own. Not here: what is logged.

#[cfg(feature = "otlp")]
mod otlp;

use std::error::Error;
use std::io::IsTerminal;
use std::os::unix::fs::MetadataExt;

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::{self, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, fmt, registry};

/// What the log has beside its lines. To be dropped at the end, while the runtime still runs.
#[must_use]
pub(crate) struct Log {
    #[cfg(feature = "otlp")]
    _spans: Option<otlp::Sender>,
}

/// Starts it. `filter` is a level or tracing's filter syntax. To be called within the runtime.
///
/// # Errors
/// When the filter is none, or the environment names a collector for spans that cannot be one.
pub(crate) fn start(service: &'static str, filter: &str) -> Result<Log, Box<dyn Error>> {
    let colours = std::io::stderr().is_terminal();
    let lines = fmt::layer().with_writer(std::io::stderr).with_ansi(colours);
    let lines = match is_journal() {
        true => lines.event_format(ForJournal).boxed(),
        false => lines.with_target(false).boxed(),
    };
    let log = registry().with(lines).with(EnvFilter::try_new(filter)?);
    #[cfg(feature = "otlp")]
    {
        let (sender, layer) = otlp::start(service)?.unzip();
        log.with(layer).init();
        Ok(Log { _spans: sender })
    }
    #[cfg(not(feature = "otlp"))]
    {
        let _without_spans = service;
        log.init();
        Ok(Log {})
    }
}

/// Is standard error the journal's? It may have been given to something else since systemd said so (systemd.exec(5),
/// `JOURNAL_STREAM`: device and inode).
fn is_journal() -> bool {
    let Ok(told) = std::env::var("JOURNAL_STREAM") else { return false };
    std::fs::metadata("/proc/self/fd/2").is_ok_and(|file| told == format!("{}:{}", file.dev(), file.ino()))
}

/// A line with its priority before it.
struct ForJournal;

impl<S, N> FormatEvent<S, N> for ForJournal
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> std::fmt::Result {
        write!(writer, "<{}>", priority(*event.metadata().level()))?;
        format::format().without_time().with_target(false).format_event(context, writer, event)
    }
}

/// syslog(3)'s number.
fn priority(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        _ => 7,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{self, Write};
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_line_for_the_journal_says_how_grave_it_is_and_what_it_belongs_to() {
        let lines = Lines::default();
        let writer = lines.clone();
        let log = tracing_subscriber::fmt()
            .with_writer(move || writer.clone())
            .with_ansi(false)
            .event_format(ForJournal)
            .finish();
        tracing::subscriber::with_default(log, || {
            let _operation = tracing::info_span!("operation", verb = "attach", domain = "vm1").entered();
            tracing::error!(step = "login", "step failed");
            tracing::info!("attached");
        });
        let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        assert_eq!(
            text,
            "<3>ERROR operation{verb=\"attach\" domain=\"vm1\"}: step failed step=\"login\"\n\
             <6> INFO operation{verb=\"attach\" domain=\"vm1\"}: attached\n"
        );
    }
}
