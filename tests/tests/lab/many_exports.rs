//! Many exports: at once, beside somebody else's changes to the kernel's target, and how much work one is among others (F35,
//! F36). Not here: attaching (`parallel`).

use std::sync::Arc;

use tether_tests::Host;
use tether_tests::tether::IQN_PREFIX;
use tokio::task::JoinSet;

use crate::crash::{export_rpc, names};
use crate::{Fixture, attach_with, export, make_volumes, new_id, unexport};

/// How many system calls on files the agent makes for an export, and which.
async fn work_of_an_export(fixture: &Fixture, volume: &str) -> (usize, String) {
    let watch = "mountpoint -q /sys/kernel/tracing || mount -t tracefs nodev /sys/kernel/tracing; cd /sys/kernel/tracing && \
                 echo 0 >tracing_on && echo >trace && echo 4096 >buffer_size_kb && echo 1 >options/event-fork && \
                 ls /proc/$(systemctl show -P MainPID tether-storage-agent)/task >set_event_pid && \
                 for call in openat mkdir rmdir symlink unlink write getdents64 newfstatat statx fsync readlink; do \
                 echo 1 >events/syscalls/sys_enter_$call/enable; done && echo 1 >tracing_on";
    fixture.lab.storage.run(watch).await.unwrap();
    let (id, _) = export(fixture, volume).await;
    // Of the agent itself; lvs and its like read what LVM has.
    let count = "cd /sys/kernel/tracing && echo 0 >tracing_on && echo 0 >events/enable && \
                 grep -E '^ *(tokio|tether)' trace | grep -oE 'sys_(openat|mkdir|symlink|getdents64|fsync|newfstatat|statx|readlink)\\(' | sort | uniq -c";
    let counted = fixture.lab.storage.run(count).await.unwrap();
    unexport(fixture, &id).await;
    let all = counted.lines().filter_map(|line| line.split_whitespace().next()?.parse::<usize>().ok()).sum();
    (all, counted)
}

/// Counts what a host's agent syncs to disk from now on, whatever the call.
async fn count_syncs(host: &Host, unit: &str) {
    let command = format!(
        "mountpoint -q /sys/kernel/tracing || mount -t tracefs nodev /sys/kernel/tracing; cd /sys/kernel/tracing && \
         echo 0 >tracing_on && echo >trace && echo 0 >events/enable && echo 1 >options/event-fork && \
         ls /proc/$(systemctl show -P MainPID {unit})/task >set_event_pid && \
         for call in fsync fdatasync sync syncfs; do echo 1 >events/syscalls/sys_enter_$call/enable; done && echo 1 >tracing_on"
    );
    host.run(&command).await.unwrap();
}

/// How many syncs there were.
async fn syncs(host: &Host) -> usize {
    let command = "cd /sys/kernel/tracing && echo 0 >tracing_on && echo 0 >events/enable && \
                   grep -cE '^ *(tokio|tether).* sys_(fsync|fdatasync|sync|syncfs)\\(' trace || true";
    host.run(command).await.unwrap().trim().parse().unwrap()
}

/// Rule 6 has its price: each write of a journal file syncs the file and its folder, and nothing else of an export and an attach
/// is synced.
#[tokio::test]
#[ignore = "lab"]
async fn the_journal_costs_two_syncs_a_write_and_nothing_else_is_synced() {
    let fixture = Fixture::new().await;
    let (storage, compute) = (&fixture.lab.storage, &fixture.lab.compute);
    fixture.volume("thick/synced").await;
    let written = |steps: &[String]| {
        steps.iter().filter(|step| step.ends_with("-journal") || *step == "write-plan").count()
    };
    count_syncs(storage, "tether-storage-agent").await;
    let id = new_id();
    let exported = export_rpc(&fixture, &id, "thick/synced").await.unwrap();
    let (steps, counted) = (names(exported.report.as_ref()), syncs(storage).await);
    assert_eq!((written(&steps), counted), (2, 4), "{steps:?}");
    count_syncs(compute, "tether-compute-agent").await;
    let attached = attach_with(&fixture, &id, "c2", exported.connection_info.unwrap()).await.unwrap();
    let (steps, counted) = (names(attached.report.as_ref()), syncs(compute).await);
    assert_eq!((written(&steps), counted), (3, 6), "{steps:?}");
}

/// Left out of a run for its time, not for what it shows: `tests/run long`.
mod long {
    use super::*;

    /// F35: exports made and removed all at once, while somebody else makes and removes backstores and targets, too: none fails, each
    /// has its own target with its own backstore, and what is theirs is as they left it.
    #[tokio::test]
    #[ignore = "lab"]
    async fn f34_f35_exports_at_once_beside_somebody_elses_do_not_get_into_each_others_way() {
        let fixture = Arc::new(Fixture::new().await);
        let storage = &fixture.lab.storage;
        make_volumes(storage, "many", 16).await;
        let theirs = "systemd-run -q --unit=theirs bash -c 'cd /sys/kernel/config/target; while :; do for n in 0 1 2; do \
                      mkdir -p core/iblock_$n/theirs iscsi/iqn.2020-01.com.example:theirs-$n/tpgt_1; done; for n in 0 1 2; do \
                      rmdir core/iblock_$n/theirs core/iblock_$n iscsi/iqn.2020-01.com.example:theirs-$n/tpgt_1 \
                      iscsi/iqn.2020-01.com.example:theirs-$n; echo >>/run/theirs; done; done'";
        storage.run(theirs).await.unwrap();
        let mut exporting = JoinSet::new();
        for number in 0..16 {
            let fixture = fixture.clone();
            exporting.spawn(async move { export(&fixture, &format!("thin/many-{number}")).await.0 });
        }
        let ids = exporting.join_all().await;
        let backstores = format!(
            "cd /sys/kernel/config/target; for t in iscsi/{IQN_PREFIX}*; do [ $(cat $t/tpgt_1/enable) = 1 ] && \
             cat $t/tpgt_1/lun/lun_0/backstore/udev_path; done | sort -u | wc -l"
        );
        assert_eq!(storage.run(&backstores).await.unwrap().trim(), "16");
        let mut unexporting = JoinSet::new();
        for id in ids {
            let fixture = fixture.clone();
            unexporting.spawn(async move { unexport(&fixture, &id).await });
        }
        unexporting.join_all().await;
        storage
            .run("systemctl stop theirs; ! systemctl -q is-failed theirs && [ $(wc -l </run/theirs) -gt 10 ]")
            .await
            .unwrap();
        fixture.assert_nothing_left("after the last").await;
    }

    /// F36: the work of an export does not grow with how many there are: the agent makes as many system calls on files.
    #[tokio::test]
    #[ignore = "lab"]
    async fn f36_an_export_costs_the_same_work_beside_twenty_others() {
        let fixture = Fixture::new().await;
        fixture.create("thin/one", "4M", &[]).await;
        work_of_an_export(&fixture, "thin/one").await; // the first one makes ready what the kernel needs
        let (alone, calls_alone) = work_of_an_export(&fixture, "thin/one").await;
        make_volumes(&fixture.lab.storage, "other", 20).await;
        for number in 0..20 {
            export(&fixture, &format!("thin/other-{number}")).await;
        }
        let (among, calls_among) = work_of_an_export(&fixture, "thin/one").await;
        println!("{alone} calls alone, {among} among twenty others");
        assert!(alone > 50, "the calls are counted: {calls_alone}");
        assert!(among <= alone + alone / 20, "alone:\n{calls_alone}\namong others:\n{calls_among}");
    }
}
