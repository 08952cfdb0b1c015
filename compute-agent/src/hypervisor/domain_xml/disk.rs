//! Writes the `<disk>` element of one attachment. Where it goes is decided in `place`; libvirt puts it there.

use std::path::{Component, Path};

use quick_xml::Writer;
use quick_xml::events::BytesText;
use tether_proto::{AttachmentId, VolumeFormat};

use super::{DiskAddress, DiskKind, DiskPlan, DomainXmlError};

/// What the aliases of our disks begin with.
pub(crate) const ALIAS_PREFIX: &str = "ua-tether-";

/// The alias of an attachment's disk. libvirt keeps aliases that begin with `ua-` as they are.
pub(crate) fn alias_of(attachment: AttachmentId) -> String {
    format!("{ALIAS_PREFIX}{attachment}")
}

/// The attachment of an alias; none of a disk that is not ours.
pub(crate) fn attachment_of(alias: &str) -> Option<AttachmentId> {
    alias.strip_prefix(ALIAS_PREFIX)?.parse().ok()
}

/// The `<disk>` element, on one line. It says the format that was stored: nothing looks into the volume for another, nor for
/// a backing file (F4).
///
/// A file is on a server that may go away: the guest is paused on an error and does not see it. Nobody changes the file's
/// owner: it is the storage host's business who may open it, and root is nobody on a share.
///
/// # Errors
/// When the device path is neither a stable one below `/dev/disk/by-id` (F3) nor a file of a mount.
pub(crate) fn disk_element(plan: &DiskPlan) -> Result<String, DomainXmlError> {
    check_device_path(&plan.device_path, plan.kind)?;
    let mut writer = Writer::new(Vec::new());
    write_disk(&mut writer, plan).map_err(DomainXmlError::Write)?;
    String::from_utf8(writer.into_inner())
        .map_err(|error| DomainXmlError::Write(std::io::Error::new(std::io::ErrorKind::InvalidData, error)))
}

fn write_disk(writer: &mut Writer<Vec<u8>>, plan: &DiskPlan) -> std::io::Result<()> {
    let options = &plan.options;
    let (kind, source, format) = match plan.kind {
        DiskKind::Block => ("block", "dev", VolumeFormat::Raw),
        DiskKind::File(format) => ("file", "file", format),
    };
    let disk = writer.create_element("disk").with_attributes([("type", kind), ("device", "disk")]);
    disk.write_inner_content(|writer| {
        let mut driver = vec![
            ("name", "qemu"),
            ("type", format.as_str()),
            ("cache", options.cache.as_str()),
            ("io", plan.io().as_str()),
            ("discard", plan.discard().as_str()),
        ];
        if kind == "file" {
            driver.extend([("error_policy", "stop"), ("rerror_policy", "stop")]);
        }
        writer.create_element("driver").with_attributes(driver).write_empty()?;
        let source = writer.create_element("source").with_attribute((source, plan.device_path.as_str()));
        if kind == "file" {
            source.write_inner_content(|writer| {
                let label = [("model", "dac"), ("relabel", "no")];
                writer.create_element("seclabel").with_attributes(label).write_empty().map(drop)
            })?;
            // The end of the chain, whatever a header says.
            writer.create_element("backingStore").write_empty()?;
        } else {
            source.write_empty()?;
        }
        let target = [("dev", plan.target_device.as_str()), ("bus", options.bus.as_str())];
        writer.create_element("target").with_attributes(target).write_empty()?;
        if plan.read_only || options.read_only {
            writer.create_element("readonly").write_empty()?;
        } else if plan.shareable {
            // Several guests write to it: QEMU takes no exclusive lock, and libvirt knows.
            writer.create_element("shareable").write_empty()?;
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

/// A path in another root (a test's) is fine, as long as its end is `dev/disk/by-id/<name>` or `mnt/<mount>/<file>`.
fn check_device_path(path: &str, kind: DiskKind) -> Result<(), DomainXmlError> {
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
    let folder = Path::new(path).parent().filter(|_| !path.ends_with('/'));
    match kind {
        DiskKind::Block if !folder.is_some_and(|folder| folder.ends_with("dev/disk/by-id")) => {
            refuse("it is not directly in /dev/disk/by-id")
        }
        DiskKind::File(_) if !folder.and_then(Path::parent).is_some_and(|folder| folder.ends_with("mnt")) => {
            refuse("it is not directly in a mount of the agent's mnt directory")
        }
        DiskKind::Block | DiskKind::File(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::round_trips::plan;
    use super::*;
    use tether_proto::{DiskDiscard, DiskOptions};

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
    fn f4_a_file_has_its_stored_format_no_backing_file_and_keeps_its_owner() {
        let path = "/var/lib/tether/compute-agent/mnt/0f/v1.qcow2".to_owned();
        let plan = DiskPlan { device_path: path, kind: DiskKind::File(VolumeFormat::Qcow2), ..plan() };
        let plan = DiskPlan { options: DiskOptions { io: None, ..plan.options.clone() }, ..plan };
        assert_eq!(
            disk_element(&plan).unwrap(),
            "<disk type=\"file\" device=\"disk\">\
             <driver name=\"qemu\" type=\"qcow2\" cache=\"none\" io=\"threads\" discard=\"unmap\" \
             error_policy=\"stop\" rerror_policy=\"stop\"/>\
             <source file=\"/var/lib/tether/compute-agent/mnt/0f/v1.qcow2\">\
             <seclabel model=\"dac\" relabel=\"no\"/></source><backingStore/>\
             <target dev=\"vdb\" bus=\"virtio\"/>\
             <serial>vol-1</serial>\
             <alias name=\"ua-tether-67e55044-10b1-426f-9247-bb680e5fe0c8\"/>\
             <address type=\"pci\" domain=\"0x0000\" bus=\"0x07\" slot=\"0x00\" function=\"0x0\"/>\
             </disk>"
        );
    }

    #[test]
    fn a_file_keeps_its_space_unless_discards_are_asked_for() {
        let discard = |plan: &DiskPlan| disk_element(plan).unwrap().contains("discard=\"unmap\"");
        let thick = DiskPlan { keep_allocated: true, ..plan() };
        assert!(discard(&plan()) && !discard(&thick));
        let options = DiskOptions { discard: Some(DiskDiscard::Unmap), ..thick.options.clone() };
        assert!(discard(&DiskPlan { options, ..thick }));
    }

    #[test]
    fn only_files_directly_in_a_mount_are_written() {
        for bad in [
            "/mnt/v1.raw",
            "/srv/x/v1.raw",
            "/mnt/x/y/v1.raw",
            "/mnt/x/../v1.raw",
            "/mnt/x/",
            "mnt/x/v1.raw",
            "/mnt/x/a b",
            "/dev/disk/by-id/wwn-0x6",
        ] {
            let kind = DiskKind::File(VolumeFormat::Raw);
            let plan = DiskPlan { device_path: bad.to_owned(), kind, ..plan() };
            assert!(matches!(disk_element(&plan), Err(DomainXmlError::DevicePath { .. })), "{bad:?}");
        }
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
    fn a_disk_of_several_writers_is_shareable() {
        let shared = DiskPlan { shareable: true, ..plan() };
        assert!(disk_element(&shared).unwrap().contains("<shareable/>"));
        assert!(!disk_element(&plan()).unwrap().contains("shareable"));
        let reader = DiskPlan { read_only: true, ..shared };
        assert!(!disk_element(&reader).unwrap().contains("shareable"));
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
