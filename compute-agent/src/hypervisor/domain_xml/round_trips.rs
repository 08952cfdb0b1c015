//! Properties over made-up XML, and what the tests of this folder share: two domains as `virsh dumpxml` prints them and
//! a plan.

use proptest::prelude::*;
use tether_proto::{
    AttachmentId, DiskBus, DiskCache, DiskDiscard, DiskIo, DiskOptions, TargetDevice, VolumeFormat,
};

use super::{DiskAddress, DiskKind, DiskPlan, DomainView, alias_of, disk_element};

pub(super) const Q35: &str = include_str!("fixtures/q35.xml");
pub(super) const I440FX: &str = include_str!("fixtures/i440fx.xml");

/// A plan with nothing special in it.
pub(super) fn plan() -> DiskPlan {
    DiskPlan {
        attachment: "67e55044-10b1-426f-9247-bb680e5fe0c8".parse().unwrap(),
        options: DiskOptions {
            bus: DiskBus::Virtio,
            target_device: None,
            cache: DiskCache::None,
            io: Some(DiskIo::Native),
            discard: None,
            read_only: false,
            serial: None,
            live_only: false,
        },
        device_path: "/dev/disk/by-id/wwn-0x60014050000000000000000000000001".to_owned(),
        kind: DiskKind::Block,
        serial: "vol-1".parse().unwrap(),
        read_only: false,
        shareable: false,
        keep_allocated: false,
        target_device: "vdb".parse().unwrap(),
        address: DiskAddress::Pci { domain: 0, bus: 7, slot: 0, function: 0 },
    }
}

/// A domain with one more device at the end.
fn with_disk(xml: &str, element: &str) -> String {
    // What follows a made-up domain's own <devices> is known; made-up content may hold such a tag, too.
    let at = xml.rfind("</devices><x>").or_else(|| xml.rfind("</devices>")).unwrap();
    [&xml[..at], element, &xml[at..]].concat()
}

fn addresses() -> impl Strategy<Value = DiskAddress> {
    prop_oneof![
        any::<(u16, u8, u8, u8)>().prop_map(|(domain, bus, slot, function)| DiskAddress::Pci {
            domain,
            bus,
            slot,
            function
        }),
        any::<(u32, u32, u32, u32)>().prop_map(|(controller, bus, target, unit)| DiskAddress::Drive {
            controller,
            bus,
            target,
            unit
        }),
    ]
}

fn plans() -> impl Strategy<Value = DiskPlan> {
    let options = (
        prop_oneof![Just(DiskBus::Virtio), Just(DiskBus::Scsi)],
        prop_oneof![
            Just(DiskCache::None),
            Just(DiskCache::Writethrough),
            Just(DiskCache::Writeback),
            Just(DiskCache::Directsync)
        ],
        prop::option::of(prop_oneof![Just(DiskIo::Native), Just(DiskIo::Threads), Just(DiskIo::IoUring)]),
        prop::option::of(prop_oneof![Just(DiskDiscard::Unmap), Just(DiskDiscard::Ignore)]),
        any::<bool>(),
    );
    let kind = prop_oneof![
        Just(DiskKind::Block),
        Just(DiskKind::File(VolumeFormat::Raw)),
        Just(DiskKind::File(VolumeFormat::Qcow2))
    ];
    let rest =
        (1u128.., "[!-.0-~]{3,40}", "[a-zA-Z0-9_.+-]{1,20}", any::<bool>(), 0usize..18000, addresses());
    (options, kind, rest).prop_map(
        |((bus, cache, io, discard, read_only), kind, (id, name, serial, export, index, address))| {
            let folder = if kind == DiskKind::Block { "dev/disk/by-id" } else { "mnt/0f" };
            let uuid = format!("{id:032x}");
            let uuid = [&uuid[..8], &uuid[8..12], &uuid[12..16], &uuid[16..20], &uuid[20..]].join("-");
            DiskPlan {
                attachment: uuid.parse::<AttachmentId>().unwrap(),
                options: DiskOptions { bus, cache, io, discard, read_only, ..plan().options },
                device_path: format!("/{folder}/{name}"),
                kind,
                serial: serial.parse().unwrap(),
                read_only: export,
                shareable: !export,
                keep_allocated: export,
                target_device: TargetDevice::at(bus, index).unwrap(),
                address,
            }
        },
    )
}

/// A piece of well-formed content: text, comments, CDATA, references, processing instructions and elements with odd
/// names, quotes and spaces.
fn content() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        "[ \t\r\n]{0,6}",
        "[a-zé—\u{a0} ]{0,8}",
        "<!--( |[a-z<>&'\"é]){0,8}-->",
        "<!\\[CDATA\\[[a-z<>&'\" é]{0,8}\\]\\]>",
        "<\\?[a-w]{1,4} [a-z<>&'\" ]{0,8}\\?>",
        "&(amp|lt|gt|apos|quot|#10|#x41);",
        r#"<[A-Za-z]{1,3}(:[A-Za-z]{1,3})?( a = '[a-z">&&[^&]]{0,4}')?( B="[a-z'>é]{0,4}&amp;")?[ \n]{0,2}/>"#,
        Just("<disk type='file'><source file='x'/></disk>".to_owned()),
        Just("<devices/>".to_owned()),
    ];
    leaf.prop_recursive(4, 40, 6, |inner| {
        let name = "(devices|disk|alias|domain|[A-Za-z_]{1,4}:[A-Za-z]{1,4}|é[a-z]{0,2})";
        let attributes = r#"( xmlns:x='urn:[a-z]{1,3}')?( name="[A-Za-z]{0,3}")?[ \n\t]{0,2}"#;
        (name, attributes, prop::collection::vec(inner, 0..6), "[ \n]{0,2}").prop_map(
            |(name, attributes, inner, space)| {
                format!("<{name}{attributes}>{}</{name}{space}>", inner.concat())
            },
        )
    })
}

/// A domain with such content in every place.
fn domains() -> impl Strategy<Value = String> {
    // A target `xml` is no processing instruction (XML 1.0 section 2.6), so none has an x.
    let outside = || "([ \r\n]|<!-- [a-z]{0,3} -->|<\\?[a-w]{1,3} x\\?>){0,3}";
    let head = (prop::option::of(Just("<?xml version='1.0' encoding=\"utf-8\"?>")), outside(), content());
    (head, prop::collection::vec(content(), 0..6), content(), outside()).prop_map(
        |((declaration, before, head), devices, tail, after)| {
            let declaration = declaration.unwrap_or_default();
            let devices = devices.concat();
            // Wrapped, so that the made-up parts do not become the domain's own <devices>.
            format!(
                "{declaration}{before}<domain type='kvm'><metadata>{head}</metadata><name>d</name>\
                 <devices >{devices}</devices><x>{tail}</x></domain>{after}"
            )
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn f38_a_disk_is_found_byte_for_byte_among_parts_that_we_do_not_know(xml in domains(), plan in plans()) {
        let element = disk_element(&plan).unwrap();
        let view = DomainView::parse(&with_disk(&xml, &element)).unwrap();
        prop_assert_eq!(&view.disk_by_alias(&alias_of(plan.attachment)).unwrap().element, &element);
        prop_assert!(DomainView::parse(&xml).unwrap().disk_by_alias(&alias_of(plan.attachment)).is_none());
    }

    #[test]
    fn a_written_disk_is_read_back_with_the_same_values(plan in plans()) {
        let element = disk_element(&plan).unwrap();
        let view = DomainView::parse(&with_disk(Q35, &element)).unwrap();
        let disk = view.disk_by_alias(&alias_of(plan.attachment)).unwrap();
        prop_assert_eq!(&disk.element, &element);
        prop_assert_eq!(disk.source.as_deref(), Some(plan.device_path.as_str()));
        prop_assert_eq!(disk.serial.as_deref(), Some(plan.serial.as_str()));
        prop_assert_eq!(disk.address, Some(plan.address));
        prop_assert_eq!(disk.read_only, plan.read_only || plan.options.read_only);
        let target = (disk.target_device.as_str(), disk.bus.as_str(), disk.format.as_deref());
        let format = if plan.kind == DiskKind::File(VolumeFormat::Qcow2) { "qcow2" } else { "raw" };
        prop_assert_eq!(target, (plan.target_device.as_str(), plan.options.bus.as_str(), Some(format)));
        let driver = (disk.cache.as_deref(), disk.io.as_deref(), disk.discard.as_deref());
        let options = &plan.options;
        prop_assert_eq!(
            driver,
            (Some(options.cache.as_str()), Some(plan.io().as_str()), Some(plan.discard().as_str()))
        );
    }

    #[test]
    fn arbitrary_text_never_panics(xml in any::<String>(), markup in "[<>/!?a-c='\"&;\\[\\]é\u{feff} -]{0,60}") {
        for text in [&xml, &markup, &format!("<domain><name>d</name><devices>{markup}</devices></domain>")] {
            drop(DomainView::parse(text));
        }
    }

    #[test]
    fn damaged_domains_never_panic(at in 0usize..Q35.len(), length in 0usize..40, put in "[<>/'\"&é ]{0,3}") {
        let boundary = |mut at: usize| { while !Q35.is_char_boundary(at) { at -= 1; } at };
        let (start, end) = (boundary(at), boundary((at + length).min(Q35.len())));
        let damaged = [&Q35[..start], &put, &Q35[end..]].concat();
        if let Ok(view) = DomainView::parse(&damaged) {
            drop(super::choose_place(&plan().options, Some(&view), None));
        }
    }

    #[test]
    fn addresses_survive_the_journal(address in addresses()) {
        let text = serde_json::to_string(&address).unwrap();
        prop_assert_eq!(serde_json::from_str::<DiskAddress>(&text).unwrap(), address);
    }
}
