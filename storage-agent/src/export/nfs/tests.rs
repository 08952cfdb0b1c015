//! Which lines the journal wants, and which clients there are.

use std::path::Path;

use tether_agent_core::stuck::Stuck;
use tether_proto::{ByteSize, ConnectionInfo, Transport};

use super::*;
use crate::record::Phase;

const SHARE_PATH: &str = "/srv/share";

fn id(number: u8) -> AttachmentId {
    format!("{number:08}-1111-4111-8111-111111111111").parse().unwrap()
}

fn connector(addresses: &[&str]) -> Connector {
    Connector {
        hostname: "compute".into(),
        initiator_iqn: "iqn.2026-11.io.example:c".parse().unwrap(),
        addresses: addresses.iter().map(|text| text.parse().unwrap()).collect(),
        versions: Default::default(),
    }
}

fn record(number: u8, phase: Phase, access_mode: AccessMode, addresses: &[&str]) -> ExportRecord {
    let nfs = NfsConnection {
        servers: vec!["10.99.0.1".parse().unwrap()],
        path: SHARE_PATH.parse().unwrap(),
        file: format!("v{number}.raw").parse().unwrap(),
        format: Default::default(),
        inode: 12,
        file_system_id: "67e55044-10b1-426f-9247-bb680e5fe0c8".parse().unwrap(),
        keep_allocated: false,
    };
    let connector = connector(addresses);
    let export = Export {
        volume: format!("share/v{number}").parse().unwrap(),
        device: format!("{SHARE_PATH}/v{number}.raw"),
        unit_serial: "0123".into(),
        share: Some(Clients {
            addresses: connector.addresses.clone(),
            former: Vec::new(),
            owner_uid: 64055,
            owner_gid: 64055,
        }),
        connector,
        connection: ConnectionInfo {
            transport: Transport::Nfs(nfs),
            size: ByteSize::try_from(1).unwrap(),
            access_mode,
            serial: "s".parse().unwrap(),
            multi_attach: false,
        },
    };
    ExportRecord { phase, ..ExportRecord::new(id(number), export) }
}

fn line(address: &str) -> Share {
    let record = record(9, Phase::Exporting, AccessMode::ReadWrite, &[address]);
    let export = record.export.unwrap();
    let Transport::Nfs(nfs) = &export.connection.transport else { panic!("over NFS") };
    shares(&export, nfs).remove(0)
}

/// F47: a line lives as long as one export needs it, and is writable as long as one of them is.
#[test]
fn f47_a_line_is_what_the_exports_of_that_pool_and_address_need() {
    use AccessMode::{ReadOnly, ReadWrite};
    use Phase::{Exported, Exporting, Unexporting};
    let all = vec![
        record(1, Exported, ReadOnly, &["10.99.0.2", "fd99::2"]),
        record(2, Exporting, ReadWrite, &["10.99.0.2"]),
        record(3, Unexporting, ReadWrite, &["fd99::2", "10.99.0.3"]),
        ExportRecord::ended(id(4)),
    ];
    let mode = |records: &[ExportRecord], leaving: &[u8], address: &str| {
        let mut users = index(records.to_vec());
        for number in leaving {
            leave(&mut users, id(*number), &["10.99.0.2", "fd99::2"].map(line));
        }
        wanted(&users, &line(address)).map(|share| share.access_mode)
    };
    assert_eq!(mode(&all, &[], "10.99.0.2"), Some(ReadWrite));
    assert_eq!(mode(&all, &[2], "10.99.0.2"), Some(ReadOnly));
    assert_eq!(mode(&all, &[], "fd99::2"), Some(ReadOnly));
    assert_eq!(mode(&all, &[], "10.99.0.3"), None);
    assert_eq!(mode(&all, &[1, 2], "10.99.0.2"), None);
    let other_pool = Share { pool: "other".parse().unwrap(), ..line("10.99.0.2") };
    assert_eq!(wanted(&index(all), &other_pool), None);
}

fn nfs(root: &Path, records: &[&ExportRecord]) -> Nfs {
    let journal = Journal::<ExportRecord>::open(&root.join("state/exports")).unwrap();
    let config = config::Nfs {
        servers: vec!["127.0.0.1".parse().unwrap()],
        client_networks: vec!["10.99.0.0/24".parse().unwrap(), "fd99::/64".parse().unwrap()],
    };
    for record in records {
        journal.put(&record.id.to_string(), record).unwrap();
    }
    Nfs::open(Server::at(root), Some(&config), &journal)
}

#[test]
fn f40_f47_only_addresses_in_the_client_networks_are_let_in() {
    let root = tempfile::tempdir().unwrap();
    let (nfs, directory) =
        (nfs(root.path(), &[]), Directory::new(SHARE_PATH.parse().unwrap(), 64055, 64055, Stuck::default()));
    let clients = |addresses: &[&str]| nfs.clients(&connector(addresses), &directory);
    let shown = |addresses: &[&str]| list(&clients(addresses).unwrap().addresses);
    assert_eq!(shown(&["10.0.2.15", "10.99.0.2", "fd99::2", "10.99.0.2"]), "10.99.0.2, fd99::2");
    for (addresses, words) in [(&["10.0.2.15"][..], "it has 10.0.2.15"), (&[], "it has none")] {
        let refused = clients(addresses).unwrap_err();
        assert_eq!(refused.reason, Reason::NoClientAddress);
        assert!(refused.message.contains(words) && refused.message.contains("fd99::/64"), "{refused}");
    }
}

fn write_etab(root: &Path, text: &str) {
    std::fs::create_dir_all(root.join("var/lib/nfs")).unwrap();
    std::fs::write(root.join("var/lib/nfs/etab"), text).unwrap();
}

const OURS: &str = "/srv/share\t10.99.0.2/32(rw,sync,all_squash,fsid=67e55044-10b1-426f-9247-bb680e5fe0c8,\
                    anonuid=64055,anongid=64055,sec=sys,rw)\n";

/// A second volume of a pool that is shared already starts no process: there is none on this host.
#[tokio::test]
async fn a_line_that_is_there_is_left_alone_and_a_lost_fragment_is_written_again() {
    let root = tempfile::tempdir().unwrap();
    let record = record(1, Phase::Exporting, AccessMode::ReadOnly, &["10.99.0.2"]);
    let writer = self::record(2, Phase::Exported, AccessMode::ReadWrite, &["10.99.0.2"]);
    let nfs = nfs(root.path(), &[&record, &writer]);
    write_etab(root.path(), OURS);
    let export = record.export.unwrap();
    let Transport::Nfs(connection) = &export.connection.transport else { panic!("over NFS") };
    let shares = shares(&export, connection);
    assert!(nfs.settle(&shares).await.unwrap());
    assert!(!nfs.settle(&shares).await.unwrap());
    nfs.verify(&shares).await.unwrap();
    let seen = nfs.look().await.unwrap();
    assert_eq!(nfs.state(&export, connection, &seen).await.unwrap(), (true, false));
    write_etab(root.path(), "");
    assert_eq!(nfs.verify(&shares).await.unwrap_err().reason, Reason::ShareFailed);
}

/// F16: what somebody else shares is refused and stays as it is.
#[tokio::test]
async fn f16_a_directory_that_somebody_else_shares_with_the_client_is_refused() {
    for foreign in [
        "/srv/share\t10.99.0.2(rw,sync,all_squash,anonuid=64055,anongid=64055)\n",
        "/srv/share\t10.99.0.0/24(rw,no_root_squash)\n",
        "/srv/share\t*(ro)\n",
    ] {
        let root = tempfile::tempdir().unwrap();
        let record = record(1, Phase::Exporting, AccessMode::ReadWrite, &["10.99.0.2"]);
        let nfs = nfs(root.path(), &[&record]);
        write_etab(root.path(), foreign);
        let refused = nfs.settle(&[line("10.99.0.2")]).await.unwrap_err();
        assert_eq!(refused.reason, Reason::NotOurs);
        assert!(refused.message.contains(foreign.trim().split_once('\t').unwrap().1), "{refused}");
        assert!(!root.path().join("etc/exports.d").exists());
    }
}
