//! An agent that is told to end: it finishes what runs, or stops at a safe point within a limit, and says which.

use std::time::{Duration, Instant};

use crate::{Fixture, new_id, text};

/// What the compute agent said of its operations since a moment.
async fn said(fixture: &Fixture, since: &str) -> String {
    let command = format!("journalctl -u tether-compute-agent --since @{since} -o cat");
    fixture.lab.compute.run(&command).await.unwrap()
}

/// A detach that waits for its guest is cut off in that step, an attach that is on its way is finished, and the log says so.
#[tokio::test]
#[ignore = "lab"]
async fn f11_an_agent_that_is_told_to_end_finishes_or_says_where_it_stopped() {
    let fixture = Fixture::new().await;
    let compute = &fixture.lab.compute;
    for volume in ["thick/waits", "thick/quick"] {
        fixture.volume(volume).await;
    }
    let held =
        text(&fixture.attach(&["thick/waits", "empty", "--live-only"]).await, "/attachment_id").to_owned();
    let since = compute.run("date +%s.%N").await.unwrap().trim().to_owned();
    let quick = new_id();
    let detaching = async {
        // The guest has no operating system and never lets go; the agent goes away under the call.
        let arguments = ["--timeout", "5", "detach", &held, "--guest-timeout", "90"];
        fixture.tether.error(&arguments).await.unwrap()
    };
    let stopping = async {
        let arguments = ["attach", "thick/quick", "c2", "--id", &quick];
        let attaching = fixture.tether.output(&arguments);
        let stop = async {
            // The journal says when the detach has begun and the attach has its record.
            let begun = format!(
                "cd /var/lib/tether/compute-agent/attachments && \
                 until grep -q detaching {held}.json && [ -e {quick}.json ]; do sleep 0.1; done"
            );
            compute.run(&begun).await.unwrap();
            let began = Instant::now();
            compute.run("systemctl stop tether-compute-agent").await.unwrap();
            began.elapsed()
        };
        let (_, took) = tokio::join!(attaching, stop);
        took
    };
    let (_, took) = tokio::join!(detaching, stopping);
    assert!(took < Duration::from_secs(60), "it ends within its limits: {took:?}");
    let log = said(&fixture, &since).await;
    let line = |id: &str| {
        log.lines().find(|line| line.contains(id) && line.contains("operation=")).unwrap_or_default()
    };
    assert!(line(&held).contains("cut off in this step") && line(&held).contains("unplug"), "{log}");
    assert!(line(&quick).contains("finished before the end"), "{log}");
    assert!(log.trim_end().lines().any(|line| line.ends_with("stopped")), "{log}");

    // The next start goes on from there: the detach is finished once the guest is gone, the attach is whole.
    compute.run("virsh -q destroy empty; systemctl start tether-compute-agent").await.unwrap();
    let shown = fixture.tether.json(&["show", &quick]).await.unwrap();
    assert_eq!(text(&shown, "/attachment/phase"), "attached", "{shown:#}");
    fixture.tether.json(&["detach", &quick]).await.unwrap();
    fixture.tether.json(&["detach", &held]).await.unwrap();
    fixture.assert_nothing_left("after both").await;
}
