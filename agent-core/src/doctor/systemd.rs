//! What systemd says of services. Not here: which services a host needs.

use std::collections::BTreeMap;

use super::program;
use crate::command::CommandError;

/// A unit as systemd has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    /// It is installed (and not masked).
    pub loaded: bool,
    /// It runs, or listens.
    pub active: bool,
    /// It starts with the host.
    pub enabled: bool,
}

/// Asks for several units by name.
///
/// # Errors
/// When systemd cannot be asked.
pub async fn units(names: &[&str]) -> Result<BTreeMap<String, Unit>, CommandError> {
    let show = ["show", "--property=Id,LoadState,ActiveState,UnitFileState"];
    Ok(parse(&program("/usr/bin/systemctl").args(show).args(names).run().await?.stdout))
}

/// Parses `systemctl show` of several units: `KEY=VALUE` lines, an empty line between units.
fn parse(text: &str) -> BTreeMap<String, Unit> {
    let unit = |block: &str| {
        let properties: BTreeMap<&str, &str> =
            block.lines().filter_map(|line| line.trim().split_once('=')).collect();
        let is = |key: &str, words: &[&str]| properties.get(key).is_some_and(|value| words.contains(value));
        let unit = Unit {
            loaded: is("LoadState", &["loaded"]),
            active: is("ActiveState", &["active", "activating", "reloading"]),
            enabled: is("UnitFileState", &["enabled", "enabled-runtime", "static", "indirect", "alias"]),
        };
        Some(((*properties.get("Id")?).to_owned(), unit))
    };
    text.split("\n\n").filter_map(unit).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tether_proto::mangled;

    proptest! {
        #[test]
        fn damaged_text_of_systemd_names_no_unit_that_is_not_in_it(
            text in mangled("Id=iscsid.socket\nLoadState=loaded\nActiveState=active\n\nId=multipathd.service\n")
        ) {
            for name in parse(&text).keys() {
                prop_assert!(text.contains(name.as_str()));
            }
        }
    }

    #[test]
    fn units_are_told_apart() {
        let text = "Id=iscsid.socket\nLoadState=loaded\nActiveState=active\nUnitFileState=enabled\n\n\
                    Id=multipathd.service\nLoadState=not-found\nActiveState=inactive\nUnitFileState=\n";
        let units = parse(text);
        assert_eq!(units["iscsid.socket"], Unit { loaded: true, active: true, enabled: true });
        assert_eq!(units["multipathd.service"], Unit { loaded: false, active: false, enabled: false });
    }
}
