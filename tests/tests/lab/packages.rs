//! The Debian packages on real hosts: install, upgrade, remove, purge, and the units in them. Every other lab test has its agents
//! from the same packages. Not here: what needs no host (tests/packages.rs).

use std::time::Duration;

use tether_tests::Host;
use tether_tests::agents::PACKAGES;

use crate::reboots::{PIECE, Writer, wanted};
use crate::share::mounts;
use crate::{Fixture, left_on_compute, left_on_storage, text};

/// dpkg under emulation.
const DPKG: Duration = Duration::from_secs(180);

fn hosts(fixture: &Fixture) -> [&Host; 2] {
    [&fixture.lab.storage, &fixture.lab.compute]
}

fn agent(host: &Host) -> String {
    format!("tether-{}-agent", host.name)
}

async fn main_pid(host: &Host) -> String {
    host.run(&format!("systemctl show -P MainPID {}", agent(host))).await.unwrap().trim().to_owned()
}

/// Both units, as installed and with all that is merged into them, are sound and as tight as promised; what the storage agent
/// sees is a namespace of its own, and what the compute agent sees is the host's.
#[tokio::test]
#[ignore = "lab"]
async fn the_installed_units_are_sound_and_tight() {
    let fixture = Fixture::new().await;
    for (host, tenths) in hosts(&fixture).into_iter().zip([30, 40]) {
        let agent = agent(host);
        let verify = format!("systemd-analyze verify --man=no {agent}.service 2>&1 | grep -i tether; true");
        assert_eq!(host.run(&verify).await.unwrap(), "", "{agent}");
        let security =
            format!("systemd-analyze security --no-pager --threshold={tenths} {agent}.service | tail -n 1");
        let security = host.run(&format!("set -o pipefail; {security}")).await.unwrap();
        assert!(security.contains("exposure level"), "{security}");
        let namespaces =
            format!("readlink /proc/1/ns/mnt /proc/{}/ns/mnt | uniq | wc -l", main_pid(host).await);
        let namespaces = host.run(&namespaces).await.unwrap();
        assert_eq!(namespaces.trim() == "1", host.name == "compute", "{agent}: {namespaces}");
    }
}

/// The file name of the agent's package on a host.
async fn package(host: &Host) -> String {
    host.run(&format!("ls {PACKAGES}/{}_*.deb", agent(host))).await.unwrap().trim().to_owned()
}

/// When the host goes down, a share is unmounted after libvirtd has ended.
#[tokio::test]
#[ignore = "lab"]
async fn a_mount_outlives_libvirtd() {
    let fixture = Fixture::new().await;
    fixture.volume("share/ordered").await;
    let id = text(&fixture.attach(&["share/ordered", "c2"]).await, "/attachment_id").to_owned();
    let mounted = mounts(&fixture).await;
    let directory =
        mounted.split(' ').find(|word| word.starts_with("/var/lib/tether")).expect("a mount").to_owned();
    let before = format!("systemctl show -P Before \"$(systemd-escape --path --suffix=mount {directory})\"");
    let before = fixture.lab.compute.run(&before).await.unwrap();
    assert!(before.contains("libvirtd.service"), "{before}");
    fixture.detach(&id).await;
    fixture.assert_nothing_left("after the detach").await;
}

/// Left out of a run for its time, not for what it shows: `tests/run long`.
mod long {
    use super::*;

    /// Both packages are upgraded while two guests write, one over each transport: agents are new, sessions and mounts are the same,
    /// and the guests notice nothing.
    #[tokio::test]
    #[ignore = "lab"]
    async fn guests_do_not_notice_an_upgrade() {
        let fixture = Fixture::new().await;
        let (storage, compute) = (&fixture.lab.storage, &fixture.lab.compute);
        for host in [storage, compute] {
            let newer = format!(
                "cd /var/tmp && rm -rf new new.deb && dpkg-deb -R {} new && sed -i 's/^Version: .*/&.1/' new/DEBIAN/control && \
                 dpkg-deb -Znone -b new new.deb >/dev/null",
                package(host).await
            );
            host.run_within(&newer, DPKG).await.unwrap();
        }
        let mut attached = Vec::new();
        for (volume, guest, path) in [
            ("thick/upgrade", "c2", "/dev/tether/upgrade"),
            ("share/upgrade", "c3", "/srv/share/upgrade.raw"),
        ] {
            let serial = text(&fixture.create(volume, "64M", &[]).await, "/serial").to_owned();
            let id = text(&fixture.attach(&[volume, guest]).await, "/attachment_id").to_owned();
            let disk = fixture.sees(guest, &serial).await;
            let guest = fixture.lab.guest(guest).unwrap();
            let mut writer = Writer::start(guest.clone(), disk.clone());
            writer.more(2).await;
            attached.push((id, guest, disk, path, writer));
        }
        let connected = "ls -i /sys/class/iscsi_session; cat /sys/class/iscsi_session/*/targetname";
        let (sessions, mounted) = (compute.run(connected).await.unwrap(), mounts(&fixture).await);
        assert!(!sessions.is_empty() && !mounted.is_empty());

        for host in [storage, compute] {
            let (agent, before) = (agent(host), main_pid(host).await);
            let upgrade = format!(
                "dpkg -i /var/tmp/new.deb 2>&1 && \
                 dpkg-query -W -f '${{Version}}' {agent} && systemctl is-active {agent}"
            );
            let said = host.run_within(&upgrade, DPKG).await.unwrap();
            assert!(said.trim_end().ends_with("-1.1active"), "{said}");
            assert_ne!(main_pid(host).await, before, "{agent} was restarted");
            let config = host.run(&format!("cat /etc/tether/{}-agent.toml", host.name)).await.unwrap();
            assert!(config.contains("/etc/tether/pki/"), "the config is the operator's: {config}");
        }
        assert_eq!(compute.run(connected).await.unwrap(), sessions);
        assert_eq!(mounts(&fixture).await, mounted);
        for (id, guest, disk, path, mut writer) in attached {
            writer.more(2).await;
            let pieces = writer.finish().await;
            let (sum, bytes) = (wanted(&fixture, pieces).await, pieces * PIECE);
            assert_eq!(guest.checksum(&disk, bytes).await.unwrap(), sum, "in the guest {}", guest.name);
            fixture.detach(&id).await;
            assert_eq!(crate::checksum_of(storage, path, 0, bytes).await, sum, "{path}");
        }
        fixture.assert_nothing_left("after the detaches").await;
    }

    /// Removal is refused while there is an attachment, and its disk stays; so does the agent. Once it is detached, both packages can
    /// be purged, and nothing of them is left. A new install starts no agent before somebody has edited its config.
    #[tokio::test]
    #[ignore = "lab"]
    async fn what_is_in_use_stays_and_a_purge_leaves_nothing() {
        let fixture = Fixture::new().await;
        let serial = text(&fixture.volume("thick/used").await, "/serial").to_owned();
        let id = text(&fixture.attach(&["thick/used", "c2"]).await, "/attachment_id").to_owned();
        for host in hosts(&fixture) {
            let agent = agent(host);
            let refused = host.try_run(&format!("dpkg -r {agent}")).await.unwrap();
            assert_eq!(refused.exit_code, Some(1), "{refused:?}");
            assert!(
                refused.stderr.contains(&id) && refused.stderr.contains("tether detach ID"),
                "{refused:?}"
            );
            // dpkg remembers that somebody wanted it gone (the first word), and removes nothing.
            let state =
                format!("systemctl is-active {agent}; dpkg-query -W -f '${{db:Status-Status}}' {agent}");
            assert_eq!(host.run(&state).await.unwrap(), "active\ninstalled");
        }
        fixture.sees("c2", &serial).await;
        fixture.detach(&id).await;

        for host in hosts(&fixture) {
            let agent = agent(host);
            let (unit, name) = (format!("/etc/systemd/system/{agent}.service.d"), &host.name);
            let package = package(host).await;
            // What the lab itself put there, and the certificates, which are the operator's.
            host.run(&format!("rm -r {unit}")).await.unwrap();
            host.run_within(
                &format!("dpkg -P {agent} tether && rm -r /etc/tether/pki && rmdir /etc/tether"),
                DPKG,
            )
            .await
            .unwrap();
            let left = host
            .run(
                "ls -d /etc/tether /var/lib/tether /run/tether /usr/bin/tether* /etc/systemd/system/*/tether* \
                 /usr/lib/*/tether* /usr/lib/systemd/system/*tether* /usr/share/*/*/*tether* 2>/dev/null; \
                 systemctl list-units --all --no-legend --plain 'tether*'; pgrep -l tether; true",
            )
            .await
            .unwrap();
            assert_eq!(left, "", "on {name}");
            let left = if name == "storage" {
                left_on_storage(&fixture.lab).await
            } else {
                left_on_compute(&fixture.lab).await
            };
            assert_eq!(left, "");

            let said = host.run_within(&format!("dpkg -i {package} 2>&1"), DPKG).await.unwrap();
            assert!(
                said.contains(&format!("{agent} --check-config && systemctl enable --now {agent}")),
                "{said}"
            );
            let state = host
                .try_run(&format!("systemctl is-active {agent}; systemctl is-enabled {agent}"))
                .await
                .unwrap();
            assert_eq!(state.stdout, "inactive\ndisabled\n");
            let check = host.try_run(&format!("{agent} --check-config")).await.unwrap();
            assert_eq!(check.exit_code, Some(64), "{check:?}");
            assert!(check.stderr.contains("/etc/tether/pki/"), "{check:?}");
            // And one that is started all the same is not tried again and again.
            assert_ne!(host.try_run(&format!("systemctl start {agent}")).await.unwrap().exit_code, Some(0));
            let state = host.run(&format!("systemctl show -P NRestarts -P Result {agent}")).await.unwrap();
            assert!(state.contains("exit-code") && state.contains('0'), "{state}");
        }
    }

    /// An agent whose runtime stands still is ended and started anew by the watchdog.
    #[tokio::test]
    #[ignore = "lab"]
    async fn the_watchdog_starts_an_agent_anew_that_does_nothing() {
        let fixture = Fixture::new().await;
        for host in hosts(&fixture) {
            let agent = agent(host);
            let limit = "[Service]\nWatchdogSec=6\n";
            let path = format!("/etc/systemd/system/{agent}.service.d/watchdog.conf");
            host.put(limit, &path, 0o644).await.unwrap();
            host.run(&format!("systemctl daemon-reload && systemctl restart {agent}")).await.unwrap();
            let before = main_pid(host).await;
            // One that works is left alone for several limits.
            let alone = format!("timeout 20 tail --pid={before} -f /dev/null; [ $? = 124 ]");
            host.run(&alone).await.unwrap();
            let anew = format!(
                "kill -STOP {before} && timeout 50 sh -c 'until now=$(systemctl show -P MainPID {agent}); \
             [ $now != 0 ] && [ $now != {before} ] && systemctl -q is-active {agent}; do sleep 0.2; done'"
            );
            host.run(&anew).await.unwrap();
            let log = host
                .run(&format!("journalctl -u {agent} -o cat | grep -c 'Watchdog timeout'"))
                .await
                .unwrap();
            assert_eq!(log.trim(), "1");
        }
    }
}
