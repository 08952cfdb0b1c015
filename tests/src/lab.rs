//! The lab as a whole: up, saved states, restore, down.
//!
//! Both hosts are stopped together, saved or loaded together, and go on together, so a connection between them survives
//! a save. Not here: how one host is started (`qemu`), reached (`host`), made (`image`) or saved (`saved`).

use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use nix::fcntl::Flock;

use crate::agents::Agents;
use crate::guest::Guest;
use crate::host::{GUESTS, Host, ssh_config};
use crate::image::{self, Image};
use crate::instance::{self, Instance, Ports, Record};
use crate::lost;
use crate::progress::{pause, say, step};
use crate::qemu::{COMPUTE, MACHINES, Machine, STORAGE};
use crate::saved;

/// A host that was restored answers.
const RESTORED: Duration = Duration::from_secs(30);

/// A host is down, and answers again after a boot.
const REBOOTED: Duration = Duration::from_secs(300);

/// How a host goes down before it boots again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Down {
    /// Its operator says `systemctl reboot`.
    Cleanly,
    /// Its emulator is killed: memory is lost, and of its disks what it had not flushed may be.
    ByPowerCut,
}

/// How a lab is wanted.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Start from the first saved state even when the lab is up; what was done in it is lost.
    pub fresh: bool,
    /// The lab ends with the value: hosts are killed and disks removed when it is dropped, also by a panic. With
    /// `TETHER_LAB_KEEP` in the environment it stays, and the command that takes it down is printed.
    pub owned: bool,
}

/// A saved state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Hosts and guests booted, volume group made, nothing of Tether in it.
    Booted,
    /// With the agents installed, by [`Lab::install`].
    Ready,
    /// Saved by hand.
    Named(String),
}

impl State {
    /// Its name in the record and in QEMU.
    pub fn name(&self) -> &str {
        match self {
            Self::Booted => "booted",
            Self::Ready => "ready",
            Self::Named(name) => name,
        }
    }
}

impl From<&str> for State {
    fn from(name: &str) -> Self {
        match name {
            "booted" => Self::Booted,
            "ready" => Self::Ready,
            other => Self::Named(other.to_string()),
        }
    }
}

/// A running lab.
#[derive(Debug)]
pub struct Lab {
    /// The host with the volume group `tether` and the thin pool `tether/thinpool`.
    pub storage: Host,
    /// The host with libvirt, the Linux guests `c2` and `c3` and the domain `empty`, which has no OS.
    pub compute: Host,
    instance: Instance,
    owned: bool,
    /// Held as long as a test owns the lab, so that nobody else takes it over.
    _lock: Option<Flock<std::fs::File>>,
}

impl Lab {
    /// A lab of this name: the one that is up, or else one started from the cached state `booted`, or else one made
    /// from nothing, which takes minutes.
    ///
    /// # Errors
    /// When a package is missing (run `packaging/setup`) or a host does not come up.
    pub async fn up(name: &str, options: Options) -> anyhow::Result<Self> {
        let instance = Instance::open(name)?;
        let lock = instance.lock().await?;
        let image = image::image().await?;
        let base = saved::base_key(&image).await?;
        let record = instance.record()?;
        let running = MACHINES.iter().all(|m| m.pid(&instance).is_some());
        if running && !options.fresh && record.base == base {
            let mut lab = Self::attach(instance.clone(), &record, options.owned)?;
            match lab.connect(RESTORED).await {
                Ok(()) => {
                    lab._lock = options.owned.then_some(lock);
                    return Ok(lab);
                }
                // What hung or died in the last test must not fail all that come after it.
                Err(e) => {
                    say(format_args!("the lab '{name}' is made anew: {e:#}"));
                    for machine in MACHINES {
                        say(format_args!("{}", lost::describe(&lab.instance, machine).await));
                    }
                    lab.owned = false;
                }
            }
        }
        end_all(&instance).await?;
        let booted = saved::booted(&image).await?;
        step("copying the saved hosts", saved::copy_disks(&booted, &instance.disks)).await?;
        let states = [("booted".to_string(), base.clone())].into();
        let record = Record { base, states, ..Record::default() };
        let mut lab = step("starting both hosts from their saved state", async {
            let lab = Self::start(instance, &image, record, Some("booted"), options.owned).await?;
            lab.connect(RESTORED).await?;
            Ok(lab)
        })
        .await?;
        lab._lock = options.owned.then_some(lock);
        Ok(lab)
    }

    /// The lab of this name when it is up.
    ///
    /// # Errors
    /// When it is not.
    pub async fn running(name: &str) -> anyhow::Result<Self> {
        let instance = Instance::open(name)?;
        let record = instance.record()?;
        for machine in MACHINES {
            ensure!(machine.pid(&instance).is_some(), "the lab '{name}' is not up (host {})", machine.name);
        }
        Self::attach(instance, &record, false)
    }

    /// A Linux guest on the host `compute`: `c2` or `c3`.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn guest(&self, name: &str) -> anyhow::Result<Guest> {
        ensure!(GUESTS.contains(&name), "no Linux guest '{name}' in the lab, only {GUESTS:?}");
        Ok(Guest::new(name, &self.instance))
    }

    /// Where its files are, for messages and for ssh.
    pub fn instance(&self) -> &Instance {
        &self.instance
    }

    /// Installs the agents and saves the state `ready`. When that very state is saved already, goes back to it.
    ///
    /// # Errors
    /// When a file cannot be placed or a command fails.
    pub async fn install(&self, agents: &Agents) -> anyhow::Result<()> {
        let key = agents.key();
        if self.instance.record()?.states.get(State::Ready.name()) == Some(&key) {
            return self.restore(&State::Ready).await;
        }
        self.restore(&State::Booted).await?;
        step("installing the agents", async {
            tokio::try_join!(agents.storage.apply(&self.storage), agents.compute.apply(&self.compute))
        })
        .await?;
        self.save_as(State::Ready.name(), key).await
    }

    /// Saves the running hosts, memory and disks, under a name. They go on running.
    ///
    /// # Errors
    /// When the name is no good or QEMU refuses.
    pub async fn save(&self, name: &str) -> anyhow::Result<()> {
        instance::check_name(name)?;
        ensure!(!["booted", "ready"].contains(&name), "'{name}' is a state that the lab makes itself");
        self.save_as(name, String::new()).await
    }

    /// What was written is on the hosts' disks: a test that cuts their power loses nothing of what was there before it.
    pub(crate) async fn flush(&self) -> anyhow::Result<()> {
        tokio::try_join!(self.storage.run("sync"), self.compute.run("sync")).map(drop)
    }

    async fn save_as(&self, name: &str, key: String) -> anyhow::Result<()> {
        self.flush().await?;
        step(&format!("saving the state '{name}'"), saved::save_both(&self.instance, name)).await?;
        let mut record = self.instance.record()?;
        record.states.insert(name.to_string(), key);
        self.instance.keep(&record)
    }

    /// Puts both hosts back to a saved state. What happened since is lost; the ports stay.
    ///
    /// # Errors
    /// When there is no such state or a host does not answer afterwards.
    pub async fn restore(&self, state: &State) -> anyhow::Result<()> {
        let name = state.name();
        let record = self.instance.record()?;
        if !record.states.contains_key(name) {
            let known: Vec<_> = record.states.keys().collect();
            bail!("the lab has no saved state '{name}', only {known:?}");
        }
        step(&format!("restoring the state '{name}'"), async {
            tokio::try_join!(self.storage.disconnect(), self.compute.disconnect())?;
            saved::load_both(&self.instance, name).await?;
            self.connect(RESTORED).await
        })
        .await
    }

    /// Takes a host down and waits until it has booted and answers. What starts with the host may still be starting.
    ///
    /// # Errors
    /// When it does not go down, or does not answer in time.
    pub async fn reboot(&self, host: &Host, down: Down) -> anyhow::Result<()> {
        let machine =
            MACHINES.into_iter().find(|machine| machine.name == host.name).context("no such host")?;
        let boot_id = "cat /proc/sys/kernel/random/boot_id";
        let before = host.run(boot_id).await?;
        let began = Instant::now();
        match down {
            // The answer may be lost with the connection.
            Down::Cleanly => drop(host.try_run("systemctl reboot").await),
            Down::ByPowerCut => {
                let (image, record) = (image::image().await?, self.instance.record()?);
                machine.cut_power(&self.instance).await?;
                self.start_machine(machine, &image, &record, None).await?;
            }
        }
        loop {
            host.disconnect().await?;
            host.connect(REBOOTED.saturating_sub(began.elapsed())).await?;
            // It answers until it is down, too.
            if host.run(boot_id).await.is_ok_and(|now| now != before) {
                return Ok(());
            }
            ensure!(began.elapsed() < REBOOTED, "the host {} does not go down", host.name);
            pause(Duration::from_millis(250)).await;
        }
    }

    /// Ends both hosts and removes their disks and sockets.
    ///
    /// # Errors
    /// When a host does not end.
    pub async fn down(mut self) -> anyhow::Result<()> {
        self.owned = false;
        take_down(&self.instance).await
    }

    fn attach(instance: Instance, record: &Record, owned: bool) -> anyhow::Result<Self> {
        let host = |machine: &Machine| {
            let ports =
                record.ports.get(machine.name).with_context(|| format!("no ports of {}", machine.name))?;
            anyhow::Ok(Host::new(machine.name, &instance, *ports))
        };
        Ok(Self { storage: host(&STORAGE)?, compute: host(&COMPUTE)?, instance, owned, _lock: None })
    }

    pub(crate) async fn start(
        instance: Instance,
        image: &Image,
        mut record: Record,
        state: Option<&str>,
        owned: bool,
    ) -> anyhow::Result<Self> {
        record.ports = free_ports()?;
        instance.keep(&record)?;
        let key = image::ssh_key().await?;
        let ports: Vec<_> = record.ports.iter().map(|(name, ports)| (name.as_str(), ports.ssh)).collect();
        let host_key =
            std::fs::read_to_string(image.folder.join("host-key.pub")).context("the hosts' key")?;
        std::fs::write(instance.file("known_hosts"), format!("tether-lab {host_key}"))?;
        std::fs::write(instance.file("ssh.config"), ssh_config(&instance, &key, &ports)?)?;
        let lab = Self::attach(instance, &record, owned)?;
        let both = tokio::try_join!(
            lab.start_machine(&STORAGE, image, &record, state),
            lab.start_machine(&COMPUTE, image, &record, state)
        );
        if let Err(e) = both {
            for machine in MACHINES {
                machine.end(&lab.instance).await?;
            }
            return Err(e);
        }
        Ok(lab)
    }

    async fn start_machine(
        &self,
        machine: &Machine,
        image: &Image,
        record: &Record,
        state: Option<&str>,
    ) -> anyhow::Result<()> {
        let ports = record.ports.get(machine.name).copied().context("no ports")?;
        machine.start(&self.instance, image, ports, state).await
    }

    pub(crate) async fn connect(&self, deadline: Duration) -> anyhow::Result<()> {
        tokio::try_join!(self.storage.connect(deadline), self.compute.connect(deadline)).map(drop)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if !self.owned {
            return;
        }
        if std::env::var_os("TETHER_LAB_KEEP").is_some() {
            say(format_args!("left up; take it down with: tests/lab --name {} down", self.instance.name));
            return;
        }
        for machine in MACHINES {
            machine.end_now(&self.instance);
        }
        if let Err(e) = self.instance.remove() {
            say(format_args!("{e:#}; do it with: tests/lab --name {} down", self.instance.name));
        }
    }
}

/// Takes the lab of this name down, whatever is left of it.
///
/// # Errors
/// When a host does not end or a file cannot be removed.
pub async fn down(name: &str) -> anyhow::Result<()> {
    let instance = Instance::open(name)?;
    let _lock = instance.lock().await?;
    take_down(&instance).await
}

async fn take_down(instance: &Instance) -> anyhow::Result<()> {
    end_all(instance).await?;
    instance.remove()
}

pub(crate) async fn end_all(instance: &Instance) -> anyhow::Result<()> {
    // The ssh connections end by themselves when nobody is at the other end; asking is tidier.
    if instance.file("ssh.config").exists() {
        for machine in MACHINES {
            Host::new(machine.name, instance, Ports { ssh: 0, agent: 0 }).disconnect().await?;
        }
    }
    tokio::try_join!(STORAGE.end(instance), COMPUTE.end(instance)).map(drop)
}

/// Four ports on 127.0.0.1 that nobody listens on just now.
fn free_ports() -> anyhow::Result<std::collections::BTreeMap<String, Ports>> {
    let listen = || std::net::TcpListener::bind(("127.0.0.1", 0)).context("no free port on 127.0.0.1");
    // All are held until all are chosen, so that they differ.
    let held = [listen()?, listen()?, listen()?, listen()?];
    let port = |index: usize| anyhow::Ok(held[index].local_addr()?.port());
    let storage = Ports { ssh: port(0)?, agent: port(1)? };
    let compute = Ports { ssh: port(2)?, agent: port(3)? };
    Ok([("storage".to_string(), storage), ("compute".to_string(), compute)].into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_differ() {
        let ports = free_ports().unwrap();
        let all: std::collections::BTreeSet<u16> = ports.values().flat_map(|p| [p.ssh, p.agent]).collect();
        assert_eq!(all.len(), 4);
    }
}
