//! The doctor of a compute host: which checks there are. Each reads the host as it is, with the agent running or not, and
//! changes nothing. Not here: how checks are run and what both hosts have (`tether_agent_core::doctor`).

mod attached;
mod hypervisor;
pub(crate) mod initiator;
mod lock;
mod multipath;

use tether_agent_core::doctor::{About, Check, certificates, clock, lvm, modules, state};
use tether_agent_core::failure::Failure;
use tether_agent_core::journal::find_damaged;
use tether_proto::Finding;

use crate::config::Config;
use crate::hypervisor::libvirt::Libvirt;
use crate::record::AttachmentRecord;

/// LVM looks at no disk that is attached for a guest. The WWN of a disk of LIO begins with 6001405: NAA 6, and the IEEE company
/// id that LIO uses.
const GUESTS: lvm::Guests = lvm::Guests {
    is_guests: attached::is_attached,
    is_hidden: |settings| settings.rejects || settings.use_devicesfile,
    exposed: "LVM of this host looks for volume groups on attached disks: no devices file and no filter hides them",
    setting: "global_filter = [ \"r|^/dev/disk/by-id/wwn-0x6001405|\" ]",
};

/// All checks of this host.
pub(crate) fn checks(config: &Config, libvirt: Result<Libvirt, Failure>) -> Vec<Check> {
    let mut checks = vec![
        certificates::check(&config.server, config.danger),
        clock::check(),
        Check::reading("kernel-modules", || {
            // iscsid loads the one, the kernel the other.
            modules::judge_host(&["iscsi_tcp", "nfs"], &[], "volumes cannot be connected without them")
        }),
        lvm::check(GUESTS),
        Check::reading("nfs-client", || vec![nfs_client(std::path::Path::new("/sbin/mount.nfs").exists())]),
    ];
    checks.extend(state::checks(
        &config.state_directory,
        vec![("attachments", find_damaged::<AttachmentRecord>)],
    ));
    checks.extend(initiator::checks());
    checks.push(lock::check());
    checks.push(multipath::check());
    checks.extend(hypervisor::checks(config, libvirt));
    checks
}

/// What the host tells about itself beside its findings.
pub(crate) async fn about() -> About {
    let initiator_iqn = initiator::name().map(|name| name.to_string()).unwrap_or_default();
    About { initiator_iqn, endpoints: Vec::new() }
}

fn nfs_client(has_mount: bool) -> Finding {
    if has_mount {
        return Finding::ok("nfs-client", "/sbin/mount.nfs is there");
    }
    let why = "volumes of pools that are directories cannot be attached";
    Finding::warning("nfs-client", "/sbin/mount.nfs is not there", why).mend("apt-get install nfs-common")
}
