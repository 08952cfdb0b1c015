//! Names that come from outside: pools, volumes, domains. What is legal here is safe as a path component, as an
//! argument and in XML. Not here: names that a back end reserves for itself (the LVM adapter knows LVM's).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{ParseError, wire};

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $check:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = ParseError;
            fn from_str(text: &str) -> Result<Self, ParseError> {
                $check(text)?;
                Ok(Self(text.to_owned()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = ParseError;
            fn try_from(text: String) -> Result<Self, ParseError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name_type!(
    /// A pool's name: 1 to 63 of `a-z A-Z 0-9 _ . + -`, beginning with a letter or digit.
    PoolName,
    |text: &str| check("pool", text, 63, |first| first.is_ascii_alphanumeric())
);

name_type!(
    /// A volume's name: 1 to 100 of `a-z A-Z 0-9 _ . + -` (what lvm(8) allows), beginning with a letter, digit or `_`.
    VolumeName,
    |text: &str| check("volume", text, 100, |first| first.is_ascii_alphanumeric() || first == '_')
);

name_type!(
    /// A libvirt domain's name or UUID as the caller gave it: 1 to 255 bytes, no `/` and no control characters
    /// (what libvirt itself refuses). It goes to libvirt's lookup and nowhere else.
    DomainName,
    |text: &str| {
        let problem = if text.is_empty() || text.len() > 255 {
            "must have 1 to 255 bytes"
        } else if text.contains('/') {
            "must not contain '/'"
        } else if text.chars().any(char::is_control) {
            "must not contain control characters"
        } else {
            return Ok(());
        };
        Err(ParseError::new("domain", problem, text))
    }
);

fn check(
    field: &'static str,
    text: &str,
    most: usize,
    first: impl Fn(char) -> bool,
) -> Result<(), ParseError> {
    let Some(begin) = text.chars().next() else {
        return Err(ParseError::missing(field));
    };
    let legal = |c: char| c.is_ascii_alphanumeric() || "_.+-".contains(c);
    let problem = if text.chars().count() > most {
        format!("must have 1 to {most} characters")
    } else if !text.chars().all(legal) {
        "may hold only a-z A-Z 0-9 _ . + -".to_owned()
    } else if !first(begin) {
        "must begin with a letter or digit".to_owned()
    } else {
        return Ok(());
    };
    Err(ParseError::new(field, problem, text))
}

/// A volume and its pool; together they are unique on a storage host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct VolumeKey {
    /// The pool.
    pub pool: PoolName,
    /// The volume in it.
    pub volume: VolumeName,
}

impl fmt::Display for VolumeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.pool, self.volume)
    }
}

impl FromStr for VolumeKey {
    type Err = ParseError;
    /// Reads `POOL/VOLUME`.
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let (pool, volume) = text
            .split_once('/')
            .ok_or_else(|| ParseError::new("volume", "must be written POOL/VOLUME", text))?;
        Ok(Self { pool: pool.parse()?, volume: volume.parse()? })
    }
}

impl TryFrom<&wire::VolumeKey> for VolumeKey {
    type Error = ParseError;
    fn try_from(key: &wire::VolumeKey) -> Result<Self, ParseError> {
        Ok(Self { pool: key.pool.parse()?, volume: key.volume.parse()? })
    }
}

impl From<&VolumeKey> for wire::VolumeKey {
    fn from(key: &VolumeKey) -> Self {
        Self { pool: key.pool.to_string(), volume: key.volume.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_that_would_be_paths_arguments_or_worse_are_refused() {
        for bad in ["", ".", "..", "../x", "a/b", "-rf", "a b", "a\nb", "a\0b", "ü", &"x".repeat(300)] {
            assert!(bad.parse::<PoolName>().is_err(), "{bad:?}");
            assert!(bad.parse::<VolumeName>().is_err(), "{bad:?}");
        }
        for bad in ["", "a/b", "a\nb", "a\u{7f}", &"x".repeat(300)] {
            assert!(bad.parse::<DomainName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_refused_name_is_shown_short_and_escaped() {
        let error = format!("{}\n", "x".repeat(300)).parse::<VolumeName>().unwrap_err().to_string();
        assert!(error.len() < 200 && error.contains("301 characters"), "{error}");
        let error = "a\x1b[31m".parse::<VolumeName>().unwrap_err().to_string();
        assert!(!error.contains('\x1b'), "{error}");
    }

    proptest! {
        #[test]
        fn whatever_parses_is_one_path_component_and_comes_back(text in ".{0,120}") {
            if let Ok(name) = text.parse::<VolumeName>() {
                prop_assert_eq!(name.as_str(), &text);
                prop_assert_eq!(std::path::Path::new(&text).components().count(), 1);
                prop_assert!(!text.starts_with('-') && text != "." && text != "..");
            }
        }

        #[test]
        fn volume_keys_go_both_ways(pool in "[a-zA-Z0-9][a-zA-Z0-9_.+-]{0,62}", volume in "[a-zA-Z0-9_][a-zA-Z0-9_.+-]{0,99}") {
            let key: VolumeKey = format!("{pool}/{volume}").parse().unwrap();
            prop_assert_eq!(&VolumeKey::try_from(&wire::VolumeKey::from(&key)).unwrap(), &key);
            prop_assert_eq!(key.to_string().parse::<VolumeKey>().unwrap(), key);
        }
    }
}
