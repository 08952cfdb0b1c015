//! `tether-compute-agent`: connects exports and plugs them into domains. Arguments, config and exit code; the work
//! is in the modules.

// A fuzzer brings its own.
#![cfg_attr(fuzzing, no_main)]
#![cfg_attr(fuzzing, allow(dead_code, unused_imports, reason = "a fuzzer calls the parsers alone"))]

mod attach;
mod attachments;
mod config;
mod connector;
mod detach;
mod doctor;
#[cfg(fuzzing)]
mod fuzz;
mod hypervisor;
mod initiator;
mod kernel_events;
mod measure;
mod mount;
mod objects;
mod over_iscsi;
mod over_nfs;
mod reconcile;
mod record;
mod resize;
mod service;
mod sizes;
mod watch;

use std::process::ExitCode;
use std::sync::Arc;

use tether_agent_core::{daemon, metrics, program, services};
use tether_proto::wire::compute_agent_server::ComputeAgentServer;

use crate::hypervisor::libvirt::Libvirt;
use crate::mount::file_helper;

#[cfg(not(fuzzing))]
fn main() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|argument| argument == file_helper::ARGUMENT) {
        return file_helper::serve();
    }
    daemon::main(
        &program::COMPUTE_AGENT,
        |config: config::Config, shutdown| async {
            let attachments = Arc::new(attachments::Attachments::open(&config)?);
            tokio::select! {
                () = attachments.reconnect_after_boot(&config.state_directory) => {}
                () = shutdown.cancelled() => {}
            }
            // The first attach does not wait for the connection to libvirt; an agent whose libvirt is away starts all the same.
            let first = attachments.clone();
            tokio::spawn(async move {
                if let Err(error) = first.connector().await {
                    tracing::warn!(%error, "this host has no connector yet");
                }
            });
            tokio::spawn(watch::tell_io_errors(attachments.clone()));
            let operations = attachments.operations().clone();
            let at_start = attachments.clone();
            let reconcile = daemon::reconciler(move || {
                let attachments = at_start.clone();
                async move { attachments.reconcile(false).await }
            });
            let measured = attachments.clone();
            let measure = metrics::measure(move || {
                let attachments = measured.clone();
                async move { measure::samples(&attachments).await }
            });
            let service = service::Service::new(config.clone(), attachments, shutdown);
            let service =
                ComputeAgentServer::new(service).max_decoding_message_size(services::LARGEST_REQUEST);
            let routes = services::with_health_and_reflection(service, &operations).await?;
            Ok(daemon::Agent { config, routes, operations, reconcile, measure })
        },
        |config| doctor::checks(config, Libvirt::new(&config.libvirt_uri)),
    )
}
