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
use tether_agent_core::steps::Steps;
use tether_proto::ByteSize;

/// How much is done by one call: so much that it costs nothing, so little that progress can be seen.
const PIECE: u64 = 256 * 1024 * 1024;
/// How long one piece may take: a disk that writes 1 MiB in a second is on the brink.
const PIECE_DEADLINE: Duration = Duration::from_secs(256);

/// Zeroes a part of a device, by the device's own means where it has them (FALLOC_FL_ZERO_RANGE). A part of the step
/// `wipe-volume`.
pub(crate) async fn wipe(device: PathBuf, part: Range<u64>, steps: &Steps) -> Result<(), Failure> {
    fn fail(device: &Path, error: io::Error) -> Failure {
        Failure::new(Reason::WipeFailed, format!("wiping {} failed: {error}", device.display()))
    }
    const STEP: &str = "wipe-volume";
    let open = {
        let device = device.clone();
        move || OpenOptions::new().write(true).open(&device).map_err(|error| fail(&device, error))
    };
    let file = Arc::new(steps.block(STEP, PIECE_DEADLINE, open).await?);
    let mode = FallocateFlags::FALLOC_FL_ZERO_RANGE;
    in_pieces(Work { file: &file, path: &device, mode, fail, steps, step: STEP }, part).await?;
    let sync = move || file.sync_all().map_err(|error| fail(&device, error));
    steps.block(STEP, PIECE_DEADLINE, sync).await
}

/// Takes room for a part of a file, which makes it as long as the part's end. What was never written reads as zeroes. A part of
/// the step that is given.
pub(crate) async fn take(
    file: &Arc<File>,
    path: &Path,
    part: Range<u64>,
    fail: fn(&Path, io::Error) -> Failure,
    steps: &Steps,
    step: &'static str,
) -> Result<(), Failure> {
    in_pieces(Work { file, path, mode: FallocateFlags::empty(), fail, steps, step }, part).await
}

struct Work<'a> {
    file: &'a Arc<File>,
    path: &'a Path,
    mode: FallocateFlags,
    fail: fn(&Path, io::Error) -> Failure,
    steps: &'a Steps,
    step: &'static str,
}

async fn in_pieces(work: Work<'_>, part: Range<u64>) -> Result<(), Failure> {
    let Work { mode, fail, steps, step, .. } = work;
    let mut done = part.start;
    while done < part.end {
        let length = PIECE.min(part.end - done);
        let (Ok(offset), Ok(piece)) = (i64::try_from(done), i64::try_from(length)) else {
            return Err(fail(work.path, io::ErrorKind::FileTooLarge.into()));
        };
        let (file, path) = (work.file.clone(), work.path.to_owned());
        let call = move || fallocate(&*file, mode, offset, piece).map_err(|error| fail(&path, error.into()));
        steps.block(step, PIECE_DEADLINE, call).await?;
        done += length;
        if let (Ok(now), Ok(all)) =
            (ByteSize::try_from(done - part.start), ByteSize::try_from(part.end - part.start))
        {
            steps.progress(step, format!("{now} of {all}"));
        }
    }
    Ok(())
}
