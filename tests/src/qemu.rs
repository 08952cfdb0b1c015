//! Starts and ends the QEMU process of one host, and tells whether it runs.
//!
//! QEMU detaches itself and writes its process id to a file. It is ended by that id only, and only after its command
//! line was seen to be ours. Not here: what runs inside (see `host`), saved states (see `lab`).

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tether_agent_core::command::CommandLine;

use crate::image::Image;
use crate::instance::{Instance, Ports};
use crate::progress::pause;

/// The emulator's program.
pub const PROGRAM: &str = "/usr/bin/qemu-system-x86_64";
/// Starting, including the load of a saved state.
const START_DEADLINE: Duration = Duration::from_secs(60);
/// Ending after a signal.
const END_DEADLINE: Duration = Duration::from_secs(5);

/// What a host of the lab is made of.
#[derive(Debug)]
pub struct Machine {
    /// Its host name.
    pub name: &'static str,
    /// The other end of its private network.
    peer: &'static str,
    /// Last part of its addresses: 10.99.0.N, fd99::N.
    number: u8,
    memory_mib: u32,
    /// Sizes of more disks, `/dev/vdb` and on.
    data_disks: &'static [&'static str],
    /// More for the kernel's command line.
    append: &'static str,
}

/// The host with the volume group (vdb) and the shared directory (vdc). libvirt is in the image, but has no business here.
pub const STORAGE: Machine = Machine {
    name: "storage",
    peer: "compute",
    number: 1,
    memory_mib: 1024,
    data_disks: &["8G", "1G"],
    append: "systemd.mask=libvirtd.service systemd.mask=libvirtd.socket systemd.mask=iscsid.socket",
};
/// At each exit of a nested guest QEMU clears a bit of `interrupt_request` without a lock (`do_vmexit` in target/i386/tcg; since
/// September 2025 it takes one), and may so forget an interrupt that another thread has just raised. A processor whose timer was
/// forgotten sleeps until somebody else wakes it, and the host may stop answering. A timer that comes again by itself, whatever
/// became of the last one, brings back in milliseconds what was forgotten.
const PERIODIC_TICK: &str = "highres=off nohz=off";
/// The host with libvirt and the guests.
pub const COMPUTE: Machine = Machine {
    name: "compute",
    peer: "storage",
    number: 2,
    memory_mib: 2048,
    data_disks: &[],
    append: PERIODIC_TICK,
};
/// All of them.
pub const MACHINES: [&Machine; 2] = [&STORAGE, &COMPUTE];

impl Machine {
    /// The files of its disks.
    pub fn disks(&self) -> Vec<String> {
        let data = (1..=self.data_disks.len()).map(|number| format!("{}-data{number}.qcow2", self.name));
        std::iter::once(format!("{}.qcow2", self.name)).chain(data).collect()
    }

    /// Makes empty disks over the image.
    pub(crate) async fn make_disks(&self, folder: &Path, image: &Image) -> anyhow::Result<()> {
        let create = || CommandLine::new("/usr/bin/qemu-img").args(["create", "-q", "-f", "qcow2"]);
        let files = self.disks();
        let root = image.folder.join("root.img");
        create().args(["-F", "raw", "-b"]).arg(root).arg(folder.join(&files[0])).run().await?;
        for (file, size) in files[1..].iter().zip(self.data_disks) {
            create().arg(folder.join(file)).arg(size).run().await?;
        }
        Ok(())
    }

    /// Starts it, from the saved state when one is named. Comes back when the process runs and the state is loaded.
    pub(crate) async fn start(
        &self,
        instance: &Instance,
        image: &Image,
        ports: Ports,
        state: Option<&str>,
    ) -> anyhow::Result<()> {
        for stale in ["lan", "qmp", "pid"] {
            remove_file(&instance.file(&format!("{}.{stale}", self.name)))?;
        }
        let mut qemu = self.command_line(instance, image, ports);
        if let Some(state) = state {
            qemu = qemu.args(["-loadvm", state]);
        }
        qemu.deadline(START_DEADLINE)
            .run()
            .await
            .with_context(|| format!("cannot start the host {}", self.name))?;
        Ok(())
    }

    fn command_line(&self, instance: &Instance, image: &Image, ports: Ports) -> CommandLine {
        let file = |suffix: &str| instance.file(&format!("{}.{suffix}", self.name));
        let shown = |path: PathBuf| path.display().to_string();
        let number = self.number;
        let mut qemu = CommandLine::new(PROGRAM)
            .args(["-name", &format!("tether-lab-{}-{}", instance.name, self.name)])
            // The nested guests need SVM, which `max` has. Everything else is left to the emulator.
            .args(["-machine", "q35,hpet=off", "-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max"])
            .args(["-smp", "2", "-m", &self.memory_mib.to_string()])
            .args(["-nodefaults", "-display", "none", "-device", "virtio-rng-pci"])
            .args([
                "-kernel",
                &shown(image.folder.join("vmlinuz")),
                "-initrd",
                &shown(image.folder.join("initrd")),
            ])
            .args([
                "-append",
                &format!(
                    "console=ttyS0 mitigations=off quiet audit=0 net.ifnames=0 systemd.hostname={} \
                 systemd.machine_id={:032x} {}",
                    self.name,
                    0x7e7e_0000_u32 + u32::from(number),
                    self.append
                ),
            ])
            .args(["-uuid", &format!("7e7e0000-0000-4000-8000-0000000000{number:02}")]);
        for (index, disk) in self.disks().iter().enumerate() {
            // A lab may lose everything when the machine loses power: nothing is flushed to its disk.
            qemu = qemu
                .args(["-drive", &format!(
                    "if=none,id=disk{index},file={},format=qcow2,cache=unsafe,discard=unmap,detect-zeroes=unmap",
                    shown(instance.disks.join(disk))
                )])
                .args(["-device", &format!("virtio-blk-pci,drive=disk{index}")]);
        }
        qemu.args(["-netdev", &format!(
                "user,id=management,restrict=on,ipv6=off,hostfwd=tcp:127.0.0.1:{}-:22,hostfwd=tcp:127.0.0.1:{}-:7440",
                ports.ssh, ports.agent
            )])
            .args(["-device", &format!("virtio-net-pci,netdev=management,romfile=,mac=52:54:00:99:01:{number:02x}")])
            .args(["-netdev", &format!(
                "dgram,id=lan,local.type=unix,local.path={},remote.type=unix,remote.path={}",
                shown(file("lan")),
                shown(instance.file(&format!("{}.lan", self.peer)))
            )])
            .args(["-device", &format!("virtio-net-pci,netdev=lan,romfile=,mac=52:54:00:99:00:{number:02x}")])
            .args(["-serial", &format!("file:{}", shown(file("console")))])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", shown(file("qmp")))])
            .args(["-daemonize", "-pidfile", &shown(file("pid"))])
    }

    /// Its process id, when it runs.
    pub fn pid(&self, instance: &Instance) -> Option<Pid> {
        let pid_file = instance.file(&format!("{}.pid", self.name));
        let pid: i32 = std::fs::read_to_string(&pid_file).ok()?.trim().parse().ok()?;
        // The number may belong to another process by now. A process that ended but was not reaped has no arguments.
        let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let ours = pid_file.as_os_str().as_encoded_bytes();
        arguments.split(|b| *b == 0).any(|argument| argument == ours).then(|| Pid::from_raw(pid))
    }

    /// Ends it and waits until it is gone.
    pub(crate) async fn end(&self, instance: &Instance) -> anyhow::Result<()> {
        self.end_by(instance, &[Signal::SIGTERM, Signal::SIGKILL]).await
    }

    async fn end_by(&self, instance: &Instance, signals: &[Signal]) -> anyhow::Result<()> {
        let Some(pid) = self.pid(instance) else { return Ok(()) };
        for signal in signals {
            match kill(pid, *signal) {
                Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
                Err(e) => {
                    return Err(e)
                        .with_context(|| format!("cannot end the host {} (process {pid})", self.name));
                }
            }
            let began = Instant::now();
            while began.elapsed() < END_DEADLINE {
                if has_ended(pid) {
                    return Ok(());
                }
                pause(Duration::from_millis(20)).await;
            }
        }
        bail!("the host {} (process {pid}) does not end", self.name)
    }

    /// Kills it and waits until it is gone. What the host flushed is in the disks' files; what it only wrote may be.
    pub(crate) async fn cut_power(&self, instance: &Instance) -> anyhow::Result<()> {
        self.end_by(instance, &[Signal::SIGKILL]).await
    }

    /// Ends it at once, without waiting: for a destructor.
    pub(crate) fn end_now(&self, instance: &Instance) {
        if let Some(pid) = self.pid(instance)
            && let Err(e) = kill(pid, Signal::SIGKILL)
        {
            crate::progress::say(format_args!(
                "cannot end the host {} ({e}); do it with: kill -9 {pid}",
                self.name
            ));
        }
    }
}

/// How the machines are started, whatever the instance: a saved state is good only for machines that are the same.
pub(crate) fn machines_in_words(image: &Image) -> String {
    let anywhere = Instance { name: "any".into(), runtime: "/any".into(), disks: "/any".into() };
    let words = |m: &&Machine| {
        format!("{} {:?}\n", m.command_line(&anywhere, image, Ports { ssh: 0, agent: 0 }), m.data_disks)
    };
    MACHINES.iter().map(words).collect()
}

fn remove_file(path: &Path) -> anyhow::Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
/// A process that ends gives its memory back first, and with it its arguments, and only then its files and their locks, which its
/// last thread has. When that is gone and it is dead itself (proc_pid_stat(5)) it has none of them.
fn has_ended(pid: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let alive = matches!(stat.rsplit_once(") "), Some((_, rest)) if !rest.starts_with(['Z', 'X']));
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    !alive && threads <= 1
}
