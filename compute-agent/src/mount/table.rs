//! What the kernel says of mounts, without touching one: `/proc/self/mountinfo` and `/proc/fs/nfsfs/volumes`. Text in,
//! values out; a server that is away does not hold up a read of these.

use std::path::{Path, PathBuf};

use procfs_core::FromRead;
use procfs_core::process::{MountInfo, MountInfos};
use tether_proto::FileSystemId;

/// What is mounted on a directory, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mounted {
    /// `nfs4` …
    pub(crate) kind: String,
    /// `192.0.2.1:/srv/share`.
    pub(crate) source: String,
    /// `MAJOR:MINOR` of the file system, as `st_dev` tells it.
    pub(crate) device: String,
    /// Those of the file system and those of this mount of it.
    options: Vec<String>,
}

impl Mounted {
    /// Is it mounted with an option that begins so, `lookupcache=`?
    pub(crate) fn has_any(&self, beginning: &str) -> bool {
        self.options.iter().any(|known| known.starts_with(beginning))
    }

    /// Is it mounted with this option, `hard` or `vers=4.2`?
    pub(crate) fn has(&self, option: &str) -> bool {
        self.options.iter().any(|known| known == option)
    }
}

/// The mount that a path to this directory leads into: the last one on it (proc_pid_mountinfo(5)).
///
/// # Errors
/// When the text is no mountinfo.
pub(crate) fn mounted_on(mountinfo: &str, directory: &Path) -> Result<Option<Mounted>, String> {
    let MountInfos(mounts) = MountInfos::from_read(mountinfo.as_bytes())
        .map_err(|error| format!("mountinfo is not as documented: {error}"))?;
    Ok(mounts.into_iter().rev().find(|mount| mount.mount_point == directory).map(read))
}

/// All NFS mounts: where they are, and what is mounted there.
///
/// # Errors
/// When the text is no mountinfo.
pub(crate) fn all_nfs(mountinfo: &str) -> Result<Vec<(PathBuf, Mounted)>, String> {
    let MountInfos(mounts) = MountInfos::from_read(mountinfo.as_bytes())
        .map_err(|error| format!("mountinfo is not as documented: {error}"))?;
    let nfs = mounts.into_iter().filter(|mount| mount.fs_type.starts_with("nfs"));
    Ok(nfs.map(|mount| (mount.mount_point.clone(), read(mount))).collect())
}

fn read(mount: MountInfo) -> Mounted {
    let MountInfo { fs_type, mount_source, majmin, super_options, mount_options, .. } = mount;
    let option = |(name, value): (String, Option<String>)| match value {
        Some(value) => format!("{name}={value}"),
        None => name,
    };
    Mounted {
        kind: fs_type,
        source: mount_source.unwrap_or_default(),
        device: majmin,
        options: super_options.into_iter().chain(mount_options).map(option).collect(),
    }
}

/// Does the server show this file system at the device (`nfs_volume_list_show` in the kernel's fs/nfs/client.c: a heading,
/// then `NV SERVER PORT DEV FSID FSC`)?
pub(crate) fn has_file_system_id(volumes: &str, device: &str, id: FileSystemId) -> bool {
    let wanted = id.as_kernel_shows_it();
    volumes.lines().skip(1).any(|line| {
        let mut fields = line.split_whitespace().skip(3);
        fields.next() == Some(device) && fields.next() == Some(&wanted)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tether_proto::mangled;

    const MOUNTINFO: &str = "\
25 1 254:0 / / rw,noatime shared:1 - ext4 /dev/vda rw
129 25 0:38 / /var/lib/tether/mnt/x rw,relatime shared:53 - nfs4 10.99.0.1:/srv/share rw,vers=4.2,rsize=131072,hard,proto=tcp,timeo=600,retrans=2,sec=sys,clientaddr=10.99.0.2,local_lock=none,addr=10.99.0.1
130 129 0:40 / /var/lib/tether/mnt/y rw - nfs4 [fd99::1]:/srv/share rw,vers=4.1,soft
131 130 0:41 / /var/lib/tether/mnt/y rw - tmpfs none rw
";

    proptest! {
        #[test]
        fn a_damaged_mountinfo_is_an_error_or_names_the_directory(text in mangled(MOUNTINFO)) {
            let directory = Path::new("/var/lib/tether/mnt/x");
            if let Ok(Some(_)) = mounted_on(&text, directory) {
                prop_assert!(text.contains("/var/lib/tether/mnt/x"));
            }
            drop(all_nfs(&text));
        }
    }

    #[test]
    fn f46_the_topmost_mount_on_a_directory_counts() {
        let x = mounted_on(MOUNTINFO, Path::new("/var/lib/tether/mnt/x")).unwrap().unwrap();
        assert_eq!(
            (x.kind.as_str(), x.source.as_str(), x.device.as_str()),
            ("nfs4", "10.99.0.1:/srv/share", "0:38")
        );
        assert!(x.has("hard") && x.has("vers=4.2") && !x.has("vers=4.1") && !x.has("soft"));
        let y = mounted_on(MOUNTINFO, Path::new("/var/lib/tether/mnt/y")).unwrap().unwrap();
        assert_eq!((y.kind.as_str(), y.source.as_str()), ("tmpfs", ""), "a source of none is none");
        assert_eq!(mounted_on(MOUNTINFO, Path::new("/var/lib/tether/mnt")).unwrap(), None);
        assert!(mounted_on("nonsense", Path::new("/")).is_err());
    }

    #[test]
    fn the_file_system_of_a_device_is_compared() {
        let volumes = "NV SERVER   PORT DEV          FSID                              FSC\n\
                       v4 0a630001  801 0:38         67e5504410b1426f:9247bb680e5fe0c8 no \n";
        let id: FileSystemId = "67e55044-10b1-426f-9247-bb680e5fe0c8".parse().unwrap();
        assert!(has_file_system_id(volumes, "0:38", id));
        assert!(!has_file_system_id(volumes, "0:39", id));
        assert!(!has_file_system_id(
            volumes,
            "0:38",
            "67e55044-10b1-426f-9247-bb680e5fe0c9".parse().unwrap()
        ));
        assert!(!has_file_system_id("", "0:38", id));
    }
}
