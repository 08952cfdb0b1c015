//! Certificates: modes, and that nothing is ever written over. That the usages are right is shown by the handshakes of
//! `hosts.rs`, which refuse the wrong kind.

use std::future::pending;
use std::os::unix::fs::PermissionsExt;

use crate::fakes::tether;

#[tokio::test]
async fn keys_are_private_and_nothing_is_written_over() {
    let directory = tempfile::tempdir().unwrap();
    let pki = directory.path().join("pki");
    let at = pki.to_str().unwrap();
    let ran = tether(&["pki", "issue", "agent", "storage1", "--directory", at], pending()).await;
    assert_eq!(ran.exit, 3, "{ran:?}");
    assert!(ran.err.contains("tether pki init"), "{}", ran.err);
    assert_eq!(tether(&["pki", "init", "--directory", at], pending()).await.exit, 0);
    let ran =
        tether(&["pki", "issue", "agent", "s1", "--address", "fd00::1", "--directory", at], pending()).await;
    assert_eq!(ran.exit, 0, "{ran:?}");
    assert!(ran.out.contains("s1.key") && ran.out.contains("0600"), "{}", ran.out);
    let mode = |file: &str| std::fs::metadata(pki.join(file)).unwrap().permissions().mode() & 0o7777;
    assert_eq!(["", "ca.key", "ca.crt", "s1.key", "s1.crt"].map(mode), [0o700, 0o600, 0o644, 0o600, 0o644]);
    let before = std::fs::read(pki.join("ca.key")).unwrap();
    let ran = tether(&["pki", "init", "--directory", at], pending()).await;
    assert_eq!(ran.exit, 4, "{ran:?}");
    assert!(ran.err.contains("is there already; nothing was changed"), "{}", ran.err);
    assert_eq!(std::fs::read(pki.join("ca.key")).unwrap(), before);
    std::fs::remove_file(pki.join("s1.key")).unwrap();
    assert_eq!(tether(&["pki", "issue", "agent", "s1", "--directory", at], pending()).await.exit, 4);
    assert!(!pki.join("s1.key").exists(), "both or none");
    for bad in ["../x", "a b", "ca", "", "-x", "x/y"] {
        let ran = tether(&["pki", "issue", "controller", "--directory", at, "--", bad], pending()).await;
        assert_eq!(ran.exit, 64, "{bad:?}: {ran:?}");
    }
    let json =
        tether(&["--json", "pki", "issue", "controller", "me", "--directory", at], pending()).await.json();
    assert!(json["key"].as_str().unwrap().ends_with("pki/me.key"));
}

#[tokio::test]
async fn certificates_are_issued_for_each_role() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path().to_str().unwrap();
    assert_eq!(tether(&["pki", "init", "--directory", at], pending()).await.exit, 0);
    for role in ["reader", "operator", "controller"] {
        let ran = tether(&["pki", "issue", role, "me", "--directory", at], pending()).await;
        assert!(ran.exit == 0 && ran.out.contains(&format!("for the role {role}")), "{ran:?}");
        let pem = std::fs::read_to_string(directory.path().join("me.crt")).unwrap();
        let (_, pem) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).unwrap();
        let certificate = pem.parse_x509().unwrap();
        // By this unit the agents know the role.
        let units: Vec<_> =
            certificate.subject().iter_organizational_unit().map(|unit| unit.as_str().unwrap()).collect();
        assert_eq!(units, [format!("tether-{role}")]);
        for file in ["me.crt", "me.key"] {
            std::fs::remove_file(directory.path().join(file)).unwrap();
        }
    }
}
