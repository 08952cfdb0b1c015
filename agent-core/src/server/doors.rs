//! The doors: who connects is let in with a name, a role and a place, or refused with a line in the audit. Not here: the limits
//! (`server`), and what a connection may call (`gate`).

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::server::Acceptor;
use tether_proto::Role;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;

use super::connection::Connection;
use super::places::{Connections, Handshake, Handshakes};
use super::{
    CONNECTIONS, CONNECTIONS_OF_ONE, CONNECTIONS_WITHOUT_ROLE, HANDSHAKE_DEADLINE, HANDSHAKES,
    LOCAL_CONNECTIONS, LOCAL_CONNECTIONS_OF_ONE, ServerError,
};
use crate::audit::{Refusal, Refusals};
use crate::roles::{Caller, Roles};
use crate::tls::{self, Tls};

/// After the accept loop fails (no file descriptors), how long until it tries again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// What all doors need.
#[derive(Debug, Clone)]
pub(super) struct Doors {
    roles: Arc<Roles>,
    pub(super) refusals: Refusals,
    shutdown: CancellationToken,
}

/// Connections that were let in, for gRPC to serve.
type LetIn<S> = mpsc::Receiver<io::Result<Connection<S>>>;

/// A socket file that only its owner may open, or everybody where users of the host have roles: who is at the other end is
/// seen in any case. One that nobody listens on any more is replaced.
pub(super) fn listen_unix(path: &Path, for_users: bool) -> Result<UnixListener, ServerError> {
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
    let mode = if for_users { 0o666 } else { 0o600 };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(fail)?;
    Ok(listener)
}

impl Doors {
    pub(super) fn new(roles: Roles, shutdown: CancellationToken) -> Self {
        Self { roles: Arc::new(roles), refusals: Refusals::default(), shutdown }
    }

    /// Takes connections of root, of the agent's own user, and of users that have a role.
    pub(super) fn accept_unix(self, listener: UnixListener) -> LetIn<UnixStream> {
        let (sender, receiver) = mpsc::channel(16);
        let connections = Connections::new(LOCAL_CONNECTIONS, LOCAL_CONNECTIONS_OF_ONE);
        tokio::spawn(async move {
            while let Some((stream, _)) = self.next(|| listener.accept()).await {
                let caller = match stream.peer_cred() {
                    Ok(peer) => self.roles.of_user(peer.uid()),
                    Err(error) => {
                        tracing::debug!(%error, "went away before it was seen who it is");
                        continue;
                    }
                };
                let place = match caller.role {
                    None => Err(("NO_ROLE", "this user of the host has no role".to_owned())),
                    Some(_) => connections.enter(&caller.who).map_err(|why| ("TOO_MANY_CONNECTIONS", why)),
                };
                match place {
                    Ok(place) => {
                        if sender.send(Ok(Connection::new(stream, caller, place))).await.is_err() {
                            return;
                        }
                    }
                    Err((reason, error)) => self.refuse(Some(&caller), None, reason, &error),
                }
            }
        });
        receiver
    }

    /// Takes everybody, see `[danger]`.
    pub(super) fn accept_plaintext(self, listener: TcpListener) -> LetIn<TcpStream> {
        let (sender, receiver) = mpsc::channel(16);
        let connections = Connections::new(CONNECTIONS, CONNECTIONS_OF_ONE);
        tokio::spawn(async move {
            while let Some((stream, peer)) = self.next(|| listener.accept()).await {
                let (who, role) = ("PLAINTEXT".to_owned(), Some(Role::Controller));
                let caller = Caller { who, role, peer: Some(peer) };
                // All that is known of a client is its address.
                match connections.enter(&peer.ip().to_string()) {
                    Ok(place) => {
                        if sender.send(Ok(Connection::new(stream, caller, place))).await.is_err() {
                            return;
                        }
                    }
                    Err(error) => self.refuse(Some(&caller), Some(peer), "TOO_MANY_CONNECTIONS", &error),
                }
            }
        });
        receiver
    }

    /// Takes those who have a certificate of the authority. Nobody waits for another's handshake.
    pub(super) fn accept_tls(self, listener: TcpListener, tls: Tls) -> LetIn<TlsStream<TcpStream>> {
        let (sender, receiver) = mpsc::channel(16);
        let handshakes = Handshakes::new(HANDSHAKES);
        let connections = Connections::new(CONNECTIONS, CONNECTIONS_OF_ONE);
        // They may only be told that they have no role, and take nobody's place.
        let without_role = Connections::new(CONNECTIONS_WITHOUT_ROLE, CONNECTIONS_WITHOUT_ROLE);
        let tls = Arc::new(tls);
        tokio::spawn(async move {
            while let Some((stream, peer)) = self.next(|| listener.accept()).await {
                let handshake = handshakes.enter(peer.ip());
                let (doors, connections, without_role) =
                    (self.clone(), connections.clone(), without_role.clone());
                let (tls, sender) = (tls.clone(), sender.clone());
                tokio::spawn(async move {
                    let shaken = tokio::select! {
                        shaken = doors.shake(stream, peer, &tls, &handshake) => shaken,
                        () = handshake.evicted.cancelled() => {
                            let error = "more handshakes began than can be under way at once, and most were like it";
                            return doors.refuse(None, Some(peer), "TOO_MANY_HANDSHAKES", error);
                        }
                    };
                    drop(handshake);
                    let Some((stream, caller)) = shaken else { return };
                    let places = if caller.role.is_some() { &connections } else { &without_role };
                    match places.enter(&caller.who) {
                        // The server is going down when nobody takes the connection.
                        Ok(place) => drop(sender.send(Ok(Connection::new(stream, caller, place))).await),
                        Err(error) => doors.refuse(Some(&caller), Some(peer), "TOO_MANY_CONNECTIONS", &error),
                    }
                });
                // Its turn first: what it has said already is heard before the next one can take its place.
                tokio::task::yield_now().await;
            }
        });
        receiver
    }

    /// The TLS handshake of one client, and who it is.
    async fn shake(
        &self,
        stream: TcpStream,
        peer: SocketAddr,
        tls: &Tls,
        handshake: &Handshake,
    ) -> Option<(TlsStream<TcpStream>, Caller)> {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%peer, %error, "no TCP_NODELAY");
        }
        let shaking = async {
            let begun = LazyConfigAcceptor::new(Acceptor::default(), stream).await?;
            handshake.said_hello();
            begun.into_stream(tls.current()).await
        };
        let stream = match timeout(HANDSHAKE_DEADLINE, shaking).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => {
                match tls::refusal(&error) {
                    Some(reason) => self.refuse(None, Some(peer), reason, &error.to_string()),
                    None => tracing::debug!(%peer, %error, "went away before the end of its handshake"),
                }
                return None;
            }
            Err(_) => {
                let error = format!("no TLS handshake within {} s", HANDSHAKE_DEADLINE.as_secs());
                self.refuse(None, Some(peer), "HANDSHAKE_TIMEOUT", &error);
                return None;
            }
        };
        let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
        let certificate = certificates.first().map(AsRef::as_ref).unwrap_or_default();
        match self.roles.of_certificate(certificate, peer) {
            Ok(caller) => Some((stream, caller)),
            Err(error) => {
                self.refuse(None, Some(peer), "CERTIFICATE_UNUSABLE", &error);
                None
            }
        }
    }

    fn refuse(&self, caller: Option<&Caller>, peer: Option<SocketAddr>, reason: &'static str, error: &str) {
        self.refusals.write(&Refusal { caller, peer, rpc: None, reason, error });
    }

    /// The next connection; nothing once the agent ends.
    async fn next<T, F>(&self, accept: impl Fn() -> F) -> Option<T>
    where
        F: Future<Output = io::Result<T>>,
    {
        loop {
            let accepted = tokio::select! {
                accepted = accept() => accepted,
                () = self.shutdown.cancelled() => return None,
            };
            match accepted {
                Ok(accepted) => return Some(accepted),
                Err(error) => {
                    tracing::error!(%error, "accept failed");
                    // No file descriptors: trying again at once would only burn the processor, and there is no event for
                    // "one is free again".
                    drop(timeout(ACCEPT_PAUSE, self.shutdown.cancelled()).await);
                }
            }
        }
    }
}
