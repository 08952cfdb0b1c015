//! The crash matrix (rules 4, 6 and 8, F11): an agent is killed before and after the effect of each step of each verb, and
//! started again by systemd. What was cut off is then finished or taken back, the same call gives what it would have given,
//! nothing of ours is left over, and what is somebody else's is as it was. Each test writes its part of the matrix into
//! `tests/crash-matrix`.

mod attachments;
mod force;
mod resize;
mod undo;
mod volumes;

use tether_proto::wire::{self, Outcome};
use tether_tests::Host;
use tether_tests::tether::FAULT_FILE;
use tonic::{Code, Status};

use crate::matrix::{moments, publish};
use crate::nfs_access::foreign_lines;
use crate::shared::export_to_another;
use crate::{Fixture, foreign, new_id};

const MIB: u64 = 1 << 20;

/// One agent that is to be killed.
#[derive(Clone, Copy)]
enum Agent {
    Storage,
    Compute,
}

/// One row of the matrix.
struct Row {
    step: String,
    moment: &'static str,
    /// What the agent has made of it by itself.
    found: &'static str,
    /// What the same call is answered then.
    retry: Outcome,
}

impl Agent {
    fn host(self, fixture: &Fixture) -> &Host {
        match self {
            Self::Storage => &fixture.lab.storage,
            Self::Compute => &fixture.lab.compute,
        }
    }

    fn unit(self) -> &'static str {
        match self {
            Self::Storage => "tether-storage-agent",
            Self::Compute => "tether-compute-agent",
        }
    }

    /// From now on it dies at this step. Gives its process id.
    async fn plant(self, fixture: &Fixture, step: &str, moment: &str) -> String {
        let host = self.host(fixture);
        host.put(format!("{step} {moment} kill\n"), FAULT_FILE, 0o644).await.unwrap();
        host.run(&format!("systemctl show -P MainPID {}", self.unit())).await.unwrap().trim().to_owned()
    }

    /// It died, and the next one has brought what it found to its end.
    async fn comes_back(self, fixture: &Fixture, before: &str, when: &str) {
        let unit = self.unit();
        let command = format!(
            "set -e; ! [ -e {FAULT_FILE} ] || {{ echo it did not die; exit 1; }}; for i in $(seq 200); do \
             now=$(systemctl show -P MainPID {unit}); [ $now = {before} ] || [ $now = 0 ] || ! systemctl -q is-active {unit} || break; \
             sleep 0.1; done; for i in $(seq 100); do \
             ! journalctl -q -o cat -u {unit} _PID=$now | grep -q 'reconciled changed=' || exit 0; sleep 0.1; done; \
             systemctl status {unit}; exit 1"
        );
        let host = self.host(fixture);
        host.run(&command).await.unwrap_or_else(|error| panic!("{when}: {error:#}"));
        // All that could be done it has done by itself. The other agent may have lost what this one has taken away.
        let output = fixture.tether.output(&["reconcile"]).await.unwrap();
        let told: serde_json::Value = serde_json::from_str(&output.stdout)
            .unwrap_or_else(|error| panic!("{when}: {error}: {}{}", output.stdout, output.stderr));
        let left = told["items"].as_array().unwrap_or_else(|| panic!("{when}: {told:#}")).iter();
        let left = left.filter(|item| item["host"] == host.name.as_str());
        let left = left.filter(|item| item["done"] == true || !item["problem"].is_null()).count();
        assert_eq!(left, 0, "{when}: {told:#}");
    }
}

/// The names of the steps in a report from the wire.
pub(crate) fn names(report: Option<&wire::OperationReport>) -> Vec<String> {
    report.expect("a report").steps.iter().map(|step| step.step.clone()).collect()
}

pub(crate) fn outcome(report: Option<&wire::OperationReport>) -> Outcome {
    report.expect("a report").outcome()
}

fn write(name: &str, steps: &[String], rows: &[Row]) {
    let rows: Vec<String> = rows
        .iter()
        .map(|Row { step, moment, found, retry }| {
            let retry = retry.as_str_name().trim_start_matches("OUTCOME_");
            format!("| {step} | {moment} | {found} | {retry} |")
        })
        .collect();
    let heading = "| step | killed | found after the restart | the same call |\n|---|---|---|---|";
    publish("crash-matrix", name, heading, steps, &rows);
}

/// What is somebody else's on both hosts.
pub(crate) async fn theirs(fixture: &Fixture) -> ((String, String), String) {
    (foreign::seen(fixture).await, foreign_lines(fixture).await)
}

/// What of ours is on the compute host, without their disk.
pub(crate) async fn left_on_compute(fixture: &Fixture) -> String {
    let left = crate::left_on_compute(&fixture.lab).await;
    left.lines().filter(|line| !line.contains("deadbeef")).collect::<Vec<_>>().join("\n")
}

async fn assert_nothing_left(fixture: &Fixture, when: &str) {
    let left = (left_on_compute(fixture).await, crate::left_on_storage(&fixture.lab).await);
    assert_eq!(left, (String::new(), String::new()), "{when}");
}

pub(crate) async fn fixture_with_theirs() -> Fixture {
    let fixture = Fixture::new().await;
    foreign::plant(&fixture).await;
    let line = "exportfs -o ro,all_squash,no_subtree_check 10.99.0.60:/srv";
    fixture.lab.storage.run(line).await.unwrap();
    fixture
}

pub(crate) async fn get_attachment(fixture: &Fixture, id: &str) -> Result<wire::AttachmentStatus, Status> {
    let request = wire::GetAttachmentRequest { attachment_id: id.into() };
    Ok(fixture.tether.compute().await.unwrap().get_attachment(request).await?.into_inner())
}

pub(crate) async fn get_export(fixture: &Fixture, id: &str) -> Result<wire::ExportStatus, Status> {
    let request = wire::GetExportRequest { attachment_id: id.into() };
    Ok(fixture.tether.storage().await.unwrap().get_export(request).await?.into_inner())
}

pub(crate) async fn detach_rpc(fixture: &Fixture, id: &str) -> Result<wire::DetachResponse, Status> {
    let request = wire::DetachRequest { attachment_id: id.into(), ..Default::default() };
    Ok(fixture.tether.compute().await.unwrap().detach(request).await?.into_inner())
}

pub(crate) async fn export_rpc(
    fixture: &Fixture,
    id: &str,
    volume: &str,
) -> Result<wire::ExportResponse, Status> {
    let connector =
        fixture.tether.compute().await.unwrap().get_connector(wire::GetConnectorRequest {}).await?;
    let (pool, volume) = volume.split_once('/').unwrap();
    let request = wire::ExportRequest {
        attachment_id: id.into(),
        pool: pool.into(),
        volume: volume.into(),
        connector: Some(connector.into_inner()),
        access_mode: wire::AccessMode::ReadWrite.into(),
    };
    Ok(fixture.tether.storage().await.unwrap().export(request).await?.into_inner())
}

pub(crate) async fn unexport_rpc(fixture: &Fixture, id: &str) -> Result<wire::UnexportResponse, Status> {
    let request = wire::UnexportRequest { attachment_id: id.into(), ..Default::default() };
    Ok(fixture.tether.storage().await.unwrap().unexport(request).await?.into_inner())
}

/// `shared`: it is a `multi_attach` volume that another host has already, and keeps.
async fn export_killed(volume: &str, name: &str, shared: bool) {
    let fixture = fixture_with_theirs().await;
    let options: &[&str] = if shared { &["--multi-attach"] } else { &[] };
    fixture.create(volume, "16M", options).await;
    let theirs_before = theirs(&fixture).await;
    let other = match shared {
        true => Some(export_to_another(&fixture, volume, wire::AccessMode::ReadWrite).await.unwrap().0),
        false => None,
    };
    let on_storage = crate::left_on_storage(&fixture.lab).await;
    let nothing_left = async |when: &str| {
        let left = (left_on_compute(&fixture).await, crate::left_on_storage(&fixture.lab).await);
        assert_eq!(left, (String::new(), on_storage.clone()), "{when}");
    };
    let id = new_id();
    let exporting = names(export_rpc(&fixture, &id, volume).await.unwrap().report.as_ref());
    let unexporting = names(unexport_rpc(&fixture, &id).await.unwrap().report.as_ref());
    let mut rows = Vec::new();
    for step in &exporting {
        for moment in moments(step) {
            let when = format!("export killed {moment} {step}");
            let id = new_id();
            let pid = Agent::Storage.plant(&fixture, step, moment).await;
            export_rpc(&fixture, &id, volume).await.expect_err(&when);
            Agent::Storage.comes_back(&fixture, &pid, &when).await;
            let found = match get_export(&fixture, &id).await {
                Ok(status) if status.phase == "exported" && status.enabled => "exported",
                Err(status) if status.code() == Code::NotFound => {
                    assert_eq!(crate::left_on_storage(&fixture.lab).await, on_storage, "{when}");
                    "taken back"
                }
                other => panic!("{when}: {other:?}"),
            };
            let again =
                export_rpc(&fixture, &id, volume).await.unwrap_or_else(|error| panic!("{when}: {error:?}"));
            rows.push(Row { step: step.clone(), moment, found, retry: outcome(again.report.as_ref()) });
            unexport_rpc(&fixture, &id).await.unwrap();
            nothing_left(&when).await;
        }
    }
    write(&format!("export-{name}"), &exporting, &rows);
    rows.clear();
    for step in &unexporting {
        for moment in moments(step) {
            let when = format!("unexport killed {moment} {step}");
            let id = new_id();
            export_rpc(&fixture, &id, volume).await.unwrap();
            let pid = Agent::Storage.plant(&fixture, step, moment).await;
            unexport_rpc(&fixture, &id).await.expect_err(&when);
            Agent::Storage.comes_back(&fixture, &pid, &when).await;
            let found = match get_export(&fixture, &id).await.unwrap().phase.as_str() {
                "ended" => {
                    assert_eq!(crate::left_on_storage(&fixture.lab).await, on_storage, "{when}");
                    "removed"
                }
                "exported" => "not begun",
                other => panic!("{when}: {other}"),
            };
            let again = unexport_rpc(&fixture, &id).await.unwrap_or_else(|error| panic!("{when}: {error:?}"));
            rows.push(Row { step: step.clone(), moment, found, retry: outcome(again.report.as_ref()) });
            nothing_left(&when).await;
        }
    }
    if let Some(other) = other {
        unexport_rpc(&fixture, &other).await.unwrap();
    }
    assert_nothing_left(&fixture, "at the end").await;
    assert_eq!(theirs(&fixture).await, theirs_before);
    write(&format!("unexport-{name}"), &unexporting, &rows);
}

#[tokio::test]
#[ignore = "lab"]
async fn f11_export_and_unexport_killed_at_any_step_over_iscsi() {
    export_killed("thick/crash", "iscsi", false).await;
}

/// What is in the pool, as LVM or the directory shows it.
pub(crate) async fn pool_content(fixture: &Fixture) -> String {
    let command = "lvs --noheadings -o lv_name,lv_size tether | grep -v foreign | sort; ls -A /srv/share | grep -v lost";
    fixture.lab.storage.run(&format!("{command} || true")).await.unwrap()
}

/// Left out of a run for its time, not for what it shows: `tests/run long`.
mod long {
    use super::*;

    #[tokio::test]
    #[ignore = "lab"]
    async fn f11_export_and_unexport_killed_at_any_step_over_nfs() {
        export_killed("share/crash", "nfs", false).await;
    }

    #[tokio::test]
    #[ignore = "lab"]
    async fn f11_exports_of_a_shared_volume_killed_at_any_step_over_iscsi() {
        export_killed("thick/crash", "shared-iscsi", true).await;
    }
}
