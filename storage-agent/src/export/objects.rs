//! The targets, backstores and shares of this host, and whose they are (F16). Reads only, and only for somebody who asks: it grows
//! with what is there.

use std::collections::BTreeMap;

use tether_agent_core::failure::Failure;
use tether_agent_core::objects::{not_owned, owned, sorted};
use tether_proto::wire::HostObject;
use tether_proto::{AttachmentId, Transport};

use super::{Exports, nfs};
use crate::record::Phase;
use crate::target::lio::{HBA, backstore_name};

impl Exports {
    /// All of them, by kind and name.
    pub(crate) async fn objects(&self) -> Result<Vec<HostObject>, Failure> {
        let (mut targets, mut backstores) = (BTreeMap::new(), BTreeMap::<String, Vec<AttachmentId>>::new());
        let mut shares = Vec::new();
        let hba = HBA.trim_start_matches("core/");
        for record in self.journal.list() {
            let Some(export) = record.export.filter(|_| record.phase != Phase::Ended) else { continue };
            match &export.connection.transport {
                Transport::Iscsi(iscsi) => {
                    targets.insert(iscsi.target_iqn.to_string(), record.id);
                    let name = backstore_name(record.id, export.sharing(), &export.unit_serial);
                    backstores.entry(format!("{hba}/{name}")).or_default().push(record.id);
                }
                Transport::Nfs(of) => {
                    shares.extend(nfs::shares(&export, of).into_iter().map(|share| (share, record.id)));
                }
            }
        }
        let (found_targets, found_backstores) = self.iscsi.list().await?;
        let prefix = self.iscsi.prefix();
        let mut objects = Vec::new();
        for name in found_targets {
            objects.push(match targets.get(&name) {
                Some(id) => owned("target", name, [id]),
                None => {
                    let ours = prefix.as_ref().is_some_and(|prefix| name.starts_with(prefix));
                    not_owned("target", name, ours)
                }
            });
        }
        for name in found_backstores {
            objects.push(match backstores.get(&name) {
                Some(ids) => owned("backstore", name, ids),
                None => {
                    let ours = name.starts_with(&format!("{hba}/"));
                    not_owned("backstore", name, ours)
                }
            });
        }
        let file_systems = self.pools.file_system_ids();
        for line in self.nfs.look().await?.lines() {
            let ids: Vec<&AttachmentId> =
                shares.iter().filter(|(share, _)| line.is_ours(share)).map(|(_, id)| id).collect();
            objects.push(match ids.is_empty() {
                false => owned("share", line.name(), ids),
                true => {
                    let ours = file_systems.iter().any(|id| line.has_file_system_id(*id));
                    not_owned("share", line.name(), ours)
                }
            });
        }
        Ok(sorted(objects))
    }
}
