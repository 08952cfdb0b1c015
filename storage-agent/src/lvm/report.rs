//! LVM's JSON reports (lvmreport(7)), parsed. Text in, values out; nothing is run or read here.

use serde::Deserialize;
use tether_proto::ByteSize;

/// A logical volume.
#[derive(Debug, Clone, PartialEq, Eq)]
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
    let percent = match row.data_percent.as_str() {
        "" => 0.0,
        text => text.parse::<f64>().map_err(|_| format!("data_percent {text:?}"))?,
    };
    let is_pool = attribute(1) == b't';
    Ok(LogicalVolume {
        taken: if is_pool { (size as f64 * percent / 100.0) as u64 } else { 0 },
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

#[cfg(test)]
mod tests {
    use super::*;

    /// As lvs 2.03.16 prints it.
    const LVS: &str = r#"{ "report": [ { "lv": [
        {"lv_name":"a", "lv_uuid":"Yx7c2b-uVtq-QdVN-L5lb-9zWM-ePfO-4fmkQp", "lv_size":"4194304", "lv_tags":"x,tether", "lv_attr":"-wi-ao----", "pool_lv":"", "data_percent":""},
        {"lv_name":"t", "lv_uuid":"2x7c2b-uVtq-QdVN-L5lb-9zWM-ePfO-4fmkQp", "lv_size":"8388608", "lv_tags":"", "lv_attr":"Vwi---tz--", "pool_lv":"thinpool", "data_percent":"50.00"},
        {"lv_name":"thinpool", "lv_uuid":"3x7c2b-uVtq-QdVN-L5lb-9zWM-ePfO-4fmkQp", "lv_size":"2147483648", "lv_tags":"tether2", "lv_attr":"twi-aotz--", "pool_lv":"", "data_percent":"12.50"}
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
    fn nonsense_is_refused() {
        for bad in ["", "[]", "{}", r#"{"report":[{"lv":[{"lv_name":"a"}]}]}"#] {
            assert!(parse_logical_volumes(bad).is_err() && parse_volume_group(bad).is_err());
        }
        assert!(parse_logical_volumes(&LVS.replace("4194304", "4m")).is_err());
        assert!(parse_volume_group(r#"{"report":[{"vg":[]}]}"#).is_err());
    }
}
