//! What the journal holds of an export: how a record is made, and whether a later call may go on with it. Not here:
//! what is done with it (`export`).

use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use tether_agent_core::failure::{Failure, Reason};
use tether_proto::{AccessMode, AttachmentId, ConnectionInfo, Connector, Transport, VolumeKey};

use crate::identity::VolumeIdentity;

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
    /// The device node or file that is exported.
    pub(crate) device: String,
    /// The SCSI unit serial, which a file has too: it stands for the volume's permanent id.
    pub(crate) unit_serial: String,
    /// The one that may reach it.
    pub(crate) connector: Connector,
    /// The answer to Export, with the secret.
    pub(crate) connection: ConnectionInfo,
    /// With whom the file's directory is shared; nothing for a target.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) share: Option<Clients>,
}

/// With whom a directory is shared, and who they are there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Clients {
    /// The connector's addresses, each with a line of its own.
    pub(crate) addresses: Vec<IpAddr>,
    /// The owner of the pool's files, whom every client is.
    pub(crate) owner_uid: u32,
    /// Their group.
    pub(crate) owner_gid: u32,
}

impl ExportRecord {
    /// The record of a new export.
    pub(crate) fn new(id: AttachmentId, export: Export) -> Self {
        Self { id, phase: Phase::Exporting, export: Some(export) }
    }

    /// What is left when an export has ended: the id, which is spent.
    pub(crate) fn ended(id: AttachmentId) -> Self {
        Self { id, phase: Phase::Ended, export: None }
    }

    /// May this call go on with what is recorded under its id?
    pub(crate) fn check_retry(
        &self,
        volume: &VolumeKey,
        connector: &Connector,
        access_mode: AccessMode,
    ) -> Result<(), Failure> {
        let ended = || {
            Failure::new(
                Reason::AttachmentEnded,
                format!("attachment {} was unexported; its id is spent", self.id),
            )
            .at("validate")
        };
        match (self.phase, &self.export) {
            (Phase::Ended, _) | (_, None) => Err(ended()),
            (Phase::Unexporting, _) => Err(ended().next("finish with Unexport, then export under a new id")),
            (Phase::Exporting | Phase::Exported, Some(export)) => {
                match export.difference(volume, connector, access_mode) {
                    None => Ok(()),
                    Some(difference) => Err(Failure::new(
                        Reason::DifferentParameters,
                        format!("attachment {} is exported with other parameters: {difference}", self.id),
                    )
                    .at("validate")),
                }
            }
        }
    }
}

impl Export {
    /// Where the volume is: what claims go by (`Pool::place`).
    pub(crate) fn place(&self) -> String {
        match &self.connection.transport {
            Transport::Iscsi(_) => self.device.strip_prefix("/dev/").unwrap_or(&self.device).to_owned(),
            Transport::Nfs(nfs) => format!("{}/{}", nfs.path, self.volume.volume),
        }
    }

    /// The file that is exported; nothing for a target.
    pub(crate) fn file(&self) -> Option<PathBuf> {
        match &self.connection.transport {
            Transport::Iscsi(_) => None,
            Transport::Nfs(nfs) => Some(PathBuf::from(nfs.path.as_str()).join(nfs.file.as_str())),
        }
    }

    /// With whom the file's directory is shared.
    pub(crate) fn client_addresses(&self) -> &[IpAddr] {
        self.share.as_ref().map_or(&[], |clients| &clients.addresses)
    }

    /// Is the volume of that name still the one that was exported? One that was deleted and made again under the same
    /// name is not.
    pub(crate) fn check_identity(&self, id: AttachmentId, identity: &VolumeIdentity) -> Result<(), Failure> {
        if self.unit_serial == identity.unit_serial() {
            return Ok(());
        }
        Err(Failure::new(
            Reason::WrongDevice,
            format!("volume {} is another one than attachment {id} was exported with", self.volume),
        ))
    }

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

#[cfg(test)]
mod tests {
    use super::*;

    /// As agents wrote it that knew iSCSI alone.
    #[test]
    fn an_older_record_is_still_read_and_claims_the_same_place() {
        let text = r#"{"id":"11111111-1111-4111-8111-111111111111","phase":"exported","export":{
            "volume":{"pool":"thick","volume":"a"},"device":"/dev/vg0/a","unit_serial":"0123",
            "connector":{"hostname":"c","initiator_iqn":"iqn.2026-11.io.example:c","addresses":[],"versions":{}},
            "connection":{"iscsi":{"target_iqn":"iqn.2026-11.io.example:x","portals":["10.0.0.1:3260"],
            "target_portal_group_tag":1,"chap_username":"u","chap_secret":"secret-secret",
            "wwn":"60014050000000000000000000000001"},"size":4096,"access_mode":"read-write","serial":"s"}}}"#;
        let record: ExportRecord = serde_json::from_str(text).unwrap();
        let export = record.export.unwrap();
        assert_eq!((export.place().as_str(), export.file()), ("vg0/a", None));
        assert!(export.client_addresses().is_empty());
    }
}
