//! Who gets in over TCP: TLS 1.3 with a client certificate of our authority (rule 12). The files of it are looked at before
//! each handshake and loaded anew when they have changed. Not here: the accept loop, and what a client may do (`roles`).

use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{AlertDescription, CertificateError};

use crate::config::{ConfigError, Server};

/// The TLS server's config as the files have it now.
#[derive(Debug)]
pub(crate) struct Tls {
    server: Server,
    loaded: Mutex<Loaded>,
}

#[derive(Debug)]
struct Loaded {
    /// What the files were when they were looked at last.
    seen: Vec<Option<Stamp>>,
    config: Arc<rustls::ServerConfig>,
}

/// What changes of a file when it is written, replaced, or gets another mode: device, inode, size, time of the change.
type Stamp = (u64, u64, u64, i64, i64);

impl Tls {
    /// Loads the files.
    ///
    /// # Errors
    /// As [`server_config`].
    pub(crate) fn load(server: &Server) -> Result<Self, ConfigError> {
        // Before the files are read: a change meanwhile is seen the next time.
        let seen = stamps(server);
        let config = server_config(server)?;
        Ok(Self { server: server.clone(), loaded: Mutex::new(Loaded { seen, config }) })
    }

    /// The config for a new connection. Files that changed are loaded; when they cannot be used, what was loaded before stays,
    /// and the log says why. Connections that are open keep what they began with.
    pub(crate) fn current(&self) -> Arc<rustls::ServerConfig> {
        // A load changes nothing before it has succeeded: a panic cannot leave it half done.
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let seen = stamps(&self.server);
        if seen != loaded.seen {
            loaded.seen = seen;
            match server_config(&self.server) {
                Ok(config) => {
                    loaded.config = config;
                    tracing::info!("certificate, key and authority changed and are loaded anew");
                }
                Err(error) => tracing::error!(
                    %error,
                    "certificate, key or authority changed and cannot be used: the ones from before stay until this is mended"
                ),
            }
        }
        loaded.config.clone()
    }
}

fn stamps(server: &Server) -> Vec<Option<Stamp>> {
    let stamp = |path: &std::path::PathBuf| {
        let file = std::fs::metadata(path).ok()?;
        Some((file.dev(), file.ino(), file.size(), file.ctime(), file.ctime_nsec()))
    };
    [&server.ca, &server.certificate, &server.key].into_iter().map(|path| stamp(path.as_ref()?)).collect()
}

/// Why a handshake failed: a word for the audit. Nothing when the client only went away.
pub(crate) fn refusal(error: &io::Error) -> Option<&'static str> {
    use CertificateError as Bad;
    let Some(error) = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) else {
        return match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => None,
            _ => Some("HANDSHAKE_FAILED"),
        };
    };
    Some(match error {
        rustls::Error::NoCertificatesPresented => "NO_CERTIFICATE",
        rustls::Error::InvalidCertificate(Bad::UnknownIssuer | Bad::BadSignature) => "UNKNOWN_AUTHORITY",
        rustls::Error::InvalidCertificate(Bad::Expired | Bad::ExpiredContext { .. }) => "CERTIFICATE_EXPIRED",
        rustls::Error::InvalidCertificate(Bad::NotValidYet | Bad::NotValidYetContext { .. }) => {
            "CERTIFICATE_NOT_YET_VALID"
        }
        rustls::Error::InvalidCertificate(Bad::InvalidPurpose | Bad::InvalidPurposeContext { .. }) => {
            "CERTIFICATE_NOT_A_CLIENTS"
        }
        rustls::Error::InvalidCertificate(_) => "CERTIFICATE_UNUSABLE",
        rustls::Error::InvalidMessage(_) | rustls::Error::InappropriateMessage { .. } => "NO_TLS",
        rustls::Error::PeerIncompatible(_) => "TLS_VERSION",
        // It was the client that refused us: another authority or another name than it expected, or an expired certificate.
        rustls::Error::AlertReceived(AlertDescription::ProtocolVersion) => "TLS_VERSION",
        rustls::Error::AlertReceived(_) => "AGENT_CERTIFICATE_REFUSED",
        _ => "HANDSHAKE_FAILED",
    })
}

/// Makes the TLS server's config from the files that the agent's config names.
///
/// # Errors
/// A config error that names the key and the file: missing, unreadable, no certificate in it, a key that others may
/// read, a key that does not fit the certificate.
pub fn server_config(server: &Server) -> Result<Arc<rustls::ServerConfig>, ConfigError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let ca_path = required("server.ca", server.ca.as_deref())?;
    let mut roots = RootCertStore::empty();
    for certificate in certificates("server.ca", ca_path)? {
        roots.add(certificate).map_err(|error| unusable("server.ca", ca_path, &error.to_string()))?;
    }
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .build()
        .map_err(|error| unusable("server.ca", ca_path, &error.to_string()))?;

    let certificate_path = required("server.certificate", server.certificate.as_deref())?;
    let chain = certificates("server.certificate", certificate_path)?;
    let key_path = required("server.key", server.key.as_deref())?;
    let mode = std::fs::metadata(key_path)
        .map_err(|error| unreadable("server.key", key_path, &error))?
        .permissions()
        .mode();
    if mode & 0o077 != 0 {
        let problem = format!("{} may be read by others: chmod 600 {0}", key_path.display());
        return Err(ConfigError::value("server.key", problem));
    }
    let key = PrivateKeyDer::from_pem_file(key_path)
        .map_err(|error| unusable("server.key", key_path, &error.to_string()))?;

    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| ConfigError::value("server", error.to_string()))?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(|error| unusable("server.certificate", certificate_path, &error.to_string()))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    // A session that is resumed would pass by the certificate, which may have expired or lost its authority meanwhile.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

fn required<'a>(key: &str, path: Option<&'a Path>) -> Result<&'a Path, ConfigError> {
    path.ok_or_else(|| {
        ConfigError::value(
            key,
            "is missing, and server.listen needs it; make certificates with: tether pki issue agent NAME",
        )
    })
}

/// All certificates of a PEM file.
pub(crate) fn certificates(key: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>, ConfigError> {
    let text = std::fs::read(path).map_err(|error| unreadable(key, path, &error))?;
    let certificates = CertificateDer::pem_slice_iter(&text)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| unusable(key, path, &error.to_string()))?;
    if certificates.is_empty() {
        return Err(unusable(key, path, "no certificate is in it"));
    }
    Ok(certificates)
}

fn unreadable(key: &str, path: &Path, error: &io::Error) -> ConfigError {
    let hint = match error.kind() {
        io::ErrorKind::NotFound => "; make certificates with: tether pki issue agent NAME",
        _ => "",
    };
    ConfigError::value(key, format!("{} cannot be read: {error}{hint}", path.display()))
}

fn unusable(key: &str, path: &Path, problem: &str) -> ConfigError {
    ConfigError::File { key: key.to_owned(), path: path.to_owned(), problem: problem.to_owned() }
}
