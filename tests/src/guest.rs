//! Talking to a Linux guest: which disks it sees, and writing and reading them from inside.
//!
//! The guest answers on its second serial port (see `image/guest/commands`); ssh brings that socket to this machine.
//! Not here: libvirt and the domains' XML, they belong to the compute host.

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::host::Host;
use crate::instance::{Instance, Ports};
use crate::progress::{pause, say};

/// How long an answer may take when nobody says otherwise.
const ANSWER: Duration = Duration::from_secs(60);
/// A command that had no answer for so long may not have arrived.
const UNNOTICED: Duration = Duration::from_secs(10);
/// A guest that does nothing answers within this.
const PING: Duration = Duration::from_secs(3);
/// Between two looks at the guest's list of disks.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

type Answers = Lines<BufReader<UnixStream>>;
/// What the guest says: a result, or what is wrong.
type Answer = Result<String, String>;

/// A Linux guest.
#[derive(Debug, Clone)]
pub struct Guest {
    /// Its libvirt domain.
    pub name: String,
    socket: PathBuf,
    /// Where its QEMU runs.
    compute: Host,
}

/// A disk as the guest's kernel sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// `vda`, `sda`, …
    pub name: String,
    /// In bytes.
    pub size: u64,
    /// The serial, empty when it has none.
    pub serial: String,
    /// Whether the guest may not write to it.
    pub read_only: bool,
}

impl Guest {
    pub(crate) fn new(name: &str, instance: &Instance) -> Self {
        let compute = Host::new("compute", instance, Ports { ssh: 0, agent: 0 });
        Self { name: name.to_string(), socket: instance.file(&format!("{name}.commands")), compute }
    }

    /// Runs one command in the guest and gives what follows `ok`.
    ///
    /// # Errors
    /// When the guest answers `error`, or not within a minute.
    pub async fn command(&self, command: &str) -> anyhow::Result<String> {
        self.command_within(command, ANSWER).await
    }

    /// [`Guest::command`] with another deadline.
    ///
    /// # Errors
    /// When the guest answers `error`, or misses the deadline.
    pub async fn command_within(&self, command: &str, deadline: Duration) -> anyhow::Result<String> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        // An answer to somebody who gave up must not be taken for ours.
        let id = format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let answer = match timeout(deadline, self.exchange(&id, command)).await {
            Ok(answer) => answer,
            Err(_) => {
                // Whoever waits for a guest to boot asks with a short deadline, and again.
                let seen = if deadline >= ANSWER { self.look_at_qemu().await } else { String::new() };
                Err(anyhow!("no answer after {} s{seen}", deadline.as_secs_f64()))
            }
        };
        answer.with_context(|| format!("guest {}: {command}", self.name))
    }

    /// What its QEMU does and what its kernel said last, and whether it answers after that, for whoever looks for why it did
    /// not.
    async fn look_at_qemu(&self) -> String {
        let name = &self.name;
        let look = format!(
            "pid=$(cat /run/libvirt/qemu/{name}.pid); for task in /proc/$pid/task/*; do echo \"$(cat $task/comm) $(cut -d ' ' -f 3 \
             $task/stat) $(cat $task/wchan)\"; done; for question in 'info status' 'info cpus' 'info blockstats'; do \
             timeout 10 virsh -q qemu-monitor-command {name} --hmp \"$question\"; done 2>&1; tail -n 12 /var/log/tether-lab/{name}.console; dmesg | tail -n 8"
        );
        let seen = match self.compute.try_run(&look).await {
            Ok(output) => output.stdout,
            Err(error) => format!("{error:#}"),
        };
        let id = format!("{}-again", std::process::id());
        let again = timeout(Duration::from_secs(10), self.exchange(&id, "ping")).await;
        let again =
            if matches!(again, Ok(Ok(_))) { "answers now" } else { "does not answer after that either" };
        format!("\n{seen}\n{name} {again}")
    }

    /// Sends a command and waits for its answer. Once in a hundred tests or more a command does not arrive (seen: its connection
    /// open, nothing done, and the guest answered another one), or the way to the guest breaks; it is sent again then.
    async fn exchange(&self, id: &str, command: &str) -> anyhow::Result<String> {
        loop {
            match self.attempt(id, command).await {
                Ok(Some(answer)) => return answer.map_err(|problem| anyhow!(problem)),
                Ok(None) => say(format_args!("guest {}: not taken, and sent again: {command}", self.name)),
                Err(error) if is_broken(&error) => {
                    say(format_args!("guest {}: {error:#}; sent again: {command}", self.name));
                    // Whatever is asked of the host makes the way anew.
                    self.compute.run("true").await.context("the way to the guest")?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// One attempt; nothing when the guest has not taken it.
    async fn attempt(&self, id: &str, command: &str) -> anyhow::Result<Option<Answer>> {
        let mut answers = self.send(id, command).await?;
        loop {
            if let Ok(answer) = timeout(UNNOTICED, answer_to(id, &mut answers)).await {
                return answer.map(Some);
            }
            // While it works on a command it takes no other, not even this.
            let idle = format!("{id}-idle");
            let ping = async { answer_to(&idle, &mut self.send(&idle, "ping").await?).await };
            if matches!(timeout(PING, ping).await, Ok(Ok(_))) {
                break;
            }
        }
        // It may have ended just before that.
        match timeout(PING, answer_to(id, &mut answers)).await {
            Ok(answer) => answer.map(Some),
            Err(_) => Ok(None),
        }
    }

    async fn send(&self, id: &str, command: &str) -> anyhow::Result<Answers> {
        let mut stream = UnixStream::connect(&self.socket).await.context("its command socket")?;
        stream.write_all(format!("{id} {command}\n").as_bytes()).await?;
        Ok(BufReader::new(stream).lines())
    }

    /// Waits until a guest that was just started takes commands.
    ///
    /// # Errors
    /// When it does not in time.
    pub async fn wait_up(&self, deadline: Duration) -> anyhow::Result<()> {
        let began = Instant::now();
        while let Err(error) = self.command_within("ping", Duration::from_secs(2)).await {
            if began.elapsed() >= deadline {
                return Err(error);
            }
            pause(LOOK_AGAIN).await;
        }
        Ok(())
    }

    /// The disks that the guest sees.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn disks(&self) -> anyhow::Result<Vec<Disk>> {
        parse_disks(&self.command("list").await?)
    }

    /// Waits until the guest sees a disk with this serial.
    ///
    /// # Errors
    /// When it does not in time; the error says what it sees.
    pub async fn wait_disk(&self, serial: &str, deadline: Duration) -> anyhow::Result<Disk> {
        let began = Instant::now();
        loop {
            let disks = self.disks().await?;
            if let Some(disk) = disks.iter().find(|d| d.serial == serial) {
                return Ok(disk.clone());
            }
            if began.elapsed() >= deadline {
                bail!("guest {} sees no disk with serial '{serial}' but {disks:?}", self.name);
            }
            pause(LOOK_AGAIN).await;
        }
    }

    /// Waits until the guest sees no disk with this serial.
    ///
    /// # Errors
    /// When it still sees it at the deadline.
    pub async fn wait_gone(&self, serial: &str, deadline: Duration) -> anyhow::Result<()> {
        let began = Instant::now();
        while let Some(disk) = self.disks().await?.into_iter().find(|d| d.serial == serial) {
            if began.elapsed() >= deadline {
                bail!("guest {} still sees {disk:?}", self.name);
            }
            pause(LOOK_AGAIN).await;
        }
        Ok(())
    }

    /// Waits until the guest's kernel says that the disk with this serial has this size in bytes.
    ///
    /// # Errors
    /// When it does not in time; the error says what it sees.
    pub async fn wait_size(&self, serial: &str, size: u64, deadline: Duration) -> anyhow::Result<()> {
        let began = Instant::now();
        loop {
            let disk = self.disks().await?.into_iter().find(|d| d.serial == serial);
            if disk.as_ref().is_some_and(|d| d.size == size) {
                return Ok(());
            }
            if began.elapsed() >= deadline {
                bail!("guest {} sees {disk:?} and no size of {size}", self.name);
            }
            pause(LOOK_AGAIN).await;
        }
    }

    /// Writes [`pattern`] of `seed` to the start of a disk, from inside the guest, down to the storage.
    ///
    /// # Errors
    /// When the guest says so; `bytes` must be a multiple of 512.
    pub async fn write(&self, disk: &Disk, seed: &str, bytes: u64) -> anyhow::Result<()> {
        self.command(&format!("write {} {seed} {bytes}", disk.name)).await.map(drop)
    }

    /// [`Guest::write`] from this offset on, a multiple of 512.
    ///
    /// # Errors
    /// When the guest says so.
    pub async fn write_at(&self, disk: &Disk, seed: &str, bytes: u64, offset: u64) -> anyhow::Result<()> {
        self.command(&format!("write {} {seed} {bytes} {offset}", disk.name)).await.map(drop)
    }

    /// [`Guest::checksum`] of a part.
    ///
    /// # Errors
    /// When the guest says so.
    pub async fn checksum_at(&self, disk: &Disk, bytes: u64, offset: u64) -> anyhow::Result<String> {
        self.command(&format!("checksum {} {bytes} {offset}", disk.name)).await
    }

    /// SHA-256 of the first bytes of a disk in hexadecimal, read by the guest from the storage.
    ///
    /// # Errors
    /// When the guest says so.
    pub async fn checksum(&self, disk: &Disk, bytes: u64) -> anyhow::Result<String> {
        self.command(&format!("checksum {} {bytes}", disk.name)).await
    }
}

/// What the guest's `write` puts on a disk: records of 512 bytes, each with the seed and its own number.
pub fn pattern(seed: &str, bytes: usize) -> Vec<u8> {
    let mut all = Vec::with_capacity(bytes);
    for number in 0..bytes / 512 {
        let head = format!("{seed}:{number}:");
        all.extend_from_slice(head.as_bytes());
        all.resize(all.len() + 511 - head.len().min(511), b'.');
        all.push(b'\n');
    }
    all
}

fn parse_disks(list: &str) -> anyhow::Result<Vec<Disk>> {
    list.split(';').map(str::trim).filter(|d| !d.is_empty()).map(parse_disk).collect()
}

fn parse_disk(text: &str) -> anyhow::Result<Disk> {
    let (name, facts) = text.split_once(' ').with_context(|| format!("disk '{text}'"))?;
    let fact = |key: &str| facts.split(' ').find_map(|f| f.strip_prefix(key)?.strip_prefix('='));
    Ok(Disk {
        name: name.to_string(),
        size: fact("size").and_then(|s| s.parse().ok()).with_context(|| format!("no size in '{text}'"))?,
        serial: fact("serial").unwrap_or_default().to_string(),
        read_only: fact("ro") == Some("1"),
    })
}

/// Did the way to the guest break, which ssh makes?
fn is_broken(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| {
        matches!(
            error.kind(),
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::UnexpectedEof
        )
    })
}

/// The answer to one command; what answers another one is passed over.
async fn answer_to(id: &str, answers: &mut Answers) -> anyhow::Result<Answer> {
    loop {
        let line = answers.next_line().await?;
        let line = line.ok_or_else(|| {
            io::Error::new(io::ErrorKind::UnexpectedEof, "the guest's serial port is closed")
        })?;
        let Some(answer) = line.trim_end().strip_prefix(id).and_then(|a| a.strip_prefix(' ')) else {
            continue;
        };
        return Ok(match answer.split_once(' ').unwrap_or((answer, "")) {
            ("ok", result) => Ok(result.to_string()),
            (_, problem) => Err(problem.to_string()),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_read_from_the_guests_answer() {
        let disks = parse_disks("vda size=1024 serial=ab-c ro=0; sda size=512 serial= ro=1; ").unwrap();
        let expected = [
            Disk { name: "vda".into(), size: 1024, serial: "ab-c".into(), read_only: false },
            Disk { name: "sda".into(), size: 512, serial: String::new(), read_only: true },
        ];
        assert_eq!(disks, expected);
        assert!(parse_disks("").unwrap().is_empty());
        assert!(parse_disks("vda size=x").is_err());
    }

    #[test]
    fn the_pattern_numbers_every_sector() {
        let bytes = pattern("seed", 1024);
        assert_eq!(bytes.len(), 1024);
        assert!(bytes[512..].starts_with(b"seed:1:...") && bytes.ends_with(b".\n"));
    }
}
