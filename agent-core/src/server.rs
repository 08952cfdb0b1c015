//! The doors: mTLS on TCP, and a Unix socket for root on the host. Serves one set of gRPC services on both.
//!
//! A connection that has not finished its handshake costs a task with a deadline and a place in a bounded set; when all
//! places are taken, further connections are dropped. Not here: what the services do, and what the certificates must be (`tls`).

use std::any::Any;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::codegen::http;
use tonic::service::Routes;
use tonic::transport::Server as GrpcServer;
use tower::layer::util::{Identity, Stack};
use tower_http::catch_panic::CatchPanicLayer;

use crate::config::{ConfigError, Danger, Server};
use crate::failure::{Failure, Reason};
use crate::tls;

/// How long a client may take for its TLS handshake.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);
/// How many handshakes may be under way at once.
const HANDSHAKES: usize = 256;
/// How long calls under way may take to end once the agent is told to stop.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);
/// After the accept loop fails (no file descriptors), how long until it tries again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

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
    let local = listen_unix(&server.socket)?;
    let tcp = match server.listen {
        None => None,
        Some(address) => {
            let listener = TcpListener::bind(address)
                .await
                .map_err(|source| ServerError::Listen { place: address.to_string(), source })?;
            let acceptor = if danger.plaintext {
                tracing::warn!(%address, "[danger] plaintext is on: whoever reaches this port gets in");
                None
            } else {
                Some(TlsAcceptor::from(tls::server_config(server)?))
            };
            Some((listener, acceptor))
        }
    };
    ready();
    let local = grpc().add_routes(routes.clone()).serve_with_incoming_shutdown(
        ReceiverStream::new(accept_unix(local, shutdown.clone())),
        shutdown.clone().cancelled_owned(),
    );
    let remote = async {
        let stop = shutdown.clone().cancelled_owned();
        match tcp {
            None => {
                stop.await;
                Ok(())
            }
            Some((listener, None)) => {
                let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
                grpc().add_routes(routes).serve_with_incoming_shutdown(incoming, stop).await
            }
            Some((listener, Some(acceptor))) => {
                let incoming = ReceiverStream::new(accept_tls(listener, acceptor, shutdown.clone()));
                grpc().add_routes(routes).serve_with_incoming_shutdown(incoming, stop).await
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

fn grpc() -> GrpcServer<Stack<CatchPanicLayer<Panicked>, Identity>> {
    GrpcServer::builder()
        // A panic in a handler is an answer, and not a dead connection for all the others on it.
        .layer(CatchPanicLayer::custom(panicked as Panicked))
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .max_concurrent_streams(Some(256))
}

type Panicked = fn(Box<dyn Any + Send>) -> http::Response<Body>;

fn panicked(_: Box<dyn Any + Send>) -> http::Response<Body> {
    let failure = Failure::new(Reason::Internal, "the agent's handler died of a panic");
    tonic::Status::from(failure).into_http()
}

/// A socket file that only its owner may open. One that nobody listens on any more is replaced.
fn listen_unix(path: &Path) -> Result<UnixListener, ServerError> {
    let fail = |source| ServerError::Listen { place: path.display().to_string(), source };
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(fail)?;
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => {
            return Err(fail(io::Error::new(
                io::ErrorKind::AddrInUse,
                "another agent listens there already",
            )));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => {
            // A socket that nobody listens on is left by an agent that was killed; anything else is not ours to remove.
            let kind = std::fs::symlink_metadata(path).map_err(fail)?.file_type();
            if !std::os::unix::fs::FileTypeExt::is_socket(&kind) {
                return Err(fail(error));
            }
            std::fs::remove_file(path).map_err(fail)?;
        }
    }
    let listener = UnixListener::bind(path).map_err(fail)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(fail)?;
    Ok(listener)
}

/// Takes connections of root and of the agent's own user; others are dropped.
fn accept_unix(
    listener: UnixListener,
    shutdown: CancellationToken,
) -> mpsc::Receiver<io::Result<tokio::net::UnixStream>> {
    let (sender, receiver) = mpsc::channel(16);
    tokio::spawn(async move {
        let own = nix::unistd::geteuid().as_raw();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = shutdown.cancelled() => return,
            };
            match accepted.and_then(|(stream, _)| Ok((stream.peer_cred()?.uid(), stream))) {
                Ok((uid, stream)) if uid == 0 || uid == own => {
                    if sender.send(Ok(stream)).await.is_err() {
                        return;
                    }
                }
                Ok((uid, _)) => tracing::warn!(uid, "local caller is not root: refused"),
                Err(error) => pause(&error, &shutdown).await,
            }
        }
    });
    receiver
}

type TlsStream = tokio_rustls::server::TlsStream<tokio::net::TcpStream>;

fn accept_tls(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    shutdown: CancellationToken,
) -> mpsc::Receiver<io::Result<TlsStream>> {
    let (sender, receiver) = mpsc::channel(16);
    let places = Arc::new(Semaphore::new(HANDSHAKES));
    tokio::spawn(async move {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = shutdown.cancelled() => return,
            };
            let (stream, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    pause(&error, &shutdown).await;
                    continue;
                }
            };
            let Ok(place) = places.clone().try_acquire_owned() else {
                tracing::warn!(%peer, "too many handshakes under way: dropped");
                continue;
            };
            let (acceptor, sender) = (acceptor.clone(), sender.clone());
            tokio::spawn(async move {
                let _place = place;
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!(%peer, %error, "no TCP_NODELAY");
                }
                match timeout(HANDSHAKE_DEADLINE, acceptor.accept(stream)).await {
                    // The server is going down when nobody takes the connection.
                    Ok(Ok(stream)) => drop(sender.send(Ok(stream)).await),
                    Ok(Err(error)) => tracing::warn!(%peer, %error, "TLS handshake refused"),
                    Err(_) => tracing::warn!(%peer, "TLS handshake took too long"),
                }
            });
        }
    });
    receiver
}

/// accept(2) fails when file descriptors run out; trying again at once would only burn the processor.
async fn pause(error: &io::Error, shutdown: &CancellationToken) {
    tracing::error!(%error, "accept failed");
    // The pause ends by itself: there is no event for "a descriptor is free again".
    if timeout(ACCEPT_PAUSE, shutdown.cancelled()).await.is_ok() {
        tracing::debug!("shutdown while paused");
    }
}
