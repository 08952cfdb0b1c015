//! Who gets in over TCP: TLS 1.3 with a client certificate of our authority (rule 12). Not here: the accept loop.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;

use crate::config::{ConfigError, Server};

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

fn certificates(key: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>, ConfigError> {
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
    ConfigError::value(key, format!("{} cannot be used: {problem}", path.display()))
}
