//! A TCP link to a fake agent that can be cut, and taken down for good.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

#[derive(Clone, Copy, Default, PartialEq)]
struct State {
    cuts: u32,
    down: bool,
}

/// The link; its address is where the controller connects.
#[derive(Clone)]
pub(crate) struct Link {
    pub(crate) address: SocketAddr,
    state: Arc<watch::Sender<State>>,
}

impl Link {
    /// Breaks all connections; new ones come through.
    pub(crate) fn cut(&self) {
        self.state.send_modify(|state| state.cuts += 1);
    }

    /// Breaks all connections, and new ones too.
    pub(crate) fn down(&self) {
        self.state.send_modify(|state| *state = State { cuts: state.cuts + 1, down: true });
    }
}

/// A listener for an agent, and the link to it.
pub(crate) async fn listen() -> (TcpListener, Link) {
    let behind = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target = behind.local_addr().unwrap();
    let front = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = front.local_addr().unwrap();
    let (state, _) = watch::channel(State::default());
    let state = Arc::new(state);
    let link = Link { address, state: state.clone() };
    tokio::spawn(async move {
        while let Ok((mut near, _)) = front.accept().await {
            let mut state = state.subscribe();
            if state.borrow_and_update().down {
                continue;
            }
            tokio::spawn(async move {
                let mut far = TcpStream::connect(target).await.unwrap();
                tokio::select! {
                    _ = copy_bidirectional(&mut near, &mut far) => {}
                    _ = state.changed() => {}
                }
            });
        }
    });
    (behind, link)
}
