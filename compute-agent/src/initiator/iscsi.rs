//! open-iscsi: probe portals, log in, log out (rule 9, F23, F33). Starts iscsiadm for login and logout and for
//! nothing else. Not here: the node record, what sysfs says, and the order of steps.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use tether_agent_core::command::{CommandError, CommandLine, Output};
use tether_proto::{Iqn, Portal};

use super::session::Session;
use tether_agent_core::tcp_probe::{AllSilent, first_to_answer};

/// open-iscsi's tool.
pub(crate) const ISCSIADM: &str = "/sbin/iscsiadm";
/// Where open-iscsi keeps the lock of its database (LOCK_DIR in its idbm.h).
pub(crate) const LOCK_DIRECTORY: &str = "/run/lock/iscsi";
/// iscsiadm gives up by itself: login_timeout of 5 s and one retry; 30 s is its wait for the database lock (F24).
const IN_ALL: Duration = Duration::from_secs(45);

impl IscsiError {
    /// Is the storage host there on every portal, and nobody listens?
    pub(crate) fn is_refused(&self) -> bool {
        matches!(self, Self::Unreachable { portals } if portals.is_refused())
    }
}

/// Why a target cannot be reached.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IscsiError {
    /// No portal answered.
    #[error("no portal answers: {portals}")]
    Unreachable { portals: AllSilent },
    /// The target refused name or secret.
    #[error("target {target} at {portal} refused the login: {detail}")]
    Rejected { target: Iqn, portal: Portal, detail: String },
    /// There is a session to this target already.
    #[error("there is a session to {target} already")]
    SessionExists { target: Iqn },
    /// Another failure that iscsiadm names.
    #[error("login to {target} at {portal} failed: {meaning}")]
    Login {
        target: Iqn,
        portal: Portal,
        meaning: &'static str,
        #[source]
        source: CommandError,
    },
    /// Logging out failed.
    #[error("logout from {target} failed: {meaning}")]
    Logout {
        target: Iqn,
        meaning: &'static str,
        #[source]
        source: CommandError,
    },
    /// iscsiadm could not be run.
    #[error("iscsiadm")]
    Command(#[source] CommandError),
}

/// iscsiadm(8), "EXIT STATUS", and open-iscsi's include/iscsi_err.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Exit {
    Done,
    SessionExists,
    NothingFound,
    Rejected,
    Other(&'static str),
}

impl Exit {
    fn of(code: Option<i32>) -> Self {
        match code {
            Some(0) => Self::Done,
            Some(15) => Self::SessionExists,
            Some(2 | 21) => Self::NothingFound,
            Some(24) => Self::Rejected,
            Some(4) => Self::Other("the connection was lost or refused"),
            Some(5 | 19) => Self::Other(
                "the target ended the login, or could not prove itself (mutual CHAP): see journalctl -u iscsid",
            ),
            Some(6) => Self::Other("open-iscsi's database cannot be used"),
            Some(7) => Self::Other("open-iscsi does not take the record"),
            Some(8 | 11) => Self::Other("the target did not answer in time"),
            Some(10) => Self::Other("the logout failed"),
            Some(12 | 14) => Self::Other("the kernel lacks the iscsi_tcp transport"),
            Some(13) => Self::Other("iscsiadm must run as root"),
            Some(18 | 20) => Self::Other("iscsid does not run"),
            Some(22) => Self::Other("the kernel's session cannot be found in sysfs"),
            Some(_) => Self::Other("an error that open-iscsi does not explain"),
            None => Self::Other("iscsiadm was killed"),
        }
    }
}

/// The first portal that answers; a dead one costs nothing while another lives (F23).
pub(crate) async fn probe(portals: &[Portal]) -> Result<Portal, IscsiError> {
    let addresses: Vec<SocketAddr> = portals.iter().map(|portal| portal.socket_address()).collect();
    let first = first_to_answer(&addresses).await.map_err(|portals| IscsiError::Unreachable { portals })?;
    // What answered is one of those that were asked.
    Ok(portals.iter().copied().find(|portal| portal.socket_address() == first).unwrap_or(portals[0]))
}

/// Logs in with the record that is in open-iscsi's database.
pub(crate) async fn login(target: &Iqn, portal: Portal) -> Result<(), IscsiError> {
    let portal_text = portal.to_string();
    let record = ["--mode", "node", "--targetname", target.as_str(), "--portal", &portal_text, "--login"];
    let (command, output) = run(&record).await?;
    match Exit::of(output.exit_code) {
        Exit::Done => Ok(()),
        Exit::SessionExists => Err(IscsiError::SessionExists { target: target.clone() }),
        Exit::Rejected => Err(IscsiError::Rejected {
            target: target.clone(),
            portal,
            detail: "wrong secret, or the target does not know this initiator".to_owned(),
        }),
        exit => Err(IscsiError::Login {
            target: target.clone(),
            portal,
            meaning: exit.meaning(),
            source: failed(command, &output),
        }),
    }
}

/// Logs out of one session, whatever portal it was made to. No session to log out of is fine; the caller looks whether it
/// is gone.
pub(crate) async fn logout(target: &Iqn, session: &Session) -> Result<(), IscsiError> {
    let (command, output) = run(&["--mode", "session", "--sid", session.number(), "--logout"]).await?;
    match Exit::of(output.exit_code) {
        Exit::Done | Exit::NothingFound => Ok(()),
        exit => Err(IscsiError::Logout {
            target: target.clone(),
            meaning: exit.meaning(),
            source: failed(command, &output),
        }),
    }
}

/// The process of an iscsiadm that works on a target, as `proc` shows it (proc(5)), whoever started it.
pub(crate) fn at_work_on(proc: &Path, target: &Iqn) -> Option<u32> {
    std::fs::read_dir(proc).into_iter().flatten().flatten().find_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        // One that ends meanwhile is none.
        let name = std::fs::read_to_string(entry.path().join("comm")).ok()?;
        let arguments =
            std::fs::read(entry.path().join("cmdline")).ok().filter(|_| name.trim_end() == "iscsiadm")?;
        let names_it =
            arguments.split(|byte| *byte == 0).any(|argument| argument == target.as_str().as_bytes());
        names_it.then_some(pid)
    })
}

/// open-iscsi's version, as `iscsiadm --version` tells it.
pub(crate) async fn version() -> Option<String> {
    let output = CommandLine::new(ISCSIADM).arg("--version").output().await.ok()?;
    output.stdout.split_whitespace().last().map(str::to_owned)
}

impl Exit {
    fn meaning(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::SessionExists => "there is a session already",
            Self::NothingFound => "open-iscsi has no such record or session",
            Self::Rejected => "the target refused the login",
            Self::Other(meaning) => meaning,
        }
    }
}

async fn run(arguments: &[&str]) -> Result<(String, Output), IscsiError> {
    // After a boot the first iscsiadm makes this folder, and of several at once all but one fail over it.
    if let Err(error) = std::fs::create_dir_all(LOCK_DIRECTORY) {
        tracing::debug!(%error, "{LOCK_DIRECTORY} is left to iscsiadm");
    }
    let command = CommandLine::new(ISCSIADM)
        .args(arguments)
        .deadline(IN_ALL)
        // A killed iscsiadm leaves the database's lock behind for everybody (F24).
        .never_kill();
    let text = command.to_string();
    Ok((text, command.output().await.map_err(IscsiError::Command)?))
}

fn failed(command: String, output: &Output) -> CommandError {
    CommandError::Failed {
        command,
        exit_code: output.exit_code,
        exit: output
            .exit_code
            .map_or_else(|| "killed by a signal".to_owned(), |code| format!("exit code {code}")),
        stderr: output.stderr.trim().replace('\n', "; "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f32_an_iscsiadm_that_outlived_its_agent_is_found_by_its_target() {
        let proc = tempfile::tempdir().unwrap();
        for (pid, name, arguments) in [
            ("7", "iscsiadm", "iscsiadm\0--mode\0node\0--targetname\0iqn.2026-11.example:other\0--login\0"),
            ("8", "cat", "cat\0iqn.2026-11.example:mine\0"),
            ("9", "iscsiadm", "iscsiadm\0--targetname\0iqn.2026-11.example:mine\0--login\0"),
            ("self", "iscsiadm", "iscsiadm\0iqn.2026-11.example:late\0"),
        ] {
            let folder = proc.path().join(pid);
            std::fs::create_dir(&folder).unwrap();
            std::fs::write(folder.join("comm"), format!("{name}\n")).unwrap();
            std::fs::write(folder.join("cmdline"), arguments).unwrap();
        }
        let at_work = |target: &str| at_work_on(proc.path(), &target.parse().unwrap());
        assert_eq!(at_work("iqn.2026-11.example:mine"), Some(9));
        assert_eq!(at_work("iqn.2026-11.example:min"), None);
        assert_eq!(at_work("iqn.2026-11.example:late"), None);
    }

    #[test]
    fn exit_codes_mean_what_open_iscsi_says() {
        assert_eq!(Exit::of(Some(0)), Exit::Done);
        assert_eq!(Exit::of(Some(15)), Exit::SessionExists);
        assert_eq!(Exit::of(Some(21)), Exit::NothingFound);
        assert_eq!(Exit::of(Some(24)), Exit::Rejected);
        assert_eq!(Exit::of(Some(8)).meaning(), "the target did not answer in time");
    }
}
