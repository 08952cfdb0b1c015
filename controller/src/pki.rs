//! `tether pki`: a certificate authority for Tether, and certificates for agents and their clients. ECDSA P-256. An agent's
//! certificate only serves, a client's only asks; its organizational unit says the role. Nothing that is there is ever written
//! over.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, date_time_ymd,
};
use serde::Serialize;
use tether_proto::Role;
use tonic::Code;
use uuid::Uuid;

use crate::arguments::{ClientCertificate, IssueVerb, PkiVerb};
use crate::failure::{Failure, Result};
use crate::view::Output;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// Clocks differ: a certificate is valid from a day ago.
const BACKDATED: Duration = DAY;
const AUTHORITY_TIME: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);
const CERTIFICATE_TIME: Duration = Duration::from_secs(2 * 365 * 24 * 60 * 60);
const KEY_MODE: u32 = 0o600;
const CERTIFICATE_MODE: u32 = 0o644;

#[derive(Debug, Serialize)]
struct MadeView {
    certificate: PathBuf,
    key: PathBuf,
    authority: PathBuf,
}

/// Runs one of the pki verbs.
pub(crate) fn run(verb: &PkiVerb) -> Result<Output> {
    match verb {
        PkiVerb::Init { place } => init(&place.directory),
        PkiVerb::Issue(IssueVerb::Agent { name, addresses, place }) => {
            let names: Vec<String> = [name].into_iter().chain(addresses).cloned().collect();
            let made =
                issue(&place.directory, name, "tether-agent", names, ExtendedKeyUsagePurpose::ServerAuth)?;
            let text = format!(
                "made {certificate} and {key}\n\
                 copy both and {authority} to the host {name}, the key with mode 0600, and name them under \
                 [server] in the agent's config as certificate, key and ca\n\
                 in the controller's config: server_name = \"{name}\", unless the section is named so",
                certificate = made.certificate.display(),
                key = made.key.display(),
                authority = made.authority.display(),
            );
            Output::new(&made, text)
        }
        PkiVerb::Issue(IssueVerb::Controller(client)) => issue_client(client, Role::Controller),
        PkiVerb::Issue(IssueVerb::Operator(client)) => issue_client(client, Role::Operator),
        PkiVerb::Issue(IssueVerb::Reader(client)) => issue_client(client, Role::Reader),
    }
}

fn issue_client(client: &ClientCertificate, role: Role) -> Result<Output> {
    let (directory, usage) = (&client.place.directory, ExtendedKeyUsagePurpose::ClientAuth);
    let made = issue(directory, &client.name, role.organizational_unit(), Vec::new(), usage)?;
    let text = format!(
        "made {certificate} and {key}, for the role {role}\n\
         they go to where `tether` runs; in its config:\n\
         [tls]\nca = \"{authority}\"\ncertificate = \"{certificate}\"\nkey = \"{key}\"",
        certificate = made.certificate.display(),
        key = made.key.display(),
        authority = made.authority.display(),
    );
    Output::new(&made, text)
}

fn init(directory: &Path) -> Result<Output> {
    if !directory.exists() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(|error| failed("cannot make the directory", directory, &error))?;
    }
    // A name of its own, so that certificates of another authority are told apart by it.
    let number = Uuid::new_v4().simple().to_string();
    let name = format!("Tether CA {}", number.get(..8).unwrap_or_default());
    let mut parameters = parameters(&name, "tether", Vec::new(), AUTHORITY_TIME)?;
    parameters.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = new_key()?;
    let certificate = parameters.self_signed(&key).map_err(|error| unusable(&error))?;
    let (certificate_path, key_path) = (directory.join("ca.crt"), directory.join("ca.key"));
    store(&key_path, &key, &certificate_path, &certificate.pem())?;
    let made = MadeView {
        certificate: certificate_path.clone(),
        key: key_path.clone(),
        authority: certificate_path,
    };
    let text = format!(
        "made the authority {} and its key {}\n\
         the certificate goes to every host; the key stays here, and whoever has it can let anybody in\n\
         next: tether pki issue agent NAME, tether pki issue controller NAME",
        made.certificate.display(),
        made.key.display()
    );
    Output::new(&made, text)
}

fn issue(
    directory: &Path,
    name: &str,
    unit: &str,
    names: Vec<String>,
    usage: ExtendedKeyUsagePurpose,
) -> Result<MadeView> {
    check_name("name", name)?;
    for address in names.iter().filter(|address| address.parse::<IpAddr>().is_err()) {
        check_name("address", address)?;
    }
    if name == "ca" {
        return Err(
            Failure::usage("INVALID_ARGUMENT", "name: ca is the authority's own").next("use another name")
        );
    }
    let authority = directory.join("ca.crt");
    let issuer = authority_of(directory, &authority)?;
    let mut parameters = parameters(name, unit, names, CERTIFICATE_TIME)?;
    parameters.is_ca = IsCa::ExplicitNoCa;
    parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    parameters.extended_key_usages = vec![usage];
    parameters.use_authority_key_identifier_extension = true;
    let key = new_key()?;
    let certificate = parameters.signed_by(&key, &issuer).map_err(|error| unusable(&error))?;
    let (certificate_path, key_path) =
        (directory.join(format!("{name}.crt")), directory.join(format!("{name}.key")));
    store(&key_path, &key, &certificate_path, &certificate.pem())?;
    Ok(MadeView { certificate: certificate_path, key: key_path, authority })
}

fn authority_of(directory: &Path, certificate: &Path) -> Result<Issuer<'static, KeyPair>> {
    let read = |path: &Path| {
        fs::read_to_string(path).map_err(|error| {
            let hint = format!("make an authority: tether pki init --directory {}", directory.display());
            failed("there is no authority that could be used", path, &error).next(hint)
        })
    };
    let certificate = read(certificate)?;
    let key = KeyPair::from_pem(&read(&directory.join("ca.key"))?).map_err(|error| unusable(&error))?;
    Issuer::from_ca_cert_pem(&certificate, key).map_err(|error| unusable(&error))
}

fn parameters(name: &str, unit: &str, names: Vec<String>, time: Duration) -> Result<CertificateParams> {
    let mut parameters = CertificateParams::new(names).map_err(|error| unusable(&error))?;
    let mut subject = DistinguishedName::new();
    subject.push(DnType::OrganizationalUnitName, unit);
    subject.push(DnType::CommonName, name);
    parameters.distinguished_name = subject;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_err(|error| {
        Failure::new(Code::FailedPrecondition, "CLOCK_WRONG", error.to_string()).next("set this host's clock")
    })?;
    let epoch = date_time_ymd(1970, 1, 1);
    parameters.not_before = epoch + now.saturating_sub(BACKDATED);
    parameters.not_after = epoch + (now + time);
    Ok(parameters)
}

fn new_key() -> Result<KeyPair> {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(|error| unusable(&error))
}

fn check_name(field: &str, name: &str) -> Result<()> {
    let legal = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    let first_is_legal = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    if name.len() > 63 || !name.chars().all(legal) || !first_is_legal {
        let problem = "must have 1 to 63 of a-z A-Z 0-9 . _ -, beginning with a letter or digit";
        let message = format!("{field}: {problem}, got {name:?}");
        return Err(Failure::usage("INVALID_ARGUMENT", message).next("name it otherwise"));
    }
    Ok(())
}

/// Writes a key and its certificate, both or none.
fn store(key_path: &Path, key: &KeyPair, certificate_path: &Path, certificate: &str) -> Result<()> {
    for path in [key_path, certificate_path] {
        if path.symlink_metadata().is_ok() {
            return Err(exists(path));
        }
    }
    create(key_path, KEY_MODE, &key.serialize_pem())?;
    create(certificate_path, CERTIFICATE_MODE, certificate).inspect_err(|_| {
        // The key is new and nobody has it: without its certificate it is of no use. If it stays, the next call says so.
        drop(fs::remove_file(key_path));
    })?;
    let directory = key_path.parent().filter(|path| !path.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(|error| failed("cannot be written to the disk", directory, &error))
}

fn create(path: &Path, mode: u32, text: &str) -> Result<()> {
    let mut file =
        OpenOptions::new().write(true).create_new(true).mode(mode).open(path).map_err(|error| match error
            .kind()
        {
            io::ErrorKind::AlreadyExists => exists(path),
            _ => failed("cannot be made", path, &error),
        })?;
    let written = file
        // The mode exactly, whatever the umask.
        .set_permissions(Permissions::from_mode(mode))
        .and_then(|()| file.write_all(text.as_bytes()))
        .and_then(|()| file.sync_all());
    written.map_err(|error| {
        // Half a file would be in the way of the next call.
        drop(fs::remove_file(path));
        failed("cannot be written", path, &error)
    })
}

fn exists(path: &Path) -> Box<Failure> {
    Failure::new(
        Code::AlreadyExists,
        "FILE_EXISTS",
        format!("{} is there already; nothing was changed", path.display()),
    )
    .next("use another name or directory, or move the old files away")
}

fn failed(problem: &str, path: &Path, error: &io::Error) -> Box<Failure> {
    let code = match error.kind() {
        io::ErrorKind::NotFound => Code::NotFound,
        io::ErrorKind::PermissionDenied => Code::PermissionDenied,
        io::ErrorKind::StorageFull => Code::ResourceExhausted,
        _ => Code::Internal,
    };
    Failure::new(code, "FILE_FAILED", format!("{problem}: {}: {error}", path.display()))
        .next("see that the directory is there, is this user's, and has room; --directory names another")
}

fn unusable(error: &rcgen::Error) -> Box<Failure> {
    let message = format!("the authority's files or the names for a certificate cannot be used: {error}");
    Failure::new(Code::InvalidArgument, "CERTIFICATE_FAILED", message)
        .next("see that --directory is the one of `tether pki init`, and that each --address is a name or an address")
}
