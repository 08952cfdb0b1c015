//! The lock of open-iscsi's database (F24): `lock.write`, which an iscsiadm that was killed leaves behind. Every other one then
//! waits for it for 30 s, and fails.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use tether_agent_core::doctor::{Check, age};
use tether_proto::Finding;

use crate::initiator::iscsi::LOCK_DIRECTORY;

const CHECK: &str = "open-iscsi-lock";
const WHY: &str = "iscsiadm waits for it for 30 s and fails: no login and no logout";
/// A living holder has it for much less.
const SHORT: Duration = Duration::from_secs(5);
/// Clocks of files and of processes differ by ticks.
const ABOUT: Duration = Duration::from_secs(1);
/// The kernel counts in these per second for /proc, whatever its own HZ (proc(5), `starttime`).
const TICKS: u64 = 100;

/// Does nobody hold the lock, and yet it is there?
pub(super) fn check() -> Check {
    Check::reading(CHECK, || {
        let path = Path::new(LOCK_DIRECTORY).join("lock.write");
        // link(2) made it: the time of that change is when it was taken.
        let held = fs::metadata(&path).ok().map(|lock| {
            let then = UNIX_EPOCH + Duration::from_secs(lock.ctime().unsigned_abs());
            age(then)
        });
        vec![judge(&path, held, &iscsiadms(Path::new("/proc")))]
    })
}

/// A process and how long it has lived.
type Process = (u32, Duration);

/// All iscsiadm that live.
fn iscsiadms(proc: &Path) -> Vec<Process> {
    let read = |path: &Path| fs::read_to_string(path).unwrap_or_default();
    let uptime = read(&proc.join("uptime")).split(['.', ' ']).next().and_then(|text| text.parse().ok());
    let uptime = Duration::from_secs(uptime.unwrap_or_default());
    let entries = fs::read_dir(proc).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let stat = read(&entry.path().join("stat"));
            // The name stands in parentheses and may hold any; the start is the 20th word after it (proc(5)).
            let (name, rest) = stat.split_once('(')?.1.rsplit_once(')')?;
            let start: u64 = rest.split_whitespace().nth(19)?.parse().ok()?;
            (name == "iscsiadm").then(|| (pid, uptime.saturating_sub(Duration::from_secs(start / TICKS))))
        })
        .collect()
}

/// `held`: for how long the lock has been there. Only a process that lived when it was taken can hold it.
fn judge(path: &Path, held: Option<Duration>, processes: &[Process]) -> Finding {
    let Some(held) = held.filter(|held| *held > SHORT) else {
        return Finding::ok(CHECK, "free");
    };
    let seconds = held.as_secs();
    match processes.iter().find(|(_, lived)| *lived + ABOUT >= held) {
        Some((pid, _)) => {
            let found = format!("iscsiadm, process {pid}, has had it for {seconds} s");
            Finding::warning(CHECK, found, WHY)
                .mend(format!("ps -fp {pid}   # never kill it: the lock would stay"))
        }
        None => {
            let found = format!("{} is {seconds} s old, and no living process holds it", path.display());
            Finding::error(CHECK, found, WHY).mend(format!("rm {}", path.display()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tether_proto::Severity;

    #[test]
    fn f24_a_lock_that_no_living_process_can_hold_is_stale() {
        let judge = |held: Option<u64>, processes: &[(u32, u64)]| {
            let processes: Vec<Process> =
                processes.iter().map(|(pid, lived)| (*pid, Duration::from_secs(*lived))).collect();
            judge(Path::new("/run/lock/iscsi/lock.write"), held.map(Duration::from_secs), &processes)
        };
        assert_eq!(judge(None, &[]).severity, Severity::Ok);
        assert_eq!(judge(Some(2), &[]).severity, Severity::Ok);
        let stale = judge(Some(60), &[]);
        assert_eq!((stale.severity, stale.mend.as_str()), (Severity::Error, "rm /run/lock/iscsi/lock.write"));
        // This one came later: it waits for the lock.
        assert_eq!(judge(Some(60), &[(7, 20)]).severity, Severity::Error);
        let held = judge(Some(60), &[(7, 20), (8, 61)]);
        assert_eq!(held.severity, Severity::Warning);
        assert!(held.found.contains("process 8"), "{held:?}");
    }

    #[test]
    fn f24_living_iscsiadms_are_found_with_their_age() {
        let proc = tempfile::tempdir().unwrap();
        fs::write(proc.path().join("uptime"), "1000.55 1800.10\n").unwrap();
        let process = |pid: u32, name: &str, start: u64| {
            let folder = proc.path().join(pid.to_string());
            fs::create_dir(&folder).unwrap();
            let stat =
                format!("{pid} ({name}) S 1 7 7 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 {start} 1 2 3\n");
            fs::write(folder.join("stat"), stat).unwrap();
        };
        process(7, "iscsiadm", 94000);
        process(8, "iscsid", 100);
        process(9, "a) (b", 100);
        assert_eq!(iscsiadms(proc.path()), [(7, Duration::from_secs(60))]);
    }
}
