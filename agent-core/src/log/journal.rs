//! Lines for systemd's journal: the text that a terminal would have, its priority, and what the line belongs to in fields, each
//! named `TETHER_` and the field's name: `journalctl TETHER_VOLUME=thin/vm1`. The datagrams are those of systemd's "Native Journal
//! Protocol" (systemd.io/JOURNAL_NATIVE_PROTOCOL). tracing-journald sends such, too, with a text that has none of the fields: an
//! operator would read "attached". Not here: what is logged.

use std::fmt::{self, Debug};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::fmt::format::{self, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

/// Where journald listens.
const SOCKET: &str = "/run/systemd/journal/socket";
/// A journald that takes a line later than this has standard error's lines from us, which wait in the kernel for it.
const DEADLINE: Duration = Duration::from_secs(1);

/// Is standard error the journal's? It may have been given to something else since systemd said so (systemd.exec(5),
/// `JOURNAL_STREAM`: device and inode).
pub(super) fn is_there() -> bool {
    let Ok(told) = std::env::var("JOURNAL_STREAM") else { return false };
    std::fs::metadata("/proc/self/fd/2").is_ok_and(|file| told == format!("{}:{}", file.dev(), file.ino()))
}

/// Sends each line to the journal. What it does not take goes where the log's lines go without this, as text with its priority
/// before it (sd-daemon(3)), which is no more than a journal makes fields of by itself. Needs [`Fields`] beside it.
pub(super) struct Lines {
    identifier: &'static str,
    journald: PathBuf,
    socket: Option<UnixDatagram>,
}

impl Lines {
    /// For a service of this name.
    pub(super) fn new(identifier: &'static str) -> Self {
        Self::to(identifier, Path::new(SOCKET))
    }

    fn to(identifier: &'static str, journald: &Path) -> Self {
        let socket = UnixDatagram::unbound().and_then(|socket| {
            socket.set_write_timeout(Some(DEADLINE))?;
            Ok(socket)
        });
        Self { identifier, journald: journald.to_owned(), socket: socket.ok() }
    }

    /// To the path each time: a journald that is started anew may have a new socket.
    fn is_sent(&self, datagram: &[u8]) -> bool {
        self.socket.as_ref().is_some_and(|socket| socket.send_to(datagram, &self.journald).is_ok())
    }
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut text = String::new();
        let as_text = format::format().without_time().with_target(false).with_ansi(false);
        as_text.format_event(context, Writer::new(&mut text), event)?;
        let priority = priority(*event.metadata().level());

        let mut fields = Collected::default();
        for span in context.event_scope().into_iter().flat_map(|scope| scope.from_root()) {
            if let Some(of_span) = span.extensions().get::<Collected>() {
                fields.0.extend(of_span.0.iter().cloned());
            }
        }
        event.record(&mut fields);
        let mut datagram = Vec::new();
        put(&mut datagram, "MESSAGE", text.trim());
        put(&mut datagram, "PRIORITY", &priority.to_string());
        put(&mut datagram, "SYSLOG_IDENTIFIER", self.identifier);
        for (name, value) in &fields.0 {
            put(&mut datagram, name, value);
        }
        if self.is_sent(&datagram) { Ok(()) } else { write!(writer, "<{priority}>{text}") }
    }
}

/// One field, in the form that any value can have.
fn put(datagram: &mut Vec<u8>, name: &str, value: &str) {
    datagram.extend_from_slice(name.as_bytes());
    datagram.push(b'\n');
    datagram.extend_from_slice(&(value.len() as u64).to_le_bytes());
    datagram.extend_from_slice(value.as_bytes());
    datagram.push(b'\n');
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

/// Keeps with each span what its fields are, for the lines within it.
pub(super) struct Fields;

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Fields {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let mut fields = Collected::default();
        attributes.record(&mut fields);
        span.extensions_mut().insert(fields);
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        if let Some(fields) = span.extensions_mut().get_mut::<Collected>() {
            values.record(fields);
        }
    }
}

/// Names as the journal has them, with values.
#[derive(Default)]
struct Collected(Vec<(String, String)>);

impl Visit for Collected {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() != "message" {
            let name = field.name().replace(|c: char| !c.is_ascii_alphanumeric(), "_").to_ascii_uppercase();
            self.0.push((format!("TETHER_{name}"), value.to_owned()));
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.record_str(field, &format!("{value:?}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;
    use std::sync::{Arc, Mutex};
    use tracing_subscriber::layer::SubscriberExt;
    use tracing_subscriber::registry;

    #[derive(Clone, Default)]
    struct StandardError(Arc<Mutex<Vec<u8>>>);

    impl io::Write for StandardError {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What goes to standard error of two lines that are sent to this socket.
    fn two_lines(path: &Path) -> String {
        let error = StandardError::default();
        let writer = error.clone();
        let layer = tracing_subscriber::fmt::layer().with_writer(move || writer.clone()).with_ansi(false);
        let log = registry().with(Fields).with(layer.event_format(Lines::to("agent", path)));
        tracing::subscriber::with_default(log, || {
            let span = tracing::info_span!("operation", verb = "attach", domain = tracing::field::Empty);
            span.record("domain", tracing::field::display("vm1"));
            let _operation = span.entered();
            tracing::error!(step = "login", code = 24, "step\nfailed");
            tracing::info!("attached");
        });
        String::from_utf8(error.0.lock().unwrap().clone()).unwrap()
    }

    /// The fields of the next datagram, read as the protocol has them.
    fn receive(journald: &UnixDatagram) -> Vec<(String, String)> {
        let mut buffer = [0; 4096];
        let length = journald.recv(&mut buffer).unwrap();
        let mut rest = &buffer[..length];
        let mut fields = Vec::new();
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let (name, after) = (&rest[..end], &rest[end + 1..]);
            let size = u64::from_le_bytes(after[..8].try_into().unwrap()) as usize;
            let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
            fields.push((text(name), text(&after[8..8 + size])));
            assert_eq!(after[8 + size], b'\n');
            rest = &after[8 + size + 1..];
        }
        assert!(rest.is_empty());
        fields
    }

    #[test]
    fn a_line_says_in_text_and_in_fields_how_grave_it_is_and_what_it_belongs_to() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let journald = UnixDatagram::bind(&path).unwrap();
        assert_eq!(two_lines(&path), "", "nothing twice");
        let pair = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
        let first = [
            ("MESSAGE", "ERROR operation{verb=\"attach\" domain=vm1}: step\nfailed step=\"login\" code=24"),
            ("PRIORITY", "3"),
            ("SYSLOG_IDENTIFIER", "agent"),
            ("TETHER_VERB", "attach"),
            ("TETHER_DOMAIN", "vm1"),
            ("TETHER_STEP", "login"),
            ("TETHER_CODE", "24"),
        ];
        assert_eq!(receive(&journald), first.map(pair));
        let second = receive(&journald);
        assert!(second.contains(&pair(("PRIORITY", "6"))), "{second:?}");
        assert!(!second.iter().any(|(name, _)| name == "TETHER_STEP"), "{second:?}");
    }

    #[test]
    fn lines_that_no_journal_takes_are_not_lost() {
        let folder = tempfile::tempdir().unwrap();
        let text = two_lines(&folder.path().join("nobody"));
        assert_eq!(
            text,
            "<3>ERROR operation{verb=\"attach\" domain=vm1}: step\nfailed step=\"login\" code=24\n\
             <6> INFO operation{verb=\"attach\" domain=vm1}: attached\n"
        );
    }
}
