//! Which of this host's disks are attached through targets named as Tether names them, by what sysfs says of each disk.

use std::path::Path;

use tether_proto::AttachmentId;

/// Is the block device with this folder in sysfs (its real path) one, or a partition of one? A target's name ends with the
/// attachment's id.
pub(super) fn is_attached(folder: &Path) -> bool {
    folder.ancestors().any(|ancestor| {
        let name = ancestor.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if !name.starts_with("session") {
            return false;
        }
        let file = ancestor.join("iscsi_session").join(name).join("targetname");
        let target = std::fs::read_to_string(file).unwrap_or_default();
        target.trim().rsplit(':').next().is_some_and(|id| id.parse::<AttachmentId>().is_ok())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f10_a_disk_is_attached_when_its_target_is_named_after_an_attachment() {
        let root = tempfile::tempdir().unwrap();
        let disk = |number: u32, target: &str| {
            let session = root.path().join(format!("devices/platform/host{number}/session{number}"));
            let class = session.join(format!("iscsi_session/session{number}"));
            std::fs::create_dir_all(&class).unwrap();
            std::fs::write(class.join("targetname"), format!("{target}\n")).unwrap();
            session.join(format!("target{number}:0:0/{number}:0:0:0/block/sd{number}"))
        };
        let ours = disk(3, "iqn.2026-11.io.example:5f1c0e0a-7d1f-4a53-9d3c-0b7f3c0f7d11");
        assert!(is_attached(&ours) && is_attached(&ours.join("sd31")));
        assert!(!is_attached(&disk(4, "iqn.2003-01.org.linux-iscsi.host:sn.1234")));
        assert!(!is_attached(&root.path().join("devices/pci0000:00/virtio0/block/vda")));
    }
}
