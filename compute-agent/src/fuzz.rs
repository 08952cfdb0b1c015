//! One input of a fuzzer (`tests/run fuzz`) into what parses input from outside. Its first byte says which parser; the inputs in
//! `tests/fuzz` begin with the same letters.

use std::path::Path;

use libfuzzer_sys::fuzz_target;

use crate::config::Config;
use crate::connector;
use crate::doctor::initiator;
use crate::hypervisor::domain_xml::DomainView;
use crate::mount::table;
use crate::record::AttachmentRecord;

fuzz_target!(|data: &[u8]| {
    let Some((parser, input)) = data.split_first() else { return };
    let text = &*String::from_utf8_lossy(input);
    match parser {
        b'c' => drop(
            toml::from_str::<Config>(text)
                .map(|config| tether_agent_core::daemon::AgentConfig::check(&config)),
        ),
        b'i' => drop(connector::parse_initiator_name(text)),
        b'j' => drop(serde_json::from_str::<AttachmentRecord>(text)),
        b'm' => tether_proto::fuzz::message(input),
        b'n' => tether_proto::fuzz::names(text),
        b'v' => drop(initiator::judge_version(text)),
        b't' => drop((table::mounted_on(text, Path::new("/mnt/x")), table::all_nfs(text))),
        b'x' => {
            let Ok(view) = DomainView::parse(text) else { return };
            for disk in &view.disks {
                assert!(text.contains(&disk.element), "an element is as it was in the XML");
                let alone = disk.alias.as_deref().and_then(|alias| view.disk_by_alias(alias));
                assert!(disk.alias.is_none() || alone.is_some());
            }
        }
        _ => {}
    }
});
