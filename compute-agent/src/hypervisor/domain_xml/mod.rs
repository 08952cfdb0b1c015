//! Domain XML as pure functions: what a domain has ([`DomainView`]), where a new disk can go ([`choose_place`]),
//! and the `<disk>` element ([`disk_element`]). libvirt itself puts the element in and takes it out, so everything
//! else in a definition stays as it was.
//!
//! No libvirt, no I/O and no order of steps here: those are in `hypervisor::libvirt` and in the engine.

mod disk;
mod place;
mod scan;
mod view;

#[cfg(test)]
mod place_tests;
#[cfg(test)]
mod round_trips;

use serde::{Deserialize, Serialize};
use tether_proto::{AttachmentId, DiskDiscard, DiskIo, DiskOptions, Serial, TargetDevice, VolumeFormat};

pub(crate) use disk::{ALIAS_PREFIX, alias_of, attachment_of, disk_element};
#[cfg(test)]
use place::SlotCount;
pub(crate) use place::{PlaceError, choose_place};
pub(crate) use view::DomainView;
use view::{ControllerView, DriveUse, PciUse};

/// What a disk stands on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum DiskKind {
    /// A block device, always raw.
    #[default]
    Block,
    /// A file of a share, with the format that the storage host stored.
    File(VolumeFormat),
}

/// All that the `<disk>` element of one attachment says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DiskPlan {
    /// Names the disk: its alias is made of it.
    pub(crate) attachment: AttachmentId,
    /// How the guest sees the disk. Its wishes (target device, serial) are decided below.
    pub(crate) options: DiskOptions,
    /// The stable path on this host, `/dev/disk/by-id/wwn-0x…` (F3), or the file on its mount.
    pub(crate) device_path: String,
    /// What is at that path. Records of agents that knew iSCSI alone do not say.
    #[serde(default)]
    pub(crate) kind: DiskKind,
    /// The serial that the guest sees.
    pub(crate) serial: Serial,
    /// The export is read-only. The disk is, when this or the options say so.
    pub(crate) read_only: bool,
    /// Other hosts may have the volume, too, and write.
    #[serde(default)]
    pub(crate) shareable: bool,
    /// It is a file whose space is all taken, and stays so.
    #[serde(default)]
    pub(crate) keep_allocated: bool,
    /// The name in the domain.
    pub(crate) target_device: TargetDevice,
    /// The place on the guest's bus.
    pub(crate) address: DiskAddress,
}

impl DiskPlan {
    /// The host's I/O. Linux AIO is for block devices only: submitting to a file on a server that is away stops all of QEMU,
    /// a thread pool stops the one disk.
    pub(crate) fn io(&self) -> DiskIo {
        let native = self.kind == DiskKind::Block && self.options.cache.is_direct();
        self.options.io.unwrap_or(if native { DiskIo::Native } else { DiskIo::Threads })
    }

    /// What becomes of the guest's discards. QEMU would punch holes into a file, mkfs discards all of a disk, and the next to
    /// need the room would take it.
    pub(crate) fn discard(&self) -> DiskDiscard {
        let left_out = if self.keep_allocated { DiskDiscard::Ignore } else { DiskDiscard::Unmap };
        self.options.discard.unwrap_or(left_out)
    }
}

/// A place on the guest's buses, as libvirt's `<address>` tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum DiskAddress {
    /// `<address type='pci'>`.
    Pci {
        /// The PCI domain, 0 on everything that QEMU emulates.
        domain: u16,
        /// The index of the PCI controller.
        bus: u8,
        /// The slot on it.
        slot: u8,
        /// The function in the slot.
        function: u8,
    },
    /// `<address type='drive'>`.
    Drive {
        /// The index of the controller.
        controller: u32,
        /// Always 0 for SCSI.
        bus: u32,
        /// The SCSI target.
        target: u32,
        /// The SCSI logical unit.
        unit: u32,
    },
}

/// Domain XML that cannot be read or changed. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DomainXmlError {
    /// The reader refused it.
    #[error(
        "the XML is not well-formed at line {line}; look at `virsh dumpxml DOMAIN` for what is wrong there"
    )]
    Syntax {
        /// Counted from 1.
        line: usize,
        /// What the reader says.
        #[source]
        source: quick_xml::Error,
    },
    /// The reader took it, and it is still no XML document.
    #[error(
        "the XML is wrong at line {line}: {problem}; look at `virsh dumpxml DOMAIN` for what is wrong there"
    )]
    Malformed {
        /// Counted from 1.
        line: usize,
        /// What is wrong.
        problem: &'static str,
    },
    /// The outermost element is another one.
    #[error("the XML is a <{found}> where a <{wanted}> is needed; hand over what `virsh dumpxml` prints")]
    WrongRoot {
        /// The element that is needed.
        wanted: &'static str,
        /// The element that is there.
        found: String,
    },
    /// A part that every domain has is not there.
    #[error(
        "the domain XML has no <{element}> with content; libvirt always writes one, so look at `virsh dumpxml DOMAIN`"
    )]
    Missing {
        /// The element.
        element: &'static str,
    },
    /// A number of an address or an index cannot be read.
    #[error(
        "{attribute}='{value}' of a <{element}> in the domain XML is no number in range; repair it with `virsh edit`"
    )]
    Number {
        /// The element that has it.
        element: String,
        /// The attribute.
        attribute: &'static str,
        /// What stands there.
        value: String,
    },
    /// The path is no stable one, or has characters that do not belong there (F3).
    #[error(
        "the device path {path:?} is refused: {problem}; only /dev/disk/by-id/… and a file on its mount name the same volume for ever"
    )]
    DevicePath {
        /// The path.
        path: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The element could not be written down.
    #[error("the <disk> element could not be written; this is a fault of the agent, report it")]
    Write(#[source] std::io::Error),
}
