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

/// What matters of lvm.conf(5), section `devices`.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Settings {
    /// LVM looks for physical volumes in logical volumes.
    pub scan_lvs: bool,
    /// Only devices in a devices file are seen.
    pub use_devicesfile: bool,
    /// `filter` or `global_filter` rejects all that it does not accept, or what Tether exports.
    pub rejects: bool,
}

impl Settings {
    /// Parses `lvmconfig --typeconfig full`.
    fn parse(text: &str) -> Self {
        let value = |key: &str| {
            let line = text.lines().find_map(|line| line.trim().strip_prefix(key)?.strip_prefix('='));
            line.unwrap_or_default()
        };
        // One that rejects everything, or that has the beginning of LIO's WWNs.
        let rejects = |key: &str| {
            let mut rejected = value(key).split('"').filter_map(|text| text.strip_prefix('r'));
            rejected.any(|pattern| {
                let inner = pattern.get(1..pattern.len().saturating_sub(1)).unwrap_or_default();
                inner == ".*" || inner.contains("6001405")
            })
        };
        Self {
            scan_lvs: value("scan_lvs") == "1",
            use_devicesfile: value("use_devicesfile") == "1",
            rejects: rejects("filter") || rejects("global_filter"),
        }
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

fn seen(guests: Guests, row: &Row) -> Option<Seen> {
    let node = std::fs::canonicalize(&row.pv_name).ok()?;
    let device = node.file_name()?.to_str()?.to_owned();
    let folder = std::fs::canonicalize(Path::new("/sys/class/block").join(&device)).ok()?;
    let active = std::fs::read_dir(folder.join("holders")).is_ok_and(|mut holders| holders.next().is_some());
    (guests.is_guests)(&folder).then(|| Seen { device, volume_group: row.vg_name.clone(), active })
}

fn judge(guests: Guests, settings: &Settings, seen: &[Seen]) -> Vec<Finding> {
    let hide = format!("printf 'devices {{\\n\\t{}\\n}}\\n' >>/etc/lvm/lvmlocal.conf", guests.setting);
    let mut findings = Vec::new();
    for one in seen.iter().filter(|one| !one.volume_group.is_empty()) {
        let Seen { device, volume_group, active } = one;
        let state = if *active { ", and it is active here" } else { "" };
        let found =
            format!("LVM of this host sees volume group {volume_group} of a guest on {device}{state}");
        // Once it is hidden, LVM cannot deactivate it any more.
        let first = if *active { format!("vgchange -an {volume_group}\n") } else { String::new() };
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

    #[test]
    fn f10_a_report_of_pvs_is_understood() {
        let json = r#"{ "report": [ { "pv": [ {"pv_name":"/dev/sda", "vg_name":"guestvg"}, {"pv_name":"/dev/vda", "vg_name":""} ] } ] }"#;
        let rows = parse_devices(json).unwrap();
        assert_eq!((rows.len(), rows[0].vg_name.as_str()), (2, "guestvg"));
        assert!(parse_devices("{}").is_err());
    }
}
