//! A short soak (rules 2 to 9, F7, F8, F11, F16, F20, F33). How it is done, and longer ones: `tests/lab soak`.

use tether_tests::soak;

use crate::Fixture;

/// Random verbs of several controllers, killed agents, cuts and full pools: each answer and each state is as predicted, and at
/// the end nothing is left.
#[tokio::test]
#[ignore = "lab"]
async fn random_verbs_kills_and_cuts_leave_nothing() {
    let fixture = Fixture::new().await;
    let length = soak::Length::Rounds(4);
    let results = soak::run(&fixture.lab, &fixture.tether, length, soak::SHORT_SEED).await.unwrap();
    println!("{results}");
    assert!(results.mismatch.is_none(), "{results}");
    let counts = &results.counts;
    assert!(
        counts.rounds >= 4 && counts.kills >= 4 && counts.cuts >= 1,
        "all kinds of disturbance: {results}"
    );
    assert!(
        counts.full_pools >= 1 && counts.late >= 1 && counts.second_writers >= 1,
        "all refusals: {results}"
    );
}
