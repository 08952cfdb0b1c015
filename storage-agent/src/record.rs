//! What the journal holds of an export.

use serde::{Deserialize, Serialize};
use tether_proto::{AccessMode, AttachmentId, ConnectionInfo, Connector, VolumeKey};

/// Where an export is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Phase {
    /// Side effects may have begun.
    Exporting,
    /// All is in place and was read back.
    Exported,
    /// Removal may have begun.
    Unexporting,
    /// Gone, and the id is spent (rule 3).
    Ended,
}

impl Phase {
    /// The word on the wire.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Exporting => "exporting",
            Self::Exported => "exported",
            Self::Unexporting => "unexporting",
            Self::Ended => "ended",
        }
    }
}

/// An export, or what is left of one.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ExportRecord {
    /// The attachment.
    pub(crate) id: AttachmentId,
    /// Where it is in its life.
    pub(crate) phase: Phase,
    /// What was exported; nothing when the id was ended before it was ever used.
    pub(crate) export: Option<Export>,
}

/// What is exported to whom.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Export {
    /// The volume.
    pub(crate) volume: VolumeKey,
    /// The device node that is exported.
    pub(crate) device: String,
    /// The SCSI unit serial.
    pub(crate) unit_serial: String,
    /// The one that may log in.
    pub(crate) connector: Connector,
    /// The answer to Export, with the secret.
    pub(crate) connection: ConnectionInfo,
}

impl Export {
    /// Says which parameter of a repeated call is not the first call's.
    pub(crate) fn difference(
        &self,
        volume: &VolumeKey,
        connector: &Connector,
        access_mode: AccessMode,
    ) -> Option<String> {
        if self.volume != *volume {
            return Some(format!("volume is {} and not {volume}", self.volume));
        }
        if self.connector.initiator_iqn != connector.initiator_iqn {
            return Some(format!(
                "connector's initiator is {} and not {}",
                self.connector.initiator_iqn, connector.initiator_iqn
            ));
        }
        if self.connector.hostname != connector.hostname {
            return Some(format!(
                "connector's host is {} and not {}",
                self.connector.hostname, connector.hostname
            ));
        }
        if self.connection.access_mode != access_mode {
            return Some("access mode is another".to_owned());
        }
        None
    }
}
