//! Sends one call to an agent, over gRPC or by the `tether` command, and says what came back. Not here: whether that is
//! right (`model`), and calling again (`controller`).

use std::time::Duration;

use serde_json::Value;
use tether_proto::wire::{self, Outcome};
use tonic::{Code, Response, Status};
use tonic_types::StatusExt;

use super::model::{Answer, Call};
use crate::tether::{SHARE_POOL, THICK_POOL, Tether};

/// A client goes away after this; the agent goes on.
const CALL_DEADLINE: Duration = Duration::from_secs(40);
/// More than any pool in the lab has.
const TOO_LARGE: u64 = 1 << 40;

/// Reasons that pass by themselves when the agents serve and the network is whole.
const PASSING: [&str; 17] = [
    "OPERATION_RUNNING",
    "PORTAL_UNREACHABLE",
    "SERVER_UNREACHABLE",
    "LOGIN_FAILED",
    "MOUNT_FAILED",
    "DOMAIN_BUSY",
    "HYPERVISOR_UNAVAILABLE",
    "OUTCOME_UNKNOWN",
    "STUCK",
    "DEVICE_MISSING",
    "FLUSH_FAILED",
    "GUEST_HOLDS_DEVICE",
    "STILL_THERE",
    "VOLUME_IN_USE",
    "NO_CLIENT_ADDRESS",
    "AGENT_UNREACHABLE",
    "HOST_UNREACHABLE",
];

/// What came back.
#[derive(Debug, Clone)]
pub(crate) enum Reply {
    /// An answer of an agent, and what it tells beside.
    Answer(Answer, Box<Facts>),
    /// No answer, or one that passes by itself: nobody knows yet what became of the call.
    Passing(String),
}

/// What an answer tells beside its outcome.
#[derive(Debug, Clone, Default)]
pub(crate) struct Facts {
    /// The volume's size in bytes.
    pub(crate) size: Option<u64>,
    /// What Export answers.
    pub(crate) connection_info: Option<wire::ConnectionInfo>,
}

/// The volume that a call is about.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) pool: &'static str,
    pub(crate) name: String,
    pub(crate) bus: wire::DiskBus,
}

impl Place {
    /// `POOL/NAME`.
    pub(crate) fn path(&self) -> String {
        format!("{}/{}", self.pool, self.name)
    }
}

/// How a controller reaches the agents.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    pub(crate) tether: Tether,
    pub(crate) connector: wire::Connector,
}

impl Caller {
    /// Sends a call over gRPC. `connection_info` is what Export answered, for an Attach.
    pub(crate) async fn send(
        &self,
        place: &Place,
        call: &Call,
        connection_info: Option<&wire::ConnectionInfo>,
    ) -> Reply {
        let sent = self.send_without_end(place, call, connection_info);
        match tokio::time::timeout(CALL_DEADLINE, sent).await {
            Ok(Ok(reply)) => reply,
            Ok(Err(Trouble::Status(status))) => refusal(&status),
            Ok(Err(Trouble::Connection(error))) => Reply::Passing(format!("no connection: {error:#}")),
            Err(_) => Reply::Passing(format!("no answer within {} s", CALL_DEADLINE.as_secs())),
        }
    }

    async fn send_without_end(
        &self,
        place: &Place,
        call: &Call,
        connection_info: Option<&wire::ConnectionInfo>,
    ) -> Result<Reply, Trouble> {
        let (pool, volume) = (place.pool.to_owned(), place.name.clone());
        match call {
            Call::Create(size_bytes) => {
                let request =
                    wire::CreateVolumeRequest { pool, volume, size_bytes: *size_bytes, ..Default::default() };
                let made = self.tether.storage().await?.create_volume(request).await?.into_inner();
                Ok(done(made.report, Facts { size: made.volume.map(|v| v.size_bytes), ..Facts::default() }))
            }
            Call::Overfill => {
                let pool = if place.pool == SHARE_POOL { SHARE_POOL } else { THICK_POOL };
                let request = wire::CreateVolumeRequest {
                    pool: pool.to_owned(),
                    volume: format!("{volume}-too-large"),
                    size_bytes: TOO_LARGE,
                    provisioning: wire::Provisioning::Thick.into(),
                    ..Default::default()
                };
                let made = self.tether.storage().await?.create_volume(request).await?.into_inner();
                Ok(done(made.report, Facts::default()))
            }
            Call::Extend(size_bytes) => {
                let request = wire::ExtendVolumeRequest { pool, volume, size_bytes: *size_bytes };
                let made = self.tether.storage().await?.extend_volume(request).await?.into_inner();
                Ok(done(made.report, Facts { size: made.volume.map(|v| v.size_bytes), ..Facts::default() }))
            }
            Call::Delete => {
                let request = wire::DeleteVolumeRequest { pool, volume, ..Default::default() };
                let gone = self.tether.storage().await?.delete_volume(request).await?.into_inner();
                Ok(done(gone.report, Facts::default()))
            }
            Call::Export(id) => {
                let request = wire::ExportRequest {
                    attachment_id: id.clone(),
                    pool,
                    volume,
                    connector: Some(self.connector.clone()),
                    access_mode: wire::AccessMode::ReadWrite.into(),
                };
                let made = self.tether.storage().await?.export(request).await?.into_inner();
                let size = made.connection_info.as_ref().map(|info| info.size_bytes);
                Ok(done(made.report, Facts { size, connection_info: made.connection_info }))
            }
            Call::Attach(id, domain) => {
                let request = wire::AttachRequest {
                    attachment_id: id.clone(),
                    domain: (*domain).to_owned(),
                    connection_info: connection_info.cloned(),
                    disk: Some(wire::DiskOptions { bus: place.bus.into(), ..Default::default() }),
                };
                let made = self.tether.compute().await?.attach(request).await?.into_inner();
                Ok(done(made.report, Facts::default()))
            }
            Call::Resize(id, size_bytes) => {
                let request =
                    wire::ResizeAttachmentRequest { attachment_id: id.clone(), size_bytes: *size_bytes };
                let told = self.tether.compute().await?.resize_attachment(request).await?.into_inner();
                Ok(done(told.report, Facts::default()))
            }
            Call::Detach(id) => {
                let request = wire::DetachRequest { attachment_id: id.clone(), ..Default::default() };
                let gone = self.tether.compute().await?.detach(request).await?.into_inner();
                Ok(done(gone.report, Facts::default()))
            }
            Call::Unexport(id) => {
                let request = wire::UnexportRequest { attachment_id: id.clone(), ..Default::default() };
                let gone = self.tether.storage().await?.unexport(request).await?.into_inner();
                Ok(done(gone.report, Facts::default()))
            }
        }
    }

    /// Has the `tether` command do it.
    pub(crate) async fn command(&self, arguments: &[String]) -> Reply {
        let arguments: Vec<&str> =
            ["--timeout", "60"].into_iter().chain(arguments.iter().map(String::as_str)).collect();
        let output = match self.tether.output(&arguments).await {
            Ok(output) => output,
            Err(error) => return Reply::Passing(format!("no result: {error:#}")),
        };
        let told: Value = match serde_json::from_str(&output.stdout) {
            Ok(told) => told,
            Err(error) => {
                return Reply::Passing(format!("no JSON ({error}): {}{}", output.stdout, output.stderr));
            }
        };
        if output.exit_code != Some(0) {
            let word = |name: &str| told["error"][name].as_str().unwrap_or_default().to_owned();
            let (reason, message) = (word("reason"), word("message"));
            // 5 and 6: not reached, or not known.
            if [Some(5), Some(6)].contains(&output.exit_code) || PASSING.contains(&reason.as_str()) {
                return Reply::Passing(format!("{reason}: {message}"));
            }
            return Reply::Answer(Answer::Refused(reason), Box::default());
        }
        let outcome = match told["outcome"].as_str() {
            Some("created") => Outcome::Created,
            Some("unchanged") => Outcome::Unchanged,
            Some("repaired") => Outcome::Repaired,
            Some("removed") => Outcome::Removed,
            _ => Outcome::Unspecified,
        };
        let size = ["/volume/size_bytes", "/attachment/size_bytes"].into_iter();
        let size = size.filter_map(|pointer| told.pointer(pointer).and_then(Value::as_u64)).next();
        Reply::Answer(Answer::Done(outcome), Box::new(Facts { size, connection_info: None }))
    }
}

/// What a reading call gave: what is there, that it is not there, or nothing.
pub(crate) fn read<T>(outcome: Result<Response<T>, Status>) -> Result<Option<T>, String> {
    match outcome {
        Ok(response) => Ok(Some(response.into_inner())),
        Err(status) if status.code() == Code::NotFound => Ok(None),
        Err(status) => Err(format!("{:?}: {}", status.code(), status.message())),
    }
}

enum Trouble {
    Connection(anyhow::Error),
    Status(Status),
}

impl From<anyhow::Error> for Trouble {
    fn from(error: anyhow::Error) -> Self {
        Self::Connection(error)
    }
}

impl From<Status> for Trouble {
    fn from(status: Status) -> Self {
        Self::Status(status)
    }
}

fn done(report: Option<wire::OperationReport>, facts: Facts) -> Reply {
    let outcome = report.map(|report| report.outcome()).unwrap_or_default();
    Reply::Answer(Answer::Done(outcome), Box::new(facts))
}

fn refusal(status: &Status) -> Reply {
    let details = status.get_error_details();
    match details.error_info().filter(|info| info.domain == "tether") {
        Some(info) if !PASSING.contains(&info.reason.as_str()) => {
            Reply::Answer(Answer::Refused(info.reason.clone()), Box::default())
        }
        Some(info) => Reply::Passing(format!("{}: {}", info.reason, status.message())),
        None => Reply::Passing(format!("{:?}: {}", status.code(), status.message())),
    }
}
