//! What is compared when all controllers are quiet: all that the agents list, and what the guests see; and at the end
//! that nothing is left, and that what is somebody else's is as it was. Not here: one volume after one order
//! (`controller`).

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::Value;
use tether_proto::wire;

use super::controller::Controller;
use super::mismatch::Mismatch;
use super::model::{Attachment, Phase};
use super::record::Record;
use crate::lab::Lab;
use crate::progress::pause;
use crate::tether::Tether;
use crate::{foreign, leftovers};

/// What was away finds back within this.
const SETTLED: Duration = Duration::from_secs(120);
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Somebody else's NFS export, made by hand.
const THEIR_SHARE: &str = "exportfs -o ro,all_squash,no_subtree_check 10.99.0.60:/srv";

/// What is somebody else's on both hosts.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Theirs {
    on_hosts: (String, String),
    shares: String,
}

/// Puts somebody else's target, session, disk and share on the hosts. Gives what can be seen of them.
pub(crate) async fn plant(lab: &Lab) -> anyhow::Result<Theirs> {
    foreign::plant(lab).await?;
    lab.storage.run(THEIR_SHARE).await?;
    theirs(lab).await
}

async fn theirs(lab: &Lab) -> anyhow::Result<Theirs> {
    let command = "grep -vE '^/srv/share[[:space:]]' /var/lib/nfs/etab | sort";
    Ok(Theirs { on_hosts: foreign::seen(lab).await?, shares: lab.storage.run(command).await? })
}

/// What all controllers together have, as lines; and what the agents and the guests show.
struct Lines {
    expected: BTreeSet<String>,
    seen: BTreeSet<String>,
}

/// Everybody is quiet: compares all volumes, exports, attachments and guests' disks. Shared volumes are settled.
pub(crate) async fn all(
    lab: &Lab,
    tether: &Tether,
    controllers: &mut [Controller],
    record: &Record,
) -> anyhow::Result<()> {
    settle_shared(tether, controllers, record).await?;
    let began = Instant::now();
    loop {
        let lines = compare(lab, tether, controllers).await;
        let (missing, surplus) = match lines {
            Ok(Lines { expected, seen }) if expected == seen => return Ok(()),
            Ok(Lines { expected, seen }) => {
                let only = |a: &BTreeSet<String>, b: &BTreeSet<String>| {
                    a.difference(b).cloned().collect::<Vec<_>>().join("\n            ")
                };
                (only(&expected, &seen), only(&seen, &expected))
            }
            Err(error) => ("answers to all that reads".to_owned(), format!("{error:#}")),
        };
        if began.elapsed() > SETTLED {
            let number = record.counts().calls;
            return Err(Mismatch::error(number, "all volumes and attachments", &missing, &surplus, record));
        }
        pause(LOOK_AGAIN).await;
    }
}

/// What the fights over the shared volumes have come to.
async fn settle_shared(
    tether: &Tether,
    controllers: &mut [Controller],
    record: &Record,
) -> anyhow::Result<()> {
    for controller in controllers {
        for slot in &mut controller.slots {
            let Some(contest) = &slot.contest else { continue };
            let request =
                wire::GetVolumeRequest { pool: slot.place.pool.into(), volume: slot.place.name.clone() };
            let volume = super::caller::read(tether.storage().await?.get_volume(request).await);
            let size = volume.map_err(anyhow::Error::msg)?.map(|volume| volume.size_bytes);
            if let Err(why) = contest.settle(size) {
                let (number, what) = (record.counts().calls, slot.place.path());
                return Err(Mismatch::error(number, &what, "what the last calls made", &why, record));
            }
            slot.model.size = size;
        }
    }
    Ok(())
}

async fn compare(lab: &Lab, tether: &Tether, controllers: &[Controller]) -> anyhow::Result<Lines> {
    let mut lines = Lines { expected: BTreeSet::new(), seen: BTreeSet::new() };
    for slot in controllers.iter().flat_map(|controller| &controller.slots) {
        if let Some(size) = slot.model.size {
            lines.expected.insert(format!("volume {} of {size} bytes", slot.place.path()));
        }
        let Some(Attachment { id, domain, phase }) = &slot.model.attachment else { continue };
        lines.expected.insert(format!("export {id} of {}", slot.place.path()));
        if *phase == Phase::Attached {
            lines.expected.insert(format!("attachment {id} to {domain}"));
            if *domain != "empty" {
                // The guest sees the size that the model has, and a serial that the agent tells.
                let size = slot.model.size.unwrap_or_default();
                lines.expected.insert(format!("disk of {domain}, {size} bytes, of {id}"));
            }
        }
    }
    let volumes =
        tether.storage().await?.list_volumes(wire::ListVolumesRequest::default()).await?.into_inner();
    for volume in volumes.volumes.iter().filter(|volume| volume.created_by_tether) {
        lines.seen.insert(format!("volume {}/{} of {} bytes", volume.pool, volume.volume, volume.size_bytes));
    }
    let exports =
        tether.storage().await?.list_exports(wire::ListExportsRequest {}).await?.into_inner().exports;
    for export in exports {
        let wire::ExportStatus { attachment_id: id, pool, volume, phase, enabled, .. } = export;
        let state = if phase == "exported" && enabled {
            String::new()
        } else {
            format!(" {phase}, enabled {enabled}")
        };
        lines.seen.insert(format!("export {id} of {pool}/{volume}{state}"));
    }
    let attachments =
        tether.compute().await?.list_attachments(wire::ListAttachmentsRequest {}).await?.into_inner();
    for status in &attachments.attachments {
        let (id, domain) = (&status.attachment_id, &status.domain);
        let state = match (status.phase.as_str(), status.connected) {
            ("attached", true) => String::new(),
            (phase, connected) => format!(" {phase}, connected {connected}"),
        };
        lines.seen.insert(format!("attachment {id} to {domain}{state}"));
    }
    for guest in ["c2", "c3"] {
        for disk in lab.guest(guest)?.disks().await?.into_iter().filter(|disk| disk.serial != "theirs") {
            let whose = attachments.attachments.iter().find(|a| a.serial == disk.serial && a.domain == guest);
            let whose = whose.map_or(disk.serial.as_str(), |attachment| &attachment.attachment_id);
            lines.seen.insert(format!("disk of {guest}, {} bytes, of {whose}", disk.size));
        }
    }
    let listed = tether.json(&["list"]).await?;
    let listed = listed["attachments"].as_array().map_or(0, Vec::len);
    let attached = lines.expected.iter().filter(|line| line.starts_with("export ")).count();
    if listed != attached {
        lines.seen.insert(format!("tether list shows {listed} attachments, and there are {attached}"));
    }
    Ok(lines)
}

/// All was detached and deleted: nothing of ours is left on either host, and theirs is as it was.
pub(crate) async fn nothing_left(
    lab: &Lab,
    tether: &Tether,
    before: &Theirs,
    record: &Record,
) -> anyhow::Result<()> {
    let began = Instant::now();
    loop {
        let left = leftovers::without_theirs(lab).await?;
        let volumes = lab.storage.run("lvs --noheadings -o lv_name tether; ls -A /srv/share").await?;
        let volumes: Vec<&str> = volumes
            .split_whitespace()
            .filter(|n| !["foreign", "thinpool", "lost+found"].contains(n))
            .collect();
        let mut disks = Vec::new();
        for guest in ["c2", "c3"] {
            let all = lab.guest(guest)?.disks().await?;
            disks.extend(
                all.into_iter()
                    .filter(|disk| disk.serial != "theirs")
                    .map(|disk| format!("{guest} {disk:?}")),
            );
        }
        let theirs = theirs(lab).await?;
        let told: Value = tether.json(&["reconcile", "--dry-run"]).await?;
        let to_do = told["items"].as_array().map_or(0, Vec::len);
        if left.is_empty() && volumes.is_empty() && disks.is_empty() && theirs == *before && to_do == 0 {
            return Ok(());
        }
        if began.elapsed() > SETTLED {
            let seen = format!(
                "left: {left:?}, volumes: {volumes:?}, disks: {disks:?}, to reconcile: {to_do}, theirs: {theirs:?}"
            );
            let (number, expected) =
                (record.counts().calls, format!("nothing, and theirs as before: {before:?}"));
            return Err(Mismatch::error(number, "what is left at the end", &expected, &seen, record));
        }
        pause(LOOK_AGAIN).await;
    }
}
