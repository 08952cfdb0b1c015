//! `tether(7)`: the chapters of the README that an operator needs, as a man page. Not here: what builds and tests the project.

use clap_mangen::roff::{Inline, Roff, bold, italic, roman};
use pulldown_cmark::{Event, HeadingLevel, Options, Parser, Tag, TagEnd};

/// The page's name and section.
pub(crate) const FILE: &str = "tether.7";

const README: &str = include_str!("../../README.md");
/// Chapters for those who have the sources.
const LEFT_OUT: [&str; 3] = ["Try it", "Work on Tether", "Licence"];
/// How far text in lists and tables is from the margin.
const INDENT: &str = "4";

/// The page.
pub(crate) fn page(source: &str) -> String {
    let mut page = Page { roff: Roff::new(), line: Vec::new(), lists: Vec::new(), state: State::default() };
    page.roff.control("TH", ["tether", "7", "", source, "Tether"]);
    page.roff.control("SH", ["NAME"]);
    page.roff.text([roman("tether - how to install, secure, operate and recover it")]);
    page.roff.control("SH", ["DESCRIPTION"]);
    let mut events = Parser::new_ext(README, Options::ENABLE_TABLES).peekable();
    // The title stands above.
    events.by_ref().find(|event| matches!(event, Event::End(TagEnd::Heading(_))));
    for event in events {
        page.take(event);
    }
    page.roff.control("SH", ["SEE ALSO"]);
    let others = "tether(1), tether.toml(5), tether-storage-agent(8), tether-storage-agent.toml(5), \
                  tether-compute-agent(8), tether-compute-agent.toml(5)";
    page.roff.text([roman(others)]);
    page.roff.render()
}

#[derive(Default)]
struct State {
    /// A chapter's heading is being read.
    chapter: bool,
    /// The chapter is for others.
    left_out: bool,
    code: bool,
    strong: bool,
    emphasis: bool,
    /// The next paragraph is the first of a list's item and stands beside its mark.
    beside_mark: bool,
    /// A paragraph of an item, but for its first.
    indented: bool,
    /// Which cell of a table's row.
    cell: usize,
}

struct Page {
    roff: Roff,
    line: Vec<Inline>,
    /// The number of the next item, or none of a list without numbers.
    lists: Vec<Option<u64>>,
    state: State,
}

impl Page {
    fn take(&mut self, event: Event<'_>) {
        match event {
            Event::Start(Tag::Heading { level, .. }) => self.state.chapter = level == HeadingLevel::H2,
            Event::End(TagEnd::Heading(_)) => self.heading(),
            _ if self.state.left_out && !self.state.chapter => {}
            Event::Start(tag) => self.start(&tag),
            Event::End(tag) => self.end(tag),
            Event::Text(text) if self.state.code => {
                for line in text.lines() {
                    self.roff.text([roman(line)]);
                }
            }
            Event::Text(text) => self.inline(&text, false),
            Event::Code(text) => self.inline(&text, true),
            Event::SoftBreak | Event::HardBreak => self.inline(" ", false),
            _ => {}
        }
    }

    fn start(&mut self, tag: &Tag<'_>) {
        let roff = &mut self.roff;
        match tag {
            Tag::Paragraph if std::mem::take(&mut self.state.beside_mark) => {}
            Tag::Paragraph if self.lists.is_empty() => {
                roff.control("PP", []);
            }
            Tag::Paragraph => {
                roff.control("RS", [INDENT]).control("PP", []);
                self.state.indented = true;
            }
            Tag::CodeBlock(_) => {
                self.flush();
                self.roff.control("PP", []).control("RS", [INDENT]).control("nf", []);
                self.state.code = true;
            }
            Tag::List(first) => {
                self.flush();
                self.lists.push(*first);
            }
            Tag::Item => {
                let mark = match self.lists.last_mut() {
                    Some(Some(number)) => {
                        *number += 1;
                        format!("{}.", *number - 1)
                    }
                    _ => "-".to_owned(),
                };
                roff.control("IP", [mark.as_str(), INDENT]);
                self.state.beside_mark = true;
            }
            Tag::TableHead | Tag::TableRow => {
                self.state.cell = 0;
                roff.control("TP", []);
            }
            Tag::Strong => self.state.strong = true,
            Tag::Emphasis => self.state.emphasis = true,
            _ => {}
        }
    }

    fn end(&mut self, tag: TagEnd) {
        match tag {
            TagEnd::Paragraph | TagEnd::Item => {
                self.flush();
                self.state.beside_mark = false;
                if std::mem::take(&mut self.state.indented) {
                    self.roff.control("RE", []);
                }
            }
            TagEnd::CodeBlock => {
                self.state.code = false;
                self.roff.control("fi", []).control("RE", []);
            }
            TagEnd::List(_) => drop(self.lists.pop()),
            TagEnd::TableCell => {
                self.state.cell += 1;
                match self.state.cell {
                    // The tag of the paragraph that the others are.
                    1 => self.flush(),
                    _ => self.line.push(roman("; ")),
                }
            }
            TagEnd::TableHead | TagEnd::TableRow => {
                self.line.pop();
                self.flush();
            }
            TagEnd::Strong => self.state.strong = false,
            TagEnd::Emphasis => self.state.emphasis = false,
            _ => {}
        }
    }

    /// A heading has ended: which chapter is it?
    fn heading(&mut self) {
        let title: String = std::mem::take(&mut self.line)
            .into_iter()
            .map(|inline| match inline {
                Inline::Roman(text) | Inline::Italic(text) | Inline::Bold(text) => text,
                Inline::LineBreak => String::new(),
            })
            .collect();
        if std::mem::take(&mut self.state.chapter) {
            self.state.left_out = LEFT_OUT.contains(&title.as_str());
            if !self.state.left_out {
                self.roff.control("SH", [title.to_uppercase().as_str()]);
            }
        } else if !self.state.left_out {
            self.roff.control("SS", [title.as_str()]);
        }
    }

    fn inline(&mut self, text: &str, code: bool) {
        self.line.push(match &self.state {
            state if code || state.strong => bold(text),
            state if state.emphasis => italic(text),
            _ => roman(text),
        });
    }

    fn flush(&mut self) {
        if !self.line.is_empty() {
            self.roff.text(std::mem::take(&mut self.line));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_has_every_chapter_that_an_operator_needs_and_no_line_that_roff_would_take_for_a_request() {
        let page = page("Tether 0");
        for chapter in ["USE IT ON REAL HOSTS", "BACKUP AND RECOVERY", "WHO MAY DO WHAT", "METRICS", "LIMITS"]
        {
            assert!(
                page.contains(&format!(".SH \"{chapter}\"")) || page.contains(&format!(".SH {chapter}")),
                "{chapter}"
            );
        }
        assert!(!page.contains("TRY IT") && !page.contains("WORK ON TETHER"));
        for word in ["apt install", "tether pki init", "7440", "TETHER_REMOVE_IN_USE", "threshold_percent"] {
            assert!(page.contains(word) || page.contains(&word.replace('-', "\\-")), "{word}");
        }
        let known = ["TH", "SH", "SS", "PP", "IP", "TP", "RS", "RE", "nf", "fi", "ie", "el", "ds"];
        for line in page.lines().filter(|line| line.starts_with(['.', '\''])) {
            let request = line[1..].split(' ').next().unwrap_or_default();
            assert!(known.contains(&request), "{line}");
        }
    }
}
