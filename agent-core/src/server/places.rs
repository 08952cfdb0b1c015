//! Places for connections: how many there may be, and who has to go when there are more. Two kinds, because who a client is,
//! is known only after its handshake. Strangers compete for the places of handshakes and for nothing else; a connection that
//! has got in takes a place of its client's.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

/// Handshakes under way, of clients of which nothing but the address is known.
#[derive(Debug, Clone)]
pub(super) struct Handshakes {
    most: usize,
    /// In the order in which they began.
    under_way: Arc<Mutex<Vec<UnderWay>>>,
}

#[derive(Debug)]
struct UnderWay {
    address: IpAddr,
    /// It has said what a client says first.
    said_hello: bool,
    evicted: CancellationToken,
}

/// A handshake's place; given back when it is dropped.
#[derive(Debug)]
pub(super) struct Handshake {
    all: Handshakes,
    /// Cancelled when another took the place.
    pub(super) evicted: CancellationToken,
}

impl Handshakes {
    pub(super) fn new(most: usize) -> Self {
        Self { most, under_way: Arc::default() }
    }

    /// A place for a new handshake, always. When there is none, the oldest goes of those that are most: of one address, and
    /// either still silent or not. So a flood takes its own places away, and a client that says its hello at once is not
    /// among those who say nothing, also when it comes from where they are.
    pub(super) fn enter(&self, address: IpAddr) -> Handshake {
        let (address, evicted) = (one_peer(address), CancellationToken::new());
        let mut under_way = lock(&self.under_way);
        under_way.push(UnderWay { address, said_hello: false, evicted: evicted.clone() });
        if under_way.len() > self.most {
            let mut counts = HashMap::<(IpAddr, bool), usize>::new();
            for one in under_way.iter() {
                *counts.entry((one.address, one.said_hello)).or_default() += 1;
            }
            let most = counts.values().max().copied();
            let are_most = |one: &UnderWay| counts.get(&(one.address, one.said_hello)).copied() == most;
            if let Some(oldest) = under_way.iter().position(are_most) {
                under_way.remove(oldest).evicted.cancel();
            }
        }
        Handshake { all: self.clone(), evicted }
    }
}

impl Handshake {
    /// The client has said its hello.
    pub(super) fn said_hello(&self) {
        if let Some(one) = lock(&self.all.under_way).iter_mut().find(|one| one.evicted == self.evicted) {
            one.said_hello = true;
        }
    }
}

impl Drop for Handshake {
    fn drop(&mut self) {
        // Each has a token of its own. One whose place was taken is not there any more.
        lock(&self.all.under_way).retain(|one| one.evicted != self.evicted);
    }
}

/// Connections of clients that are known.
#[derive(Debug, Clone)]
pub(super) struct Connections {
    most: usize,
    most_of_one: usize,
    open: Arc<Mutex<HashMap<String, usize>>>,
}

/// A connection's place; given back when it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    all: Connections,
    client: String,
}

impl Connections {
    /// At most so many, and so many of one client.
    pub(super) fn new(most: usize, most_of_one: usize) -> Self {
        Self { most, most_of_one, open: Arc::default() }
    }

    /// A place for one more connection of a client.
    ///
    /// # Errors
    /// When there is none, a sentence.
    pub(super) fn enter(&self, client: &str) -> Result<Place, String> {
        let mut open = lock(&self.open);
        if open.get(client).is_some_and(|open| *open >= self.most_of_one) {
            return Err(format!("it has {} connections, and one client may have no more", self.most_of_one));
        }
        if open.values().sum::<usize>() >= self.most {
            return Err(format!("there are {} connections, and there may be no more", self.most));
        }
        *open.entry(client.to_owned()).or_default() += 1;
        Ok(Place { all: self.clone(), client: client.to_owned() })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = lock(&self.all.open);
        if let Some(count) = open.get_mut(&self.client) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.client);
            }
        }
    }
}

/// What one host can call itself: over IPv6 any address of its link's network (RFC 7421), so they are one.
pub(crate) fn one_peer(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into(),
        address => address,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each change is one insert or remove; a panic elsewhere cannot leave it half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_takes_its_own_places_away() {
        let handshakes = Handshakes::new(4);
        let [honest, flood]: [IpAddr; 2] = ["192.0.2.1", "192.0.2.2"].map(|ip| ip.parse().unwrap());
        let mine = handshakes.enter(honest);
        let theirs: Vec<Handshake> = (0..10).map(|_| handshakes.enter(flood)).collect();
        assert!(!mine.evicted.is_cancelled());
        let left: Vec<bool> = theirs.iter().map(|handshake| !handshake.evicted.is_cancelled()).collect();
        assert_eq!(left, [[false; 7].as_slice(), &[true; 3]].concat(), "the oldest go");
        drop(theirs);
        assert_eq!(lock(&handshakes.under_way).len(), 1);
        drop(mine);
        assert!(lock(&handshakes.under_way).is_empty());
    }

    #[test]
    fn who_said_hello_stays_and_the_silent_go() {
        let handshakes = Handshakes::new(4);
        let address = "192.0.2.1".parse().unwrap();
        let evicted =
            |all: &[Handshake]| all.iter().map(|one| one.evicted.is_cancelled()).collect::<Vec<_>>();
        let first = handshakes.enter(address);
        first.said_hello();
        let silent: Vec<Handshake> = (0..5).map(|_| handshakes.enter(address)).collect();
        assert!(!first.evicted.is_cancelled());
        assert_eq!(evicted(&silent), [true, true, false, false, false]);
        // Those who say their hello and then nothing more are a flood, too.
        silent[2..].iter().for_each(Handshake::said_hello);
        let last = [handshakes.enter(address), handshakes.enter(address)];
        assert!(first.evicted.is_cancelled());
        assert_eq!(evicted(&silent), [true, true, true, false, false]);
        assert_eq!(evicted(&last), [false, false]);
    }

    #[test]
    fn an_address_is_one_however_it_is_written() {
        let handshakes = Handshakes::new(2);
        let first = handshakes.enter("192.0.2.1".parse().unwrap());
        let other = handshakes.enter("192.0.2.2".parse().unwrap());
        let _second = handshakes.enter("::ffff:192.0.2.1".parse().unwrap());
        assert!(first.evicted.is_cancelled() && !other.evicted.is_cancelled());
    }

    #[test]
    fn a_host_with_a_network_of_addresses_is_one() {
        let handshakes = Handshakes::new(3);
        let other = handshakes.enter("2001:db8:0:2::1".parse().unwrap());
        let flood =
            [1, 2, 3].map(|last| handshakes.enter(Ipv6Addr::new(0x2001, 0xdb8, 0, 1, 0, 0, 7, last).into()));
        assert!(flood[0].evicted.is_cancelled() && !other.evicted.is_cancelled());
    }

    #[test]
    fn one_client_has_its_share_and_gives_it_back() {
        let connections = Connections::new(3, 2);
        let a = [connections.enter("a").unwrap(), connections.enter("a").unwrap()];
        assert!(connections.enter("a").unwrap_err().contains("one client may have no more"));
        let b = connections.enter("b").unwrap();
        assert!(connections.enter("c").unwrap_err().contains("there are 3 connections"));
        drop(b);
        connections.enter("c").unwrap();
        drop(a);
        assert!(lock(&connections.open).is_empty());
    }
}
