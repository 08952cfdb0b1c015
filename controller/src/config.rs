//! The controller's config: which hosts there are and the certificates to reach them. Read once, checked whole, with
//! file and line in every error. Not here: connecting.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::ops::Range;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use toml::Spanned;

use crate::agent::Kind;
use crate::failure::{Failure, Result};

const HOW_TO_GET_A_CONFIG: &str = "make certificates with `tether pki init` and `tether pki issue controller \
controller`, then write /etc/tether/tether.toml (or ~/.config/tether/tether.toml, or name a file with --config):
[tls]
ca = \"pki/ca.crt\"
certificate = \"pki/controller.crt\"
key = \"pki/controller.key\"
[storage.storage1]
address = \"storage1.example:7440\"
[compute.compute1]
address = \"compute1.example:7440\"";

/// What of the process's environment matters.
#[derive(Debug, Default, Clone)]
pub struct Environment {
    /// `$TETHER_CONFIG`.
    pub config: Option<OsString>,
    /// `$HOME`.
    pub home: Option<OsString>,
}

impl Environment {
    /// The environment of this process.
    pub fn of_this_process() -> Self {
        Self { config: std::env::var_os("TETHER_CONFIG"), home: std::env::var_os("HOME") }
    }
}

/// The config, checked.
#[derive(Debug)]
pub(crate) struct Config {
    storage: BTreeMap<String, Host>,
    compute: BTreeMap<String, Host>,
    pub(crate) tls: Option<Arc<Tls>>,
    pub(crate) plaintext: bool,
    path: PathBuf,
}

/// One host with an agent.
#[derive(Debug, Clone)]
pub(crate) struct Host {
    pub(crate) name: String,
    pub(crate) address: Address,
    /// The name that its certificate must have.
    pub(crate) server_name: String,
}

/// Where an agent listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Address {
    /// `host:port`, IPv6 in brackets.
    Tcp(String),
    /// A Unix socket on this host.
    Unix(String),
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(address) => f.write_str(address),
            Self::Unix(path) => write!(f, "unix:{path}"),
        }
    }
}

/// The files under `[tls]`, as PEM.
pub(crate) struct Tls {
    pub(crate) ca: Vec<u8>,
    pub(crate) certificate: Vec<u8>,
    pub(crate) key: Vec<u8>,
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tls(not shown)")
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    tls: Option<TlsSection>,
    #[serde(default)]
    storage: BTreeMap<String, HostSection>,
    #[serde(default)]
    compute: BTreeMap<String, HostSection>,
    #[serde(default)]
    danger: Danger,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TlsSection {
    ca: Spanned<PathBuf>,
    certificate: Spanned<PathBuf>,
    key: Spanned<PathBuf>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct HostSection {
    address: Spanned<String>,
    server_name: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Danger {
    #[serde(default)]
    plaintext: bool,
}

impl Config {
    /// Finds the config and reads it and the files that it names.
    pub(crate) fn load(named: Option<&Path>, environment: &Environment) -> Result<Self> {
        let path = find(named, environment)?;
        let text = std::fs::read_to_string(&path).map_err(|error| {
            Failure::usage("CONFIG_UNREADABLE", format!("{}: {error}", path.display()))
                .next("name a file that is there and that you may read, with --config or $TETHER_CONFIG")
        })?;
        Self::parse(&text, &path)
    }

    pub(crate) fn parse(text: &str, path: &Path) -> Result<Self> {
        let source = Source { text, path };
        let file: File = toml::from_str(text).map_err(|error| {
            source
                .refuse(error.span().unwrap_or_default(), error.message())
                .next("correct the line; a whole config is shown by `tether list --config /dev/null`")
        })?;
        let config = Self {
            storage: hosts(file.storage, &source)?,
            compute: hosts(file.compute, &source)?,
            plaintext: file.danger.plaintext,
            tls: None,
            path: path.to_owned(),
        };
        if config.storage.is_empty() && config.compute.is_empty() {
            return Err(Failure::usage("CONFIG_INVALID", format!("{}: no hosts are in it", path.display()))
                .next(HOW_TO_GET_A_CONFIG));
        }
        let over_tcp = |hosts: &BTreeMap<String, Host>| {
            hosts.values().any(|host| matches!(host.address, Address::Tcp(_)))
        };
        if config.plaintext || !(over_tcp(&config.storage) || over_tcp(&config.compute)) {
            return Ok(config);
        }
        let Some(section) = file.tls else {
            return Err(Failure::usage(
                "CONFIG_INVALID",
                format!("{}: there is no [tls] section", path.display()),
            )
            .next(HOW_TO_GET_A_CONFIG));
        };
        let tls = Tls {
            ca: source.pem("ca", &section.ca)?,
            certificate: source.pem("certificate", &section.certificate)?,
            key: source.pem("key", &section.key)?,
        };
        Ok(Self { tls: Some(Arc::new(tls)), ..config })
    }

    /// The hosts of one kind, by name.
    pub(crate) fn hosts(&self, kind: Kind) -> &BTreeMap<String, Host> {
        match kind {
            Kind::Storage => &self.storage,
            Kind::Compute => &self.compute,
        }
    }

    /// The host that is meant: the one named, or the only one.
    pub(crate) fn host(&self, kind: Kind, named: Option<&str>) -> Result<&Host> {
        let hosts = self.hosts(kind);
        let names = hosts.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        let config = self.path.display();
        match (named, hosts.first_key_value()) {
            (_, None) => {
                Err(Failure::usage("NO_HOST", format!("{config}: there is no [{kind}.NAME] section"))
                    .next(format!("add one: [{kind}.{kind}1] with address = \"HOST:PORT\"")))
            }
            (Some(name), _) => hosts.get(name).ok_or_else(|| {
                Failure::usage("NO_SUCH_HOST", format!("{config}: no {kind} host is named {name:?}"))
                    .next(format!("name one of: {names}"))
            }),
            (None, Some((_, only))) if hosts.len() == 1 => Ok(only),
            (None, Some(_)) => Err(Failure::usage("HOST_NEEDED", format!("there are several {kind} hosts"))
                .next(format!("name one with --{kind}: {names}"))),
        }
    }
}

fn find(named: Option<&Path>, environment: &Environment) -> Result<PathBuf> {
    if let Some(path) = named {
        return Ok(path.to_owned());
    }
    if let Some(path) = environment.config.as_ref().filter(|path| !path.is_empty()) {
        return Ok(PathBuf::from(path));
    }
    let own = environment.home.as_ref().map(|home| Path::new(home).join(".config/tether/tether.toml"));
    let places: Vec<PathBuf> = own.into_iter().chain([PathBuf::from("/etc/tether/tether.toml")]).collect();
    places.iter().find(|path| path.exists()).cloned().ok_or_else(|| {
        let tried = places.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(" and ");
        Failure::usage("NO_CONFIG", format!("there is no config: looked for {tried}"))
            .next(HOW_TO_GET_A_CONFIG)
    })
}

fn hosts(sections: BTreeMap<String, HostSection>, source: &Source<'_>) -> Result<BTreeMap<String, Host>> {
    let legal = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    sections
        .into_iter()
        .map(|(name, section)| {
            let address = section.address.get_ref();
            let refuse = |problem: &str| {
                source
                    .refuse(section.address.span(), problem)
                    .next("write address = \"HOST:PORT\", \"[IPV6]:PORT\" or \"unix:/absolute/path\"")
            };
            if name.is_empty() || !name.chars().all(legal) {
                return Err(refuse(&format!("the host's name {name:?} may hold only a-z A-Z 0-9 . _ -")));
            }
            let address = match address.strip_prefix("unix:") {
                Some(path) if path.starts_with('/') => Address::Unix(path.to_owned()),
                Some(_) => return Err(refuse("the path after unix: must be absolute")),
                None => Address::Tcp(tcp(address).ok_or_else(|| refuse("address has no HOST:PORT"))?),
            };
            let server_name = section.server_name.unwrap_or_else(|| name.clone());
            Ok((name.clone(), Host { name, address, server_name }))
        })
        .collect()
}

/// `host:port` when it is one. Names are resolved later.
fn tcp(text: &str) -> Option<String> {
    let (host, port) = text.rsplit_once(':')?;
    let port: u16 = port.parse().ok()?;
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let host_is_legal = match bare {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => !host.is_empty() && host.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c)),
    };
    (port > 0 && host_is_legal).then(|| text.to_owned())
}

/// The text of a config, to say where in it something is wrong.
struct Source<'a> {
    text: &'a str,
    path: &'a Path,
}

impl Source<'_> {
    fn refuse(&self, span: Range<usize>, problem: &str) -> Box<Failure> {
        let before = self.text.get(..span.start).unwrap_or_default();
        let line = before.matches('\n').count() + 1;
        let shown = self.text.lines().nth(line - 1).unwrap_or_default().trim();
        Failure::usage("CONFIG_INVALID", format!("{}, line {line}: {problem}: {shown}", self.path.display()))
    }

    /// Reads a file of PEM, relative to the config.
    fn pem(&self, name: &str, file: &Spanned<PathBuf>) -> Result<Vec<u8>> {
        let path = self.path.parent().unwrap_or(Path::new("")).join(file.get_ref());
        let refuse = |problem: String| {
            self.refuse(file.span(), &format!("{name}: {}: {problem}", path.display())).next(
                "make it with `tether pki issue controller NAME` where the authority is and copy it here with ca.crt, \
                 or correct the path (it is relative to the config), or become a user who may read it",
            )
        };
        let bytes = std::fs::read(&path).map_err(|error| refuse(error.to_string()))?;
        let mode = std::fs::metadata(&path).map_or(0, |metadata| metadata.permissions().mode());
        if name == "key" && mode & 0o077 != 0 {
            // Whoever has it may do all that its certificate may.
            let problem = format!("{name}: others may read {} (mode {:04o})", path.display(), mode & 0o7777);
            return Err(self.refuse(file.span(), &problem).next(format!("chmod 600 {}", path.display())));
        }
        let wanted = if name == "key" { "PRIVATE KEY-----" } else { "-----BEGIN CERTIFICATE-----" };
        if !String::from_utf8_lossy(&bytes).contains(wanted) {
            return Err(refuse(format!(
                "is no {} in PEM",
                if name == "key" { "key" } else { "certificate" }
            )));
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::btree_map;
    use proptest::prelude::*;
    use std::net::Ipv6Addr;

    fn refused(text: &str) -> Box<Failure> {
        Config::parse(text, Path::new("/c/tether.toml")).unwrap_err()
    }

    #[test]
    fn an_unknown_key_is_refused_with_file_and_line() {
        let failure = refused("[storage.s1]\naddress = \"s1:7440\"\nadress = 1\n");
        assert!(
            failure.message.starts_with("/c/tether.toml, line 3: unknown field `adress`"),
            "{}",
            failure.message
        );
        assert!(failure.next.is_some() && failure.exit as u8 == 64);
    }

    #[test]
    fn a_missing_certificate_is_refused_with_line_and_what_to_do() {
        let failure = refused(
            "[tls]\nca = \"no/ca.crt\"\ncertificate = \"x\"\nkey = \"y\"\n[storage.s1]\naddress = \"s1:7440\"\n",
        );
        assert!(failure.message.contains("line 2: ca: /c/no/ca.crt: No such file"), "{}", failure.message);
        assert!(failure.next.as_ref().unwrap().contains("tether pki issue controller"));
        assert!(refused("[storage.s1]\naddress = \"s1:7440\"\n").message.contains("no [tls] section"));
    }

    #[test]
    fn addresses_that_are_none_are_refused() {
        for bad in
            ["s1", "s1:", "s1:0", "s1:70000", ":7440", "fd00::1:7440", "a/b:7440", "unix:relative", "s 1:1"]
        {
            let failure = refused(&format!("[storage.s1]\naddress = {bad:?}\n"));
            assert!(failure.message.contains("line 2"), "{bad}: {}", failure.message);
        }
        assert_eq!(tcp("[fd00::1]:7440").as_deref(), Some("[fd00::1]:7440"));
    }

    #[test]
    fn a_unix_socket_needs_no_certificates_and_the_only_host_is_meant() {
        let text = "[storage.s1]\naddress = \"unix:/run/s.sock\"\n";
        let config = Config::parse(text, Path::new("c")).unwrap();
        assert_eq!(config.host(Kind::Storage, None).unwrap().address, Address::Unix("/run/s.sock".into()));
        assert_eq!(config.host(Kind::Storage, Some("s2")).unwrap_err().next.unwrap(), "name one of: s1");
        assert_eq!(config.host(Kind::Compute, None).unwrap_err().reason, "NO_HOST");
        let text = format!("{text}[storage.s2]\naddress = \"unix:/run/t.sock\"\n");
        let config = Config::parse(&text, Path::new("c")).unwrap();
        assert_eq!(
            config.host(Kind::Storage, None).unwrap_err().next.unwrap(),
            "name one with --storage: s1, s2"
        );
    }

    #[test]
    fn the_config_is_looked_for_where_the_help_says() {
        let home = tempfile::tempdir().unwrap();
        let mut environment = Environment { config: None, home: Some(home.path().into()) };
        let own = home.path().join(".config/tether/tether.toml");
        std::fs::create_dir_all(own.parent().unwrap()).unwrap();
        std::fs::write(&own, "").unwrap();
        assert_eq!(find(None, &environment).unwrap(), own);
        environment.config = Some("/x.toml".into());
        assert_eq!(find(None, &environment).unwrap(), Path::new("/x.toml"));
        assert_eq!(find(Some(Path::new("/y.toml")), &environment).unwrap(), Path::new("/y.toml"));
        let failure = refused("");
        assert!(failure.next.unwrap().contains("tether pki init"));
    }

    #[test]
    fn a_key_that_others_may_read_is_refused_with_the_command_that_mends_it() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, mode: u32| {
            let path = folder.path().join(name);
            std::fs::write(&path, "-----BEGIN CERTIFICATE-----\n-----BEGIN PRIVATE KEY-----\n").unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            path
        };
        let (certificate, key) = (file("c.crt", 0o644), file("c.key", 0o640));
        let text = format!(
            "[tls]\nca = {certificate:?}\ncertificate = {certificate:?}\nkey = {key:?}\n\
             [storage.s1]\naddress = \"s1:7440\"\n"
        );
        let failure = refused(&text);
        assert!(
            failure.message.contains("line 4") && failure.message.contains("mode 0640"),
            "{}",
            failure.message
        );
        assert_eq!(failure.next.as_deref(), Some(&*format!("chmod 600 {}", key.display())));
        file("c.key", 0o600);
        assert!(Config::parse(&text, Path::new("/c/tether.toml")).is_ok());
    }

    proptest! {
        #[test]
        fn what_no_config_can_be_is_refused_with_a_next_step_and_nothing_else_happens(text in any::<String>()) {
            let failure = refused(&text);
            prop_assert!(failure.message.starts_with("/c/tether.toml"), "{}", failure.message);
            prop_assert!(failure.next.is_some());
        }

        #[test]
        fn every_host_is_found_by_its_name_and_reached_at_its_address(
            hosts in btree_map("[a-zA-Z0-9_-]{1,12}", (any::<Ipv6Addr>(), 1_u16..), 1..5),
        ) {
            let text: String = hosts
                .iter()
                .map(|(name, (ip, port))| format!("[compute.{name}]\naddress = \"[{ip}]:{port}\"\n"))
                .chain(["[danger]\nplaintext = true\n".to_owned()])
                .collect();
            let config = Config::parse(&text, Path::new("/c/tether.toml")).unwrap();
            prop_assert_eq!(config.hosts(Kind::Compute).len(), hosts.len());
            for (name, (ip, port)) in &hosts {
                let host = config.host(Kind::Compute, Some(name)).unwrap();
                prop_assert_eq!(&host.address, &Address::Tcp(format!("[{ip}]:{port}")));
                prop_assert!(&host.server_name == name && config.host(Kind::Storage, Some(name)).is_err());
            }
        }
    }
}
