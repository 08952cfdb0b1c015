//! The state directory: room for the journal, and files in it that cannot be understood. Not here: what is recorded there.

use std::io;
use std::path::{Path, PathBuf};

use nix::sys::statvfs::statvfs;
use tether_proto::Finding;

use super::Check;

const SPACE: &str = "state-directory";
const JOURNAL: &str = "journal";
/// Less is too little for an agent to go on: a record is some KiB, and is written beside the old one.
const LEAST_BYTES: u64 = 1024 * 1024;
/// Less is soon too little.
const FEW_BYTES: u64 = 64 * 1024 * 1024;
/// The same for inodes: one for each record and each ended id.
const LEAST_INODES: u64 = 16;
const FEW_INODES: u64 = 1024;

/// Looks for damaged files of one kind of record: [`crate::journal::find_damaged`].
pub type FindDamaged = fn(&Path) -> io::Result<Vec<(PathBuf, String)>>;

/// The checks of a state directory with these journals in it, by the name of their directories.
pub fn checks(directory: &Path, journals: Vec<(&'static str, FindDamaged)>) -> Vec<Check> {
    let (for_space, for_journal) = (directory.to_owned(), directory.to_owned());
    vec![
        Check::reading(SPACE, move || vec![space(&for_space)]),
        Check::reading(JOURNAL, move || damaged(&for_journal, journals)),
    ]
}

fn space(directory: &Path) -> Finding {
    let room = match statvfs(directory) {
        Ok(room) => room,
        Err(nix::errno::Errno::ENOENT) => {
            let found = format!("{} is not there", directory.display());
            return Finding::note(SPACE, found, "the agent makes it when it first starts");
        }
        Err(error) => {
            let found = format!("{}: {error}", directory.display());
            return Finding::error(
                SPACE,
                found,
                "the agent keeps its journal there, and cannot work without it",
            )
            .mend(format!("ls -ld {}", directory.display()));
        }
    };
    // Some file systems (btrfs) have no number of inodes.
    let inodes = (room.files() > 0).then(|| room.files_available());
    judge_space(directory, room.blocks_available() * room.fragment_size(), inodes)
}

fn judge_space(directory: &Path, bytes: u64, inodes: Option<u64>) -> Finding {
    let of_inodes = inodes.map(|inodes| format!(" and {inodes} inodes")).unwrap_or_default();
    let found = format!("{} MiB{of_inodes} free in {}", bytes / 1024 / 1024, directory.display());
    let less =
        |least_bytes, least_inodes| bytes < least_bytes || inodes.is_some_and(|inodes| inodes < least_inodes);
    let mend = format!("du -xhd2 $(findmnt -no TARGET --target {}) | sort -h | tail", directory.display());
    let why = "nothing is begun that the journal has no room for: no attach, and no detach";
    match () {
        () if less(LEAST_BYTES, LEAST_INODES) => Finding::error(SPACE, found, why).mend(mend),
        () if less(FEW_BYTES, FEW_INODES) => Finding::warning(SPACE, found, why).mend(mend),
        () => Finding::ok(SPACE, found),
    }
}

fn damaged(directory: &Path, journals: Vec<(&'static str, FindDamaged)>) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (name, find_damaged) in journals {
        let journal = directory.join(name);
        match find_damaged(&journal) {
            Ok(files) => findings.extend(files.iter().map(|(path, problem)| damaged_file(path, problem))),
            Err(error) => {
                let found = format!("{} cannot be read: {error}", journal.display());
                let why = "it is not known whether its records are whole";
                let mend = "run the doctor as root";
                findings.push(Finding::warning(JOURNAL, found, why).mend(mend));
            }
        }
    }
    if findings.is_empty() {
        findings.push(Finding::ok(JOURNAL, "no damaged files"));
    }
    findings
}

fn damaged_file(path: &Path, problem: &str) -> Finding {
    let found = format!("damaged: {} ({problem})", path.display());
    let why = "what it recorded is not known, so nothing new is exported or attached, and no share or mount is ended that it may \
        need. Without a backup: find what it was of among the orphaned in tether list --all, end that by hand, and only then \
        remove the file";
    // `KEY.json.damaged`, or with a number when there was one already.
    let whole = path.display().to_string();
    let whole = whole.rfind(".json").map_or(whole.as_str(), |at| &whole[..at + ".json".len()]);
    let aside = if path.extension().is_some_and(|extension| extension == "damaged") {
        format!(" && rm {}", path.display())
    } else {
        String::new()
    };
    Finding::error(JOURNAL, found, why)
        .mend(format!("cp -p YOUR-BACKUP{whole} {whole}{aside} && systemctl restart 'tether-*-agent'"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::{Journal, find_damaged};
    use tether_proto::Severity;

    #[test]
    fn little_room_is_a_warning_and_none_an_error() {
        let mib = 1024 * 1024;
        for (bytes, inodes, severity) in [
            (2048 * mib, Some(100_000), Severity::Ok),
            (2048 * mib, None, Severity::Ok),
            (63 * mib, Some(100_000), Severity::Warning),
            (2048 * mib, Some(1000), Severity::Warning),
            (4096, Some(100_000), Severity::Error),
            (2048 * mib, Some(0), Severity::Error),
        ] {
            let finding = judge_space(Path::new("/var/lib/x"), bytes, inodes);
            assert_eq!(finding.severity, severity, "{finding:?}");
        }
    }

    #[test]
    fn a_damaged_file_is_named_and_a_directory_that_is_not_there_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let journals: Vec<(&'static str, FindDamaged)> =
            vec![("exports", find_damaged::<String>), ("files", find_damaged::<String>)];
        Journal::<String>::open(&folder.path().join("exports")).unwrap().put("a", &"x".into()).unwrap();
        assert_eq!(damaged(folder.path(), journals.clone())[0].severity, Severity::Ok);
        std::fs::write(folder.path().join("exports/b.json"), "{").unwrap();
        let found = damaged(folder.path(), journals);
        assert_eq!((found.len(), found[0].severity), (1, Severity::Error));
        assert!(found[0].found.contains("exports/b.json"), "{found:?}");
        let second = damaged_file(Path::new("/x/b.json.1.damaged"), "set aside by the agent");
        assert!(
            second.mend.starts_with("cp -p YOUR-BACKUP/x/b.json /x/b.json && rm /x/b.json.1.damaged &&"),
            "{second:?}"
        );
    }
}
