//! One controller: carries out its orders one after the other, calls again what was cut off until there is an answer, and
//! compares each answer, and then what the agents show, with the model.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tether_proto::wire::{self, Outcome};

use super::caller::{Caller, Place, Reply, read};
use super::contest::Contest;
use super::mismatch::Mismatch;
use super::model::{Answer, Attachment, Call, Phase, Prediction, Volume, permits};
use super::plan::{Order, Verb};
use super::record::Record;
use super::weather::Weather;
use crate::progress::pause;

/// A call is answered within this, whatever happens to the hosts.
const ANSWERED: Duration = Duration::from_secs(180);
/// Between two tries of a call.
const TRY_AGAIN: Duration = Duration::from_millis(300);

/// One of its volumes.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) place: Place,
    pub(crate) model: Volume,
    pub(crate) contest: Option<Arc<Contest>>,
    /// What Export answered, by attachment.
    pub(crate) connections: HashMap<String, wire::ConnectionInfo>,
}

/// A controller.
#[derive(Debug)]
pub(crate) struct Controller {
    pub(crate) number: usize,
    /// It uses the `tether` command for what that does; the others speak gRPC alone.
    pub(crate) by_command: bool,
    pub(crate) caller: Caller,
    pub(crate) slots: Vec<Slot>,
    pub(crate) weather: Arc<Weather>,
    pub(crate) record: Arc<Record>,
}

/// One or two calls that are made and answered as one.
#[derive(Debug)]
struct Step {
    calls: Vec<Call>,
    allowed: Vec<Answer>,
    /// How the `tether` command is told to do it.
    command: Option<Vec<String>>,
}

impl Controller {
    /// Carries out one order.
    ///
    /// # Errors
    /// A [`Mismatch`], or the hosts cannot be reached at all.
    pub(crate) async fn carry_out(&mut self, order: Order) -> anyhow::Result<()> {
        let slot = &self.slots[order.volume];
        let predictions = slot.model.predict(order.verb);
        let late = [Verb::LateExport, Verb::LateAttach, Verb::LateDetach, Verb::LateUnexport];
        let late = late.contains(&order.verb) && !predictions.is_empty();
        self.record.line(format!("controller {}: {} {order}", self.number, slot.place.path()));
        for step in self.steps(order.volume, predictions) {
            if !self.take(order.volume, step, order.twice).await? {
                break;
            }
        }
        self.record.count(|counts| {
            counts.orders += 1;
            counts.late += usize::from(late);
        });
        self.compare(order.volume).await
    }

    /// Takes back all that this controller has, and deletes its volumes.
    ///
    /// # Errors
    /// As [`Controller::carry_out`].
    pub(crate) async fn clean_up(&mut self) -> anyhow::Result<()> {
        for volume in 0..self.slots.len() {
            for verb in [Verb::Detach, Verb::Delete] {
                self.carry_out(Order { volume, verb, twice: false }).await?;
            }
        }
        Ok(())
    }

    /// What is called alone, and what the command does in one go.
    fn steps(&self, volume: usize, predictions: Vec<Prediction>) -> Vec<Step> {
        let place = &self.slots[volume].place;
        let path = place.path();
        let mut steps = Vec::new();
        let mut rest = predictions.as_slice();
        while let [first, others @ ..] = rest {
            let (taken, command) = match (&first.call, others) {
                _ if !self.by_command => (1, None),
                (Call::Export(id), [Prediction { call: Call::Attach(_, domain), .. }, ..]) => {
                    (2, Some(attach_command(place, domain, id)))
                }
                // A late one: over gRPC it would need what Export answered, which the command keeps to itself.
                (Call::Attach(id, domain), _) => (1, Some(attach_command(place, domain, id))),
                (Call::Detach(id), [Prediction { call: Call::Unexport(_), .. }, ..]) => {
                    (2, Some(vec!["detach".to_owned(), id.clone()]))
                }
                (Call::Extend(size), others) => {
                    let command = ["volume", "extend", &path, &size.to_string()].map(str::to_owned);
                    (1 + others.len(), Some(command.to_vec()))
                }
                (Call::Create(size), _) => {
                    (1, Some(["volume", "create", &path, &size.to_string()].map(str::to_owned).to_vec()))
                }
                (Call::Delete, _) => (1, Some(["volume", "delete", &path].map(str::to_owned).to_vec())),
                _ => (1, None),
            };
            let (now, later) = rest.split_at(taken);
            rest = later;
            let mut allowed = now.last().map(|p| p.allowed.clone()).unwrap_or_default();
            if let (Call::Extend(_) | Call::Detach(_), 2) = (&first.call, taken) {
                // The command tells the outcome of the first of both.
                allowed.clone_from(&first.allowed);
            } else {
                // It may get no further than the first, and only then.
                let goes_on = first.allowed.iter().any(|answer| matches!(answer, Answer::Done(_)));
                allowed.retain(|_| goes_on || taken == 1);
                allowed.extend(first.allowed.iter().filter(|a| matches!(a, Answer::Refused(_))).cloned());
            }
            steps.push(Step { calls: now.iter().map(|p| p.call.clone()).collect(), allowed, command });
        }
        steps
    }

    /// Makes the calls of one step until they are answered, and learns from the answer. False when they were refused.
    async fn take(&mut self, volume: usize, mut step: Step, twice: bool) -> anyhow::Result<bool> {
        let began = Instant::now();
        let contest = self.slots[volume].contest.clone();
        let mut tick = contest.as_ref().map(|contest| begin(contest, &step.calls));
        let mut cut_off = false;
        let (replies, number) = loop {
            let number = self.record.command(&self.describe(volume, &step));
            let replies = match twice {
                true => {
                    let (one, two) = tokio::join!(self.once(volume, &step), self.once(volume, &step));
                    vec![one, two]
                }
                false => vec![self.once(volume, &step).await],
            };
            let calm = self.weather.calm_since(began);
            cut_off |= self.weather.struck_since(began);
            let Some(why) = replies.iter().find_map(|reply| match reply {
                Reply::Passing(why) => Some(why.clone()),
                Reply::Answer(..) => None,
            }) else {
                break (replies, number);
            };
            self.record.line(format!("controller {}: try again: {why}", self.number));
            self.record.count(|counts| counts.retries += 1);
            // Others of a shared volume are in the way at times.
            let expected = !calm || (contest.is_some() && why.starts_with("OPERATION_RUNNING"));
            if !expected || began.elapsed() > ANSWERED {
                let seconds = began.elapsed().as_secs();
                return Err(self.mismatch(number, volume, &step, &format!("after {seconds} s: {why}")));
            }
            cut_off = true;
            if let Some(again) = self.start_over(volume, &step).await? {
                if let (Some(contest), Some(_)) = (&contest, tick) {
                    for call in &step.calls {
                        if let Call::Export(id) = call {
                            let gone = Call::Unexport(id.clone());
                            let begin = contest.begin(&gone);
                            contest
                                .end(begin, &gone, &Answer::Done(Outcome::Removed), None)
                                .map_err(|why| self.mismatch(number, volume, &step, &why))?;
                        }
                    }
                    tick = Some(begin(contest, &again.calls));
                }
                step = again;
            }
            pause(TRY_AGAIN).await;
        };
        self.judge(volume, &step, replies, number, cut_off, contest.as_deref().zip(tick))
    }

    fn judge(
        &mut self,
        volume: usize,
        step: &Step,
        replies: Vec<Reply>,
        number: usize,
        cut_off: bool,
        contest: Option<(&Contest, u64)>,
    ) -> anyhow::Result<bool> {
        let joined = replies.len() > 1;
        let mut done = true;
        // Of two at once one does it, and the other joins it or comes after it.
        let right = replies.iter().any(
            |reply| matches!(reply, Reply::Answer(answer, _) if permits(&step.allowed, answer, cut_off)),
        );
        for reply in replies {
            let Reply::Answer(answer, facts) = reply else { continue };
            self.record.line(format!("controller {}: {answer:?}", self.number));
            if !right || !permits(&step.allowed, &answer, cut_off || joined) {
                return Err(self.mismatch(number, volume, step, &format!("{answer:?}")));
            }
            done &= matches!(answer, Answer::Done(_));
            for call in &step.calls {
                if let Some((contest, tick)) = contest
                    && let Err(why) = contest.end(tick, call, &answer, facts.size)
                {
                    return Err(self.mismatch(number, volume, step, &why));
                }
                self.slots[volume].model.learn(call, &answer, facts.size);
                self.record.count(|counts| match (call, &answer) {
                    (Call::Attach(..), Answer::Done(Outcome::Created)) => counts.attached += 1,
                    (Call::Overfill, Answer::Refused(_)) => counts.full_pools += 1,
                    (Call::Export(_), Answer::Refused(why)) if why == "VOLUME_EXPORTED" => {
                        counts.second_writers += 1;
                    }
                    _ => {}
                });
                if let (Call::Export(id), Some(info)) = (call, &facts.connection_info) {
                    self.slots[volume].connections.insert(id.clone(), info.clone());
                }
            }
        }
        Ok(done)
    }

    async fn once(&self, volume: usize, step: &Step) -> Reply {
        self.weather.call_begins();
        self.record.count(|counts| counts.calls += 1);
        let slot = &self.slots[volume];
        let reply = match (&step.command, &step.calls[0]) {
            (Some(command), _) => self.caller.command(command).await,
            (None, call @ Call::Attach(id, _)) => {
                self.caller.send(&slot.place, call, slot.connections.get(id)).await
            }
            (None, call) => self.caller.send(&slot.place, call, None).await,
        };
        self.weather.call_ends();
        reply
    }

    /// An attach by the command that failed has spent its id, or not: it is ended for certain, and begun under a new one.
    async fn start_over(&self, volume: usize, step: &Step) -> anyhow::Result<Option<Step>> {
        let (Some(_), [Call::Export(id), Call::Attach(_, domain)]) = (&step.command, step.calls.as_slice())
        else {
            return Ok(None);
        };
        if self.slots[volume].model.attachment.as_ref().is_some_and(|attachment| attachment.id == *id) {
            return Ok(None);
        }
        let began = Instant::now();
        let detach = ["detach".to_owned(), id.clone()];
        loop {
            let number =
                self.record.command(&format!("controller {}: tether {}", self.number, detach.join(" ")));
            match self.caller.command(&detach).await {
                Reply::Answer(Answer::Done(_), _) => break,
                Reply::Answer(Answer::Refused(reason), _) if reason == "ATTACHMENT_NOT_FOUND" => break,
                reply if began.elapsed() > ANSWERED => {
                    return Err(self.mismatch(number, volume, step, &format!("detach: {reply:?}")));
                }
                reply => self.record.line(format!("controller {}: try again: {reply:?}", self.number)),
            }
            pause(TRY_AGAIN).await;
        }
        let id = uuid::Uuid::new_v4().to_string();
        let command = Some(attach_command(&self.slots[volume].place, domain, &id));
        let calls = vec![Call::Export(id.clone()), Call::Attach(id, domain)];
        Ok(Some(Step { calls, allowed: step.allowed.clone(), command }))
    }

    /// Compares what the agents show of a volume and its attachment with the model.
    async fn compare(&self, volume: usize) -> anyhow::Result<()> {
        let began = Instant::now();
        loop {
            let (expected, seen) = self.look(volume).await;
            if seen.as_ref() == Ok(&expected) {
                return Ok(());
            }
            // A disturbance may have struck while it was read, and sessions may still be on their way back.
            if self.weather.calm_since(began) || began.elapsed() > ANSWERED {
                let seen = seen.unwrap_or_else(|problem| problem);
                let number = self.record.counts().calls;
                return Err(Mismatch::error(
                    number,
                    &self.slots[volume].place.path(),
                    &expected,
                    &seen,
                    &self.record,
                ));
            }
            pause(TRY_AGAIN).await;
        }
    }

    async fn look(&self, volume: usize) -> (String, Result<String, String>) {
        let Slot { place, model, .. } = &self.slots[volume];
        let id = model.attachment.as_ref().map(|attachment| attachment.id.clone());
        let alone = !model.shared || id.is_some();
        let mut expected = String::new();
        if alone {
            let size = model.size.map_or("none".to_owned(), |size| size.to_string());
            expected = format!("volume {size} exported for {}; ", id.as_deref().unwrap_or("nobody"));
        }
        if let Some(Attachment { domain, phase, .. }) = &model.attachment {
            let compute = match phase {
                Phase::Attached => {
                    format!("attached to {domain}, connected, live {}, persistent", *domain != "empty")
                }
                Phase::Released => "ended".to_owned(),
                Phase::Exported => "none".to_owned(),
            };
            expected += &format!("export exported, enabled true; attachment {compute}");
        }
        (expected, self.seen(place, id, alone).await)
    }

    async fn seen(&self, place: &Place, id: Option<String>, alone: bool) -> Result<String, String> {
        let problem = |error: anyhow::Error| format!("{error:#}");
        let mut seen = String::new();
        if alone {
            let request = wire::GetVolumeRequest { pool: place.pool.to_owned(), volume: place.name.clone() };
            let volume =
                read(self.caller.tether.storage().await.map_err(problem)?.get_volume(request).await)?;
            let size = volume.as_ref().map_or("none".to_owned(), |volume| volume.size_bytes.to_string());
            let user = volume.map(|volume| volume.exported_for.join(", ")).filter(|user| !user.is_empty());
            seen = format!("volume {size} exported for {}; ", user.as_deref().unwrap_or("nobody"));
        }
        let Some(attachment_id) = id else { return Ok(seen) };
        let request = wire::GetExportRequest { attachment_id: attachment_id.clone() };
        let export = read(self.caller.tether.storage().await.map_err(problem)?.get_export(request).await)?;
        let request = wire::GetAttachmentRequest { attachment_id };
        let status =
            read(self.caller.tether.compute().await.map_err(problem)?.get_attachment(request).await)?;
        let export = export.map_or("none".to_owned(), |e| format!("{}, enabled {}", e.phase, e.enabled));
        let compute = match status {
            None => "none".to_owned(),
            Some(status) if status.phase == "ended" => status.phase,
            Some(status) => {
                let word = |holds: bool, word: &'static str| if holds { word } else { "not so" };
                let (connected, persistent) = (
                    word(status.connected, "connected"),
                    word(status.in_persistent_definition, "persistent"),
                );
                let (phase, domain, live) = (status.phase, status.domain, status.in_live_domain);
                format!("{phase} to {domain}, {connected}, live {live}, {persistent}")
            }
        };
        Ok(format!("{seen}export {export}; attachment {compute}"))
    }

    fn describe(&self, volume: usize, step: &Step) -> String {
        let what = match &step.command {
            Some(command) => format!("tether {}", command.join(" ")),
            None => format!("{:?}", step.calls[0]),
        };
        format!("controller {}: {}: {what}", self.number, self.slots[volume].place.path())
    }

    fn mismatch(&self, number: usize, volume: usize, step: &Step, seen: &str) -> anyhow::Error {
        let expected = format!("one of {:?}", step.allowed);
        Mismatch::error(number, &self.describe(volume, step), &expected, seen, &self.record)
    }
}

fn attach_command(place: &Place, domain: &str, id: &str) -> Vec<String> {
    let bus = if place.bus == wire::DiskBus::Scsi { "scsi" } else { "virtio" };
    ["attach", &place.path(), domain, "--bus", bus, "--id", id].map(str::to_owned).to_vec()
}

/// All calls of a step begin; the first tick counts.
fn begin(contest: &Contest, calls: &[Call]) -> u64 {
    calls.iter().map(|call| contest.begin(call)).min().unwrap_or_default()
}
