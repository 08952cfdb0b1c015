//! `tether doctor`: what all agents find on their hosts, and what only a controller sees, who knows them all (`between`). Not
//! here: what agents look at, which they know.

mod between;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use tether_proto::finding::{table, worst};
use tether_proto::{Finding, Severity, wire};

use crate::agent::{Agent, Kind};
use crate::call::Session;
use crate::failure::{Exit, Result};
use crate::survey::{Silent, ask_all};
use crate::view::Output;

use between::{ClockReading, Diagnosed, ExportedTo};

#[derive(Debug, Serialize)]
struct DoctorView<'a> {
    severity: Severity,
    findings: Vec<FindingView<'a>>,
}

#[derive(Debug, Serialize)]
struct FindingView<'a> {
    host: &'a str,
    #[serde(flatten)]
    finding: &'a Finding,
}

/// A finding and the host it is about, as named in the config; `-` for what is between several.
type Found = (String, Finding);

/// How many addresses an agent tries for one call (compute.proto, DiagnoseRequest.reach).
const ADDRESSES: usize = 64;

/// Asks the storage agents first: where they are to be reached is what the compute agents try.
pub(crate) async fn doctor(session: &Arc<Session>) -> Result<Output> {
    let storage = ask_all(session, Kind::Storage, |session, agent| async move {
        let (diagnosis, clock) = diagnose(&session, &agent, Vec::new()).await?;
        let mut client = agent.storage();
        let exports = session.call(&agent).read(client.list_exports(wire::ListExportsRequest {})).await?;
        Ok((diagnosis, clock, exports.exports))
    });
    let (storage, mut silent) = storage.await;
    let mut exported_to = Vec::new();
    let mut hosts = Vec::new();
    for told in storage {
        let host = told.agent.name().to_owned();
        let (diagnosis, clock, exports) = told.answer;
        exported_to.extend(exports.into_iter().map(|export| ExportedTo {
            storage: host.clone(),
            hostname: export.hostname,
            initiator_iqn: export.initiator_iqn,
        }));
        hosts.push(Diagnosed { host, diagnosis, clock });
    }
    let endpoints: BTreeSet<String> =
        hosts.iter().flat_map(|host| host.diagnosis.endpoints.iter().map(|e| e.address.clone())).collect();
    let endpoints: Vec<String> = endpoints.into_iter().collect();
    let compute = ask_all(session, Kind::Compute, move |session, agent| {
        let endpoints = endpoints.clone();
        async move {
            let mut portions = endpoints.chunks(ADDRESSES).map(<[String]>::to_vec);
            let (mut diagnosis, clock) =
                diagnose(&session, &agent, portions.next().unwrap_or_default()).await?;
            for portion in portions {
                let (more, _) = diagnose(&session, &agent, portion).await?;
                diagnosis.reached.extend(more.reached);
            }
            Ok((diagnosis, clock))
        }
    });
    let (compute, more) = compute.await;
    silent.extend(more);
    let compute: Vec<Diagnosed> = compute
        .into_iter()
        .map(|told| {
            let (diagnosis, clock) = told.answer;
            Diagnosed { host: told.agent.name().to_owned(), diagnosis, clock }
        })
        .collect();
    output(&hosts, &compute, &exported_to, &silent)
}

async fn diagnose(
    session: &Session,
    agent: &Agent,
    reach: Vec<String>,
) -> Result<(wire::DiagnoseResponse, ClockReading)> {
    let request = wire::DiagnoseRequest { reach };
    let sent = now();
    let diagnosis = match agent.kind {
        Kind::Storage => session.call(agent).read(agent.storage().diagnose(request)).await?,
        Kind::Compute => session.call(agent).read(agent.compute().diagnose(request)).await?,
    };
    let clock = ClockReading {
        sent,
        received: diagnosis.received_unix_microseconds,
        answered: diagnosis.answered_unix_microseconds,
        back: now(),
    };
    Ok((diagnosis, clock))
}

/// This machine's clock, in microseconds since 1970-01-01 UTC.
fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}

fn output(
    storage: &[Diagnosed],
    compute: &[Diagnosed],
    exported_to: &[ExportedTo],
    silent: &[Silent],
) -> Result<Output> {
    let mut found: Vec<Found> = Vec::new();
    for host in storage.iter().chain(compute) {
        let findings = host.diagnosis.findings.iter().cloned().map(Finding::from);
        found.extend(findings.map(|finding| (host.host.clone(), finding)));
    }
    found.extend(between::reached(storage, compute));
    found.extend(between::initiator_names(compute, exported_to));
    found.extend(between::clocks(storage, compute));
    found.extend(silent.iter().map(not_asked));
    let severity = worst(found.iter().map(|(_, finding)| finding.severity));
    found.sort_by(|(one_host, one), (other_host, other)| {
        other
            .severity
            .cmp(&one.severity)
            .then_with(|| one_host.cmp(other_host))
            .then_with(|| one.check.cmp(&other.check))
    });
    let text = table(found.iter().map(|(host, finding)| (host.as_str(), finding)));
    let findings = found.iter().map(|(host, finding)| FindingView { host, finding }).collect();
    let mut output = Output::new(&DoctorView { severity, findings }, text)?;
    output.exit = match severity {
        Severity::Ok | Severity::Note => Exit::Success,
        Severity::Warning => Exit::Other,
        Severity::Error => Exit::Broken,
    };
    Ok(output)
}

fn not_asked(silent: &Silent) -> Found {
    let why = match silent.failure.reason.as_str() {
        "WRONG_ROLE" => {
            "its findings are not known: the doctor starts programs there, which needs the role operator"
        }
        _ => "nothing can be attached or detached there; what is connected stays connected",
    };
    let kind = silent.kind;
    let mend = format!("tether-{kind}-agent doctor   # on that host: it works without the agent");
    (silent.host.clone(), Finding::error("agent", silent.failure.message.clone(), why).mend(mend))
}
