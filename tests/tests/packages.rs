//! What can be said of the packages without a host to install them on: how tight the units are, and what the maintainer
//! scripts refuse and leave. Tier `user`. Not here: that an agent does its work in its unit, and dpkg itself (the lab).

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails there")]

use std::fs;
use std::path::{Path, PathBuf};

use tether_agent_core::command::{CommandLine, Output};

fn packaging() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").join("packaging")
}

fn unit(agent: &str) -> PathBuf {
    packaging().join(format!("systemd/tether-{agent}-agent.service"))
}

/// `systemd-analyze security` in tenths, as systemd 252 counts.
#[tokio::test]
async fn the_units_are_as_tight_as_promised() {
    for (agent, tenths) in [("storage", 30), ("compute", 40)] {
        let analyze = CommandLine::new("/usr/bin/systemd-analyze")
            .args(["security", "--offline=true", "--no-pager"])
            .arg(format!("--threshold={tenths}"))
            .arg(unit(agent));
        let output = analyze.output().await.unwrap();
        assert_eq!(
            output.exit_code,
            Some(0),
            "{agent}: at most {tenths}: {}{}",
            output.stdout,
            output.stderr
        );
    }
}

/// QEMU would not see the agent's mounts: systemd.exec(5) says of each of these that it makes a mount namespace.
#[test]
fn the_compute_agent_has_the_hosts_mounts() {
    let unit = fs::read_to_string(unit("compute")).unwrap();
    let keys: Vec<&str> = unit
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| Some(line.split_once('=')?.0))
        .collect();
    for key in &keys {
        let makes_one =
            ["Private", "ProtectSystem", "ProtectHome", "ProtectKernel", "ProtectControl", "ProtectProc"]
                .iter()
                .chain(&[
                    "ProcSubset",
                    "ReadOnlyPaths",
                    "ReadWritePaths",
                    "InaccessiblePaths",
                    "ExecPaths",
                    "NoExecPaths",
                ])
                .chain(&[
                    "Bind",
                    "TemporaryFileSystem",
                    "Root",
                    "MountFlags",
                    "MountImages",
                    "DynamicUser",
                    "LogNamespace",
                ])
                .any(|word| key.starts_with(word));
        assert!(!makes_one, "{key}");
    }
    assert!(keys.contains(&"CapabilityBoundingSet"), "{keys:?}");
}

/// A host whose root is a folder, with one agent's journal.
struct Host {
    root: tempfile::TempDir,
    package: &'static str,
}

impl Host {
    fn new(package: &'static str) -> Self {
        Self { root: tempfile::tempdir().unwrap(), package }
    }

    fn put(&self, path: &str, content: &str) {
        let path = self.root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    fn has(&self, path: &str) -> bool {
        self.root.path().join(path).exists()
    }

    /// Runs a maintainer script as dpkg does, with more of its environment.
    async fn script(&self, name: &str, argument: &str, environment: &[&str]) -> Output {
        let script = CommandLine::new("/usr/bin/env")
            .arg(format!("DPKG_ROOT={}", self.root.path().display()))
            .arg(format!("DPKG_MAINTSCRIPT_PACKAGE={}", self.package))
            .args(environment)
            .arg(packaging().join("debian").join(name))
            .arg(argument);
        script.output().await.unwrap()
    }
}

/// As the journal writes it.
fn record(phase: &str) -> String {
    format!(
        "{{\n  \"version\": 1,\n  \"record\": {{\n    \"id\": \"x\",\n    \"phase\": \"{phase}\"\n  }}\n}}\n"
    )
}

#[tokio::test]
async fn an_agent_in_use_is_not_removed_unless_somebody_says_so() {
    for (package, folder) in [
        ("tether-storage-agent", "var/lib/tether/storage-agent/exports"),
        ("tether-compute-agent", "var/lib/tether/compute-agent/attachments"),
    ] {
        let host = Host::new(package);
        assert_eq!(host.script("prerm", "remove", &[]).await.exit_code, Some(0), "never used");
        host.put(&format!("{folder}/old.json"), &record("ended"));
        assert_eq!(host.script("prerm", "remove", &[]).await.exit_code, Some(0), "all ended");
        for (name, content) in [("live.json", record("attached")), ("bad.json.damaged", "{\"vers".to_owned())]
        {
            host.put(&format!("{folder}/{name}"), &content);
            let refused = host.script("prerm", "remove", &[]).await;
            assert_eq!(refused.exit_code, Some(1), "{refused:?}");
            let id = name.trim_end_matches(".json");
            assert!(refused.stderr.contains(id) && !refused.stderr.contains("old"), "{refused:?}");
            assert!(refused.stderr.contains("tether detach ID"), "it says what to do: {refused:?}");
            let told = host.script("prerm", "remove", &["TETHER_REMOVE_IN_USE=yes"]).await;
            assert_eq!(told.exit_code, Some(0), "{told:?}");
            assert!(told.stderr.contains(id), "it is told all the same: {told:?}");
            assert_eq!(host.script("prerm", "upgrade", &[]).await.exit_code, Some(0), "an upgrade keeps it");
            fs::remove_file(host.root.path().join(folder).join(name)).unwrap();
        }
    }
}

#[tokio::test]
async fn the_journal_is_looked_for_where_the_config_says() {
    let host = Host::new("tether-compute-agent");
    host.put("srv/state/attachments/live.json", &record("attached"));
    for line in ["state_directory = \"/srv/state\"", "  state_directory='/srv/state' # ours"] {
        host.put(
            "etc/tether/compute-agent.toml",
            &format!("# state_directory = \"/no\"\n{line}\n[server]\n"),
        );
        assert_eq!(host.script("prerm", "remove", &[]).await.exit_code, Some(1), "{line}");
    }
}

#[tokio::test]
async fn a_purge_takes_the_journal_unless_it_is_needed() {
    for (package, state, needed) in [
        ("tether-storage-agent", "var/lib/tether/storage-agent", "files/pool.v1.json"),
        ("tether-storage-agent", "var/lib/tether/storage-agent", "exports/live.json"),
        ("tether-compute-agent", "var/lib/tether/compute-agent", "attachments/live.json"),
    ] {
        let host = Host::new(package);
        host.put(&format!("{state}/{needed}"), &record("ready"));
        let kept = host.script("postrm", "purge", &[]).await;
        assert_eq!(kept.exit_code, Some(0), "{kept:?}");
        assert!(host.has(&format!("{state}/{needed}")) && kept.stderr.contains("is kept"), "{kept:?}");

        fs::remove_file(host.root.path().join(state).join(needed)).unwrap();
        host.put(&format!("{state}/exports/old.json"), &record("ended"));
        host.put("etc/tether/pki/ca.crt", "theirs");
        assert_eq!(host.script("postrm", "remove", &[]).await.exit_code, Some(0));
        assert!(host.has(state), "only a purge takes it");
        assert_eq!(host.script("postrm", "purge", &[]).await.exit_code, Some(0));
        assert!(!host.has("var/lib/tether") && host.has("etc/tether/pki/ca.crt"));
        fs::remove_file(host.root.path().join("etc/tether/pki/ca.crt")).unwrap();
        assert_eq!(host.script("postrm", "purge", &[]).await.exit_code, Some(0));
        assert!(!host.has("etc/tether"));
    }
}
