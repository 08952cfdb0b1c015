//! Kernel modules: loaded, built in, there to be loaded, or missing. Not here: which ones a host needs.

use std::fs;

use tether_proto::Finding;

const CHECK: &str = "kernel-modules";

/// Judges the modules that a host needs, all at once; `why` says for what. Those in `at_boot` must be loaded by somebody else:
/// neither the agent in its unit nor the kernel does it when they are needed.
pub fn judge_host(names: &[&str], at_boot: &[&str], why: &str) -> Vec<Finding> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let release = read("/proc/sys/kernel/osrelease");
    let tree = format!("/lib/modules/{}", release.trim());
    let known = read(&format!("{tree}/modules.dep"));
    vec![judge(
        names,
        at_boot,
        &read("/proc/modules"),
        &read(&format!("{tree}/modules.builtin")),
        &known,
        release.trim(),
        why,
    )]
}

/// Judges /proc/modules with modules.builtin and modules.dep (depmod(8)) of the running kernel.
fn judge(
    names: &[&str],
    at_boot: &[&str],
    loaded: &str,
    builtin: &str,
    known: &str,
    release: &str,
    why: &str,
) -> Finding {
    let is_loaded = |name: &str| loaded.lines().any(|line| line.split(' ').next() == Some(name));
    let has = |list: &str, name: &str| list.lines().any(|line| module_of(line).as_deref() == Some(name));
    let absent: Vec<&str> =
        names.iter().copied().filter(|name| !is_loaded(name) && !has(builtin, name)).collect();
    let (there, missing): (Vec<&str>, Vec<&str>) = absent.into_iter().partition(|name| has(known, name));
    if !missing.is_empty() {
        let found = format!("kernel {release} has no module {}", missing.join(", "));
        // After an upgrade the running kernel's modules are often gone, and a boot brings the new kernel's.
        return Finding::error(CHECK, found, why)
            .mend("apt-get install linux-image-amd64   # or another kernel that has them; then boot it");
    }
    if !there.is_empty() {
        let found = format!("not loaded: {}", there.join(", "));
        let finding = match there.iter().any(|name| at_boot.contains(name)) {
            true => {
                Finding::warning(CHECK, found, format!("{why}, and nobody loads them when they are needed"))
            }
            false => Finding::note(CHECK, found, "they are loaded when they are first needed"),
        };
        return finding.mend(format!("modprobe -a {}", there.join(" ")));
    }
    Finding::ok(CHECK, format!("{} in kernel {release}", names.join(", ")))
}

/// `kernel/drivers/scsi/iscsi_tcp.ko.xz: kernel/…` is of module `iscsi_tcp`; file names may have `-` for `_`.
fn module_of(line: &str) -> Option<String> {
    let file = line.split(':').next()?.rsplit('/').next()?;
    Some(file.split(".ko").next()?.replace('-', "_"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tether_proto::Severity;

    /// From Debian 12's kernel 6.1.
    const LOADED: &str = "target_core_iblock 24576 1 - Live 0x0000000000000000\n\
                          iscsi_target_mod 339968 1 - Live 0x0000000000000000\n\
                          target_core_mod 450560 5 target_core_iblock,iscsi_target_mod, Live 0x0000000000000000\n";
    const KNOWN: &str = "kernel/drivers/target/target_core_mod.ko: kernel/fs/configfs/configfs.ko\n\
                         kernel/drivers/scsi/iscsi_tcp.ko: kernel/drivers/scsi/libiscsi_tcp.ko\n\
                         kernel/fs/nfs/nfs.ko.xz: kernel/net/sunrpc/sunrpc.ko.xz\n";
    const BUILTIN: &str = "kernel/fs/ext4/ext4.ko\nkernel/drivers/md/dm-mod.ko\n";

    #[test]
    fn a_module_is_loaded_built_in_there_or_missing() {
        let judge = |names: &[&str]| {
            judge(names, &["iscsi_tcp"], LOADED, BUILTIN, KNOWN, "6.1.0-1-cloud-amd64", "why")
        };
        assert_eq!(judge(&["target_core_mod", "iscsi_target_mod", "dm_mod"]).severity, Severity::Ok);
        let there = judge(&["target_core_mod", "nfs"]);
        assert_eq!((there.severity, there.mend.as_str()), (Severity::Note, "modprobe -a nfs"));
        let there = judge(&["target_core_mod", "nfs", "iscsi_tcp"]);
        assert_eq!((there.severity, there.mend.as_str()), (Severity::Warning, "modprobe -a nfs iscsi_tcp"));
        let missing = judge(&["iscsi_tcp", "nvmet"]);
        assert_eq!(missing.severity, Severity::Error);
        assert!(missing.found.contains("no module nvmet"), "{missing:?}");
    }

    #[test]
    fn a_name_within_another_is_not_it() {
        let finding = judge(&["target_core"], &[], LOADED, BUILTIN, KNOWN, "6.1", "why");
        assert_eq!(finding.severity, Severity::Error);
    }
}
