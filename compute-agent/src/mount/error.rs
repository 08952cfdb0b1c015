//! What can go wrong with a share, and what that means to a caller.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use tether_agent_core::command::CommandError;
use tether_agent_core::failure::{Failure, Reason};
use tether_proto::FileSystemId;

use super::Mount;
use tether_agent_core::tcp_probe::AllSilent;

/// Why a share or a file of it cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MountError {
    /// No server answered.
    #[error("no NFS server answers: {servers}")]
    Unreachable { servers: AllSilent },
    /// The server takes connections and does not answer.
    #[error("the server of {share} did not answer within {} s", deadline.as_secs())]
    Unresponsive { share: String, deadline: Duration },
    /// `mount` or `umount` failed.
    #[error("mounting or unmounting {} failed", mount.share)]
    Mount {
        mount: Box<Mount>,
        #[source]
        source: CommandError,
    },
    /// Something else is mounted where the share belongs.
    #[error("{found} is mounted on {}, which is the place of {}", mount.directory.display(), mount.share)]
    Taken { mount: Box<Mount>, found: String },
    /// The kernel does not show the mount that was made.
    #[error("{} should be on {}, and the kernel shows {found}", mount.share, mount.directory.display())]
    NotMounted { mount: Box<Mount>, found: String },
    /// The kernel still shows a mount that was taken away.
    #[error("{} was unmounted, and the kernel still shows {found} there", mount.directory.display())]
    StillMounted { mount: Box<Mount>, found: String },
    /// The server shows another file system.
    #[error("{} is not the file system {wanted} that the storage host exported", mount.share)]
    OtherFileSystem { mount: Box<Mount>, wanted: FileSystemId },
    /// The server gives this host nothing of a share that is mounted.
    #[error("the server does not share {} with this host any more: {message}", mount.share)]
    NotShared { mount: Box<Mount>, message: String },
    /// The file is there, and cannot be the volume.
    #[error("{} is not the volume: {problem}", path.display())]
    Unfit { path: PathBuf, problem: String },
    /// The file cannot be opened or flushed.
    #[error("{}: {message}", path.display())]
    File { path: PathBuf, errno: i32, message: String },
    /// The file could not be made larger.
    #[error("growing {} failed", path.display())]
    Grow {
        path: PathBuf,
        #[source]
        source: CommandError,
    },
    /// An earlier process hangs in the kernel.
    #[error("{0}")]
    Stuck(Box<Failure>),
    /// Others had the share all the time.
    #[error("others were busy with the share all the time")]
    Busy,
    /// The helper cannot be used.
    #[error("the file helper")]
    Helper(#[source] CommandError),
    /// A file or directory of this host could not be used.
    #[error("{action} {} failed", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// Something is not as documented.
    #[error("{0}")]
    Report(String),
}

impl MountError {
    /// [`MountError::NotShared`].
    pub(super) fn not_shared(mount: &Mount, message: String) -> Self {
        Self::NotShared { mount: Box::new(mount.clone()), message }
    }

    /// Is the file no longer there, or not under this handle? Then nothing of it is left to be written.
    pub(crate) fn is_gone(&self) -> bool {
        let gone = [nix::Error::ENOENT, nix::Error::ESTALE].map(|error| error as i32);
        matches!(self, Self::File { errno, .. } if gone.contains(errno))
    }
}

impl From<MountError> for Failure {
    fn from(error: MountError) -> Self {
        let told = |reason| Failure::from_error(reason, &error);
        let with_command = |reason, source: &CommandError| {
            let mut failure = told(reason);
            failure.command = Some(source.command().to_owned());
            failure.exit = source.exit_code();
            failure
        };
        match &error {
            MountError::Unreachable { .. } => told(Reason::ServerUnreachable),
            MountError::Unresponsive { .. } => told(Reason::ServerUnreachable).next(
                "see on the storage host: systemctl status nfs-server, journalctl -k; a server that was just started lets \
                 nobody open a file until its grace period is over (nfs.conf, grace-time): call again then",
            ),
            MountError::Mount { mount, source } => mount_failed(with_command, mount, source),
            MountError::Taken { mount, .. } => told(Reason::NotOurs).next(format!(
                "see what it is: findmnt {0}; unmount it if nobody uses it, then call again",
                mount.directory.display()
            )),
            MountError::NotMounted { mount, .. } => told(Reason::MountFailed)
                .next(format!("see what is mounted: findmnt {0}", mount.directory.display())),
            MountError::NotShared { .. } => told(Reason::MountFailed)
                .next("on the storage host: tether reconcile, or Export again, brings the share back; see exportfs -v. Then call again"),
            MountError::StillMounted { mount, .. } => told(Reason::StillThere)
                .next(format!("see what is mounted: findmnt {0}", mount.directory.display())),
            MountError::OtherFileSystem { .. } | MountError::Unfit { .. } => told(Reason::WrongDevice)
                .next("do not use it; see the file on the storage host, then export again under a new id"),
            MountError::File { .. } if error.is_gone() => told(Reason::WrongDevice)
                .next("the storage host has no such file any more: see its pool's directory, and export again"),
            MountError::File { .. } => told(Reason::MountFailed)
                .next("see on the storage host that the file has the pool's owner and mode 0600: ls -ln"),
            MountError::Grow { source, .. } => with_command(Reason::FileFailed, source)
                .next("run the command by hand on the compute host; the domain must be shut off"),
            MountError::Stuck(_) => told(Reason::Stuck),
            MountError::Busy => told(Reason::OperationRunning),
            MountError::Helper(source) => with_command(Reason::Internal, source),
            MountError::Io { .. } | MountError::Report(_) => told(Reason::MountFailed)
                .next("see the agent's state directory, /proc/self/mountinfo and journalctl -k on the compute host"),
        }
    }
}

/// What mount.nfs and umount say, in the C locale.
fn mount_failed(
    with_command: impl Fn(Reason, &CommandError) -> Failure,
    mount: &Mount,
    source: &CommandError,
) -> Failure {
    let text = source.to_string();
    let says = |words: &[&str]| words.iter().any(|word| text.contains(word));
    match source {
        CommandError::Deadline { stuck_pid: Some(_), .. } => with_command(Reason::Stuck, source),
        _ if says(&[
            "Connection refused",
            "Connection timed out",
            "No route to host",
            "Network is unreachable",
        ]) =>
        {
            with_command(Reason::ServerUnreachable, source)
        }
        CommandError::Deadline { command, .. } if command.starts_with(super::UMOUNT) => {
            with_command(Reason::ServerUnreachable, source).next(format!(
                "bring the storage host back, then detach again; when it is gone for good, on the compute host: umount -f -l {}, \
                 then detach again",
                mount.directory.display()
            ))
        }
        _ if says(&["target is busy", "device is busy"]) => {
            with_command(Reason::DeviceInUse, source).next(format!(
                "see what uses the mount on the compute host: fuser -vm {}; end it, then detach again",
                mount.directory.display()
            ))
        }
        _ => with_command(Reason::MountFailed, source),
    }
}
