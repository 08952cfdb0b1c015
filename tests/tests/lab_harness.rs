//! The lab itself: that it comes up, goes back to a saved state, and leaves nothing behind. Tier `lab`.

use std::time::{Duration, Instant};

use tether_tests::instance::Instance;
use tether_tests::qemu::MACHINES;
use tether_tests::{Agents, HostSetup, Lab, Options, State};

const OWNED: Options = Options { fresh: true, owned: true };

#[tokio::test]
#[ignore = "lab: boots two emulated hosts"]
async fn a_restored_lab_works_and_a_dropped_one_leaves_nothing_behind() {
    let name = "harness";
    let lab = Lab::up(name, OWNED).await.unwrap();
    let instance = Instance::open(name).unwrap();

    let file = |host: &str| HostSetup {
        packages: Vec::new(),
        files: vec![("/opt/lab test/name".into(), 0o640, host.into())],
        commands: vec!["systemd-run --quiet --unit=installed sleep infinity".into()],
    };
    let agents = Agents { storage: file("storage"), compute: file("compute") };
    lab.install(&agents).await.unwrap();
    lab.storage.run("rm '/opt/lab test/name'; lvcreate -qy -L 16m -n scratch tether").await.unwrap();

    let began = Instant::now();
    lab.restore(&State::Ready).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(20), "a restore takes seconds");
    for host in [&lab.storage, &lab.compute] {
        let state = host
            .run("stat -c %a '/opt/lab test/name'; cat '/opt/lab test/name'; systemctl is-active installed");
        assert_eq!(state.await.unwrap(), format!("640\n{}active\n", host.name));
        let clock: f64 = host.run("date +%s.%N").await.unwrap().trim().parse().unwrap();
        let here = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
        assert!((clock - here).abs() < 5.0, "{}: clock {clock}, here {here}", host.name);
    }
    let volumes = lab.storage.run("lvs --noheadings -o lv_name tether").await.unwrap();
    assert!(!volumes.contains("scratch"), "what came after the state is gone: {volumes}");
    lab.compute.run("ping -q -c 1 -W 5 storage && ping -q -6 -c 1 -W 5 fd99::1").await.unwrap();
    for guest in ["c2", "c3"] {
        assert!(lab.guest(guest).unwrap().disks().await.unwrap().is_empty());
    }
    let error = lab.compute.run("echo why >&2; exit 3").await.unwrap_err().to_string();
    assert!(error.contains("exit code 3") && error.contains("why"), "{error}");

    let pids: Vec<_> = MACHINES.iter().map(|m| m.pid(&instance).unwrap()).collect();
    drop(lab);
    for pid in pids {
        let gone = || std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default().is_empty();
        let began = Instant::now();
        while !gone() {
            assert!(began.elapsed() < Duration::from_secs(5), "process {pid} is still there");
            tokio::task::yield_now().await;
        }
    }
    assert!(!instance.runtime.exists() && !instance.disks.exists());
}
