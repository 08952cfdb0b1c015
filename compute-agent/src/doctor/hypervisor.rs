//! libvirt and QEMU: do they answer, have domains room for a disk, and does the security driver stand in the way of ours?
//! Not here: what a domain's XML says (`domain_xml`).

use std::path::{Path, PathBuf};
use std::time::Duration;

use tether_agent_core::doctor::{Check, program, systemd};
use tether_agent_core::failure::Failure;
use tether_proto::{DiskOptions, Finding, wire};

use crate::attachments::Views;
use crate::config::Config;
use crate::hypervisor::domain_xml::{PlaceError, choose_place};
use crate::hypervisor::libvirt::{DomainState, Libvirt, LibvirtError};

const LIBVIRT: &str = "libvirt";
const DOMAINS: &str = "domains";
const SECURITY: &str = "security-driver";
const WHY_LIBVIRT: &str = "no disk can be plugged or unplugged";
const WHY_SLOTS: &str = "the next disk on that bus is refused with NO_FREE_SLOT";
const WHY_SECURITY: &str = "QEMU may not open the disk: attaching it fails, or its guest has I/O errors";

/// How long libvirt may take to answer; the first call starts its daemon.
const ANSWER_DEADLINE: Duration = Duration::from_secs(20);

/// The checks that ask libvirt.
pub(super) fn checks(config: &Config, libvirt: Result<Libvirt, Failure>) -> Vec<Check> {
    let libvirt = match libvirt {
        Ok(libvirt) => libvirt,
        Err(failure) => {
            let finding = Finding::error(LIBVIRT, failure.to_string(), WHY_LIBVIRT).mend(failure.advice());
            return vec![Check::new(LIBVIRT, async move { vec![finding] })];
        }
    };
    let (versions, domains, security) = (libvirt.clone(), libvirt.clone(), libvirt);
    let mounts = config.state_directory.join("mnt");
    vec![
        Check::new(LIBVIRT, async move {
            vec![match versions.versions(ANSWER_DEADLINE).await {
                Ok([libvirt, qemu]) => Finding::ok(LIBVIRT, format!("libvirt {libvirt}, QEMU {qemu}")),
                Err(error) => unavailable(&error).await,
            }]
        }),
        Check::new(DOMAINS, async move {
            match domains.list().await {
                Ok(states) => judge_domains(&states),
                // That libvirt is away was told already.
                Err(error) => {
                    vec![Finding::note(DOMAINS, error.to_string(), "not known whether they have room")]
                }
            }
        }),
        Check::new(SECURITY, async move {
            match security.capabilities().await {
                Ok(xml) => security_driver(&xml, mounts).await,
                Err(error) => vec![Finding::note(SECURITY, error.to_string(), "not known which there is")],
            }
        }),
    ]
}

async fn unavailable(error: &LibvirtError) -> Finding {
    let sockets = ["libvirtd.socket", "virtqemud.socket"];
    let units = systemd::units(&sockets).await.unwrap_or_default();
    let socket = sockets.into_iter().find(|name| units.get(*name).is_some_and(|unit| unit.loaded));
    let mend = match socket {
        Some(socket) => format!(
            "systemctl enable --now {socket} || journalctl -n 20 -u {}",
            socket.replace(".socket", "")
        ),
        None => "apt-get install libvirt-daemon-system".to_owned(),
    };
    Finding::error(LIBVIRT, error.to_string(), WHY_LIBVIRT).mend(mend)
}

/// Has each domain a free place for a virtio disk, or else for a SCSI one?
fn judge_domains(states: &[DomainState]) -> Vec<Finding> {
    let mut findings: Vec<Finding> = states.iter().filter_map(judge_domain).collect();
    if findings.is_empty() {
        findings.push(Finding::ok(DOMAINS, format!("{} with room for a disk", states.len())));
    }
    findings
}

fn judge_domain(state: &DomainState) -> Option<Finding> {
    let views = match Views::of(state) {
        Ok(views) => views,
        Err(failure) => {
            let found = format!("{}: {failure}", state.name);
            return Some(
                Finding::warning(DOMAINS, found, "no disk can be attached to it").mend(failure.advice()),
            );
        }
    };
    let place = |bus: wire::DiskBus| {
        let options = wire::DiskOptions { bus: bus.into(), ..Default::default() };
        let options = DiskOptions::try_from(&options).ok()?;
        choose_place(&options, views.live.as_ref(), views.persistent.as_ref()).err()
    };
    let virtio = place(wire::DiskBus::Virtio)?;
    let found = format!("{}: {virtio}", state.name);
    let mend = match &virtio {
        PlaceError::NoFreeSlot { add, .. } => format!(
            "echo \"{add}\" | virsh attach-device {} /dev/stdin --config   # then shut it down and start it",
            state.uuid
        ),
        _ => format!("virsh edit {}", state.uuid),
    };
    Some(match place(wire::DiskBus::Scsi) {
        None => Finding::note(DOMAINS, found, "disks on bus scsi still have room").mend(mend),
        Some(_) => Finding::warning(DOMAINS, found, WHY_SLOTS).mend(mend),
    })
}

async fn security_driver(capabilities: &str, mounts: PathBuf) -> Vec<Finding> {
    let models = models(capabilities);
    if models.iter().any(|model| model == "selinux") {
        let enforcing =
            std::fs::read_to_string("/sys/fs/selinux/enforce").is_ok_and(|text| text.trim() == "1");
        let boolean = program("/usr/sbin/getsebool").arg("virt_use_nfs").run().await;
        if let Some(finding) = judge_selinux(enforcing, boolean.ok().map(|output| output.stdout).as_deref()) {
            return vec![finding];
        }
    }
    // What was denied since the boot is proof; profiles differ from one distribution to the next.
    let log = program("/usr/bin/journalctl")
        .args(["--dmesg", "--boot", "--quiet", "--no-pager", "--output=cat", "--lines=500"])
        .arg("--grep=DENIED|denied")
        .output()
        .await;
    let log = log.map(|output| output.stdout).unwrap_or_default();
    vec![judge_denials(&models, &log, &mounts)]
}

/// The security drivers that libvirt uses, `dac` and mostly one more.
fn models(capabilities: &str) -> Vec<String> {
    let sections = capabilities.split("<secmodel>").skip(1);
    let model =
        |section: &str| Some(section.split_once("<model>")?.1.split_once("</model>")?.0.trim().to_owned());
    sections.filter_map(model).collect()
}

/// Judges `getsebool virt_use_nfs`: without it no domain may use files on NFS.
fn judge_selinux(enforcing: bool, boolean: Option<&str>) -> Option<Finding> {
    let off = boolean.is_some_and(|text| text.trim().ends_with("off"));
    (enforcing && off).then(|| {
        Finding::warning(SECURITY, "SELinux: virt_use_nfs is off", "domains may not use files on NFS")
            .mend("setsebool -P virt_use_nfs on")
    })
}

fn judge_denials(models: &[String], log: &str, mounts: &Path) -> Finding {
    let mounts = mounts.display().to_string();
    if let Some(line) = log.lines().rev().find(|line| line.contains(&mounts)) {
        let found = format!("the kernel refused access to a share: {line}");
        let apparmor = "/etc/apparmor.d/local/abstractions/libvirt-qemu";
        let mend = match models.iter().any(|model| model == "apparmor") {
            true => format!("echo '{mounts}/** rwk,' >>{apparmor} && systemctl reload apparmor"),
            false => format!("restorecon -Rv {mounts}; setsebool -P virt_use_nfs on"),
        };
        return Finding::warning(SECURITY, found, WHY_SECURITY).mend(mend);
    }
    let list = if models.is_empty() { "none".to_owned() } else { models.join(", ") };
    Finding::ok(SECURITY, format!("{list}; it refused nothing of ours since the boot"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tether_proto::Severity;
    use uuid::Uuid;

    const Q35: &str = include_str!("../hypervisor/domain_xml/fixtures/q35.xml");

    fn state(xml: String) -> DomainState {
        DomainState { uuid: Uuid::nil(), name: "c2".into(), live: None, persistent: Some(xml) }
    }

    #[test]
    fn f39_a_domain_without_room_is_told_with_the_command_that_makes_some() {
        assert_eq!(judge_domains(&[state(Q35.to_owned())])[0].severity, Severity::Ok);
        // Without root ports there is no place on PCI Express.
        let full = Q35.replace("model='pcie-root-port'", "model='pcie-expander-bus'");
        let found = judge_domains(&[state(full.clone())]);
        assert_eq!(found.len(), 1);
        assert!(found[0].severity >= Severity::Note, "{found:?}");
        assert!(
            found[0].mend.contains("pcie-root-port") && found[0].mend.contains("virsh attach-device"),
            "{found:?}"
        );
        let neither = full.replace("model='virtio-scsi'", "model='lsilogic'");
        assert_eq!(judge_domains(&[state(neither)])[0].severity, Severity::Warning);
    }

    #[test]
    fn security_drivers_are_read_from_the_capabilities_and_denials_from_the_log() {
        let xml = "<capabilities><host><secmodel><model>apparmor</model><doi>0</doi></secmodel>\
                   <secmodel>\n<model>dac</model>\n</secmodel></host></capabilities>";
        let models = models(xml);
        assert_eq!(models, ["apparmor", "dac"]);
        let mounts = Path::new("/var/lib/tether/compute-agent/mnt");
        let other = "audit: apparmor=\"DENIED\" operation=\"open\" name=\"/etc/x\" comm=\"cups\"\n";
        assert_eq!(judge_denials(&models, other, mounts).severity, Severity::Ok);
        let ours = format!(
            "{other}audit: apparmor=\"DENIED\" operation=\"open\" name=\"{}/a/v1.raw\"\n",
            mounts.display()
        );
        let found = judge_denials(&models, &ours, mounts);
        assert_eq!(found.severity, Severity::Warning);
        assert!(found.mend.contains("mnt/** rwk,"), "{found:?}");
        assert!(judge_selinux(true, Some("virt_use_nfs --> off\n")).is_some());
        assert!(judge_selinux(true, Some("virt_use_nfs --> on\n")).is_none());
        assert!(judge_selinux(false, Some("virt_use_nfs --> off\n")).is_none());
    }
}
