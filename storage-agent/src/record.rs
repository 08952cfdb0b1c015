//! What the journal holds of an export: how a record is made, and whether a later call may go on with it. Not here:
//! what is done with it (`export`).

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use tether_agent_core::failure::{Failure, Reason};
use tether_agent_core::force::Force;
use tether_agent_core::reconcile;
use tether_proto::{AccessMode, AttachmentId, ConnectionInfo, Connector, Transport, VolumeKey};

use crate::claims::{Claim, Sharing, sharing};
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
    /// What was exported; nothing once it ended.
    pub(crate) export: Option<Export>,
    /// When it ended, in seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) ended: Option<u64>,
    /// Its end is or was forced.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) forced: bool,
    /// What may have been lost by that, sentences for people.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) may_be_lost: Vec<String>,
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
    /// Those that it had before.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) former: Vec<IpAddr>,
    /// The owner of the pool's files, whom every client is.
    pub(crate) owner_uid: u32,
    /// Their group.
    pub(crate) owner_gid: u32,
}

impl ExportRecord {
    /// The record of a new export.
    pub(crate) fn new(id: AttachmentId, export: Export) -> Self {
        let (phase, export) = (Phase::Exporting, Some(export));
        Self { id, phase, export, ended: None, forced: false, may_be_lost: Vec::new() }
    }

    /// What is left when an export has ended: the id, which is spent.
    pub(crate) fn ended(id: AttachmentId) -> Self {
        let (phase, ended) = (Phase::Ended, Some(reconcile::now()));
        Self { id, phase, export: None, ended, forced: false, may_be_lost: Vec::new() }
    }

    /// The same, of which the end is or was forced.
    pub(crate) fn forced_by(self, force: &Force) -> Self {
        Self { forced: force.is_on(), may_be_lost: force.may_be_lost().to_vec(), ..self }
    }

    /// Did the hypervisor have the same addresses when it was exported? Of a target they do not matter.
    pub(crate) fn has_addresses_of(&self, connector: &Connector) -> bool {
        let set = |connector: &Connector| connector.addresses.iter().copied().collect::<BTreeSet<_>>();
        let other = |export: &Export| export.share.is_some() && set(&export.connector) != set(connector);
        !self.export.as_ref().is_some_and(other)
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

    /// With whom it shares its volume.
    pub(crate) fn sharing(&self) -> Sharing {
        sharing(self.connection.multi_attach, self.connection.access_mode)
    }

    /// What it claims.
    pub(crate) fn claim(&self, id: AttachmentId) -> Claim {
        Claim::Export(id, self.sharing())
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

    /// All addresses that its clients have had: nfsd knows a client by the first one.
    pub(crate) fn all_addresses(&self) -> Vec<IpAddr> {
        let clients = self.share.iter();
        clients.flat_map(|clients| clients.addresses.iter().chain(&clients.former)).copied().collect()
    }

    /// Lets the hypervisor's new addresses in, beside the old ones. Gives what it is once the old ones are shut out. Until then
    /// the connector is the old one: a call that is repeated goes on with it.
    pub(crate) fn move_to(&mut self, connector: Connector, clients: Clients) -> Self {
        let all: BTreeSet<IpAddr> =
            self.all_addresses().into_iter().chain(clients.addresses.clone()).collect();
        let with = |addresses: Vec<IpAddr>| {
            let former = all.iter().filter(|address| !addresses.contains(address)).copied().collect();
            Some(Clients { addresses, former, ..clients.clone() })
        };
        let moved = Self { connector, share: with(clients.addresses.clone()), ..self.clone() };
        // One that was shut out already may be another machine's by now.
        let both: BTreeSet<IpAddr> =
            self.client_addresses().iter().chain(&clients.addresses).copied().collect();
        self.share = with(both.into_iter().collect());
        moved
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

    /// A move that is cut off between its two writes goes on with the same call, and what a client was known by stays known.
    #[test]
    fn f47_a_hypervisor_that_moves_is_let_in_before_it_is_shut_out_elsewhere() {
        let addresses = |list: &[&str]| list.iter().map(|one| one.parse().unwrap()).collect::<Vec<IpAddr>>();
        let connector = |list: &[&str]| Connector {
            hostname: "c".into(),
            initiator_iqn: "iqn.2026-11.io.example:c".parse().unwrap(),
            addresses: addresses(list),
            versions: Default::default(),
        };
        let clients = |list: &[&str]| Clients {
            addresses: addresses(list),
            former: Vec::new(),
            owner_uid: 1,
            owner_gid: 1,
        };
        let text = r#"{"volume":{"pool":"share","volume":"a"},"device":"/srv/a.raw","unit_serial":"0",
            "connector":{"hostname":"c","initiator_iqn":"iqn.2026-11.io.example:c","addresses":["10.0.0.2"],"versions":{}},
            "connection":{"nfs":{"servers":["10.0.0.1"],"path":"/srv","file":"a.raw","format":"raw","inode":7,
            "file_system_id":"67e55044-10b1-426f-9247-bb680e5fe0c8"},"size":4096,"access_mode":"read-write","serial":"s"},
            "share":{"addresses":["10.0.0.2"],"owner_uid":1,"owner_gid":1}}"#;
        let mut export: Export = serde_json::from_str(text).unwrap();
        let id = "11111111-1111-4111-8111-111111111111".parse().unwrap();
        let moved = export.move_to(connector(&["10.0.0.3"]), clients(&["10.0.0.3"]));
        assert_eq!(export.client_addresses(), addresses(&["10.0.0.2", "10.0.0.3"]));
        assert!(!ExportRecord::new(id, export.clone()).has_addresses_of(&connector(&["10.0.0.3"])));
        assert!(ExportRecord::new(id, moved.clone()).has_addresses_of(&connector(&["10.0.0.3"])));
        assert_eq!(moved.client_addresses(), addresses(&["10.0.0.3"]));
        assert_eq!(moved.all_addresses(), addresses(&["10.0.0.3", "10.0.0.2"]));
        // And back again.
        let mut export = moved;
        let back = export.move_to(connector(&["10.0.0.2"]), clients(&["10.0.0.2"]));
        assert_eq!(back.all_addresses(), addresses(&["10.0.0.2", "10.0.0.3"]));
        // And on: what was shut out is not let in again on the way.
        let mut export = back;
        let on = export.move_to(connector(&["10.0.0.4"]), clients(&["10.0.0.4"]));
        assert_eq!(export.client_addresses(), addresses(&["10.0.0.2", "10.0.0.4"]));
        assert_eq!(export.all_addresses(), addresses(&["10.0.0.2", "10.0.0.4", "10.0.0.3"]));
        assert_eq!(on.all_addresses(), addresses(&["10.0.0.4", "10.0.0.2", "10.0.0.3"]));
    }

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
