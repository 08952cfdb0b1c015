//! multipathd: has it, or will it, put a device of its own over an attached disk? The disk is then busy for QEMU, or leads
//! elsewhere than its by-id path says.

use std::fs;
use std::path::Path;

use tether_agent_core::doctor::{Check, not_asked, program, systemd};
use tether_proto::Finding;

use super::attached::is_attached;

const CHECK: &str = "multipathd";
const UNIT: &str = "multipathd.service";
const WHY: &str = "a disk that multipathd takes is busy, and cannot be attached or let go";
const MEND: &str = "mkdir -p /etc/multipath/conf.d\n\
    printf 'blacklist {\\n\\twwid \"^36001405\"\\n}\\n' >/etc/multipath/conf.d/tether.conf\n\
    systemctl reload multipathd";

/// Looks at multipathd's config when it runs, and at what it has.
pub(super) fn check() -> Check {
    Check::new(CHECK, async {
        match systemd::units(&[UNIT]).await {
            Ok(units) if !units.get(UNIT).is_some_and(|unit| unit.active) => {
                return vec![Finding::ok(CHECK, "it does not run")];
            }
            Ok(_) => {}
            Err(error) => return vec![not_asked(CHECK, &error, "it is not known whether multipathd runs")],
        }
        let config = match program("/sbin/multipathd").args(["show", "config"]).run().await {
            Ok(output) => output.stdout,
            Err(error) => return vec![not_asked(CHECK, &error, WHY)],
        };
        let taken = tokio::task::spawn_blocking(|| taken(Path::new("/sys/class/block"))).await;
        vec![judge(&config, &taken.unwrap_or_default())]
    })
}

/// Attached disks that a multipath device stands on, with its name.
fn taken(blocks: &Path) -> Vec<(String, String)> {
    let read = |path: &Path| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let mut taken = Vec::new();
    for block in fs::read_dir(blocks).into_iter().flatten().flatten() {
        let Ok(folder) = fs::canonicalize(block.path()) else { continue };
        if !is_attached(&folder) {
            continue;
        }
        for holder in fs::read_dir(folder.join("holders")).into_iter().flatten().flatten() {
            if read(&holder.path().join("dm/uuid")).starts_with("mpath-") {
                let disk = block.file_name().to_string_lossy().into_owned();
                taken.push((disk, read(&holder.path().join("dm/name"))));
            }
        }
    }
    taken
}

/// Judges `multipathd show config` (multipath.conf(5)).
fn judge(config: &str, taken: &[(String, String)]) -> Finding {
    if let Some((disk, map)) = taken.first() {
        let found = format!("it has taken the attached disk {disk} as {map}");
        return Finding::error(CHECK, found, WHY).mend(format!("{MEND}\nmultipath -f {map}"));
    }
    let find_multipaths = value(config, "find_multipaths").unwrap_or("off");
    if blacklisted(config) {
        return Finding::ok(CHECK, "it leaves attached disks alone: they are on its blacklist");
    }
    // A disk with one path is taken at sight with these; with the others only when its WWID is known to multipathd.
    if matches!(find_multipaths, "no" | "off" | "greedy" | "smart") {
        let found = format!("it takes every disk (find_multipaths is {find_multipaths})");
        return Finding::error(CHECK, found, WHY).mend(MEND);
    }
    let found = format!("it leaves disks with one path alone (find_multipaths is {find_multipaths})");
    Finding::ok(CHECK, found)
}

fn value<'a>(config: &'a str, key: &str) -> Option<&'a str> {
    let line = config.lines().find_map(|line| line.trim().strip_prefix(key)?.strip_prefix(' '))?;
    Some(line.trim().trim_matches('"'))
}

/// Is there a line of the blacklist that our disks fall under? LIO's WWIDs are `3` and the NAA name, which begins 6001405.
fn blacklisted(config: &str) -> bool {
    let lines = config.lines().map(str::trim).skip_while(|line| *line != "blacklist {");
    lines.take_while(|line| *line != "blacklist_exceptions {").any(|line| {
        let pattern = |key: &str| line.strip_prefix(key).map(|rest| rest.trim().trim_matches('"'));
        let all = |pattern: &str| matches!(pattern, ".*" | "*" | ".");
        pattern("wwid ").is_some_and(|p| all(p) || p.contains("36001405"))
            || pattern("devnode ").is_some_and(|p| all(p) || p.starts_with("^sd[a-z]"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tether_proto::Severity;

    /// Shortened from multipath-tools 0.9.4 of Debian 12, as installed.
    const STOCK: &str = "defaults {\n\tverbosity 2\n\tfind_multipaths \"strict\"\n\tfind_multipaths_timeout -10\n}\n\
        blacklist {\n\tdevnode \"!^(sd[a-z]|dasd[a-z]|nvme[0-9])\"\n\tdevice {\n\t\tvendor \"SGI\"\n\t\tproduct \"Universal Xport\"\n\t}\n}\n\
        blacklist_exceptions {\n\tproperty \"(SCSI_IDENT_|ID_WWN)\"\n}\n";

    #[test]
    fn multipathd_that_takes_every_disk_is_an_error_unless_ours_are_on_its_blacklist() {
        assert_eq!(judge(STOCK, &[]).severity, Severity::Ok);
        let greedy = STOCK.replace("strict", "greedy");
        let found = judge(&greedy, &[]);
        assert_eq!((found.severity, found.mend.as_str()), (Severity::Error, MEND));
        let mended = greedy.replace("blacklist {\n", "blacklist {\n\twwid \"^36001405\"\n");
        assert_eq!(judge(&mended, &[]).severity, Severity::Ok);
        let taken = judge(STOCK, &[("sda".into(), "mpatha".into())]);
        assert_eq!(taken.severity, Severity::Error);
        assert!(taken.mend.ends_with("\nmultipath -f mpatha"), "{taken:?}");
    }
}
