//! iSCSI qualified names (RFC 7143 section 4.2.7.2, characters as in RFC 3722), strict and in one spelling (F41).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::ParseError;

/// An iSCSI qualified name in lower case: `iqn.YYYY-MM.reversed.domain` or the same with `:` and more.
/// At most 223 bytes of `a-z 0-9 . : -`. Names of types `eui.` and `naa.` are not taken.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Iqn(String);

impl Iqn {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Iqn {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let name = text.to_ascii_lowercase();
        match problem(&name) {
            None => Ok(Self(name)),
            Some(problem) => Err(ParseError::new("iqn", problem, text)),
        }
    }
}

fn problem(name: &str) -> Option<&'static str> {
    let Some(rest) = name.strip_prefix("iqn.") else {
        return Some("must begin with \"iqn.\"");
    };
    if name.len() > 223 {
        return Some("must have at most 223 bytes (RFC 7143)");
    }
    if !name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || ".:-".contains(c)) {
        return Some("may hold only a-z 0-9 . : - (RFC 3722)");
    }
    let (date, authority) = rest.split_once('.').unwrap_or((rest, ""));
    let date_is_right = date.len() == 7
        && date.split_once('-').is_some_and(|(year, month)| {
            year.len() == 4
                && year.bytes().all(|b| b.is_ascii_digit())
                && month.parse::<u8>().is_ok_and(|m| (1..=12).contains(&m))
        });
    if !date_is_right {
        return Some("must have a date YYYY-MM after \"iqn.\"");
    }
    let (authority, unique) = match authority.split_once(':') {
        Some((authority, unique)) => (authority, Some(unique)),
        None => (authority, None),
    };
    if authority.is_empty() || authority.split('.').any(|label| label.is_empty() || label.starts_with('-')) {
        return Some("must have a reversed domain name after the date");
    }
    // A ".." could not climb out of a folder here, for '/' is not legal, but "iqn....:.." names nothing either.
    if unique.is_some_and(|unique| unique.is_empty() || unique == "." || unique == "..") {
        return Some("must have something after the ':'");
    }
    None
}

impl TryFrom<String> for Iqn {
    type Error = ParseError;
    fn try_from(text: String) -> Result<Self, ParseError> {
        text.parse()
    }
}

impl From<Iqn> for String {
    fn from(name: Iqn) -> String {
        name.0
    }
}

impl fmt::Display for Iqn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn f41_real_names_are_taken_and_case_does_not_matter() {
        for good in [
            "iqn.1993-08.org.debian:01:abc123",
            "iqn.2003-01.org.linux-iscsi.host.x8664:sn.1234",
            "iqn.2026-11.io.example",
        ] {
            assert_eq!(good.parse::<Iqn>().unwrap().as_str(), good);
        }
        assert_eq!(
            "IQN.1993-08.Org.Debian:ABC".parse::<Iqn>().unwrap().as_str(),
            "iqn.1993-08.org.debian:abc"
        );
    }

    #[test]
    fn f41_what_is_no_iqn_is_refused() {
        for bad in [
            "",
            "iqn",
            "iqn.",
            "eui.02004567A425678D",
            "iqn.1993.org.debian:x",
            "iqn.1993-13.org.debian:x",
            "iqn.1993-08.:x",
            "iqn.1993-08.org.debian:",
            "iqn.1993-08.org.debian:a b",
            "iqn.1993-08.org.debian:a/b",
            "iqn.1993-08.org.debian:a_b",
            "iqn.1993-08.org..debian:x",
            "iqn.1993-08.org.debian:..",
            "iqn.+993-08.org:x",
        ] {
            assert!(bad.parse::<Iqn>().is_err(), "{bad:?}");
        }
        assert!(format!("iqn.1993-08.org.debian:{}", "x".repeat(200)).parse::<Iqn>().is_ok());
        assert!(format!("iqn.1993-08.org.debian:{}", "x".repeat(201)).parse::<Iqn>().is_err());
    }

    proptest! {
        #[test]
        fn parsing_is_stable_and_yields_a_safe_path_component(text in "(?i)iqn\\.[0-9]{4}-[01][0-9]\\.[a-z.:/-]{0,40}") {
            if let Ok(name) = text.parse::<Iqn>() {
                prop_assert_eq!(name.as_str().parse::<Iqn>().unwrap(), name.clone());
                prop_assert!(!name.as_str().contains('/'));
            }
        }
    }
}
