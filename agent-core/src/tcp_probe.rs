//! Does somebody listen there? One TCP connect to an address, or to each of several at once: the first that answers wins, and
//! a dead one costs nothing while another lives (F23). Not here: what is behind the port.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;

/// How long an address may take to answer a TCP connect.
const DEADLINE: Duration = Duration::from_secs(3);

/// How an address did not answer.
#[derive(Debug, thiserror::Error)]
pub enum Silence {
    /// Its host is there, and nobody listens.
    #[error("refused")]
    Refused,
    /// Nothing came back.
    #[error("no answer in {} s", DEADLINE.as_secs())]
    Deadline,
    /// The system says why not.
    #[error("{0}")]
    Other(io::Error),
}

/// None of the addresses answered; in the order in which they were given.
#[derive(Debug, thiserror::Error)]
#[error("{}", addresses.iter().map(|(address, why)| format!("{address} ({why})")).collect::<Vec<_>>().join(", "))]
pub struct AllSilent {
    addresses: Vec<(SocketAddr, Silence)>,
}

impl AllSilent {
    /// Is the host there on every address, and nobody listens?
    pub fn is_refused(&self) -> bool {
        self.addresses.iter().all(|(_, why)| matches!(why, Silence::Refused))
    }
}

/// Tries one address.
///
/// # Errors
/// How it did not answer.
pub async fn probe(address: SocketAddr) -> Result<(), Silence> {
    match timeout(DEADLINE, TcpStream::connect(address)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => Err(Silence::Refused),
        Ok(Err(error)) => Err(Silence::Other(error)),
        Err(_) => Err(Silence::Deadline),
    }
}

/// The first address that answers.
///
/// # Errors
/// When none does: how each did not.
pub async fn first_to_answer(addresses: &[SocketAddr]) -> Result<SocketAddr, AllSilent> {
    let mut probes = JoinSet::new();
    for address in addresses.iter().copied() {
        probes.spawn(async move { probe(address).await.map(|()| address).map_err(|why| (address, why)) });
    }
    let mut failed = HashMap::new();
    while let Some(answer) = probes.join_next().await {
        match answer {
            Ok(Ok(address)) => return Ok(address),
            Ok(Err((address, why))) => {
                failed.insert(address, why);
            }
            // A probe that panicked answered nothing.
            Err(error) => tracing::error!(%error, "TCP probe"),
        }
    }
    let told = addresses.iter().filter_map(|address| Some((*address, failed.remove(address)?))).collect();
    Err(AllSilent { addresses: told })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// F23: an address that does not answer does not hold up one that does.
    #[tokio::test]
    async fn f23_a_dead_address_beside_a_living_one_costs_nothing() {
        let living = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let alive = living.local_addr().unwrap();
        let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let dead = closed.local_addr().unwrap();
        drop(closed);
        let silent = first_to_answer(&[dead]).await.unwrap_err();
        assert!(silent.is_refused());
        assert_eq!(silent.to_string(), format!("{dead} (refused)"));
        assert_eq!(first_to_answer(&[dead, alive]).await.unwrap(), alive);
    }
}
