//! What is on a host, as it is told: whose each object is, and why (F16). Not here: what there is, which only the agents know.

use tether_proto::AttachmentId;
use tether_proto::wire::{HostObject, Ownership};

/// Why something is owned.
const OWNED: &str = "the journal has it";
/// Why something is an orphan, and what to do.
const ORPHANED: &str = "it is named as this agent names its own, but the journal has nothing of it: it is left alone. If nobody \
    needs it, remove it by hand";
/// Why something is foreign.
const FOREIGN: &str = "somebody else made it: it is never touched";

/// An object of the journal's.
pub fn owned<'a>(kind: &str, name: String, ids: impl IntoIterator<Item = &'a AttachmentId>) -> HostObject {
    let attachment_ids = ids.into_iter().map(ToString::to_string).collect();
    HostObject { attachment_ids, ..object(kind, name, Ownership::Owned, OWNED) }
}

/// An object that the journal does not have, named as ours are, or not.
pub fn not_owned(kind: &str, name: String, named_as_ours: bool) -> HostObject {
    match named_as_ours {
        true => object(kind, name, Ownership::Orphaned, ORPHANED),
        false => object(kind, name, Ownership::Foreign, FOREIGN),
    }
}

/// Puts them in order.
pub fn sorted(mut objects: Vec<HostObject>) -> Vec<HostObject> {
    objects.sort_by(|one, other| (&one.kind, &one.name).cmp(&(&other.kind, &other.name)));
    objects
}

fn object(kind: &str, name: String, ownership: Ownership, reason: &str) -> HostObject {
    HostObject {
        kind: kind.to_owned(),
        name,
        ownership: ownership.into(),
        attachment_ids: Vec::new(),
        reason: reason.to_owned(),
    }
}
