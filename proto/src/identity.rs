//! What names a thing for ever: attachments, devices on the wire, disks in the guest.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::ParseError;

/// Names one attachment on the storage host and the compute host alike. A UUID that the controller makes anew for
/// each attachment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AttachmentId(Uuid);

impl AttachmentId {
    /// The id from a UUID; the nil UUID is refused.
    ///
    /// # Errors
    /// For the nil UUID.
    pub fn new(uuid: Uuid) -> Result<Self, ParseError> {
        if uuid.is_nil() {
            return Err(ParseError::new("attachment_id", "must not be the nil UUID", &uuid.to_string()));
        }
        Ok(Self(uuid))
    }
}

impl FromStr for AttachmentId {
    type Err = ParseError;
    /// Reads the hyphenated form in either case.
    fn from_str(text: &str) -> Result<Self, ParseError> {
        if text.is_empty() {
            return Err(ParseError::missing("attachment_id"));
        }
        let wrong = || ParseError::new("attachment_id", "must be a UUID with hyphens", text);
        if text.len() != 36 {
            return Err(wrong());
        }
        Self::new(Uuid::parse_str(text).map_err(|_| wrong())?)
    }
}

impl TryFrom<String> for AttachmentId {
    type Error = ParseError;
    fn try_from(text: String) -> Result<Self, ParseError> {
        text.parse()
    }
}

impl From<AttachmentId> for String {
    fn from(id: AttachmentId) -> String {
        id.to_string()
    }
}

impl fmt::Display for AttachmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

/// A NAA IEEE Registered Extended identifier (SPC-4 section 7.8.6.6.5): 16 bytes whose first digit is 6.
/// The kernel writes it `naa.6001405…` in sysfs, udev writes it `wwn-0x6001405…`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Wwn(u128);

impl FromStr for Wwn {
    type Err = ParseError;
    /// Reads 32 hexadecimal digits.
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let wrong = || ParseError::new("wwn", "must have 32 hexadecimal digits, the first a 6", text);
        if text.len() != 32 || !text.bytes().all(|b| b.is_ascii_hexdigit()) || !text.starts_with('6') {
            return Err(wrong());
        }
        u128::from_str_radix(text, 16).map(Self).map_err(|_| wrong())
    }
}

impl TryFrom<String> for Wwn {
    type Error = ParseError;
    fn try_from(text: String) -> Result<Self, ParseError> {
        text.parse()
    }
}

impl From<Wwn> for String {
    fn from(wwn: Wwn) -> String {
        wwn.to_string()
    }
}

impl fmt::Display for Wwn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// The serial that a guest sees: 1 to 20 of `a-z A-Z 0-9 _ . + -`. 20 is what virtio-blk holds
/// (VIRTIO 1.2 section 5.2.6.1, `VIRTIO_BLK_ID_BYTES`); more would be cut without a word.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Serial(String);

impl Serial {
    /// The serial as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Serial {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let legal = |b: u8| b.is_ascii_alphanumeric() || b"_.+-".contains(&b);
        if !(1..=20).contains(&text.len()) || !text.bytes().all(legal) {
            return Err(ParseError::new("serial", "must have 1 to 20 of a-z A-Z 0-9 _ . + -", text));
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for Serial {
    type Error = ParseError;
    fn try_from(text: String) -> Result<Self, ParseError> {
        text.parse()
    }
}

impl From<Serial> for String {
    fn from(serial: Serial) -> String {
        serial.0
    }
}

impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn attachment_ids_go_both_ways(bits in 1u128..) {
            let id = AttachmentId::new(Uuid::from_u128(bits)).unwrap();
            prop_assert_eq!(id.to_string().parse::<AttachmentId>().unwrap(), id);
            prop_assert_eq!(id.to_string().to_uppercase().parse::<AttachmentId>().unwrap(), id);
        }

        #[test]
        fn wwns_go_both_ways(text in "6[0-9a-f]{31}") {
            prop_assert_eq!(text.parse::<Wwn>().unwrap().to_string(), text);
        }

        #[test]
        fn serials_go_both_ways(text in "[a-zA-Z0-9_.+-]{1,20}") {
            prop_assert_eq!(text.parse::<Serial>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_no_identity_is_refused() {
        for bad in
            ["", "x", "00000000-0000-0000-0000-000000000000", "67e5504410b1426f9247bb680e5fe0c8", "../../etc"]
        {
            assert!(bad.parse::<AttachmentId>().is_err(), "{bad:?}");
        }
        for bad in [
            "",
            "naa.6001405",
            "5001405aaaaaaaaaaaaaaaaaaaaaaaaa",
            "6001405",
            "60014050000000000000000000000é0",
        ] {
            assert!(bad.parse::<Wwn>().is_err(), "{bad:?}");
        }
        for bad in ["", "123456789012345678901", "a b", "<serial>"] {
            assert!(bad.parse::<Serial>().is_err(), "{bad:?}");
        }
    }
}
