//! Is a file closed at the clients? Asked before a volume is given to somebody else, or deleted (rule 2). Not here: how nfsd
//! shows who has it open (`clients`).
//!
//! A client closes a file some time after QEMU did, and unasked. So who still has it open gets a moment, and the kernel
//! says when somebody closes it.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc::{O_NOFOLLOW, O_NONBLOCK};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::stat::{major, minor};

use super::clients::{OpenFile, Whose, open_files};

/// How long a client that let go of a file may take to say so.
const CLOSE_DEADLINE: Duration = Duration::from_secs(3);

/// Who of these clients still has a file open when its time is over. Blocks for at most three seconds.
///
/// # Errors
/// When it cannot be found out.
pub(crate) fn still_open(
    clients: &Path,
    file: &Path,
    inode: u64,
    whose: &Whose,
) -> io::Result<Vec<OpenFile>> {
    let device = match file.parent().unwrap_or(file).metadata() {
        Ok(directory) => directory.dev(),
        // No directory: nothing of its file system is open.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let device = (major(device), minor(device));
    let look = || -> io::Result<Vec<OpenFile>> {
        let mut open = open_files(clients, whose)?;
        open.retain(|open| open.device == device && open.inode == inode);
        Ok(open)
    };
    let events = watch(file)?;
    let until = Instant::now() + CLOSE_DEADLINE;
    loop {
        let open = look()?;
        let left = until.saturating_duration_since(Instant::now());
        let Some(events) = events.as_ref().filter(|_| !open.is_empty() && !left.is_zero()) else {
            return Ok(open);
        };
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        match poll(&mut [PollFd::new(events.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) => return look(),
            Ok(_) => drop(events.read_events()?),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Tells when somebody closes the file; nothing when it is not there. A client that may open it without asking is told to
/// ask, by opening it here (a delegation is recalled then, RFC 8881 section 10.4).
fn watch(file: &Path) -> io::Result<Option<Inotify>> {
    let flags = O_NOFOLLOW | O_NONBLOCK;
    match OpenOptions::new().read(true).write(true).custom_flags(flags).open(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        // The recall has begun, or what has the name is not the file, which somebody else finds out.
        Ok(_) | Err(_) => {}
    }
    let events = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
    match events.add_watch(file, AddWatchFlags::IN_CLOSE | AddWatchFlags::IN_DONT_FOLLOW) {
        Ok(_) => Ok(Some(events)),
        Err(Errno::ENOENT) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// A client of nfsd that has this file open.
    fn open_at(clients: &Path, file: &Path) {
        let metadata = fs::metadata(file).unwrap();
        let (device, inode) = (metadata.dev(), metadata.ino());
        let client = clients.join("7");
        fs::create_dir_all(&client).unwrap();
        fs::write(client.join("info"), "address: \"10.99.0.2:784\"\n").unwrap();
        let superblock = format!("{:02x}:{:02x}:{inode}", major(device), minor(device));
        let state = format!("- 0x1: {{ type: open, access: rw, superblock: \"{superblock}\" }}\n");
        fs::write(client.join("states"), state).unwrap();
    }

    #[test]
    fn f7_who_has_a_file_open_is_told_and_who_closes_it_is_waited_for() {
        let root = tempfile::tempdir().unwrap();
        let (clients, file) = (root.path().join("clients"), root.path().join("a.raw"));
        fs::write(&file, "data").unwrap();
        let inode = fs::metadata(&file).unwrap().ino();
        assert!(still_open(&clients, &file, inode, &Whose::all()).unwrap().is_empty());
        open_at(&clients, &file);
        let began = Instant::now();
        let open = still_open(&clients, &file, inode, &Whose::all()).unwrap();
        assert_eq!(open[0].client, clients.join("7"));
        assert!(began.elapsed() >= CLOSE_DEADLINE);
        assert!(
            still_open(&clients, &file, inode, &Whose::Only(vec!["10.99.0.3".parse().unwrap()]))
                .unwrap()
                .is_empty()
        );
        assert!(still_open(&clients, &file, inode + 1, &Whose::all()).unwrap().is_empty(), "another file");

        // The first look gets its answer from here, when the file is watched already.
        let (states, answer) = (clients.join("7/states"), fs::read(clients.join("7/states")).unwrap());
        fs::remove_file(&states).unwrap();
        nix::unistd::mkfifo(&states, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let (held, closed) = (fs::File::open(&file).unwrap(), file.clone());
        let waiting = std::thread::spawn(move || {
            let began = Instant::now();
            (still_open(&clients, &closed, inode, &Whose::all()).unwrap(), began.elapsed())
        });
        let mut look = OpenOptions::new().write(true).open(&states).unwrap();
        fs::remove_file(&states).unwrap();
        fs::write(&states, "").unwrap();
        std::io::Write::write_all(&mut look, &answer).unwrap();
        drop(look);
        drop(held);
        let (open, took) = waiting.join().unwrap();
        assert!(open.is_empty());
        assert!(took < CLOSE_DEADLINE, "told by the event, not by the deadline: {took:?}");
    }
}
