//! Exports over iSCSI: their order of steps. One target with one LUN for each (design.md, "export").

use std::sync::Arc;

use tether_agent_core::failure::{Failure, Reason};
use tether_agent_core::steps::{KERNEL_DEADLINE, Steps, blocking};
use tether_proto::{AttachmentId, Iqn, IscsiConnection, Secret};

use crate::addresses;
use crate::config;
use crate::identity::VolumeIdentity;
use crate::record::Export;
use crate::target::lio::{self, Lio, PORTAL_GROUP_TAG, Target};

/// What exports over iSCSI need.
pub(super) struct Iscsi {
    lio: Lio,
    config: Option<config::Iscsi>,
}

impl Iscsi {
    /// Makes the kernel's target ready where the config asks for it. A kernel that lacks it is told in the log now and to
    /// each caller later: volumes can be made all the same.
    pub(super) async fn open(config: Option<&config::Iscsi>) -> Self {
        let lio = Lio::at(lio::ROOT);
        if config.is_some()
            && let Err(failure) = lio.make_ready().await
        {
            tracing::error!(error = %failure, "this host cannot export over iSCSI yet");
        }
        Self { lio, config: config.cloned() }
    }

    /// The connection of a new export, with a new secret.
    pub(super) fn connection(
        &self,
        id: AttachmentId,
        identity: &VolumeIdentity,
    ) -> Result<IscsiConnection, Failure> {
        let Some(config) = &self.config else {
            return Err(Failure::new(Reason::Internal, "a pool of kind lvm without [iscsi]"));
        };
        let portals =
            addresses::here(&config.portals, |portal| portal.address(), "portals", "[iscsi] portals")?;
        Ok(IscsiConnection {
            target_iqn: format!("{}:{id}", config.iqn_prefix).parse()?,
            portals,
            target_portal_group_tag: PORTAL_GROUP_TAG,
            chap_username: format!("tether-{id}"),
            chap_secret: random_secret()?,
            wwn: identity.wwn(),
        })
    }

    /// The kernel's part, and that nobody has the new target's name.
    pub(super) async fn make_ready(
        &self,
        steps: &Steps,
        iscsi: &IscsiConnection,
        fresh: bool,
    ) -> Result<(), Failure> {
        let (lio, iqn) = (self.lio.clone(), iscsi.target_iqn.clone());
        let there = steps.run("make-ready", async move { lio.make_ready().await?.exists(iqn).await }).await?;
        if fresh && there {
            // Nobody else makes targets of this name: the prefix is ours and the id was never used.
            let iqn = &iscsi.target_iqn;
            return Err(Failure::new(
                Reason::NotOurs,
                format!("target {iqn} is there, but it is not in the journal"),
            )
            .next(format!("if nobody uses it: targetcli /iscsi delete {iqn}")));
        }
        Ok(())
    }

    /// Makes what is not there and rights what differs. True when something was changed.
    pub(super) async fn converge(
        &self,
        steps: &Steps,
        id: AttachmentId,
        export: &Export,
        iscsi: &IscsiConnection,
    ) -> Result<bool, Failure> {
        type Ensure = fn(&Lio, &Target) -> Result<bool, Failure>;
        let order: [(&'static str, Ensure); 6] = [
            ("create-backstore", |lio, target| lio.ensure_backstore(target)),
            ("create-target", |lio, target| Ok(lio.ensure_target(target)?)),
            ("create-lun", |lio, target| Ok(lio.ensure_lun(target)?)),
            ("create-acl", |lio, target| Ok(lio.ensure_acl(target)?)),
            ("create-portals", Lio::ensure_portals),
            ("enable-target", |lio, target| Ok(lio.ensure_enabled(&target.iqn)?)),
        ];
        let target = Arc::new(target(id, export, iscsi));
        let mut changed = false;
        for (step, ensure) in order {
            let (lio, target) = (self.lio.clone(), target.clone());
            changed |= steps.run_blocking(step, move || ensure(&lio, &target)).await?;
        }
        Ok(changed)
    }

    /// Fences and removes whatever there is of a target and its backstore.
    pub(super) async fn take_away(&self, steps: &Steps, id: AttachmentId, iqn: &Iqn) -> Result<(), Failure> {
        type Remove = fn(&Lio, AttachmentId, &Iqn) -> Result<bool, Failure>;
        let order: [(&'static str, Remove); 3] = [
            ("fence-target", |lio, _, iqn| Ok(lio.fence(iqn)?)),
            ("remove-target", |lio, _, iqn| Ok(lio.remove_target(iqn)?)),
            ("remove-backstore", |lio, id, _| Ok(lio.remove_backstore(id)?)),
        ];
        for (step, remove) in order {
            let (lio, iqn) = (self.lio.clone(), iqn.clone());
            steps.run_blocking(step, move || remove(&lio, id, &iqn)).await?;
        }
        Ok(())
    }

    /// Is the target enabled, and the initiator logged in?
    pub(super) async fn state(&self, export: &Export, iqn: &Iqn) -> Result<(bool, bool), Failure> {
        let (lio, iqn, initiator) = (self.lio.clone(), iqn.clone(), export.connector.initiator_iqn.clone());
        let look = move || Ok::<_, Failure>((lio.enabled(&iqn)?, lio.connected(&iqn, &initiator)?));
        blocking(KERNEL_DEADLINE, look).await
    }
}

/// What the kernel's target is to be.
fn target(id: AttachmentId, export: &Export, iscsi: &IscsiConnection) -> Target {
    Target {
        id,
        iqn: iscsi.target_iqn.clone(),
        device: export.device.clone(),
        unit_serial: export.unit_serial.clone(),
        initiator: export.connector.initiator_iqn.clone(),
        chap_username: iscsi.chap_username.clone(),
        chap_secret: iscsi.chap_secret.clone(),
        portals: iscsi.portals.clone(),
        access_mode: export.connection.access_mode,
        discard: takes_discards(&export.device),
    }
}

/// Does the device give discarded space back (Documentation/ABI/stable/sysfs-block, discard_max_bytes)?
fn takes_discards(device: &str) -> bool {
    std::fs::canonicalize(device)
        .ok()
        .and_then(|path| {
            Some(format!("/sys/class/block/{}/queue/discard_max_bytes", path.file_name()?.to_str()?))
        })
        .and_then(|path| std::fs::read_to_string(path).ok())
        .is_some_and(|bytes| bytes.trim() != "0")
}

/// 32 characters of a 32-letter alphabet from the kernel's random numbers: 160 bits. No capitals: LIO takes a secret that
/// begins with `NULL` for none (`iscsi_nacl_auth` in the kernel's iscsi_target_configfs.c).
fn random_secret() -> Result<Secret, Failure> {
    const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
    let mut bytes = [0u8; 32];
    getrandom::fill(&mut bytes)
        .map_err(|error| Failure::new(Reason::Internal, format!("no random numbers: {error}")))?;
    let text: String = bytes.iter().map(|byte| char::from(ALPHABET[usize::from(byte % 32)])).collect();
    Ok(Secret::new(text)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f43_secrets_are_long_and_never_the_same() {
        let (one, two) = (random_secret().unwrap(), random_secret().unwrap());
        assert_eq!(one.expose().len(), 32);
        assert_ne!(one, two);
    }
}
