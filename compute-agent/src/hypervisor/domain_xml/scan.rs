//! Reads a whole XML document into a small tree that knows where in the input each element stands, and refuses what is
//! not one well-formed document. Knows nothing about domains.

use std::ops::Range;

use quick_xml::escape::resolve_xml_entity;
use quick_xml::events::{BytesRef, BytesStart, Event};
use quick_xml::reader::Reader;
use quick_xml::{Error, XmlVersion};

use super::DomainXmlError;

/// libxml2, and so libvirt, reads no deeper either. It also bounds the recursion when a tree is dropped.
const DEEPEST: usize = 256;

/// What XML calls white space. Rust calls more so.
pub(super) const WHITE_SPACE: [char; 4] = [' ', '\t', '\r', '\n'];

/// One element, what is in it, and where it stands.
#[derive(Debug)]
pub(super) struct Element {
    /// The name as written, with its prefix.
    pub(super) name: String,
    /// Names as written, values with references resolved.
    pub(super) attributes: Vec<(String, String)>,
    /// The text directly in the element, references resolved.
    pub(super) text: String,
    /// The elements directly in it.
    pub(super) children: Vec<Element>,
    /// The bytes of the input from `<` to the last `>`.
    pub(super) range: Range<usize>,
    /// Where `</name>` begins; `None` for `<name/>`.
    pub(super) end_tag: Option<usize>,
}

impl Element {
    /// The value of an attribute.
    pub(super) fn attribute(&self, name: &str) -> Option<&str> {
        self.attributes.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// The elements of one name directly in this one.
    pub(super) fn children<'a>(&'a self, name: &'a str) -> impl DoubleEndedIterator<Item = &'a Element> {
        self.children.iter().filter(move |child| child.name == name)
    }

    /// The first of them.
    pub(super) fn child(&self, name: &str) -> Option<&Element> {
        self.children.iter().find(|child| child.name == name)
    }

    /// An attribute of a child.
    pub(super) fn child_attribute(&self, child: &str, attribute: &str) -> Option<&str> {
        self.child(child)?.attribute(attribute)
    }
}

/// Reads a document whose outermost element has this name.
pub(super) fn document(xml: &str, wanted: &'static str) -> Result<Element, DomainXmlError> {
    let root = Scan { xml, open: Vec::new(), root: None }.run()?;
    if root.name != wanted {
        return Err(DomainXmlError::WrongRoot { wanted, found: root.name });
    }
    Ok(root)
}

struct Scan<'a> {
    xml: &'a str,
    open: Vec<Element>,
    root: Option<Element>,
}

impl Scan<'_> {
    fn run(mut self) -> Result<Element, DomainXmlError> {
        // The reader would skip it without counting it, and every offset would be wrong.
        if self.xml.starts_with('\u{feff}') {
            return Err(self.malformed(0, "it begins with a byte order mark"));
        }
        let mut reader = Reader::from_str(self.xml);
        reader.config_mut().enable_all_checks(true);
        loop {
            let start = offset(reader.buffer_position());
            let event =
                reader.read_event().map_err(|error| self.syntax(offset(reader.error_position()), error))?;
            let end = offset(reader.buffer_position());
            match event {
                Event::Start(tag) => {
                    let element = self.element(&tag, start..end)?;
                    if self.open.len() == DEEPEST {
                        return Err(self.malformed(start, "elements are nested deeper than 256"));
                    }
                    self.open.push(element);
                }
                Event::Empty(tag) => {
                    let element = self.element(&tag, start..end)?;
                    self.close(element)?;
                }
                Event::End(_) => {
                    let Some(mut element) = self.open.pop() else {
                        return Err(self.malformed(start, "an element ends that never began"));
                    };
                    element.range.end = end;
                    element.end_tag = Some(start);
                    self.close(element)?;
                }
                Event::Text(text) => self.text(&text.xml10_content(), start)?,
                Event::CData(_) if self.open.is_empty() => return Err(self.outside(start)),
                Event::CData(text) => self.text(&text.xml10_content(), start)?,
                Event::GeneralRef(_) if self.open.is_empty() => return Err(self.outside(start)),
                Event::GeneralRef(reference) => {
                    let text = self.resolve(&reference, start)?;
                    self.text(&text, start)?;
                }
                Event::Decl(_) if start == 0 => {}
                Event::Decl(_) => {
                    return Err(self.malformed(start, "an XML declaration is not at the beginning"));
                }
                Event::DocType(_) => return Err(self.malformed(start, "a DOCTYPE is not allowed")),
                Event::Comment(_) | Event::PI(_) => {}
                Event::Eof => break,
            }
        }
        if let Some(element) = self.open.last() {
            return Err(self.malformed(element.range.start, "an element begins here and never ends"));
        }
        match self.root.take() {
            Some(root) => Ok(root),
            None => Err(self.malformed(0, "it has no element at all")),
        }
    }

    fn element(&self, tag: &BytesStart<'_>, range: Range<usize>) -> Result<Element, DomainXmlError> {
        let name = tag.name().as_ref().to_owned();
        if !self.xml.get(range.clone()).is_some_and(|text| text.starts_with('<')) {
            return Err(self.malformed(range.start, "the reader lost its place"));
        }
        if !name.starts_with(|first: char| first.is_alphabetic() || first == '_' || first == ':') {
            return Err(self.malformed(range.start, "an element has no proper name"));
        }
        let mut attributes = Vec::new();
        for attribute in tag.attributes() {
            let attribute = attribute.map_err(|error| self.syntax(range.start, error.into()))?;
            let value = attribute
                .normalized_value(XmlVersion::Implicit1_0)
                .map_err(|error| self.syntax(range.start, error))?;
            attributes.push((attribute.key.as_ref().to_owned(), value.into_owned()));
        }
        Ok(Element { name, attributes, text: String::new(), children: Vec::new(), range, end_tag: None })
    }

    fn close(&mut self, element: Element) -> Result<(), DomainXmlError> {
        if let Some(parent) = self.open.last_mut() {
            parent.children.push(element);
        } else if self.root.is_some() {
            return Err(self.malformed(element.range.start, "a second document follows the first"));
        } else {
            self.root = Some(element);
        }
        Ok(())
    }

    fn text(&mut self, text: &str, start: usize) -> Result<(), DomainXmlError> {
        match self.open.last_mut() {
            Some(element) => element.text.push_str(text),
            None if text.chars().all(|c| WHITE_SPACE.contains(&c)) => {}
            None => return Err(self.outside(start)),
        }
        Ok(())
    }

    fn resolve(&self, reference: &BytesRef<'_>, start: usize) -> Result<String, DomainXmlError> {
        let character = reference.resolve_char_ref().map_err(|error| self.syntax(start, error))?;
        match character {
            Some(character) => Ok(character.to_string()),
            None => match resolve_xml_entity(reference) {
                Some(text) => Ok(text.to_owned()),
                None => Err(self.malformed(start, "an entity that XML does not know is used")),
            },
        }
    }

    fn outside(&self, start: usize) -> DomainXmlError {
        self.malformed(start, "there is text outside of the outermost element")
    }

    fn malformed(&self, at: usize, problem: &'static str) -> DomainXmlError {
        DomainXmlError::Malformed { line: self.line(at), problem }
    }

    fn syntax(&self, at: usize, source: Error) -> DomainXmlError {
        DomainXmlError::Syntax { line: self.line(at), source }
    }

    fn line(&self, at: usize) -> usize {
        self.xml.bytes().take(at).filter(|byte| *byte == b'\n').count() + 1
    }
}

/// The reader counts in `u64`; the input is in memory, so its length fits.
fn offset(position: u64) -> usize {
    usize::try_from(position).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_know_where_they_stand() {
        let xml =
            "<?xml version='1.0'?>\n<!-- æ --><a b='1 &amp; 2'>é<c/>&lt;<![CDATA[<x>]]><d\n>t</d ></a>\n";
        let root = document(xml, "a").unwrap();
        assert_eq!(root.attribute("b"), Some("1 & 2"));
        assert_eq!(root.text, "é<<x>");
        assert_eq!(&xml[root.child("c").unwrap().range.clone()], "<c/>");
        let d = root.child("d").unwrap();
        assert_eq!(&xml[d.range.clone()], "<d\n>t</d >");
        assert_eq!(&xml[d.end_tag.unwrap()..d.range.end], "</d >");
        assert!(xml[root.range.clone()].ends_with("</a>"));
    }

    #[test]
    fn what_is_not_one_document_is_refused() {
        let deep = "<a>".repeat(300) + &"</a>".repeat(300);
        for bad in [
            "",
            " \n",
            "x",
            "<a>",
            "<a><b></a></b>",
            "<a><b></a>",
            "</a>",
            "<a/><a/>",
            "<a/>x",
            "x<a/>",
            "<a/>&amp;",
            "<a/><![CDATA[x]]>",
            "<a",
            "<a b>",
            "<a b=c/>",
            "<a b='1' b='2'/>",
            "<a>&nbsp;</a>",
            "<a b='&nbsp;'/>",
            "<a>&amp</a>",
            "<a><></></a>",
            "<a><1/></a>",
            "<a/><?xml version='1.0'?>",
            "\u{feff}<a/>",
            "<a><!-- </a>",
            "<!DOCTYPE a><a/>",
            "<!DOCTYPE a [<!ENTITY x 'y'>]><a>&x;</a>",
            "<a><!DOCTYPE a></a>",
            "<a>&#0;</a>",
            &deep,
        ] {
            let error = document(bad, "a").expect_err(bad);
            assert!(
                matches!(error, DomainXmlError::Syntax { .. } | DomainXmlError::Malformed { .. }),
                "{bad:?}: {error}"
            );
        }
        assert!(
            matches!(document("<b/>", "a"), Err(DomainXmlError::WrongRoot { wanted: "a", found }) if found == "b")
        );
    }

    #[test]
    fn errors_tell_the_line() {
        assert!(matches!(document("<a>\n<b>\n</a>", "a"), Err(DomainXmlError::Syntax { line: 3, .. })));
        assert!(matches!(document("<a>\n <b>\n", "a"), Err(DomainXmlError::Malformed { line: 2, .. })));
    }
}
