//! Who has which file open, as nfsd shows it in clients/*/info and clients/*/states (`fs/nfsd/nfs4state.c`). NFS 4 only:
//! before that the server knows nothing of opens.

use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::path::{Path, PathBuf};

use nix::errno::Errno;

/// A file that a client has open, or may open without asking (a delegation, RFC 8881 section 10.4).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct OpenFile {
    /// The client.
    pub(crate) address: IpAddr,
    /// Where nfsd shows the client. One that is away stays there until somebody else wants what it has.
    pub(crate) client: PathBuf,
    /// The file system's device: major and minor number.
    pub(crate) device: (u64, u64),
    /// The file.
    pub(crate) inode: u64,
}

/// Which clients are asked about.
#[derive(Debug, Clone)]
pub(crate) enum Whose {
    /// Those with these addresses.
    Only(Vec<IpAddr>),
    /// All but those with these addresses.
    AllBut(Vec<IpAddr>),
}

impl Whose {
    /// All clients.
    pub(crate) fn all() -> Self {
        Self::AllBut(Vec::new())
    }

    fn includes(&self, address: IpAddr) -> bool {
        match self {
            Self::Only(addresses) => addresses.contains(&address),
            Self::AllBut(addresses) => !addresses.contains(&address),
        }
    }
}

/// All files that are open at these clients. A client that goes away meanwhile has
/// none, and a server that does not run has no clients.
///
/// # Errors
/// When nfsd's files cannot be read: then nobody knows.
pub(crate) fn open_files(clients: &Path, whose: &Whose) -> io::Result<Vec<OpenFile>> {
    let entries = match std::fs::read_dir(clients) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let client = entry?.path();
        let Some(info) = read(&client.join("info"))? else { continue };
        let Some(address) = address(&info) else {
            let path = client.display();
            return Err(io::Error::other(format!("{path}/info tells no address that is understood")));
        };
        if !whose.includes(address) {
            continue;
        }
        let Some(states) = read(&client.join("states"))? else { continue };
        let open = opens(&states);
        files.extend(open.map(|(device, inode)| OpenFile { address, client: client.clone(), device, inode }));
    }
    Ok(files)
}

/// Nothing when the client is gone: then nfsd says `ENXIO`.
fn read(path: &Path) -> io::Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error)
            if error.kind() == io::ErrorKind::NotFound
                || error.raw_os_error() == Some(Errno::ENXIO as i32) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// `address: "192.0.2.1:784"`, `address: "[2001:db8::1]:784"` (F40); a link-local one comes with its interface.
pub(crate) fn address(info: &str) -> Option<IpAddr> {
    let text = info.lines().find_map(|line| line.strip_prefix("address: "))?.trim().trim_matches('"');
    match text.parse::<SocketAddrV6>() {
        Ok(address) => Some(address.ip().to_owned().into()),
        Err(_) => text.parse::<SocketAddr>().ok().map(|address| address.ip()),
    }
}

/// Each open and each delegation: its device and its inode.
pub(crate) fn opens(states: &str) -> impl Iterator<Item = ((u64, u64), u64)> {
    let opens = |line: &&str| line.contains("{ type: open,") || line.contains("{ type: deleg,");
    states.lines().filter(opens).filter_map(superblock)
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
    use proptest::prelude::*;
    use tether_proto::mangled;

    /// As kernel 6.1 shows it.
    const STATES: &str = r#"- 0x000000018469056b2810731904000000: { type: open, access: rw, deny: --, superblock: "fe:20:12", filename: "/raw1.raw", owner: "open id:\x00\x00\x00&" }
- 0x000000028469056b2810731906000000: { type: lock, superblock: "fe:20:12", filename: "/raw1.raw", owner: "lock id:\x00" }
- 0x000000018469056b2810731909000000: { type: deleg, access: r, superblock: "fe:21:12", filename: "/q1.qcow2" }
"#;

    proptest! {
        #[test]
        fn damaged_states_are_no_opens_of_other_files(
            states in mangled(STATES), info in mangled("clientid: 0x1\naddress: \"[fd99::2]:784\"\n")
        ) {
            let _unused = address(&info);
            let lines = states.lines().count();
            prop_assert!(opens(&states).count() <= lines);
        }
    }

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
        client(root.path(), "7", "[fe80::1%2]:1001");
        std::fs::create_dir(root.path().join("9")).unwrap();
        let opens = |whose: Whose| {
            let mut files = open_files(root.path(), &whose).unwrap();
            files.sort_by_key(|file| (file.address, file.device));
            files
                .into_iter()
                .map(|file| (file.address.to_string(), file.device, file.inode))
                .collect::<Vec<_>>()
        };
        let v4 = |device| ("10.99.0.2".to_owned(), device, 12);
        assert_eq!(
            opens(Whose::Only(vec!["10.99.0.2".parse().unwrap()])),
            [v4((0xfe, 0x20)), v4((0xfe, 0x21))]
        );
        let addresses: Vec<String> = opens(Whose::all()).into_iter().map(|(address, ..)| address).collect();
        let [one, two, three] = ["10.99.0.2", "fd99::2", "fe80::1"];
        assert_eq!(
            opens(Whose::AllBut(vec![two.parse().unwrap(), three.parse().unwrap()])),
            [v4((0xfe, 0x20)), v4((0xfe, 0x21))]
        );
        assert_eq!(addresses, [one, one, two, two, three, three]);
        assert!(open_files(&root.path().join("nothing"), &Whose::all()).unwrap().is_empty());
    }

    /// What cannot be read is not taken for "nobody".
    #[test]
    fn a_client_that_cannot_be_read_or_understood_is_an_error() {
        let root = tempfile::tempdir().unwrap();
        client(root.path(), "5", "10.99.0.2:784");
        std::fs::remove_file(root.path().join("5/states")).unwrap();
        std::fs::create_dir(root.path().join("5/states")).unwrap();
        assert!(open_files(root.path(), &Whose::all()).is_err());
        assert!(open_files(root.path(), &Whose::Only(vec!["fd99::2".parse().unwrap()])).unwrap().is_empty());
        client(root.path(), "6", "nonsense");
        assert!(open_files(root.path(), &Whose::Only(vec!["fd99::2".parse().unwrap()])).is_err());
    }
}
