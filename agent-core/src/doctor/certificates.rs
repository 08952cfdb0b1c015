//! The agent's certificates: whether they can be used at all, are of the authority, and until when they are valid. Not here:
//! who is let in with which certificate (`tls`).

use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use tether_proto::Finding;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::Check;
use crate::config::{Danger, Server};
use crate::tls;

const CHECK: &str = "certificates";
const DAY: i64 = 24 * 60 * 60;
/// A new certificate takes somebody's time: told this long before.
const SOON: i64 = 30 * DAY;
/// Whom a certificate that is not valid keeps out.
const WHY: &str = "no controller gets in; on this host's socket the agent still answers";

/// Judges the certificates that the config names.
pub fn check(server: &Server, danger: Danger) -> Check {
    let server = server.clone();
    Check::reading(CHECK, move || judge(&server, danger))
}

fn judge(server: &Server, danger: Danger) -> Vec<Finding> {
    if server.listen.is_none() {
        return vec![Finding::ok(CHECK, "none is needed: the agent listens on its socket alone")];
    }
    if danger.plaintext {
        let why = "whoever reaches the port may do everything, and reads the secrets that pass";
        let mend =
            "tether pki issue agent NAME   # name its files under [server], and remove [danger] plaintext";
        return vec![Finding::warning(CHECK, "[danger] plaintext is on", why).mend(mend)];
    }
    if let Err(error) = tls::server_config(server) {
        let key = server.key.as_deref().filter(|key| is_open_to_others(key));
        let mend = match key {
            Some(key) => format!("chmod 600 {}", key.display()),
            None => "tether pki issue agent NAME   # where ca.key is; put NAME.crt, NAME.key and ca.crt here"
                .to_owned(),
        };
        return vec![Finding::error(CHECK, error.to_string(), WHY).mend(mend)];
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
    let (certificate, ca) = (server.certificate.as_deref(), server.ca.as_deref());
    let mut findings = Vec::new();
    let chain = read("server.certificate", certificate, &mut findings);
    let roots = read("server.ca", ca, &mut findings);
    // The first is the agent's own (RFC 8446 section 4.4.2).
    if let Some(own) = chain.first() {
        let valid = with_certificate(own, |own| {
            if !leads_to_a_root(&chain, &roots) {
                let found = format!(
                    "the agent's certificate is of {}, which is not in server.ca and not of an authority that is",
                    own.issuer()
                );
                return Finding::error(CHECK, found, "controllers of the authority do not trust the agent")
                    .mend(issue_anew(own));
            }
            judge_time("the agent's certificate", own, now, &issue_anew(own))
        });
        findings.push(valid.unwrap_or_else(|| unreadable("server.certificate")));
    }
    for between in chain.iter().skip(1) {
        let mend = "# put a new certificate of that authority into server.certificate, after the agent's own";
        let valid = with_certificate(between, |between| {
            judge_time("the authority that issued the agent's certificate", between, now, mend)
        });
        findings.push(valid.unwrap_or_else(|| unreadable("server.certificate")));
    }
    for root in &roots {
        let mend =
            "tether pki init --directory pki2   # then a new certificate for each agent and controller";
        let valid = with_certificate(root, |root| judge_time("the authority", root, now, mend));
        findings.push(valid.unwrap_or_else(|| unreadable("server.ca")));
    }
    findings
}

/// Is the first certificate's issuer a root, or one of the others, and so on, as who checks it goes (RFC 5280 section 6.1)?
fn leads_to_a_root(chain: &[Vec<u8>], roots: &[Vec<u8>]) -> bool {
    let names = |der: &Vec<u8>| {
        with_certificate(der, |one| (one.subject().as_raw().to_vec(), one.issuer().as_raw().to_vec()))
    };
    let mut between: Vec<_> = chain.iter().skip(1).filter_map(names).collect();
    let Some((_, mut issuer)) = chain.first().and_then(names) else { return false };
    loop {
        if roots.iter().filter_map(names).any(|(subject, _)| subject == issuer) {
            return true;
        }
        let Some(next) = between.iter().position(|(subject, _)| *subject == issuer) else { return false };
        issuer = between.swap_remove(next).1;
    }
}

/// When the first of the certificates that the config names expires, in seconds since 1970; nothing when there is none that can
/// be read. Blocks.
pub(crate) fn first_expiry(server: &Server) -> Option<i64> {
    let paths = [("server.certificate", &server.certificate), ("server.ca", &server.ca)];
    paths
        .into_iter()
        .flat_map(|(key, path)| read(key, path.as_deref(), &mut Vec::new()))
        .filter_map(|der| with_certificate(&der, |one| one.validity().not_after.timestamp()))
        .min()
}

fn read(key: &str, path: Option<&Path>, findings: &mut Vec<Finding>) -> Vec<Vec<u8>> {
    let Some(path) = path else { return Vec::new() };
    match tls::certificates(key, path) {
        Ok(certificates) => certificates.into_iter().map(|der| der.to_vec()).collect(),
        Err(error) => {
            findings.push(Finding::error(CHECK, error.to_string(), WHY));
            Vec::new()
        }
    }
}

fn with_certificate<T>(der: &[u8], look: impl FnOnce(&X509Certificate<'_>) -> T) -> Option<T> {
    X509Certificate::from_der(der).ok().map(|(_, certificate)| look(&certificate))
}

fn unreadable(key: &str) -> Finding {
    Finding::error(CHECK, format!("{key} holds a certificate that cannot be read"), WHY)
}

fn is_open_to_others(key: &Path) -> bool {
    std::fs::metadata(key).is_ok_and(|metadata| metadata.permissions().mode() & 0o077 != 0)
}

fn judge_time(what: &str, certificate: &X509Certificate<'_>, now: i64, mend: &str) -> Finding {
    let validity = certificate.validity();
    let (begin, end) = (validity.not_before.timestamp(), validity.not_after.timestamp());
    let left = (end - now).div_euclid(DAY);
    if now < begin {
        let found = format!("{what} is not valid before {}", validity.not_before);
        return Finding::error(CHECK, found, WHY)
            .mend("date   # is the clock right? else make a new certificate");
    }
    if now > end {
        let found = format!("{what} expired {} days ago, on {}", -left - 1, validity.not_after);
        return Finding::error(CHECK, found, WHY).mend(mend);
    }
    let found = format!("{what} is valid for {left} more days");
    if end - now < SOON {
        return Finding::warning(CHECK, found, "after that no controller gets in").mend(mend);
    }
    Finding::ok(CHECK, found)
}

/// The command that makes the same certificate anew, with the same name and addresses.
fn issue_anew(certificate: &X509Certificate<'_>) -> String {
    let name = certificate.subject().iter_common_name().next().and_then(|name| name.as_str().ok());
    let name = name.unwrap_or("NAME");
    let names = certificate.subject_alternative_name().ok().flatten();
    let addresses: Vec<String> = names
        .iter()
        .flat_map(|names| names.value.general_names.iter().filter_map(address))
        .filter(|address| address != name)
        .map(|address| format!(" --address {address}"))
        .collect();
    let addresses = addresses.concat();
    format!(
        "tether pki issue agent {name}{addresses} --directory pki2\n\
         # there with copies of ca.crt and ca.key; put {name}.crt and {name}.key here: the agent loads them by itself"
    )
}

fn address(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => {
            let v4 = <[u8; 4]>::try_from(*bytes).map(IpAddr::from);
            v4.or_else(|_| <[u8; 16]>::try_from(*bytes).map(IpAddr::from))
                .ok()
                .map(|address| address.to_string())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};
    use std::path::PathBuf;
    use std::time::Duration;
    use tether_proto::Severity;

    struct Pki {
        folder: tempfile::TempDir,
        issuer: Issuer<'static, KeyPair>,
    }

    impl Pki {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let mut parameters = CertificateParams::new(Vec::new()).unwrap();
            parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            parameters.distinguished_name.push(DnType::CommonName, "authority");
            let key = KeyPair::generate().unwrap();
            let pem = parameters.self_signed(&key).unwrap().pem();
            std::fs::write(folder.path().join("ca.crt"), pem).unwrap();
            Self { folder, issuer: Issuer::new(parameters, key) }
        }

        fn path(&self, file: &str) -> PathBuf {
            self.folder.path().join(file)
        }

        /// A certificate that is valid from some days after now until some days after now.
        fn issue(&self, from: i64, until: i64) -> Server {
            let mut parameters = CertificateParams::new(vec!["agent1".into(), "192.0.2.7".into()]).unwrap();
            parameters.distinguished_name.push(DnType::CommonName, "agent1");
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64;
            let at = |days: i64| {
                date_time_ymd(1970, 1, 1) + Duration::from_secs((now + days * DAY + 60).unsigned_abs())
            };
            (parameters.not_before, parameters.not_after) = (at(from), at(until));
            let key = KeyPair::generate().unwrap();
            let pem = parameters.signed_by(&key, &self.issuer).unwrap().pem();
            std::fs::write(self.path("agent1.crt"), pem).unwrap();
            std::fs::write(self.path("agent1.key"), key.serialize_pem()).unwrap();
            self.close_key();
            Server {
                listen: Some("127.0.0.1:7440".parse().unwrap()),
                socket: self.path("socket"),
                certificate: Some(self.path("agent1.crt")),
                key: Some(self.path("agent1.key")),
                ca: Some(self.path("ca.crt")),
                roles: crate::roles::Roles::default(),
            }
        }

        fn close_key(&self) {
            let only_ours = std::fs::Permissions::from_mode(0o600);
            std::fs::set_permissions(self.path("agent1.key"), only_ours).unwrap();
        }
    }

    #[test]
    fn the_first_expiry_is_the_earliest_of_all_and_of_none_there_is_none() {
        let pki = Pki::new();
        let server = pki.issue(-1, 5);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64;
        let days = (first_expiry(&server).unwrap() - now) as f64 / DAY as f64;
        assert!((4.0..6.0).contains(&days), "{days}");
        let none = Server { certificate: None, ca: None, ..server };
        assert_eq!(first_expiry(&none), None);
    }

    fn worst(server: &Server) -> Finding {
        judge(server, Danger::default()).into_iter().max_by_key(|finding| finding.severity).unwrap()
    }

    #[test]
    fn a_certificate_is_told_before_it_expires_and_after_with_the_command_that_makes_it_anew() {
        let pki = Pki::new();
        assert_eq!(worst(&pki.issue(-1, 300)).severity, Severity::Ok);
        let soon = worst(&pki.issue(-700, 9));
        assert_eq!(soon.severity, Severity::Warning);
        assert!(soon.found.contains("9 more days"), "{soon:?}");
        let expired = worst(&pki.issue(-700, -3));
        assert_eq!(expired.severity, Severity::Error);
        assert!(
            expired.found.contains("expired 2 days ago") || expired.found.contains("expired 3 days"),
            "{expired:?}"
        );
        assert!(
            expired.mend.starts_with("tether pki issue agent agent1 --address 192.0.2.7 --directory pki2\n"),
            "{expired:?}"
        );
        let early = worst(&pki.issue(2, 300));
        assert_eq!(early.severity, Severity::Error);
        assert!(early.found.contains("not valid before"), "{early:?}");
    }

    #[test]
    fn an_authority_between_the_agents_and_the_root_is_followed() {
        let pki = Pki::new();
        let mut parameters = CertificateParams::new(Vec::new()).unwrap();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        parameters.distinguished_name.push(DnType::CommonName, "between");
        let key = KeyPair::generate().unwrap();
        let pem = parameters.signed_by(&key, &pki.issuer).unwrap().pem();
        let between = Pki { folder: pki.folder, issuer: Issuer::new(parameters, key) };
        let server = between.issue(-1, 300);
        let alone = worst(&server);
        assert_eq!(alone.severity, Severity::Error);
        assert!(alone.found.contains("not in server.ca"), "{alone:?}");
        let own = std::fs::read_to_string(between.path("agent1.crt")).unwrap();
        std::fs::write(between.path("agent1.crt"), own + &pem).unwrap();
        assert_eq!(worst(&server).severity, Severity::Ok);
    }

    #[test]
    fn another_key_another_authority_and_an_open_key_are_errors() {
        let pki = Pki::new();
        let server = pki.issue(-1, 300);
        std::fs::write(pki.path("agent1.key"), KeyPair::generate().unwrap().serialize_pem()).unwrap();
        let found = worst(&server);
        assert!(found.severity == Severity::Error && found.found.contains("cannot be used"), "{found:?}");

        let server = pki.issue(-1, 300);
        std::fs::copy(Pki::new().path("ca.crt"), pki.path("ca.crt")).unwrap();
        // The same name: only the issuer's name is compared here, the handshake compares keys.
        assert_eq!(worst(&server).severity, Severity::Ok);
        let mut other = CertificateParams::new(Vec::new()).unwrap();
        other.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        other.distinguished_name.push(DnType::CommonName, "another authority");
        let pem = other.self_signed(&KeyPair::generate().unwrap()).unwrap().pem();
        std::fs::write(pki.path("ca.crt"), pem).unwrap();
        assert!(worst(&server).found.contains("not in server.ca"), "{:?}", worst(&server));

        std::fs::set_permissions(pki.path("agent1.key"), std::fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(worst(&server).mend, format!("chmod 600 {}", pki.path("agent1.key").display()));
    }

    #[test]
    fn without_tcp_no_certificate_is_needed_and_plaintext_is_a_warning() {
        let pki = Pki::new();
        let server = pki.issue(-1, 300);
        assert_eq!(judge(&server, Danger { plaintext: true })[0].severity, Severity::Warning);
        assert_eq!(worst(&Server { listen: None, ..server }).severity, Severity::Ok);
    }
}
