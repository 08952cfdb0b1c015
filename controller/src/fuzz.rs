//! One input of a fuzzer (`tests/run fuzz`) into what the command parses of what people write: its config. Not here: the fuzzer.

use std::path::Path;

use crate::agent::Kind;
use crate::config::Config;

/// Parses a config whose files are not there.
pub fn config(text: &str) {
    let Ok(config) = Config::parse(text, Path::new("/nonexistent/tether.toml")) else { return };
    for kind in [Kind::Storage, Kind::Compute] {
        for name in config.hosts(kind).keys() {
            assert!(config.host(kind, Some(name)).is_ok_and(|host| host.name == *name));
        }
    }
}
