//! The helper that looks at files of a share. It is this very program, started with another argument, one for each mount:
//! whatever touches the mount hangs when the server is away, so the helper may hang, and the agent never does (F26).
//!
//! Here: what is asked and answered, the helper's side, and how it looks. Not here: starting, asking and giving it up
//! (`mount`).

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use nix::fcntl::OFlag;
use nix::sys::stat::{major, minor};
use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
use serde::{Deserialize, Serialize};
use tether_agent_core::qcow2;
use tether_proto::VolumeFormat;

/// The argument that makes this program a helper.
pub(crate) const ARGUMENT: &str = "file-helper";

/// What the agent wants to know.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Question {
    /// Does the server answer? Asks it for the file system's figures, which no client keeps.
    Alive(PathBuf),
    /// What is this file?
    Look { path: PathBuf, format: VolumeFormat },
    /// Hold this file open until it is flushed: then the flush is told of every write that fails from now on.
    Hold(PathBuf),
    /// Write what this host holds of the file to the server.
    Flush(PathBuf),
}

/// What the helper found.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// It is alive, or held, or flushed.
    Done,
    /// A regular file, and its format is sound.
    Found(Facts),
    /// It is there, and no volume of ours.
    Unfit(String),
    /// The system said no.
    Failed { errno: i32, message: String },
    /// The server gives the directory itself no more, so nothing is known of the file.
    NotShared(String),
}

/// What identifies a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Facts {
    /// Its inode number.
    pub(crate) inode: u64,
    /// `MAJOR:MINOR` of its file system.
    pub(crate) device: String,
    /// What a guest would see, in bytes: of a raw file its length, of a qcow2 file what its header says.
    pub(crate) size: u64,
}

/// The helper: answers until its standard input ends.
pub(crate) fn serve() -> ExitCode {
    // So that ps tells it from the agent.
    if nix::sys::prctl::set_name(c"tether-files").is_err() {
        return ExitCode::FAILURE;
    }
    let mut answers = io::stdout().lock();
    let mut held = Held::default();
    for question in io::stdin().lock().lines() {
        let answer = match question.map(|text| serde_json::from_str(&text)) {
            Ok(Ok(question)) => answer(&question, &mut held),
            Ok(Err(_)) | Err(_) => return ExitCode::FAILURE,
        };
        let told = serde_json::to_string(&answer).map_err(io::Error::from);
        if told.and_then(|text| writeln!(answers, "{text}").and_then(|()| answers.flush())).is_err() {
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

/// Files that wait for their flush.
type Held = HashMap<PathBuf, File>;

fn answer(question: &Question, held: &mut Held) -> Answer {
    let asked = match question {
        Question::Look { path, .. } | Question::Hold(path) => Some(path),
        // What is held is the file that the guest had, whatever its name leads to by now.
        Question::Flush(path) => Some(path).filter(|path| !held.contains_key(*path)),
        Question::Alive(_) => None,
    };
    if let Some(Err(error)) = asked.map(|path| ask_again(path)) {
        return Answer::NotShared(error.to_string());
    }
    let outcome = match question {
        Question::Alive(path) => {
            nix::sys::statvfs::statvfs(path).map(|_| Answer::Done).map_err(io::Error::from)
        }
        Question::Look { path, format } => look(path, *format),
        Question::Hold(path) => hold(path, held).map(|()| Answer::Done),
        Question::Flush(path) => flush(path, held).map(|()| Answer::Done),
    };
    outcome.unwrap_or_else(|error| Answer::Failed {
        errno: error.raw_os_error().unwrap_or_default(),
        message: error.to_string(),
    })
}

/// One that is held already knows more than one that is opened now.
fn hold(path: &Path, held: &mut Held) -> io::Result<()> {
    if !held.contains_key(path) {
        held.insert(path.to_owned(), open(path)?);
    }
    Ok(())
}

fn flush(path: &Path, held: &mut Held) -> io::Result<()> {
    let Some(file) = held.remove(path) else { return open(path)?.sync_all() };
    file.sync_all().map_err(|error| match error.raw_os_error() {
        // Where the directory itself is given no more, nobody can say that the file is gone.
        Some(errno) if errno == nix::Error::ESTALE as i32 && ask_again(path).is_err() => {
            io::Error::other(format!("the server gives the directory no more ({error})"))
        }
        _ => error,
    })
}

/// The client remembers which file a name leads to until it hears that the directory has changed, so it is made to ask.
fn ask_again(path: &Path) -> io::Result<()> {
    let directory = path.parent().unwrap_or(path);
    statx(CWD, directory, AtFlags::STATX_FORCE_SYNC, StatxFlags::BASIC_STATS)?;
    Ok(())
}

fn open(path: &Path) -> io::Result<File> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    OpenOptions::new().read(true).custom_flags(flags.bits()).open(path)
}

fn look(path: &Path, format: VolumeFormat) -> io::Result<Answer> {
    let mut file = open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Ok(Answer::Unfit("it is no regular file".to_owned()));
    }
    let size = match format {
        VolumeFormat::Raw => metadata.len(),
        VolumeFormat::Qcow2 => {
            let mut header = [0; qcow2::HEADER_LENGTH];
            match file.read_exact(&mut header).map(|()| qcow2::virtual_size(&header)) {
                Ok(Ok(size)) => size,
                Ok(Err(problem)) => return Ok(Answer::Unfit(problem.to_owned())),
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    return Ok(Answer::Unfit("it is too short for a qcow2 file".to_owned()));
                }
                Err(error) => return Err(error),
            }
        }
    };
    let device = metadata.dev();
    Ok(Answer::Found(Facts {
        inode: metadata.ino(),
        device: format!("{}:{}", major(device), minor(device)),
        size,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(backing_file: u8) -> [u8; qcow2::HEADER_LENGTH] {
        let mut header = [0; qcow2::HEADER_LENGTH];
        header[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        header[15] = backing_file;
        header[24..32].copy_from_slice(&(64u64 << 20).to_be_bytes());
        header
    }

    /// F4: what a guest writes into a raw volume is data, whatever it looks like.
    #[test]
    fn f4_a_raw_file_is_its_bytes_whatever_they_look_like() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("v1.raw");
        std::fs::write(&path, header(1)).unwrap();
        let raw = look(&path, VolumeFormat::Raw).unwrap();
        assert!(matches!(&raw, Answer::Found(facts) if facts.size == qcow2::HEADER_LENGTH as u64), "{raw:?}");
        assert!(matches!(look(&path, VolumeFormat::Qcow2).unwrap(), Answer::Unfit(_)));
        std::fs::write(&path, header(0)).unwrap();
        let qcow2 = look(&path, VolumeFormat::Qcow2).unwrap();
        assert!(matches!(&qcow2, Answer::Found(facts) if facts.size == 64 << 20), "{qcow2:?}");
        std::fs::write(&path, "short").unwrap();
        assert!(matches!(look(&path, VolumeFormat::Qcow2).unwrap(), Answer::Unfit(_)));
    }

    #[test]
    fn links_folders_and_absent_files_are_no_volumes() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("v1.raw"), "x").unwrap();
        std::os::unix::fs::symlink("v1.raw", folder.path().join("link")).unwrap();
        let ask = |name: &str| {
            let question = Question::Look { path: folder.path().join(name), format: VolumeFormat::Raw };
            answer(&question, &mut Held::default())
        };
        assert!(matches!(ask("link"), Answer::Failed { errno, .. } if errno == nix::Error::ELOOP as i32));
        assert!(matches!(ask("none"), Answer::Failed { errno, .. } if errno == nix::Error::ENOENT as i32));
        assert!(matches!(ask("."), Answer::Unfit(_)));
        let (file, mut held) = (folder.path().join("v1.raw"), Held::default());
        assert_eq!(answer(&Question::Alive(folder.path().to_owned()), &mut held), Answer::Done);
        for _ in 0..2 {
            assert_eq!(answer(&Question::Hold(file.clone()), &mut held), Answer::Done);
        }
        assert!(held.contains_key(&file));
        for _ in 0..2 {
            assert_eq!(answer(&Question::Flush(file.clone()), &mut held), Answer::Done);
        }
        assert!(held.is_empty(), "whoever waits for nobody to have it open may have it");
    }
}
