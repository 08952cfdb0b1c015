//! Tables of domains and the places that are chosen in them.

use tether_proto::{DiskBus, DiskOptions};

use super::place::PciPlaces;
use super::round_trips::{I440FX, Q35, plan};
use super::{DiskAddress, DomainView, PlaceError, SlotCount, choose_place};

fn view(xml: &str) -> DomainView {
    DomainView::parse(xml).unwrap()
}

/// A domain with these devices.
fn domain(devices: &str) -> DomainView {
    view(&format!(
        "<domain><name>d</name><os><type arch='x86_64' machine='pc'>hvm</type></os><devices>{devices}</devices></domain>"
    ))
}

fn pci(index: u32, model: &str) -> String {
    format!("<controller type='pci' index='{index}' model='{model}'/>")
}

fn device(bus: u8, slot: u8) -> String {
    format!(
        "<rng><address type='pci' domain='0x0000' bus='{bus:#04x}' slot='{slot:#04x}' function='0x0'/></rng>"
    )
}

fn options(bus: DiskBus, target_device: Option<&str>) -> DiskOptions {
    DiskOptions { bus, target_device: target_device.map(|name| name.parse().unwrap()), ..plan().options }
}

fn virtio(live: Option<&DomainView>, persistent: Option<&DomainView>) -> Result<(u8, u8), PlaceError> {
    match choose_place(&options(DiskBus::Virtio, None), live, persistent)?.1 {
        DiskAddress::Pci { domain: 0, bus, slot, function: 0 } => Ok((bus, slot)),
        other => panic!("{other:?}"),
    }
}

fn scsi(live: Option<&DomainView>, persistent: Option<&DomainView>) -> Result<(u32, u32), PlaceError> {
    match choose_place(&options(DiskBus::Scsi, None), live, persistent)?.1 {
        DiskAddress::Drive { controller, bus: 0, target: 0, unit } => Ok((controller, unit)),
        other => panic!("{other:?}"),
    }
}

/// How many more virtio disks the domain can take while it runs.
fn free_slots(view: &DomainView) -> usize {
    PciPlaces::of(view, true).free.len()
}

#[test]
fn f39_q35_gives_a_free_port_that_can_be_hot_plugged() {
    let q35 = view(Q35);
    // 1 to 4 are taken, 5 has hotplug='off', 6 is only the passed-through card's place on the host.
    assert_eq!(free_slots(&q35), 2);
    let (target_device, address) = choose_place(&plan().options, Some(&q35), Some(&q35)).unwrap();
    assert_eq!(target_device.as_str(), "vdb");
    assert_eq!(address, DiskAddress::Pci { domain: 0, bus: 6, slot: 0, function: 0 });
}

#[test]
fn f39_a_full_domain_is_told_how_many_slots_there_are_and_what_to_add() {
    let full = view(&Q35.replace(
        "</devices>\n  <seclabel",
        &format!("{}{}</devices>\n<seclabel", device(6, 0), device(7, 0)),
    ));
    assert_eq!(free_slots(&full), 0);
    let error = virtio(Some(&full), Some(&full)).unwrap_err();
    let count = Some(SlotCount { total: 6, used: 6, not_hotpluggable: 1 });
    assert!(
        matches!(&error, PlaceError::NoFreeSlot { live, persistent, .. } if *live == count && *persistent == count)
    );
    assert_eq!(
        error.to_string(),
        "domain web1 has no free place for a disk on bus virtio: 6 of 6 used, 0 free (1 more with hotplug='off') in the \
         running domain; 6 of 6 used, 0 free (1 more with hotplug='off') after a restart; the disk needs one that is free \
         in both; add <controller type='pci' model='pcie-root-port'/> to its <devices> with `virsh edit web1`, then shut \
         it down and start it again; or attach with bus scsi, which needs no slot for each disk"
    );
    // Stopped, the port without hot-plug does.
    assert_eq!(virtio(None, Some(&full)).unwrap(), (5, 0));
    assert_eq!(virtio(None, Some(&view(Q35))).unwrap(), (6, 0), "but only as the last choice");
}

#[test]
fn f39_the_slot_is_free_now_and_after_a_restart() {
    let root = pci(0, "pcie-root");
    let port = |index| pci(index, "pcie-root-port");
    let (one, two, three) = (port(1), port(2), port(3));
    let table = [
        (format!("{root}{one}{two}"), format!("{root}{one}{two}"), Some((1, 0))),
        (format!("{root}{one}{two}{}", device(1, 0)), format!("{root}{one}{two}"), Some((2, 0))),
        (format!("{root}{one}{two}"), format!("{root}{one}{two}{}", device(1, 0)), Some((2, 0))),
        (format!("{root}{one}"), format!("{root}{one}{two}{three}{}", device(1, 0)), None),
        (format!("{root}{one}"), format!("{root}{two}"), None),
        (root.clone(), format!("{root}{two}"), None),
    ];
    for (live, persistent, expected) in table {
        assert_eq!(
            virtio(Some(&domain(&live)), Some(&domain(&persistent))).ok(),
            expected,
            "{live} / {persistent}"
        );
    }
    let error = virtio(Some(&domain(&root)), Some(&domain(&format!("{root}{two}")))).unwrap_err().to_string();
    assert!(
        error.contains("0 of 0 used, 0 free in the running domain; 0 of 1 used, 1 free after a restart"),
        "{error}"
    );
}

#[test]
fn express_ports_come_before_bridges_and_their_first_slot_is_never_used() {
    let all =
        [pci(0, "pcie-root"), pci(1, "pcie-to-pci-bridge"), pci(2, "pcie-switch-downstream-port")].concat();
    assert_eq!(virtio(Some(&domain(&all)), None).unwrap(), (2, 0));
    assert_eq!(virtio(Some(&domain(&(all.clone() + &device(2, 0)))), None).unwrap(), (1, 1));
    assert_eq!(free_slots(&domain(&all)), 32);
    let useless = ["pcie-root", "pcie-switch-upstream-port", "dmi-to-pci-bridge", "pcie-expander-bus"];
    let useless: String = (0..).zip(useless).map(|(index, model)| pci(index, model)).collect();
    assert_eq!(free_slots(&domain(&useless)), 0);
}

#[test]
fn f39_an_old_pc_gives_a_free_slot_that_no_function_is_in() {
    let old = view(I440FX);
    // 1 PIIX3, 2 video, 3 network, 4 disk, 5 SCSI, 6 a card with function 1 only.
    assert_eq!(virtio(Some(&old), Some(&old)).unwrap(), (0, 7));
    assert_eq!(free_slots(&old), 25);
    let bare = domain(&pci(0, "pci-root"));
    assert_eq!(virtio(Some(&bare), None).unwrap(), (0, 2), "slot 1 is the PIIX3, shown or not");

    let mut full = pci(0, "pci-root");
    full.extend((2..=31).map(|slot| device(0, slot)));
    let error = virtio(Some(&domain(&full)), None).unwrap_err().to_string();
    assert!(
        error.contains("31 of 31 used, 0 free; add <controller type='pci' model='pci-bridge'/>"),
        "{error}"
    );
    assert_eq!(virtio(Some(&domain(&(full + &pci(1, "pci-bridge")))), None).unwrap(), (1, 1));
    let off = "<controller type='pci' index='0' model='pci-root'><target hotplug='off'/></controller>";
    assert_eq!(free_slots(&domain(off)), 0);
}

#[test]
fn machines_without_pci_are_told_so_and_take_scsi_all_the_same() {
    let s390 = "<domain><name>z</name><os><type arch='s390x' machine='s390-ccw-virtio-7.2'>hvm</type></os><devices>\
        <controller type='pci' index='0' model='pci-root'/><controller type='scsi' index='0' model='virtio-scsi'/>\
        </devices></domain>";
    for none in [view(s390), domain(""), domain("<controller type='virtio-mmio' index='0'/>")] {
        assert!(matches!(virtio(Some(&none), None), Err(PlaceError::UnsupportedMachine { .. })));
    }
    assert_eq!(scsi(Some(&view(s390)), None).unwrap(), (0, 0));
}

#[test]
fn scsi_takes_the_first_free_unit_and_avoids_the_names_of_other_buses() {
    let q35 = view(Q35);
    let (target_device, address) =
        choose_place(&options(DiskBus::Scsi, None), Some(&q35), Some(&q35)).unwrap();
    assert_eq!(target_device.as_str(), "sdb", "sda is the CD-ROM on SATA");
    // The CD-ROM's 0:0:0:0 is on the SATA controller; unit 1 has a passed-through device.
    assert_eq!(address, DiskAddress::Drive { controller: 0, bus: 0, target: 0, unit: 0 });
    let taken = "<disk><target dev='sdq' bus='scsi'/><address type='drive' controller='0' bus='0' target='0' unit='0'/></disk>";
    let busier = view(&Q35.replace("<controller type='usb'", &format!("{taken}<controller type='usb'")));
    assert_eq!(scsi(Some(&q35), Some(&busier)).unwrap(), (0, 2));
}

#[test]
fn f39_without_a_controller_scsi_says_what_to_add() {
    let old = view(I440FX);
    assert_eq!(
        scsi(Some(&old), Some(&domain(""))).unwrap_err().to_string(),
        "domain old-one has no virtio-scsi controller that the disk can be put on (running: 0 lsilogic, after a restart: \
         none); add <controller type='scsi' model='virtio-scsi'/> to its <devices> with `virsh edit old-one`, then shut it \
         down and start it again"
    );
    let (zero, one) = (
        "<controller type='scsi' index='0' model='virtio-scsi'/>",
        "<controller type='scsi' index='1' model='virtio-transitional'/>",
    );
    assert!(matches!(
        scsi(Some(&domain(zero)), Some(&domain(one))),
        Err(PlaceError::NoScsiController { .. })
    ));
    assert_eq!(scsi(Some(&domain(&format!("{zero}{one}"))), Some(&domain(one))).unwrap(), (1, 0));

    let unit = |unit| {
        format!("<hostdev><address type='drive' controller='0' bus='0' target='0' unit='{unit}'/></hostdev>")
    };
    let full: String = zero.to_owned() + &(0..=255).map(unit).collect::<String>();
    let error = scsi(Some(&domain(&full)), None).unwrap_err().to_string();
    assert!(error.contains("on bus scsi: 256 of 256 used, 0 free; add <controller type='scsi'"), "{error}");
    assert_eq!(scsi(Some(&domain(&format!("{full}{one}"))), None).unwrap(), (1, 0));
}

#[test]
fn a_wish_is_granted_when_it_is_free_in_both_and_else_refused_with_the_reason() {
    let (live, stopped) = (view(Q35), view(&Q35.replace("'vda'", "'vdc'")));
    let choose = |wish| {
        choose_place(&options(DiskBus::Virtio, wish), Some(&live), Some(&stopped)).map(|place| place.0)
    };
    assert_eq!(choose(None).unwrap().as_str(), "vdb");
    assert_eq!(choose(Some("vdx")).unwrap().as_str(), "vdx");
    for (wish, named) in
        [("vda", "the running domain (/var/lib"), ("vdc", "the persistent definition (/var/lib")]
    {
        let error = choose(Some(wish)).unwrap_err();
        assert!(
            matches!(&error, PlaceError::TargetDeviceTaken { wish: device, by } if device.as_str() == wish && by.contains(named))
        );
    }
    let error =
        choose_place(&options(DiskBus::Scsi, Some("sda")), Some(&live), None).unwrap_err().to_string();
    assert!(
        error.starts_with("target device sda is taken by a disk in the running domain (an empty drive"),
        "{error}"
    );
}

#[test]
fn no_definition_at_all_is_no_place() {
    for bus in [DiskBus::Virtio, DiskBus::Scsi] {
        assert_eq!(choose_place(&options(bus, None), None, None), Err(PlaceError::NoDefinition));
    }
}
