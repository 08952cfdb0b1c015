//! Chooses where a new disk goes: a target device and an address that are free in every definition of the domain it is
//! put into. When there is none, the error counts what there is and says what to add (F39). Changes nothing.

use std::fmt;

use tether_proto::{DiskBus, DiskOptions, TargetDevice};

use super::{ControllerView, DiskAddress, DomainView, DriveUse, PciUse};

/// libvirt and QEMU go up to 16383, but guests look for units above 255 in more than one way.
const LAST_UNIT: u32 = 255;
const LAST_SLOT: u8 = 31;

const ROOT_PORT: &str = "<controller type='pci' model='pcie-root-port'/>";
const PCI_BRIDGE: &str = "<controller type='pci' model='pci-bridge'/>";
const VIRTIO_SCSI: &str = "<controller type='scsi' model='virtio-scsi'/>";

/// There is no place for the disk. Nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PlaceError {
    /// Neither a live nor a persistent definition was given.
    #[error("the domain is neither running nor defined, so there is no place for a disk; define or start it")]
    NoDefinition,
    /// Another disk has the target device that the caller wishes for.
    #[error("target device {wish} is taken by {by}; wish for another one, or for none and the agent chooses")]
    TargetDeviceTaken {
        /// What was wished for.
        wish: TargetDevice,
        /// The disk that has it.
        by: String,
    },
    /// All names of the bus are taken.
    #[error("domain {domain} has no free target device on bus {bus}; detach disks that are not needed")]
    NoFreeTargetDevice {
        /// The domain.
        domain: String,
        /// The bus.
        bus: DiskBus,
    },
    /// The machine has no PCI slots that are known here.
    #[error(
        "domain {domain} (machine type {machine:?}, {arch:?}) has no PCI bus for a virtio disk; attach with bus scsi, \
         or use a machine type with PCI such as q35"
    )]
    UnsupportedMachine {
        /// The domain.
        domain: String,
        /// Its machine type.
        machine: String,
        /// Its architecture.
        arch: String,
    },
    /// No virtio-scsi controller, or not the same one now and after a restart.
    #[error(
        "domain {domain} has no virtio-scsi controller that the disk can be put on ({}); add {} to its <devices> with \
         `virsh edit {domain}`, then shut it down and start it again",
        .controllers, VIRTIO_SCSI
    )]
    NoScsiController {
        /// The domain.
        domain: String,
        /// The SCSI controllers that it has.
        controllers: String,
    },
    /// Every place is taken, or none is free both now and after a restart.
    #[error(
        "domain {domain} has no free place for a disk on bus {bus}: {}; add {add} to its <devices> with \
         `virsh edit {domain}`, then shut it down and start it again{}",
        counts(.live, .persistent), other_bus(*.bus)
    )]
    NoFreeSlot {
        /// The domain.
        domain: String,
        /// The bus.
        bus: DiskBus,
        /// What the running domain has.
        live: Option<SlotCount>,
        /// What the domain has after a restart.
        persistent: Option<SlotCount>,
        /// The element that makes room.
        add: &'static str,
    },
}

/// Places for disks, counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SlotCount {
    /// All that a disk could use.
    pub(crate) total: usize,
    /// Those that are taken.
    pub(crate) used: usize,
    /// More that are there and have `hotplug='off'`.
    pub(crate) not_hotpluggable: usize,
}

impl fmt::Display for SlotCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} used, {} free", self.used, self.total, self.total - self.used)?;
        if self.not_hotpluggable > 0 {
            write!(f, " ({} more with hotplug='off')", self.not_hotpluggable)?;
        }
        Ok(())
    }
}

fn counts(live: &Option<SlotCount>, persistent: &Option<SlotCount>) -> String {
    match (live, persistent) {
        (Some(live), Some(persistent)) => {
            format!(
                "{live} in the running domain; {persistent} after a restart; the disk needs one that is free in both"
            )
        }
        (Some(count), None) | (None, Some(count)) => count.to_string(),
        (None, None) => "0 there".to_owned(),
    }
}

fn other_bus(bus: DiskBus) -> &'static str {
    match bus {
        DiskBus::Virtio => "; or attach with bus scsi, which needs no slot for each disk",
        DiskBus::Scsi => "",
    }
}

/// A target device and an address that are free in each definition that is given. Hand over those that the disk is put
/// into: `live` when the domain runs, `persistent` unless the disk is for the running domain only.
///
/// # Errors
/// When there is no such place, or another disk has the wished-for target device.
pub(crate) fn choose_place(
    options: &DiskOptions,
    live: Option<&DomainView>,
    persistent: Option<&DomainView>,
) -> Result<(TargetDevice, DiskAddress), PlaceError> {
    let target_device = choose_target_device(options, live, persistent)?;
    let address = match options.bus {
        DiskBus::Virtio => choose_pci_address(live, persistent)?,
        DiskBus::Scsi => choose_scsi_address(live, persistent)?,
    };
    Ok((target_device, address))
}

fn choose_target_device(
    options: &DiskOptions,
    live: Option<&DomainView>,
    persistent: Option<&DomainView>,
) -> Result<TargetDevice, PlaceError> {
    let taken = |device: &TargetDevice| {
        let views = [("running domain", live), ("persistent definition", persistent)];
        views.into_iter().find_map(|(name, view)| Some((name, view?.disk_by_target(device.as_str())?)))
    };
    if let Some(wish) = &options.target_device {
        return match taken(wish) {
            None => Ok(wish.clone()),
            Some((view, disk)) => {
                let source = disk.source.as_deref().unwrap_or("an empty drive or a network disk");
                let alias = disk.alias.as_deref().map(|alias| format!(", alias {alias}")).unwrap_or_default();
                let by = format!("a disk in the {view} ({source}{alias})");
                Err(PlaceError::TargetDeviceTaken { wish: wish.clone(), by })
            }
        };
    }
    (0..)
        .map_while(|index| TargetDevice::at(options.bus, index))
        .find(|device| taken(device).is_none())
        .ok_or_else(|| PlaceError::NoFreeTargetDevice { domain: name(live, persistent), bus: options.bus })
}

fn choose_pci_address(
    live: Option<&DomainView>,
    persistent: Option<&DomainView>,
) -> Result<DiskAddress, PlaceError> {
    let views = || live.into_iter().chain(persistent);
    let first = views().next().ok_or(PlaceError::NoDefinition)?;
    if let Some(view) = views().find(|view| !has_pci(view)) {
        return Err(PlaceError::UnsupportedMachine {
            domain: view.name.clone(),
            machine: view.machine.clone(),
            arch: view.arch.clone(),
        });
    }
    let places = |view| PciPlaces::of(view, live.is_some());
    let (live_places, persistent_places) = (live.map(places), persistent.map(places));
    common(live_places.as_ref().map(|p| &p.free), persistent_places.as_ref().map(|p| &p.free)).ok_or_else(
        || {
            let express = pci_controllers(first).any(|(controller, _)| controller.model == "pcie-root");
            PlaceError::NoFreeSlot {
                domain: first.name.clone(),
                bus: DiskBus::Virtio,
                live: live_places.map(|places| places.count()),
                persistent: persistent_places.map(|places| places.count()),
                add: if express { ROOT_PORT } else { PCI_BRIDGE },
            }
        },
    )
}

/// Channel I/O (s390) names disks by other addresses; its PCI bus takes other devices than disks.
fn has_pci(view: &DomainView) -> bool {
    let root = |model: &str| matches!(model, "pci-root" | "pcie-root");
    !view.arch.starts_with("s390") && pci_controllers(view).any(|(controller, _)| root(&controller.model))
}

fn pci_controllers(view: &DomainView) -> impl Iterator<Item = (&ControllerView, u8)> {
    let pci = view.controllers.iter().filter(|controller| controller.kind == "pci");
    pci.filter_map(|controller| Some((controller, u8::try_from(controller.index).ok()?)))
}

/// The PCI slots of one definition that can take a disk.
pub(super) struct PciPlaces {
    /// The free ones, the best first.
    pub(super) free: Vec<DiskAddress>,
    used: usize,
    not_hotpluggable: usize,
}

impl PciPlaces {
    /// `running`: the disk is plugged into a running domain, so ports with `hotplug='off'` do not count. Else they do,
    /// as the last choice: the disk could not be taken out again while the domain runs.
    pub(super) fn of(view: &DomainView, running: bool) -> Self {
        let mut ranked = Vec::new();
        let mut places = Self { free: Vec::new(), used: 0, not_hotpluggable: 0 };
        for (controller, bus) in pci_controllers(view) {
            let (rank, slots) = match controller.model.as_str() {
                "pcie-root-port" | "pcie-switch-downstream-port" => (0, 0..=0),
                "pci-root" => (1, 1..=LAST_SLOT),
                // Slot 0 is the bridge's own hot-plug controller.
                "pci-bridge" | "pcie-to-pci-bridge" => (2, 1..=LAST_SLOT),
                _ => continue,
            };
            if running && !controller.hotplug {
                places.not_hotpluggable += slots.count();
                continue;
            }
            for slot in slots {
                // Slot 1 of the old PC's bus 0 is its south bridge (PIIX3), also when the XML does not show it.
                let south_bridge = controller.model == "pci-root" && (bus, slot) == (0, 1);
                if south_bridge || view.pci.iter().any(|used| takes_slot(used, bus, slot)) {
                    places.used += 1;
                } else {
                    ranked.push((!controller.hotplug, rank, bus, slot));
                }
            }
        }
        ranked.sort_unstable();
        let address = |(_, _, bus, slot)| DiskAddress::Pci { domain: 0, bus, slot, function: 0 };
        places.free = ranked.into_iter().map(address).collect();
        places
    }

    fn count(&self) -> SlotCount {
        SlotCount {
            total: self.used + self.free.len(),
            used: self.used,
            not_hotpluggable: self.not_hotpluggable,
        }
    }
}

/// A device with one function takes the slot as a whole: no other can be plugged beside it.
fn takes_slot(used: &PciUse, bus: u8, slot: u8) -> bool {
    (used.domain, used.bus, used.slot) == (0, bus, slot)
}

fn choose_scsi_address(
    live: Option<&DomainView>,
    persistent: Option<&DomainView>,
) -> Result<DiskAddress, PlaceError> {
    if live.is_none() && persistent.is_none() {
        return Err(PlaceError::NoDefinition);
    }
    let (live_controllers, persistent_controllers) = (live.map(virtio_scsi), persistent.map(virtio_scsi));
    if common(live_controllers.as_ref(), persistent_controllers.as_ref()).is_none() {
        let views = [("running", live), ("after a restart", persistent)];
        let found =
            views.into_iter().filter_map(|(when, view)| Some(format!("{when}: {}", scsi_models(view?))));
        return Err(PlaceError::NoScsiController {
            domain: name(live, persistent),
            controllers: found.collect::<Vec<_>>().join(", "),
        });
    }
    let (live_units, persistent_units) = (live.map(free_units), persistent.map(free_units));
    common(live_units.as_ref(), persistent_units.as_ref()).ok_or_else(|| {
        let count = |view: &DomainView, free: &Vec<DiskAddress>| {
            let total = virtio_scsi(view).len() * (LAST_UNIT as usize + 1);
            SlotCount { total, used: total - free.len(), not_hotpluggable: 0 }
        };
        PlaceError::NoFreeSlot {
            domain: name(live, persistent),
            bus: DiskBus::Scsi,
            live: live.zip(live_units.as_ref()).map(|(view, free)| count(view, free)),
            persistent: persistent.zip(persistent_units.as_ref()).map(|(view, free)| count(view, free)),
            add: VIRTIO_SCSI,
        }
    })
}

/// The indices of the virtio-scsi controllers, in order.
fn virtio_scsi(view: &DomainView) -> Vec<u32> {
    let virtio =
        |model: &str| matches!(model, "virtio-scsi" | "virtio-transitional" | "virtio-non-transitional");
    let scsi =
        view.controllers.iter().filter(|controller| controller.kind == "scsi" && virtio(&controller.model));
    let mut indices: Vec<u32> = scsi.map(|controller| controller.index).collect();
    indices.sort_unstable();
    indices.dedup();
    indices
}

fn scsi_models(view: &DomainView) -> String {
    let scsi = view.controllers.iter().filter(|controller| controller.kind == "scsi");
    let models: Vec<String> = scsi.map(|found| format!("{} {}", found.index, found.model)).collect();
    if models.is_empty() { "none".to_owned() } else { models.join(" and ") }
}

/// The free units of target 0 on all virtio-scsi controllers, in order.
fn free_units(view: &DomainView) -> Vec<DiskAddress> {
    let unit = |controller| {
        (0..=LAST_UNIT).map(move |unit| DiskAddress::Drive { controller, bus: 0, target: 0, unit })
    };
    let used = |address: &DiskAddress| {
        view.drives.iter().any(|used: &DriveUse| used.bus == "scsi" && used.address == *address)
    };
    virtio_scsi(view).into_iter().flat_map(unit).filter(|address| !used(address)).collect()
}

/// The first that is in both lists; a list that is not given forbids nothing.
fn common<T: Copy + PartialEq>(first: Option<&Vec<T>>, second: Option<&Vec<T>>) -> Option<T> {
    match (first, second) {
        (Some(first), Some(second)) => first.iter().find(|item| second.contains(item)).copied(),
        (Some(only), None) | (None, Some(only)) => only.first().copied(),
        (None, None) => None,
    }
}

fn name(live: Option<&DomainView>, persistent: Option<&DomainView>) -> String {
    live.or(persistent).map(|view| view.name.clone()).unwrap_or_default()
}
