//! The lab tier: what only real kernels, a real libvirt and a real guest can show. Run by `tests/run lab`, one test at a
//! time; each starts from the saved state with freshly installed agents.
//!
//! Tests are named by what holds, with the row of failures that they answer (F1 …). Modules `long` hold what `tests/run long`
//! alone tries. Here: what all of them share.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on fails there"
)]

mod bad_input;
mod crash;
mod doctor;
mod extend;
mod faults;
mod flow;
mod flush;
mod force;
mod foreign;
mod guests;
mod identity;
mod many_exports;
mod matrix;
mod network;
mod nfs_access;
mod nfs_bad_input;
mod nfs_exclusive;
mod nfs_flow;
mod nfs_identity;
mod nfs_lost;
mod nfs_mounts;
mod nfs_pool;
mod nfs_server;
mod packages;
mod parallel;
mod portals;
mod reboots;
mod reconcile;
mod recovery;
mod repetition;
mod security;
mod share;
mod shared;
mod soak;
mod step_failures;
mod stop;
mod stuck;
mod surface;
mod watch;

use std::time::Duration;

use serde_json::Value;
use tether_proto::wire;
use tether_tests::progress::say;
use tether_tests::{Disk, Host, Lab, Options, Tether, lost};
use tokio::runtime::Runtime;
use tonic::Status;
use tonic_types::StatusExt;

/// A guest sees a change within this.
pub(crate) const SEEN: Duration = Duration::from_secs(20);

/// The lab as each test finds it.
pub(crate) struct Fixture {
    pub(crate) lab: Lab,
    pub(crate) tether: Tether,
}

impl Fixture {
    /// The lab `tests`, or the one that `TETHER_LAB_NAME` says, in its saved state, agents running and nothing attached.
    pub(crate) async fn new() -> Self {
        let name = std::env::var("TETHER_LAB_NAME").unwrap_or_else(|_| "tests".to_owned());
        let lab = Lab::up(&name, Options::default()).await.expect("the lab comes up");
        let tether = Tether::install(&lab).await.expect("the agents are installed");
        Self { lab, tether }
    }

    /// Creates a volume of 16 MiB and gives what is known of it.
    pub(crate) async fn volume(&self, name: &str) -> Value {
        self.create(name, "16M", &[]).await
    }

    /// Creates a volume of this size and with these options, and gives what is known of it.
    pub(crate) async fn create(&self, name: &str, size: &str, options: &[&str]) -> Value {
        let arguments: Vec<&str> = ["volume", "create", name, size].iter().chain(options).copied().collect();
        self.tether.json(&arguments).await.expect("the volume is created")["volume"].clone()
    }

    /// Detaches an attachment.
    pub(crate) async fn detach(&self, id: &str) -> Value {
        self.tether.json(&["detach", id]).await.expect("the volume is detached")
    }

    /// Attaches and gives the attachment.
    pub(crate) async fn attach(&self, arguments: &[&str]) -> Value {
        let arguments: Vec<&str> = ["attach"].iter().chain(arguments).copied().collect();
        self.tether.json(&arguments).await.expect("the volume is attached")
    }

    /// The disk that a guest sees with a serial.
    pub(crate) async fn sees(&self, guest: &str, serial: &str) -> Disk {
        self.lab.guest(guest).unwrap().wait_disk(serial, SEEN).await.expect("the guest sees the disk")
    }

    /// A domain's XML, live or persistent.
    pub(crate) async fn xml(&self, domain: &str, flag: &str) -> String {
        self.lab.compute.run(&format!("virsh -q dumpxml {domain} {flag}")).await.unwrap()
    }

    /// Fails unless nothing of ours is left on either host, see [`leftovers`].
    pub(crate) async fn assert_nothing_left(&self, when: &str) {
        let left = leftovers(&self.lab).await;
        assert!(left.is_empty(), "left {when}: {left}");
    }
}

/// A test that fails tells whether a host was lost: then it is the lab that is to be looked at first.
impl Drop for Fixture {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        // A thread of its own, since this one may be a runtime's.
        let lost = std::thread::scope(|scope| {
            let look = || Runtime::new().map(|runtime| runtime.block_on(lost::hosts(&self.lab)));
            scope.spawn(look).join()
        });
        say(match lost {
            Ok(Ok(seen)) if seen.is_empty() => "both hosts answer".to_owned(),
            Ok(Ok(seen)) => seen,
            other => format!("whether both hosts answer could not be asked: {other:?}"),
        });
    }
}

/// What of ours is on both hosts, see [`tether_tests::leftovers`].
pub(crate) async fn leftovers(lab: &Lab) -> String {
    tether_tests::leftovers::on_both(lab).await.unwrap()
}

/// The storage host's part of [`leftovers`].
pub(crate) async fn left_on_storage(lab: &Lab) -> String {
    tether_tests::leftovers::on_storage(lab).await.unwrap()
}

/// The compute host's part of [`leftovers`].
pub(crate) async fn left_on_compute(lab: &Lab) -> String {
    tether_tests::leftovers::on_compute(lab).await.unwrap()
}

/// A text of the JSON, or a failure that shows all of it.
pub(crate) fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value
        .pointer(pointer)
        .and_then(Value::as_str)
        .unwrap_or_else(|| panic!("no text at {pointer} in {value:#}"))
}

/// The reason of a failed call, its step and its next action.
pub(crate) fn reason(status: &Status) -> (String, String, String) {
    let details = status.get_error_details();
    let info = details.error_info().unwrap_or_else(|| panic!("no ErrorInfo in {status:?}"));
    let of = |key: &str| info.metadata.get(key).cloned().unwrap_or_default();
    (info.reason.clone(), of("step"), of("next"))
}

/// SHA-256 of the beginning of an LV, read on the storage host past its page cache.
pub(crate) async fn checksum_on_storage(host: &Host, volume: &str, bytes: u64) -> String {
    checksum_of(host, &format!("/dev/tether/{volume}"), 0, bytes).await
}

/// SHA-256 of a part of a file or device, read past the host's page cache. `start` is a multiple of 4096.
pub(crate) async fn checksum_of(host: &Host, path: &str, start: u64, bytes: u64) -> String {
    let command = format!(
        "set -o pipefail; dd if={path} bs=64k iflag=direct,skip_bytes,count_bytes skip={start} count={bytes} \
         status=none | sha256sum"
    );
    host.run(&command).await.unwrap().split_whitespace().next().unwrap_or_default().to_owned()
}

/// The one `<disk>` of an attachment in a domain's XML.
pub(crate) fn our_disk<'a>(xml: &'a str, id: &str) -> &'a str {
    let at = xml.find(&format!("ua-tether-{id}")).unwrap_or_else(|| panic!("no disk of {id} in {xml}"));
    let start = xml[..at].rfind("    <disk ").expect("its beginning");
    let end = at + xml[at..].find("</disk>\n").expect("its end") + "</disk>\n".len();
    &xml[start..end]
}

/// A new attachment id.
pub(crate) fn new_id() -> String {
    uuid::Uuid::new_v4().to_string()
}

/// The export of a volume to the compute host under a new id.
pub(crate) async fn export(fixture: &Fixture, volume: &str) -> (String, wire::ConnectionInfo) {
    let connector = fixture.tether.compute().await.unwrap().get_connector(wire::GetConnectorRequest {}).await;
    let connector = connector.unwrap().into_inner();
    export_to(fixture, volume, connector, wire::AccessMode::ReadWrite).await.expect("the volume is exported")
}

/// The export of a volume to a connector under a new id.
pub(crate) async fn export_to(
    fixture: &Fixture,
    volume: &str,
    connector: wire::Connector,
    mode: wire::AccessMode,
) -> Result<(String, wire::ConnectionInfo), Status> {
    let (pool, volume) = volume.split_once('/').unwrap();
    let id = new_id();
    let request = wire::ExportRequest {
        attachment_id: id.clone(),
        pool: pool.to_owned(),
        volume: volume.to_owned(),
        connector: Some(connector),
        access_mode: mode.into(),
    };
    let response = fixture.tether.storage().await.unwrap().export(request).await?;
    Ok((id, response.into_inner().connection_info.unwrap()))
}

/// Makes thin LVs `NAME-0` and so on, of 4 MiB. Any LV can be exported, and LVM alone is quicker than the agent, which also verifies.
pub(crate) async fn make_volumes(storage: &Host, name: &str, count: u32) {
    let command = format!(
        "for n in $(seq 0 {}); do lvcreate -qq --virtualsize 4m --thinpool tether/thinpool --name {name}-$n; done",
        count - 1
    );
    storage.run_within(&command, Duration::from_secs(120)).await.unwrap();
}

/// Attaches with connection info that the test may have changed.
pub(crate) async fn attach_with(
    fixture: &Fixture,
    id: &str,
    domain: &str,
    connection_info: wire::ConnectionInfo,
) -> Result<wire::AttachResponse, Status> {
    let request = wire::AttachRequest {
        attachment_id: id.to_owned(),
        domain: domain.to_owned(),
        connection_info: Some(connection_info),
        disk: None,
    };
    Ok(fixture.tether.compute().await.unwrap().attach(request).await?.into_inner())
}

/// Unexports though the host may still use it.
pub(crate) async fn unexport_by_force(fixture: &Fixture, id: &str) -> Result<wire::UnexportResponse, Status> {
    let request = wire::UnexportRequest { attachment_id: id.to_owned(), force: true };
    Ok(fixture.tether.storage().await.unwrap().unexport(request).await?.into_inner())
}

/// The iSCSI part of connection info.
pub(crate) fn iscsi(info: &mut wire::ConnectionInfo) -> &mut wire::IscsiConnection {
    match info.transport.as_mut() {
        Some(wire::connection_info::Transport::Iscsi(iscsi)) => iscsi,
        other => panic!("no iSCSI in {other:?}"),
    }
}

/// Unexports.
pub(crate) async fn unexport(fixture: &Fixture, id: &str) {
    let request = wire::UnexportRequest { attachment_id: id.to_owned(), ..Default::default() };
    fixture.tether.storage().await.unwrap().unexport(request).await.expect("the export is removed");
}
