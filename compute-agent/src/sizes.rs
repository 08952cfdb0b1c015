//! The sizes that a volume may have, so as to be the one that is meant (rule 1). Not here: how a size is found out.

use tether_proto::ByteSize;

/// See above.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    /// One of these.
    pub(crate) any_of: [ByteSize; 2],
    /// Or more: it may have been extended, and nobody has said so here yet.
    pub(crate) or_larger: bool,
}

impl Sizes {
    /// Is it one of them?
    pub(crate) fn allow(&self, found: u64) -> bool {
        self.any_of.iter().any(|size| size.bytes() == found || (self.or_larger && size.bytes() < found))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f1_a_smaller_volume_is_never_the_one_and_a_larger_one_only_when_nobody_could_say() {
        let any_of = [4096, 12288].map(|size| size.try_into().unwrap());
        for (or_larger, found, allowed) in [
            (false, 4096, true),
            (false, 12288, true),
            (false, 8192, false),
            (false, 16384, false),
            (true, 8192, true),
            (true, 16384, true),
            (true, 4095, false),
        ] {
            assert_eq!(Sizes { any_of, or_larger }.allow(found), allowed, "{or_larger} {found}");
        }
    }
}
