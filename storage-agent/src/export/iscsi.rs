//! Exports over iSCSI: their order of steps. One target with one LUN for each (design.md, "export").

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tether_agent_core::failure::{Failure, Reason};
use tether_agent_core::steps::{KERNEL_DEADLINE, Steps, blocking};
use tether_agent_core::stuck::Stuck;
use tether_agent_core::turns::{Turn, Turns};
use tether_proto::{AttachmentId, Iqn, IscsiConnection, MutualChap, Secret, Transport};
use tokio::time::interval;

use crate::addresses;
use crate::config;
use crate::identity::VolumeIdentity;
use crate::record::{Export, ExportRecord, Phase};
use crate::target::lio::{self, Lio, PORTAL_GROUP_TAG, Target, backstore_name};

/// How long others may be busy with a backstore that is shared.
const TURN: Duration = Duration::from_secs(60);
/// How long the kernel may take to close the session of an initiator that has logged out.
const LOGOUT_DEADLINE: Duration = Duration::from_secs(3);
/// How often it is asked.
const LOGOUT_INTERVAL: Duration = Duration::from_millis(20);

/// What exports over iSCSI need.
pub(super) struct Iscsi {
    lio: Lio,
    stuck: Stuck,
    config: Option<config::Iscsi>,
    turns: Turns<String>,
    users: Mutex<HashMap<String, BTreeSet<AttachmentId>>>,
}

impl Iscsi {
    /// Makes the kernel's target ready where the config asks for it. A kernel that lacks it is told in the log now and to
    /// each caller later: volumes can be made all the same.
    /// What hangs in the kernel is entered into `stuck`.
    pub(super) async fn open(config: Option<&config::Iscsi>, records: &[ExportRecord], stuck: Stuck) -> Self {
        let lio = Lio::at(lio::ROOT);
        if config.is_some()
            && let Err(failure) = lio.make_ready().await
        {
            tracing::error!(error = %failure, "this host cannot export over iSCSI yet");
        }
        let mut users = HashMap::<String, BTreeSet<AttachmentId>>::new();
        for record in records {
            if let (Phase::Exporting | Phase::Exported, Some(export)) = (record.phase, &record.export)
                && let Transport::Iscsi(_) = &export.connection.transport
            {
                let name = backstore_name(record.id, export.sharing(), &export.unit_serial);
                users.entry(name).or_default().insert(record.id);
            }
        }
        Self { lio, stuck, config: config.cloned(), turns: Turns::default(), users: Mutex::new(users) }
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
            mutual_chap: Some(MutualChap {
                username: format!("tether-target-{id}"),
                secret: random_secret()?,
            }),
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
        let backstore: [(&'static str, Ensure); 3] = [
            ("create-backstore", |lio, target| lio.ensure_backstore(target)),
            ("create-target", |lio, target| Ok(lio.ensure_target(target)?)),
            ("create-lun", |lio, target| Ok(lio.ensure_lun(target)?)),
        ];
        let doors: [(&'static str, Ensure); 3] = [
            ("create-acl", |lio, target| Ok(lio.ensure_acl(target)?)),
            ("create-portals", Lio::ensure_portals),
            ("enable-target", |lio, target| Ok(lio.ensure_enabled(&target.iqn)?)),
        ];
        let target = Arc::new(target(id, export, iscsi));
        // Once the LUN leads to it, a shared backstore is not taken away by another export that ends.
        let turn = self.turn(&target.backstore).await?;
        self.users().entry(target.backstore.clone()).or_default().insert(id);
        let mut changed = false;
        for (step, ensure) in backstore {
            let (lio, target) = (self.lio.clone(), target.clone());
            changed |= steps.run_blocking(step, move || ensure(&lio, &target)).await?;
        }
        drop(turn);
        for (step, ensure) in doors {
            let (lio, target) = (self.lio.clone(), target.clone());
            changed |= steps.run_blocking(step, move || ensure(&lio, &target)).await?;
        }
        Ok(changed)
    }

    /// Fences and removes whatever there is of a target, and of its backstore unless others share it.
    pub(super) async fn take_away(
        &self,
        steps: &Steps,
        id: AttachmentId,
        export: &Export,
        iqn: &Iqn,
    ) -> Result<(), Failure> {
        type Remove = fn(&Lio, &Iqn) -> Result<bool, Failure>;
        let order: [(&'static str, Remove); 2] = [
            ("fence-target", |lio, iqn| Ok(lio.fence(iqn)?)),
            ("remove-target", |lio, iqn| Ok(lio.remove_target(iqn)?)),
        ];
        for (step, remove) in order {
            let (lio, iqn) = (self.lio.clone(), iqn.clone());
            steps.run_blocking(step, move || remove(&lio, &iqn)).await?;
        }
        let backstore = backstore_name(id, export.sharing(), &export.unit_serial);
        let turn = self.turn(&backstore).await?;
        let shared = {
            let mut users = self.users();
            let left = users.get_mut(&backstore);
            let shared = left.is_some_and(|left| {
                left.remove(&id);
                !left.is_empty()
            });
            if !shared {
                users.remove(&backstore);
            }
            shared
        };
        if !shared {
            let lio = self.lio.clone();
            steps.run_blocking("remove-backstore", move || lio.remove_backstore(&backstore)).await?;
        }
        drop(turn);
        Ok(())
    }

    /// The names of all targets and backstores of the host.
    pub(super) async fn list(&self) -> Result<(Vec<String>, Vec<String>), Failure> {
        let lio = self.lio.clone();
        blocking(KERNEL_DEADLINE, move || lio.list()).await
    }

    /// What the names of our targets begin with.
    pub(super) fn prefix(&self) -> Option<String> {
        self.config.as_ref().map(|config| format!("{}:", config.iqn_prefix))
    }

    async fn turn(&self, backstore: &str) -> Result<Turn, Failure> {
        let turn = self.turns.wait(backstore.to_owned(), TURN).await;
        turn.ok_or_else(|| {
            Failure::new(Reason::OperationRunning, format!("others are busy with {backstore}"))
                .at("wait-turn")
        })
    }

    /// Which exports have which backstore.
    fn users(&self) -> MutexGuard<'_, HashMap<String, BTreeSet<AttachmentId>>> {
        // Each change is one insert or remove; a panic elsewhere cannot leave it half done.
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Before an export ends: its initiator has no session that would end with it. One that has just logged out gets a moment:
    /// the kernel closes its session after it has answered, and tells nobody.
    ///
    /// # Errors
    /// `VOLUME_IN_USE` when it is logged in.
    pub(super) async fn check_logged_out(
        &self,
        steps: &Steps,
        export: &Export,
        iscsi: &IscsiConnection,
    ) -> Result<(), Failure> {
        let (lio, iqn) = (&self.lio, &iscsi.target_iqn);
        let initiator = &export.connector.initiator_iqn;
        let look = async {
            let until = Instant::now() + LOGOUT_DEADLINE;
            let mut pace = interval(LOGOUT_INTERVAL);
            loop {
                pace.tick().await;
                let (lio, asked, name) = (lio.clone(), iqn.clone(), initiator.clone());
                let connected = move || lio.connected(&asked, &name);
                // Not stuck under the export's own key: an Unexport by force may go on while this one waits for the kernel.
                if !self.stuck.blocking(&sessions_of(iqn), "look", connected).await? {
                    return Ok(());
                }
                if Instant::now() >= until {
                    return Err(Failure::new(
                        Reason::VolumeInUse,
                        format!("{initiator} of {} is logged in", export.connector.hostname),
                    )
                    .next(
                        "detach it there first; when that host is lost for good, unexport by force (tether detach --force), \
                         which cuts it off",
                    ));
                }
            }
        };
        steps.run("check-logged-out", look).await
    }

    /// What of an export the kernel lacks; none when it is whole.
    pub(super) async fn lacking(
        &self,
        id: AttachmentId,
        export: &Export,
        iscsi: &IscsiConnection,
    ) -> Result<Option<PathBuf>, Failure> {
        let (lio, target) = (self.lio.clone(), target(id, export, iscsi));
        blocking(KERNEL_DEADLINE, move || lio.lacking(&target)).await
    }

    /// Is the target enabled, and the initiator logged in?
    pub(super) async fn state(&self, export: &Export, iqn: &Iqn) -> Result<(bool, bool), Failure> {
        let (lio, initiator) = (self.lio.clone(), export.connector.initiator_iqn.clone());
        let (key, iqn) = (sessions_of(iqn), iqn.clone());
        let look = move || Ok::<_, Failure>((lio.enabled(&iqn)?, lio.connected(&iqn, &initiator)?));
        self.stuck.blocking(&key, "look", look).await
    }
}

/// The key under which it hangs to ask for a target's sessions.
fn sessions_of(iqn: &Iqn) -> String {
    format!("sessions of {iqn}")
}

/// What the kernel's target is to be.
fn target(id: AttachmentId, export: &Export, iscsi: &IscsiConnection) -> Target {
    Target {
        backstore: backstore_name(id, export.sharing(), &export.unit_serial),
        iqn: iscsi.target_iqn.clone(),
        device: export.device.clone(),
        unit_serial: export.unit_serial.clone(),
        initiator: export.connector.initiator_iqn.clone(),
        chap_username: iscsi.chap_username.clone(),
        chap_secret: iscsi.chap_secret.clone(),
        mutual_chap: iscsi.mutual_chap.clone(),
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
