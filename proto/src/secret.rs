//! A secret that cannot be printed by accident (rule 11, F44).

use std::fmt;

use crate::ParseError;

/// A CHAP secret. It has no `Display`, its `Debug` says nothing of it, and it is not serialised unless a field asks
/// for [`exposed`].
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Takes a secret: 12 to 128 printable ASCII characters without spaces, quotes, `#` or backslashes, which would
    /// not survive open-iscsi's record file. 12 is the least that RFC 7143 section 12.1.3 allows without IPsec.
    ///
    /// # Errors
    /// When it is something else. The error does not show it.
    pub fn new(text: impl Into<String>) -> Result<Self, ParseError> {
        let text = text.into();
        let legal = |b: u8| b.is_ascii_graphic() && !b"\"'`#\\".contains(&b);
        if !(12..=128).contains(&text.len()) || !text.bytes().all(legal) {
            return Err(ParseError {
                field: "chap_secret",
                problem:
                    "must have 12 to 128 printable ASCII characters without spaces, quotes, # and backslashes"
                        .into(),
                value: "something else (not shown)".into(),
            });
        }
        Ok(Self(text))
    }

    /// The secret itself. Only for the kernel, a 0600 file, or the wire.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(not shown)")
    }
}

/// Serialises a [`Secret`] as it is: `#[serde(with = "tether_proto::exposed")]`, for journal files with mode 0600.
pub mod exposed {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    use super::Secret;

    /// Writes the secret.
    ///
    /// # Errors
    /// The serializer's.
    pub fn serialize<S: Serializer>(secret: &Secret, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(secret.expose())
    }

    /// Reads a secret.
    ///
    /// # Errors
    /// The deserializer's, or that it is no legal secret.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Secret, D::Error> {
        Secret::new(String::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn f44_neither_debug_nor_an_error_shows_a_secret(text in "[!-~]{8,140}") {
            match Secret::new(text.clone()) {
                Ok(secret) => {
                    prop_assert_eq!(secret.expose(), &text);
                    let shown = format!("{secret:?}");
                    prop_assert!(!shown.contains(&text));
                }
                Err(error) => {
                    let shown = format!("{error} {error:?}");
                    prop_assert!(!shown.contains(&text));
                }
            }
        }
    }

    #[test]
    fn what_a_record_file_would_break_is_refused() {
        for bad in
            ["short", "has a space in it", "has\na newline in it", "has#a#hash#in#it", &"x".repeat(129)]
        {
            assert!(Secret::new(bad).is_err(), "{bad:?}");
        }
    }
}
