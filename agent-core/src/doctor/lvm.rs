//! Does this host's LVM see volume groups of guests (F10)? Whoever sees one may activate it, or write its metadata, under a
//! guest that has it in use. Not here: which devices are guests' (each agent knows), and the agent's own volume groups.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use tether_proto::Finding;

use super::{Check, not_asked, program};

const CHECK: &str = "guests-volume-groups";
const WHY: &str = "two hosts in one volume group: this host may activate it or write its metadata while the guest uses it, which \
    destroys the guest's data";

/// pvs is started by systemd: an agent in its unit may not open a disk that belongs to QEMU, and would see less than the host.
const AS_THE_HOST: [&str; 5] = ["--quiet", "--collect", "--pipe", "--wait", "--property=RuntimeMaxSec=20"];

/// How one kind of host keeps its LVM away from guests' disks.
#[derive(Clone, Copy)]
pub struct Guests {
    /// Is the block device with this folder in sysfs a guest's?
    pub is_guests: fn(&Path) -> bool,
    /// Do LVM's settings hide all that are guests', also those that come later?
    pub is_hidden: fn(&Settings) -> bool,
    /// What is not hidden, for people.
    pub exposed: &'static str,
    /// The line of `devices { … }` that hides them.
    pub setting: &'static str,
}

impl Guests {
    /// How to hide them. A setting that is read later replaces the one before it as a whole, so that a filter which is there is
    /// not to be written over.
    fn hide(&self, settings: &Settings) -> String {
        let Settings { global_filter: present, .. } = settings;
        match self.setting.strip_prefix("global_filter = ") {
            Some(pattern) if !present.is_empty() => format!(
                "lvmconfig devices/global_filter   # {present}: where that is set, add what is in {pattern}, and accept no other \
                 name of such a disk"
            ),
            _ => format!("printf 'devices {{\\n\\t{}\\n}}\\n' >>/etc/lvm/lvmlocal.conf", self.setting),
        }
    }
}

/// What matters of lvm.conf(5), section `devices`.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Settings {
    /// LVM looks for physical volumes in logical volumes.
    pub scan_lvs: bool,
    /// Only devices in a devices file are seen.
    pub use_devicesfile: bool,
    /// `filter` or `global_filter` rejects all that it does not accept, or what Tether exports.
    pub rejects: bool,
    /// `global_filter` as it is; empty when it is as LVM has it by itself, and so accepts everything.
    global_filter: String,
}

impl Settings {
    /// Parses `lvmconfig --typeconfig full`.
    fn parse(text: &str) -> Self {
        let value = |key: &str| {
            let line = text.lines().find_map(|line| line.trim().strip_prefix(key)?.strip_prefix('='));
            line.unwrap_or_default()
        };
        let global_filter = value("global_filter");
        Self {
            scan_lvs: value("scan_lvs") == "1",
            use_devicesfile: value("use_devicesfile") == "1",
            rejects: rejects(value("filter")) || rejects(global_filter),
            global_filter: if global_filter == STOCK_FILTER { "" } else { global_filter }.to_owned(),
        }
    }
}

/// What LVM has when nobody has set a filter.
const STOCK_FILTER: &str = "[\"a|.*|\"]";

/// The names of a disk of LIO that was attached, as far as they do not differ from disk to disk.
const NAMES: [&str; 4] =
    ["/dev/sd", "/dev/disk/by-id/wwn-0x6001405", "/dev/disk/by-id/scsi-36001405", "/dev/disk/by-path/ip-"];

/// Does a filter reject disks of LIO? Of each name the first pattern that matches decides; a device is rejected when a name of it
/// is, and none is accepted (lvm.conf(5), `devices/filter`). Patterns are not interpreted, but for their beginning and end.
fn rejects(filter: &str) -> bool {
    let decide = |name: &str| {
        let mut patterns = filter.split('"').filter(|text| text.starts_with(['a', 'r']) && text.len() >= 3);
        patterns.find(|text| matches(text, name)).map(|text| text.starts_with('r'))
    };
    let decided = NAMES.map(decide);
    decided.contains(&Some(true)) && !decided.contains(&Some(false))
}

/// Whether a pattern matches whatever begins with this name. In doubt one that accepts does, and one that rejects does not.
fn matches(pattern: &str, name: &str) -> bool {
    let inner = pattern.get(2..pattern.len() - 1).unwrap_or_default();
    let anchored = inner.starts_with('^');
    let inner = inner.trim_start_matches('^');
    let end = inner.find(|c| "$.*?+[(|\\".contains(c)).unwrap_or(inner.len());
    let (literal, rest) = inner.split_at(end);
    let begins = name.starts_with(literal) || (!anchored && name.contains(literal));
    match pattern.starts_with('a') {
        true => begins || literal.starts_with(name),
        false => begins && (["", ".*", ".*$", ".*/", ".*/.*"].contains(&rest) || literal.contains("6001405")),
    }
}

/// A guest's device that LVM looks at.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    device: String,
    /// Empty when there is none on it.
    volume_group: String,
    /// Logical volumes of it are active on this host.
    active: bool,
}

/// Looks with LVM's own eyes, without the restrictions that the agent gives its own calls.
pub fn check(guests: Guests) -> Check {
    Check::new(CHECK, async move {
        if !Path::new("/sbin/pvs").exists() {
            return vec![Finding::ok(CHECK, "this host has no LVM")];
        }
        let keys = ["devices/scan_lvs", "devices/use_devicesfile", "devices/filter", "devices/global_filter"];
        let settings = program("/sbin/lvmconfig").args(["--typeconfig", "full"]).args(keys).run().await;
        let pvs = ["/sbin/pvs", "--all", "--reportformat", "json", "-o", "pv_name,vg_name"];
        let devices = program("/usr/bin/systemd-run").args(AS_THE_HOST).args(pvs).run().await;
        let (settings, devices) = match (settings, devices) {
            (Ok(settings), Ok(devices)) => (Settings::parse(&settings.stdout), devices.stdout),
            (Err(error), _) | (_, Err(error)) => return vec![not_asked(CHECK, &error, WHY)],
        };
        let rows = match parse_devices(&devices) {
            Ok(rows) => rows,
            Err(problem) => return vec![Finding::warning(CHECK, format!("pvs: {problem}"), WHY)],
        };
        let look = move || rows.into_iter().filter_map(|row| seen(guests, &row)).collect::<Vec<_>>();
        let seen = tokio::task::spawn_blocking(look).await.unwrap_or_default();
        judge(guests, &settings, &seen)
    })
}

#[derive(Deserialize)]
struct Reports {
    report: Vec<Report>,
}

#[derive(Deserialize)]
struct Report {
    pv: Vec<Row>,
}

#[derive(Debug, Deserialize)]
struct Row {
    pv_name: PathBuf,
    vg_name: String,
}

fn parse_devices(json: &str) -> Result<Vec<Row>, String> {
    let reports: Reports = serde_json::from_str(json).map_err(|error| error.to_string())?;
    Ok(reports.report.into_iter().flat_map(|report| report.pv).collect())
}

/// What a fuzzer gives to the parsers of this check.
#[cfg(fuzzing)]
pub fn fuzz(text: &str) {
    drop((Settings::parse(text), parse_devices(text)));
}

fn seen(guests: Guests, row: &Row) -> Option<Seen> {
    let node = std::fs::canonicalize(&row.pv_name).ok()?;
    let device = node.file_name()?.to_str()?.to_owned();
    let folder = std::fs::canonicalize(Path::new("/sys/class/block").join(&device)).ok()?;
    let active = std::fs::read_dir(folder.join("holders")).is_ok_and(|mut holders| holders.next().is_some());
    (guests.is_guests)(&folder).then(|| Seen { device, volume_group: row.vg_name.clone(), active })
}

fn judge(guests: Guests, settings: &Settings, seen: &[Seen]) -> Vec<Finding> {
    let hide = guests.hide(settings);
    let mut findings = Vec::new();
    for one in seen.iter().filter(|one| !one.volume_group.is_empty()) {
        let Seen { device, volume_group, active } = one;
        let state = if *active { ", and it is active here" } else { "" };
        let found =
            format!("LVM of this host sees volume group {volume_group} of a guest on {device}{state}");
        // Once it is hidden, LVM cannot deactivate it any more. A guest chose the name, and root is to paste it: lvm(8), "VALID NAMES".
        let is_name = volume_group.chars().all(|c| c.is_ascii_alphanumeric() || "+_.-".contains(c));
        let first = match *active && is_name && !volume_group.starts_with('-') {
            true => format!("vgchange -an {volume_group}\n"),
            false => String::new(),
        };
        findings.push(Finding::error(CHECK, found, WHY).mend(first + &hide));
    }
    if !findings.is_empty() {
        return findings;
    }
    if (guests.is_hidden)(settings) {
        return vec![Finding::ok(CHECK, "LVM of this host does not look into guests' disks")];
    }
    let devices: Vec<&str> = seen.iter().map(|one| one.device.as_str()).collect();
    let now = if devices.is_empty() { String::new() } else { format!(" (now: {})", devices.join(", ")) };
    vec![Finding::warning(CHECK, format!("{}{now}", guests.exposed), WHY).mend(hide)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tether_proto::Severity;

    /// Debian 12, LVM 2.03.16, as installed.
    const STOCK: &str = "scan_lvs=0\nuse_devicesfile=0\nfilter=[\"a|.*|\"]\nglobal_filter=[\"a|.*|\"]\n";
    /// The same with the setting of a compute host.
    const HIDDEN: &str = "scan_lvs=0\nuse_devicesfile=0\nfilter=[\"a|.*|\"]\n\
                          global_filter=\"r|^/dev/disk/by-id/wwn-0x6001405|\"\n";

    const GUESTS: Guests = Guests {
        is_guests: |_| true,
        is_hidden: |settings| settings.rejects,
        exposed: "LVM looks into attached disks",
        setting: "global_filter = [ \"r|x|\" ]",
    };

    fn seen(volume_group: &str, active: bool) -> Seen {
        Seen { device: "sda".into(), volume_group: volume_group.into(), active }
    }

    #[test]
    fn f10_settings_are_understood() {
        assert_eq!(Settings::parse(STOCK), Settings::default());
        assert!(Settings::parse(HIDDEN).rejects);
        let with = |filter: &str| {
            Settings::parse(&STOCK.replace("global_filter=[\"a|.*|\"]", &format!("global_filter={filter}")))
        };
        // The first that matches a name decides, and a device is used when any of its names is accepted.
        for (filter, rejects) in [
            ("[\"a|^/dev/vda3$|\",\"r|.*|\"]", true),
            ("[\"r|.*|\",\"a|.*|\"]", true),
            ("[\"a|^/dev/nvme.*|\",\"r/.*/\"]", true),
            ("[\"r|^/dev/sd.*|\",\"r|^/dev/disk/.*|\"]", true),
            ("[\"r|^/dev/disk/by-id/wwn-0x6001405|\",\"a|.*|\"]", false),
            ("[\"r|^/dev/disk/by-id/wwn-0x6001405|\",\"a|.*/|\"]", false),
            ("[\"a|^/dev/sd.*|\",\"r|.*|\"]", false),
            ("[\"a|^/dev/sda$|\",\"r|.*|\"]", false),
            ("[\"a|^/dev/disk/by-path/.*|\",\"r|.*|\"]", false),
            ("[\"r|^/dev/sdz$|\"]", false),
        ] {
            assert_eq!(with(filter).rejects, rejects, "{filter}");
        }
        // One that rejects other devices hides no guest's, and is not to be lost.
        let others = with("[\"r|^/dev/zd.*|\"]");
        assert!(!others.rejects);
        let mend = &judge(GUESTS, &others, &[])[0].mend;
        assert!(mend.contains("r|^/dev/zd.*|") && mend.contains("r|x|") && !mend.contains(">>"), "{mend}");
        let text = STOCK.replace("scan_lvs=0", "scan_lvs=1").replace("devicesfile=0", "devicesfile=1");
        let settings = Settings::parse(&text);
        assert!(settings.scan_lvs && settings.use_devicesfile && !settings.rejects);
    }

    #[test]
    fn f10_a_guests_volume_group_is_an_error_and_an_open_door_a_warning() {
        let (stock, hidden) = (Settings::parse(STOCK), Settings::parse(HIDDEN));
        let hide = "printf 'devices {\\n\\tglobal_filter = [ \"r|x|\" ]\\n}\\n' >>/etc/lvm/lvmlocal.conf";
        let found = judge(GUESTS, &stock, &[seen("guestvg", false)]);
        assert_eq!((found[0].severity, found[0].mend.as_str()), (Severity::Error, hide));
        let found = judge(GUESTS, &stock, &[seen("guestvg", true)]);
        assert_eq!(found[0].mend, format!("vgchange -an guestvg\n{hide}"));
        // What is seen counts, whatever the settings say.
        assert_eq!(judge(GUESTS, &hidden, &[seen("guestvg", false)])[0].severity, Severity::Error);
        let found = judge(GUESTS, &stock, &[seen("", false)]);
        assert_eq!(found[0].severity, Severity::Warning);
        assert!(found[0].found.ends_with("(now: sda)"), "{found:?}");
        assert_eq!(judge(GUESTS, &stock, &[])[0].severity, Severity::Warning);
        assert_eq!(judge(GUESTS, &hidden, &[])[0].severity, Severity::Ok);
    }

    proptest! {
        #[test]
        fn f10_whatever_a_guest_calls_its_volume_group_no_more_than_its_name_gets_into_a_command(name in ".{1,20}") {
            let found = judge(GUESTS, &Settings::default(), &[seen(&name, true)]);
            let first = found[0].mend.lines().next().unwrap();
            let rest = first.strip_prefix("vgchange -an ").unwrap_or_default();
            prop_assert!(rest.chars().all(|c| c.is_ascii_alphanumeric() || "+_.-".contains(c)), "{first}");
            prop_assert!(rest.is_empty() || rest == name);
        }

        #[test]
        fn f10_whatever_lvm_says_is_no_surprise(text in any::<String>()) {
            let _settings = Settings::parse(&text);
            prop_assert!(parse_devices(&text).is_err());
        }
    }

    #[test]
    fn f10_a_report_of_pvs_is_understood() {
        let json = r#"{ "report": [ { "pv": [ {"pv_name":"/dev/sda", "vg_name":"guestvg"}, {"pv_name":"/dev/vda", "vg_name":""} ] } ] }"#;
        let rows = parse_devices(json).unwrap();
        assert_eq!((rows.len(), rows[0].vg_name.as_str()), (2, "guestvg"));
        assert!(parse_devices("{}").is_err());
    }
}
