//! What is in a volume: text and wire to domain type and back.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{ParseError, wire};

/// What is in a volume. Stored, and never guessed from the content (F4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VolumeFormat {
    /// The guest's bytes and nothing else.
    #[default]
    Raw,
    /// QEMU's copy-on-write format, version 3, without a backing file.
    Qcow2,
}

impl VolumeFormat {
    /// libvirt's and QEMU's word for it; also the file name's extension.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

impl fmt::Display for VolumeFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for VolumeFormat {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        match text {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            _ => Err(ParseError::new("format", "must be one of: raw qcow2", text)),
        }
    }
}

impl TryFrom<i32> for VolumeFormat {
    type Error = ParseError;
    /// From the wire; what is not said is raw.
    fn try_from(number: i32) -> Result<Self, ParseError> {
        match wire::VolumeFormat::try_from(number) {
            Ok(wire::VolumeFormat::Unspecified | wire::VolumeFormat::Raw) => Ok(Self::Raw),
            Ok(wire::VolumeFormat::Qcow2) => Ok(Self::Qcow2),
            Err(_) => Err(ParseError::new(
                "format",
                "must be VOLUME_FORMAT_RAW or VOLUME_FORMAT_QCOW2",
                &number.to_string(),
            )),
        }
    }
}

impl From<VolumeFormat> for wire::VolumeFormat {
    fn from(format: VolumeFormat) -> Self {
        match format {
            VolumeFormat::Raw => Self::Raw,
            VolumeFormat::Qcow2 => Self::Qcow2,
        }
    }
}
