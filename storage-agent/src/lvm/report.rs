//! LVM's JSON reports (lvmreport(7)), parsed. Text in, values out; nothing is run or read here.

use serde::Deserialize;
use tether_proto::ByteSize;

/// A logical volume.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct LogicalVolume {
    /// Its name in the group.
    pub(crate) name: String,
    /// Its permanent id.
    pub(crate) uuid: String,
    /// Its size.
    pub(crate) size: ByteSize,
    /// The thin pool that it lives in.
    pub(crate) pool: Option<String>,
    /// It has our tag.
    pub(crate) ours: bool,
    /// It is a thin pool itself.
    pub(crate) is_pool: bool,
    /// A thin pool that zeroes what it hands out.
    pub(crate) zeroing: bool,
    /// Somebody has that device open.
    pub(crate) open: bool,
    /// How many bytes of a thin pool are taken; 0 for anything else.
    pub(crate) taken: u64,
    /// How much of a thin pool's metadata is taken, in percent; nothing for anything else.
    pub(crate) metadata_percent: Option<f64>,
}

/// What matters of a volume group, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct VolumeGroup {
    /// The size of an extent.
    pub(crate) extent: u64,
    /// All of it.
    pub(crate) size: u64,
    /// What no LV has.
    pub(crate) free: u64,
}

/// How full a thin pool is (lvmthin(7)). Sizes in bytes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct ThinPoolUsage {
    /// Its room for data.
    pub(crate) size: u64,
    /// How much of it is taken, in percent.
    pub(crate) data_percent: f64,
    /// Its room for metadata.
    pub(crate) metadata_size: u64,
    /// How much of that is taken, in percent.
    pub(crate) metadata_percent: f64,
    /// dmeventd watches it, and may extend it.
    pub(crate) monitored: bool,
    /// What the volume group has left to extend it.
    pub(crate) group_free: u64,
    /// The unit in which that is given.
    pub(crate) extent: u64,
}

#[derive(Deserialize)]
struct Reports<T> {
    report: Vec<T>,
}

#[derive(Deserialize)]
struct LvReport {
    lv: Vec<LvRow>,
}

#[derive(Deserialize)]
struct LvRow {
    lv_name: String,
    lv_uuid: String,
    lv_size: String,
    lv_tags: String,
    lv_attr: String,
    pool_lv: String,
    data_percent: String,
    metadata_percent: String,
}

#[derive(Deserialize)]
struct ThinPoolReport {
    lv: Vec<ThinPoolRow>,
}

#[derive(Deserialize)]
struct ThinPoolRow {
    lv_size: String,
    lv_metadata_size: String,
    data_percent: String,
    metadata_percent: String,
    seg_monitor: String,
    vg_free: String,
    vg_extent_size: String,
}

#[derive(Deserialize)]
struct SegmentReport {
    seg: Vec<SegmentRow>,
}

#[derive(Deserialize)]
struct SegmentRow {
    seg_pe_ranges: String,
}

#[derive(Deserialize)]
struct VgReport {
    vg: Vec<VgRow>,
}

#[derive(Deserialize)]
struct VgRow {
    vg_extent_size: String,
    vg_size: String,
    vg_free: String,
}

/// Parses `lvs --reportformat json`. The error says what is wrong.
pub(crate) fn parse_logical_volumes(json: &str) -> Result<Vec<LogicalVolume>, String> {
    let reports: Reports<LvReport> = serde_json::from_str(json).map_err(|error| error.to_string())?;
    reports.report.into_iter().flat_map(|report| report.lv).map(logical_volume).collect()
}

fn logical_volume(row: LvRow) -> Result<LogicalVolume, String> {
    let size: u64 = row.lv_size.parse().map_err(|_| format!("lv_size {:?}", row.lv_size))?;
    // lvs(8), "lv_attr bits": 1 type, 6 device open, 8 zero new blocks.
    let attribute = |place: usize| row.lv_attr.as_bytes().get(place - 1).copied().unwrap_or(b'-');
    // lvs(8): percent with two decimals, empty for what has none. LVM rounds it so that only 0 and 100 are exact.
    let percent = |name: &str, text: &str| match text {
        "" => Ok(None),
        text => text.parse::<f64>().map(Some).map_err(|_| format!("{name} {text:?}")),
    };
    let data_percent = percent("data_percent", &row.data_percent)?.unwrap_or_default();
    let is_pool = attribute(1) == b't';
    Ok(LogicalVolume {
        taken: if is_pool { (size as f64 * data_percent / 100.0) as u64 } else { 0 },
        metadata_percent: percent("metadata_percent", &row.metadata_percent)?,
        size: ByteSize::try_from(size).map_err(|error| error.to_string())?,
        pool: Some(row.pool_lv).filter(|pool| !pool.is_empty()),
        ours: row.lv_tags.split(',').any(|tag| tag == super::TAG),
        is_pool,
        zeroing: attribute(8) == b'z',
        open: attribute(6) == b'o',
        name: row.lv_name,
        uuid: row.lv_uuid,
    })
}

/// Parses `vgs --reportformat json` of one group. The error says what is wrong.
pub(crate) fn parse_volume_group(json: &str) -> Result<VolumeGroup, String> {
    let reports: Reports<VgReport> = serde_json::from_str(json).map_err(|error| error.to_string())?;
    let row =
        reports.report.into_iter().flat_map(|report| report.vg).next().ok_or("no volume group in it")?;
    let number = |text: &str| text.parse::<u64>().map_err(|_| format!("{text:?} is no number of bytes"));
    Ok(VolumeGroup {
        extent: number(&row.vg_extent_size)?,
        size: number(&row.vg_size)?,
        free: number(&row.vg_free)?,
    })
}

/// Parses `lvs --reportformat json --segments -o seg_pe_ranges` of one LV: where its extents are, each as lvextend(8) takes
/// it, `/dev/sdb:0-3`. The error says what is wrong.
pub(crate) fn parse_extents(json: &str) -> Result<Vec<String>, String> {
    let reports: Reports<SegmentReport> = serde_json::from_str(json).map_err(|error| error.to_string())?;
    let rows: Vec<SegmentRow> = reports.report.into_iter().flat_map(|report| report.seg).collect();
    let ranges: Vec<String> =
        rows.iter().flat_map(|row| row.seg_pe_ranges.split_whitespace()).map(str::to_owned).collect();
    let is_range = |range: &String| {
        range.starts_with('/') && range.rsplit_once(':').is_some_and(|(_, extents)| extents.contains('-'))
    };
    match ranges.iter().find(|range| !is_range(range)) {
        Some(other) => Err(format!("seg_pe_ranges {other:?}")),
        None if ranges.is_empty() => Err("no extents in it".to_owned()),
        None => Ok(ranges),
    }
}

/// Parses `lvs --reportformat json` of one thin pool. The error says what is wrong.
pub(crate) fn parse_thin_pool(json: &str) -> Result<ThinPoolUsage, String> {
    let reports: Reports<ThinPoolReport> = serde_json::from_str(json).map_err(|error| error.to_string())?;
    let row = reports.report.into_iter().flat_map(|report| report.lv).next().ok_or("no thin pool in it")?;
    let number = |text: &str| text.parse::<u64>().map_err(|_| format!("{text:?} is no number of bytes"));
    let percent = |text: &str| text.parse::<f64>().map_err(|_| format!("{text:?} is no percentage"));
    Ok(ThinPoolUsage {
        size: number(&row.lv_size)?,
        data_percent: percent(&row.data_percent)?,
        metadata_size: number(&row.lv_metadata_size)?,
        metadata_percent: percent(&row.metadata_percent)?,
        monitored: row.seg_monitor == "monitored",
        group_free: number(&row.vg_free)?,
        extent: number(&row.vg_extent_size)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tether_proto::mangled;

    /// As lvs 2.03.16 prints it.
    const LVS: &str = r#"{ "report": [ { "lv": [
        {"lv_name":"a", "lv_uuid":"Yx7c2b-uVtq-QdVN-L5lb-9zWM-ePfO-4fmkQp", "lv_size":"4194304", "lv_tags":"x,tether", "lv_attr":"-wi-ao----", "pool_lv":"", "data_percent":"", "metadata_percent":""},
        {"lv_name":"t", "lv_uuid":"2x7c2b-uVtq-QdVN-L5lb-9zWM-ePfO-4fmkQp", "lv_size":"8388608", "lv_tags":"", "lv_attr":"Vwi---tz--", "pool_lv":"thinpool", "data_percent":"50.00", "metadata_percent":""},
        {"lv_name":"thinpool", "lv_uuid":"3x7c2b-uVtq-QdVN-L5lb-9zWM-ePfO-4fmkQp", "lv_size":"2147483648", "lv_tags":"tether2", "lv_attr":"twi-aotz--", "pool_lv":"", "data_percent":"12.50", "metadata_percent":"10.79"}
    ] } ] }"#;

    #[test]
    fn a_report_of_lvs_is_understood() {
        let lvs = parse_logical_volumes(LVS).unwrap();
        let seen: Vec<_> = lvs.iter().map(|lv| (lv.name.as_str(), lv.ours, lv.is_pool, lv.open)).collect();
        assert_eq!(
            seen,
            [("a", true, false, true), ("t", false, false, false), ("thinpool", false, true, true)]
        );
        assert_eq!(lvs[1].pool.as_deref(), Some("thinpool"));
        assert!(lvs[2].zeroing && lvs[0].size.bytes() == 4_194_304);
        assert_eq!(lvs.iter().map(|lv| lv.taken).collect::<Vec<_>>(), [0, 0, 268_435_456]);
    }

    #[test]
    fn a_report_of_vgs_is_understood() {
        let json = r#"{"report":[{"vg":[{"vg_extent_size":"4194304","vg_size":"8388608","vg_free":"0"}]}]}"#;
        assert_eq!(
            parse_volume_group(json).unwrap(),
            VolumeGroup { extent: 4_194_304, size: 8_388_608, free: 0 }
        );
    }

    #[test]
    fn f48_how_full_a_thin_pool_is_is_understood() {
        let json = r#"{"report":[{"lv":[{"lv_size":"2147483648", "lv_metadata_size":"16777216", "data_percent":"12.50",
            "metadata_percent":"10.79", "seg_monitor":"monitored", "vg_free":"4194304", "vg_extent_size":"4194304"}]}]}"#;
        let usage = parse_thin_pool(json).unwrap();
        assert_eq!((usage.size, usage.data_percent, usage.metadata_percent), (2 << 30, 12.5, 10.79));
        assert!(usage.monitored && usage.group_free == usage.extent);
        // An inactive pool has no percentages.
        assert!(parse_thin_pool(&json.replace("12.50", "")).unwrap_err().contains("percentage"));
    }

    proptest! {
        /// Whatever LVM may print one day, nothing dies of it, and only a tag that is ours makes an LV ours.
        #[test]
        fn damaged_reports_are_errors_or_values(text in mangled(LVS)) {
            for lv in parse_logical_volumes(&text).unwrap_or_default() {
                prop_assert!(!lv.ours || text.contains(super::super::TAG));
            }
            drop((parse_volume_group(&text), parse_thin_pool(&text)));
        }

        #[test]
        fn sizes_and_tags_are_as_lvm_has_them(size in 1..u64::MAX / 2, tags in "[a-z,]{0,20}", name in "[a-z0-9_.-]{1,30}") {
            let json = format!(
                r#"{{"report":[{{"lv":[{{"lv_name":"{name}","lv_uuid":"u","lv_size":"{size}","lv_tags":"{tags}",
                   "lv_attr":"-wi-a-----","pool_lv":"","data_percent":"","metadata_percent":""}}]}}]}}"#
            );
            let lvs = parse_logical_volumes(&json).unwrap();
            prop_assert_eq!((lvs[0].size.bytes(), lvs[0].name.as_str()), (size, name.as_str()));
            prop_assert_eq!(lvs[0].ours, tags.split(',').any(|tag| tag == super::super::TAG));
        }
    }

    #[test]
    fn extents_are_as_lvextend_takes_them() {
        let json = r#"{"report": [{"seg": [{"seg_pe_ranges":"/dev/vdb:10-11"},
            {"seg_pe_ranges":"/dev/vdb:20-20 /dev/mapper/a:0-3"}]}]}"#;
        assert_eq!(parse_extents(json).unwrap(), ["/dev/vdb:10-11", "/dev/vdb:20-20", "/dev/mapper/a:0-3"]);
        for bad in [r#"{"report":[{"seg":[]}]}"#, r#"{"report":[{"seg":[{"seg_pe_ranges":"--yes"}]}]}"#] {
            assert!(parse_extents(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in ["", "[]", "{}", r#"{"report":[{"lv":[{"lv_name":"a"}]}]}"#] {
            assert!(parse_logical_volumes(bad).is_err() && parse_volume_group(bad).is_err());
        }
        assert!(parse_logical_volumes(&LVS.replace("4194304", "4m")).is_err());
        assert!(parse_volume_group(r#"{"report":[{"vg":[]}]}"#).is_err());
    }
}
