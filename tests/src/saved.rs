//! Saved states: how both hosts are saved and loaded at one moment, and how the first state, `booted`, is made and cached.
//!
//! Not here: which states a lab has, and when it goes back to one (see `lab`).

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use tether_agent_core::command::CommandLine;

use crate::cache;
use crate::host::GUESTS;
use crate::image::Image;
use crate::instance::{Instance, Record};
use crate::lab::{Lab, end_all};
use crate::progress::{pause, say, step};
use crate::qemu::{self, MACHINES};
use crate::qmp::Qmp;

/// Making the volume group, defining and booting the guests.
const PROVISION: Duration = Duration::from_secs(300);
/// The monitor writes or reads a saved state.
const SNAPSHOT: Duration = Duration::from_secs(60);
/// A moment without work on the host `compute` comes.
const IDLE: Duration = Duration::from_secs(30);
/// A first boot, from power on to ssh.
const BOOT: Duration = Duration::from_secs(300);

/// The folder with both hosts' disks in the state `booted`, made when the cache does not have it.
pub(crate) async fn booted(image: &Image) -> anyhow::Result<PathBuf> {
    let key = base_key(image).await?;
    cache::entry("booted", &key, |folder| make_booted(folder, image.clone())).await
}

/// Names the state `booted` of this image. It is only good for the same image, the same emulator and the same machines.
pub(crate) async fn base_key(image: &Image) -> anyhow::Result<String> {
    let version = CommandLine::new(qemu::PROGRAM)
        .arg("--version")
        .run()
        .await
        .context("the lab needs QEMU: run packaging/setup")?
        .stdout;
    let machines = qemu::machines_in_words(image);
    // Two images made of the same things are not equal byte for byte; their host keys tell them apart.
    let made = std::fs::read(image.folder.join("host-key.pub")).context("the hosts' key")?;
    Ok(cache::key([image.key.as_bytes(), version.as_bytes(), machines.as_bytes(), &made]))
}

/// Boots both hosts for the first time, provisions them, and leaves disks with the saved state `booted` in `folder`.
async fn make_booted(folder: PathBuf, image: Image) -> anyhow::Result<()> {
    let instance = Instance::with_disks("in-the-making", folder)?;
    let _lock = instance.lock().await?;
    end_all(&instance).await?; // left by one that was killed
    for machine in MACHINES {
        machine.make_disks(&instance.disks, &image).await?;
    }
    let lab = step("booting both hosts", async {
        // Not owned: dropping it on an error must end the hosts, but leave the folder to the cache.
        let lab = Lab::start(instance.clone(), &image, Record::default(), None, false).await?;
        if let Err(e) = lab.connect(BOOT).await {
            say(format_args!("the hosts' consoles are in {}", instance.runtime.display()));
            end_all(&instance).await?;
            return Err(e);
        }
        Ok(lab)
    })
    .await?;
    let made = async {
        step("making the volume group; defining and booting the guests", async {
            tokio::try_join!(
                lab.storage.run_within("provision-storage", PROVISION),
                lab.compute.run_within("provision-compute", PROVISION)
            )
        })
        .await?;
        for guest in GUESTS {
            lab.guest(guest)?.command("ping").await?;
        }
        lab.flush().await?;
        step("saving the state 'booted'", save_both(&instance, "booted")).await
    };
    let made = made.await;
    end_all(&instance).await?;
    made?;
    cache::remove_folder(&instance.runtime)
}

/// Loads a state of both hosts. They go on.
pub(crate) async fn load_both(instance: &Instance, name: &str) -> anyhow::Result<()> {
    on_both_stopped(instance, &format!("loadvm {name}"), false).await
}

/// Saves both hosts under a name. They are stopped, and go on.
pub(crate) async fn save_both(instance: &Instance, name: &str) -> anyhow::Result<()> {
    on_both_stopped(instance, &format!("savevm {name}"), true).await
}

/// Stops both hosts, gives the same monitor command to both, and lets both go on, also after an error.
///
/// QEMU cannot load a state in which a virtual processor was inside a nested guest (it takes its own emulation for
/// KVM's), so `idle` asks for a moment in which every processor of `compute` is halted: that is outside any guest.
async fn on_both_stopped(instance: &Instance, command: &str, idle: bool) -> anyhow::Result<()> {
    let mut storage = Qmp::connect(&instance.file("storage.qmp")).await?;
    let mut compute = Qmp::connect(&instance.file("compute.qmp")).await?;
    let began = Instant::now();
    let done = loop {
        let stopped = tokio::try_join!(storage.order("stop"), compute.order("stop"));
        if let Err(e) = stopped {
            break Err(e);
        }
        if !idle || compute.all_halted().await? {
            break tokio::try_join!(storage.human(command, SNAPSHOT), compute.human(command, SNAPSHOT))
                .map(drop);
        }
        if began.elapsed() >= IDLE {
            break Err(anyhow!("the host compute is never idle for a moment"));
        }
        tokio::try_join!(storage.order("cont"), compute.order("cont"))?;
        pause(Duration::from_millis(20)).await;
    };
    // After a load that failed a host cannot go on; the first error is the one that tells why.
    let gone_on = tokio::try_join!(storage.order("cont"), compute.order("cont"));
    done.with_context(|| format!("'{command}' on both hosts"))?;
    gone_on.map(drop)
}

/// Copies the disks of both hosts with all states in them, so that what is cached is never written to.
pub(crate) async fn copy_disks(from: &Path, to: &Path) -> anyhow::Result<()> {
    cache::remove_folder(to)?;
    cache::make_folder(to)?;
    let files = MACHINES.iter().flat_map(|m| m.disks()).map(|f| from.join(f));
    let copy =
        CommandLine::new("/usr/bin/cp").args(["--reflink=auto", "--sparse=always"]).args(files).arg(to);
    copy.run().await?;
    Ok(())
}
