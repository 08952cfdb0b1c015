//! What a doctor finds: how bad it is, what it means for an exit code, and how people see it. The agents on their hosts and
//! the `tether` command show findings alike, so both use this. Not here: the checks.

use std::fmt;

use serde::Serialize;

use crate::wire;

/// How wide a table is, in characters.
const WIDTH: usize = 120;
/// Where what belongs to a finding begins below its row.
const INDENT: &str = "          ";

/// How bad a finding is, the worst last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// As it should be.
    Ok,
    /// Worth knowing; nothing has to be done.
    Note,
    /// Works now, and will not always.
    Warning,
    /// Does not work, or endangers data.
    Error,
}

impl Severity {
    /// As people and JSON have it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }

    /// The exit code of a doctor whose worst finding this is: 0, 1 for a warning, 2 for an error.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Ok | Self::Note => 0,
            Self::Warning => 1,
            Self::Error => 2,
        }
    }
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// What one check found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The check.
    pub check: String,
    /// How bad it is.
    pub severity: Severity,
    /// What was found.
    pub found: String,
    /// Why it matters; empty when all is well.
    pub why: String,
    /// The command that mends it, or what to do where no command can; a line each when there are several.
    pub mend: String,
}

impl Finding {
    /// As it should be.
    pub fn ok(check: &str, found: impl Into<String>) -> Self {
        Self {
            check: check.to_owned(),
            severity: Severity::Ok,
            found: found.into(),
            why: String::new(),
            mend: String::new(),
        }
    }

    /// Worth knowing.
    pub fn note(check: &str, found: impl Into<String>, why: impl Into<String>) -> Self {
        Self { severity: Severity::Note, why: why.into(), ..Self::ok(check, found) }
    }

    /// Works now, and will not always.
    pub fn warning(check: &str, found: impl Into<String>, why: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, why: why.into(), ..Self::ok(check, found) }
    }

    /// Does not work, or endangers data.
    pub fn error(check: &str, found: impl Into<String>, why: impl Into<String>) -> Self {
        Self { severity: Severity::Error, why: why.into(), ..Self::ok(check, found) }
    }

    /// The same with what mends it.
    #[must_use]
    pub fn mend(mut self, mend: impl Into<String>) -> Self {
        self.mend = mend.into();
        self
    }
}

impl From<Finding> for wire::Finding {
    fn from(finding: Finding) -> Self {
        let severity = match finding.severity {
            Severity::Ok => wire::Severity::Ok,
            Severity::Note => wire::Severity::Note,
            Severity::Warning => wire::Severity::Warning,
            Severity::Error => wire::Severity::Error,
        };
        Self {
            check: finding.check,
            severity: severity.into(),
            found: finding.found,
            why: finding.why,
            mend: finding.mend,
        }
    }
}

impl From<wire::Finding> for Finding {
    fn from(finding: wire::Finding) -> Self {
        let severity = match finding.severity() {
            wire::Severity::Ok => Severity::Ok,
            wire::Severity::Note => Severity::Note,
            wire::Severity::Warning => Severity::Warning,
            // A severity of a later version is not taken lightly.
            wire::Severity::Error | wire::Severity::Unspecified => Severity::Error,
        };
        Self { check: finding.check, severity, found: finding.found, why: finding.why, mend: finding.mend }
    }
}

/// The worst of several severities.
pub fn worst(severities: impl IntoIterator<Item = Severity>) -> Severity {
    severities.into_iter().max().unwrap_or(Severity::Ok)
}

/// Findings for people, the worst first, in 120 columns: a row each, and below it why it matters and what mends it. Commands
/// are not broken into lines, so that they can be copied. Each comes with the host it was found on; without any, there is no
/// such column.
pub fn table<'a>(findings: impl IntoIterator<Item = (&'a str, &'a Finding)>) -> String {
    let mut findings: Vec<_> = findings.into_iter().collect();
    findings
        .sort_by_key(|(host, finding)| (std::cmp::Reverse(finding.severity), *host, finding.check.as_str()));
    let widest = |texts: &mut dyn Iterator<Item = &str>| texts.map(|text| text.chars().count()).max();
    let host_width = widest(&mut findings.iter().map(|(host, _)| *host)).filter(|width| *width > 0);
    let host_width = host_width.map(|width| width.max(4));
    let check_width =
        widest(&mut findings.iter().map(|(_, finding)| finding.check.as_str())).unwrap_or(0).max(5);
    let row = |severity: &str, host: &str, check: &str| {
        let host = host_width.map(|width| format!("{host:width$}  ")).unwrap_or_default();
        format!("{severity:8}  {host}{check:check_width$}  ")
    };
    let mut lines = vec![row("SEVERITY", "HOST", "CHECK") + "FOUND"];
    for (host, finding) in findings {
        let begin = row(finding.severity.as_str(), host, &finding.check);
        let mut left = begin.clone();
        for part in wrap(&finding.found, WIDTH.saturating_sub(begin.chars().count())) {
            lines.push(format!("{left}{part}"));
            left = " ".repeat(begin.chars().count());
        }
        let mut label = "why:  ";
        for part in wrap(&finding.why, WIDTH - INDENT.len() - label.len()) {
            lines.push(format!("{INDENT}{label}{part}"));
            label = "      ";
        }
        let mut label = "mend: ";
        for part in finding.mend.lines() {
            lines.push(format!("{INDENT}{label}{}", printable(part)));
            label = "      ";
        }
    }
    lines.join("\n")
}

/// Breaks prose at spaces; a word that is too long by itself stays whole. Control characters are shown escaped.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace().map(printable) {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(&word);
            }
            _ => lines.push(word),
        }
    }
    lines
}

/// What another host says must not steer the terminal.
fn printable(text: &str) -> String {
    match text.chars().any(char::is_control) {
        true => text.escape_debug().to_string(),
        false => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_see_the_worst_first_in_120_columns_with_the_command_whole() {
        let well = Finding::ok("clock", "synchronised");
        let found = "the fast brown fox ".repeat(12);
        let bad =
            Finding::error("open-iscsi-lock", found, "every login waits ".repeat(10)).mend("rm 'a b'\nrm c");
        let text = table([("storage1", &well), ("compute1", &bad)]);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines.iter().all(|line| line.chars().count() <= 120), "{text}");
        assert!(lines[0].starts_with("SEVERITY  HOST      CHECK            FOUND"), "{text}");
        assert!(lines[1].starts_with("error     compute1  open-iscsi-lock  the fast"), "{text}");
        assert!(lines[2].starts_with("                                     "), "{text}");
        assert!(
            lines.contains(&"          mend: rm 'a b'") && lines.contains(&"                rm c"),
            "{text}"
        );
        assert_eq!(lines.last().unwrap().trim_end(), "ok        storage1  clock            synchronised");
        assert!(!table([("", &well)]).contains("HOST"));
    }

    #[test]
    fn what_a_host_says_cannot_steer_the_terminal() {
        let finding = Finding::error("x", "a\u{1b}[2Jb", "").mend("c\u{7}");
        let text = table([("", &finding)]);
        assert!(!text.contains('\u{1b}') && !text.contains('\u{7}'), "{text:?}");
    }

    #[test]
    fn the_worst_finding_is_the_exit_code_and_the_wire_keeps_it() {
        for (severity, code) in
            [(Severity::Ok, 0), (Severity::Note, 0), (Severity::Warning, 1), (Severity::Error, 2)]
        {
            assert_eq!(severity.exit_code(), code);
            let finding = Finding { severity, ..Finding::ok("a", "b").mend("c") };
            assert_eq!(Finding::from(wire::Finding::from(finding.clone())), finding);
        }
        assert_eq!(worst([Severity::Note, Severity::Error, Severity::Ok]), Severity::Error);
        assert_eq!(Finding::from(wire::Finding::default()).severity, Severity::Error);
    }
}
