//! What a storage host tells those who watch: pools that fill up, and what is not as the journals have it. Not here: how it is told
//! (`agent_core::events`), nor extensions, which the engine tells.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tether_agent_core::events::{Seen, Source};
use tether_agent_core::reconcile::drift;
use tether_proto::PoolName;
use tether_proto::wire::{Event, EventKind};

use crate::config::Config;
use crate::export::Exports;
use crate::service;
use crate::volume::{PoolView, Volumes};

const POOLS_EVERY: Duration = Duration::from_secs(10);
const DRIFT_EVERY: Duration = Duration::from_secs(15);

/// What is looked at while somebody watches.
pub(crate) fn sources(config: &Config, exports: &Arc<Exports>, volumes: &Arc<Volumes>) -> Vec<Source> {
    let thresholds: Arc<BTreeMap<PoolName, u8>> =
        Arc::new(config.pool.iter().map(|(name, pool)| (name.clone(), pool.threshold_percent())).collect());
    let (pools, exported, made) = (volumes.clone(), exports.clone(), volumes.clone());
    vec![
        Source::new(POOLS_EVERY, move || {
            let (pools, thresholds) = (pools.clone(), thresholds.clone());
            async move {
                let views = pools.list_pools().await;
                let unseen = views.iter().filter(|view| view.room.is_err());
                let unknown = unseen.map(|view| about(&view.name)).collect();
                let threshold = |view: &PoolView| thresholds.get(&view.name).copied();
                let holds = views.iter().filter_map(|view| filling(view, threshold(view)?)).collect();
                Some(Seen { holds, unknown })
            }
        }),
        Source::new(DRIFT_EVERY, move || {
            let (exports, volumes) = (exported.clone(), made.clone());
            async move {
                let plan = || service::reconcile(&exports, &volumes, true);
                let Seen { holds, unknown } = drift(exports.operations(), plan).await;
                let holds = holds.into_iter().map(|event| with_volume(&exports, event)).collect();
                let unknown = unknown.into_iter().map(|event| with_volume(&exports, event)).collect();
                Some(Seen { holds, unknown })
            }
        }),
    ]
}

fn with_volume(exports: &Exports, event: Event) -> Event {
    match event.attachment_id.parse().ok().and_then(|id| exports.volume(id)) {
        Some(key) => Event { pool: key.pool.to_string(), volume: key.volume.to_string(), ..event },
        None => event,
    }
}

fn about(pool: &PoolName) -> Event {
    Event { kind: EventKind::PoolFilling.into(), pool: pool.to_string(), ..Event::default() }
}

/// Is a pool fuller than it should be?
fn filling(pool: &PoolView, threshold: u8) -> Option<Event> {
    let room = pool.room.as_ref().ok()?;
    let used = percent(room.size.saturating_sub(room.free), room.size);
    let metadata = room.metadata_percent.filter(|percent| *percent >= f64::from(threshold));
    let message = match metadata {
        Some(metadata) => {
            format!("{metadata:.0} % of the thin pool's metadata are taken, and {used:.0} % of its room")
        }
        None if used >= f64::from(threshold) => format!("{used:.0} % of its room are taken"),
        None => return None,
    };
    let message = format!("{message}; its threshold is {threshold} %");
    Some(Event { message, ..about(&pool.name) })
}

#[expect(clippy::cast_precision_loss, reason = "a percentage has no use for the last bytes")]
fn percent(part: u64, of: u64) -> f64 {
    if of == 0 { 0.0 } else { part as f64 / of as f64 * 100.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::PoolRoom;
    use tether_agent_core::failure::{Failure, Reason};
    use tether_proto::wire::Transport;

    fn pool(used: u64, metadata_percent: Option<f64>) -> PoolView {
        PoolView {
            name: "thin".parse().unwrap(),
            transport: Transport::Iscsi,
            provisioning: "thin",
            room: Ok(PoolRoom { size: 1000, free: 1000 - used, provisioned: 0, metadata_percent }),
        }
    }

    #[test]
    fn f48_a_pool_above_its_threshold_is_told_by_data_or_by_metadata() {
        assert_eq!(filling(&pool(799, Some(79.9)), 80), None);
        let data = filling(&pool(800, Some(1.0)), 80).unwrap();
        assert_eq!(data.message, "80 % of its room are taken; its threshold is 80 %");
        let metadata = filling(&pool(10, Some(91.0)), 80).unwrap();
        assert!(metadata.message.starts_with("91 % of the thin pool's metadata"), "{metadata:?}");
        let gone = PoolView { room: Err(Failure::new(Reason::LvmFailed, "gone")), ..pool(0, None) };
        assert_eq!(filling(&gone, 80), None);
    }
}
