//! `tether-storage-agent`: makes volumes and exports them. Arguments, config and exit code; the work is in the modules.

// A fuzzer brings its own.
#![cfg_attr(fuzzing, no_main)]
#![cfg_attr(fuzzing, allow(dead_code, unused_imports, reason = "a fuzzer calls the parsers alone"))]

mod addresses;
mod claims;
mod config;
mod directory;
mod doctor;
mod export;
#[cfg(fuzzing)]
mod fuzz;
mod identity;
mod lvm;
mod measure;
mod nfs;
mod pool;
mod record;
mod service;
mod space;
mod target;
mod volume;
mod watch;

use std::process::ExitCode;
use std::sync::Arc;

use tether_agent_core::stuck::Stuck;
use tether_agent_core::{daemon, metrics, program, services};
use tether_proto::wire::storage_agent_server::StorageAgentServer;

#[cfg(not(fuzzing))]
fn main() -> ExitCode {
    daemon::main(
        &program::STORAGE_AGENT,
        |config: config::Config, shutdown| async {
            let pools = pool::Pools::open(&config).await?;
            let exports = Arc::new(export::Exports::open(&config, pools.clone()).await?);
            let operations = exports.operations().clone();
            let volumes = Arc::new(volume::Volumes::new(pools, exports.claims(), operations.clone()));
            let (at_start, beside) = (exports.clone(), volumes.clone());
            let reconcile = daemon::reconciler(move || {
                let (exports, volumes) = (at_start.clone(), beside.clone());
                async move { service::reconcile(&exports, &volumes, false).await }
            });
            let (exported, provisioned) = (exports.clone(), volumes.clone());
            let measure = metrics::measure(move || {
                let (exports, volumes) = (exported.clone(), provisioned.clone());
                async move { measure::samples(&exports, &volumes).await }
            });
            let service = service::Service::new(config.clone(), exports, volumes, shutdown);
            let service =
                StorageAgentServer::new(service).max_decoding_message_size(services::LARGEST_REQUEST);
            let routes = services::with_health_and_reflection(service, &operations).await?;
            Ok(daemon::Agent { config, routes, operations, reconcile, measure })
        },
        |config| doctor::checks(config, &Stuck::default()),
    )
}
