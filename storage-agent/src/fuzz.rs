//! One input of a fuzzer (`tests/run fuzz`) into what parses input from outside. Its first byte says which parser; the inputs in
//! `tests/fuzz` begin with the same letters.

use libfuzzer_sys::fuzz_target;
use tether_agent_core::qcow2;

use crate::config::Config;
use crate::lvm::report;
use crate::nfs::{clients, etab};
use crate::record::ExportRecord;
use crate::volume::record::{
    DirectoryRecord, ExtensionRecord, FileRecord, MultiAttachRecord, OperationRecord,
};

fuzz_target!(|data: &[u8]| {
    let Some((parser, input)) = data.split_first() else { return };
    let text = &*String::from_utf8_lossy(input);
    match parser {
        b'c' => drop(
            toml::from_str::<Config>(text)
                .map(|config| tether_agent_core::daemon::AgentConfig::check(&config)),
        ),
        b'e' => drop(etab::parse(text).iter().map(etab::Line::describe).collect::<Vec<_>>()),
        b'f' => {
            if let Ok(record) = serde_json::from_str::<FileRecord>(text) {
                drop((record.check_size(0), record.file_name()));
            }
            drop((
                serde_json::from_str::<DirectoryRecord>(text),
                serde_json::from_str::<ExtensionRecord>(text),
            ));
            drop((
                serde_json::from_str::<OperationRecord>(text),
                serde_json::from_str::<MultiAttachRecord>(text),
            ));
        }
        b'j' => drop(serde_json::from_str::<ExportRecord>(text)),
        b'p' => tether_agent_core::doctor::lvm::fuzz(text),
        b'l' => {
            drop((report::parse_logical_volumes(text), report::parse_volume_group(text)));
            drop((report::parse_extents(text), report::parse_thin_pool(text)));
        }
        b'm' => tether_proto::fuzz::message(input),
        b'n' => tether_proto::fuzz::names(text),
        b'q' => drop(input.first_chunk().map(qcow2::virtual_size)),
        b'o' => drop((clients::address(text), clients::opens(text).count())),
        _ => {}
    }
});
