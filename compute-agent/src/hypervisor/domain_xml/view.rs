//! What a domain's XML says about its disks, its controllers and the places that are taken. Only reads; where a new disk
//! goes is decided in `place`.

use super::scan::{self, Element};
use super::{DiskAddress, DomainXmlError};

/// One domain XML, live or persistent, as far as disks are concerned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DomainView {
    /// The domain's name.
    pub(crate) name: String,
    /// The domain's UUID; XML that libvirt has not seen yet may have none.
    pub(crate) uuid: Option<String>,
    /// `x86_64`, `s390x` …; empty when it is not said.
    pub(crate) arch: String,
    /// `pc-q35-7.2` …; empty when it is not said.
    pub(crate) machine: String,
    /// All disks, CD-ROM and floppy drives too.
    pub(crate) disks: Vec<DiskView>,
    /// All controllers.
    pub(crate) controllers: Vec<ControllerView>,
    /// The PCI functions in the guest that are taken, by whatever device.
    pub(crate) pci: Vec<PciUse>,
    /// The places on disk controllers that are taken, by disks and by passed-through devices.
    pub(crate) drives: Vec<DriveUse>,
}

/// One disk of a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DiskView {
    /// `<target dev>`.
    pub(crate) target_device: String,
    /// `<target bus>`; empty when it is not said.
    pub(crate) bus: String,
    /// `<source dev>`, or `<source file>` of a file; `None` for network disks and empty drives.
    pub(crate) source: Option<String>,
    /// `<alias name>`.
    pub(crate) alias: Option<String>,
    /// `<serial>`.
    pub(crate) serial: Option<String>,
    /// The PCI or drive address.
    pub(crate) address: Option<DiskAddress>,
    /// `<driver type>`: `raw`, `qcow2` …
    pub(crate) format: Option<String>,
    /// `<driver cache>`.
    pub(crate) cache: Option<String>,
    /// `<driver io>`.
    pub(crate) io: Option<String>,
    /// `<driver discard>`.
    pub(crate) discard: Option<String>,
    /// `<readonly/>` is there.
    pub(crate) read_only: bool,
    /// The element as it stands in the XML, to the byte.
    pub(crate) element: String,
}

/// One controller of a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ControllerView {
    /// `pci`, `scsi`, `sata` …
    pub(crate) kind: String,
    /// `pcie-root-port`, `virtio-scsi` …; empty when it is not said.
    pub(crate) model: String,
    /// The controller's number among its kind; for PCI the number of its bus.
    pub(crate) index: u32,
    /// Not with `<target hotplug='off'/>`.
    pub(crate) hotplug: bool,
}

/// A PCI function that is taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PciUse {
    /// The name of the device's element.
    pub(crate) device: String,
    /// The PCI domain.
    pub(crate) domain: u16,
    /// The bus.
    pub(crate) bus: u8,
    /// The slot.
    pub(crate) slot: u8,
    /// The function.
    pub(crate) function: u8,
}

/// A place on a disk controller that is taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DriveUse {
    /// `scsi`, `sata`, `ide`, `fdc` …: each kind of bus has controllers of its own.
    pub(crate) bus: String,
    /// The place, a [`DiskAddress::Drive`].
    pub(crate) address: DiskAddress,
}

impl DomainView {
    /// Reads what `virsh dumpxml` prints. Elements that are not known are passed over.
    ///
    /// # Errors
    /// When it is not one well-formed `<domain>`, has no name, or has an address that cannot be read.
    pub(crate) fn parse(xml: &str) -> Result<Self, DomainXmlError> {
        let domain = scan::document(xml, "domain")?;
        let text = |element: &str| domain.child(element).map(|child| child.text.trim().to_owned());
        let system = domain.child("os").and_then(|os| os.child("type"));
        let said =
            |attribute| system.and_then(|system| system.attribute(attribute)).unwrap_or_default().to_owned();
        let mut view = Self {
            name: text("name")
                .filter(|name| !name.is_empty())
                .ok_or(DomainXmlError::Missing { element: "name" })?,
            uuid: text("uuid"),
            arch: said("arch"),
            machine: said("machine"),
            disks: Vec::new(),
            controllers: Vec::new(),
            pci: Vec::new(),
            drives: Vec::new(),
        };
        for device in domain.children("devices").flat_map(|devices| &devices.children) {
            view.take_address(device)?;
            match device.name.as_str() {
                "disk" => view.disks.push(DiskView::read(device, &xml[device.range.clone()])?),
                "controller" => view.controllers.extend(ControllerView::read(device)?),
                _ => {}
            }
        }
        Ok(view)
    }

    /// The disk with this alias.
    pub(crate) fn disk_by_alias(&self, alias: &str) -> Option<&DiskView> {
        self.disks.iter().find(|disk| disk.alias.as_deref() == Some(alias))
    }

    /// The disk with this target device.
    pub(crate) fn disk_by_target(&self, target_device: &str) -> Option<&DiskView> {
        self.disks.iter().find(|disk| disk.target_device == target_device)
    }

    fn take_address(&mut self, device: &Element) -> Result<(), DomainXmlError> {
        match address(device)? {
            Some(DiskAddress::Pci { domain, bus, slot, function }) => {
                self.pci.push(PciUse { device: device.name.clone(), domain, bus, slot, function });
            }
            Some(address) => {
                // A passed-through SCSI device sits on a SCSI controller and has no <target bus>.
                let bus = device.child_attribute("target", "bus").unwrap_or("scsi").to_owned();
                self.drives.push(DriveUse { bus, address });
            }
            None => {}
        }
        Ok(())
    }
}

impl DiskView {
    fn read(disk: &Element, element: &str) -> Result<Self, DomainXmlError> {
        let said = |child, attribute| disk.child_attribute(child, attribute).map(ToOwned::to_owned);
        Ok(Self {
            target_device: said("target", "dev").unwrap_or_default(),
            bus: said("target", "bus").unwrap_or_default(),
            source: said("source", "dev").or_else(|| said("source", "file")),
            alias: alias(disk).map(ToOwned::to_owned),
            serial: disk.child("serial").map(|serial| serial.text.trim().to_owned()),
            address: address(disk)?,
            format: said("driver", "type"),
            cache: said("driver", "cache"),
            io: said("driver", "io"),
            discard: said("driver", "discard"),
            read_only: disk.child("readonly").is_some(),
            element: element.to_owned(),
        })
    }
}

impl ControllerView {
    /// `None` for a controller without an index, which libvirt has not numbered yet.
    fn read(controller: &Element) -> Result<Option<Self>, DomainXmlError> {
        if controller.attribute("index").is_none() {
            return Ok(None);
        }
        Ok(Some(Self {
            kind: controller.attribute("type").unwrap_or_default().to_owned(),
            model: controller.attribute("model").unwrap_or_default().to_owned(),
            index: number(controller, "index")?,
            hotplug: controller.child_attribute("target", "hotplug") != Some("off"),
        }))
    }
}

/// The alias of a device.
pub(super) fn alias(device: &Element) -> Option<&str> {
    device.child_attribute("alias", "name")
}

/// The place in the guest: the `<address>` directly in the device. One in its `<source>` is the place on the host.
fn address(device: &Element) -> Result<Option<DiskAddress>, DomainXmlError> {
    for address in device.children("address") {
        match address.attribute("type") {
            // Without numbers it is a wish that libvirt has not filled in.
            Some("pci") if address.attribute("bus").is_some() || address.attribute("slot").is_some() => {
                return Ok(Some(DiskAddress::Pci {
                    domain: number(address, "domain")?,
                    bus: number(address, "bus")?,
                    slot: number(address, "slot")?,
                    function: number(address, "function")?,
                }));
            }
            Some("drive") => {
                return Ok(Some(DiskAddress::Drive {
                    controller: number(address, "controller")?,
                    bus: number(address, "bus")?,
                    target: number(address, "target")?,
                    unit: number(address, "unit")?,
                }));
            }
            _ => {}
        }
    }
    Ok(None)
}

/// A number in decimal or, with `0x`, hexadecimal digits. What is left out is 0, as for libvirt.
fn number<N: TryFrom<u32>>(element: &Element, attribute: &'static str) -> Result<N, DomainXmlError> {
    let text = element.attribute(attribute).unwrap_or("0");
    let number = match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => text.parse(),
    };
    number.ok().and_then(|number| N::try_from(number).ok()).ok_or_else(|| DomainXmlError::Number {
        element: element.name.clone(),
        attribute,
        value: text.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::super::round_trips::{I440FX, Q35};
    use super::*;

    #[test]
    fn a_q35_domain_is_read_as_libvirt_prints_it() {
        let view = DomainView::parse(Q35).unwrap();
        assert_eq!(
            (view.name.as_str(), view.arch.as_str(), view.machine.as_str()),
            ("web1", "x86_64", "pc-q35-7.2")
        );
        assert_eq!(view.uuid.as_deref(), Some("4dea22b3-1d52-d8f3-2516-782e98ab3fa0"));
        let targets: Vec<_> = view.disks.iter().map(|disk| disk.target_device.as_str()).collect();
        assert_eq!(targets, ["vda", "sda"]);
        let disk = view.disk_by_alias("virtio-disk0").unwrap();
        assert_eq!(disk.source.as_deref(), Some("/var/lib/libvirt/images/web1.qcow2"));
        assert_eq!(disk.address, Some(DiskAddress::Pci { domain: 0, bus: 4, slot: 0, function: 0 }));
        assert!(
            disk.element.starts_with("<disk type='file' device='disk'>") && disk.element.ends_with("</disk>")
        );
        assert!(Q35.contains(&disk.element));
        assert!(view.disk_by_target("sda").unwrap().read_only);
        let port = |index| view.controllers.iter().find(|c| c.kind == "pci" && c.index == index).unwrap();
        assert_eq!((port(0).model.as_str(), port(5).hotplug, port(6).hotplug), ("pcie-root", false, true));
    }

    #[test]
    fn f39_places_in_the_guest_are_counted_and_places_on_the_host_are_not() {
        let view = DomainView::parse(Q35).unwrap();
        assert!(
            view.pci.iter().all(|used| used.bus != 6),
            "bus 6 is the passed-through card's place on the host"
        );
        assert!(view.pci.iter().any(|used| (used.device.as_str(), used.bus) == ("interface", 1)));
        let scsi: Vec<_> =
            view.drives.iter().filter(|used| used.bus == "scsi").map(|used| used.address).collect();
        assert_eq!(scsi, [DiskAddress::Drive { controller: 0, bus: 0, target: 0, unit: 1 }]);
        let old = DomainView::parse(I440FX).unwrap();
        let buses: Vec<_> = old.drives.iter().map(|used| used.bus.as_str()).collect();
        assert_eq!(buses, ["ide", "fdc"]);
        assert!(old.pci.iter().any(|used| (used.slot, used.function) == (6, 1)));
    }

    #[test]
    fn numbers_are_read_as_libvirt_writes_them_or_refused() {
        let with = |address: &str| {
            DomainView::parse(&format!(
                "<domain><name>a</name><devices><sound><address type='pci' {address}/></sound></devices></domain>"
            ))
        };
        assert_eq!(with("bus='0xff' slot='31'").unwrap().pci[0].bus, 255);
        assert!(with("").unwrap().pci.is_empty());
        for bad in ["bus='0x100'", "bus='-1'", "bus='1' slot='x'", "bus=''", "bus='0x'", "slot='99999999999'"]
        {
            let error = with(bad).expect_err(bad);
            assert!(matches!(error, DomainXmlError::Number { .. }), "{bad}: {error}");
        }
    }

    #[test]
    fn what_is_no_domain_is_refused() {
        for bad in
            ["<domain/>", "<domain><name/></domain>", "<domain><metadata><name>x</name></metadata></domain>"]
        {
            assert!(
                matches!(DomainView::parse(bad), Err(DomainXmlError::Missing { element: "name" })),
                "{bad}"
            );
        }
        assert!(matches!(
            DomainView::parse("<network><name>x</name></network>"),
            Err(DomainXmlError::WrongRoot { .. })
        ));
    }
}
