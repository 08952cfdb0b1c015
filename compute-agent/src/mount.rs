//! Mounted shares: what is mounted where, mount, unmount, and looking at files through a helper (F25, F26, F46).
//!
//! A share has a directory of its own below the agent's mnt directory, named by a hash of server, path and options: another
//! server, path or option is another mount, and never an old one with other options. Nothing in this process touches a
//! mount: `mount` and `umount` are programs with a deadline, files are looked at by a helper process for each mount, and
//! what is mounted is read from `/proc`. Not here: who uses a share (`over_nfs`), and what the kernel's tables mean
//! (`table`).

mod error;
pub(crate) mod file_helper;
mod helpers;
pub(crate) mod table;

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tether_agent_core::command::{CommandError, CommandLine};
use tether_agent_core::qcow2;
use tether_agent_core::stuck::Stuck;
use tether_agent_core::turns::{Turn, Turns};
use tether_proto::{FileSystemId, ServerAddress, SharePath, VolumeFormat};
use uuid::Uuid;

use crate::config::{Nfs, NfsVersion};
pub(crate) use error::MountError;
use file_helper::{Answer, Facts, Question};
use helpers::Helpers;
use table::Mounted;
use tether_agent_core::tcp_probe::first_to_answer;

/// mount(8) would start it too, after system calls that the unit does not have.
const MOUNT: &str = "/sbin/mount.nfs";
const UMOUNT: &str = "/bin/umount";
/// Where NFS 4 listens (RFC 8881 section 2.9.3).
pub(crate) const NFS_PORT: u16 = 2049;
/// How a share is mounted, whatever else is wished: wait for a server that is away and never lose a write (`hard`), but do
/// not wait at the mount itself (`retry=0`, nfs(5)); no other mount's options (`nosharecache`, F46); and nothing in it is a
/// program or a device.
const OPTIONS: &str = "hard,retry=0,nosharecache,nosuid,nodev,noexec";
/// How long `mount` or `umount` may take.
const MOUNT_DEADLINE: Duration = Duration::from_secs(20);
/// How long a server may take to tell about a file.
const LOOK_DEADLINE: Duration = Duration::from_secs(10);
/// How long what this host holds may take to reach the server.
const FLUSH_DEADLINE: Duration = Duration::from_secs(60);
/// How long an attachment waits while others mount or unmount the same share.
const TURN_DEADLINE: Duration = Duration::from_secs(60);
/// The user of qemu-img, made by the package (sysusers.d). It needs no rights on this host: on the share everybody is the
/// volumes' owner.
const QEMU_IMG_USER: &str = "tether-qemu-img";
/// The namespace of our name-based UUIDs (RFC 9562 section 5.5); directories are named by them.
const NAMESPACE: Uuid = Uuid::from_u128(0x2c0e_9b1d_77a4_4f0e_8d15_60c2_93be_51f7);

/// One mount of one share.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Mount {
    /// The server that was chosen.
    pub(crate) server: ServerAddress,
    /// `192.0.2.1:/srv/share`, as mount takes it and the kernel shows it.
    pub(crate) share: String,
    /// Where it is mounted.
    pub(crate) directory: PathBuf,
    /// With what options, without the version. A mount keeps them when the config changes.
    pub(crate) options: String,
    /// With which versions, the first that the server speaks.
    pub(crate) versions: Vec<String>,
}

/// What is on a mount's directory.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Nothing.
    Absent,
    /// The share, as we mount it; with the device of its file system, `MAJOR:MINOR`.
    Mounted { device: String },
    /// Something else; what.
    Other(String),
}

/// All mounts below the mnt directory.
pub(crate) struct Mounts {
    directory: PathBuf,
    mountinfo: PathBuf,
    volumes: PathBuf,
    versions: Vec<NfsVersion>,
    /// Our options and the config's, without the version.
    options: String,
    turns: Turns<FileSystemId>,
    helpers: Helpers,
}

impl Mounts {
    /// Makes the mnt directory below the state directory. QEMU, which is not root, passes through both. Processes that hang at
    /// a mount are entered into `stuck`.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(crate) fn open(state_directory: &Path, config: &Nfs, stuck: Stuck) -> Result<Self, MountError> {
        let directory = state_directory.join("mnt");
        let made = fs::DirBuilder::new().recursive(true).mode(0o711).create(&directory);
        // The kernel shows mounts by their real paths.
        let directory = made
            .and_then(|()| fs::canonicalize(&directory))
            .map_err(|source| MountError::Io { action: "making", path: directory.clone(), source })?;
        let more: String = config.options.iter().map(|option| format!(",{}", option.as_str())).collect();
        Ok(Self {
            directory,
            mountinfo: "/proc/self/mountinfo".into(),
            volumes: "/proc/fs/nfsfs/volumes".into(),
            versions: config.versions.clone(),
            options: format!("{OPTIONS}{more}"),
            turns: Turns::default(),
            helpers: Helpers::new(stuck),
        })
    }

    /// A turn at a share: who mounts or unmounts it, or counts who uses it, does so alone.
    pub(crate) async fn turn(&self, share: FileSystemId) -> Result<Turn, MountError> {
        self.turns.wait(share, TURN_DEADLINE).await.ok_or(MountError::Busy)
    }

    /// The mount of a share from one server, with this config's options.
    pub(crate) fn mount_of(&self, server: ServerAddress, path: &SharePath) -> Mount {
        let share = server.share(path);
        let versions: Vec<String> = self.versions.iter().map(|version| version.as_str().to_owned()).collect();
        let key = format!("{share} {} {}", self.options, versions.join("/"));
        let name = Uuid::new_v5(&NAMESPACE, key.as_bytes()).simple().to_string();
        let directory = self.directory.join(name);
        Mount { server, share, directory, options: self.options.clone(), versions }
    }

    /// The first server that answers.
    pub(crate) async fn probe(&self, servers: &[ServerAddress]) -> Result<ServerAddress, MountError> {
        let addresses: Vec<SocketAddr> =
            servers.iter().map(|server| SocketAddr::new(server.address(), NFS_PORT)).collect();
        let first =
            first_to_answer(&addresses).await.map_err(|servers| MountError::Unreachable { servers })?;
        // What answered is one of those that were asked.
        Ok(servers.iter().copied().find(|server| server.address() == first.ip()).unwrap_or(servers[0]))
    }

    /// What the kernel has on the directory of a mount.
    pub(crate) fn state(&self, mount: &Mount) -> Result<State, MountError> {
        let text = read(&self.mountinfo)?;
        let found = table::mounted_on(&text, &mount.directory).map_err(MountError::Report)?;
        Ok(match found {
            None => State::Absent,
            Some(found) if is_as_we_mount(mount, &found) => State::Mounted { device: found.device },
            Some(found) => State::Other(format!("{} {}", found.kind, found.source)),
        })
    }

    /// All NFS mounts of the host: where, what, and whether the place is in the agent's mnt directory.
    pub(crate) fn list(&self) -> Result<Vec<(PathBuf, String, bool)>, MountError> {
        let all = table::all_nfs(&read(&self.mountinfo)?).map_err(MountError::Report)?;
        let all = all.into_iter().map(|(place, mounted)| {
            let ours = place.starts_with(&self.directory);
            (place, mounted.source, ours)
        });
        Ok(all.collect())
    }

    /// Mounts, unless it is mounted. Versions are tried in the config's order.
    pub(crate) async fn mount(&self, mount: &Mount) -> Result<(), MountError> {
        self.helpers.check_not_stuck(mount)?;
        make_directory(&mount.directory)?;
        self.helpers.start(mount)?;
        let mut refused = None;
        for version in &mount.versions {
            let options = format!("vers={version},{}", mount.options);
            let command = CommandLine::new(MOUNT)
                .arg(&mount.share)
                .arg(&mount.directory)
                .args(["-o", &options])
                .deadline(MOUNT_DEADLINE);
            match command.run().await {
                Ok(_) => {
                    return match self.state(mount)? {
                        State::Mounted { .. } => Ok(()),
                        other => Err(MountError::NotMounted {
                            mount: Box::new(mount.clone()),
                            found: other.describe(),
                        }),
                    };
                }
                Err(error) => {
                    let error = self.told(mount, error);
                    if !matches!(&error, MountError::Mount { source, .. } if is_another_version(source)) {
                        return Err(error);
                    }
                    refused = Some(error);
                }
            }
        }
        Err(refused.unwrap_or(MountError::Report("no version of NFS is configured".to_owned())))
    }

    /// Unmounts, removes the directory and ends the helper, as far as they are there.
    pub(crate) async fn unmount(&self, mount: &Mount) -> Result<(), MountError> {
        self.helpers.check_not_stuck(mount)?;
        self.helpers.end(mount).await?;
        self.unmount_with(mount, &[]).await
    }

    /// Takes a mount out of sight though files of it are open or its server is away (umount(8), `--force` and `--lazy`), and
    /// removes the directory. Only when somebody asked for force: who has a file open still has it.
    pub(crate) async fn take_away(&self, mount: &Mount) -> Result<(), MountError> {
        self.unmount_with(mount, &["--force", "--lazy"]).await
    }

    async fn unmount_with(&self, mount: &Mount, options: &[&str]) -> Result<(), MountError> {
        match self.state(mount)? {
            State::Absent => {}
            State::Other(found) => return Err(MountError::Taken { mount: Box::new(mount.clone()), found }),
            State::Mounted { .. } => {
                // The path is ours and straight: umount need not ask the server where it leads.
                let command =
                    CommandLine::new(UMOUNT).args(["--internal-only", "--no-canonicalize"]).args(options);
                let command = command.arg(&mount.directory);
                let outcome = command.deadline(MOUNT_DEADLINE).run().await;
                let outcome = outcome.map_err(|error| self.told(mount, error));
                // The kernel has the last word: at a server that is away umount waits to say goodbye, and it may be gone
                // before that.
                let left = self.state(mount)?;
                if left != State::Absent {
                    outcome?;
                    return Err(MountError::StillMounted {
                        mount: Box::new(mount.clone()),
                        found: left.describe(),
                    });
                }
                if let Err(error) = outcome {
                    tracing::warn!(share = %mount.share, %error, "unmounted, though umount failed");
                }
            }
        }
        match fs::remove_dir(&mount.directory) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(MountError::Io { action: "removing", path: mount.directory.clone(), source })
            }
            _ => Ok(()),
        }
    }

    /// Does the server of a mounted share answer, now?
    pub(crate) async fn check_alive(&self, mount: &Mount) -> Result<(), MountError> {
        self.probe(&[mount.server]).await?;
        match self.helpers.ask(mount, &Question::Alive(mount.directory.clone()), LOOK_DEADLINE).await? {
            // A stale handle is an answer, too.
            Answer::Done | Answer::Failed { .. } => Ok(()),
            other => Err(MountError::Report(format!("the file helper answered {other:?}"))),
        }
    }

    /// What a file of the share is, and whether it is in the file system that the storage host named.
    pub(crate) async fn look(
        &self,
        mount: &Mount,
        path: &Path,
        format: VolumeFormat,
        file_system: FileSystemId,
    ) -> Result<Facts, MountError> {
        let State::Mounted { device } = self.state(mount)? else {
            return Err(MountError::NotMounted {
                mount: Box::new(mount.clone()),
                found: "nothing".to_owned(),
            });
        };
        if !table::has_file_system_id(&read(&self.volumes)?, &device, file_system) {
            return Err(MountError::OtherFileSystem { mount: Box::new(mount.clone()), wanted: file_system });
        }
        let question = Question::Look { path: path.to_owned(), format };
        let facts = match self.helpers.ask(mount, &question, LOOK_DEADLINE).await? {
            Answer::Found(facts) => facts,
            Answer::Unfit(problem) => return Err(MountError::Unfit { path: path.to_owned(), problem }),
            Answer::Failed { errno, message } => {
                return Err(MountError::File { path: path.to_owned(), errno, message });
            }
            Answer::NotShared(message) => return Err(MountError::not_shared(mount, message)),
            Answer::Done => return Err(MountError::Report("the file helper found nothing".to_owned())),
        };
        if facts.device != device {
            return Err(MountError::NotMounted { mount: Box::new(mount.clone()), found: facts.device });
        }
        Ok(facts)
    }

    /// Holds a file open until it is flushed, so that its flush is told of every write that failed since.
    pub(crate) async fn hold(&self, mount: &Mount, path: &Path) -> Result<(), MountError> {
        self.ask_to_flush(mount, path, Question::Hold(path.to_owned()), LOOK_DEADLINE).await
    }

    /// Holds a file open no longer.
    pub(crate) async fn let_go(&self, mount: &Mount, path: &Path) {
        self.helpers.let_go(mount, path).await;
    }

    /// Writes what this host holds of a file to the server.
    pub(crate) async fn flush(&self, mount: &Mount, path: &Path) -> Result<(), MountError> {
        self.ask_to_flush(mount, path, Question::Flush(path.to_owned()), FLUSH_DEADLINE).await
    }

    async fn ask_to_flush(
        &self,
        mount: &Mount,
        path: &Path,
        question: Question,
        deadline: Duration,
    ) -> Result<(), MountError> {
        match self.helpers.ask(mount, &question, deadline).await? {
            Answer::Done => Ok(()),
            Answer::NotShared(message) => Err(MountError::not_shared(mount, message)),
            Answer::Failed { errno, message } => {
                Err(MountError::File { path: path.to_owned(), errno, message })
            }
            other => Err(MountError::Report(format!("the file helper answered {other:?}"))),
        }
    }

    /// Grows the file of a qcow2 volume that no QEMU has open; QEMU's lock on the file says so, too.
    pub(crate) async fn grow_qcow2(&self, path: &Path, bytes: u64) -> Result<(), MountError> {
        let command = qcow2::resize_by_systemd(path, bytes, QEMU_IMG_USER).deadline(FLUSH_DEADLINE);
        // Slow, it goes on by itself, and keeps nobody else from the share.
        command.run().await.map(drop).map_err(|source| MountError::Grow { path: path.to_owned(), source })
    }

    /// What a failed mount or umount means. One that could not be ended keeps its directory busy (F25).
    fn told(&self, mount: &Mount, error: CommandError) -> MountError {
        if let CommandError::Deadline { command, stuck_pid: Some(pid), .. } = &error {
            let verb = if command.starts_with(UMOUNT) { "unmount" } else { "mount" };
            self.helpers.note_stuck(mount, verb, *pid);
        }
        MountError::Mount { mount: Box::new(mount.clone()), source: error }
    }
}

/// What the kernel shows of a mount of ours, whatever is configured. `timeo` and `retrans` are what nfs(5) says for TCP.
const SHOWN: [&str; 8] =
    ["hard", "nosharecache", "rw", "nosuid", "nodev", "noexec", "sec=sys", "local_lock=none"];
const RETRIES: [&str; 2] = ["timeo=600", "retrans=2"];
/// What it shows only of mounts that behave otherwise than ours (`nfs_show_mount_options` in the kernel's fs/nfs/super.c).
const NEVER_SHOWN: [&str; 14] = [
    "ro",
    "nocto",
    "noac",
    "noacl",
    "nordirplus",
    "fsc",
    "softreval",
    "migration",
    "lookupcache=",
    "write=",
    "acregmin=",
    "acregmax=",
    "acdirmin=",
    "acdirmax=",
];

/// Server, path and options (F46). Not compared is what the kernel does not show as it was given: sizes are the server's to
/// settle, and the number of connections is that of the first mount.
fn is_as_we_mount(mount: &Mount, found: &Mounted) -> bool {
    let configured = |name: &str| mount.options.split(',').find(|option| option.starts_with(name));
    let retries = RETRIES.into_iter().map(|default| {
        let (name, _) = default.split_once('=').unwrap_or((default, ""));
        configured(&format!("{name}=")).unwrap_or(default)
    });
    found.kind == "nfs4"
        && found.source == mount.share
        && SHOWN.into_iter().chain(retries).all(|option| found.has(option))
        && !NEVER_SHOWN.into_iter().any(|option| match option.ends_with('=') {
            true => found.has_any(option),
            false => found.has(option),
        })
        && (!found.has_any("port=") || found.has("port=0") || found.has(&format!("port={NFS_PORT}")))
        && mount.versions.iter().any(|version| found.has(&format!("vers={version}")))
}

impl State {
    fn describe(&self) -> String {
        match self {
            Self::Absent => "nothing".to_owned(),
            Self::Mounted { device } => format!("the share, device {device}"),
            Self::Other(what) => what.clone(),
        }
    }
}

/// Does mount.nfs say that the server does not speak this version?
fn is_another_version(error: &CommandError) -> bool {
    let CommandError::Failed { stderr, .. } = error else { return false };
    stderr.contains("Protocol not supported")
        || stderr.contains("NFS version or transport protocol is not supported")
}

fn read(path: &Path) -> Result<String, MountError> {
    fs::read_to_string(path).map_err(|source| MountError::Io {
        action: "reading",
        path: path.to_owned(),
        source,
    })
}

/// Makes the directory to mount on. One that is there is left over from an attach that was cut off.
fn make_directory(path: &Path) -> Result<(), MountError> {
    match fs::DirBuilder::new().mode(0o711).create(path) {
        Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
            Err(MountError::Io { action: "making", path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
