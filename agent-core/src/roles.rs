//! Who has which role: the rules of `[server.roles]`, and the caller that they make of a certificate or a user of this host.
//! Not here: whether a certificate is valid (`tls`), and which role an RPC needs (`tether_proto::Role`).

use std::collections::BTreeSet;
use std::fmt;
use std::net::SocketAddr;

use nix::unistd::{Uid, User};
use serde::Deserialize;
use tether_proto::Role;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};
use x509_parser::x509::{AttributeTypeAndValue, X509Name};

use crate::config::ConfigError;

/// `[server.roles]`: for each role who has it. Whom several fit has the one that may do most. Root of this host and the
/// agent's own user are controllers on the socket without being named.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Roles {
    reader: Vec<Rule>,
    operator: Vec<Rule>,
    controller: Vec<Rule>,
}

impl Default for Roles {
    fn default() -> Self {
        let issued = |role: Role| vec![Rule::OrganizationalUnit(role.organizational_unit().to_owned())];
        Self {
            reader: issued(Role::Reader),
            operator: issued(Role::Operator),
            controller: issued(Role::Controller),
        }
    }
}

/// What a caller must have for a role: `OU=` or `CN=` in the certificate's subject, `DNS=` or `URI=` in its alternative
/// names, or on the Unix socket `USER=`, a name or uid.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
enum Rule {
    OrganizationalUnit(String),
    CommonName(String),
    Dns(String),
    Uri(String),
    User(u32),
    /// Nobody, until the agent is started anew: the name and why. A user that is gone, or a directory service that is not up yet,
    /// keeps no agent from starting.
    UnknownUser(String),
}

impl TryFrom<String> for Rule {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let (kind, value) = text.split_once('=').unwrap_or_default();
        let value = value.to_owned();
        match kind {
            _ if value.is_empty() => {}
            "OU" => return Ok(Self::OrganizationalUnit(value)),
            "CN" => return Ok(Self::CommonName(value)),
            "DNS" => return Ok(Self::Dns(value.to_ascii_lowercase())),
            "URI" => return Ok(Self::Uri(value)),
            "USER" => return Ok(uid_of(&value).map_or_else(Self::UnknownUser, Self::User)),
            _ => {}
        }
        Err(format!("{text:?} must be OU=, CN=, DNS= or URI= of a certificate, or USER= of this host"))
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OrganizationalUnit(unit) => write!(f, "OU={unit}"),
            Self::CommonName(name) => write!(f, "CN={name}"),
            Self::Dns(name) => write!(f, "DNS={name}"),
            Self::Uri(uri) => write!(f, "URI={uri}"),
            Self::User(uid) => write!(f, "USER={uid}"),
            Self::UnknownUser(problem) => f.write_str(problem),
        }
    }
}

fn uid_of(user: &str) -> Result<u32, String> {
    if let Ok(uid) = user.parse() {
        return Ok(uid);
    }
    match User::from_name(user) {
        Ok(Some(user)) => Ok(user.uid.as_raw()),
        Ok(None) => Err(format!("USER={user}: this host has no such user")),
        Err(error) => Err(format!("USER={user}: the user cannot be looked up: {error}")),
    }
}

/// Who is at the other end of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// The certificate's name as in a rule, `CN=admin`; on the socket `USER=root`.
    pub who: String,
    /// What it may do; nothing when no rule fits.
    pub role: Option<Role>,
    /// Where it called from; nothing on the Unix socket.
    pub peer: Option<SocketAddr>,
}

impl Caller {
    /// The role in words.
    pub fn role_name(&self) -> &'static str {
        self.role.map_or("none", Role::as_str)
    }
}

impl Roles {
    /// Checks that nobody is named for two roles.
    ///
    /// # Errors
    /// Names the rule and the role.
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        let mut seen = BTreeSet::new();
        for role in Role::ALL {
            if let Some(rule) = self.rules(role).iter().find(|rule| !seen.insert(*rule)) {
                let problem = format!("{rule} is named twice: name it once, for one role");
                return Err(ConfigError::value(format!("server.roles.{role}"), problem));
            }
        }
        Ok(())
    }

    /// May others than root use the socket?
    pub(crate) fn name_users(&self) -> bool {
        Role::ALL.into_iter().flat_map(|role| self.rules(role)).any(|rule| matches!(rule, Rule::User(_)))
    }

    /// Logs whom the config names and this host does not know.
    pub(crate) fn tell_unknown_users(&self) {
        for problem in Role::ALL.into_iter().flat_map(|role| self.rules(role)) {
            if let Rule::UnknownUser(problem) = problem {
                tracing::warn!(
                    problem,
                    "nobody has a role by it: correct the config, or restart the agent when the user is known"
                );
            }
        }
    }

    /// The caller that a certificate makes, which the TLS handshake has found valid.
    ///
    /// # Errors
    /// When its text cannot be read, a sentence.
    pub(crate) fn of_certificate(&self, certificate: &[u8], peer: SocketAddr) -> Result<Caller, String> {
        let (_, certificate) = X509Certificate::from_der(certificate)
            .map_err(|error| format!("its certificate cannot be read: {error}"))?;
        let mut names = Vec::new();
        let subject: &X509Name<'_> = certificate.subject();
        names.extend(texts(subject.iter_common_name()).map(Rule::CommonName));
        let alternatives = certificate
            .subject_alternative_name()
            .map_err(|error| format!("its certificate's alternative names cannot be read: {error}"))?;
        for name in alternatives.iter().flat_map(|names| &names.value.general_names) {
            match name {
                GeneralName::DNSName(name) => names.push(Rule::Dns(name.to_ascii_lowercase())),
                GeneralName::URI(uri) => names.push(Rule::Uri((*uri).to_owned())),
                _ => {}
            }
        }
        let who = match names.first() {
            // Its units tell only what it may do.
            None => format!("SERIAL={}", certificate.raw_serial_as_string()),
            Some(name) => name.to_string(),
        };
        names.extend(texts(subject.iter_organizational_unit()).map(Rule::OrganizationalUnit));
        Ok(Caller { who, role: self.of(&names), peer: Some(peer) })
    }

    /// The caller that a process of this host makes.
    pub(crate) fn of_user(&self, uid: u32) -> Caller {
        let name = User::from_uid(Uid::from_raw(uid)).ok().flatten().map(|user| user.name);
        let who = format!("USER={}", name.unwrap_or_else(|| uid.to_string()));
        let own = uid == 0 || uid == nix::unistd::geteuid().as_raw();
        let role = if own { Some(Role::Controller) } else { self.of(&[Rule::User(uid)]) };
        Caller { who, role, peer: None }
    }

    fn of(&self, names: &[Rule]) -> Option<Role> {
        Role::ALL.into_iter().rev().find(|role| self.rules(*role).iter().any(|rule| names.contains(rule)))
    }

    fn rules(&self, role: Role) -> &[Rule] {
        match role {
            Role::Reader => &self.reader,
            Role::Operator => &self.operator,
            Role::Controller => &self.controller,
        }
    }
}

/// Those that are no text fit no rule.
fn texts<'a>(values: impl Iterator<Item = &'a AttributeTypeAndValue<'a>>) -> impl Iterator<Item = String> {
    values.filter_map(|value| value.as_str().ok().map(str::to_owned))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, DnType, KeyPair, SanType};

    const PEER: &str = "192.0.2.9:40000";

    fn certificate(units: &[&str], name: Option<&str>, alternatives: &[SanType]) -> Vec<u8> {
        let mut parameters = CertificateParams::default();
        parameters.distinguished_name = rcgen::DistinguishedName::new();
        for unit in units {
            parameters.distinguished_name.push(DnType::OrganizationalUnitName, *unit);
        }
        if let Some(name) = name {
            parameters.distinguished_name.push(DnType::CommonName, name);
        }
        parameters.subject_alt_names = alternatives.to_vec();
        parameters.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
    }

    fn caller(roles: &Roles, certificate: &[u8]) -> (String, Option<Role>) {
        let caller = roles.of_certificate(certificate, PEER.parse().unwrap()).unwrap();
        (caller.who, caller.role)
    }

    #[test]
    fn what_tether_pki_issues_has_its_role_without_a_config() {
        for role in Role::ALL {
            let certificate = certificate(&[role.organizational_unit()], Some("me"), &[]);
            assert_eq!(caller(&Roles::default(), &certificate), ("CN=me".into(), Some(role)));
        }
        // A name gives no role, and neither does an agent's certificate.
        for (unit, name) in
            [("tether-agent", "storage1"), ("Tether-Controller", "x"), ("x", "tether-controller")]
        {
            let certificate = certificate(&[unit], Some(name), &[]);
            assert_eq!(caller(&Roles::default(), &certificate), (format!("CN={name}"), None), "{unit}");
        }
    }

    #[test]
    fn an_own_pki_maps_units_names_and_alternative_names() {
        let roles: Roles = toml::from_str(
            r#"
            reader = ["CN=Grafana", "DNS=Monitor.example.com", "OU=tether-reader"]
            controller = ["URI=spiffe://example.com/plane", "OU=Platform"]
            "#,
        )
        .unwrap();
        roles.check().unwrap();
        let dns = |name: &str| SanType::DnsName(name.try_into().unwrap());
        let uri = |name: &str| SanType::URI(name.try_into().unwrap());
        for (units, name, alternatives, expected) in [
            (vec![], Some("Grafana"), vec![], Some(Role::Reader)),
            (vec![], Some("grafana"), vec![], None),
            (vec![], None, vec![dns("monitor.EXAMPLE.com")], Some(Role::Reader)),
            (vec![], None, vec![uri("spiffe://example.com/plane")], Some(Role::Controller)),
            (vec![], None, vec![uri("spiffe://example.com/plane/x")], None),
            // Several fit: the one that may do most.
            (vec!["tether-reader", "Platform"], Some("x"), vec![], Some(Role::Controller)),
            // A list that is given takes the place of the one that is not.
            (vec!["tether-controller"], Some("x"), vec![], None),
            (vec!["tether-operator"], Some("x"), vec![], Some(Role::Operator)),
        ] {
            let certificate = certificate(&units, name, &alternatives);
            assert_eq!(caller(&roles, &certificate).1, expected, "{units:?} {name:?} {alternatives:?}");
        }
        assert_eq!(caller(&roles, &certificate(&[], None, &[dns("A.b")])).0, "DNS=a.b");
        assert!(caller(&roles, &certificate(&[], None, &[])).0.starts_with("SERIAL="));
        assert!(roles.of_certificate(b"junk", PEER.parse().unwrap()).unwrap_err().contains("cannot be read"));
    }

    #[test]
    fn users_of_the_host_have_roles_too() {
        let roles: Roles =
            toml::from_str("reader = [\"USER=4000000001\", \"USER=gone\"]\noperator = [\"USER=nobody\"]")
                .unwrap();
        roles.check().unwrap();
        assert!(roles.name_users() && !Roles::default().name_users());
        let nobody = User::from_name("nobody").unwrap().unwrap().uid.as_raw();
        assert_eq!(
            roles.of_user(0),
            Caller { who: "USER=root".into(), role: Some(Role::Controller), peer: None }
        );
        assert_eq!(roles.of_user(nobody).role, Some(Role::Operator));
        assert_eq!(roles.of_user(4_000_000_001).role, Some(Role::Reader));
        assert_eq!(roles.of_user(4_000_000_002).role, None);
    }

    #[test]
    fn a_rule_that_cannot_be_meant_is_refused() {
        for (text, words) in [
            ("reader = [\"admin\"]", "must be OU="),
            ("reader = [\"OU=\"]", "must be OU="),
            ("reader = [\"O=x\"]", "must be OU="),
            ("readers = []", "unknown field `readers`"),
            ("reader = [\"CN=a\"]\noperator = [\"CN=a\"]", "server.roles.operator"),
        ] {
            let problem = match toml::from_str::<Roles>(text) {
                Err(error) => error.to_string(),
                Ok(roles) => roles.check().expect_err(text).to_string(),
            };
            assert!(problem.contains(words), "{text}: {problem}");
        }
    }
}
