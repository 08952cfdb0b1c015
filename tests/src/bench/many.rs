//! Many at a time: attaches to several domains in turn and in one go, a black-holed portal among them, and the start of a
//! storage agent that has many exports. Not here: what one attach costs beside its floor (`bench`).

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde::Serialize;
use tether_proto::wire;
use tether_proto::wire::compute_agent_client::ComputeAgentClient;
use tokio::task::JoinSet;
use tonic::transport::Channel;
use tonic::{Code, Status};
use uuid::Uuid;

use super::{median, milliseconds};
use crate::host::Host;
use crate::lab::Lab;
use crate::progress::say;
use crate::tether::Tether;

/// How many attaches, and to how many domains.
const ATTACHES: usize = 32;
const DOMAINS: usize = 4;
/// An address of the LAN that swallows what is sent to it.
const BLACK_HOLE: &str = "10.99.0.77";
/// With how many exports an agent is started.
const EXPORTS: [usize; 3] = [50, 100, 200];
/// How often an attach is called when the answer is `UNAVAILABLE`, as any controller would.
const CALLS: usize = 3;
/// Of how many of the last of them the time is told.
const LAST: usize = 11;
/// A start may take this, however slow the lab is.
const START_DEADLINE: Duration = Duration::from_secs(300);

/// Attaches of one kind, all of them together.
#[derive(Debug, Serialize)]
pub struct Batch {
    /// How they were made.
    pub what: &'static str,
    /// From the first call to the last answer, in milliseconds.
    pub milliseconds: f64,
    /// How much of the compute host's processors was idle meanwhile, from 0 to 1: waiting.
    pub idle: f64,
    /// How many calls were made again because the first said `UNAVAILABLE`.
    pub repeated: usize,
}

/// The start of an agent.
#[derive(Debug, Serialize)]
pub struct Start {
    /// How many exports it has.
    pub exports: usize,
    /// How long it took to find that all of them are as they should be, in milliseconds for each.
    pub milliseconds_per_export: f64,
    /// How many of them it had to change; 0 is right.
    pub changed: usize,
    /// How long one more Export took beside so many, in milliseconds: the median of the last few.
    pub export_milliseconds: f64,
}

/// All of it.
#[derive(Debug, Serialize)]
pub struct Many {
    /// In turn, in one go, in one go beside a portal that swallows everything.
    pub batches: Vec<Batch>,
    /// The time in one go by the time in turn.
    pub ratio: f64,
    /// The most that it may be.
    pub limit: f64,
    /// The time of the healthy ones beside the black hole by that without it.
    pub beside_black_hole: f64,
    /// The most that it may be; more is noise of the lab.
    pub black_hole_limit: f64,
    /// Starts with more and more exports.
    pub starts: Vec<Start>,
    /// The most that an export may cost of the largest start, by that of the smallest; and one more Export beside so many (F36).
    pub start_limit: f64,
}

impl Many {
    /// Is everything within its limit?
    pub fn within_limits(&self) -> bool {
        self.ratio <= self.limit
            && self.beside_black_hole <= self.black_hole_limit
            && self.growth(|start| start.milliseconds_per_export) <= self.start_limit
            && self.growth(|start| start.export_milliseconds) <= self.start_limit
            && self.starts.iter().all(|start| start.changed == 0)
    }

    /// What something costs beside the most exports, by what it costs beside the fewest.
    fn growth(&self, of: fn(&Start) -> f64) -> f64 {
        match (self.starts.first(), self.starts.last()) {
            (Some(first), Some(last)) => of(last) / of(first),
            _ => f64::INFINITY,
        }
    }
}

impl std::fmt::Display for Many {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let verdict = |is: f64, limit: f64| if is <= limit { "ok" } else { "TOO SLOW" };
        writeln!(f, "{ATTACHES} attaches over iSCSI to {DOMAINS} domains")?;
        for batch in &self.batches {
            let (idle, repeated) = (batch.idle * 100.0, batch.repeated);
            writeln!(
                f,
                "  {:<34} {:>8.0} ms   {idle:>3.0} % of it waiting   {repeated} called again",
                batch.what, batch.milliseconds
            )?;
        }
        let (ratio, limit) = (self.ratio, self.limit);
        writeln!(f, "  in one go by in turn: {ratio:.2}   limit {limit:.1}   {}", verdict(ratio, limit))?;
        let (beside, limit) = (self.beside_black_hole, self.black_hole_limit);
        writeln!(
            f,
            "  beside a black hole by without: {beside:.2}   limit {limit:.1}   {}",
            verdict(beside, limit)
        )?;
        for start in &self.starts {
            writeln!(
                f,
                "  start with {:>3} exports: {:>6.2} ms for each, {} changed; one more Export {:>6.1} ms",
                start.exports, start.milliseconds_per_export, start.changed, start.export_milliseconds
            )?;
        }
        let limit = self.start_limit;
        for (what, growth) in [
            ("the largest start by the smallest", self.growth(|start| start.milliseconds_per_export)),
            ("an Export beside the most by the fewest", self.growth(|start| start.export_milliseconds)),
        ] {
            writeln!(f, "  {what}: {growth:.2}   limit {limit:.1}   {}", verdict(growth, limit))?;
        }
        Ok(())
    }
}

/// Measures on a lab whose agents run.
///
/// # Errors
/// When anything fails; nothing is measured by halves.
pub(super) async fn run(lab: &Lab, tether: &Tether) -> anyhow::Result<Many> {
    say("making domains and volumes …");
    define_domains(&lab.compute).await?;
    for index in 0..=ATTACHES {
        tether.json(&["volume", "create", &format!("thin/many{index}"), "16M"]).await?;
    }
    let swallow = format!(
        "ip neigh replace {BLACK_HOLE} lladdr 02:00:00:00:00:77 nud permanent dev \
         $(ip -o route get 10.99.0.1 | grep -o 'dev [^ ]*' | cut -d' ' -f2)"
    );
    lab.compute.run(&swallow).await?;
    let run = Batches { lab, tether };
    // The first pays for what is started and loaded once.
    run.in_turn(2).await?;
    let in_turn = run.in_turn(ATTACHES).await?;
    say(format_args!("in turn: {in_turn:?}"));
    let in_one_go = run.in_one_go(false).await?;
    say(format_args!("in one go: {in_one_go:?}"));
    let beside = run.in_one_go(true).await?;
    say(format_args!("beside a black hole: {beside:?}"));
    let ratio = in_one_go.milliseconds / in_turn.milliseconds;
    let beside_black_hole = beside.milliseconds / in_one_go.milliseconds;
    Ok(Many {
        batches: vec![in_turn, in_one_go, beside],
        ratio,
        limit: 0.5,
        beside_black_hole,
        black_hole_limit: 1.3,
        starts: starts(lab, tether).await?,
        start_limit: 1.5,
    })
}

struct Batches<'a> {
    lab: &'a Lab,
    tether: &'a Tether,
}

impl Batches<'_> {
    async fn in_turn(&self, count: usize) -> anyhow::Result<Batch> {
        let requests = self.export(count).await?;
        let before = processor_times(&self.lab.compute).await?;
        let began = Instant::now();
        let mut repeated = 0;
        for request in requests.clone() {
            repeated += attach(self.tether.compute().await?, request).await?;
        }
        let took = began.elapsed();
        self.batch("in turn", took, before, repeated, &requests).await
    }

    /// All at the same time. With a black hole, one more beside them, which has to fail and is not waited for.
    async fn in_one_go(&self, black_hole: bool) -> anyhow::Result<Batch> {
        let mut requests = self.export(ATTACHES + usize::from(black_hole)).await?;
        let dead = if black_hole { requests.pop() } else { None };
        let mut failing = JoinSet::new();
        if let Some(mut request) = dead.clone() {
            let info = request.connection_info.as_mut().and_then(|info| info.transport.as_mut());
            let Some(wire::connection_info::Transport::Iscsi(iscsi)) = info else {
                anyhow::bail!("no iSCSI connection")
            };
            iscsi.portals = vec![format!("{BLACK_HOLE}:3260")];
            let mut compute = self.tether.compute().await?;
            failing.spawn(async move { compute.attach(request).await });
        }
        let before = processor_times(&self.lab.compute).await?;
        let began = Instant::now();
        let mut attaching = JoinSet::new();
        for request in requests.clone() {
            attaching.spawn(attach(self.tether.compute().await?, request));
        }
        let mut repeated = 0;
        while let Some(attached) = attaching.join_next().await {
            repeated += attached??;
        }
        let took = began.elapsed();
        while let Some(failed) = failing.join_next().await {
            ensure!(failed?.is_err(), "an attach over a portal that swallows everything succeeded");
        }
        requests.extend(dead);
        let what = if black_hole { "in one go, beside a black hole" } else { "in one go" };
        self.batch(what, took, before, repeated, &requests).await
    }

    /// Exports the first volumes, and gives the attaches to make, spread over the domains.
    async fn export(&self, count: usize) -> anyhow::Result<Vec<wire::AttachRequest>> {
        let mut compute = self.tether.compute().await?;
        let connector = compute.get_connector(wire::GetConnectorRequest {}).await?.into_inner();
        let mut requests = Vec::new();
        for index in 0..count {
            let attachment_id = Uuid::new_v4().to_string();
            let export = wire::ExportRequest {
                attachment_id: attachment_id.clone(),
                pool: "thin".into(),
                volume: format!("many{index}"),
                connector: Some(connector.clone()),
                access_mode: wire::AccessMode::ReadWrite.into(),
            };
            let exported = self.tether.storage().await?.export(export).await?.into_inner();
            requests.push(wire::AttachRequest {
                attachment_id,
                domain: format!("many{}", index % DOMAINS),
                connection_info: exported.connection_info,
                disk: Some(wire::DiskOptions { bus: wire::DiskBus::Scsi.into(), ..Default::default() }),
            });
        }
        Ok(requests)
    }

    /// What was measured; and everything is taken away again.
    async fn batch(
        &self,
        what: &'static str,
        took: Duration,
        before: (u64, u64),
        repeated: usize,
        requests: &[wire::AttachRequest],
    ) -> anyhow::Result<Batch> {
        let after = processor_times(&self.lab.compute).await?;
        for request in requests {
            let attachment_id = request.attachment_id.clone();
            let detach = wire::DetachRequest { attachment_id: attachment_id.clone(), ..Default::default() };
            self.tether.compute().await?.detach(detach).await?;
            let unexport = wire::UnexportRequest { attachment_id, ..Default::default() };
            self.tether.storage().await?.unexport(unexport).await?;
        }
        let idle = share(after.0 - before.0, after.1 - before.1);
        Ok(Batch { what, milliseconds: took.as_secs_f64() * 1000.0, idle, repeated })
    }
}

/// Attaches, and gives how many calls had to be made again: a host with too much to do at once lets a login wait too long, and
/// says so.
async fn attach(
    mut compute: ComputeAgentClient<Channel>,
    request: wire::AttachRequest,
) -> Result<usize, Status> {
    let mut repeated = 0;
    loop {
        match compute.attach(request.clone()).await {
            Err(status) if status.code() == Code::Unavailable && repeated + 1 < CALLS => {
                say(format_args!("called again after: {}", status.message()));
                repeated += 1;
            }
            answer => return answer.map(|_| repeated),
        }
    }
}

/// Domains without an operating system, with a virtio-scsi controller: it lets go without a guest's help.
async fn define_domains(compute: &Host) -> anyhow::Result<()> {
    for index in 0..DOMAINS {
        let xml = format!(
            "<domain type='qemu'><name>many{index}</name><memory unit='MiB'>32</memory><vcpu>1</vcpu>\
             <os><type arch='x86_64' machine='q35'>hvm</type></os><on_poweroff>destroy</on_poweroff><devices>\
             <controller type='scsi' index='0' model='virtio-scsi'/><memballoon model='none'/></devices></domain>"
        );
        compute.put(xml, "/run/many.xml", 0o644).await?;
        compute.run(&format!("virsh -q define /run/many.xml && virsh -q start --paused many{index}")).await?;
    }
    Ok(())
}

/// How many ticks the processors were idle, and how many there were, since the boot (proc_stat(5)).
async fn processor_times(host: &Host) -> anyhow::Result<(u64, u64)> {
    let stat = host.run("head -n 1 /proc/stat").await?;
    let ticks: Vec<u64> = stat.split_whitespace().skip(1).filter_map(|text| text.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal
    ensure!(ticks.len() >= 8, "/proc/stat is not as documented: {stat}");
    Ok((ticks[3] + ticks[4], ticks[..8].iter().sum()))
}

#[expect(clippy::cast_precision_loss, reason = "ticks of a few minutes")]
fn share(part: u64, whole: u64) -> f64 {
    part as f64 / whole.max(1) as f64
}

/// An agent is started with more and more exports, which are all in place.
async fn starts(lab: &Lab, tether: &Tether) -> anyhow::Result<Vec<Start>> {
    tether.json(&["volume", "create", "thin/many", "16M", "--multi-attach"]).await?;
    let (mut made, mut starts) = (0, Vec::new());
    for exports in EXPORTS {
        say(format_args!("a start with {exports} exports …"));
        let mut took = Vec::new();
        while made < exports {
            made += 1;
            let request = wire::ExportRequest {
                attachment_id: Uuid::new_v4().to_string(),
                pool: "thin".into(),
                volume: "many".into(),
                connector: Some(wire::Connector {
                    hostname: format!("host{made}"),
                    initiator_iqn: format!("iqn.2026-11.internal.bench:host{made}"),
                    ..Default::default()
                }),
                access_mode: wire::AccessMode::ReadWrite.into(),
            };
            let exported = tether.storage().await?.export(request).await?.into_inner();
            took.push(milliseconds(exported.report.context("no report")?.total_microseconds));
        }
        let last = took.split_off(took.len().saturating_sub(LAST));
        starts.push(start(lab, exports, median(last)).await?);
    }
    Ok(starts)
}

/// Restarts the storage agent and reads from its log how long it took to look at its exports.
async fn start(lab: &Lab, exports: usize, export_milliseconds: f64) -> anyhow::Result<Start> {
    let since = lab.storage.run("date +%s.%N").await?;
    lab.storage.run("systemctl restart tether-storage-agent").await?;
    let log = format!(
        "journalctl -u tether-storage-agent --since @{} -o cat | grep ' reconciled ' || true",
        since.trim()
    );
    let deadline = Instant::now() + START_DEADLINE;
    let line = loop {
        let lines = lab.storage.run(&log).await?;
        if let Some(line) = lines.lines().find(|line| line.contains("unchanged=")) {
            break line.to_owned();
        }
        ensure!(Instant::now() < deadline, "the agent has not reconciled after its start");
    };
    let number = |name: &str| {
        let text = line.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
        text.and_then(|text| text.parse::<u64>().ok()).with_context(|| format!("no {name} in {line}"))
    };
    let took = milliseconds(number("milliseconds")? * 1000);
    let changed = usize::try_from(number("changed")? + number("failed")?)?;
    Ok(Start { exports, milliseconds_per_export: took / count(exports), changed, export_milliseconds })
}

#[expect(clippy::cast_precision_loss, reason = "a few hundred")]
fn count(exports: usize) -> f64 {
    exports as f64
}
