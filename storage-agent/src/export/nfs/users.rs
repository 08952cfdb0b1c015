//! Who needs which line: the index of exports by pool and address. Not here: what is done to a line (`Nfs`).

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use tether_proto::{AccessMode, AttachmentId, NfsConnection, PoolName, Transport};

use crate::nfs::Share;
use crate::record::{Export, ExportRecord, Phase};

/// Who needs which line.
pub(super) type Users = HashMap<(PoolName, IpAddr), BTreeMap<AttachmentId, Share>>;

/// The lines that an export needs.
pub(in super::super) fn shares(export: &Export, nfs: &NfsConnection) -> Vec<Share> {
    let clients = export.share.iter();
    clients
        .flat_map(|clients| clients.addresses.iter().map(move |address| (clients, *address)))
        .map(|(clients, address)| Share {
            pool: export.volume.pool.clone(),
            path: nfs.path.clone(),
            address,
            access_mode: export.connection.access_mode,
            owner_uid: clients.owner_uid,
            owner_gid: clients.owner_gid,
            file_system_id: nfs.file_system_id,
        })
        .collect()
}

/// Who needs which line, as the journal has it.
pub(super) fn index(records: Vec<ExportRecord>) -> Users {
    let mut users = Users::new();
    for record in records {
        if let (Phase::Exporting | Phase::Exported, Some(export)) = (record.phase, &record.export)
            && let Transport::Nfs(nfs) = &export.connection.transport
        {
            enter(&mut users, record.id, &shares(export, nfs));
        }
    }
    users
}

pub(super) fn enter(users: &mut Users, id: AttachmentId, shares: &[Share]) {
    for share in shares {
        users.entry((share.pool.clone(), share.address)).or_default().insert(id, share.clone());
    }
}

pub(super) fn leave(users: &mut Users, id: AttachmentId, shares: &[Share]) {
    for share in shares {
        let key = (share.pool.clone(), share.address);
        if let Some(exports) = users.get_mut(&key) {
            exports.remove(&id);
            if exports.is_empty() {
                users.remove(&key);
            }
        }
    }
}

pub(super) fn wanted(users: &Users, share: &Share) -> Option<Share> {
    let exports = users.get(&(share.pool.clone(), share.address))?;
    let writable = exports.values().find(|share| share.access_mode == AccessMode::ReadWrite);
    writable.or_else(|| exports.values().next()).cloned()
}
