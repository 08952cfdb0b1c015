//! `tether-compute-agent`: connects exports and plugs them into domains. Arguments, config and exit code; the work
//! is in the modules.

mod attach;
mod attachments;
mod config;
mod connector;
mod detach;
mod hypervisor;
mod initiator;
mod kernel_events;
mod mount;
mod over_iscsi;
mod over_nfs;
mod record;
mod resize;
mod service;
mod tcp_probe;

use std::process::ExitCode;
use std::sync::Arc;

use tether_agent_core::{daemon, services};
use tether_proto::wire::compute_agent_server::ComputeAgentServer;

use crate::mount::file_helper;

fn main() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|argument| argument == file_helper::ARGUMENT) {
        return file_helper::serve();
    }
    daemon::main(
        "tether-compute-agent",
        "/etc/tether/compute-agent.toml",
        |config: config::Config, shutdown| async {
            let attachments = Arc::new(attachments::Attachments::open(&config)?);
            // The first attach does not wait for the connection to libvirt; an agent whose libvirt is away starts all the same.
            let first = attachments.clone();
            tokio::spawn(async move {
                if let Err(error) = first.connector().await {
                    tracing::warn!(%error, "this host has no connector yet");
                }
            });
            let operations = vec![attachments.operations().clone()];
            let service = service::Service::new(attachments, shutdown);
            let routes = services::with_health_and_reflection(ComputeAgentServer::new(service)).await?;
            Ok(daemon::Agent { config, routes, operations })
        },
    )
}
