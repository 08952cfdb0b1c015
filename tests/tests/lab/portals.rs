//! Portals: dead ones, IPv6 ones, several (rule 9, F23, F40).

use std::time::{Duration, Instant};

use crate::{Fixture, attach_with, export, iscsi, new_id, reason, text, unexport};

/// An address on the LAN where packets vanish: nobody answers, not even with a refusal.
pub(crate) const BLACK_HOLE: &str = "10.99.0.77:3260";

pub(crate) async fn make_black_hole(fixture: &Fixture) {
    let command = "ip neigh replace 10.99.0.77 lladdr 02:00:00:00:00:77 nud permanent dev \
                   $(ip -o route get 10.99.0.1 | grep -o 'dev [^ ]*' | cut -d' ' -f2)";
    fixture.lab.compute.run(command).await.unwrap();
}

/// F23: with no portal alive an attach fails in the caller's time, and attaches beside it go on.
#[tokio::test]
#[ignore = "lab"]
async fn f23_a_dead_target_fails_soon_and_holds_up_nobody() {
    let fixture = Fixture::new().await;
    make_black_hole(&fixture).await;
    let serial = text(&fixture.volume("thick/healthy").await, "/serial").to_owned();
    fixture.volume("thick/dead").await;
    let (dead, mut info) = export(&fixture, "thick/dead").await;
    iscsi(&mut info).portals = vec![BLACK_HOLE.into()];
    let failing = async {
        let began = Instant::now();
        let refused = attach_with(&fixture, &dead, "c2", info).await.unwrap_err();
        (refused, began.elapsed())
    };
    let healthy = async {
        let began = Instant::now();
        fixture.attach(&["thick/healthy", "c2"]).await;
        began.elapsed()
    };
    let ((refused, took), healthy_took) = tokio::join!(failing, healthy);
    let (reason, step, next) = reason(&refused);
    assert_eq!((reason.as_str(), step.as_str()), ("PORTAL_UNREACHABLE", "probe-portals"), "{refused:?}");
    assert!(refused.message().contains(BLACK_HOLE) && next.contains("firewall"), "{refused:?}");
    assert!(took < Duration::from_secs(10), "{took:?}");
    // The dead one is given 3 s for its probe; who waited for it would be later than that and its own time.
    assert!(healthy_took < took + Duration::from_secs(3), "{healthy_took:?} beside {took:?}");
    fixture.sees("c2", &serial).await;
    unexport(&fixture, &dead).await;
    fixture.tether.json(&["detach", "thick/healthy", "c2"]).await.unwrap();
    fixture.assert_nothing_left("after both").await;
}

/// F40: everything over IPv6 alone.
#[tokio::test]
#[ignore = "lab"]
async fn f40_the_whole_flow_over_ipv6_alone() {
    let fixture = Fixture::new().await;
    fixture
        .lab
        .storage
        .run(
            "sed -i 's/^portals = .*/portals = [\"[fd99::1]:3260\"]/' /etc/tether/storage-agent.toml && \
             systemctl restart tether-storage-agent",
        )
        .await
        .unwrap();
    let serial = text(&fixture.volume("thin/six").await, "/serial").to_owned();
    let attached = fixture.attach(&["thin/six", "c2"]).await;
    let id = text(&attached, "/attachment_id");
    let shown = fixture.tether.json(&["show", id]).await.unwrap();
    assert_eq!(text(&shown, "/attachment/portal"), "[fd99::1]:3260", "{shown:#}");
    let disk = fixture.sees("c2", &serial).await;
    let guest = fixture.lab.guest("c2").unwrap();
    guest.write(&disk, "six", 1 << 20).await.unwrap();
    let peers = fixture.lab.compute.run("ss -Htn state established '( dport = :3260 )'").await.unwrap();
    assert!(peers.contains("[fd99::1]:3260") && !peers.contains("10.99.0.1:3260"), "{peers}");
    fixture.tether.json(&["detach", id]).await.unwrap();
    fixture.assert_nothing_left("after the detach").await;
}

/// Left out of a run for its time, not for what it shows: `tests/run long`.
mod long {
    use super::*;

    /// LIO would listen on any address. One that the storage host does not have is left out, and with none left the export is
    /// refused by name.
    #[tokio::test]
    #[ignore = "lab"]
    async fn a_portal_that_is_not_the_hosts_own_is_left_out_or_refused_with_the_address() {
        let fixture = Fixture::new().await;
        fixture.volume("thick/elsewhere").await;
        let configure = |portals: &str| {
            format!(
                "sed -i 's/^portals = .*/portals = [{portals}]/' /etc/tether/storage-agent.toml && \
                 systemctl restart tether-storage-agent"
            )
        };
        let storage = &fixture.lab.storage;
        storage.run(&configure(r#""10.99.0.50:3260", "10.99.0.1:3260""#)).await.unwrap();
        let (id, mut info) = export(&fixture, "thick/elsewhere").await;
        assert_eq!(iscsi(&mut info).portals, ["10.99.0.1:3260"]);
        unexport(&fixture, &id).await;
        storage.run(&configure(r#""10.99.0.50:3260""#)).await.unwrap();
        let (code, error) =
            fixture.tether.error(&["attach", "thick/elsewhere", "c2", "--id", &new_id()]).await.unwrap();
        assert_eq!(
            (text(&error, "/reason"), text(&error, "/step")),
            ("PORTAL_UNAVAILABLE", "validate"),
            "{error:#}"
        );
        assert!(text(&error, "/message").contains("10.99.0.50:3260"), "{error:#}");
        assert_eq!(code, 4);
        fixture.assert_nothing_left("after the refusal").await;
    }

    /// F23: a portal that swallows packets costs nothing while another answers.
    #[tokio::test]
    #[ignore = "lab"]
    async fn f23_a_dead_portal_beside_healthy_ones_is_passed_over() {
        let fixture = Fixture::new().await;
        make_black_hole(&fixture).await;
        let serial = text(&fixture.volume("thick/portals").await, "/serial").to_owned();
        let (id, mut info) = export(&fixture, "thick/portals").await;
        iscsi(&mut info).portals.insert(0, BLACK_HOLE.into());
        let attached = attach_with(&fixture, &id, "c2", info).await.unwrap();
        assert_ne!(attached.attachment.unwrap().portal, BLACK_HOLE);
        let probe =
            attached.report.unwrap().steps.into_iter().find(|step| step.step == "probe-portals").unwrap();
        assert!(probe.duration_microseconds < 1_000_000, "{probe:?}");
        fixture.sees("c2", &serial).await;
        fixture.tether.json(&["detach", &id]).await.unwrap();
        fixture.assert_nothing_left("after the detach").await;
    }
}
