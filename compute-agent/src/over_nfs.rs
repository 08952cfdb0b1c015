//! What Attach, Detach and ResizeAttachment do for a volume over NFS: the order of connecting (server, mount, verify the
//! file) and of disconnecting (flush, unmount), each observed (F15). Not here: the domain (`attach`, `detach`, `resize`),
//! and how each single thing is done (`mount`).
//!
//! A mount's users are the attachments in the journal that name it, those of domains that are shut off too (F19): the first
//! mounts, the last unmounts. They are counted under the share's turn, and a new record is written under it, too, so that no
//! mount is taken away under an attach that has begun.

use std::path::{Path, PathBuf};

use tether_agent_core::failure::{Failure, Reason};
use tether_agent_core::force::Force;
use tether_agent_core::steps::Steps;
use tether_agent_core::turns::Turn;
use tether_proto::{AttachmentId, ByteSize, NfsConnection, Transport, VolumeFormat};

use crate::attach::{HostDisk, Known};
use crate::attachments::Attachments;
use crate::detach::{buffered, lost_by_flush};
use crate::hypervisor::domain_xml::DiskKind;
use crate::mount::file_helper::Facts;
use crate::mount::{Mount, MountError, State};
use crate::record::Attachment;
use crate::sizes::Sizes;

impl Attachments {
    /// Decides from which server a share is mounted, before anything is done: one that is mounted or about to be, else the
    /// first that answers. Gives the turn at the share. Nothing to decide over iSCSI.
    pub(crate) async fn choose_mount(
        &self,
        steps: &Steps,
        id: AttachmentId,
        attachment: &mut Attachment,
    ) -> Result<Option<Turn>, Failure> {
        let Transport::Nfs(nfs) = attachment.connection.transport.clone() else { return Ok(None) };
        steps
            .run("choose-server", async {
                let used = || {
                    let mut mounts =
                        nfs.servers.iter().map(|server| self.mounts.mount_of(*server, &nfs.path));
                    mounts.find(|mount| self.is_used(mount, id))
                };
                let mut asked = used().map_or_else(|| nfs.servers.clone(), |mount| vec![mount.server]);
                // Servers are asked outside of the turn: when one is away, nobody waits for another's asking.
                let (turn, mount) = loop {
                    let answered = self.mounts.probe(&asked).await?;
                    let turn = self.mounts.turn(nfs.file_system_id).await?;
                    match used() {
                        Some(mount) if mount.server != answered => asked = vec![mount.server],
                        Some(mount) => break (turn, mount),
                        None => break (turn, self.mounts.mount_of(answered, &nfs.path)),
                    }
                };
                self.use_mount(&mount, id);
                attachment.mount = Some(mount);
                Ok::<_, Failure>(Some(turn))
            })
            .await
    }

    /// Does an attachment other than this one use the mount?
    fn is_used(&self, mount: &Mount, except: AttachmentId) -> bool {
        let users = self.mount_users();
        users.get(&mount.directory).is_some_and(|users| users.iter().any(|id| *id != except))
    }

    /// Enters an attachment among the users of a mount. Under the share's turn.
    fn use_mount(&self, mount: &Mount, id: AttachmentId) {
        self.mount_users().entry(mount.directory.clone()).or_default().insert(id);
    }

    fn stop_using(&self, mount: &Mount, id: AttachmentId) {
        if let Some(users) = self.mount_users().get_mut(&mount.directory) {
            users.remove(&id);
        }
    }

    /// The share mounted, and the file compared with what the storage host said.
    pub(crate) async fn connect_nfs(
        &self,
        steps: &Steps,
        id: AttachmentId,
        attachment: &Attachment,
        nfs: &NfsConnection,
        known: Known,
    ) -> Result<HostDisk, Failure> {
        let mount = placed(attachment)?;
        let at_mount = |error: MountError| Failure::from(error).at("mount-share");
        let turn = self.mounts.turn(nfs.file_system_id).await.map_err(at_mount)?;
        // A retry after an undo that failed is a user again.
        self.use_mount(mount, id);
        let connected = match self.mounts.state(mount).map_err(at_mount)? {
            State::Mounted { .. } => false,
            State::Other(found) => {
                let taken = MountError::Taken { mount: Box::new(mount.clone()), found };
                return Err(Failure::from(taken).at("mount-share"));
            }
            State::Absent if known.in_live => {
                // QEMU has the file of a mount that was taken away by force, and a new mount does not change that.
                return Err(Failure::new(
                    Reason::DeviceInUse,
                    format!("domain {} still has a file of a mount that is gone", attachment.domain_name),
                )
                .at("mount-share")
                .next("shut the domain off, then call again"));
            }
            State::Absent => {
                steps.run("mount-share", async { Ok::<_, Failure>(self.mounts.mount(mount).await?) }).await?;
                true
            }
        };
        drop(turn);
        let sizes = known.sizes(attachment.connection.size);
        let size = self.verify_file(steps, mount, nfs, sizes).await?;
        let path = file_of(mount, nfs).display().to_string();
        Ok(HostDisk { path, kind: DiskKind::File(nfs.format), size, connected })
    }

    /// Is it the file that the storage host named: file system, inode number, size (rule 1)? Gives the size, one of two, for
    /// the volume may have been extended since.
    async fn verify_file(
        &self,
        steps: &Steps,
        mount: &Mount,
        nfs: &NfsConnection,
        sizes: Sizes,
    ) -> Result<ByteSize, Failure> {
        let path = file_of(mount, nfs);
        steps
            .run("verify-file", async {
                let facts = self.look(mount, &path, nfs).await?;
                if sizes.allow(facts.size) {
                    return Ok(ByteSize::try_from(facts.size)?);
                }
                let (found, wanted) = (facts.size, sizes.any_of[0].bytes());
                Err(wrong(&path, &format!("has {found} bytes and not {wanted}")))
            })
            .await
    }

    /// What the file is, when it is the one that the storage host named.
    async fn look(&self, mount: &Mount, path: &Path, nfs: &NfsConnection) -> Result<Facts, Failure> {
        let facts = self.mounts.look(mount, path, nfs.format, nfs.file_system_id).await?;
        if facts.inode != nfs.inode {
            return Err(wrong(path, &format!("has inode number {} and not {}", facts.inode, nfs.inode)));
        }
        Ok(facts)
    }

    /// Before a disk is taken out of a running domain: does the server answer? QEMU closes the file, and would hang with all
    /// of the guest at a server that is away.
    pub(crate) async fn check_server(
        &self,
        steps: &Steps,
        id: AttachmentId,
        attachment: &Attachment,
    ) -> Result<(), Failure> {
        let Some(mount) = &attachment.mount else { return Ok(()) };
        if !matches!(self.mounts.state(mount)?, State::Mounted { .. }) {
            return Ok(());
        }
        if !self.views_of(attachment).await.map_err(|failure| failure.at("read-domain"))?.in_live(id) {
            return Ok(());
        }
        steps
            .run("check-server", async {
                self.mounts.check_alive(mount).await.map_err(|error| {
                    let failure = Failure::from(error);
                    match failure.reason {
                        Reason::ServerUnreachable => failure.next(
                            "the disk stays: the guest's writes wait for the server. Bring the storage host back, then \
                             detach again",
                        ),
                        _ => failure,
                    }
                })
            })
            .await
    }

    /// Flushes, and unmounts when nobody else uses the mount.
    pub(crate) async fn disconnect_nfs(
        &self,
        steps: &Steps,
        id: AttachmentId,
        attachment: &Attachment,
        nfs: &NfsConnection,
        was_plugged: bool,
        force: &mut Force,
    ) -> Result<(), Failure> {
        let Some(mount) = &attachment.mount else { return Ok(()) };
        let state = || self.mounts.state(mount).map_err(|error| Failure::from(error).at("unmount-share"));
        let mounted = matches!(state()?, State::Mounted { .. });
        if was_plugged && buffered(attachment.options.cache) {
            if mounted {
                let flushed = self.flush_file(steps, attachment, mount, nfs, force).await;
                force.pass(flushed, (), "what this host had not written to the storage is lost")?;
            } else {
                tracing::error!(share = %mount.share, "unmounted before the flush: writes that the host held may be lost");
            }
        }
        let turn = self.mounts.turn(nfs.file_system_id).await;
        let _turn = turn.map_err(|error| Failure::from(error).at("unmount-share"))?;
        if force.is_on() && self.is_used(mount, id) && self.holds(id, attachment).await {
            // The mount stays for others, and QEMU would go on writing to the file.
            return Err(Failure::new(
                Reason::GuestHoldsDevice,
                format!(
                    "{} still has the file open on a mount that other attachments use",
                    attachment.domain_name
                ),
            )
            .at("unmount-share")
            .next(format!(
                "shut the domain off (virsh destroy {}), then detach again",
                attachment.domain_name
            )));
        }
        self.mounts.let_go(mount, &file_of(mount, nfs)).await;
        // Out of the count first, under the turn: of two that leave at once, the second must see that it is the last.
        self.stop_using(mount, id);
        if self.is_used(mount, id) {
            return Ok(());
        }
        self.check_journal("of an attachment that uses the mount")
            .map_err(|failure| failure.at("unmount-share"))?;
        let unmounted =
            steps.run("unmount-share", async { Ok::<_, Failure>(self.mounts.unmount(mount).await?) }).await;
        let still_mounted = unmounted.is_err();
        force.pass(
            unmounted,
            (),
            "who still has files of the share open may write to them until the host is cut off",
        )?;
        if still_mounted {
            let taken = self.mounts.take_away(mount);
            steps.run("take-mount-away", async { Ok::<_, Failure>(taken.await?) }).await?;
        }
        Ok(())
    }

    /// Has the running domain the disk? When nobody can say: yes.
    async fn holds(&self, id: AttachmentId, attachment: &Attachment) -> bool {
        self.views_of(attachment).await.map_or(true, |views| views.in_live(id))
    }

    /// Has the file held open until it is flushed.
    pub(crate) async fn hold_file(&self, attachment: &Attachment, nfs: &NfsConnection) {
        let Some(mount) = &attachment.mount else { return };
        if !self.mounts.state(mount).is_ok_and(|state| matches!(state, State::Mounted { .. })) {
            return;
        }
        if let Err(error) = self.mounts.hold(mount, &file_of(mount, nfs)).await {
            tracing::warn!(%error, file = %nfs.file, "not held open: its flush may not hear of what QEMU's own finds");
        }
    }

    async fn flush_file(
        &self,
        steps: &Steps,
        attachment: &Attachment,
        mount: &Mount,
        nfs: &NfsConnection,
        force: &mut Force,
    ) -> Result<(), Failure> {
        steps
            .run("flush", async {
                match self.mounts.flush(mount, &file_of(mount, nfs)).await {
                    Err(error) if error.is_gone() => {
                        tracing::warn!(share = %mount.share, file = %nfs.file, "the file is gone: nothing to flush");
                        Ok(())
                    }
                    Err(error) => {
                        // When nobody was asked, the next flush finds all of it.
                        if !matches!(error, MountError::Stuck(_)) {
                            lost_by_flush(attachment, &error, force);
                        }
                        Err(Failure { reason: Reason::FlushFailed, ..Failure::from(error) }.next(format!(
                            "bring the storage host back, then detach again; or give up what this host has not written, on \
                             the compute host: umount -f -l {}, then detach again",
                            mount.directory.display()
                        )))
                    }
                    Ok(()) => Ok(()),
                }
            })
            .await
    }

    /// The file has the volume's new size, or a qcow2 file is about to get it. Gives the size that it has.
    pub(crate) async fn look_again(
        &self,
        steps: &Steps,
        step: &'static str,
        attachment: &Attachment,
        nfs: &NfsConnection,
    ) -> Result<u64, Failure> {
        let mount = placed(attachment)?;
        let path = file_of(mount, nfs);
        steps
            .run(step, async {
                self.mounts.check_alive(mount).await?;
                Ok::<_, Failure>(self.look(mount, &path, nfs).await?.size)
            })
            .await
    }

    /// Grows the file of a qcow2 volume whose domain is shut off.
    pub(crate) async fn grow_file(
        &self,
        steps: &Steps,
        attachment: &Attachment,
        nfs: &NfsConnection,
        size: ByteSize,
    ) -> Result<(), Failure> {
        debug_assert_eq!(nfs.format, VolumeFormat::Qcow2);
        let mount = placed(attachment)?;
        let path = file_of(mount, nfs);
        let grown = self.mounts.grow_qcow2(&path, size.bytes());
        steps.run("grow-file", async { Ok::<_, Failure>(grown.await?) }).await
    }
}

pub(crate) fn file_of(mount: &Mount, nfs: &NfsConnection) -> PathBuf {
    mount.directory.join(nfs.file.as_str())
}

fn wrong(path: &Path, problem: &str) -> Failure {
    Failure::new(Reason::WrongDevice, format!("{} {problem}", path.display())).next(
        "if the volume was extended just now: export it again, then attach. Else do not use it: compare the file's inode \
         number and size on both hosts (stat), and export again under a new id",
    )
}

/// Where the share belongs. A record of an attachment over NFS always says.
fn placed(attachment: &Attachment) -> Result<&Mount, Failure> {
    attachment
        .mount
        .as_ref()
        .ok_or_else(|| Failure::new(Reason::Internal, "the record has no place for the share"))
}
