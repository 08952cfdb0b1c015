//! One agent and the connection to it: mutual TLS over TCP, or a Unix socket. Not here: what goes wrong on the way, in
//! words (`transport.rs`), and calls with retry and progress (`call.rs`).

use std::fmt;
use std::time::Duration;

use tether_proto::wire;
use tether_proto::wire::compute_agent_client::ComputeAgentClient;
use tether_proto::wire::storage_agent_client::StorageAgentClient;
use tether_proto::wire::watch_operation_request::Key;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Status, Streaming};

use crate::config::{Address, Config, Host};
use crate::failure::{Failure, Result};
use crate::transport;

/// How long connecting may take, and the TLS handshake after it.
pub(crate) const CONNECT_TIME: Duration = Duration::from_secs(5);
/// A host that answers no ping within two of these is gone.
const PING_INTERVAL: Duration = Duration::from_secs(10);

/// Which of the two agents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Storage,
    Compute,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Storage => "storage",
            Self::Compute => "compute",
        })
    }
}

/// An agent that was connected to. The connection is made again when it breaks.
#[derive(Debug, Clone)]
pub(crate) struct Agent {
    pub(crate) kind: Kind,
    pub(crate) host: Host,
    channel: Channel,
}

impl Agent {
    /// Connects; an agent that is not there is noticed here, before anything was done.
    pub(crate) async fn connect(config: &Config, kind: Kind, host: &Host) -> Result<Self> {
        let refuse = |error: tonic::transport::Error| transport::explain(kind, host, &error);
        let target = match &host.address {
            Address::Unix(path) => format!("unix://{path}"),
            Address::Tcp(address) if config.tls.is_none() => format!("http://{address}"),
            Address::Tcp(address) => format!("https://{address}"),
        };
        let mut endpoint = Endpoint::from_shared(target)
            .map_err(refuse)?
            .connect_timeout(CONNECT_TIME)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_INTERVAL)
            .keep_alive_while_idle(true);
        if let (Address::Tcp(_), Some(tls)) = (&host.address, &config.tls) {
            let tls = ClientTlsConfig::new()
                .ca_certificate(Certificate::from_pem(&tls.ca))
                .identity(Identity::from_pem(&tls.certificate, &tls.key))
                .domain_name(&host.server_name)
                .timeout(CONNECT_TIME);
            endpoint = endpoint.tls_config(tls).map_err(|error| {
                Failure::usage(
                    "CONFIG_INVALID",
                    format!("[tls] cannot be used: {}", transport::chain(&error)),
                )
                .next(
                    "see that certificate and key belong together and that server_name is a name; \
                     `tether pki issue controller NAME` makes new ones",
                )
            })?;
        }
        let channel = endpoint.connect().await.map_err(refuse)?;
        Ok(Self { kind, host: host.clone(), channel })
    }

    /// The host's name in the config.
    pub(crate) fn name(&self) -> &str {
        &self.host.name
    }

    pub(crate) fn storage(&self) -> StorageAgentClient<Channel> {
        StorageAgentClient::new(self.channel.clone())
    }

    pub(crate) fn compute(&self) -> ComputeAgentClient<Channel> {
        ComputeAgentClient::new(self.channel.clone())
    }

    /// The steps of what runs, or will run next, on a key.
    pub(crate) async fn watch(&self, key: Key) -> std::result::Result<Streaming<wire::StepEvent>, Status> {
        let request = wire::WatchOperationRequest { key: Some(key) };
        let stream = match self.kind {
            Kind::Storage => self.storage().watch_operation(request).await,
            Kind::Compute => self.compute().watch_operation(request).await,
        };
        Ok(stream?.into_inner())
    }

    /// What happens on the host from now on.
    pub(crate) async fn watch_events(&self) -> std::result::Result<Streaming<wire::Event>, Status> {
        let request = wire::WatchRequest {};
        let stream = match self.kind {
            Kind::Storage => self.storage().watch(request).await,
            Kind::Compute => self.compute().watch(request).await,
        };
        Ok(stream?.into_inner())
    }

    /// A reply without what it must hold.
    pub(crate) fn incomplete(&self, missing: &str) -> Box<Failure> {
        let message = format!("the reply of {} holds no {missing}", self.name());
        Failure::new(Code::Internal, "AGENT_REPLY", message)
            .next("see that both ends of Tether have the same version")
    }

    /// What a failed call says. Trouble on the way is told with its cause.
    pub(crate) fn explain(&self, status: &Status) -> Box<Failure> {
        transport::explain_status(self.kind, &self.host, status)
    }
}
