//! What goes wrong between the controller and an agent, in words and with what to do about it: refused, unreachable,
//! wrong certificate, wrong name. Not here: what an agent itself answers (`failure.rs`).

use std::error::Error;
use std::io;

use rustls::{AlertDescription, CertificateError, InvalidMessage};
use tonic::{Code, ConnectError, Status, TimeoutExpired};

use crate::agent::Kind;
use crate::config::{Address, Host};
use crate::failure::{Certainty, Failure};

/// The TLS alerts by which an agent refuses our certificate, as rustls writes them. By text, because HTTP/2 keeps only the
/// text of what broke a connection.
const REFUSALS: [&str; 9] = [
    "CertificateRequired",
    "UnknownCA",
    "BadCertificate",
    "UnsupportedCertificate",
    "CertificateRevoked",
    "CertificateExpired",
    "CertificateUnknown",
    "AccessDenied",
    "DecryptError",
];

/// All messages of an error and its sources, `a: b: c`.
pub(crate) fn chain(error: &(dyn Error + 'static)) -> String {
    // A status shows itself and its sources at once.
    let mut text = match error.downcast_ref::<Status>() {
        Some(status) => status.message().to_owned(),
        None => error.to_string(),
    };
    let mut source = error.source();
    while let Some(error) = source {
        let part = error.to_string();
        if !text.ends_with(&part) {
            text.push_str(": ");
            text.push_str(&part);
        }
        source = error.source();
    }
    text
}

/// Why an agent was not connected to.
pub(crate) fn explain(kind: Kind, host: &Host, error: &(dyn Error + 'static)) -> Box<Failure> {
    let subject = format!("{kind} host {} ({})", host.name, host.address);
    let failure = known(kind, host, &subject, error).unwrap_or_else(|| {
        Failure::new(
            Code::Unavailable,
            "AGENT_UNREACHABLE",
            format!("{subject} cannot be reached: {}", chain(error)),
        )
        .next(format!("see that tether-{kind}-agent runs there"))
    });
    failure.not_sent()
}

/// What a failed call says. A call that was never sent, because no connection came about, is certain.
pub(crate) fn explain_status(kind: Kind, host: &Host, status: &Status) -> Box<Failure> {
    let failure = Failure::from_status(status);
    if failure.certainty == Certainty::Answered {
        return failure;
    }
    let subject = format!("{kind} host {} ({})", host.name, host.address);
    let never_sent = find::<ConnectError>(status).is_some();
    match known(kind, host, &subject, status) {
        // TLS 1.3 tells a client of a refused certificate only after the handshake, in place of the first answer.
        Some(known) if known.reason == "CONTROLLER_CERTIFICATE_REJECTED" => known,
        _ if never_sent => explain(kind, host, status),
        _ => Failure::new(
            Code::Unavailable,
            "CONNECTION_LOST",
            format!("the connection to {subject} broke during the call: {}", chain(status)),
        )
        .unknown()
        .next("the same command again goes on with what runs there"),
    }
}

fn known(kind: Kind, host: &Host, subject: &str, error: &(dyn Error + 'static)) -> Option<Box<Failure>> {
    let text = chain(error);
    if let Some(alert) = REFUSALS.iter().find(|alert| text.contains(&format!("fatal alert: {alert}"))) {
        return Some(
            Failure::new(
                Code::PermissionDenied,
                "CONTROLLER_CERTIFICATE_REJECTED",
                format!("{subject}: it does not accept our certificate ({alert})"),
            )
            .not_sent()
            .next("issue one with the agent's authority: tether pki issue controller NAME"),
        );
    }
    if let Some(tls) = find::<rustls::Error>(error) {
        return Some(explain_tls(kind, host, subject, tls).not_sent());
    }
    let unreachable = |problem: &str, next: String| {
        Some(Failure::new(Code::Unavailable, "AGENT_UNREACHABLE", format!("{subject}: {problem}")).next(next))
    };
    let late = ["timed out", "timeout", "deadline has elapsed"].iter().any(|word| text.contains(word));
    if late || find::<TimeoutExpired>(error).is_some() {
        return unreachable(
            "no answer within 5 s",
            format!("see that {} is up and that no firewall is in between", host.name),
        );
    }
    if text.contains("dns error") {
        return unreachable(
            "the name cannot be resolved",
            "correct the address in the config, or the resolver".into(),
        );
    }
    let io = find::<io::Error>(error)?;
    match io.kind() {
        io::ErrorKind::ConnectionRefused => unreachable(
            "connection refused",
            format!("see that tether-{kind}-agent runs there and listens at that address"),
        ),
        io::ErrorKind::NotFound if matches!(host.address, Address::Unix(_)) => {
            unreachable("no such socket", format!("start it: systemctl start tether-{kind}-agent"))
        }
        io::ErrorKind::TimedOut | io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => {
            unreachable(
                &io.to_string(),
                format!("see that {} is up and that no firewall is in between", host.name),
            )
        }
        io::ErrorKind::PermissionDenied => Some(
            Failure::new(Code::PermissionDenied, "SOCKET_FORBIDDEN", format!("{subject}: permission denied"))
                .next("call as root, or name this user in [server.roles] of the agent's config (USER=)"),
        ),
        _ => None,
    }
}

fn explain_tls(kind: Kind, host: &Host, subject: &str, error: &rustls::Error) -> Box<Failure> {
    use CertificateError as Bad;
    let refuse = |reason: &str, problem: String, next: String| {
        Failure::new(Code::PermissionDenied, reason, format!("{subject}: {problem}")).next(next)
    };
    let name = &host.server_name;
    match error {
        rustls::Error::InvalidCertificate(Bad::NotValidForName) => refuse(
            "AGENT_CERTIFICATE_NAME",
            format!("its certificate is not for the name {name}"),
            format!(
                "set server_name of [{kind}.{}] to a name in the certificate, or issue another",
                host.name
            ),
        ),
        rustls::Error::InvalidCertificate(Bad::NotValidForNameContext { presented, .. }) => refuse(
            "AGENT_CERTIFICATE_NAME",
            format!("its certificate is not for the name {name}, but for {}", presented.join(", ")),
            format!(
                "set server_name of [{kind}.{}] to one of these, or issue a certificate for {name}",
                host.name
            ),
        ),
        rustls::Error::InvalidCertificate(
            Bad::Expired | Bad::ExpiredContext { .. } | Bad::NotValidYet | Bad::NotValidYetContext { .. },
        ) => refuse(
            "AGENT_CERTIFICATE_EXPIRED",
            format!("its certificate is not valid now: {error}"),
            format!("issue a new one: tether pki issue agent {name}; or set the clock of one of the hosts"),
        ),
        rustls::Error::InvalidCertificate(_) => refuse(
            "AGENT_CERTIFICATE_REJECTED",
            format!("its certificate is not accepted: {error}"),
            "see that ca under [tls] is the authority that issued the agent's certificate".into(),
        ),
        rustls::Error::AlertReceived(AlertDescription::ProtocolVersion)
        | rustls::Error::PeerIncompatible(_) => refuse(
            "TLS_VERSION",
            format!("it does not speak TLS 1.3: {error}"),
            "see that a Tether agent listens at that address".into(),
        ),
        rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType) => refuse(
            "NO_TLS",
            "it does not speak TLS".into(),
            "see that a Tether agent listens at that address, with TLS".into(),
        ),
        _ => refuse("TLS_FAILED", error.to_string(), "see the agent's log".into()),
    }
}

/// The first error of a type among an error and its sources. An `io::Error` hides what it wraps from `source()`.
fn find<'a, E: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a E> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<E>() {
            return Some(found);
        }
        let wrapped = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        next = match wrapped {
            Some(wrapped) => Some(wrapped),
            None => error.source(),
        };
    }
    None
}
