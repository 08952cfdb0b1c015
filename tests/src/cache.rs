//! Where the lab keeps what is expensive to make, and how a thing gets there whole or not at all.
//!
//! An entry is a folder named by the content of everything that made it. It is made under another name and renamed
//! when it is complete, so an entry that exists is complete. Not here: what the entries hold (see `image`, `lab`).

use std::future::Future;
use std::path::{Path, PathBuf};

use anyhow::Context;
use nix::fcntl::{Flock, FlockArg};
use uuid::Uuid;

use crate::progress::say;

/// Names the contents of this cache among all other uses of name-based UUIDs.
const NAMESPACE: Uuid = Uuid::from_u128(0x7e7e_1ab0_5d1c_4f0e_9a51_c0de_7e7e_1ab0);

/// The cache folder, made when it is not there: `TETHER_LAB_CACHE`, else `XDG_CACHE_HOME/tether-lab`, else
/// `~/.cache/tether-lab`.
///
/// # Errors
/// When no home is known or the folder cannot be made.
pub fn folder() -> anyhow::Result<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let folder = match (set("TETHER_LAB_CACHE"), set("XDG_CACHE_HOME"), set("HOME")) {
        (Some(folder), ..) => folder,
        (None, Some(cache), _) => cache.join("tether-lab"),
        (None, None, Some(home)) => home.join(".cache/tether-lab"),
        (None, None, None) => anyhow::bail!("no place for the lab's cache: set TETHER_LAB_CACHE"),
    };
    make_folder(&folder)?;
    folder.canonicalize().with_context(|| format!("{}", folder.display()))
}

/// Makes a folder and its parents.
pub(crate) fn make_folder(path: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(path).with_context(|| format!("cannot make the folder {}", path.display()))
}

/// A short name for contents: equal contents have equal names.
pub fn key<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut all = Vec::new();
    for part in parts {
        // The length keeps ("a", "bc") and ("ab", "c") apart.
        all.extend_from_slice(&(part.len() as u64).to_le_bytes());
        all.extend_from_slice(part);
    }
    Uuid::new_v5(&NAMESPACE, &all).simple().to_string()[..16].to_string()
}

/// The entry `KIND/KEY`; `make` fills a new folder when it is not there yet. Two processes do not make it twice.
///
/// # Errors
/// Those of `make`, and of the file system.
pub async fn entry<F>(kind: &str, key: &str, make: impl FnOnce(PathBuf) -> F) -> anyhow::Result<PathBuf>
where
    F: Future<Output = anyhow::Result<()>>,
{
    let parent = folder()?.join(kind);
    make_folder(&parent)?;
    let complete = parent.join(key);
    if complete.is_dir() {
        return Ok(complete);
    }
    let _lock = lock(&parent.join("lock")).await?;
    if complete.is_dir() {
        return Ok(complete);
    }
    let unfinished = parent.join(format!("{key}.unfinished"));
    remove_folder(&unfinished)?; // left by one that was killed
    make_folder(&unfinished)?;
    make(unfinished.clone()).await?;
    std::fs::rename(&unfinished, &complete)
        .with_context(|| format!("cannot complete {}", complete.display()))?;
    Ok(complete)
}

/// Removes a folder with all that is in it; one that is not there is fine.
pub(crate) fn remove_folder(path: &Path) -> anyhow::Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Waits for a lock that ends with the value, or with the process.
pub(crate) async fn lock(path: &Path) -> anyhow::Result<Flock<std::fs::File>> {
    let open = || std::fs::File::create(path).with_context(|| format!("cannot open {}", path.display()));
    match Flock::lock(open()?, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => return Ok(lock),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
            say(format_args!("waiting for another lab process ({})", path.display()))
        }
        Err((_, e)) => return Err(e).with_context(|| format!("cannot lock {}", path.display())),
    }
    let file = open()?;
    tokio::task::spawn_blocking(move || Flock::lock(file, FlockArg::LockExclusive))
        .await?
        .map_err(|(_, e)| anyhow::Error::from(e).context(format!("cannot lock {}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_tell_contents_apart() {
        let name = |parts: &[&str]| key(parts.iter().map(|p| p.as_bytes()));
        assert_eq!(name(&["a", "bc"]), name(&["a", "bc"]));
        assert_ne!(name(&["a", "bc"]), name(&["ab", "c"]));
        assert_ne!(name(&["a"]), name(&["a", ""]));
    }
}
