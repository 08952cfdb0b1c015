//! What is known of one volume and its attachment, what each verb then calls, and which answers may come.
//!
//! Of a volume of its own a controller knows all, so each call has one right answer. Of a shared one it knows what it
//! holds itself; what the others do to it is judged in `contest`. Not here: calling (`controller`).

use tether_proto::wire::Outcome;
use uuid::Uuid;

use super::plan::{NEW_SIZE, Verb};

/// What is asked of an agent, about the volume that the model is of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Call {
    /// StorageAgent.CreateVolume with this size.
    Create(u64),
    /// StorageAgent.CreateVolume of another volume that is larger than its pool.
    Overfill,
    /// StorageAgent.ExtendVolume.
    Extend(u64),
    /// StorageAgent.DeleteVolume.
    Delete,
    /// StorageAgent.Export under this id.
    Export(String),
    /// ComputeAgent.Attach of this id to this domain, with what Export answered.
    Attach(String, &'static str),
    /// ComputeAgent.ResizeAttachment to this size.
    Resize(String, u64),
    /// ComputeAgent.Detach.
    Detach(String),
    /// StorageAgent.Unexport.
    Unexport(String),
}

/// An answer, as far as it is judged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    /// Done, with this outcome.
    Done(Outcome),
    /// Refused, for this reason.
    Refused(String),
}

/// One call and the answers that may come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Prediction {
    pub(crate) call: Call,
    pub(crate) allowed: Vec<Answer>,
}

/// Where the present attachment is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Exported, and not attached yet.
    Exported,
    /// A disk of its domain.
    Attached,
    /// Detached; the export is still there.
    Released,
}

/// An attachment that has not ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Attachment {
    pub(crate) id: String,
    pub(crate) domain: &'static str,
    pub(crate) phase: Phase,
}

/// A volume as its controller knows it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Volume {
    /// Its size; nothing when it is not there. Of a shared volume: the size that was last seen.
    pub(crate) size: Option<u64>,
    /// This controller's attachment.
    pub(crate) attachment: Option<Attachment>,
    /// Attachments that have ended, the latest last.
    pub(crate) ended: Vec<Attachment>,
    /// Other controllers work on it, too.
    pub(crate) shared: bool,
}

const CREATED: Answer = Answer::Done(Outcome::Created);
const UNCHANGED: Answer = Answer::Done(Outcome::Unchanged);
const REPAIRED: Answer = Answer::Done(Outcome::Repaired);
const REMOVED: Answer = Answer::Done(Outcome::Removed);

fn refused(reason: &str) -> Answer {
    Answer::Refused(reason.to_owned())
}

fn one(call: Call, answer: Answer) -> Prediction {
    Prediction { call, allowed: vec![answer] }
}

impl Volume {
    /// The calls of a verb, each made only when the one before it was done, and their answers.
    pub(crate) fn predict(&self, verb: Verb) -> Vec<Prediction> {
        match verb {
            Verb::Create => vec![self.create()],
            Verb::Overfill => vec![one(Call::Overfill, refused("POOL_FULL"))],
            Verb::Extend(size) => self.extend(size),
            Verb::Delete => vec![self.delete()],
            Verb::Attach(domain) => self.attach(domain),
            Verb::Detach => self.detach(),
            Verb::Release => {
                self.detach().into_iter().filter(|p| matches!(p.call, Call::Detach(_))).collect()
            }
            Verb::UnexportLate => match &self.attachment {
                Some(Attachment { phase: Phase::Attached, .. }) => Vec::new(),
                Some(Attachment { id, .. }) => vec![one(Call::Unexport(id.clone()), REMOVED)],
                // An id that was never used is spent by that.
                None => vec![one(Call::Unexport(new_id()), UNCHANGED)],
            },
            Verb::Repeat => self.repeat(),
            Verb::LateExport => self.late(|ended| one(Call::Export(ended.id), refused("ATTACHMENT_ENDED"))),
            Verb::LateAttach => {
                self.late(|ended| one(Call::Attach(ended.id, ended.domain), refused("ATTACHMENT_ENDED")))
            }
            Verb::LateDetach => self.late(|ended| one(Call::Detach(ended.id), UNCHANGED)),
            Verb::LateUnexport => self.late(|ended| one(Call::Unexport(ended.id), UNCHANGED)),
        }
    }

    fn holds(&self) -> bool {
        self.attachment.is_some()
    }

    fn create(&self) -> Prediction {
        let different = refused("DIFFERENT_PARAMETERS");
        let allowed = match self.size {
            _ if self.shared && !self.holds() => vec![CREATED, UNCHANGED, different],
            None => vec![CREATED],
            Some(NEW_SIZE) => vec![UNCHANGED],
            Some(_) => vec![different],
        };
        Prediction { call: Call::Create(NEW_SIZE), allowed }
    }

    fn delete(&self) -> Prediction {
        let exported = refused("VOLUME_EXPORTED");
        let allowed = match self.size {
            _ if self.holds() => vec![exported],
            _ if self.shared => vec![REMOVED, UNCHANGED, exported],
            Some(_) => vec![REMOVED],
            None => vec![UNCHANGED],
        };
        Prediction { call: Call::Delete, allowed }
    }

    /// A shared volume is extended only by the one who holds it: nobody else could tell the guest.
    fn extend(&self, size: u64) -> Vec<Prediction> {
        if self.shared && !self.holds() {
            return Vec::new();
        }
        let answer = match self.size {
            None => refused("VOLUME_NOT_FOUND"),
            Some(present) if size < present => refused("SHRINK_REFUSED"),
            Some(present) if size == present => UNCHANGED,
            Some(_) => CREATED,
        };
        let mut calls = vec![one(Call::Extend(size), answer)];
        if let Some(Attachment { id, phase: Phase::Attached, .. }) = &self.attachment {
            // A domain that is shut off has nothing to be told.
            let allowed = vec![CREATED, UNCHANGED];
            calls.push(Prediction { call: Call::Resize(id.clone(), size), allowed });
        }
        calls
    }

    fn attach(&self, domain: &'static str) -> Vec<Prediction> {
        let id = new_id();
        let (exported, missing) = (refused("VOLUME_EXPORTED"), refused("VOLUME_NOT_FOUND"));
        let allowed = match self.size {
            // One volume, one writer: the controller itself has it.
            _ if self.holds() => vec![exported],
            _ if self.shared => vec![CREATED, exported, missing],
            Some(_) => vec![CREATED],
            None => vec![missing],
        };
        vec![Prediction { call: Call::Export(id.clone()), allowed }, one(Call::Attach(id, domain), CREATED)]
    }

    fn detach(&self) -> Vec<Prediction> {
        match &self.attachment {
            None => vec![one(Call::Detach(new_id()), UNCHANGED)],
            Some(Attachment { id, phase: Phase::Released, .. }) => {
                vec![one(Call::Unexport(id.clone()), REMOVED)]
            }
            Some(Attachment { id, phase: Phase::Attached, .. }) => {
                vec![one(Call::Detach(id.clone()), REMOVED), one(Call::Unexport(id.clone()), REMOVED)]
            }
            Some(Attachment { id, phase: Phase::Exported, .. }) => {
                vec![one(Call::Detach(id.clone()), UNCHANGED), one(Call::Unexport(id.clone()), REMOVED)]
            }
        }
    }

    fn repeat(&self) -> Vec<Prediction> {
        let Some(Attachment { id, domain, phase }) = &self.attachment else {
            return vec![if self.size.is_some() { self.create() } else { self.delete() }];
        };
        let export = one(Call::Export(id.clone()), UNCHANGED);
        let attach = |answer| one(Call::Attach(id.clone(), domain), answer);
        match phase {
            Phase::Released => {
                vec![one(Call::Detach(id.clone()), UNCHANGED), export, attach(refused("ATTACHMENT_ENDED"))]
            }
            Phase::Exported => vec![export, attach(CREATED)],
            Phase::Attached => vec![export, attach(UNCHANGED)],
        }
    }

    fn late(&self, call: impl Fn(Attachment) -> Prediction) -> Vec<Prediction> {
        self.ended.last().map(|ended| vec![call(ended.clone())]).unwrap_or_default()
    }

    /// What is known after an answer. `size` is the one that the answer tells, if it tells one.
    pub(crate) fn learn(&mut self, call: &Call, answer: &Answer, size: Option<u64>) {
        let Answer::Done(_) = answer else { return };
        match (call, self.attachment.take_if(|_| matches!(call, Call::Unexport(_)))) {
            (Call::Create(_) | Call::Extend(_), _) => self.size = size,
            (Call::Delete, _) => self.size = None,
            (Call::Export(id), _) => {
                self.size = size;
                self.attachment.get_or_insert_with(|| Attachment {
                    id: id.clone(),
                    domain: super::plan::DOMAINS[0],
                    phase: Phase::Exported,
                });
            }
            (Call::Attach(id, domain), _) => {
                self.attachment = Some(Attachment { id: id.clone(), domain, phase: Phase::Attached });
            }
            (Call::Detach(id), _) => {
                if let Some(attachment) = self.attachment.as_mut().filter(|attachment| attachment.id == *id) {
                    attachment.phase = Phase::Released;
                }
            }
            (Call::Unexport(id), Some(attachment)) if attachment.id == *id => self.ended.push(attachment),
            // Somebody else's id, or one that was never used: the present attachment stays.
            (Call::Unexport(_), other) => self.attachment = other,
            (Call::Overfill | Call::Resize(..), _) => {}
        }
    }
}

/// May this answer come? After a call that was cut off, the one that is answered may find the work of the one before it.
pub(crate) fn permits(allowed: &[Answer], answer: &Answer, cut_off: bool) -> bool {
    allowed.iter().any(|right| {
        right == answer
            || cut_off
                && match right {
                    Answer::Done(Outcome::Created) => [UNCHANGED, REPAIRED].contains(answer),
                    Answer::Done(Outcome::Unchanged) => *answer == REPAIRED,
                    Answer::Done(Outcome::Removed) => *answer == UNCHANGED,
                    _ => false,
                }
    })
}

fn new_id() -> String {
    Uuid::new_v4().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::soak::plan::{CONTROLLERS, Plan, SHORT_SEED};

    /// Carries out a verb as the model expects it to go, with the first answer that is allowed.
    fn carry_out(volume: &mut Volume, verb: Verb) -> Vec<Answer> {
        let mut answers = Vec::new();
        for Prediction { call, allowed } in volume.predict(verb) {
            let size = match &call {
                Call::Create(size) | Call::Extend(size) => Some(*size),
                _ => volume.size,
            };
            volume.learn(&call, &allowed[0], size);
            answers.push(allowed[0].clone());
            if let Some(Answer::Refused(_)) = answers.last() {
                break;
            }
        }
        answers
    }

    #[test]
    fn an_own_volume_has_one_right_answer_in_each_state() {
        let mut volume = Volume::default();
        assert_eq!(carry_out(&mut volume, Verb::Attach("c2")), [refused("VOLUME_NOT_FOUND")]);
        assert_eq!(carry_out(&mut volume, Verb::Create), [CREATED]);
        assert_eq!(carry_out(&mut volume, Verb::Create), [UNCHANGED]);
        assert_eq!(carry_out(&mut volume, Verb::Attach("c2")), [CREATED, CREATED]);
        assert_eq!(carry_out(&mut volume, Verb::Attach("c3")), [refused("VOLUME_EXPORTED")]);
        assert_eq!(carry_out(&mut volume, Verb::Extend(2 * NEW_SIZE)), [CREATED, CREATED]);
        assert_eq!(carry_out(&mut volume, Verb::Extend(NEW_SIZE)), [refused("SHRINK_REFUSED")]);
        assert_eq!(carry_out(&mut volume, Verb::Create), [refused("DIFFERENT_PARAMETERS")]);
        assert_eq!(carry_out(&mut volume, Verb::Delete), [refused("VOLUME_EXPORTED")]);
        assert_eq!(carry_out(&mut volume, Verb::UnexportLate), [], "never under a disk");
        assert_eq!(carry_out(&mut volume, Verb::Release), [REMOVED]);
        let again = [UNCHANGED, UNCHANGED, refused("ATTACHMENT_ENDED")];
        assert_eq!(carry_out(&mut volume, Verb::Repeat), again);
        assert_eq!(carry_out(&mut volume, Verb::UnexportLate), [REMOVED]);
        assert_eq!(carry_out(&mut volume, Verb::LateAttach), [refused("ATTACHMENT_ENDED")]);
        assert_eq!(carry_out(&mut volume, Verb::LateUnexport), [UNCHANGED]);
        assert_eq!(carry_out(&mut volume, Verb::Delete), [REMOVED]);
        assert_eq!(volume.size, None);
    }

    /// On the volumes that nobody else has: what becomes of the others is not known before.
    #[test]
    fn the_short_soak_has_late_calls_second_writers_and_full_pools_in_four_rounds() {
        let (mut late, mut second_writers, mut full) = (0, 0, 0);
        let mut volumes = vec![vec![Volume::default(); 3]; CONTROLLERS];
        for round in Plan::new(SHORT_SEED).take(4) {
            for (controller, order) in
                round.orders.iter().enumerate().flat_map(|(c, orders)| orders.iter().map(move |o| (c, o)))
            {
                let Some(volume) = volumes[controller].get_mut(order.volume) else { continue };
                let answers = carry_out(volume, order.verb);
                let verbs = [Verb::LateExport, Verb::LateAttach, Verb::LateDetach, Verb::LateUnexport];
                late += usize::from(verbs.contains(&order.verb) && !answers.is_empty());
                let attach = matches!(order.verb, Verb::Attach(_));
                second_writers += usize::from(attach && answers == [refused("VOLUME_EXPORTED")]);
                full += usize::from(order.verb == Verb::Overfill);
            }
        }
        assert!(late > 0 && second_writers > 0 && full > 0, "{late} {second_writers} {full}");
    }

    #[test]
    fn a_late_call_leaves_a_newer_attachment_as_it_is() {
        let mut volume = Volume::default();
        for verb in [Verb::Create, Verb::Attach("c2"), Verb::Detach, Verb::Attach("c3")] {
            carry_out(&mut volume, verb);
        }
        let before = volume.clone();
        for verb in [Verb::LateDetach, Verb::LateUnexport, Verb::LateExport, Verb::LateAttach] {
            carry_out(&mut volume, verb);
            assert_eq!(volume, before, "{verb:?}");
        }
    }

    #[test]
    fn only_a_call_that_was_cut_off_may_find_its_work_done() {
        assert!(permits(&[CREATED], &CREATED, false));
        assert!(!permits(&[CREATED], &UNCHANGED, false));
        assert!(permits(&[CREATED], &UNCHANGED, true));
        assert!(!permits(&[refused("POOL_FULL")], &CREATED, true));
        assert!(!permits(&[UNCHANGED], &CREATED, true));
    }
}
