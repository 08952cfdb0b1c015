//! What the metrics tell of exports and pools. Not here: how they are told (`agent_core::metrics`).

use std::collections::BTreeMap;

use tether_agent_core::metrics::Sample;
use tether_proto::Transport;

use crate::export::Exports;
use crate::record::Phase;
use crate::volume::Volumes;

/// Exports and pools, measured now.
pub(crate) async fn samples(exports: &Exports, volumes: &Volumes) -> Vec<Sample> {
    let mut samples = export_samples(exports).await;
    samples.extend(pool_samples(volumes).await);
    samples
}

async fn export_samples(exports: &Exports) -> Vec<Sample> {
    // Each kind is told also when there is none of it: an alert waits for a number, not for its absence.
    let mut counts: BTreeMap<(&str, &str), u32> = ["iscsi", "nfs"]
        .into_iter()
        .flat_map(|transport| {
            ["connected", "waiting", "not-enabled", "half-done"].map(|state| (transport, state))
        })
        .map(|key| (key, 0))
        .collect();
    for view in exports.list().await {
        let Some(export) = &view.export else { continue };
        let transport = match &export.connection.transport {
            Transport::Iscsi(_) => "iscsi",
            Transport::Nfs(_) => "nfs",
        };
        let state = match (view.phase, view.enabled, view.connected) {
            (Phase::Exported, true, true) => "connected",
            (Phase::Exported, true, false) => "waiting",
            (Phase::Exported, false, _) => "not-enabled",
            (Phase::Exporting | Phase::Unexporting | Phase::Ended, _, _) => "half-done",
        };
        *counts.entry((transport, state)).or_default() += 1;
    }
    counts
        .into_iter()
        .map(|((transport, state), count)| Sample {
            name: "exports",
            help: "Exports: connected is in use, waiting has no client, not-enabled should be reachable and is not",
            labels: vec![("transport", transport.to_owned()), ("state", state.to_owned())],
            value: f64::from(count),
        })
        .collect()
}

async fn pool_samples(volumes: &Volumes) -> Vec<Sample> {
    let mut samples = Vec::new();
    for pool in volumes.list_pools().await {
        let mut tell = |name, help, value| {
            let labels =
                vec![("pool", pool.name.to_string()), ("provisioning", pool.provisioning.to_owned())];
            samples.push(Sample { name, help, labels, value });
        };
        tell("pool_usable", "1 when volumes can be made in the pool", f64::from(u8::from(pool.room.is_ok())));
        let Ok(room) = &pool.room else { continue };
        tell("pool_size_bytes", "How large the pool is", bytes(room.size));
        tell("pool_free_bytes", "What is not taken of the pool", bytes(room.free));
        tell(
            "pool_provisioned_bytes",
            "What all volumes of the pool are together; more than its size can run full",
            bytes(room.provisioned),
        );
        if let Some(percent) = room.metadata_percent {
            tell("pool_metadata_used_ratio", "How much of a thin pool's metadata is taken", percent / 100.0);
        }
    }
    samples
}

/// As Prometheus has all numbers; exact up to 8 PiB.
#[expect(clippy::cast_precision_loss, reason = "a gauge is a float, whatever it counts")]
fn bytes(count: u64) -> f64 {
    count as f64
}
