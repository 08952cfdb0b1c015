//! Volumes whose creation, deletion or extension was cut off: taken back or brought to their end, at start, on SIGHUP and
//! when asked (rule 6). Not here: the steps themselves.

use std::collections::BTreeMap;
use std::sync::Arc;

use tether_agent_core::failure::{Failure, Reason};
use tether_agent_core::operations::RECONCILE;
use tether_agent_core::reconcile::{Findings, several};
use tether_agent_core::steps::Steps;
use tether_proto::wire::ReconcileAction;
use tether_proto::{ByteSize, VolumeFormat, VolumeKey};

use super::record::{FilePhase, FileRecord, OperationRecord, VolumeOperation, journal_key};
use super::{Volumes, find};
use crate::claims::Claim;
use crate::lvm::{EXTENTS_PREFIX, Lvm, UNWIPED_PREFIX};
use crate::pool::Pool;

const OBJECT: &str = "volume";

/// What was cut off.
#[derive(Debug, Clone)]
enum CutOff {
    Creation,
    Deletion,
    Extension(ByteSize),
    /// Of an extension that the journal does not know (any more).
    Extents,
}

/// What became of one of them: the volume, what was to be done, why, and the outcome.
type Ended = (String, ReconcileAction, &'static str, Result<(), Failure>);

impl CutOff {
    fn called_for(&self) -> (ReconcileAction, &'static str) {
        match self {
            Self::Creation => (ReconcileAction::Undo, "its creation was cut off"),
            Self::Deletion => (ReconcileAction::Finish, "its deletion was cut off"),
            Self::Extension(_) => (ReconcileAction::Finish, "its extension was cut off"),
            Self::Extents => (ReconcileAction::Undo, "an extension of it was cut off"),
        }
    }
}

impl Volumes {
    /// All volumes, several at a time; one that fails or hangs holds up none.
    pub(crate) async fn reconcile(self: &Arc<Self>, dry_run: bool) -> Findings {
        let mut findings = Findings::default();
        let mut work: Vec<(VolumeKey, CutOff)> = Vec::new();
        for record in self.pools.files.list() {
            match self.cut_off(&record) {
                Some(what) => work.push((record.volume, what)),
                None => findings.unchanged(),
            }
        }
        let extensions = self.pools.extensions.list().into_iter();
        work.extend(extensions.map(|record| (record.volume, CutOff::Extension(record.to))));
        for record in self.pools.operations.list() {
            let what = match record.operation {
                VolumeOperation::Create => CutOff::Creation,
                VolumeOperation::Delete => CutOff::Deletion,
            };
            work.push((record.volume, what));
        }
        for (name, pool) in self.pools.iter() {
            let Pool::Logical(lvm) = pool else { continue };
            match lvm.list().await {
                Ok(volumes) => {
                    // Of an agent whose journal is gone.
                    for lv in volumes.into_iter().filter(|lv| lv.ours) {
                        let key = |prefix: &str| {
                            let volume = lv.name.strip_prefix(prefix)?.parse().ok()?;
                            Some(VolumeKey { pool: name.clone(), volume })
                        };
                        if let Some(key) = key(UNWIPED_PREFIX)
                            && self.pools.operations.get(&journal_key(&key)).is_none()
                        {
                            work.push((key, CutOff::Creation));
                        }
                        if let Some(key) = key(EXTENTS_PREFIX)
                            && self.pools.extensions.get(&journal_key(&key)).is_none()
                        {
                            work.push((key, CutOff::Extents));
                        }
                    }
                }
                Err(failure) => {
                    let why = "whether a creation in it was cut off cannot be seen";
                    if dry_run {
                        findings.unseen("pool", name.as_str(), why, &failure.into());
                        continue;
                    }
                    findings.ended("pool", name.as_str(), ReconcileAction::Report, why, Err(failure.into()));
                }
            }
        }
        // Of one volume there may be several: they come one after the other, each with its own outcome.
        let mut called_for = BTreeMap::<VolumeKey, Vec<CutOff>>::new();
        for (key, what) in work {
            if dry_run {
                let (action, why) = what.called_for();
                findings.planned(OBJECT, &key.to_string(), action, why);
            } else {
                called_for.entry(key).or_default().push(what);
            }
        }
        let working = called_for.into_iter().map(|(key, all)| self.clone().reconcile_volume(key, all));
        for (name, action, why, outcome) in several(working).await.into_iter().flatten() {
            findings.ended(OBJECT, &name, action, why, outcome);
        }
        findings
    }

    async fn reconcile_volume(self: Arc<Self>, key: VolumeKey, all: Vec<CutOff>) -> Vec<Ended> {
        let mut ended = Vec::new();
        for what in all {
            let (action, why) = what.called_for();
            let (one, name, of) = (self.clone(), key.to_string(), key.clone());
            let outcome = self
                .operations
                .run(&name, RECONCILE, format!("{what:?}"), move |steps| async move {
                    one.reconcile_one(&steps, &of, what).await
                })
                .await;
            ended.push((name, action, why, outcome));
        }
        ended
    }

    fn cut_off(&self, record: &FileRecord) -> Option<CutOff> {
        match (record.phase, record.extending_to) {
            (FilePhase::Creating, _) => Some(CutOff::Creation),
            (FilePhase::Deleting, _) => Some(CutOff::Deletion),
            (FilePhase::Ready, None) => None,
            (FilePhase::Ready, Some(size)) => {
                // A qcow2 file that is exported is the compute host's to grow.
                let place = self.pools.get(&record.volume.pool).map(|pool| pool.place(&record.volume.volume));
                let exported = place.is_ok_and(|place| !self.claims.exported_for(&place).is_empty());
                (record.format == VolumeFormat::Raw || !exported).then_some(CutOff::Extension(size))
            }
        }
    }

    async fn reconcile_one(&self, steps: &Steps, key: &VolumeKey, what: CutOff) -> Result<(), Failure> {
        let pool = self.pools.of(key)?;
        let place = pool.place(&key.volume);
        // What was read before this operation began may have ended since, and the name may be another volume's.
        if !self.still_calls_for(key, &what) {
            return Ok(());
        }
        match (what, pool) {
            (CutOff::Extension(_), Pool::Logical(lvm)) if self.is_of_another(key, lvm).await? => {
                self.claims.begin_extension(&place).map_err(|failure| failure.at("validate"))?;
                let removed = self.remove_extents(steps, lvm, key).await;
                self.claims.end_extension(&place);
                removed?;
                let record = journal_key(key);
                self.journal(steps, "close-journal", move |pools| pools.extensions.remove(&record)).await
            }
            (CutOff::Extension(size), pool) => match self.finish_extension(steps, key, pool, size).await {
                // The volume was deleted meanwhile: nothing is to be wiped any more.
                Err(failure) if failure.reason == Reason::VolumeNotFound => {
                    let record = journal_key(key);
                    self.journal(steps, "close-journal", move |pools| pools.extensions.remove(&record)).await
                }
                outcome => outcome,
            },
            (CutOff::Extents, Pool::Logical(lvm)) => {
                self.claims.begin_extension(&place).map_err(|failure| failure.at("validate"))?;
                let removed = self.remove_extents(steps, lvm, key).await;
                self.claims.end_extension(&place);
                removed
            }
            (CutOff::Extents, Pool::Directory(_)) => Ok(()),
            (CutOff::Creation, Pool::Logical(lvm)) => {
                self.claims.claim(&place, Claim::Creation).map_err(|failure| failure.at("validate"))?;
                let removed = async {
                    match lvm.find(&format!("{UNWIPED_PREFIX}{}", key.volume)).await? {
                        Some(lv) => self.remove_leftover(steps, lvm, &lv).await,
                        None => Ok(()),
                    }
                };
                let removed = async {
                    removed.await?;
                    // One that has its own name is whole: its caller is told so when it asks again.
                    if lvm.find(key.volume.as_str()).await?.is_none() {
                        self.forget_multi_attach(steps, key).await?;
                    }
                    self.end(steps, "close-journal", key).await
                };
                let removed = removed.await;
                self.claims.release(&place, Claim::Creation);
                removed
            }
            (CutOff::Creation, Pool::Directory(directory)) => {
                steps.run("check-pool", self.pools.use_directory(&key.pool, directory)).await?;
                self.claims.claim(&place, Claim::Creation).map_err(|failure| failure.at("validate"))?;
                let cleared = match self.pools.file(key) {
                    Some(record) if record.phase == FilePhase::Creating => {
                        self.clear_leftover(steps, directory, &record).await
                    }
                    _ => Ok(()),
                };
                self.claims.release(&place, Claim::Creation);
                cleared
            }
            (CutOff::Deletion, Pool::Directory(directory)) => {
                self.delete_file(steps, key, directory, None).await.map(drop)
            }
            (CutOff::Deletion, Pool::Logical(lvm)) if !self.is_recorded(key, lvm).await? => {
                self.end(steps, "close-journal", key).await
            }
            (CutOff::Deletion, Pool::Logical(lvm)) => {
                match self.delete_logical(steps, key, lvm, None).await {
                    // Somebody has begun to use it since: then it is not to go any more.
                    Err(failure)
                        if matches!(failure.reason, Reason::VolumeExported | Reason::VolumeInUse) =>
                    {
                        self.end(steps, "undo-write-journal", key).await
                    }
                    outcome => outcome.map(drop),
                }
            }
        }
    }

    /// Is the LV for which an extension was written down gone, or another one of its name?
    async fn is_of_another(&self, key: &VolumeKey, lvm: &Lvm) -> Result<bool, Failure> {
        let Some(record) = self.pools.extensions.get(&journal_key(key)) else { return Ok(false) };
        Ok(lvm.find(key.volume.as_str()).await?.is_none_or(|lv| lv.uuid != record.uuid))
    }

    /// Extends as far as it was told, or as far as its compute host has grown it, which may be further.
    async fn finish_extension(
        &self,
        steps: &Steps,
        key: &VolumeKey,
        pool: &Pool,
        size: ByteSize,
    ) -> Result<(), Failure> {
        let size = match pool {
            Pool::Logical(_) => size,
            Pool::Directory(directory) => {
                find::file(&self.pools, directory, key).await?.exported_size().max(size)
            }
        };
        self.do_extend(steps, key, size).await.map(drop)
    }

    /// Does the journal still say so? A creation is safe to look at in any case: only what is not named yet is taken back.
    fn still_calls_for(&self, key: &VolumeKey, what: &CutOff) -> bool {
        let (name, file) = (journal_key(key), self.pools.file(key));
        let deletes = |record: OperationRecord| record.operation == VolumeOperation::Delete;
        match what {
            CutOff::Creation => true,
            CutOff::Extents => self.pools.extensions.get(&name).is_none(),
            CutOff::Deletion => {
                file.is_some_and(|record| record.phase == FilePhase::Deleting)
                    || self.pools.operations.get(&name).is_some_and(deletes)
            }
            CutOff::Extension(size) => {
                file.is_some_and(|record| record.extending_to == Some(*size))
                    || self.pools.extensions.get(&name).is_some_and(|record| record.to == *size)
            }
        }
    }

    /// Is the LV of that name the one whose deletion was cut off? One that is not there is, too: what goes with it is forgotten.
    async fn is_recorded(&self, key: &VolumeKey, lvm: &Lvm) -> Result<bool, Failure> {
        let wanted = self.pools.operations.get(&journal_key(key)).and_then(|record| record.uuid);
        let found = lvm.find(key.volume.as_str()).await?;
        Ok(found.is_none_or(|lv| wanted.as_ref().is_none_or(|uuid| *uuid == lv.uuid)))
    }
}
