//! Guests that do not let go, and domains that change under us (rule 10, F17, F18, F29, F30).

use std::time::{Duration, Instant};

use crate::{Fixture, SEEN, text};

/// F18, F29: a guest without an OS never acknowledges. The storage stays connected, both definitions keep the disk, also
/// after a second call, and once the domain is off all goes.
#[tokio::test]
#[ignore = "lab"]
async fn f18_f29_a_guest_that_never_lets_go_is_told_and_the_storage_stays_connected() {
    let fixture = Fixture::new().await;
    fixture.volume("thick/held").await;
    let id = text(&fixture.attach(&["thick/held", "empty"]).await, "/attachment_id").to_owned();
    for _ in 0..2 {
        let began = Instant::now();
        let (code, error) = fixture.tether.error(&["detach", &id, "--guest-timeout", "7"]).await.unwrap();
        assert_eq!(text(&error, "/reason"), "GUEST_HOLDS_DEVICE", "{error:#}");
        assert_eq!((text(&error, "/step"), code), ("unplug", 6), "{error:#}");
        assert!(text(&error, "/next").contains("unmount"), "{error:#}");
        assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
        let shown = fixture.tether.json(&["show", &id]).await.unwrap();
        let attachment = &shown["attachment"];
        for fact in ["connected", "in_live_domain", "in_persistent_definition"] {
            assert_eq!(attachment[fact], true, "{fact}: {shown:#}");
        }
        assert_eq!(text(attachment, "/phase"), "detaching");
        assert_eq!(shown["export"]["connected"], true, "{shown:#}");
    }
    // What was being detached cannot be attached again under the same id.
    let (_, error) = fixture.tether.error(&["attach", "thick/held", "empty", "--id", &id]).await.unwrap();
    assert_eq!(text(&error, "/reason"), "ATTACHMENT_ENDED", "{error:#}");
    fixture.lab.compute.run("virsh -q destroy empty").await.unwrap();
    fixture.tether.json(&["detach", &id]).await.unwrap();
    fixture.assert_nothing_left("after the domain is off").await;
}

/// F30: a guest that does not run is asked to let go, twice. The second call waits and does not take the first one back: as
/// soon as the guest runs it lets go, with nobody asking again.
#[tokio::test]
#[ignore = "lab"]
async fn f30_a_second_detach_does_not_cancel_the_first_unplug() {
    let fixture = Fixture::new().await;
    let serial = text(&fixture.volume("thick/twice").await, "/serial").to_owned();
    let id = text(&fixture.attach(&["thick/twice", "c2"]).await, "/attachment_id").to_owned();
    fixture.sees("c2", &serial).await;
    fixture.lab.compute.run("virsh -q suspend c2").await.unwrap();
    for _ in 0..2 {
        let (_, error) = fixture.tether.error(&["detach", &id, "--guest-timeout", "7"]).await.unwrap();
        assert_eq!(
            (text(&error, "/reason"), text(&error, "/step")),
            ("GUEST_HOLDS_DEVICE", "unplug"),
            "{error:#}"
        );
    }
    fixture.lab.compute.run("virsh -q resume c2").await.unwrap();
    fixture.lab.guest("c2").unwrap().wait_gone(&serial, SEEN).await.expect("it was asked already");
    fixture.detach(&id).await;
    fixture.assert_nothing_left("after the detach").await;
}

/// F39: a domain without room is told how many slots it has and what to add, before anything is touched.
#[tokio::test]
#[ignore = "lab"]
async fn f39_a_full_domain_is_told_what_to_add_before_anything_is_touched() {
    let fixture = Fixture::new().await;
    crate::make_volumes(&fixture.lab.storage, "many", 10).await;
    let mut ids = Vec::new();
    let refused = loop {
        let volume = format!("thin/many-{}", ids.len());
        let arguments = ["attach", &volume, "empty"];
        let output = fixture.tether.output(&arguments).await.unwrap();
        let answer: serde_json::Value = serde_json::from_str(&output.stdout).unwrap();
        if output.exit_code != Some(0) {
            assert_eq!(output.exit_code, Some(8), "{answer:#}");
            break answer["error"].clone();
        }
        ids.push(text(&answer, "/attachment_id").to_owned());
        assert!(ids.len() < 10, "the domain has 6 ports");
    };
    assert!(!ids.is_empty());
    assert_eq!(
        (text(&refused, "/reason"), text(&refused, "/step")),
        ("NO_FREE_SLOT", "validate"),
        "{refused:#}"
    );
    assert!(text(&refused, "/message").contains("pcie-root-port"), "{refused:#}");
    let sessions = fixture.lab.compute.run("ls /sys/class/iscsi_session | wc -l").await.unwrap();
    assert_eq!(sessions.trim(), ids.len().to_string());
    fixture.lab.compute.run("virsh -q destroy empty").await.unwrap();
    for id in &ids {
        fixture.tether.json(&["detach", id]).await.unwrap();
    }
    fixture.assert_nothing_left("after all").await;
}

/// Left out of a run for its time, not for what it shows: `tests/run long`.
mod long {
    use serde_json::Value;
    use tether_tests::Disk;

    use super::*;

    /// F17: the export went first. The session is a zombie, and the detach still takes everything away.
    #[tokio::test]
    #[ignore = "lab"]
    async fn f17_an_export_that_went_first_still_detaches_cleanly() {
        let fixture = Fixture::new().await;
        fixture.volume("thick/first").await;
        let id =
            text(&fixture.attach(&["thick/first", "c2", "--bus", "scsi"]).await, "/attachment_id").to_owned();
        crate::unexport_by_force(&fixture, &id).await.expect("the export is removed");
        let began = Instant::now();
        fixture.tether.json(&["detach", &id]).await.unwrap();
        assert!(began.elapsed() < Duration::from_secs(60), "{:?}", began.elapsed());
        fixture.assert_nothing_left("after the detach").await;
    }

    /// Runs `cut` on the compute host under an attached disk. The detach is refused, and the disk stays; after `mend` the guest
    /// writes, and the same call goes on. Gives the refusal.
    async fn stays_while_cut_off(fixture: &Fixture, id: &str, disk: &Disk, cut: &str, mend: &str) -> Value {
        let compute = &fixture.lab.compute;
        compute.run(cut).await.unwrap();
        // open-iscsi notices by its pings: every 5 s, and 5 s until one counts as lost.
        let lost = "until grep -qv LOGGED_IN /sys/class/iscsi_session/*/state; do sleep 0.2; done";
        compute.run(lost).await.unwrap();
        let (code, error) = fixture.tether.error(&["detach", id]).await.unwrap();
        assert_eq!(
            (text(&error, "/reason"), text(&error, "/step"), code),
            ("PORTAL_UNREACHABLE", "end-lost-session", 5),
            "{error:#}"
        );
        assert!(text(&error, "/next").contains("bring the storage host back"), "{error:#}");
        assert!(fixture.xml("c2", "").await.contains(id), "the guest still has the disk");
        compute.run(mend).await.unwrap();
        let back = "until grep -q LOGGED_IN /sys/class/iscsi_session/*/state; do sleep 0.2; done";
        compute.run(back).await.unwrap();
        fixture.lab.guest("c2").unwrap().write(disk, "back", 1 << 20).await.unwrap();
        fixture.tether.json(&["detach", id]).await.unwrap();
        fixture.assert_nothing_left("after the detach").await;
        error
    }

    /// The storage host is out of reach: nobody knows what became of the guest's last writes, so nothing is taken away. When
    /// it is back, the same call goes on.
    #[tokio::test]
    #[ignore = "lab"]
    async fn a_storage_host_that_is_away_keeps_the_disk_until_it_is_back() {
        let fixture = Fixture::new().await;
        let serial = text(&fixture.volume("thick/away").await, "/serial").to_owned();
        let id = text(&fixture.attach(&["thick/away", "c2"]).await, "/attachment_id").to_owned();
        let disk = fixture.sees("c2", &serial).await;
        let lan = fixture.lab.compute.run("ip -o addr show to 10.99.0.2 | awk '{print $2}'").await.unwrap();
        let link = |state: &str| format!("ip link set {} {state}", lan.trim());
        stays_while_cut_off(&fixture, &id, &disk, &link("down"), &link("up")).await;
    }

    /// The way to the session's portal is cut, and the storage host answers at another. open-iscsi tries the session's own alone,
    /// so the disk stays: its target is not gone.
    #[tokio::test]
    #[ignore = "lab"]
    async fn a_portal_that_is_out_of_reach_beside_one_that_answers_keeps_the_disk() {
        let fixture = Fixture::new().await;
        let serial = text(&fixture.volume("thick/path").await, "/serial").to_owned();
        let id = text(&fixture.attach(&["thick/path", "c2"]).await, "/attachment_id").to_owned();
        let disk = fixture.sees("c2", &serial).await;
        let portal =
            text(&fixture.tether.json(&["show", &id]).await.unwrap(), "/attachment/portal").to_owned();
        let address = portal.rsplit_once(':').unwrap().0.trim_matches(['[', ']']).to_owned();
        let neighbour = |what: &str| {
            format!(
                "ip neigh replace {address} {what} dev $(ip -o route get {address} | grep -o 'dev [^ ]*' | cut -d' ' -f2)"
            )
        };
        let mac = format!("ip neigh show {address} | grep -o 'lladdr [^ ]*' | head -n 1");
        let mac = fixture.lab.compute.run(&mac).await.unwrap();
        let cut = neighbour("lladdr 02:00:00:00:00:77 nud permanent");
        let mend = neighbour(&format!("{} nud reachable", mac.trim()));
        let error = stays_while_cut_off(&fixture, &id, &disk, &cut, &mend).await;
        assert!(text(&error, "/message").contains(&portal), "{error:#}");
    }

    /// F15: iscsiadm says that it finds no session to end, as it does with exit code 21, and the session is there. That is no success:
    /// what counts is what the kernel has.
    #[tokio::test]
    #[ignore = "lab"]
    async fn f15_a_session_that_iscsiadm_does_not_find_is_not_taken_for_ended() {
        let fixture = Fixture::new().await;
        let compute = &fixture.lab.compute;
        fixture.volume("thick/unfound").await;
        let id = text(&fixture.attach(&["thick/unfound", "c3"]).await, "/attachment_id").to_owned();
        let script = "#!/bin/bash\ncase \"$*\" in *--logout*) echo 'iscsiadm: No matching sessions found' >&2; exit 21 ;; esac\n\
                      exec /usr/sbin/iscsiadm.real \"$@\"\n";
        compute.run("mv /usr/sbin/iscsiadm /usr/sbin/iscsiadm.real").await.unwrap();
        compute.put(script, "/usr/sbin/iscsiadm", 0o755).await.unwrap();
        let (_, error) = fixture.tether.error(&["detach", &id]).await.unwrap();
        assert_eq!((text(&error, "/reason"), text(&error, "/step")), ("STILL_THERE", "logout"), "{error:#}");
        let shown = fixture.tether.json(&["show", &id]).await.unwrap();
        assert_eq!(text(&shown, "/attachment/phase"), "detaching", "{shown:#}");
        assert_eq!(shown["export"]["enabled"], true, "its target stays, too: {shown:#}");
        compute.run("mv /usr/sbin/iscsiadm.real /usr/sbin/iscsiadm").await.unwrap();
        fixture.detach(&id).await;
        fixture.assert_nothing_left("after the detach").await;
    }

    /// A domain that was undefined while it had our disk: nothing to unplug, and the rest goes.
    #[tokio::test]
    #[ignore = "lab"]
    async fn a_domain_that_was_undefined_meanwhile_does_not_hold_up_the_detach() {
        let fixture = Fixture::new().await;
        fixture.volume("thick/gone").await;
        let id = text(&fixture.attach(&["thick/gone", "c3"]).await, "/attachment_id").to_owned();
        fixture.lab.compute.run("virsh -q destroy c3 && virsh -q undefine c3 && cp /usr/local/share/tether-lab/c3.xml /run/c3.xml").await.unwrap();
        fixture.tether.json(&["detach", &id]).await.unwrap();
        fixture.lab.compute.run("virsh -q define /run/c3.xml").await.unwrap();
        fixture.assert_nothing_left("after the detach").await;
    }

    /// Somebody else's job has the domain, and its QEMU does not answer. The attach is told so, leaves nothing behind, and is made
    /// once the domain is free; others are not held up.
    #[tokio::test]
    #[ignore = "lab"]
    async fn f28_a_domain_that_another_job_holds_is_told_as_busy_and_had_later() {
        let fixture = Fixture::new().await;
        let serial = text(&fixture.volume("thick/busy").await, "/serial").to_owned();
        fixture.volume("thick/free").await;
        let compute = &fixture.lab.compute;
        let hold = "kill -STOP $(cat /run/libvirt/qemu/c2.pid) && systemd-run -q --unit=job \
                    virsh qemu-monitor-command c2 --hmp 'info status'";
        compute.run(hold).await.unwrap();
        let attach = ["attach", "thick/busy", "c2"];
        let (busy, ()) = tokio::join!(fixture.tether.error(&attach), async {
            let free = text(&fixture.attach(&["thick/free", "c3"]).await, "/attachment_id").to_owned();
            fixture.detach(&free).await;
        });
        let (_, error) = busy.unwrap();
        assert_eq!(
            (text(&error, "/reason"), text(&error, "/step")),
            ("DOMAIN_BUSY", "hot-plug"),
            "{error:#}"
        );
        assert_eq!(crate::left_on_compute(&fixture.lab).await, "", "it was taken back");
        compute
            .run("systemctl is-active -q job && kill -CONT $(cat /run/libvirt/qemu/c2.pid)")
            .await
            .unwrap();
        fixture.attach(&attach[1..]).await;
        fixture.sees("c2", &serial).await;
        fixture.tether.json(&["detach", "thick/busy", "c2"]).await.unwrap();
        fixture.assert_nothing_left("after the detach").await;
    }
}
