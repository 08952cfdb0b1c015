//! Writes the `<disk>` element of one attachment. Where it goes is decided in `place`; libvirt puts it there.

use std::path::{Component, Path};

use quick_xml::Writer;
use quick_xml::events::BytesText;
use tether_proto::AttachmentId;

use super::{DiskAddress, DiskPlan, DomainXmlError};

/// The alias of an attachment's disk. libvirt keeps aliases that begin with `ua-` as they are.
pub(crate) fn alias_of(attachment: AttachmentId) -> String {
    format!("ua-tether-{attachment}")
}

/// The `<disk>` element, on one line. The format is always raw: nothing looks into the volume for another (F4).
///
/// # Errors
/// When the device path is not a stable one below `/dev/disk/by-id` (F3).
pub(crate) fn disk_element(plan: &DiskPlan) -> Result<String, DomainXmlError> {
    check_device_path(&plan.device_path)?;
    let mut writer = Writer::new(Vec::new());
    write_disk(&mut writer, plan).map_err(DomainXmlError::Write)?;
    String::from_utf8(writer.into_inner())
        .map_err(|error| DomainXmlError::Write(std::io::Error::new(std::io::ErrorKind::InvalidData, error)))
}

fn write_disk(writer: &mut Writer<Vec<u8>>, plan: &DiskPlan) -> std::io::Result<()> {
    let options = &plan.options;
    let disk = writer.create_element("disk").with_attributes([("type", "block"), ("device", "disk")]);
    disk.write_inner_content(|writer| {
        let driver = [
            ("name", "qemu"),
            ("type", "raw"),
            ("cache", options.cache.as_str()),
            ("io", options.io.as_str()),
            ("discard", options.discard.as_str()),
        ];
        writer.create_element("driver").with_attributes(driver).write_empty()?;
        writer.create_element("source").with_attribute(("dev", plan.device_path.as_str())).write_empty()?;
        let target = [("dev", plan.target_device.as_str()), ("bus", options.bus.as_str())];
        writer.create_element("target").with_attributes(target).write_empty()?;
        if plan.read_only || options.read_only {
            writer.create_element("readonly").write_empty()?;
        }
        writer.create_element("serial").write_text_content(BytesText::new(plan.serial.as_str()))?;
        let alias = alias_of(plan.attachment);
        writer.create_element("alias").with_attribute(("name", alias.as_str())).write_empty()?;
        write_address(writer, plan.address)
    })?;
    Ok(())
}

fn write_address(writer: &mut Writer<Vec<u8>>, address: DiskAddress) -> std::io::Result<()> {
    let attributes = match address {
        DiskAddress::Pci { domain, bus, slot, function } => vec![
            ("type", "pci".to_owned()),
            ("domain", format!("{domain:#06x}")),
            ("bus", format!("{bus:#04x}")),
            ("slot", format!("{slot:#04x}")),
            ("function", format!("{function:#x}")),
        ],
        DiskAddress::Drive { controller, bus, target, unit } => vec![
            ("type", "drive".to_owned()),
            ("controller", controller.to_string()),
            ("bus", bus.to_string()),
            ("target", target.to_string()),
            ("unit", unit.to_string()),
        ],
    };
    let attributes = attributes.iter().map(|(name, value)| (*name, value.as_str()));
    writer.create_element("address").with_attributes(attributes).write_empty()?;
    Ok(())
}

/// A path in another root (a test's) is fine, as long as its end is `dev/disk/by-id/<name>`.
fn check_device_path(path: &str) -> Result<(), DomainXmlError> {
    let refuse = |problem| Err(DomainXmlError::DevicePath { path: path.to_owned(), problem });
    if !path.bytes().all(|byte| byte.is_ascii_graphic()) {
        return refuse("it has characters that no device path has");
    }
    if !path.starts_with('/') {
        return refuse("it is not absolute");
    }
    let plain = |component| matches!(component, Component::RootDir | Component::Normal(_));
    if !Path::new(path).components().all(plain) || path.contains("/./") || path.ends_with("/.") {
        return refuse("it has . or .. in it");
    }
    if path.ends_with('/')
        || !Path::new(path).parent().is_some_and(|folder| folder.ends_with("dev/disk/by-id"))
    {
        return refuse("it is not directly in /dev/disk/by-id");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::round_trips::plan;
    use super::*;

    #[test]
    fn f4_the_element_says_raw_and_all_that_was_asked_for() {
        let element = disk_element(&plan()).unwrap();
        assert_eq!(
            element,
            "<disk type=\"block\" device=\"disk\">\
             <driver name=\"qemu\" type=\"raw\" cache=\"none\" io=\"native\" discard=\"unmap\"/>\
             <source dev=\"/dev/disk/by-id/wwn-0x60014050000000000000000000000001\"/>\
             <target dev=\"vdb\" bus=\"virtio\"/>\
             <serial>vol-1</serial>\
             <alias name=\"ua-tether-67e55044-10b1-426f-9247-bb680e5fe0c8\"/>\
             <address type=\"pci\" domain=\"0x0000\" bus=\"0x07\" slot=\"0x00\" function=\"0x0\"/>\
             </disk>"
        );
    }

    #[test]
    fn a_disk_is_read_only_when_the_export_or_the_options_say_so() {
        for (export, options) in [(false, false), (true, false), (false, true), (true, true)] {
            let mut plan = plan();
            plan.read_only = export;
            plan.options.read_only = options;
            assert_eq!(disk_element(&plan).unwrap().contains("<readonly/>"), export || options);
        }
    }

    #[test]
    fn f3_only_stable_device_paths_are_written() {
        for bad in [
            "",
            "/",
            "/dev/sda",
            "/dev/disk/by-path/pci-1",
            "dev/disk/by-id/x",
            "/dev/disk/by-id",
            "/dev/disk/by-id/",
            "/dev/disk/by-id/x/",
            "/dev/disk/by-id/.",
            "/dev/disk/by-id/..",
            "/dev/disk/by-id/../../sda",
            "/dev/disk/by-id/./x",
            "/dev/disk/by-id/a b",
            "/dev/disk/by-id/a\nb",
            "/dev/disk/by-id/\u{0}",
            "/dev/disk/by-id/é",
        ] {
            let plan = DiskPlan { device_path: bad.to_owned(), ..plan() };
            assert!(matches!(disk_element(&plan), Err(DomainXmlError::DevicePath { .. })), "{bad:?}");
        }
    }

    #[test]
    fn what_a_path_may_have_is_escaped() {
        let plan = DiskPlan { device_path: "/dev/disk/by-id/a'\"<&>b".to_owned(), ..plan() };
        let element = disk_element(&plan).unwrap();
        assert!(element.contains("by-id/a&apos;&quot;&lt;&amp;&gt;b\""), "{element}");
    }
}
