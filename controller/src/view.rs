//! What agents tell, as JSON for scripts: snake_case fields, bytes as numbers, enums as lower-case words. Also what a
//! verb hands back. Connection info has no view: it holds a secret.

use comfy_table::{Table, presets};
use serde::Serialize;
use tether_proto::{ByteSize, wire};

use crate::failure::{Exit, Failure, FailureView, Result};
use crate::survey::Silent;

/// What a verb found or did.
#[derive(Debug)]
pub(crate) struct Output {
    /// For scripts.
    pub(crate) json: String,
    /// For people.
    pub(crate) text: String,
    /// What else people must know, on standard error.
    pub(crate) warnings: Vec<String>,
    pub(crate) exit: Exit,
}

impl Output {
    pub(crate) fn new(value: &impl Serialize, text: String) -> Result<Self> {
        Ok(Self { json: to_json(value)?, text, warnings: Vec::new(), exit: Exit::Success })
    }

    /// Says which hosts could not be asked; the first one gives the exit code.
    pub(crate) fn without<'a>(mut self, silent: impl IntoIterator<Item = &'a Silent>) -> Self {
        for silent in silent {
            if self.exit == Exit::Success {
                self.exit = silent.failure.exit;
            }
            self.warnings.push(silent.warning());
        }
        self
    }
}

/// One JSON object.
pub(crate) fn to_json(value: &impl Serialize) -> Result<String> {
    serde_json::to_string(value)
        .map_err(|error| Failure::new(tonic::Code::Internal, "JSON_FAILED", error.to_string()))
}

/// A host that did not answer.
#[derive(Debug, Serialize)]
pub(crate) struct UnreachableView<'a> {
    pub(crate) kind: String,
    pub(crate) host: &'a str,
    pub(crate) error: FailureView<'a>,
}

/// An [`wire::OperationReport`], and how long the call took from here.
#[derive(Debug, Serialize)]
pub(crate) struct ReportView {
    outcome: String,
    steps: Vec<StepView>,
    total_microseconds: u64,
    call_microseconds: u64,
}

#[derive(Debug, Serialize)]
struct StepView {
    step: String,
    start_microseconds: u64,
    duration_microseconds: u64,
}

impl ReportView {
    pub(crate) fn new(report: Option<&wire::OperationReport>, time: std::time::Duration) -> Self {
        let report = report.cloned().unwrap_or_default();
        Self {
            outcome: outcome_word(report.outcome()),
            steps: report
                .steps
                .into_iter()
                .map(|timing| StepView {
                    step: timing.step,
                    start_microseconds: timing.start_microseconds,
                    duration_microseconds: timing.duration_microseconds,
                })
                .collect(),
            total_microseconds: report.total_microseconds,
            call_microseconds: u64::try_from(time.as_micros()).unwrap_or(u64::MAX),
        }
    }
}

#[derive(Debug, Serialize)]
pub(crate) struct VolumeView<'a> {
    storage: &'a str,
    pool: &'a str,
    volume: &'a str,
    size_bytes: u64,
    uuid: &'a str,
    transport: String,
    wwn: Option<&'a str>,
    serial: &'a str,
    format: String,
    provisioning: String,
    created_by_tether: bool,
    multi_attach: bool,
    exported_for: &'a [String],
}

impl<'a> VolumeView<'a> {
    pub(crate) fn new(storage: &'a str, volume: &'a wire::Volume) -> Self {
        Self {
            storage,
            pool: &volume.pool,
            volume: &volume.volume,
            size_bytes: volume.size_bytes,
            uuid: &volume.uuid,
            transport: transport_word(volume.transport()),
            wwn: some(&volume.wwn),
            serial: &volume.serial,
            format: format_word(volume.format()),
            provisioning: provisioning_word(volume.provisioning()),
            created_by_tether: volume.created_by_tether,
            multi_attach: volume.multi_attach,
            exported_for: &volume.exported_for,
        }
    }
}

#[derive(Debug, Serialize)]
pub(crate) struct ExportView<'a> {
    storage: &'a str,
    pool: &'a str,
    volume: &'a str,
    hostname: &'a str,
    initiator_iqn: &'a str,
    transport: String,
    target_iqn: Option<&'a str>,
    file_path: Option<&'a str>,
    client_addresses: &'a [String],
    access_mode: String,
    enabled: bool,
    connected: bool,
    phase: &'a str,
    may_be_lost: &'a [String],
}

impl<'a> ExportView<'a> {
    pub(crate) fn new(storage: &'a str, export: &'a wire::ExportStatus) -> Self {
        Self {
            storage,
            pool: &export.pool,
            volume: &export.volume,
            hostname: &export.hostname,
            initiator_iqn: &export.initiator_iqn,
            transport: transport_word(export.transport()),
            target_iqn: some(&export.target_iqn),
            file_path: some(&export.file_path),
            client_addresses: &export.client_addresses,
            access_mode: access_mode_word(export.access_mode()),
            enabled: export.enabled,
            connected: export.connected,
            phase: &export.phase,
            may_be_lost: &export.may_be_lost,
        }
    }
}

#[derive(Debug, Serialize)]
pub(crate) struct AttachmentView<'a> {
    compute: &'a str,
    domain: &'a str,
    domain_uuid: &'a str,
    phase: &'a str,
    device_path: Option<&'a str>,
    target_device: Option<&'a str>,
    bus: String,
    serial: &'a str,
    size_bytes: u64,
    format: String,
    transport: String,
    target_iqn: Option<&'a str>,
    portal: Option<&'a str>,
    share: Option<&'a str>,
    connected: bool,
    in_live_domain: bool,
    in_persistent_definition: bool,
    may_be_lost: &'a [String],
}

impl<'a> AttachmentView<'a> {
    pub(crate) fn new(compute: &'a str, attachment: &'a wire::AttachmentStatus) -> Self {
        Self {
            compute,
            domain: &attachment.domain,
            domain_uuid: &attachment.domain_uuid,
            phase: &attachment.phase,
            device_path: some(&attachment.device_path),
            target_device: some(&attachment.target_device),
            bus: bus_word(attachment.bus()),
            serial: &attachment.serial,
            size_bytes: attachment.size_bytes,
            format: format_word(attachment.format()),
            transport: transport_word(attachment.transport()),
            target_iqn: some(&attachment.target_iqn),
            portal: some(&attachment.portal),
            share: some(&attachment.share),
            connected: attachment.connected,
            in_live_domain: attachment.in_live_domain,
            in_persistent_definition: attachment.in_persistent_definition,
            may_be_lost: &attachment.may_be_lost,
        }
    }
}

/// An empty text of the wire is none.
pub(crate) fn some(text: &str) -> Option<&str> {
    Some(text).filter(|text| !text.is_empty())
}

/// An enum's name on the wire, in lower case and without its prefix: `OUTCOME_CREATED` is `created`.
fn word(name: &str, prefix: &str) -> String {
    name.strip_prefix(prefix).unwrap_or(name).to_ascii_lowercase()
}

pub(crate) fn outcome_word(outcome: wire::Outcome) -> String {
    word(outcome.as_str_name(), "OUTCOME_")
}

pub(crate) fn provisioning_word(provisioning: wire::Provisioning) -> String {
    word(provisioning.as_str_name(), "PROVISIONING_")
}

pub(crate) fn format_word(format: wire::VolumeFormat) -> String {
    word(format.as_str_name(), "VOLUME_FORMAT_")
}

pub(crate) fn transport_word(transport: wire::Transport) -> String {
    word(transport.as_str_name(), "TRANSPORT_")
}

pub(crate) fn access_mode_word(mode: wire::AccessMode) -> String {
    word(mode.as_str_name(), "ACCESS_MODE_")
}

pub(crate) fn bus_word(bus: wire::DiskBus) -> String {
    word(bus.as_str_name(), "DISK_BUS_")
}

/// A size for people; what has none yet is `-`.
pub(crate) fn size_text(bytes: u64) -> String {
    ByteSize::try_from(bytes).map_or_else(|_| "-".to_owned(), |size| size.to_string())
}

/// A table for people. Control characters are shown escaped, so that a name cannot break its row.
pub(crate) fn table<const N: usize>(
    header: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(header);
    for row in rows {
        table.add_row(row.map(|cell| match cell.chars().any(char::is_control) {
            true => cell.escape_debug().to_string(),
            false => cell,
        }));
    }
    table.to_string().lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}
