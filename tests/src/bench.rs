//! What Tether adds to what must be done anyway: each step timed beside its floor, the same kernel or libvirt calls by
//! hand, in turn in one run. Ratios, because a clock means little under emulation.
//!
//! The floors: for Export a shell script with the same configfs writes; for connecting a bare `iscsiadm --login`, the
//! scan, and the wait for the disk; for the hot-plug libvirt's own call as `virsh --timing` times it; for a file over NFS
//! a bare `mount` and that call (see `share`). Not here: whether the result is right, that is what the tests are for.

mod many;
mod share;

use std::time::Duration;

use anyhow::{Context, ensure};
use serde::Serialize;
use tether_proto::wire;
use uuid::Uuid;

use crate::host::Host;
use crate::lab::{Lab, Options, State};
use crate::progress::say;
use crate::tether::{SHARE_POOL, THICK_POOL, Tether};

/// The volume that is measured with.
const VOLUME: &str = "bench";
/// A guest lets go within this.
const DETACH: Duration = Duration::from_secs(60);

/// One comparison: Tether's time, the floor's, in milliseconds, and how much more Tether may take.
#[derive(Debug, Serialize)]
pub struct Comparison {
    /// What was done.
    pub what: &'static str,
    /// The median of Tether's times, in milliseconds.
    pub tether_milliseconds: f64,
    /// The median of the floor's times, in milliseconds.
    pub floor_milliseconds: f64,
    /// The first by the second.
    pub ratio: f64,
    /// The most that the ratio may be.
    pub limit: f64,
}

/// The resident memory of an idle agent.
#[derive(Debug, Serialize)]
pub struct Memory {
    /// The agent.
    pub agent: &'static str,
    /// In MiB.
    pub resident_mebibytes: f64,
    /// The most that it may be, in MiB.
    pub limit_mebibytes: f64,
}

/// All that was measured.
#[derive(Debug, Serialize)]
pub struct Results {
    /// How often each was timed.
    pub rounds: usize,
    /// Tether beside its floors.
    pub comparisons: Vec<Comparison>,
    /// The agents before the first call.
    pub memory: Vec<Memory>,
    /// Many at a time.
    pub many: many::Many,
}

impl Results {
    /// Is everything within its limit?
    pub fn within_limits(&self) -> bool {
        self.comparisons.iter().all(|c| c.ratio <= c.limit)
            && self.memory.iter().all(|m| m.resident_mebibytes <= m.limit_mebibytes)
            && self.many.within_limits()
    }
}

impl std::fmt::Display for Results {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "medians of {} rounds, Tether and its floor in turn", self.rounds)?;
        for c in &self.comparisons {
            let verdict = if c.ratio <= c.limit { "ok" } else { "TOO SLOW" };
            writeln!(
                f,
                "  {:<34} {:>8.1} ms   floor {:>8.1} ms   ratio {:>5.2}   limit {:.1}   {verdict}",
                c.what, c.tether_milliseconds, c.floor_milliseconds, c.ratio, c.limit
            )?;
        }
        for m in &self.memory {
            let verdict = if m.resident_mebibytes <= m.limit_mebibytes { "ok" } else { "TOO LARGE" };
            let (agent, is, limit) = (m.agent, m.resident_mebibytes, m.limit_mebibytes);
            writeln!(f, "  {agent:<34} {is:>8.1} MiB resident when idle   limit {limit:.0}   {verdict}")?;
        }
        write!(f, "{}", self.many)
    }
}

/// The times of one round, in milliseconds, Tether's and the floor's.
#[derive(Debug, Default)]
struct Times {
    export: (f64, f64),
    connect: (f64, f64),
    plug: (f64, f64),
    share: (f64, f64),
}

/// Measures in a lab of its own, which is gone afterwards.
///
/// # Errors
/// When anything fails; nothing is measured by halves.
pub async fn run(rounds: usize) -> anyhow::Result<Results> {
    ensure!(rounds >= 7, "at least 7 rounds, or the median says little");
    let lab = Lab::up("bench", Options { fresh: true, owned: true }).await?;
    let tether = Tether::install(&lab).await?;
    lab.restore(&State::Ready).await?;
    let memory = vec![
        resident(&lab.storage, "tether-storage-agent", 8.0).await?,
        resident(&lab.compute, "tether-compute-agent", 26.0).await?,
    ];
    for pool in [THICK_POOL, SHARE_POOL] {
        tether.json(&["volume", "create", &format!("{pool}/{VOLUME}"), "64M"]).await?;
    }
    let bench = Bench { lab, tether };
    // The first pays for what is started and loaded once: iscsid, the connection to libvirt.
    bench.round().await?;
    let mut times = Vec::new();
    for round in 1..=rounds {
        let measured = bench.round().await?;
        say(format_args!("round {round} of {rounds}: {measured:?}"));
        times.push(measured);
    }
    let comparison = |what, limit, of: fn(&Times) -> (f64, f64)| {
        let tether = median(times.iter().map(|t| of(t).0).collect());
        let floor = median(times.iter().map(|t| of(t).1).collect());
        Comparison {
            what,
            tether_milliseconds: tether,
            floor_milliseconds: floor,
            ratio: tether / floor,
            limit,
        }
    };
    let comparisons = vec![
        comparison("Export of a volume that is there", 1.5, |t| t.export),
        comparison("connect until verified", 1.5, |t| t.connect),
        comparison("hot-plug with plan and read-back", 1.3, |t| t.plug),
        comparison("attach over NFS, mount included", 1.3, |t| t.share),
    ];
    let many = many::run(&bench.lab, &bench.tether).await?;
    Ok(Results { rounds, comparisons, memory, many })
}

struct Bench {
    lab: Lab,
    tether: Tether,
}

impl Bench {
    async fn round(&self) -> anyhow::Result<Times> {
        let mut times = Times::default();
        times.export.1 = timed(&self.lab.storage, &export_by_hand()).await?;
        let (attachment_id, exported) = self.export(THICK_POOL).await?;
        times.export.0 = milliseconds(exported.report.context("no report")?.total_microseconds);
        let info = exported.connection_info.context("no connection info")?;
        let Some(wire::connection_info::Transport::Iscsi(iscsi)) = &info.transport else {
            anyhow::bail!("no iSCSI connection");
        };

        // By hand first, on the very target that Tether then uses.
        self.lab.compute.put(node_record(iscsi), &record_path(iscsi), 0o600).await?;
        times.connect.1 = timed(&self.lab.compute, &connect_by_hand(iscsi)).await?;
        self.lab.compute.run("udevadm settle").await?;
        times.plug.1 = self
            .plug_by_hand(&format!(
                "<disk type='block' device='disk'>\
                 <driver name='qemu' type='raw' cache='none' io='native' discard='unmap'/>\
                 <source dev='/dev/disk/by-id/wwn-0x{}'/><target dev='vda' bus='virtio'/><serial>bench</serial></disk>",
                iscsi.wwn
            ))
            .await?;
        let target = &iscsi.target_iqn;
        self.lab
            .compute
            .run(&format!(
                "iscsiadm -m node -T {target} --logout >/dev/null && rm -rf /etc/iscsi/nodes/{target}"
            ))
            .await?;

        let steps = self.attach_and_detach(attachment_id, info).await?;
        times.connect.0 = span(&steps, "probe-portals", "verify-device")?;
        times.plug.0 = span(&steps, "wait-turn", "verify-domain")?;
        times.share = self.share().await?;
        Ok(times)
    }

    /// Exports the pool's volume to the compute host under a new id.
    async fn export(&self, pool: &str) -> anyhow::Result<(String, wire::ExportResponse)> {
        let mut compute = self.tether.compute().await?;
        let connector = compute.get_connector(wire::GetConnectorRequest {}).await?.into_inner();
        let attachment_id = Uuid::new_v4().to_string();
        let request = wire::ExportRequest {
            attachment_id: attachment_id.clone(),
            pool: pool.into(),
            volume: VOLUME.into(),
            connector: Some(connector),
            access_mode: wire::AccessMode::ReadWrite.into(),
        };
        Ok((attachment_id, self.tether.storage().await?.export(request).await?.into_inner()))
    }

    /// Plugs a disk with the serial `bench` in and out by virsh, and gives libvirt's own time for the way in.
    async fn plug_by_hand(&self, element: &str) -> anyhow::Result<f64> {
        let (compute, guest) = (&self.lab.compute, self.lab.guest("c2")?);
        compute.put(element, "/run/bench.xml", 0o644).await?;
        let plugged = "virsh --timing attach-device c2 /run/bench.xml --live --config";
        let time = virsh_time(&compute.run(plugged).await?)?;
        guest.wait_disk("bench", DETACH).await?;
        compute.run("virsh -q detach-device c2 /run/bench.xml --live --config").await?;
        guest.wait_gone("bench", DETACH).await?;
        Ok(time)
    }

    /// Has Tether attach what was exported, gives the steps of that, and takes all away again.
    async fn attach_and_detach(
        &self,
        attachment_id: String,
        info: wire::ConnectionInfo,
    ) -> anyhow::Result<Vec<wire::StepTiming>> {
        let (mut storage, mut compute) = (self.tether.storage().await?, self.tether.compute().await?);
        let serial = info.serial.clone();
        let request = wire::AttachRequest {
            attachment_id: attachment_id.clone(),
            domain: "c2".into(),
            connection_info: Some(info),
            disk: None,
        };
        let report = compute.attach(request).await?.into_inner().report;
        self.lab.guest("c2")?.wait_disk(&serial, DETACH).await?;
        let request = wire::DetachRequest { attachment_id: attachment_id.clone(), ..Default::default() };
        compute.detach(request).await?;
        storage.unexport(wire::UnexportRequest { attachment_id, ..Default::default() }).await?;
        Ok(report.context("no report")?.steps)
    }
}

/// The same export by a shell script, and its removal after the clock has stopped.
fn export_by_hand() -> String {
    let device = format!("/dev/tether/{VOLUME}");
    format!(
        r"set -e; T=/sys/kernel/config/target; B=$T/core/iblock_77/bench; G=$T/iscsi/iqn.2026-11.internal.bench:x/tpgt_1
A=$G/acls/iqn.2026-11.internal.bench:initiator
begin
mkdir -p $B; echo -n udev_path={device} >$B/control; echo -n {device} >$B/udev_path
echo -n 0123456789abcdef0123456789abcdef >$B/wwn/vpd_unit_serial; echo 1 >$B/enable; echo 1 >$B/attrib/emulate_tpu
mkdir -p $G; echo 1 >$G/attrib/authentication; echo 0 >$G/attrib/generate_node_acls
echo 1 >$G/attrib/demo_mode_write_protect; echo CHAP >$G/param/AuthMethod
mkdir $G/lun/lun_0; ln -s $B $G/lun/lun_0/backstore
mkdir $A; echo -n user >$A/auth/userid; echo -n secret-secret >$A/auth/password
mkdir $A/lun_0; ln -s $G/lun/lun_0 $A/lun_0/lun; echo 0 >$A/lun_0/write_protect
mkdir $G/np/10.99.0.1:3260 '{v6}'; echo 1 >$G/enable
end
echo 0 >$G/enable; rm $A/lun_0/lun; rmdir $A/lun_0 $A $G/np/*; rm $G/lun/lun_0/backstore
rmdir $G/lun/lun_0 $G $T/iscsi/iqn.2026-11.internal.bench:x $B",
        v6 = "/sys/kernel/config/target/iscsi/iqn.2026-11.internal.bench:x/tpgt_1/np/[fd99::1]:3260"
    )
}

/// A bare login, the scan of LUN 0, and the wait for its disk.
fn connect_by_hand(iscsi: &wire::IscsiConnection) -> String {
    let target = &iscsi.target_iqn;
    format!(
        r"set -e; begin
iscsiadm -m node -T {target} -p {portal} --login >/dev/null
for s in /sys/class/iscsi_session/*; do read -r name <$s/targetname; [ $name != {target} ] || break; done
d=$(readlink -f $s/device); h=${{d%/session*}}; h=${{h##*/host}}
echo '0 0 0' >/sys/class/scsi_host/host$h/scan
until [ -e $d/target$h:0:0/$h:0:0:0/block/sd* ]; do :; done
end",
        portal = iscsi.portals.first().map_or("", String::as_str),
    )
}

/// Runs a script in which `begin` and `end` mark what is timed, and gives the milliseconds between them.
async fn timed(host: &Host, script: &str) -> anyhow::Result<f64> {
    let functions = "begin() { began=$EPOCHREALTIME; }; end() { ended=$EPOCHREALTIME; echo $began $ended; }";
    host.put(format!("{functions}\n{script}\n"), "/run/bench.sh", 0o644).await?;
    let output = host.run("bash /run/bench.sh").await?;
    let times: Vec<f64> = output.split_whitespace().filter_map(|text| text.parse().ok()).collect();
    match times[..] {
        [began, ended] => Ok((ended - began) * 1000.0),
        _ => anyhow::bail!("no times in {output:?}"),
    }
}

fn record_path(iscsi: &wire::IscsiConnection) -> String {
    format!("/etc/iscsi/nodes/{}/10.99.0.1,3260,1/default", iscsi.target_iqn)
}

fn node_record(iscsi: &wire::IscsiConnection) -> String {
    format!(
        "# BEGIN RECORD 2.1.8\nnode.name = {}\nnode.tpgt = 1\nnode.startup = manual\n\
         iface.iscsi_ifacename = default\niface.transport_name = tcp\nnode.conn[0].address = 10.99.0.1\n\
         node.conn[0].port = 3260\nnode.conn[0].startup = manual\nnode.session.scan = manual\n\
         node.session.initial_login_retry_max = 1\nnode.session.auth.authmethod = CHAP\n\
         node.session.auth.chap_algs = SHA256,MD5\nnode.session.auth.username = {}\nnode.session.auth.password = {}\n\
         node.session.auth.username_in = {}\nnode.session.auth.password_in = {}\n# END RECORD\n",
        iscsi.target_iqn,
        iscsi.chap_username,
        iscsi.chap_secret,
        iscsi.mutual_chap_username,
        iscsi.mutual_chap_secret
    )
}

/// `(Time: 123.456 ms)`, as `virsh --timing` prints it.
fn virsh_time(output: &str) -> anyhow::Result<f64> {
    let time = output.split("(Time: ").nth(1).and_then(|rest| rest.split(" ms").next());
    time.and_then(|text| text.parse().ok()).with_context(|| format!("no time in {output:?}"))
}

/// From the beginning of one step to the end of another, in milliseconds.
fn span(steps: &[wire::StepTiming], first: &str, last: &str) -> anyhow::Result<f64> {
    let find = |name: &str| {
        steps.iter().find(|step| step.step == name).with_context(|| format!("no step {name} in {steps:?}"))
    };
    let (first, last) = (find(first)?, find(last)?);
    Ok(milliseconds(last.start_microseconds + last.duration_microseconds - first.start_microseconds))
}

#[expect(clippy::cast_precision_loss, reason = "a time that is long enough to matter is not measured here")]
fn milliseconds(microseconds: u64) -> f64 {
    microseconds as f64 / 1000.0
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { f64::midpoint(values[middle - 1], values[middle]) }
}

async fn resident(host: &Host, agent: &'static str, limit_mebibytes: f64) -> anyhow::Result<Memory> {
    let status = host.run(&format!("grep VmRSS /proc/$(systemctl show -P MainPID {agent})/status")).await?;
    let kibibytes: f64 = status.split_whitespace().nth(1).context("no VmRSS")?.parse()?;
    Ok(Memory { agent, resident_mebibytes: kibibytes / 1024.0, limit_mebibytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_times_and_spans() {
        assert!((median(vec![3.0, 1.0, 2.0]) - 2.0).abs() < f64::EPSILON);
        assert!((median(vec![4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < f64::EPSILON);
        assert!(
            (virsh_time("Device attached successfully\n(Time: 87.250 ms)\n\n").unwrap() - 87.25).abs() < 1e-9
        );
        assert!(virsh_time("nothing").is_err());
        let step = |name: &str, start, duration| wire::StepTiming {
            step: name.into(),
            start_microseconds: start,
            duration_microseconds: duration,
        };
        let steps = [step("a", 1000, 500), step("b", 2000, 1000)];
        assert!((span(&steps, "a", "b").unwrap() - 2.0).abs() < 1e-9);
        assert!(span(&steps, "a", "c").is_err());
    }
}
