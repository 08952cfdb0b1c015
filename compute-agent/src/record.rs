//! What the journal holds of an attachment, and whether a later call may go on with it. Not here: what is done with it
//! (`attach`, `detach`).

use serde::{Deserialize, Serialize};
use tether_agent_core::failure::{Failure, Reason};
use tether_agent_core::force::Force;
use tether_agent_core::reconcile;
use tether_proto::{
    AttachmentId, ByteSize, ConnectionInfo, DiskDiscard, DiskOptions, DomainName, Serial, Transport,
};
use uuid::Uuid;

use crate::hypervisor::domain_xml::DiskPlan;
use crate::mount::Mount;

/// Where an attachment is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Phase {
    /// Side effects may have begun.
    Attaching,
    /// The disk is in the domain and was read back.
    Attached,
    /// The removal may have begun.
    Detaching,
    /// Gone, and the id is spent (rule 3).
    Ended,
}

impl Phase {
    /// The word on the wire.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Attaching => "attaching",
            Self::Attached => "attached",
            Self::Detaching => "detaching",
            Self::Ended => "ended",
        }
    }
}

/// An attachment, or what is left of one.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct AttachmentRecord {
    /// Its id.
    pub(crate) id: AttachmentId,
    /// Where it is in its life.
    pub(crate) phase: Phase,
    /// What is attached to what; nothing once it ended.
    pub(crate) attachment: Option<Attachment>,
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

/// What is attached to what.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Attachment {
    /// The domain as the caller named it.
    pub(crate) requested_domain: DomainName,
    /// Its UUID: a domain that is renamed stays the same, one that is made anew under the old name does not.
    pub(crate) domain_uuid: Uuid,
    /// Its name when it was attached.
    pub(crate) domain_name: String,
    /// The export, with the secret: a session that is lost must be made again from this.
    pub(crate) connection: ConnectionInfo,
    /// What the caller asked for.
    pub(crate) options: DiskOptions,
    /// The mount of the share; known before it is mounted. Nothing over iSCSI.
    #[serde(default)]
    pub(crate) mount: Option<Mount>,
    /// The size that the guest is about to be told. It may know that already, and the volume may have it.
    #[serde(default)]
    pub(crate) resizing_to: Option<ByteSize>,
    /// The disk in the domain; known before it is plugged in.
    pub(crate) plan: Option<DiskPlan>,
}

impl AttachmentRecord {
    /// The record of an attachment in this phase of its life.
    pub(crate) fn new(id: AttachmentId, phase: Phase, attachment: &Attachment) -> Self {
        let attachment = Some(attachment.clone());
        Self { id, phase, attachment, ended: None, forced: false, may_be_lost: Vec::new() }
    }

    /// What is left when an attachment has ended: the id, which is spent.
    pub(crate) fn ended(id: AttachmentId) -> Self {
        let (phase, ended) = (Phase::Ended, Some(reconcile::now()));
        Self { id, phase, attachment: None, ended, forced: false, may_be_lost: Vec::new() }
    }

    /// The same, of which the end is or was forced.
    pub(crate) fn forced_by(self, force: &Force) -> Self {
        Self { forced: force.is_on(), may_be_lost: force.may_be_lost().to_vec(), ..self }
    }

    /// May this call go on with what is recorded under its id?
    pub(crate) fn check_retry(
        &self,
        domain: &DomainName,
        connection: &ConnectionInfo,
        options: &DiskOptions,
    ) -> Result<(), Failure> {
        let ended = || {
            Failure::new(
                Reason::AttachmentEnded,
                format!("attachment {} was detached; its id is spent", self.id),
            )
            .at("validate")
        };
        match (self.phase, &self.attachment) {
            (Phase::Ended, _) | (_, None) => Err(ended()),
            (Phase::Detaching, _) => Err(ended().next("finish with Detach, then attach under a new id")),
            (Phase::Attaching | Phase::Attached, Some(attachment)) => {
                match attachment.difference(domain, connection, options) {
                    None => Ok(()),
                    Some(difference) => Err(Failure::new(
                        Reason::DifferentParameters,
                        format!("attachment {} has other parameters: {difference}", self.id),
                    )
                    .at("validate")),
                }
            }
        }
    }
}

impl Attachment {
    /// What no two attachments of a host may share: the target, and the volume.
    pub(crate) fn claims(&self) -> Vec<String> {
        match &self.connection.transport {
            Transport::Iscsi(iscsi) => {
                vec![format!("target {}", iscsi.target_iqn), format!("volume naa.{}", iscsi.wwn)]
            }
            Transport::Nfs(nfs) => vec![format!("file {} of file system {}", nfs.inode, nfs.file_system_id)],
        }
    }

    /// The serial that the guest sees.
    pub(crate) fn serial(&self) -> Serial {
        self.options.serial.clone().unwrap_or_else(|| self.connection.serial.clone())
    }

    /// Says which parameter of a repeated call is not the first call's.
    pub(crate) fn difference(
        &self,
        domain: &DomainName,
        connection: &ConnectionInfo,
        options: &DiskOptions,
    ) -> Option<String> {
        if self.requested_domain != *domain {
            return Some(format!("domain is {} and not {domain}", self.requested_domain));
        }
        match (&self.connection.transport, &connection.transport) {
            (Transport::Iscsi(known), Transport::Iscsi(told)) if known.target_iqn != told.target_iqn => {
                return Some(format!("target is {} and not {}", known.target_iqn, told.target_iqn));
            }
            (Transport::Nfs(known), Transport::Nfs(told)) if known.file != told.file => {
                return Some(format!("file is {} and not {}", known.file, told.file));
            }
            _ => {}
        }
        // Only the size may be another: the volume may have been extended between the calls. And an older agent, or an older
        // command, knew nothing of how a target proves itself or of a file that keeps its space, and wrote down `unmap` for a
        // discard that was left out.
        let mut told = ConnectionInfo { size: self.connection.size, ..connection.clone() };
        match (&self.connection.transport, &mut told.transport) {
            (Transport::Iscsi(known), Transport::Iscsi(told)) if known.mutual_chap.is_none() => {
                told.mutual_chap = None;
            }
            (Transport::Nfs(known), Transport::Nfs(told)) => told.keep_allocated = known.keep_allocated,
            _ => {}
        }
        if self.connection != told {
            return Some("connection info is another".to_owned());
        }
        let keeps_allocated =
            matches!(&self.connection.transport, Transport::Nfs(known) if known.keep_allocated);
        let discard = match (self.options.discard, options.discard) {
            (Some(DiskDiscard::Unmap), None) if !keeps_allocated => self.options.discard,
            (_, asked) => asked,
        };
        let asked = DiskOptions { discard, ..options.clone() };
        if self.options != asked {
            return Some(format!("disk options are {:?} and not {options:?}", self.options));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tether_proto::wire;

    fn told(keep_allocated: bool, discard: wire::DiskDiscard) -> (ConnectionInfo, DiskOptions) {
        let nfs = wire::NfsConnection {
            servers: vec!["192.0.2.1".into()],
            path: "/srv/share".into(),
            file: "v.raw".into(),
            format: wire::VolumeFormat::Raw.into(),
            inode: 7,
            file_system_id: "67e55044-10b1-426f-9247-bb680e5fe0c8".into(),
            keep_allocated,
        };
        let connection = wire::ConnectionInfo {
            transport: Some(wire::connection_info::Transport::Nfs(nfs)),
            size_bytes: 1 << 20,
            serial: "0123".into(),
            ..Default::default()
        };
        let options = wire::DiskOptions { discard: discard.into(), ..Default::default() };
        ((&connection).try_into().unwrap(), (&options).try_into().unwrap())
    }

    /// Rule 4, after an upgrade: agents that knew of no file that keeps its space wrote `unmap` down when nothing was said.
    #[test]
    fn a_repeated_call_is_the_same_also_to_the_record_of_an_older_agent() {
        use wire::DiskDiscard::{Ignore, Unmap, Unspecified};
        let domain: DomainName = "c2".parse().unwrap();
        for ((was_kept, was), (is_kept, is), same) in [
            ((false, Unmap), (true, Unspecified), true),
            ((true, Unspecified), (true, Unspecified), true),
            ((true, Unspecified), (false, Unspecified), true),
            ((true, Unspecified), (true, Unmap), false),
            ((true, Ignore), (true, Unspecified), false),
            ((true, Unmap), (true, Ignore), false),
            ((true, Unmap), (true, Unspecified), false),
        ] {
            let (connection, options) = told(was_kept, was);
            let attachment = Attachment {
                requested_domain: domain.clone(),
                domain_uuid: Uuid::nil(),
                domain_name: "c2".into(),
                connection,
                options,
                mount: None,
                resizing_to: None,
                plan: None,
            };
            let (connection, options) = told(is_kept, is);
            let difference = attachment.difference(&domain, &connection, &options);
            assert_eq!(difference.is_none(), same, "{was:?} {is:?}: {difference:?}");
        }
    }
}
