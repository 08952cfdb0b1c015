//! `Watch` on both agents: what is told when a connection is lost, a pool fills up, a disk is taken away by hand, a guest has an I/O
//! error, and a volume is extended.

use std::time::{Duration, Instant};

use tether_proto::wire::{Event, EventKind, EventState, WatchRequest};
use tether_tests::tether::SHARE;
use tokio::time::timeout_at;
use tonic::Streaming;

use crate::{Fixture, text};

/// The agents look at some things once a minute.
const TOLD: Duration = Duration::from_secs(100);

struct Watch(Streaming<Event>);

impl Watch {
    /// The next event of this kind and state; others are passed over.
    async fn until(&mut self, kind: EventKind, state: EventState) -> Event {
        let deadline = tokio::time::Instant::now() + TOLD;
        let mut seen = Vec::new();
        loop {
            let Ok(message) = timeout_at(deadline, self.0.message()).await else {
                panic!("no {kind:?} {state:?}, but {seen:#?}");
            };
            let event = message.expect("the stream goes on").expect("an event");
            if event.kind() == kind && event.state() == state {
                return event;
            }
            seen.push(event);
        }
    }
}

/// Left out of a run for its time, not for what it shows: `tests/run long`.
mod long {
    use super::*;

    #[tokio::test]
    #[ignore = "lab"]
    async fn f48_what_happens_on_the_hosts_is_told_to_whoever_watches() {
        use EventKind::{ConnectionLost, Drift, GuestIoError, PoolFilling, Resized, Watching};
        use EventState::{Began, Ended, Happened};
        let fixture = Fixture::new().await;
        let (storage, compute) = (&fixture.lab.storage, &fixture.lab.compute);
        let serial = text(&fixture.volume("thin/watched").await, "/serial").to_owned();
        let id = text(&fixture.attach(&["thin/watched", "c2"]).await, "/attachment_id").to_owned();
        fixture.volume("share/watched").await;
        let file = text(&fixture.attach(&["share/watched", "c3"]).await, "/attachment_id").to_owned();
        let watch = fixture.tether.storage().await.unwrap().watch(WatchRequest {}).await.expect("storage");
        let mut on_storage = Watch(watch.into_inner());
        let watch = fixture.tether.compute().await.unwrap().watch(WatchRequest {}).await.expect("compute");
        let mut on_compute = Watch(watch.into_inner());
        on_storage.until(Watching, Happened).await;
        on_compute.until(Watching, Happened).await;

        fixture.tether.json(&["volume", "extend", "thin/watched", "32M"]).await.expect("extended");
        let extended = on_storage.until(Resized, Happened).await;
        assert_eq!((extended.pool.as_str(), extended.volume.as_str()), ("thin", "watched"), "{extended:?}");
        let resized = on_compute.until(Resized, Happened).await;
        assert_eq!((&resized.attachment_id, resized.domain.as_str()), (&id, "c2"), "{resized:?}");
        assert!(resized.message.contains("32 MiB"), "{resized:?}");

        // The network goes away under an iSCSI disk and a file.
        let lan = storage.run("ip -o addr show to 10.99.0.1 | awk '{print $2}'").await.unwrap();
        let lan = lan.trim();
        let began = Instant::now();
        storage.run(&format!("ip link set {lan} down")).await.unwrap();
        let mut lost = vec![on_compute.until(ConnectionLost, Began).await.attachment_id];
        lost.push(on_compute.until(ConnectionLost, Began).await.attachment_id);
        println!("both were told lost after {:?}", began.elapsed());
        let mut both = vec![id.clone(), file.clone()];
        both.sort();
        lost.sort();
        assert_eq!(lost, both);
        storage.run(&format!("ip link set {lan} up")).await.unwrap();
        let mut back = vec![on_compute.until(ConnectionLost, Ended).await.attachment_id];
        back.push(on_compute.until(ConnectionLost, Ended).await.attachment_id);
        back.sort();
        assert_eq!(back, both);

        storage
            .run(&format!("fallocate -l $(($(stat -f -c '%f*%S' {SHARE}) * 9 / 10)) {SHARE}/filler"))
            .await
            .unwrap();
        let filling = on_storage.until(PoolFilling, Began).await;
        assert_eq!(filling.pool, "share", "{filling:?}");
        assert!(filling.message.contains("its threshold is 80 %"), "{filling:?}");
        storage.run(&format!("rm {SHARE}/filler")).await.unwrap();
        assert_eq!(on_storage.until(PoolFilling, Ended).await.pool, "share");

        // The device fails under the target.
        let disk = fixture.sees("c2", &serial).await;
        let guest = fixture.lab.guest("c2").unwrap();
        storage.run("dmsetup wipe_table --noflush tether-watched").await.unwrap();
        guest.write(&disk, "lost", 1 << 20).await.expect_err("the device gives errors");
        let failed = on_compute.until(GuestIoError, Happened).await;
        assert_eq!((&failed.attachment_id, failed.domain.as_str()), (&id, "c2"), "{failed:?}");
        storage.run("lvchange --refresh tether/watched").await.unwrap();
        guest.write(&disk, "again", 1 << 20).await.expect("the device is back");

        // Somebody takes the disk out by hand; a detach ends what is left.
        compute
            .run(&format!("virsh -q detach-device-alias c3 ua-tether-{file} --live --config"))
            .await
            .unwrap();
        let drifted = on_compute.until(Drift, Began).await;
        assert_eq!((&drifted.attachment_id, drifted.domain.as_str()), (&file, "c3"), "{drifted:?}");
        assert!(drifted.message.contains("no such disk"), "{drifted:?}");
        fixture.detach(&file).await;
        assert_eq!(on_compute.until(Drift, Ended).await.attachment_id, file);
        fixture.detach(&id).await;
        fixture.assert_nothing_left("at the end").await;
    }
}
