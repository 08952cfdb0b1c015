//! What the soak does, in which order: a pure function of the seed, and of no clock and no answer.
//!
//! A plan is a series of rounds. In each, every controller has orders of its own, one after the other, and disturbances come
//! when so many calls were begun. Not here: what an order means in the state that it finds (`model`), and doing it.

use std::fmt;

use fastrand::Rng;

/// How many controllers there are.
pub(crate) const CONTROLLERS: usize = 3;
/// How many volumes a controller works on: one in each pool of its own, and two that all controllers share.
pub(crate) const VOLUMES: usize = 5;
/// The domains that volumes are attached to; the last one is shut off.
pub(crate) const DOMAINS: [&str; 3] = ["c2", "c3", "empty"];

/// A seed for a short soak: all kinds of refusals and late calls come in its first four rounds.
pub const SHORT_SEED: u64 = 4;

const ORDERS: usize = 6;
const MEBIBYTE: u64 = 1 << 20;
/// The size of a new volume.
pub(crate) const NEW_SIZE: u64 = 8 * MEBIBYTE;
const EXTENT: u64 = 4 * MEBIBYTE;

/// What a controller is told to do with one volume. What comes of it depends on the state, which the model knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verb {
    /// Create it with [`NEW_SIZE`].
    Create,
    /// Extend it to so many bytes, and tell the guest.
    Extend(u64),
    /// Delete it.
    Delete,
    /// Export and attach it to this domain, under a new id.
    Attach(&'static str),
    /// Detach and unexport it.
    Detach,
    /// Detach it and leave the export for later.
    Release,
    /// Unexport what was released before.
    UnexportLate,
    /// Call again what made the present state.
    Repeat,
    /// An Export of an id that has ended comes late.
    LateExport,
    /// An Attach of an id that has ended comes late.
    LateAttach,
    /// A Detach of an id that has ended comes late.
    LateDetach,
    /// An Unexport of an id that has ended comes late.
    LateUnexport,
    /// Create another volume, for which its pool has no room.
    Overfill,
}

/// One order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Order {
    /// Which of the controller's volumes, 0 to [`VOLUMES`].
    pub(crate) volume: usize,
    /// What to do with it.
    pub(crate) verb: Verb,
    /// Make each call twice at once: the second joins the first.
    pub(crate) twice: bool,
}

/// Something that happens to the hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Disturbance {
    /// The storage agent is killed; systemd starts it again.
    KillStorage,
    /// The compute agent is killed.
    KillCompute,
    /// Both at once.
    KillBoth,
    /// The network between the hosts is cut until so many more calls were answered.
    Cut(usize),
}

/// A disturbance, and when it comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Planned {
    /// It comes when so many calls of the round were begun, by all controllers together.
    pub(crate) after_calls: usize,
    /// What comes.
    pub(crate) what: Disturbance,
}

/// One round.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Round {
    /// From 1.
    pub(crate) number: usize,
    /// For each controller its orders.
    pub(crate) orders: Vec<Vec<Order>>,
    /// In the order in which they come.
    pub(crate) disturbances: Vec<Planned>,
}

/// All rounds of one seed, without an end.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    random: Rng,
    rounds: usize,
    disturbances: usize,
}

impl Plan {
    /// The plan of a seed.
    pub(crate) fn new(seed: u64) -> Self {
        Self { random: Rng::with_seed(seed), rounds: 0, disturbances: 0 }
    }

    fn order(&mut self) -> Order {
        let random = &mut self.random;
        let verb = match random.u8(0..38) {
            0..3 => Verb::Create,
            3..6 => Verb::Extend(NEW_SIZE + EXTENT * random.u64(0..6)),
            6 => Verb::Delete,
            7..16 => Verb::Attach(DOMAINS[random.usize(0..DOMAINS.len())]),
            16..24 => Verb::Detach,
            24 => Verb::Release,
            25..27 => Verb::UnexportLate,
            27..29 => Verb::Repeat,
            29..31 => Verb::LateExport,
            31..33 => Verb::LateAttach,
            33..35 => Verb::LateDetach,
            35..37 => Verb::LateUnexport,
            _ => Verb::Overfill,
        };
        Order { volume: random.usize(0..VOLUMES), verb, twice: random.u8(0..4) == 0 }
    }

    fn disturbance(&mut self) -> Disturbance {
        self.disturbances += 1;
        // All kinds come first, so that a short soak has them too.
        match if self.disturbances <= 4 { self.disturbances } else { self.random.usize(1..5) } {
            1 => Disturbance::KillStorage,
            2 => Disturbance::KillCompute,
            3 => Disturbance::Cut(self.random.usize(3..9)),
            _ => Disturbance::KillBoth,
        }
    }
}

impl Iterator for Plan {
    type Item = Round;

    fn next(&mut self) -> Option<Round> {
        self.rounds += 1;
        let number = self.rounds;
        let mut orders = Vec::new();
        for _ in 0..CONTROLLERS {
            let mut own: Vec<Order> = (0..ORDERS).map(|_| self.order()).collect();
            if number == 1 {
                // Refusals of what is not there are soon dull: first there is something.
                let volumes = (0..VOLUMES).map(|volume| Order { volume, verb: Verb::Create, twice: false });
                own.splice(0..0, volumes);
            }
            orders.push(own);
        }
        let mut after_calls = 0;
        let mut disturbances = Vec::new();
        // Every fourth is left alone: then each answer must be the one right one.
        for _ in 0..if number.is_multiple_of(4) { 0 } else { 2 } {
            after_calls += self.random.usize(3..14);
            disturbances.push(Planned { after_calls, what: self.disturbance() });
        }
        Some(Round { number, orders, disturbances })
    }
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "volume {}: {:?}{}",
            self.volume,
            self.verb,
            if self.twice { ", twice at once" } else { "" }
        )
    }
}

impl Round {
    /// The round as lines of the log.
    pub(crate) fn lines(&self) -> Vec<String> {
        let number = self.number;
        let orders = self.orders.iter().enumerate().flat_map(|(controller, orders)| {
            orders.iter().map(move |order| format!("plan {number}: controller {controller}: {order}"))
        });
        let disturbances = self
            .disturbances
            .iter()
            .map(|d| format!("plan {number}: after {} calls: {:?}", d.after_calls, d.what));
        orders.chain(disturbances).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(seed: u64) -> Vec<String> {
        Plan::new(seed).take(20).flat_map(|round| round.lines()).collect()
    }

    #[test]
    fn a_seed_gives_its_plan_again_and_another_seed_another() {
        assert_eq!(lines(7), lines(7));
        assert_ne!(lines(7), lines(8));
        assert_ne!(lines(0), lines(1));
    }

    #[test]
    fn a_plan_has_every_verb_every_volume_and_every_disturbance() {
        let all = lines(1).join("\n");
        for word in [
            "Create",
            "Extend",
            "Delete",
            "Attach(\"c2\")",
            "Attach(\"c3\")",
            "Attach(\"empty\")",
            "Detach",
            "Release",
            "UnexportLate",
            "Repeat",
            "LateExport",
            "LateAttach",
            "LateDetach",
            "LateUnexport",
            "Overfill",
            "twice",
            "KillStorage",
            "KillCompute",
            "KillBoth",
            "Cut",
            "volume 0",
            "volume 4",
            "controller 2",
        ] {
            assert!(all.contains(word), "{word}");
        }
    }
}
