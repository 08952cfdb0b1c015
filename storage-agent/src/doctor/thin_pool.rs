//! How full a thin pool is (F48): data and metadata, for a pool that is full of either stops all guests in it. Not here: how
//! LVM is asked (`lvm`).

use tether_proto::{Finding, PoolName};

use crate::lvm::{Lvm, LvmError, ThinPoolUsage};

/// The check's name.
pub(super) const CHECK: &str = "thin-pools";

const WHY: &str = "when it is full, writes of all guests with volumes in it wait for a minute, and then fail";
/// From here on somebody should do something at once, in percent. When to do something at all the config says.
const FULL: f64 = 95.0;
/// To how much of it taken a pool is extended, in percent.
const AFTERWARDS: f64 = 70.0;

/// Looks at one pool.
pub(super) async fn check(name: PoolName, place: String, lvm: Lvm, high: u8) -> Vec<Finding> {
    let high = f64::from(high);
    let threshold = super::lvm_setting("activation/thin_pool_autoextend_threshold").await;
    match lvm.thin_pool_usage().await {
        Ok(None) => Vec::new(),
        Ok(Some(usage)) => {
            // lvm.conf(5): 100 means never.
            let threshold =
                threshold.and_then(|text| text.parse::<u32>().ok()).filter(|percent| *percent < 100);
            judge(&name, &place, usage, high, threshold.filter(|_| usage.monitored))
        }
        // LVM itself failed, which the check of the pool tells.
        Err(LvmError::Command(_)) => Vec::new(),
        // An inactive pool has no percentages.
        Err(error) => {
            let found = format!("pool {name} ({place}): {error}");
            vec![
                Finding::warning(CHECK, found, "it is not known how full it is")
                    .mend(format!("lvchange -ay {place}")),
            ]
        }
    }
}

/// `autoextend`: from how many percent on LVM extends the pool by itself; none when it does not.
fn judge(
    name: &PoolName,
    place: &str,
    usage: ThinPoolUsage,
    high: f64,
    autoextend: Option<u32>,
) -> Vec<Finding> {
    let worst = usage.data_percent.max(usage.metadata_percent);
    let found = format!(
        "pool {name} ({place}): {:.0} % of its data and {:.0} % of its metadata taken",
        usage.data_percent, usage.metadata_percent
    );
    let mend = mend(name, place, usage, high);
    if worst >= FULL {
        return vec![Finding::error(CHECK, found, WHY).mend(mend)];
    }
    if worst >= high {
        return vec![Finding::warning(CHECK, found, WHY).mend(mend)];
    }
    match autoextend {
        Some(percent) => vec![Finding::ok(CHECK, format!("{found}; extended by itself from {percent} % on"))],
        None => vec![
            Finding::note(CHECK, format!("{found}; nothing extends it by itself"), WHY).mend(
                "printf 'activation {\\n\\tthin_pool_autoextend_threshold = 80\\n\\tthin_pool_autoextend_percent = 20\\n}\\n' \
                 >>/etc/lvm/lvmlocal.conf",
            ),
        ],
    }
}

/// The command that extends what is full, by what the volume group still has.
fn mend(name: &PoolName, place: &str, usage: ThinPoolUsage, high: f64) -> String {
    let group = place.split('/').next().unwrap_or(place);
    if usage.group_free < usage.extent || usage.extent == 0 {
        return format!(
            "vgextend {group} /dev/DEVICE   # or delete volumes: tether volume list --pool {name}"
        );
    }
    let more = |size: u64, percent: f64| {
        let wanted = (size as f64 * (percent / AFTERWARDS - 1.0)).max(0.0) as u64;
        // In whole extents, as LVM gives them.
        wanted.div_ceil(usage.extent).clamp(1, usage.group_free / usage.extent) * usage.extent
    };
    let mut commands = Vec::new();
    if usage.metadata_percent >= high {
        let bytes = more(usage.metadata_size, usage.metadata_percent);
        commands.push(format!("lvextend --poolmetadatasize +{bytes}b {place}"));
    }
    if usage.data_percent >= high {
        let bytes = more(usage.size, usage.data_percent);
        commands.push(format!("lvextend --size +{bytes}b {place}"));
    }
    commands.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use tether_proto::Severity;

    const MIB: u64 = 1024 * 1024;

    fn found(data_percent: f64, metadata_percent: f64, group_free: u64, autoextend: Option<u32>) -> Finding {
        let usage = ThinPoolUsage {
            size: 1024 * MIB,
            data_percent,
            metadata_size: 16 * MIB,
            metadata_percent,
            monitored: true,
            group_free,
            extent: 4 * MIB,
        };
        judge(&"thin".parse().unwrap(), "vg/tp", usage, 80.0, autoextend).remove(0)
    }

    #[test]
    fn f48_data_and_metadata_are_told_before_they_are_full_with_the_command_that_extends_them() {
        assert_eq!(found(40.0, 10.0, 4096 * MIB, Some(80)).severity, Severity::Ok);
        assert_eq!(found(40.0, 10.0, 4096 * MIB, None).severity, Severity::Note);
        let high = found(84.0, 10.0, 4096 * MIB, None);
        assert_eq!(high.severity, Severity::Warning);
        // 84 % of 1024 MiB is 70 % of 1228.8 MiB: 204.8 more, in extents of 4.
        assert_eq!(high.mend, format!("lvextend --size +{}b vg/tp", 208 * MIB));
        let full = found(100.0, 10.0, 100 * MIB, None);
        assert_eq!(
            (full.severity, full.mend),
            (Severity::Error, format!("lvextend --size +{}b vg/tp", 100 * MIB))
        );
        let metadata = found(10.0, 96.0, 4096 * MIB, Some(80));
        assert_eq!(metadata.severity, Severity::Error);
        assert_eq!(metadata.mend, format!("lvextend --poolmetadatasize +{}b vg/tp", 8 * MIB));
        assert!(found(99.0, 10.0, 0, None).mend.starts_with("vgextend vg /dev/DEVICE"));
    }
}
