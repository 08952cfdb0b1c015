//! qcow2 files that we make ourselves: the command lines of qemu-img, and the header checked (QEMU's
//! docs/interop/qcow2.txt). Nothing is read or run here. The check says whether a file that is recorded as qcow2 is still
//! what we made. It never decides what a file is (F4): a raw volume is never looked into.

use std::path::Path;

use crate::command::CommandLine;

const QEMU_IMG: &str = "/usr/bin/qemu-img";
const SYSTEMD_RUN: &str = "/usr/bin/systemd-run";

/// How much of the file's beginning is needed, in bytes.
pub const HEADER_LENGTH: usize = 80;
const MAGIC: &[u8] = b"QFI\xfb";
const VERSION: u32 = 3;
/// "Incompatible features", bit 2: the guest's bytes are in another file.
const EXTERNAL_DATA_FILE: u64 = 1 << 2;

/// Writes an empty image into a file that is there, as a user who may write to it: owner and mode stay. It is not killed: an
/// agent in its unit cannot end another user's processes.
pub fn create(path: &Path, bytes: u64, (uid, gid): (u32, u32)) -> CommandLine {
    let tool = CommandLine::new(QEMU_IMG).args(["create", "-q", "-f", "qcow2"]);
    tool.arg(path).arg(bytes.to_string()).user(uid, gid).never_kill()
}

/// Makes an image larger that no QEMU has open. Not as root: a hypervisor may have written to the file since its header was
/// checked, and let it lead to another file. It is not killed half way.
pub fn resize(path: &Path, bytes: u64, (uid, gid): (u32, u32)) -> CommandLine {
    resize_with(CommandLine::new(QEMU_IMG), path, bytes).user(uid, gid)
}

/// The same by an agent that cannot become another user: systemd starts qemu-img as the user of that name, with no rights
/// and no network.
pub fn resize_by_systemd(path: &Path, bytes: u64, user: &str) -> CommandLine {
    let tool = CommandLine::new(SYSTEMD_RUN)
        .args(["--quiet", "--pipe", "--wait", "--collect", "--service-type=exec", "--setenv=LC_ALL=C"])
        .args(["--property=NoNewPrivileges=yes", "--property=CapabilityBoundingSet="])
        .args(["--property=RestrictAddressFamilies=AF_UNIX", "--uid", user, "--", QEMU_IMG]);
    resize_with(tool, path, bytes)
}

fn resize_with(tool: CommandLine, path: &Path, bytes: u64) -> CommandLine {
    tool.args(["resize", "-q", "-f", "qcow2"]).arg(path).arg(bytes.to_string()).never_kill()
}

/// The size that the guest sees, in bytes.
///
/// # Errors
/// What is wrong with the header, to follow the file's name: another magic or version, or a lead to another file.
pub fn virtual_size(header: &[u8; HEADER_LENGTH]) -> Result<u64, &'static str> {
    let number = |place: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&header[place..place + 8]);
        u64::from_be_bytes(bytes)
    };
    if &header[..4] != MAGIC {
        return Err("has no qcow2 header");
    }
    // The version stands in the lower half, behind the magic.
    if number(0) & u64::from(u32::MAX) != u64::from(VERSION) {
        return Err("is not of version 3 of qcow2");
    }
    if number(8) != 0 {
        return Err("has a backing file");
    }
    if number(72) & EXTERNAL_DATA_FILE != 0 {
        return Err("has an external data file");
    }
    Ok(number(24))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What qemu-img 7.2 writes for a file of 1 GiB, up to the incompatible features.
    fn header() -> [u8; HEADER_LENGTH] {
        let mut header = [0; HEADER_LENGTH];
        header[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        header[23] = 16;
        header[24..32].copy_from_slice(&(1u64 << 30).to_be_bytes());
        header
    }

    #[test]
    fn f4_only_a_header_as_we_make_it_is_taken() {
        assert_eq!(virtual_size(&header()), Ok(1 << 30));
        // A file that was not closed well is dirty (bit 0), and still ours.
        let mut dirty = header();
        dirty[79] = 1;
        assert_eq!(virtual_size(&dirty), Ok(1 << 30));
        for (place, value, problem) in [
            (0, 0, "has no qcow2 header"),
            (7, 2, "is not of version 3 of qcow2"),
            (15, 104, "has a backing file"),
            (79, 4, "has an external data file"),
        ] {
            let mut header = header();
            header[place] = value;
            assert_eq!(virtual_size(&header), Err(problem));
        }
    }
}
