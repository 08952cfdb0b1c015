//! Exports over NFS: their order of steps. A pool's directory is shared with one client address by one line, however many
//! volumes of the pool go there; the journal says which lines there are to be, and here is an index of it by line, so that
//! an export costs the same however many there are.
//!
//! Export writes its record before, and Unexport marks it before, they come here; they enter the index or leave it, and then
//! each line is made what the index says, with a turn for each pool and address. So no line that somebody needs is lost, and
//! none stays behind (F47).

mod open_files;
mod users;

use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::stat::{major, minor};
use tether_agent_core::failure::{Failure, Reason};
use tether_agent_core::journal::Journal;
use tether_agent_core::steps::{KERNEL_DEADLINE, Steps, blocking};
use tether_agent_core::turns::Turns;
use tether_proto::{AccessMode, AttachmentId, Connector, NfsConnection, PoolName, ServerAddress};

use crate::addresses;
use crate::config;
use crate::directory::Directory;
use crate::identity::Provisioning;
use crate::nfs::{Line, Nfs as Server, NfsError, OpenFile, Share};
use crate::record::{Clients, Export, ExportRecord};
use crate::volume::find::FoundFile;
pub(super) use users::shares;
use users::{Users, enter, index, leave, wanted};

/// How long others may be busy with the same line.
const TURN: Duration = Duration::from_secs(60);

/// What exports over NFS need.
pub(super) struct Nfs {
    server: Server,
    config: Option<config::Nfs>,
    turns: Turns<(PoolName, IpAddr)>,
    users: Mutex<Users>,
    /// A file of the journal that may say of any line that it is needed.
    damaged: Option<PathBuf>,
}

/// What the server shows at one moment.
pub(super) struct Seen {
    lines: Vec<Line>,
    open: Vec<OpenFile>,
}

impl Seen {
    /// What is shared, whoever did it.
    pub(super) fn lines(&self) -> &[Line] {
        &self.lines
    }
}

impl Nfs {
    /// The host's server. One that does not run is told in the log now and to each caller later.
    pub(super) fn open(
        server: Server,
        config: Option<&config::Nfs>,
        journal: &Journal<ExportRecord>,
    ) -> Self {
        if config.is_some()
            && let Err(error) = server.check_running()
        {
            tracing::error!(%error, "this host cannot export over NFS yet");
        }
        if config.is_some() && server.speaks_version_3() {
            tracing::warn!(
                "the NFS server speaks version 3, in which nobody sees who has a file open: a hypervisor that mounts a \
                 share by hand with it is not noticed; turn it off in nfs.conf: [nfsd] vers3=n"
            );
        }
        Self {
            server,
            config: config.cloned(),
            turns: Turns::default(),
            users: Mutex::new(index(journal.list())),
            damaged: journal.damaged().first().cloned(),
        }
    }

    /// With which of a connector's addresses the directory is to be shared.
    pub(super) fn clients(&self, connector: &Connector, directory: &Directory) -> Result<Clients, Failure> {
        let config = self.config()?;
        let (owner_uid, owner_gid) = directory.owner();
        let inside =
            |address: &&IpAddr| config.client_networks.iter().any(|network| network.contains(*address));
        let mut addresses: Vec<IpAddr> = connector.addresses.iter().filter(inside).copied().collect();
        addresses.sort_unstable();
        addresses.dedup();
        if addresses.is_empty() {
            return Err(Failure::new(
                Reason::NoClientAddress,
                format!(
                    "none of the addresses of {} is in this host's client networks: it has {}, and they are {}",
                    connector.hostname,
                    list(&connector.addresses),
                    list(&config.client_networks)
                ),
            )
            .at("validate"));
        }
        Ok(Clients { addresses, former: Vec::new(), owner_uid, owner_gid })
    }

    /// The connection of a new export. It names those of this host's addresses that are of a family with one of the client's:
    /// from no other address would the directory be shared with it.
    pub(super) fn connection(
        &self,
        directory: &Directory,
        file: &FoundFile,
        clients: &[IpAddr],
    ) -> Result<NfsConnection, Failure> {
        let config = self.config()?;
        let own =
            addresses::here(&config.servers, |server| server.address(), "NFS servers", "[nfs] servers")?;
        let servers = own
            .iter()
            .copied()
            .filter(|server| clients.iter().any(|client| client.is_ipv4() == server.address().is_ipv4()));
        let servers: Vec<ServerAddress> = servers.collect();
        if servers.is_empty() {
            let (own, clients) = (list(&own), list(clients));
            return Err(Failure::new(
                Reason::NoClientAddress,
                format!("this host serves NFS at {own}, and the hypervisor comes from {clients}: one is IPv4, the other IPv6"),
            )
            .at("validate"));
        }
        Ok(NfsConnection {
            servers,
            path: directory.path().clone(),
            file: file.name.clone(),
            format: file.record.format,
            inode: file.found.identity.inode,
            file_system_id: file.directory.file_system_id,
            keep_allocated: file.record.provisioning == Provisioning::Thick,
        })
    }

    /// The server runs.
    pub(super) async fn make_ready(&self, steps: &Steps) -> Result<(), Failure> {
        let server = self.server.clone();
        steps.run_blocking("make-ready", move || server.check_running()).await
    }

    /// Shares the directory with all addresses of an export. True when something was changed.
    pub(super) async fn converge(
        &self,
        steps: &Steps,
        id: AttachmentId,
        export: &Export,
        nfs: &NfsConnection,
    ) -> Result<bool, Failure> {
        let shares = shares(export, nfs);
        enter(&mut self.users(), id, &shares);
        let changed = steps.run("share-directory", self.settle(&shares)).await?;
        steps.run("verify-share", self.verify(&shares)).await?;
        Ok(changed)
    }

    /// Ends the sharing with those addresses that no other export needs.
    pub(super) async fn take_away(
        &self,
        steps: &Steps,
        id: AttachmentId,
        export: &Export,
        nfs: &NfsConnection,
    ) -> Result<(), Failure> {
        let shares = shares(export, nfs);
        leave(&mut self.users(), id, &shares);
        steps.run("unshare-directory", self.settle(&shares)).await.map(drop)
    }

    /// Can a client of these addresses reach one of the servers that an export has named?
    pub(super) fn check_families(&self, nfs: &NfsConnection, clients: &[IpAddr]) -> Result<(), Failure> {
        let reaches = |server: &ServerAddress| {
            clients.iter().any(|client| client.is_ipv4() == server.address().is_ipv4())
        };
        if nfs.servers.iter().any(reaches) {
            return Ok(());
        }
        let (servers, clients) = (list(&nfs.servers), list(clients));
        Err(Failure::new(
            Reason::NoClientAddress,
            format!("it was exported from {servers}, and the hypervisor comes from {clients} now"),
        )
        .at("validate")
        .next("detach it and attach it anew: the new export names addresses of the other family"))
    }

    /// Ends the sharing with those addresses of an export that its hypervisor has no more.
    pub(super) async fn leave_addresses(
        &self,
        steps: &Steps,
        id: AttachmentId,
        before: &Export,
        after: &Export,
        nfs: &NfsConnection,
    ) -> Result<(), Failure> {
        let mut gone = shares(before, nfs);
        gone.retain(|share| !after.client_addresses().contains(&share.address));
        if gone.is_empty() {
            return Ok(());
        }
        leave(&mut self.users(), id, &gone);
        steps.run("unshare-directory", self.settle(&gone)).await.map(drop)
    }

    /// What the server shows now.
    pub(super) async fn look(&self) -> Result<Seen, Failure> {
        let server = self.server.clone();
        let look = move || Ok::<_, NfsError>(Seen { lines: server.lines()?, open: server.open_files()? });
        blocking(KERNEL_DEADLINE, look).await
    }

    /// Which address of an export the directory is not shared with; none when it is whole.
    pub(super) async fn lacking(
        &self,
        export: &Export,
        nfs: &NfsConnection,
    ) -> Result<Option<IpAddr>, Failure> {
        let (server, shares) = (self.server.clone(), shares(export, nfs));
        let wanted: Vec<Share> =
            shares.iter().map(|share| self.wanted(share).unwrap_or(share.clone())).collect();
        let look = move || {
            let lines = server.lines()?;
            for share in &wanted {
                if !lines.iter().any(|line| line.is_as(share)) || !server.has_fragment(share)? {
                    return Ok(Some(share.address));
                }
            }
            Ok::<_, Failure>(None)
        };
        blocking(KERNEL_DEADLINE, look).await
    }

    /// Is the directory shared with all clients, and has one of them the file open?
    pub(super) async fn state(
        &self,
        export: &Export,
        nfs: &NfsConnection,
        seen: &Seen,
    ) -> Result<(bool, bool), Failure> {
        let shares = shares(export, nfs);
        let enabled = shares.iter().all(|share| is_shared(&seen.lines, share));
        let Some(path) = export.file() else { return Ok((enabled, false)) };
        let look = move || Ok::<_, Failure>(std::fs::symlink_metadata(path).map(|file| file.dev()).ok());
        let device = blocking(KERNEL_DEADLINE, look).await?;
        let clients = export.all_addresses();
        let connected = device.is_some_and(|device| {
            seen.open.iter().any(|open| {
                open.device == (major(device), minor(device))
                    && open.inode == nfs.inode
                    && clients.contains(&open.address)
            })
        });
        Ok((enabled, connected))
    }

    /// Makes each line what the index says. True when something was changed.
    async fn settle(&self, shares: &[Share]) -> Result<bool, Failure> {
        let mut changed = false;
        for share in shares {
            let key = (share.pool.clone(), share.address);
            let Some(turn) = self.turns.wait(key, TURN).await else {
                return Err(Failure::new(
                    Reason::OperationRunning,
                    format!("others are busy sharing {} with {}", share.path, share.address),
                ));
            };
            changed |= match self.wanted(share) {
                Some(wanted) => self.share(wanted).await?,
                None => {
                    self.check_journal(share)?;
                    self.unshare(share).await?
                }
            };
            drop(turn);
        }
        Ok(changed)
    }

    /// The line that is to be for a pool and address. It is read-only while all of its exports are.
    fn wanted(&self, share: &Share) -> Option<Share> {
        wanted(&self.users(), share)
    }

    fn users(&self) -> MutexGuard<'_, Users> {
        // Each change leaves the table whole; a panic elsewhere cannot leave it half done.
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn share(&self, share: Share) -> Result<bool, Failure> {
        let server = self.server.clone();
        let looked = share.clone();
        let look = move || {
            let lines = server.lines()?;
            // What is as it should be needs nothing, whatever somebody else has shared since.
            if lines.iter().any(|line| line.is_as(&looked)) && server.has_fragment(&looked)? {
                return Ok((false, true));
            }
            if let Some(foreign) = lines.iter().find(|line| line.may_serve(&looked) && !line.is_ours(&looked))
            {
                return Err(not_ours(foreign, &looked));
            }
            let changed = server.write_fragment(&looked)?;
            Ok::<_, Failure>((changed, lines.iter().any(|line| line.is_as(&looked))))
        };
        let (changed, shared) = blocking(KERNEL_DEADLINE, look).await?;
        if !shared {
            self.server.share(&share).await?;
        }
        Ok(changed || !shared)
    }

    async fn unshare(&self, share: &Share) -> Result<bool, Failure> {
        let shared = self.is_there(share).await?;
        if shared {
            self.server.unshare(&share.path, share.address).await?;
            if self.is_there(share).await? {
                return Err(Failure::new(
                    Reason::StillThere,
                    format!("{} is still shared with {} after exportfs -u", share.path, share.address),
                ));
            }
        }
        // Last: while there is a line of ours there is a fragment that says so.
        let (server, pool, address) = (self.server.clone(), share.pool.clone(), share.address);
        let remove = move || match server.remove_fragment(&pool, address) {
            Err(error @ NfsError::ForeignFragment { .. }) => {
                tracing::warn!(%error, "left where it is");
                Ok(false)
            }
            outcome => outcome,
        };
        Ok(blocking(KERNEL_DEADLINE, remove).await? || shared)
    }

    /// A record that cannot be read may be of an export that needs the line: its guest would lose its disk.
    fn check_journal(&self, share: &Share) -> Result<(), Failure> {
        let Some(file) = &self.damaged else { return Ok(()) };
        Err(Failure::new(
            Reason::JournalFailed,
            format!(
                "the journal has a damaged file, {}, which may be of an export that needs {} shared with {}",
                file.display(),
                share.path,
                share.address
            ),
        )
        .next("put the file back from a backup or, when no hypervisor uses its volume, delete it; then restart the agent and call again"))
    }

    async fn is_there(&self, share: &Share) -> Result<bool, Failure> {
        let (server, share) = (self.server.clone(), share.clone());
        let look = move || {
            Ok::<_, NfsError>(server.lines()?.iter().any(|line| line.is_for(&share) && line.is_ours(&share)))
        };
        blocking(KERNEL_DEADLINE, look).await
    }

    async fn verify(&self, shares: &[Share]) -> Result<(), Failure> {
        let server = self.server.clone();
        let lines = blocking(KERNEL_DEADLINE, move || server.lines()).await?;
        match shares.iter().find(|share| !is_shared(&lines, share)) {
            None => Ok(()),
            Some(share) => Err(Failure::new(
                Reason::ShareFailed,
                format!("{} is not shared with {} after exportfs", share.path, share.address),
            )
            .next("see on the storage host: exportfs -v; journalctl -u nfs-server")),
        }
    }

    fn config(&self) -> Result<&config::Nfs, Failure> {
        self.config
            .as_ref()
            .ok_or_else(|| Failure::new(Reason::Internal, "a pool of kind directory without [nfs]"))
    }
}

/// Is there a line that does for this export? One that another export made writable does for a read-only one, too.
fn is_shared(lines: &[Line], share: &Share) -> bool {
    let writable = Share { access_mode: AccessMode::ReadWrite, ..share.clone() };
    lines.iter().any(|line| line.is_for(share) && (line.is_as(share) || line.is_as(&writable)))
}

fn not_ours(line: &Line, share: &Share) -> Failure {
    Failure::new(
        Reason::NotOurs,
        format!(
            "{} is shared with {} by somebody else: {}",
            share.path,
            share.address,
            line.describe()
        ),
    )
    .next("see who shares it: grep -r PATH /etc/exports /etc/exports.d; take the line away with exportfs -u CLIENT:PATH")
}

fn list<T: ToString>(items: &[T]) -> String {
    match items {
        [] => "none".to_owned(),
        items => items.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
    }
}

#[cfg(test)]
mod tests;
