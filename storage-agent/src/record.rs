//! What the journal holds of an export: how a record is made, and whether a later call may go on with it. Not here:
//! what is done with it (`export`).

use std::collections::HashSet;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use tether_agent_core::failure::{Failure, Reason};
use tether_proto::{
    AccessMode, AttachmentId, ConnectionInfo, Connector, IscsiConnection, Portal, Secret, VolumeKey,
};

use crate::config::Iscsi;
use crate::identity::VolumeIdentity;
use crate::target::lio::{PORTAL_GROUP_TAG, Target};
use crate::volume;

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

impl ExportRecord {
    /// The record of a new export, with a new secret.
    pub(crate) fn new(
        id: AttachmentId,
        iscsi: &Iscsi,
        device: String,
        volume: &VolumeKey,
        identity: &VolumeIdentity,
        connector: Connector,
        access_mode: AccessMode,
    ) -> Result<Self, Failure> {
        let connection = ConnectionInfo {
            iscsi: IscsiConnection {
                target_iqn: format!("{}:{id}", iscsi.iqn_prefix).parse()?,
                portals: portals_here(&iscsi.portals)?,
                target_portal_group_tag: PORTAL_GROUP_TAG,
                chap_username: format!("tether-{id}"),
                chap_secret: random_secret()?,
                wwn: identity.wwn(),
            },
            size: identity.size,
            access_mode,
            serial: identity.serial(),
        };
        let unit_serial = identity.unit_serial();
        let export = Export { volume: volume.clone(), device, unit_serial, connector, connection };
        Ok(Self { id, phase: Phase::Exporting, export: Some(export) })
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
    /// Where the volume is, `VG/LV`: what claims go by.
    pub(crate) fn place(&self) -> &str {
        self.device.strip_prefix("/dev/").unwrap_or(&self.device)
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

    /// What the kernel's target is to be.
    pub(crate) fn target(&self, id: AttachmentId) -> Target {
        let iscsi = &self.connection.iscsi;
        Target {
            id,
            iqn: iscsi.target_iqn.clone(),
            device: self.device.clone(),
            unit_serial: self.unit_serial.clone(),
            initiator: self.connector.initiator_iqn.clone(),
            chap_username: iscsi.chap_username.clone(),
            chap_secret: iscsi.chap_secret.clone(),
            portals: iscsi.portals.clone(),
            access_mode: self.connection.access_mode,
            discard: volume::takes_discards(&self.device),
        }
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

/// Those portals whose address this host has now. LIO binds to any address (IP_FREEBIND), so it would not say that
/// nobody can reach the others.
fn portals_here(portals: &[Portal]) -> Result<Vec<Portal>, Failure> {
    let addresses: HashSet<IpAddr> = nix::ifaddrs::getifaddrs()
        .map_err(|error| {
            Failure::new(Reason::Internal, format!("this host's addresses cannot be read: {error}"))
        })?
        .filter_map(|interface| {
            let address = interface.address?;
            let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
            v4.or_else(|| Some(IpAddr::V6(address.as_sockaddr_in6()?.ip())))
        })
        .collect();
    let (here, elsewhere): (Vec<Portal>, Vec<Portal>) =
        portals.iter().partition(|portal| addresses.contains(&portal.address()));
    let list = elsewhere.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    if here.is_empty() {
        let problem = format!("this host has none of the addresses of its portals: {list}");
        return Err(Failure::new(Reason::PortalUnavailable, problem).at("validate"));
    }
    if !elsewhere.is_empty() {
        tracing::warn!(portals = %list, "this host does not have these addresses now: left out of the export");
    }
    Ok(here)
}

/// 32 characters of a 32-letter alphabet from the kernel's random numbers: 160 bits. No capitals: LIO takes a secret that
/// begins with `NULL` for none (`iscsi_nacl_auth` in the kernel's iscsi_target_configfs.c).
fn random_secret() -> Result<Secret, Failure> {
    const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
    let mut bytes = [0u8; 32];
    getrandom::fill(&mut bytes)
        .map_err(|error| Failure::new(Reason::Internal, format!("no random numbers: {error}")))?;
    let text: String = bytes.iter().map(|byte| char::from(ALPHABET[usize::from(byte % 32)])).collect();
    Ok(Secret::new(text)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f43_secrets_are_long_and_never_the_same() {
        let (one, two) = (random_secret().unwrap(), random_secret().unwrap());
        assert_eq!(one.expose().len(), 32);
        assert_ne!(one, two);
    }
}
