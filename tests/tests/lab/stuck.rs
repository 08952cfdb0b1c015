//! What hangs, in the kernel or in a program that must not be killed: its own attachment is told so in time, everything else
//! goes on, and it is ended once it hangs no more (rule 9, F27, F32). Not here: mounts that hang (`nfs_mounts`, `nfs_lost`).

use std::time::{Duration, Instant};

use tether_proto::wire;
use tether_tests::tether::SHARE;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::crash::get_export;
use crate::share::attachment;
use crate::surface::metrics;
use crate::{Fixture, SEEN, leftovers, new_id, reason, text, unexport_by_force};

/// What waits for the kernel is told within this, and what waits for iscsiadm, too.
const TOLD: Duration = Duration::from_secs(75);

/// F27: a target whose removal hangs in the kernel, for a command of its initiator never ends: the LV is suspended. That
/// export is `STUCK`; volumes are made, exported and attached beside it; and once the LV answers, the same call removes it.
#[tokio::test]
#[ignore = "lab"]
async fn f27_a_removal_that_hangs_in_the_kernel_is_told_and_holds_up_no_other_export() {
    let fixture = Fixture::new().await;
    let storage = &fixture.lab.storage;
    let serial = text(&fixture.volume("thick/hangs").await, "/serial").to_owned();
    fixture.volume("thick/beside").await;
    let id = text(&fixture.attach(&["thick/hangs", "c2"]).await, "/attachment_id").to_owned();
    let disk = fixture.sees("c2", &serial).await;
    storage.run("dmsetup suspend --noflush --nolockfs tether-hangs").await.unwrap();
    // The guest's write reaches the target and does not come back.
    let guest = fixture.lab.guest("c2").unwrap();
    let writing = tokio::spawn(async move { guest.write(&disk, "hangs", 64 << 10).await });
    let device = attachment(&fixture, &id).await.device_path;
    let on_its_way = format!(
        "disk=$(basename $(readlink -f {device})); for i in $(seq 200); do read -r reads writes \
         </sys/block/$disk/inflight; [ $writes = 0 ] || exit 0; sleep 0.1; done; exit 1"
    );
    fixture.lab.compute.run(&on_its_way).await.expect("the write is on its way");
    let unexporting = async {
        let began = Instant::now();
        let stuck = unexport_by_force(&fixture, &id).await.expect_err("the kernel does not let go");
        (stuck, began.elapsed())
    };
    let beside = async {
        let began = Instant::now();
        fixture.volume("thick/new").await;
        let beside = text(&fixture.attach(&["thick/beside", "c3"]).await, "/attachment_id").to_owned();
        fixture.detach(&beside).await;
        began.elapsed()
    };
    let ((stuck, took), quick) = tokio::join!(unexporting, beside);
    let (word, step, next) = reason(&stuck);
    assert_eq!((word.as_str(), step.as_str()), ("STUCK", "fence-target"), "{stuck:?}");
    assert!(
        next.contains("journalctl -k") && took < TOLD && quick < took,
        "{took:?} beside {quick:?}: {stuck:?}"
    );
    // It is told by health, by systemd and as a number; and what is asked of it is answered without the kernel.
    let began = Instant::now();
    assert_eq!(get_export(&fixture, &id).await.unwrap().phase, "unexporting");
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    assert_eq!(kernel_health(&fixture).await, ServingStatus::NotServing);
    let status = storage.run("systemctl show -P StatusText tether-storage-agent").await.unwrap();
    assert!(status.contains(&id) && status.contains("fence-target"), "{status}");
    assert!(metrics(storage, 7441).await.contains("tether_stuck_keys{} 1.0"), "as a number");

    storage.run("dmsetup resume tether-hangs").await.unwrap();
    let removed = unexport_by_force(&fixture, &id).await.expect("the same call");
    assert_eq!(removed.report.unwrap().outcome(), wire::Outcome::Removed);
    writing.abort();
    assert_eq!(crate::left_on_storage(&fixture.lab).await, "", "once the kernel let go");
    assert_eq!(kernel_health(&fixture).await, ServingStatus::Serving);
}

/// What the storage agent's health says of the kernel.
async fn kernel_health(fixture: &Fixture) -> ServingStatus {
    let channels = fixture.tether.channels().await.unwrap();
    let (_, channel) =
        channels.into_iter().find(|(service, _)| *service == "StorageAgent").expect("a channel");
    let request = HealthCheckRequest { service: "kernel".to_owned() };
    HealthClient::new(channel).check(request).await.unwrap().into_inner().status()
}

/// Left out of a run for its time, not for what it shows: `tests/run long`.
mod long {
    use super::*;

    /// F27: a file system that lets nobody write. The file that is being made is `STUCK` until the kernel answers, other pools go
    /// on, and then the same call makes it.
    #[tokio::test]
    #[ignore = "lab"]
    async fn f27_a_file_system_that_hangs_is_told_and_holds_up_no_other_pool() {
        let fixture = Fixture::new().await;
        let storage = &fixture.lab.storage;
        storage.run(&format!("fsfreeze --freeze {SHARE}")).await.unwrap();
        let create = ["volume", "create", "share/hangs", "16M"];
        let hanging = async {
            let began = Instant::now();
            (fixture.tether.error(&create).await.unwrap(), began.elapsed())
        };
        let beside = async {
            let began = Instant::now();
            fixture.volume("thick/beside").await;
            began.elapsed()
        };
        let (((_, error), took), quick) = tokio::join!(hanging, beside);
        assert_eq!((text(&error, "/reason"), text(&error, "/step")), ("STUCK", "create-file"), "{error:#}");
        assert!(took < TOLD && quick < took, "{took:?} beside {quick:?}");
        let began = Instant::now();
        let (_, error) = fixture.tether.error(&create).await.unwrap();
        assert_eq!(text(&error, "/reason"), "STUCK", "{error:#}");
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
        assert_eq!(kernel_health(&fixture).await, ServingStatus::NotServing);

        let thaw = format!("fsfreeze --unfreeze {SHARE} && sync -f {SHARE}");
        storage.run(&thaw).await.unwrap();
        fixture.volume("share/hangs").await;
        assert_eq!(kernel_health(&fixture).await, ServingStatus::Serving);
        let files = storage.run(&format!("ls -A {SHARE}")).await.unwrap();
        fixture.tether.json(&["volume", "delete", "share/hangs"]).await.unwrap();
        assert_eq!(files.matches("hangs").count(), 1, "{files}");
    }

    /// F27: a program of LVM that hangs and must not be killed. Its volume is `STUCK` until it ends, no second one is started beside
    /// it, and other volumes go on.
    #[tokio::test]
    #[ignore = "lab"]
    async fn f27_a_program_of_lvm_that_hangs_is_told_and_not_started_again() {
        let fixture = Fixture::new().await;
        let storage = &fixture.lab.storage;
        fixture.volume("thick/hangs").await;
        let script = "#!/bin/bash\ncase \"$*\" in *tether/hangs*) echo $$ >>/run/hanging; \
                      until [ -e /run/mended ]; do sleep 0.2; done ;; esac\nexec -a lvremove /usr/sbin/lvm \"$@\"\n";
        storage.run("rm /usr/sbin/lvremove").await.unwrap();
        storage.put(script, "/usr/sbin/lvremove", 0o755).await.unwrap();
        let delete = ["volume", "delete", "thick/hangs"];
        let hanging = async {
            let began = Instant::now();
            (fixture.tether.error(&delete).await.unwrap(), began.elapsed())
        };
        let beside = async {
            fixture.volume("thick/beside").await;
            fixture.tether.json(&["volume", "delete", "thick/beside"]).await.unwrap();
        };
        let (((_, error), took), ()) = tokio::join!(hanging, beside);
        assert_eq!((text(&error, "/reason"), text(&error, "/step")), ("STUCK", "remove-volume"), "{error:#}");
        assert!(took < TOLD, "{took:?}");
        let (_, error) = fixture.tether.error(&delete).await.unwrap();
        assert_eq!(text(&error, "/reason"), "STUCK", "{error:#}");
        let pids = storage.run("cat /run/hanging").await.unwrap();
        assert_eq!(pids.lines().count(), 1, "started once: {pids}");
        assert!(text(&error, "/message").contains(pids.trim()), "{error:#}");
        assert_eq!(kernel_health(&fixture).await, ServingStatus::NotServing);

        let ended = format!(
            "touch /run/mended; for i in $(seq 100); do [ -d /proc/{} ] || exit 0; sleep 0.1; done; exit 1",
            pids.trim()
        );
        storage.run(&ended).await.expect("it goes on once it can");
        fixture.tether.json(&delete).await.unwrap();
        assert_eq!(
            storage.run("lvs --noheadings -o lv_name -S lv_name=hangs tether").await.unwrap().trim(),
            ""
        );
        assert_eq!(kernel_health(&fixture).await, ServingStatus::Serving);
    }

    /// F32: a login that hangs, as open-iscsi 2.1.10 does it: it is told in time, an attach beside it is not held up, iscsiadm is
    /// not killed, and once it has ended the detach takes away what it made.
    #[tokio::test]
    #[ignore = "lab"]
    async fn f32_a_login_that_hangs_is_told_in_time_and_holds_up_no_other_attach() {
        let fixture = Fixture::new().await;
        let compute = &fixture.lab.compute;
        fixture.volume("thick/hangs").await;
        let serial = text(&fixture.volume("thick/beside").await, "/serial").to_owned();
        let id = new_id();
        let script = format!(
            "#!/bin/bash\ncase \"$*\" in *{id}*--login*) echo $$ >/run/hanging; \
         until [ -e /run/mended ]; do sleep 0.2; done ;; esac\nexec /usr/sbin/iscsiadm.real \"$@\"\n"
        );
        compute.run("mv /usr/sbin/iscsiadm /usr/sbin/iscsiadm.real").await.unwrap();
        compute.put(script, "/usr/sbin/iscsiadm", 0o755).await.unwrap();
        let hanging = async {
            let began = Instant::now();
            let told = fixture.tether.error(&["attach", "thick/hangs", "c2", "--id", &id]).await.unwrap();
            (told, began.elapsed())
        };
        let beside = async {
            let began = Instant::now();
            let beside = text(&fixture.attach(&["thick/beside", "c3"]).await, "/attachment_id").to_owned();
            fixture.sees("c3", &serial).await;
            fixture.detach(&beside).await;
            began.elapsed()
        };
        let (((_, error), took), quick) = tokio::join!(hanging, beside);
        assert_eq!(
            (text(&error, "/reason"), text(&error, "/step")),
            ("OUTCOME_UNKNOWN", "login"),
            "{error:#}"
        );
        assert!(took < TOLD && quick < took, "{took:?} beside {quick:?}");
        compute.run("kill -0 $(cat /run/hanging)").await.expect("iscsiadm was not killed (F24)");

        let logged_in = format!(
            "touch /run/mended; for i in $(seq 300); do grep -qs {id} /sys/class/iscsi_session/*/targetname && \
         ! kill -0 $(cat /run/hanging) 2>/dev/null && exit 0; sleep 0.1; done; exit 1"
        );
        compute.run(&logged_in).await.expect("the login ends late, and there is a session");
        assert!(leftovers(&fixture.lab).await.contains(&id));
        fixture.tether.json(&["detach", &id]).await.expect("a detach ends it");
        fixture.lab.compute.run("mv -f /usr/sbin/iscsiadm.real /usr/sbin/iscsiadm").await.unwrap();
        fixture.assert_nothing_left("after the detach").await;
        // And the volume is free.
        fixture.attach(&["thick/hangs", "c2"]).await;
        fixture.lab.guest("c2").unwrap().wait_up(SEEN).await.unwrap();
    }
}
