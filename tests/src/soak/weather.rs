//! Disturbances: agents are killed, the network between the hosts is cut and mended, and everybody can ask whether it is
//! calm. Not here: when they come (`plan`).

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::sync::watch;

use super::plan::{Disturbance, Round};
use super::record::Record;
use crate::host::Host;
use crate::lab::Lab;

/// After a disturbance, sessions and mounts need so long to find back: until then an agent may say that something is away.
const AFTER: Duration = Duration::from_secs(30);
/// A cut that stops all controllers is mended after this, or nothing would ever be answered again.
const LONGEST_CUT: Duration = Duration::from_secs(15);

/// What the controllers count, and what they ask.
#[derive(Debug, Default)]
pub(crate) struct Weather {
    begun: watch::Sender<usize>,
    answered: watch::Sender<usize>,
    raging: AtomicUsize,
    /// When the last one was over.
    ended: Mutex<Option<Instant>>,
}

impl Weather {
    /// A call is about to be sent.
    pub(crate) fn call_begins(&self) {
        self.begun.send_modify(|count| *count += 1);
    }

    /// A call was answered, or given up.
    pub(crate) fn call_ends(&self) {
        self.answered.send_modify(|count| *count += 1);
    }

    /// Was there a disturbance at any time from then until now? If so, a call may have been cut off.
    pub(crate) fn struck_since(&self, then: Instant) -> bool {
        self.not_over_at(then)
    }

    /// Was everything calm from then until now, and long enough before? Only then nothing has a reason to be away.
    pub(crate) fn calm_since(&self, then: Instant) -> bool {
        then.checked_sub(AFTER).is_some_and(|before| !self.not_over_at(before))
    }

    fn not_over_at(&self, then: Instant) -> bool {
        let ended = *self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        self.raging.load(Ordering::SeqCst) > 0 || ended.is_some_and(|ended| ended >= then)
    }

    /// Carries out a round's disturbances, each when it is due. What is not due when the controllers are done, comes then.
    pub(crate) async fn rage(
        &self,
        lab: &Lab,
        record: &Record,
        round: &Round,
        mut done: watch::Receiver<bool>,
    ) -> anyhow::Result<()> {
        let (mut begun, before) = (self.begun.subscribe(), *self.begun.borrow());
        for planned in &round.disturbances {
            let due = begun.wait_for(|count| *count >= before + planned.after_calls);
            tokio::select! { _ = due => {}, _ = done.wait_for(|done| *done) => {} }
            record.line(format!("disturbance: {:?}", planned.what));
            self.raging.fetch_add(1, Ordering::SeqCst);
            let outcome = self.one(lab, record, planned.what, done.clone()).await;
            *self.ended.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
            self.raging.fetch_sub(1, Ordering::SeqCst);
            outcome.with_context(|| format!("{:?}", planned.what))?;
            record.line(format!("over: {:?}", planned.what));
        }
        Ok(())
    }

    async fn one(
        &self,
        lab: &Lab,
        record: &Record,
        what: Disturbance,
        done: watch::Receiver<bool>,
    ) -> anyhow::Result<()> {
        match what {
            Disturbance::KillStorage => kill(&lab.storage, record).await,
            Disturbance::KillCompute => kill(&lab.compute, record).await,
            Disturbance::KillBoth => {
                tokio::try_join!(kill(&lab.storage, record), kill(&lab.compute, record)).map(drop)
            }
            Disturbance::Cut(answers) => {
                cut(&lab.compute).await?;
                record.count(|counts| counts.cuts += 1);
                let (mut answered, mut done) = (self.answered.subscribe(), done);
                let until = *answered.borrow_and_update() + answers;
                let enough = async {
                    tokio::select! {
                        _ = answered.wait_for(|count| *count >= until) => {}
                        _ = done.wait_for(|done| *done) => {}
                    }
                };
                // Passed or not, it is mended now.
                drop(tokio::time::timeout(LONGEST_CUT, enough).await);
                mend(&lab.compute).await
            }
        }
    }
}

/// Kills the agent of a host and waits until another one serves.
async fn kill(host: &Host, record: &Record) -> anyhow::Result<()> {
    let unit = format!("tether-{}-agent", host.name);
    let command = format!(
        "before=$(systemctl show -P MainPID {unit}); systemctl kill -s KILL {unit}; for i in $(seq 300); do \
         now=$(systemctl show -P MainPID {unit}); \
         [ $now = $before ] || [ $now = 0 ] || ! systemctl -q is-active {unit} || exit 0; sleep 0.1; done; \
         systemctl status {unit}; exit 1"
    );
    host.run(&command).await?;
    record.count(|counts| counts.kills += 1);
    Ok(())
}

/// The network device between the hosts goes down. Its name is kept for [`mend`]: without addresses nobody finds it.
async fn cut(compute: &Host) -> anyhow::Result<()> {
    let command = "set -e; lan=$(ip -o addr show to 10.99.0.2 | awk '{print $2}'); [ -n \"$lan\" ]; \
                   echo $lan >/run/soak-lan; ip link set $lan down";
    compute.run(command).await.map(drop)
}

/// Back up, with both addresses, and the other host answers on both.
async fn mend(compute: &Host) -> anyhow::Result<()> {
    let command = "ip link set $(cat /run/soak-lan) up; for i in $(seq 100); do \
                   ping -q -c 1 -W 1 10.99.0.1 >/dev/null && ping -q -c 1 -W 1 fd99::1 >/dev/null && exit 0; sleep 0.2; done; \
                   ip addr; exit 1";
    compute.run(command).await.map(drop)
}
