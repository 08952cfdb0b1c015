//! fallocate(2) in pieces, each with a deadline, with progress: wiping a device, taking room for a file. Not here: when
//! that is done (`volume`).

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::{FallocateFlags, fallocate};
use tether_agent_core::failure::{Failure, Reason};
use tether_agent_core::steps::{Steps, blocking};
use tether_proto::ByteSize;

/// How much is done by one call: so much that it costs nothing, so little that progress can be seen.
const PIECE: u64 = 256 * 1024 * 1024;
/// How long one piece may take: a disk that writes 1 MiB in a second is on the brink.
const PIECE_DEADLINE: Duration = Duration::from_secs(256);

/// Zeroes a part of a device, by the device's own means where it has them (FALLOC_FL_ZERO_RANGE).
pub(crate) async fn wipe(device: PathBuf, part: Range<u64>, steps: &Steps) -> Result<(), Failure> {
    fn fail(device: &Path, error: io::Error) -> Failure {
        Failure::new(Reason::WipeFailed, format!("wiping {} failed: {error}", device.display()))
    }
    let open = {
        let device = device.clone();
        move || OpenOptions::new().write(true).open(&device).map_err(|error| fail(&device, error))
    };
    let file = Arc::new(blocking(PIECE_DEADLINE, open).await?);
    let zero = FallocateFlags::FALLOC_FL_ZERO_RANGE;
    in_pieces(&file, &device, zero, part, fail, |progress| steps.progress("wipe-volume", progress)).await?;
    blocking(PIECE_DEADLINE, move || file.sync_all().map_err(|error| fail(&device, error))).await
}

/// Takes room for a part of a file, which makes it as long as the part's end. What was never written reads as zeroes.
pub(crate) async fn take(
    file: &Arc<File>,
    path: &Path,
    part: Range<u64>,
    fail: fn(&Path, io::Error) -> Failure,
    progress: impl Fn(String),
) -> Result<(), Failure> {
    in_pieces(file, path, FallocateFlags::empty(), part, fail, progress).await
}

async fn in_pieces(
    file: &Arc<File>,
    path: &Path,
    mode: FallocateFlags,
    part: Range<u64>,
    fail: fn(&Path, io::Error) -> Failure,
    progress: impl Fn(String),
) -> Result<(), Failure> {
    let mut done = part.start;
    while done < part.end {
        let length = PIECE.min(part.end - done);
        let (Ok(offset), Ok(piece)) = (i64::try_from(done), i64::try_from(length)) else {
            return Err(fail(path, io::ErrorKind::FileTooLarge.into()));
        };
        let (file, path) = (file.clone(), path.to_owned());
        blocking(PIECE_DEADLINE, move || {
            fallocate(&*file, mode, offset, piece).map_err(|error| fail(&path, error.into()))
        })
        .await?;
        done += length;
        if let (Ok(now), Ok(all)) =
            (ByteSize::try_from(done - part.start), ByteSize::try_from(part.end - part.start))
        {
            progress(format!("{now} of {all}"));
        }
    }
    Ok(())
}
