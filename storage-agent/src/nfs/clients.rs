//! Who has which file open, as nfsd shows it in clients/*/info and clients/*/states (`fs/nfsd/nfs4state.c`). NFS 4 only:
//! before that the server knows nothing of opens.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

/// A file that a client has open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OpenFile {
    /// The client.
    pub(crate) address: IpAddr,
    /// The file system's device: major and minor number.
    pub(crate) device: (u64, u64),
    /// The file.
    pub(crate) inode: u64,
}

/// All files that are open. A client that goes away meanwhile, or cannot be read, has none.
pub(crate) fn open_files(clients: &Path) -> Vec<OpenFile> {
    let Ok(entries) = std::fs::read_dir(clients) else { return Vec::new() };
    let folders = entries.flatten().map(|entry| entry.path());
    folders
        .filter_map(|folder| {
            let read = |name: &str| std::fs::read_to_string(folder.join(name)).ok();
            let address = address(&read("info")?)?;
            Some(opens(&read("states")?).map(|(device, inode)| OpenFile { address, device, inode }).collect())
        })
        .flat_map(|files: Vec<OpenFile>| files)
        .collect()
}

/// `address: "192.0.2.1:784"` or `address: "[2001:db8::1]:784"` (F40).
fn address(info: &str) -> Option<IpAddr> {
    let text = info.lines().find_map(|line| line.strip_prefix("address: "))?;
    text.trim().trim_matches('"').parse::<SocketAddr>().ok().map(|address| address.ip())
}

/// Each open: its device and its inode.
fn opens(states: &str) -> impl Iterator<Item = ((u64, u64), u64)> {
    states.lines().filter(|line| line.contains("{ type: open,")).filter_map(superblock)
}

/// `superblock: "fe:20:12"`: major and minor number in hexadecimal, the inode in decimal.
fn superblock(line: &str) -> Option<((u64, u64), u64)> {
    let (text, _) = line.split_once("superblock: \"")?.1.split_once('"')?;
    let mut parts = text.split(':');
    let mut hexadecimal = || u64::from_str_radix(parts.next()?, 16).ok();
    let device = (hexadecimal()?, hexadecimal()?);
    Some((device, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As kernel 6.1 shows it.
    const STATES: &str = r#"- 0x000000018469056b2810731904000000: { type: open, access: rw, deny: --, superblock: "fe:20:12", filename: "/raw1.raw", owner: "open id:\x00\x00\x00&" }
- 0x000000028469056b2810731906000000: { type: lock, superblock: "fe:20:12", filename: "/raw1.raw", owner: "lock id:\x00" }
- 0x000000018469056b2810731909000000: { type: deleg, access: r, superblock: "fe:20:13", filename: "/q1.qcow2" }
"#;

    fn client(root: &Path, number: &str, address: &str) {
        let folder = root.join(number);
        std::fs::create_dir_all(&folder).unwrap();
        let info = format!("clientid: 0x197310286b056984\naddress: \"{address}\"\nstatus: confirmed\n");
        std::fs::write(folder.join("info"), info).unwrap();
        std::fs::write(folder.join("states"), STATES).unwrap();
    }

    #[test]
    fn f40_open_files_are_known_by_client_device_and_inode() {
        let root = tempfile::tempdir().unwrap();
        client(root.path(), "5", "10.99.0.2:784");
        client(root.path(), "6", "[fd99::2]:1001");
        client(root.path(), "7", "nonsense");
        std::fs::create_dir(root.path().join("8")).unwrap();
        let mut files = open_files(root.path());
        files.sort_by_key(|file| file.address);
        let open =
            |address: &str| OpenFile { address: address.parse().unwrap(), device: (0xfe, 0x20), inode: 12 };
        assert_eq!(files, [open("10.99.0.2"), open("fd99::2")]);
        assert!(open_files(&root.path().join("nothing")).is_empty());
    }
}
