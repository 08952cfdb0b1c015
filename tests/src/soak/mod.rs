//! The soak: random verbs by several controllers at once on several domains and all pools, while agents are killed and the
//! network is cut. A model says which answers may come and what is there afterwards.
//!
//! A seed gives the order of all orders and disturbances again (`plan`); how the calls of different controllers meet is
//! the hosts' doing. Not here: the lab, and who takes it up and down.

mod caller;
mod check;
mod contest;
mod controller;
mod mismatch;
mod model;
mod plan;
mod record;
mod weather;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use tether_proto::wire;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::cache;
use crate::lab::Lab;
use crate::progress::say;
use crate::tether::{SHARE_POOL, THICK_POOL, THIN_POOL, Tether};
use caller::{Caller, Place};
use contest::Contest;
use controller::{Controller, Slot};
pub use mismatch::Mismatch;
pub use plan::SHORT_SEED;
use plan::{CONTROLLERS, Plan, Round};
pub use record::Counts;
use record::Record;
use weather::Weather;

/// What came of a soak.
#[derive(Debug, Serialize)]
pub struct Results {
    /// The seed that gives the same orders again.
    pub seed: u64,
    /// How long it took, clean-up included.
    pub seconds: f64,
    /// How much was done.
    pub counts: Counts,
    /// What was not as the model has it; the hosts are as they were then.
    pub mismatch: Option<Mismatch>,
    /// The log: the plan, each call and its answer.
    pub log: PathBuf,
}

impl std::fmt::Display for Results {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { seed, seconds, counts, mismatch, log } = self;
        let Counts {
            rounds,
            orders,
            calls,
            retries,
            attached,
            kills,
            cuts,
            full_pools,
            late,
            second_writers,
        } = counts;
        writeln!(f, "seed {seed}: {rounds} rounds, {orders} orders, {calls} calls in {seconds:.0} s")?;
        writeln!(
            f,
            "  {attached} attachments, {kills} agents killed, {cuts} cuts, {retries} calls made again"
        )?;
        writeln!(
            f,
            "  refused: {full_pools} for a full pool, {second_writers} second writers; {late} late calls"
        )?;
        match mismatch {
            None => writeln!(f, "  every answer and every state was as predicted, and nothing is left")?,
            Some(mismatch) => writeln!(f, "{mismatch}")?,
        }
        writeln!(f, "log: {}", log.display())
    }
}

/// How much of the plan is carried out: whole rounds.
#[derive(Debug, Clone, Copy)]
pub enum Length {
    /// So many rounds, however long they take.
    Rounds(usize),
    /// No round begins after this time.
    Time(Duration),
}

/// Runs rounds, and then takes back all that is there. The lab must be as `Tether::install` leaves it.
///
/// # Errors
/// When the lab itself fails. A [`Mismatch`] is no error but a result.
pub async fn run(lab: &Lab, tether: &Tether, length: Length, seed: u64) -> anyhow::Result<Results> {
    let began = Instant::now();
    // Beside the lab, which is gone when all went well.
    let log = cache::folder()?.join(format!("soak-{}.log", lab.instance().name));
    let record = Arc::new(Record::create(&log)?);
    say(format_args!("soak with seed {seed}; the log is {}", log.display()));
    let outcome = soak(lab, tether, length, seed, &record).await;
    let mismatch = match outcome {
        Ok(()) => None,
        Err(error) => Some(error.downcast::<Mismatch>()?),
    };
    Ok(Results { seed, seconds: began.elapsed().as_secs_f64(), counts: record.counts(), mismatch, log })
}

async fn soak(
    lab: &Lab,
    tether: &Tether,
    length: Length,
    seed: u64,
    record: &Arc<Record>,
) -> anyhow::Result<()> {
    let began = Instant::now();
    // A domain that is shut off is attached to as well; this one has no OS that could let go of a disk.
    lab.compute.run("virsh -q destroy empty").await?;
    let theirs = check::plant(lab).await?;
    let weather = Arc::new(Weather::default());
    let mut controllers = controllers(tether, &weather, record).await?;
    for round in Plan::new(seed) {
        let over = match length {
            Length::Rounds(rounds) => record.counts().rounds >= rounds,
            Length::Time(time) => began.elapsed() >= time,
        };
        if over {
            break;
        }
        round.lines().into_iter().for_each(|line| record.line(line));
        controllers = one_round(lab, &weather, record, &round, controllers).await?;
        check::all(lab, tether, &mut controllers, record).await?;
        record.count(|counts| counts.rounds += 1);
        let Counts { orders, calls, kills, cuts, retries, .. } = record.counts();
        say(format_args!(
            "round {}, after {:.0} s: {orders} orders, {calls} calls, {retries} made again, {kills} kills, {cuts} cuts",
            round.number,
            began.elapsed().as_secs_f64()
        ));
    }
    for controller in &mut controllers {
        controller.clean_up().await?;
    }
    check::all(lab, tether, &mut controllers, record).await?;
    check::nothing_left(lab, tether, &theirs, record).await
}

/// All controllers at once, and the disturbances beside them.
async fn one_round(
    lab: &Lab,
    weather: &Weather,
    record: &Record,
    round: &Round,
    controllers: Vec<Controller>,
) -> anyhow::Result<Vec<Controller>> {
    let (finished, done) = watch::channel(false);
    let mut tasks = JoinSet::new();
    for (mut controller, orders) in controllers.into_iter().zip(round.orders.clone()) {
        tasks.spawn(async move {
            for order in orders {
                controller.carry_out(order).await?;
            }
            anyhow::Ok(controller)
        });
    }
    let working = async {
        let mut controllers = Vec::new();
        // The first that fails ends the others where they are.
        while let Some(outcome) = tasks.join_next().await {
            controllers.push(outcome??);
        }
        finished.send_replace(true);
        controllers.sort_by_key(|controller: &Controller| controller.number);
        anyhow::Ok(controllers)
    };
    let (controllers, ()) = tokio::try_join!(working, weather.rage(lab, record, round, done))?;
    Ok(controllers)
}

async fn controllers(
    tether: &Tether,
    weather: &Arc<Weather>,
    record: &Arc<Record>,
) -> anyhow::Result<Vec<Controller>> {
    let connector = tether.compute().await?.get_connector(wire::GetConnectorRequest {}).await?.into_inner();
    let caller = Caller { tether: tether.clone(), connector };
    let shared = [(THIN_POOL, Arc::<Contest>::default()), (SHARE_POOL, Arc::default())];
    let all = (0..CONTROLLERS).map(|number| {
        let own = [THICK_POOL, THIN_POOL, SHARE_POOL].into_iter().enumerate().map(|(index, pool)| {
            // Few root ports, so few virtio disks: one for each controller, of another pool each.
            let bus = if index == number { wire::DiskBus::Virtio } else { wire::DiskBus::Scsi };
            slot(pool, format!("own-{number}-{pool}"), bus, None)
        });
        let shared = shared.iter().map(|(pool, contest)| {
            slot(pool, format!("shared-{pool}"), wire::DiskBus::Scsi, Some(contest.clone()))
        });
        Controller {
            number,
            by_command: number == 0,
            caller: caller.clone(),
            slots: own.chain(shared).collect(),
            weather: weather.clone(),
            record: record.clone(),
        }
    });
    Ok(all.collect())
}

fn slot(pool: &'static str, name: String, bus: wire::DiskBus, contest: Option<Arc<Contest>>) -> Slot {
    let model = model::Volume { shared: contest.is_some(), ..model::Volume::default() };
    Slot { place: Place { pool, name, bus }, model, contest, connections: HashMap::new() }
}
