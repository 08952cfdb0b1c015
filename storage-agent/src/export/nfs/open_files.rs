//! Who has an exported file open, before it is given away or changed (rule 2), and cutting a client off that will not let go. Not
//! here: how nfsd tells (`crate::nfs`).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;

use tether_agent_core::failure::Failure;
use tether_agent_core::steps::Steps;
use tether_proto::{AttachmentId, NfsConnection};

use super::{Nfs, shares};
use crate::nfs::{NfsError, Share, Whose};
use crate::record::Export;

impl Nfs {
    /// Before an export ends: checks that its clients have let go of its file. The line may stay for other exports, or come
    /// back with them, and whoever has the file open then would still be a writer of it (rule 2). A server that does not run
    /// does not keep it from ending: the next export asks again.
    pub(in super::super) async fn check_let_go(
        &self,
        steps: &Steps,
        export: &Export,
        nfs: &NfsConnection,
    ) -> Result<(), Failure> {
        let clients = self.own_addresses(export, nfs);
        self.check_closed(steps, export, nfs, Whose::Only(clients)).await
    }

    /// Before a file is given to anybody: nobody has it open but those with whom it is shared (rule 2).
    pub(in super::super) async fn check_unused(
        &self,
        steps: &Steps,
        export: &Export,
        nfs: &NfsConnection,
        others: &[Export],
    ) -> Result<(), Failure> {
        let others = others.iter().flat_map(Export::all_addresses).collect();
        self.check_closed(steps, export, nfs, Whose::AllBut(others)).await
    }

    /// Before a file is changed: nobody has it open.
    pub(in super::super) async fn check_open_nowhere(
        &self,
        steps: &Steps,
        file: PathBuf,
        inode: u64,
    ) -> Result<(), Failure> {
        self.check_file_closed(steps, file, inode, Whose::all()).await
    }

    async fn check_closed(
        &self,
        steps: &Steps,
        export: &Export,
        nfs: &NfsConnection,
        whose: Whose,
    ) -> Result<(), Failure> {
        let Some(file) = export.file() else { return Ok(()) };
        self.check_file_closed(steps, file, nfs.inode, whose).await
    }

    async fn check_file_closed(
        &self,
        steps: &Steps,
        file: PathBuf,
        inode: u64,
        whose: Whose,
    ) -> Result<(), Failure> {
        let server = self.server.clone();
        let check = move || match server.check_running() {
            Err(NfsError::Down { .. }) => Ok(()),
            _ => server.check_closed(&file, inode, &whose),
        };
        steps.run_blocking("check-closed", check).await
    }

    /// The addresses by which nfsd may know an export's client: those that it has, and those that it had and that are no other
    /// export's by now.
    fn own_addresses(&self, export: &Export, nfs: &NfsConnection) -> Vec<IpAddr> {
        let (users, pool) = (self.users(), export.volume.pool.clone());
        let current: BTreeSet<IpAddr> = shares(export, nfs).into_iter().map(|share| share.address).collect();
        let mut all = export.all_addresses();
        all.retain(|address| current.contains(address) || !users.contains_key(&(pool.clone(), *address)));
        all
    }

    /// After the end of an export was forced: the server forgets what its clients have open, when they are cut off from the
    /// share. When they are not, because other exports need it, nothing is forgotten: they would open the file again.
    pub(in super::super) async fn fence(
        &self,
        steps: &Steps,
        export: &Export,
        nfs: &NfsConnection,
    ) -> Result<(), Failure> {
        let Some(file) = export.file() else { return Ok(()) };
        let needed: BTreeSet<AttachmentId> = {
            let users = self.users();
            let of =
                |share: Share| users.get(&(share.pool, share.address)).into_iter().flat_map(BTreeMap::keys);
            shares(export, nfs).into_iter().flat_map(of).copied().collect()
        };
        let (server, inode, whose) =
            (self.server.clone(), nfs.inode, Whose::Only(self.own_addresses(export, nfs)));
        let host = export.connector.hostname.clone();
        let fence = move || match server.check_closed(&file, inode, &whose) {
            Ok(()) | Err(NfsError::Down { .. }) => Ok(()),
            Err(error) if !needed.is_empty() => {
                let commands: Vec<String> =
                    needed.iter().map(|id| format!("tether detach --force {id}")).collect();
                Err(Failure::from(error).next(format!(
                    "{host} keeps the share for other volumes, and so this file; when that host is lost for good, end \
                     those too, then this one again:\n{}",
                    commands.join("\n")
                )))
            }
            Err(NfsError::Starting | NfsError::Open { .. }) => Ok(server.expire(&file, inode, &whose)?),
            Err(error) => Err(error.into()),
        };
        steps.run_blocking("fence-client", fence).await
    }
}
