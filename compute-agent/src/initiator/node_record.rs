//! open-iscsi's record of a node: a file of ours in its database (open-iscsi README, "iscsiadm"; `idbm.c`). It is how
//! the secret reaches iscsid without being in any argv (rule 11, F44). Not here: login and logout.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use tether_proto::{Iqn, IscsiConnection, MutualChap, Portal};

/// Where open-iscsi keeps its records on Debian.
pub(crate) const NODE_DIRECTORY: &str = "/etc/iscsi/nodes";

/// How long I/O waits for a lost session before it fails, in seconds: long enough for a storage host to reboot (F22),
/// and an end to it (F31).
const REPLACEMENT_TIMEOUT: u32 = 180;

/// The digests that CHAP may use, the best first; the target takes the first that it has (RFC 7143 section 12.1.4).
const DIGESTS: &str = "SHA256,MD5";

/// A file of open-iscsi's database that could not be written or removed.
#[derive(Debug, thiserror::Error)]
#[error("{action} {} failed", path.display())]
pub(crate) struct NodeRecordError {
    action: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Writes the record for one target at one portal, in place of any older one of this target. Folders get mode 0700,
/// the file 0600.
pub(crate) fn write(
    nodes: &Path,
    connection: &IscsiConnection,
    portal: Portal,
) -> Result<(), NodeRecordError> {
    delete(nodes, &connection.target_iqn)?;
    let fail = |action, path: &Path| {
        let path = path.to_owned();
        move |source| NodeRecordError { action, path, source }
    };
    let tag = connection.target_portal_group_tag;
    let folder = nodes.join(connection.target_iqn.as_str()).join(format!(
        "{},{},{tag}",
        portal.address(),
        portal.port()
    ));
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder).map_err(fail("making", &folder))?;
    let path = folder.join("default");
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)
        .map_err(fail("making", &path))?;
    file.write_all(record(connection, portal).as_bytes()).map_err(fail("writing", &path))
}

/// Removes all records of one target. True when there were some.
pub(crate) fn delete(nodes: &Path, target: &Iqn) -> Result<bool, NodeRecordError> {
    let folder = nodes.join(target.as_str());
    match fs::remove_dir_all(&folder) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(NodeRecordError { action: "removing", path: folder, source }),
    }
}

/// The record's text. Every value is of a type that has no newline in it.
fn record(connection: &IscsiConnection, portal: Portal) -> String {
    let IscsiConnection { target_iqn, target_portal_group_tag, chap_username, chap_secret, .. } = connection;
    let (address, port, secret) = (portal.address(), portal.port(), chap_secret.expose());
    let mutual =
        connection.mutual_chap.as_ref().map_or_else(String::new, |MutualChap { username, secret }| {
            format!(
                "node.session.auth.username_in = {username}\nnode.session.auth.password_in = {}\n",
                secret.expose()
            )
        });
    format!(
        "# BEGIN RECORD 2.1.8\n\
         node.name = {target_iqn}\n\
         node.tpgt = {target_portal_group_tag}\n\
         node.startup = manual\n\
         node.leading_login = No\n\
         iface.iscsi_ifacename = default\n\
         iface.transport_name = tcp\n\
         node.conn[0].address = {address}\n\
         node.conn[0].port = {port}\n\
         node.conn[0].startup = manual\n\
         node.conn[0].timeo.login_timeout = 5\n\
         node.conn[0].timeo.logout_timeout = 5\n\
         node.conn[0].timeo.noop_out_interval = 5\n\
         node.conn[0].timeo.noop_out_timeout = 5\n\
         node.session.scan = manual\n\
         node.session.nr_sessions = 1\n\
         node.session.initial_login_retry_max = 1\n\
         node.session.timeo.replacement_timeout = {REPLACEMENT_TIMEOUT}\n\
         node.session.auth.authmethod = CHAP\n\
         node.session.auth.chap_algs = {DIGESTS}\n\
         node.session.auth.username = {chap_username}\n\
         node.session.auth.password = {secret}\n\
         {mutual}\
         # END RECORD\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::PermissionsExt;
    use tether_proto::Secret;

    fn connection() -> IscsiConnection {
        IscsiConnection {
            target_iqn: "iqn.2026-11.internal.tether:storage1:x".parse().unwrap(),
            portals: vec!["[fd00::1]:3260".parse().unwrap()],
            target_portal_group_tag: 1,
            chap_username: "tether-x".into(),
            chap_secret: Secret::new("canary-canary").unwrap(),
            wwn: "60014050000000000000000000000000".parse().unwrap(),
            mutual_chap: Some(MutualChap {
                username: "tether-target-x".into(),
                secret: Secret::new("canary-in-turn").unwrap(),
            }),
        }
    }

    proptest! {
        /// Nothing that came over the wire makes a line of its own, and each value comes back as it was.
        #[test]
        fn a_record_has_one_line_for_each_key(
            target in "[a-z0-9.:-]{1,60}", tag in 1u16.., user in "[a-zA-Z0-9._:-]{1,128}",
            secret in "[!$-&(-\\[\\]-_a-~]{12,128}", address: std::net::IpAddr, port in 1u16..
        ) {
            // Not every one is a legal name.
            let Ok(target_iqn) = format!("iqn.2026-11.io.example:{target}").parse() else { return Ok(()) };
            let connection = IscsiConnection {
                target_iqn,
                target_portal_group_tag: tag,
                chap_username: user.clone(),
                chap_secret: Secret::new(secret.clone()).unwrap(),
                ..connection()
            };
            let Ok(portal) = std::net::SocketAddr::new(address, port).to_string().parse::<Portal>() else { return Ok(()) };
            let text = record(&connection, portal);
            let lines: std::collections::BTreeMap<&str, &str> =
                text.lines().filter(|line| !line.starts_with('#')).map(|line| line.split_once(" = ").unwrap()).collect();
            prop_assert_eq!(lines.len() + 2, text.lines().count());
            prop_assert_eq!(lines["node.session.auth.username"], user);
            prop_assert_eq!(lines["node.session.auth.password"], secret);
            prop_assert_eq!(lines["node.session.auth.password_in"], "canary-in-turn");
            prop_assert_eq!(lines["node.name"], connection.target_iqn.as_str());
            prop_assert_eq!(lines["node.conn[0].address"].parse::<std::net::IpAddr>().ok(), Some(portal.address()));
        }
    }

    #[test]
    fn f44_the_secret_is_in_a_file_that_only_root_reads() {
        let nodes = tempfile::tempdir().unwrap();
        let connection = connection();
        write(nodes.path(), &connection, connection.portals[0]).unwrap();
        let folder = nodes.path().join("iqn.2026-11.internal.tether:storage1:x");
        let file = folder.join("fd00::1,3260,1/default");
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&folder), mode(&file)), (0o700, 0o600));
        let text = fs::read_to_string(&file).unwrap();
        assert!(text.contains("node.session.auth.password = canary-canary\n"));
        assert!(text.contains("node.session.auth.username_in = tether-target-x\n"));
        let one_way =
            record(&IscsiConnection { mutual_chap: None, ..connection.clone() }, connection.portals[0]);
        assert!(!one_way.contains("_in = "), "{one_way}");
        assert!(text.contains("node.conn[0].address = fd00::1\n"));
    }

    #[test]
    fn f17_a_new_record_replaces_the_old_and_delete_leaves_nothing_of_ours_and_all_of_others() {
        let nodes = tempfile::tempdir().unwrap();
        let connection = connection();
        let other = nodes.path().join("iqn.2026-11.internal.tether:storage1:y");
        fs::create_dir(&other).unwrap();
        write(nodes.path(), &connection, "10.0.0.1:3260".parse().unwrap()).unwrap();
        write(nodes.path(), &connection, "10.0.0.2:3260".parse().unwrap()).unwrap();
        let folder = nodes.path().join(connection.target_iqn.as_str());
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
        assert!(delete(nodes.path(), &connection.target_iqn).unwrap());
        assert!(!delete(nodes.path(), &connection.target_iqn).unwrap());
        assert!(!folder.exists() && other.exists());
    }
}
