//! `tether doctor` over both hosts: what they find, what is between them, and the exit code by the worst of it.

use std::collections::BTreeSet;

use tether_proto::{Finding, wire};

use crate::fakes::{Lab, lock};

fn endpoint(listening: bool) -> wire::Endpoint {
    endpoint_at("10.0.0.1:3260".into(), listening)
}

fn endpoint_at(address: String, listening: bool) -> wire::Endpoint {
    wire::Endpoint { address, transport: wire::Transport::Iscsi.into(), listening }
}

#[tokio::test]
async fn the_exit_code_is_that_of_the_worst_finding_and_the_table_begins_with_it() {
    let lab = Lab::up().await;
    *lock(&lab.storage.diagnosis) = wire::DiagnoseResponse {
        hostname: "storage1".into(),
        endpoints: vec![endpoint(true)],
        findings: vec![
            Finding::ok("clock", "synchronised").into(),
            Finding::note("pools", "small", "why").into(),
        ],
        ..Default::default()
    };
    let ran = lab.tether(&["doctor"]).await;
    assert_eq!(ran.exit, 0, "{ran:?}");
    assert!(
        ran.out.contains("it reaches 10.0.0.1:3260") && ran.out.contains("those of 2 hosts"),
        "{}",
        ran.out
    );

    lock(&lab.compute.diagnosis)
        .findings
        .push(Finding::warning("certificates", "9 days", "then nobody").into());
    assert_eq!(lab.tether(&["doctor"]).await.exit, 1);

    let stale = Finding::error("open-iscsi-lock", "60 s old", "every login waits")
        .mend("rm /run/lock/iscsi/lock.write");
    lock(&lab.compute.diagnosis).findings.push(stale.into());
    let ran = lab.tether(&["doctor"]).await;
    assert_eq!(ran.exit, 2, "{ran:?}");
    let lines: Vec<&str> = ran.out.lines().collect();
    assert!(lines[0].starts_with("SEVERITY  HOST"), "{}", ran.out);
    assert!(lines[1].starts_with("error     compute1  open-iscsi-lock"), "{}", ran.out);
    assert_eq!(lines[3].trim(), "mend: rm /run/lock/iscsi/lock.write");
    assert!(lines.iter().all(|line| line.chars().count() <= 120), "{}", ran.out);

    let json = lab.tether(&["--json", "doctor"]).await.json();
    assert_eq!(json["severity"], "error");
    let first = &json["findings"][0];
    assert_eq!(
        (first["host"].as_str(), first["check"].as_str()),
        (Some("compute1"), Some("open-iscsi-lock"))
    );
    assert_eq!(first["mend"], "rm /run/lock/iscsi/lock.write");
}

#[tokio::test]
async fn each_of_many_addresses_is_tried_also_those_that_one_call_has_no_room_for() {
    let lab = Lab::up().await;
    let addresses: Vec<String> = (1..=130).map(|last| format!("10.0.0.{last}:3260")).collect();
    lock(&lab.storage.diagnosis).endpoints =
        addresses.iter().map(|address| endpoint_at(address.clone(), true)).collect();
    let json = lab.tether(&["--json", "doctor"]).await.json();
    let reached: BTreeSet<&str> = json["findings"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|finding| finding["found"].as_str()?.strip_prefix("it reaches "))
        .flat_map(|found| found.split(", "))
        .collect();
    assert_eq!(reached, addresses.iter().map(String::as_str).collect());
}

#[tokio::test]
async fn an_agent_that_is_away_is_an_error_and_hides_nothing_of_the_others() {
    let lab = Lab::up().await;
    lock(&lab.storage.diagnosis).findings.push(Finding::ok("clock", "synchronised").into());
    lab.compute.agent.link.down();
    let ran = lab.tether(&["doctor"]).await;
    assert_eq!(ran.exit, 2, "{ran:?}");
    assert!(ran.out.contains("error     compute1  agent"), "{}", ran.out);
    assert!(
        ran.out.contains("tether-compute-agent doctor") && ran.out.contains("synchronised"),
        "{}",
        ran.out
    );
}

#[tokio::test]
async fn what_is_between_the_hosts_is_found() {
    let lab = Lab::up().await;
    *lock(&lab.storage.diagnosis) = wire::DiagnoseResponse {
        hostname: "storage1".into(),
        endpoints: vec![endpoint(true)],
        received_unix_microseconds: 90_000_000,
        answered_unix_microseconds: 90_000_000,
        ..Default::default()
    };
    *lock(&lab.compute.diagnosis) = wire::DiagnoseResponse {
        hostname: "compute1".into(),
        initiator_iqn: "iqn.1993-08.org.debian:01:one".into(),
        reached: vec![wire::Reached {
            address: "10.0.0.1:3260".into(),
            problem: "no answer in 3 s".into(),
            ..Default::default()
        }],
        ..Default::default()
    };
    let export = wire::ExportStatus {
        attachment_id: "5f1c0e0a-7d1f-4a53-9d3c-0b7f3c0f7d11".into(),
        hostname: "clone".into(),
        initiator_iqn: "iqn.1993-08.org.debian:01:one".into(),
        ..Default::default()
    };
    lock(&lab.storage.exports).insert(export.attachment_id.clone(), export);
    let json = lab.tether(&["--json", "doctor"]).await.json();
    let errors: Vec<&str> = json["findings"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|finding| finding["severity"] == "error")
        .map(|finding| finding["check"].as_str().unwrap())
        .collect();
    assert_eq!(errors, ["clocks", "initiator-names", "reachability"], "{json:#}");
}
