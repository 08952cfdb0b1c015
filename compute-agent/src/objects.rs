//! The sessions, node records, mounts and disks of this host, and whose they are (F16). Reads only, touches no mount, and only for
//! somebody who asks: it grows with what is there.

use std::collections::BTreeMap;
use std::path::PathBuf;

use tether_agent_core::failure::Failure;
use tether_agent_core::objects::{not_owned, owned, sorted};
use tether_agent_core::steps::{KERNEL_DEADLINE, blocking};
use tether_proto::wire::HostObject;
use tether_proto::{AttachmentId, Transport};
use uuid::Uuid;

use crate::attachments::{Attachments, Views, unreadable};
use crate::hypervisor::domain_xml::{ALIAS_PREFIX, alias_of};
use crate::record::{AttachmentRecord, Phase};

impl Attachments {
    /// All of them, by kind and name.
    pub(crate) async fn objects(&self) -> Result<Vec<HostObject>, Failure> {
        let mut records = self.journal.list();
        records.retain(|record| record.phase != Phase::Ended);
        let mut objects = self.iscsi_objects(&records).await?;
        objects.extend(self.mount_objects(&records)?);
        objects.extend(self.disk_objects(&records).await?);
        Ok(sorted(objects))
    }

    async fn iscsi_objects(&self, records: &[AttachmentRecord]) -> Result<Vec<HostObject>, Failure> {
        let (sysfs, nodes) = (self.sysfs.clone(), self.nodes.clone());
        let look = move || {
            let nodes = match std::fs::read_dir(&nodes) {
                Ok(entries) => entries
                    .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
                    .collect::<std::io::Result<Vec<String>>>()?,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
                Err(error) => return Err(error),
            };
            Ok((sysfs.states()?, nodes))
        };
        let (sessions, nodes) = blocking(KERNEL_DEADLINE, move || look().map_err(unreadable)).await?;
        let known: BTreeMap<String, AttachmentId> = records
            .iter()
            .filter_map(|record| match &record.attachment.as_ref()?.connection.transport {
                Transport::Iscsi(iscsi) => Some((iscsi.target_iqn.to_string(), record.id)),
                Transport::Nfs(_) => None,
            })
            .collect();
        let told = |kind: &'static str, target: String| match known.get(&target) {
            Some(id) => owned(kind, target, [id]),
            None => {
                // A storage agent names its targets after the attachment.
                let ours = target.rsplit(':').next().is_some_and(|end| Uuid::parse_str(end).is_ok());
                not_owned(kind, target, ours)
            }
        };
        let sessions = sessions.into_iter().map(|(target, _)| told("session", target));
        Ok(sessions.chain(nodes.into_iter().map(|target| told("node-record", target))).collect())
    }

    fn mount_objects(&self, records: &[AttachmentRecord]) -> Result<Vec<HostObject>, Failure> {
        let mut known = BTreeMap::<&PathBuf, Vec<&AttachmentId>>::new();
        for record in records {
            if let Some(mount) = record.attachment.as_ref().and_then(|attachment| attachment.mount.as_ref()) {
                known.entry(&mount.directory).or_default().push(&record.id);
            }
        }
        let told = |(place, source, ours): (PathBuf, String, bool)| {
            let name = format!("{} {source}", place.display());
            match known.get(&place) {
                Some(ids) => owned("mount", name, ids.iter().copied()),
                None => not_owned("mount", name, ours),
            }
        };
        Ok(self.mounts.list()?.into_iter().map(told).collect())
    }

    /// Disks with an alias of ours, and other disks that lead to a device or file of ours.
    async fn disk_objects(&self, records: &[AttachmentRecord]) -> Result<Vec<HostObject>, Failure> {
        let mut objects = BTreeMap::new();
        for state in self.libvirt.list().await.map_err(|error| Failure::from(error).at("list-domains"))? {
            // One domain that nobody understands hides no other.
            let views = match Views::of(&state) {
                Ok(views) => views,
                Err(failure) => {
                    tracing::warn!(domain = %state.name, error = %failure, "its XML cannot be read");
                    continue;
                }
            };
            for disk in [views.live, views.persistent].into_iter().flatten().flat_map(|view| view.disks) {
                let alias = disk.alias.clone().unwrap_or_default();
                let name = format!("{} {}", state.name, disk.target_device);
                let record = records.iter().find(|record| {
                    let attachment = record.attachment.as_ref();
                    alias == alias_of(record.id)
                        && attachment.is_some_and(|attachment| attachment.domain_uuid == state.uuid)
                });
                let leads_to = || {
                    let source = disk.source.as_ref()?;
                    let attachments = records.iter().filter_map(|record| record.attachment.as_ref());
                    attachments
                        .filter(|attachment| self.source_path(attachment).as_ref() == Some(source))
                        .max_by_key(|attachment| attachment.domain_uuid == state.uuid)
                };
                let object = match record {
                    Some(record) => owned("disk", name.clone(), [&record.id]),
                    None if alias.starts_with(ALIAS_PREFIX) => not_owned("disk", name.clone(), true),
                    None => match leads_to() {
                        Some(attachment) => HostObject {
                            reason: leads_to_ours(attachment.domain_uuid == state.uuid).to_owned(),
                            ..not_owned("disk", name.clone(), false)
                        },
                        None => continue,
                    },
                };
                objects.insert(name, object);
            }
        }
        Ok(objects.into_values().collect())
    }
}

/// Why somebody's disk is told that leads to a volume of ours.
fn leads_to_ours(in_its_domain: bool) -> &'static str {
    if in_its_domain {
        "somebody plugged it in, and it leads to a volume of this agent's: its attachment cannot be detached before it is taken \
         out"
    } else {
        "somebody plugged it in, and it leads to a volume that is attached to another domain: take it out, two guests destroy \
         each other's data, and this one loses its disk when that one is detached"
    }
}
