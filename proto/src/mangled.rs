//! Damaged text for property tests of parsers, in every crate that has one (feature `testing`, for tests alone).

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

/// A good text with up to eight changes: characters left out, replaced, put in, or all of the rest cut off.
pub fn mangled(good: &'static str) -> impl Strategy<Value = String> {
    vec((any::<Index>(), 0..4_u8, any::<char>()), 0..8).prop_map(move |changes| {
        let mut text: Vec<char> = good.chars().collect();
        for (index, change, other) in changes {
            if text.is_empty() {
                break;
            }
            let place = index.index(text.len());
            match change {
                0 => drop(text.remove(place)),
                1 => text[place] = other,
                2 => text.insert(place, other),
                _ => text.truncate(place),
            }
        }
        text.into_iter().collect()
    })
}
