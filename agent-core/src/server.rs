//! Serves one set of gRPC services on two doors: mTLS on TCP, and a Unix socket on the host. All limits on what a client can
//! take stand here.
//!
//! Strangers are everybody before the end of the handshake. They have places of their own, with a deadline; when there are too
//! many of them, one of those that are most goes (`server/places`). Whoever is let in takes a place among the
//! connections, of which one client cannot have all. Every call then passes the gate. Not here: the doors themselves
//! (`server/doors`), what the services do, what the certificates must be (`tls`), and who may do what (`roles`, `gate`).

mod connection;
mod doors;
mod places;

use std::any::Any;
use std::io;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::codegen::http;
use tonic::service::Routes;
use tonic::transport::Server as GrpcServer;
use tower::layer::util::{Identity, Stack};
use tower_http::catch_panic::CatchPanicLayer;

use crate::audit::Refusals;
use crate::config::{ConfigError, Danger, Server};
use crate::failure::{Failure, Reason};
use crate::gate::GateLayer;
use crate::tls::Tls;
use doors::Doors;
pub(crate) use places::one_peer;

/// How long a client may take for its TLS handshake.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(5);
/// How many handshakes may be under way at once. With the connections on both doors they are well below the 1024 file
/// descriptors that systemd gives a service.
const HANDSHAKES: usize = 256;
/// How many connections may be open over TCP.
const CONNECTIONS: usize = 384;
/// How many of those whose certificate has no role may be open beside them.
const CONNECTIONS_WITHOUT_ROLE: usize = 8;
/// How many of them one client may have: one certificate's name.
const CONNECTIONS_OF_ONE: usize = 128;
/// How many connections may be open on the Unix socket; they take nothing from those over TCP, nor these from them.
const LOCAL_CONNECTIONS: usize = 128;
/// How many of them one user may have.
const LOCAL_CONNECTIONS_OF_ONE: usize = 64;
/// How many calls one connection may have under way, those that watch included.
const STREAMS: u32 = 256;
/// How many bytes of a call's request are taken before somebody reads them.
const STREAM_WINDOW: u32 = 64 * 1024;
/// The same of all calls of a connection together.
const CONNECTION_WINDOW: u32 = 256 * 1024;
/// The largest header list of a call, in bytes.
const HEADERS: u32 = 16 * 1024;
/// How long calls under way may take to end once the agent is told to stop.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// Why the agent cannot be reached.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The config.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// An address or socket is not to be had.
    #[error("cannot listen on {place}")]
    Listen {
        /// The address or path.
        place: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A server ended.
    #[error("the gRPC server ended")]
    Serve(#[source] tonic::transport::Error),
}

/// Opens the doors, says `ready`, and serves until `shutdown`.
///
/// # Errors
/// When a door cannot be opened or a server ends by itself.
pub async fn serve(
    server: &Server,
    danger: Danger,
    routes: Routes,
    shutdown: CancellationToken,
    ready: impl FnOnce(),
) -> Result<(), ServerError> {
    server.roles.tell_unknown_users();
    let doors = Doors::new(server.roles.clone(), shutdown.clone());
    let local = doors::listen_unix(&server.socket, server.roles.name_users())?;
    let tcp = match server.listen {
        None => None,
        Some(address) => {
            let listener = TcpListener::bind(address)
                .await
                .map_err(|source| ServerError::Listen { place: address.to_string(), source })?;
            let tls = if danger.plaintext {
                tracing::warn!(%address, "[danger] plaintext is on: whoever reaches this port gets in, as a controller");
                None
            } else {
                Some(Tls::load(server)?)
            };
            // The port may be of the system's choice.
            if let Ok(address) = listener.local_addr() {
                tracing::info!(%address, "listening");
            }
            Some((listener, tls))
        }
    };
    ready();
    let grpc = || grpc(doors.refusals.clone()).add_routes(routes.clone());
    let stop = || shutdown.clone().cancelled_owned();
    let local =
        grpc().serve_with_incoming_shutdown(ReceiverStream::new(doors.clone().accept_unix(local)), stop());
    let remote = async {
        match tcp {
            None => {
                stop().await;
                Ok(())
            }
            Some((listener, None)) => {
                let incoming = ReceiverStream::new(doors.clone().accept_plaintext(listener));
                grpc().serve_with_incoming_shutdown(incoming, stop()).await
            }
            Some((listener, Some(tls))) => {
                let incoming = ReceiverStream::new(doors.clone().accept_tls(listener, tls));
                grpc().serve_with_incoming_shutdown(incoming, stop()).await
            }
        }
    };
    let drained = async {
        shutdown.cancelled().await;
        // Whoever only watches or keeps a connection open does not hold up the end.
        tokio::time::timeout(DRAIN_LIMIT, std::future::pending::<()>()).await
    };
    tokio::select! {
        served = async { tokio::try_join!(local, remote) } => { served.map_err(ServerError::Serve)?; }
        _ = drained => tracing::warn!("connections were still open at the end"),
    }
    Ok(())
}

type Layers = Stack<GateLayer, Stack<CatchPanicLayer<Panicked>, Identity>>;

fn grpc(refusals: Refusals) -> GrpcServer<Layers> {
    GrpcServer::builder()
        // A panic in a handler is an answer, and not a dead connection for all the others on it.
        .layer(CatchPanicLayer::custom(panicked as Panicked))
        .layer(GateLayer(refusals))
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .max_concurrent_streams(Some(STREAMS))
        .initial_stream_window_size(Some(STREAM_WINDOW))
        .initial_connection_window_size(Some(CONNECTION_WINDOW))
        .http2_max_header_list_size(Some(HEADERS))
}

type Panicked = fn(Box<dyn Any + Send>) -> http::Response<Body>;

fn panicked(_: Box<dyn Any + Send>) -> http::Response<Body> {
    let failure = Failure::new(Reason::Internal, "the agent's handler died of a panic");
    tonic::Status::from(failure).into_http()
}
