//! ResizeAttachment: the order of its steps. The storage host has made the volume larger; this host sees it, then libvirt
//! tells QEMU, and QEMU the guest (F49). A call that was cut off is finished by the same call. Not here: how the volume's size is seen (`over_iscsi`, `over_nfs`).

use tether_agent_core::failure::{Failure, Reason};
use tether_agent_core::steps::Steps;
use tether_proto::wire::{AttachmentStatus, EventKind, Outcome};
use tether_proto::{AccessMode, AttachmentId, ByteSize, Transport, VolumeFormat};

use crate::attach::unknown;
use crate::attachments::Attachments;
use crate::hypervisor::domain_xml::alias_of;
use crate::hypervisor::libvirt::{LibvirtError, is_lost_connection};
use crate::record::{Attachment, AttachmentRecord, Phase};
use crate::watch;

impl Attachments {
    /// Makes the guest see the new size, or finds that it does.
    pub(crate) async fn do_resize(
        &self,
        steps: &Steps,
        id: AttachmentId,
        size: ByteSize,
    ) -> Result<(Outcome, AttachmentStatus), Failure> {
        let (mut attachment, recorded) = match self.journal.get(&id.to_string()) {
            Some(AttachmentRecord { phase: Phase::Attached, attachment: Some(attachment), .. }) => {
                let size = attachment.connection.size;
                (attachment, size)
            }
            other => return Err(not_attached(id, other.map(|record| record.phase))),
        };
        steps.about_domain(&attachment.domain_name);
        if size < recorded {
            return Err(Failure::new(
                Reason::ShrinkRefused,
                format!(
                    "attachment {id} has {recorded} ({} bytes) and {} are asked for",
                    recorded.bytes(),
                    size.bytes()
                ),
            )
            .at("validate"));
        }
        self.check_writable(id, &attachment, size).await?;
        let before = attachment.resizing_to;
        let pending = before.is_some();
        if recorded != size && attachment.resizing_to != Some(size) {
            attachment.resizing_to = Some(size);
            self.write_attached(steps, "write-journal", id, &attachment).await?;
        }
        let on_host = match self.size_on_host(steps, &attachment, size).await {
            Ok(bytes) => bytes,
            Err(failure) => return Err(self.undo_resize(steps, id, attachment, before, failure).await),
        };
        let changed = recorded != size || pending || on_host < size.bytes();
        if changed {
            match self.tell_guest(steps, id, &attachment, size, on_host).await {
                Err(failure) if failure.reason == Reason::NotExtended => {
                    return Err(self.undo_resize(steps, id, attachment, before, failure).await);
                }
                told => told?,
            }
            attachment.connection.size = size;
            attachment.resizing_to = None;
            self.write_attached(steps, "close-journal", id, &attachment).await?;
            let message = format!("the disk has {size} ({} bytes) now", size.bytes());
            self.operations().events().happened(watch::about(id, &attachment, EventKind::Resized, message));
        }
        let views = self.views_of(&attachment).await?;
        let status = self.status(id, Phase::Attached, &attachment, &views)?;
        tracing::info!(domain = %attachment.domain_name, bytes = size.bytes(), changed, "resized");
        let outcome = match (changed, pending) {
            (false, _) => Outcome::Unchanged,
            (true, false) => Outcome::Created,
            (true, true) => Outcome::Repaired,
        };
        Ok((outcome, status))
    }

    /// Nothing was told to anybody: the record goes back to what it was.
    async fn undo_resize(
        &self,
        steps: &Steps,
        id: AttachmentId,
        mut attachment: Attachment,
        before: Option<ByteSize>,
        mut failure: Failure,
    ) -> Failure {
        if attachment.resizing_to != before {
            attachment.resizing_to = before;
            let undone = self.write_attached(steps, "undo-write-journal", id, &attachment).await;
            failure.undo.extend(undone.err().map(|error| error.to_string()));
        }
        failure
    }

    /// libvirt refuses to resize a read-only disk (`qemuDomainBlockResize`), and who may only read a qcow2 file cannot grow it:
    /// that is told before anything is written down.
    async fn check_writable(
        &self,
        id: AttachmentId,
        attachment: &Attachment,
        size: ByteSize,
    ) -> Result<(), Failure> {
        let connection = &attachment.connection;
        let read_only = attachment.options.read_only || connection.access_mode == AccessMode::ReadOnly;
        if !read_only || size == connection.size {
            return Ok(());
        }
        let refused = |why: &str| {
            Failure::new(Reason::ReadOnlyDisk, format!("the disk is read-only, and {why}")).at("validate")
        };
        if connection.transport.format() == VolumeFormat::Qcow2 {
            return Err(refused("a qcow2 file is grown by who may write it").next(
                "nothing is lost: the file grows when its last export has ended; detach it, then attach it anew",
            ));
        }
        if self.views_of(attachment).await?.in_live(id) {
            return Err(refused(&format!("{} runs", attachment.domain_name)));
        }
        Ok(())
    }

    async fn write_attached(
        &self,
        steps: &Steps,
        step: &'static str,
        id: AttachmentId,
        attachment: &Attachment,
    ) -> Result<(), Failure> {
        let record = AttachmentRecord::new(id, Phase::Attached, attachment);
        self.write(steps, step, &record).await
    }

    /// The size that the volume has on this host, in bytes. Less than was asked for is only right for a qcow2 file, which is
    /// grown here.
    async fn size_on_host(
        &self,
        steps: &Steps,
        attachment: &Attachment,
        size: ByteSize,
    ) -> Result<u64, Failure> {
        let (step, found) = match &attachment.connection.transport {
            Transport::Iscsi(iscsi) => {
                ("rescan-device", self.rescan(steps, attachment, iscsi, size).await?.bytes())
            }
            Transport::Nfs(nfs) => {
                let step = "verify-file";
                (step, self.look_again(steps, step, attachment, nfs).await?)
            }
        };
        let is_qcow2 = attachment.connection.transport.format() == VolumeFormat::Qcow2;
        if found == size.bytes() || (is_qcow2 && found < size.bytes()) {
            return Ok(found);
        }
        Err(not_extended(step, found, size))
    }

    /// Tells QEMU, or grows a qcow2 file when no QEMU has it.
    async fn tell_guest(
        &self,
        steps: &Steps,
        id: AttachmentId,
        attachment: &Attachment,
        size: ByteSize,
        on_host: u64,
    ) -> Result<(), Failure> {
        let uuid = attachment.domain_uuid;
        let turn = steps.run("wait-turn", async { Ok::<_, Failure>(self.libvirt.turn(uuid).await?) }).await?;
        let views = steps.run("read-domain", self.views_of(attachment)).await?;
        let disk = views.live.as_ref().and_then(|view| view.disk_by_alias(&alias_of(id)));
        let Some(disk) = disk else {
            return match &attachment.connection.transport {
                Transport::Nfs(nfs) if on_host < size.bytes() => {
                    self.grow_file(steps, attachment, nfs, size).await?;
                    let grown = self.look_again(steps, "verify-size", attachment, nfs).await?;
                    expect("grow-file", grown, size)
                }
                Transport::Nfs(_) | Transport::Iscsi(_) => Ok(()),
            };
        };
        let target_device = disk.target_device.clone();
        // QEMU would cut a raw file that was extended once more while this call waited for its turn.
        if let Transport::Nfs(nfs) = &attachment.connection.transport {
            let now = self.look_again(steps, "verify-size", attachment, nfs).await?;
            if now > size.bytes() {
                return Err(not_extended("verify-size", now, size)
                    .next("it was extended once more meanwhile: resize it to that size"));
            }
        }
        let resized = self.libvirt.resize(uuid, target_device, size.bytes(), turn);
        let seen = steps
            .run("resize-disk", async {
                resized.await.map_err(|error| match error {
                    LibvirtError::Deadline { .. } => unknown(&error),
                    LibvirtError::Refused { code, .. } if is_lost_connection(code) => unknown(&error),
                    other => Failure::from(other),
                })
            })
            .await?;
        expect("resize-disk", seen, size)
    }
}

fn not_extended(step: &'static str, found: u64, size: ByteSize) -> Failure {
    let message = format!("the volume has {found} bytes on this host and not {}", size.bytes());
    Failure::new(Reason::NotExtended, message).at(step)
}

/// Done means read back.
fn expect(step: &'static str, found: u64, wanted: ByteSize) -> Result<(), Failure> {
    if found == wanted.bytes() {
        return Ok(());
    }
    let message = format!("the disk has {found} bytes after it was resized to {}", wanted.bytes());
    Err(Failure::new(Reason::HypervisorRefused, message).at(step))
}

fn not_attached(id: AttachmentId, phase: Option<Phase>) -> Failure {
    match phase {
        None => Failure::new(Reason::AttachmentNotFound, format!("attachment {id} is not on this host")),
        Some(Phase::Ended | Phase::Detaching) => {
            Failure::new(Reason::AttachmentEnded, format!("attachment {id} was detached"))
                .next("nothing is to be done: the volume has its new size at the next attach")
        }
        Some(Phase::Attaching | Phase::Attached) => {
            Failure::new(Reason::AttachmentNotFound, format!("attachment {id} is not whole yet"))
                .next("finish the attach with the same call, then resize again")
        }
    }
    .at("validate")
}
