//! A file over NFS as the first of its share, so that the mount is part of it, beside `mount` and libvirt's call by hand.

use anyhow::Context;
use tether_proto::wire;

use super::{Bench, span, timed};
use crate::tether::SHARE_POOL;

/// Where it is mounted by hand.
const BY_HAND: &str = "/run/bench-share";

impl Bench {
    /// The times of one round in milliseconds, Tether's and the floor's.
    pub(super) async fn share(&self) -> anyhow::Result<(f64, f64)> {
        let (attachment_id, exported) = self.export(SHARE_POOL).await?;
        let mut info = exported.connection_info.context("no connection info")?;
        let Some(wire::connection_info::Transport::Nfs(nfs)) = &mut info.transport else {
            anyhow::bail!("no NFS connection");
        };
        // Both go to the same address.
        nfs.servers.truncate(1);
        let server = nfs.servers.first().context("no server")?;
        let mount = format!(
            // Once before the clock starts: the first mount after an export waits for the server to look it up.
            "set -e; mkdir -p {BY_HAND}; m() {{ mount -t nfs -o vers=4.2,hard,retry=0,nosharecache {server}:{} {BY_HAND}; }}\n\
             m; umount {BY_HAND}; begin\nm\nend",
            nfs.path
        );
        let mounted = timed(&self.lab.compute, &mount).await?;
        let plugged = self
            .plug_by_hand(&format!(
                "<disk type='file' device='disk'><driver name='qemu' type='raw' cache='none' io='threads' \
                 discard='unmap' error_policy='stop' rerror_policy='stop'/><source file='{BY_HAND}/{}'>\
                 <seclabel model='dac' relabel='no'/></source><target dev='vda' bus='virtio'/>\
                 <serial>bench</serial></disk>",
                nfs.file
            ))
            .await?;
        self.lab.compute.run(&format!("umount {BY_HAND}")).await?;
        let steps = self.attach_and_detach(attachment_id, info).await?;
        Ok((span(&steps, "find-domain", "close-journal")?, mounted + plugged))
    }
}
