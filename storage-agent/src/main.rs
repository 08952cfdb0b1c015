//! `tether-storage-agent`: makes volumes and exports them. Arguments, config and exit code; the work is in the modules.

mod addresses;
mod claims;
mod config;
mod directory;
mod export;
mod identity;
mod lvm;
mod nfs;
mod pool;
mod record;
mod service;
mod space;
mod target;
mod volume;

use std::process::ExitCode;
use std::sync::Arc;

use tether_agent_core::{daemon, services};
use tether_proto::wire::storage_agent_server::StorageAgentServer;

fn main() -> ExitCode {
    daemon::main(
        "tether-storage-agent",
        "/etc/tether/storage-agent.toml",
        |config: config::Config, shutdown| async {
            let pools = pool::Pools::open(&config).await?;
            let exports = Arc::new(export::Exports::open(&config, pools.clone()).await?);
            let volumes = Arc::new(volume::Volumes::new(pools, exports.claims()));
            let operations = vec![exports.operations().clone(), volumes.operations().clone()];
            let service = service::Service::new(exports, volumes, shutdown);
            let routes = services::with_health_and_reflection(StorageAgentServer::new(service)).await?;
            Ok(daemon::Agent { config, routes, operations })
        },
    )
}
