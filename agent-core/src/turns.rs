//! Turns at a thing that two operations must not change at once: a domain, a mounted share. One lock a key, and nothing
//! wider (F23, F28). Not here: which operations run (`operations`).

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::OwnedMutexGuard;
use tokio::time::timeout;

/// A turn; over when it is dropped.
pub type Turn = OwnedMutexGuard<()>;

/// The turns at all things of one kind.
#[derive(Debug, Clone)]
pub struct Turns<K> {
    locks: Arc<Mutex<HashMap<K, Arc<tokio::sync::Mutex<()>>>>>,
}

impl<K> Default for Turns<K> {
    fn default() -> Self {
        Self { locks: Arc::default() }
    }
}

impl<K: Eq + Hash> Turns<K> {
    /// Waits for a turn; `None` when others had it all the time.
    pub async fn wait(&self, key: K, within: Duration) -> Option<Turn> {
        let lock = {
            let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
            // Locks that nobody holds or waits for are not kept: what they are for comes and goes.
            locks.retain(|_, lock| Arc::strong_count(lock) > 1);
            locks.entry(key).or_default().clone()
        };
        timeout(within, lock.lock_owned()).await.ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn f28_one_at_a_time_for_a_key_and_never_for_another() {
        let turns = Turns::default();
        let short = Duration::from_millis(10);
        let one = turns.wait("a", short).await.unwrap();
        assert!(turns.wait("a", short).await.is_none());
        turns.wait("b", short).await.unwrap();
        drop(one);
        turns.wait("a", short).await.unwrap();
    }
}
