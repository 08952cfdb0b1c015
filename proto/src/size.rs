//! Sizes: bytes inside, and as people write and read them outside.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::ParseError;

/// A size in bytes, never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct ByteSize(u64);

/// `(suffix in lower case, bytes)`. A single letter is a power of 1024, as in the LVM and QEMU tools.
const UNITS: [(&str, u64); 15] = [
    ("", 1),
    ("b", 1),
    ("k", 1 << 10),
    ("kib", 1 << 10),
    ("kb", 1000),
    ("m", 1 << 20),
    ("mib", 1 << 20),
    ("mb", 1_000_000),
    ("g", 1 << 30),
    ("gib", 1 << 30),
    ("gb", 1_000_000_000),
    ("t", 1 << 40),
    ("tib", 1 << 40),
    ("tb", 1_000_000_000_000),
    ("pib", 1 << 50),
];

impl ByteSize {
    /// The number of bytes.
    pub fn bytes(self) -> u64 {
        self.0
    }

    /// The smallest multiple of `unit` bytes that is not smaller; `None` when that is over 2^64.
    pub fn round_up(self, unit: u64) -> Option<Self> {
        self.0.checked_next_multiple_of(unit).map(Self)
    }
}

impl TryFrom<u64> for ByteSize {
    type Error = ParseError;
    fn try_from(bytes: u64) -> Result<Self, ParseError> {
        if bytes == 0 {
            return Err(ParseError::new("size_bytes", "must be more than 0", "0"));
        }
        Ok(Self(bytes))
    }
}

impl From<ByteSize> for u64 {
    fn from(size: ByteSize) -> u64 {
        size.0
    }
}

impl FromStr for ByteSize {
    type Err = ParseError;

    /// Reads `10G`, `10GiB` (both 10 x 2^30), `10GB` (10 x 10^9), `1.5TiB`, `4194304`.
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let refuse = |problem: &str| ParseError::new("size", problem, text);
        let wrong = || refuse("must be a number with a unit, as in 10G, 10GiB, 500MB or 4194304");
        let trimmed = text.trim();
        let split = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
        let (number, suffix) = trimmed.split_at(split);
        if number.is_empty() {
            return Err(if trimmed.starts_with('-') { refuse("must be more than 0") } else { wrong() });
        }
        let suffix = suffix.trim_start().to_ascii_lowercase();
        let (_, unit) = UNITS.iter().find(|(name, _)| *name == suffix).ok_or_else(wrong)?;
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if fraction.contains('.') || fraction.len() > 9 || whole.is_empty() || number.ends_with('.') {
            return Err(wrong());
        }
        let whole: u128 = whole.parse().map_err(|_| refuse("is too large"))?;
        let scale = 10u128.pow(u32::try_from(fraction.len()).map_err(|_| wrong())?);
        let fraction: u128 = if fraction.is_empty() { 0 } else { fraction.parse().map_err(|_| wrong())? };
        let unit = u128::from(*unit);
        let bytes = whole
            .checked_mul(unit)
            .and_then(|bytes| bytes.checked_add(fraction * unit / scale))
            .and_then(|bytes| u64::try_from(bytes).ok())
            .ok_or_else(|| refuse("is too large"))?;
        Self::try_from(bytes).map_err(|_| refuse("must be more than 0"))
    }
}

impl fmt::Display for ByteSize {
    /// `1.5 GiB`, `512 MiB`, `700 B`: at most two decimals, cut and not rounded.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, name) in [(50, "PiB"), (40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
            let unit = 1u64 << shift;
            if self.0 >= unit {
                let hundredths = (u128::from(self.0) * 100) >> shift;
                let (whole, rest) = (hundredths / 100, hundredths % 100);
                return match rest {
                    0 => write!(f, "{whole} {name}"),
                    rest if rest % 10 == 0 => write!(f, "{whole}.{} {name}", rest / 10),
                    rest => write!(f, "{whole}.{rest:02} {name}"),
                };
            }
        }
        write!(f, "{} B", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_as_people_write_them() {
        for (text, bytes) in [
            ("10G", 10 << 30),
            ("10GiB", 10 << 30),
            ("10gib", 10 << 30),
            ("10 GiB", 10 << 30),
            ("10GB", 10_000_000_000),
            ("1.5T", 3 << 39),
            ("512M", 512 << 20),
            ("4194304", 4_194_304),
            ("0.5k", 512),
        ] {
            assert_eq!(text.parse::<ByteSize>().unwrap().bytes(), bytes, "{text}");
        }
    }

    #[test]
    fn sizes_that_are_none_are_refused() {
        for bad in [
            "",
            "0",
            "0G",
            "-1G",
            "G",
            "1X",
            "1..5G",
            "1.G",
            ".5G",
            "1,5G",
            "99999999999T",
            "1e9",
            "10GiBs",
            "0.1",
        ] {
            assert!(bad.parse::<ByteSize>().is_err(), "{bad:?}");
        }
        assert!(ByteSize::try_from(0).is_err());
    }

    proptest! {
        #[test]
        fn plain_bytes_go_both_ways(bytes in 1u64..) {
            prop_assert_eq!(bytes.to_string().parse::<ByteSize>().unwrap().bytes(), bytes);
        }

        #[test]
        fn what_is_shown_is_never_more_than_what_is_there(bytes in 1u64..(1 << 55)) {
            let size = ByteSize(bytes);
            let shown = size.to_string().parse::<ByteSize>().unwrap().bytes();
            prop_assert!(shown <= bytes && bytes - shown <= bytes / 50);
        }

        #[test]
        fn nothing_panics(text in ".{0,30}") {
            let _unused = text.parse::<ByteSize>();
        }
    }
}
