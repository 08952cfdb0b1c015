//! `tether-storage-agent doctor` as a process of its own, on a host that has nothing of what it looks for.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::path::Path;

use tether_agent_core::command::{CommandLine, Output};

async fn doctor(config: &Path, arguments: &[&str]) -> Output {
    let agent = CommandLine::new(env!("CARGO_BIN_EXE_tether-storage-agent"));
    agent.arg("doctor").args(arguments).arg("--config").arg(config).output().await.unwrap()
}

fn severity(json: &serde_json::Value, check: &str) -> String {
    let finding = json["findings"].as_array().unwrap().iter().find(|finding| finding["check"] == check);
    finding.and_then(|finding| finding["severity"].as_str()).unwrap_or("not looked at").to_owned()
}

#[tokio::test]
async fn a_config_that_cannot_be_read_is_the_first_finding_and_the_rest_is_looked_at() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("storage-agent.toml");
    for text in [None, Some("[iscsi\n"), Some("unknown = 1\n")] {
        if let Some(text) = text {
            std::fs::write(&config, text).unwrap();
        }
        let output = doctor(&config, &["--json"]).await;
        assert_eq!(output.exit_code, Some(2), "{output:?}");
        let json: serde_json::Value = serde_json::from_str(&output.stdout).unwrap();
        assert_eq!(json["severity"], "error");
        assert_eq!(severity(&json, "config"), "error", "{json:#}");
        assert_ne!(severity(&json, "state-directory"), "not looked at", "{json:#}");
        assert_eq!(severity(&json, "pools"), "not looked at", "{json:#}");
    }
}

#[tokio::test]
async fn a_pool_and_a_portal_that_are_not_there_are_errors_with_what_mends_them() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("storage-agent.toml");
    let state = folder.path().join("state");
    std::fs::create_dir(&state).unwrap();
    let socket = folder.path().join("socket");
    let text = format!(
        "state_directory = {state:?}\n[server]\nsocket = {socket:?}\n\
         [iscsi]\nportals = [\"192.0.2.77:3260\"]\niqn_prefix = \"iqn.2026-11.io.example:storage1\"\n\
         [pool.fast]\nkind = \"lvm\"\nvolume_group = \"no-such-group\"\ndevices = [\"/dev/no-such-device\"]\n"
    );
    std::fs::write(&config, text).unwrap();
    let output = doctor(&config, &["--json"]).await;
    let json: serde_json::Value = serde_json::from_str(&output.stdout).unwrap();
    for (check, expected) in [
        ("config", "ok"),
        ("agent", "error"),
        ("certificates", "ok"),
        ("journal", "ok"),
        ("portals", "error"),
        ("pools", "error"),
    ] {
        assert_eq!(severity(&json, check), expected, "{check}: {json:#}");
    }
    let findings = json["findings"].as_array().unwrap();
    let without = findings.iter().filter(|finding| finding["severity"] == "error" && finding["mend"] == "");
    assert_eq!(without.count(), 0, "{json:#}");

    let output = doctor(&config, &[]).await;
    assert_eq!(output.exit_code, Some(2), "{output:?}");
    let lines: Vec<&str> = output.stdout.lines().collect();
    assert!(lines[0].starts_with("SEVERITY  CHECK"), "{}", output.stdout);
    assert!(lines[1].starts_with("error "), "{}", output.stdout);
    let prose = lines.iter().filter(|line| !line.contains("mend: "));
    assert_eq!(prose.filter(|line| line.chars().count() > 120).count(), 0, "{}", output.stdout);
}
