//! Attachments, sessions and mounts brought back to what the journal says: at start, on SIGHUP and when asked (rule 6). Not
//! here: the steps themselves, which are those of Attach, Detach and ResizeAttachment.
//!
//! After a boot nothing runs that could have a disk of ours, and domains that start by themselves need theirs (F21). So the
//! first start after a boot connects what the journal has before the agent says that it is ready, and systemd starts libvirtd
//! after that. Whether a domain still has its disk is asked once libvirt is there.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tether_agent_core::failure::{Failure, Reason};
use tether_agent_core::force::Force;
use tether_agent_core::operations::RECONCILE;
use tether_agent_core::reconcile::{AT_A_TIME, Findings, TombstoneDays, several};
use tether_agent_core::steps::Steps;
use tether_proto::wire::{Outcome, ReconcileAction, ReconcileResponse};
use tether_proto::{AttachmentId, Transport};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use crate::attach::Known;
use crate::attachments::Attachments;
use crate::record::{Attachment, AttachmentRecord, Phase};

const OBJECT: &str = "attachment";
/// How long guests' start may wait for storage after a boot. What takes longer goes on beside it.
const BOOT_DEADLINE: Duration = Duration::from_secs(60);
/// How often what failed is tried again meanwhile: a storage host that boots beside this one needs longer.
const BOOT_RETRY: Duration = Duration::from_secs(2);
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// What is known of the domains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Domains {
    /// libvirt is asked.
    Asked,
    /// The host was booted, and none of them runs yet.
    Down,
}

impl Attachments {
    /// All attachments, several at a time; one that fails holds up none.
    pub(crate) async fn reconcile(self: &Arc<Self>, dry_run: bool) -> ReconcileResponse {
        if dry_run {
            return self.plan().await.into_response();
        }
        self.work().await.into_response()
    }

    /// Connects what the journal has, if this is the first start since the host was booted. Gives up waiting after a minute.
    pub(crate) async fn reconnect_after_boot(self: &Arc<Self>, state_directory: &Path) {
        let (booted, file) = (std::fs::read_to_string(BOOT_ID), state_directory.join("boot_id"));
        let Ok(booted) = booted.inspect_err(|error| tracing::error!(%error, "the boot id cannot be read"))
        else {
            return;
        };
        if std::fs::read_to_string(&file).is_ok_and(|known| known == booted) {
            return;
        }
        let mut records = self.journal.list();
        records.retain(|record| {
            // One whose detach was refused, or whose attach or detach was cut off, may be in the definition as well; a domain
            // that starts without it does not start. It is finished or taken back once libvirt is there.
            record.attachment.as_ref().is_some_and(|attachment| {
                !attachment.options.live_only
                    && !flush_failed(record.forced, &record.may_be_lost)
                    && (record.phase == Phase::Attached || attachment.plan.is_some())
            })
        });
        let (count, began) = (records.len(), Instant::now());
        let working = tokio::spawn(self.clone().connect_all(records));
        match timeout(BOOT_DEADLINE, working).await {
            Ok(Ok(missing)) => tracing::info!(
                attachments = count,
                failed = missing,
                milliseconds = began.elapsed().as_millis(),
                "the host was booted: connected what its domains need"
            ),
            Ok(Err(error)) => tracing::error!(%error, "connecting after the boot died"),
            Err(_) => tracing::error!(
                seconds = BOOT_DEADLINE.as_secs(),
                "not all storage is connected yet: domains are not held up any longer"
            ),
        }
        if let Err(error) = remember(&file, &booted) {
            tracing::error!(%error, file = %file.display(), "the boot id cannot be written");
        }
    }

    /// Tries each until it is connected, or time does not mend what is wrong, or it has taken so long that domains go first. Gives
    /// how many are not connected.
    async fn connect_all(self: Arc<Self>, records: Vec<AttachmentRecord>) -> usize {
        let until = Instant::now() + BOOT_DEADLINE;
        let (mut trying, turns) = (JoinSet::new(), Arc::new(Semaphore::new(AT_A_TIME)));
        for record in records {
            trying.spawn(self.clone().connect_until(record.id, until, turns.clone()));
        }
        let mut missing = 0;
        while let Some(connected) = trying.join_next().await {
            missing += usize::from(!connected.unwrap_or(false));
        }
        missing
    }

    async fn connect_until(self: Arc<Self>, id: AttachmentId, until: Instant, turns: Arc<Semaphore>) -> bool {
        again_until(until, &turns, || async {
            let one = self.clone();
            let connect =
                move |steps: Steps| async move { one.reconcile_one(&steps, id, Domains::Down).await };
            let outcome = self.operations().run(&id.to_string(), RECONCILE, "boot".to_owned(), connect).await;
            match &outcome {
                Ok(Outcome::Repaired) => tracing::info!(
                    target: "audit",
                    who = "agent",
                    attachment = %id,
                    action = "RESTORE",
                    outcome = "DONE",
                    "audit: change"
                ),
                Ok(_) => {}
                Err(failure) => {
                    let again = time_may_mend(failure);
                    tracing::error!(attachment = %id, again, error = %failure, "not connected after the boot");
                }
            }
            outcome.map(drop)
        })
        .await
    }

    async fn work(self: &Arc<Self>) -> Findings {
        let mut findings = Findings::default();
        let mut work = Vec::new();
        for record in self.journal.list() {
            let Some((action, why)) = called_for(&record, self.tombstones) else {
                findings.unchanged();
                continue;
            };
            let (this, id) = (self.clone(), record.id);
            work.push(async move {
                let one = this.clone();
                let outcome = this
                    .operations()
                    .run(&id.to_string(), RECONCILE, String::new(), move |steps| async move {
                        one.reconcile_one(&steps, id, Domains::Asked).await
                    })
                    .await;
                (id, action, why, outcome)
            });
        }
        for (id, action, why, outcome) in several(work).await {
            match outcome {
                Ok(Outcome::Unchanged) => findings.unchanged(),
                Err(failure) if failure.reason == Reason::AttachmentNotFound => {
                    let why = "its domain has no such disk any more";
                    findings.ended(OBJECT, &id.to_string(), ReconcileAction::Report, why, Err(failure));
                }
                // It was asked, and its caller was told: nobody asks it again and again.
                Err(failure)
                    if action == ReconcileAction::Finish && failure.reason == Reason::GuestHoldsDevice =>
                {
                    findings.ended(OBJECT, &id.to_string(), ReconcileAction::Report, why, Err(failure));
                }
                outcome => findings.ended(OBJECT, &id.to_string(), action, why, outcome.map(drop)),
            }
        }
        findings
    }

    /// What would be done.
    async fn plan(&self) -> Findings {
        let mut findings = Findings::default();
        for record in self.journal.list() {
            let key = record.id.to_string();
            let Some((action, why)) = called_for(&record, self.tombstones) else {
                findings.unchanged();
                continue;
            };
            match (record.phase, &record.attachment) {
                (Phase::Attached, Some(attachment)) => match self.needs(record.id, attachment).await {
                    Ok(None) => findings.unchanged(),
                    Ok(Some((action, why))) => findings.planned(OBJECT, &key, action, why),
                    Err(failure) => findings.unseen(OBJECT, &key, why, &failure),
                },
                _ => findings.planned(OBJECT, &key, action, why),
            }
        }
        findings
    }

    /// What an attachment that is whole in the journal lacks.
    async fn needs(
        &self,
        id: AttachmentId,
        attachment: &Attachment,
    ) -> Result<Option<(ReconcileAction, &'static str)>, Failure> {
        let views = self.views_of(attachment).await?;
        if !views.in_live(id) && !views.in_persistent(id) {
            return Ok(Some((ReconcileAction::Report, "its domain has no such disk any more")));
        }
        if attachment.resizing_to.is_some() {
            return Ok(Some((ReconcileAction::Finish, "its resize was cut off")));
        }
        let connected = self.status(id, Phase::Attached, attachment, &views)?.connected;
        Ok((!connected).then_some((ReconcileAction::Restore, "its session or mount is gone")))
    }

    /// What was read before the operation began may be another by now.
    async fn reconcile_one(
        &self,
        steps: &Steps,
        id: AttachmentId,
        domains: Domains,
    ) -> Result<Outcome, Failure> {
        let key = id.to_string();
        let Some(record) = self.journal.get(&key) else { return Ok(Outcome::Unchanged) };
        match (record.phase, record.attachment) {
            (_, Some(attachment)) if domains == Domains::Down => {
                self.reconnect(steps, id, &attachment, domains).await
            }
            (Phase::Attached, Some(attachment)) => {
                let outcome = self.reconnect(steps, id, &attachment, domains).await?;
                match attachment.resizing_to {
                    Some(size) => Ok(self.do_resize(steps, id, size).await?.0),
                    None => Ok(outcome),
                }
            }
            (Phase::Attaching, Some(attachment)) => {
                let mut stops = Force::off();
                let undone = self.take_away(steps, id, &attachment, self.guest_deadline, &mut stops).await;
                if let Err(mut failure) = undone {
                    failure.undo.extend(self.keep_losses(steps, id, &attachment, &stops).await);
                    return Err(failure);
                }
                let (journal, asked) = (self.journal.clone(), key.clone());
                let removed = steps.run_blocking("undo-write-journal", move || journal.remove(&asked)).await;
                // What has no record has nothing any more, whatever became of the step.
                if self.journal.get(&key).is_none() {
                    self.release(id);
                }
                removed?;
                Ok(Outcome::Removed)
            }
            // Its caller was told that a flush failed: to let go of the storage all the same is for nobody but people.
            (Phase::Detaching, Some(_)) if flush_failed(record.forced, &record.may_be_lost) => {
                let message = format!("its detach stopped: {}", record.may_be_lost.join("; "));
                Err(Failure::new(Reason::FlushFailed, message).at("flush"))
            }
            (Phase::Detaching, Some(_)) => {
                let (outcome, _) = self.do_detach(steps, id, self.guest_deadline, false).await?;
                Ok(outcome)
            }
            (Phase::Ended, _) if self.tombstones.are_past(record.ended) => {
                let journal = self.journal.clone();
                steps.run_blocking("forget", move || journal.remove(&key)).await?;
                Ok(Outcome::Removed)
            }
            _ => Ok(Outcome::Unchanged),
        }
    }

    /// Session or mount of a disk that a domain has, as far as it is gone.
    async fn reconnect(
        &self,
        steps: &Steps,
        id: AttachmentId,
        attachment: &Attachment,
        domains: Domains,
    ) -> Result<Outcome, Failure> {
        let in_live = match domains {
            Domains::Down => false,
            Domains::Asked => {
                let views = steps.run("read-domain", self.views_of(attachment)).await?;
                if !views.in_live(id) && !views.in_persistent(id) {
                    return Err(Failure::new(
                        Reason::AttachmentNotFound,
                        format!("domain {} has no disk of attachment {id}", attachment.domain_name),
                    )
                    .next(format!("end the attachment: tether detach {id}")));
                }
                views.in_live(id)
            }
        };
        let size = attachment.connection.size;
        // An extension of which this host was not told yet does not keep a domain from its disk.
        let known = Known { fresh: false, in_live, phase: Phase::Attached, size, may_be_larger: true };
        let disk = match &attachment.connection.transport {
            Transport::Iscsi(iscsi) => self.connect_iscsi(steps, id, attachment, iscsi, known).await?,
            Transport::Nfs(nfs) => self.connect_nfs(steps, id, attachment, nfs, known).await?,
        };
        Ok(if disk.connected { Outcome::Repaired } else { Outcome::Unchanged })
    }
}

/// What may be lost without force is what a flush did not write.
fn flush_failed(forced: bool, may_be_lost: &[String]) -> bool {
    !forced && !may_be_lost.is_empty()
}

fn called_for(
    record: &AttachmentRecord,
    tombstones: TombstoneDays,
) -> Option<(ReconcileAction, &'static str)> {
    match record.phase {
        Phase::Attached => Some((ReconcileAction::Restore, "its session, mount or resize was not complete")),
        Phase::Attaching => Some((ReconcileAction::Undo, "its attach was cut off")),
        Phase::Detaching if flush_failed(record.forced, &record.may_be_lost) => {
            Some((ReconcileAction::Report, "its detach stopped at a flush that failed"))
        }
        Phase::Detaching => Some((ReconcileAction::Finish, "its detach was cut off")),
        Phase::Ended if tombstones.are_past(record.ended) => {
            Some((ReconcileAction::Forget, "it ended long ago"))
        }
        Phase::Ended => None,
    }
}

/// Tries, in turns, until it succeeds, or fails of what time does not mend, or it is too late for another try. One that fails
/// holds up no other's next try.
async fn again_until<T: Future<Output = Result<(), Failure>>>(
    until: Instant,
    turns: &Semaphore,
    attempt: impl Fn() -> T,
) -> bool {
    let mut pace = interval(BOOT_RETRY);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        pace.tick().await;
        // Nobody closes it.
        let _turn = turns.acquire().await;
        if Instant::now() >= until {
            return false;
        }
        match attempt().await {
            Ok(()) => return true,
            Err(failure) if !time_may_mend(&failure) => return false,
            Err(_) => {}
        }
    }
}

/// A program that hangs comes back, perhaps; and a storage host that boots beside this one may share the empty directory below a
/// file system that it has not mounted yet, where a file is missing.
fn time_may_mend(failure: &Failure) -> bool {
    failure.reason.retry_after().is_some() || matches!(failure.reason, Reason::Stuck | Reason::WrongDevice)
}

/// Puts the boot id where the next start finds it. Losing it to a power cut is no harm: then the host was booted.
fn remember(file: &PathBuf, booted: &str) -> std::io::Result<()> {
    let temporary = file.with_extension("tmp");
    std::fs::write(&temporary, booted)?;
    std::fs::rename(&temporary, file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    /// Tries with these outcomes in turn, and the last one for ever. Says whether it succeeded, after how many tries and how long.
    async fn tried(outcomes: &[Result<(), Reason>]) -> (bool, usize, Duration) {
        let (began, tries, turns) = (Instant::now(), Cell::new(0), Semaphore::new(1));
        let connected = again_until(began + BOOT_DEADLINE, &turns, || {
            let outcome = outcomes[tries.get().min(outcomes.len() - 1)];
            tries.set(tries.get() + 1);
            async move { outcome.map_err(|reason| Failure::new(reason, "no")) }
        });
        (connected.await, tries.get(), began.elapsed())
    }

    #[tokio::test(start_paused = true)]
    async fn f21_after_a_boot_what_time_mends_is_tried_until_domains_go_first_and_nothing_else_twice() {
        let away = Err(Reason::PortalUnreachable);
        assert_eq!(tried(&[Ok(())]).await, (true, 1, Duration::ZERO));
        assert_eq!(tried(&[away, away, Ok(())]).await, (true, 3, 2 * BOOT_RETRY));
        assert_eq!(tried(&[away, Err(Reason::ChapRejected)]).await, (false, 2, BOOT_RETRY));
        assert_eq!(
            tried(&[Err(Reason::Stuck), Err(Reason::WrongDevice), Ok(())]).await,
            (true, 3, 2 * BOOT_RETRY)
        );
        let tries = (BOOT_DEADLINE.as_secs() / BOOT_RETRY.as_secs()) as usize;
        assert_eq!(tried(&[away]).await, (false, tries, BOOT_DEADLINE));
    }

    #[tokio::test(start_paused = true)]
    async fn f21_one_whose_turn_comes_too_late_is_not_tried() {
        let turns = Semaphore::new(1);
        let held = turns.acquire().await;
        let until = Instant::now() + BOOT_DEADLINE;
        let waiting = again_until(until, &turns, || async { panic!("it has no turn") });
        let freed = async {
            tokio::time::sleep_until(until).await;
            drop(held);
        };
        assert!(!tokio::join!(waiting, freed).0);
    }
}
