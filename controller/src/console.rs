//! Where words go: results on standard output, all else on standard error. Text that comes from elsewhere cannot
//! steer the terminal: control characters are shown escaped. Not here: what is said.

use std::io::{self, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

type Sink = Box<dyn Write + Send>;

/// Standard output and standard error, or what a test takes for them.
pub struct Console {
    out: Mutex<Sink>,
    err: Mutex<Sink>,
    /// Progress and notes are left out.
    silent: bool,
    /// Results and errors are JSON.
    json: bool,
}

impl Console {
    /// A console that writes results to `out` and all else to `err`.
    pub fn new(out: impl Write + Send + 'static, err: impl Write + Send + 'static) -> Self {
        Self { out: Mutex::new(Box::new(out)), err: Mutex::new(Box::new(err)), silent: false, json: false }
    }

    pub(crate) fn style(&mut self, json: bool, quiet: bool) {
        self.json = json;
        self.silent = json || quiet;
    }

    pub(crate) fn json(&self) -> bool {
        self.json
    }

    /// A result, on standard output.
    pub(crate) fn result(&self, text: &str) -> io::Result<()> {
        let mut out = lock(&self.out);
        write(&mut out, text)?;
        out.flush()
    }

    /// What goes on, for people. Silent with `--json` and `--quiet`.
    pub(crate) fn note(&self, text: &str) {
        if !self.silent {
            self.complain(text);
        }
    }

    /// What must be said in any case, on standard error.
    pub fn complain(&self, text: &str) {
        let mut err = lock(&self.err);
        // Who closed standard error does not want to know.
        drop(write(&mut err, text).and_then(|()| err.flush()));
    }
}

fn write(sink: &mut Sink, text: &str) -> io::Result<()> {
    let mut safe = String::with_capacity(text.len() + 1);
    for c in text.chars() {
        if c.is_control() && c != '\n' {
            safe.extend(c.escape_default());
        } else {
            safe.push(c);
        }
    }
    safe.push('\n');
    sink.write_all(safe.as_bytes())
}

fn lock(sink: &Mutex<Sink>) -> MutexGuard<'_, Sink> {
    // A sink has no state that a panic could leave half changed.
    sink.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A time for people: `850 us`, `3.1 ms`, `40 ms`, `1.2 s`, `75 s`.
pub(crate) fn time_text(time: Duration) -> String {
    let microseconds = time.as_micros();
    let seconds = time.as_secs_f64();
    match microseconds {
        0..=999 => format!("{microseconds} us"),
        1_000..=9_999 => format!("{:.1} ms", seconds * 1e3),
        10_000..=999_499 => format!("{:.0} ms", seconds * 1e3),
        999_500..=9_949_999 => format!("{seconds:.1} s"),
        _ => format!("{seconds:.0} s"),
    }
}

/// A word as a person would type it in a shell.
pub(crate) fn shell_word(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_.+-/:@%=,".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_for_people() {
        for (microseconds, text) in [
            (850, "850 us"),
            (3_100, "3.1 ms"),
            (40_000, "40 ms"),
            (999_600, "1.0 s"),
            (1_230_000, "1.2 s"),
            (75_000_000, "75 s"),
        ] {
            assert_eq!(time_text(Duration::from_micros(microseconds)), text);
        }
    }

    #[test]
    fn words_that_a_shell_would_split_are_quoted() {
        assert_eq!(shell_word("tether/v1"), "tether/v1");
        assert_eq!(shell_word("my vm"), "'my vm'");
        assert_eq!(shell_word("it's"), r"'it'\''s'");
    }

    #[test]
    fn text_from_elsewhere_cannot_steer_the_terminal() {
        let shared = std::sync::Arc::new(Mutex::new(Vec::new()));
        let console = Console::new(Shared(shared.clone()), io::sink());
        console.result("a\u{1b}[31m\nb").unwrap();
        assert_eq!(String::from_utf8(shared.lock().unwrap().clone()).unwrap(), "a\\u{1b}[31m\nb\n");
    }

    struct Shared(std::sync::Arc<Mutex<Vec<u8>>>);
    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
}
