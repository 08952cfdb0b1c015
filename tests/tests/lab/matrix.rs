//! The published matrices: which part of one is tried, and where it stands. Not here: what is tried (`crash`, `step_failures`).

use std::path::Path;

/// Set by `tests/run crash`: the whole matrix is tried, and written down.
fn whole() -> bool {
    std::env::var_os("TETHER_WHOLE_MATRIX").is_some()
}

/// Of each verb the step whose effect is the hardest to take back or to go on from; what came before it is taken back as well.
const TRIED_IN_EVERY_RUN: [&str; 11] = [
    "create-volume",
    "name-file",
    "extend-volume",
    "remove-volume",
    "create-acl",
    "share-directory",
    "hot-plug",
    "resize-disk",
    "unplug",
    "fence-target",
    "unshare-directory",
];

/// When something is planted in a step. The whole matrix tries both moments of each step; every run tries one of each verb, after
/// its effect.
pub(crate) fn moments(step: &str) -> &'static [&'static str] {
    match step {
        _ if whole() => &["before", "after"],
        step if TRIED_IN_EVERY_RUN.contains(&step) => &["after"],
        _ => &[],
    }
}

/// A part of a published matrix: of all these steps it has rows, and no others, and what was tried stands in it. When all was
/// tried it is written anew, and one that has changed is a failure, so that somebody looks at the difference.
pub(crate) fn publish(folder: &str, name: &str, heading: &str, steps: &[String], rows: &[String]) {
    assert!(!rows.is_empty(), "{name}: no step was tried");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let file = folder.join(format!("{name}.md"));
    let published = std::fs::read_to_string(&file).unwrap_or_default();
    if whole() {
        std::fs::create_dir_all(&folder).unwrap();
        let tried = format!("{heading}\n{}\n", rows.join("\n"));
        std::fs::write(&file, &tried).unwrap();
        let same = published.is_empty() || published == tried;
        assert!(same, "{} has changed: if that is right, keep it\n{published}\n{tried}", file.display());
    }
    let published = std::fs::read_to_string(&file).unwrap_or_default();
    let mut of_steps: Vec<&str> =
        published.lines().skip(2).filter_map(|row| row.split(" | ").next()).collect();
    of_steps.dedup();
    let wanted: Vec<String> = steps.iter().map(|step| format!("| {step}")).collect();
    assert_eq!(of_steps, wanted, "the steps in {}: tests/run crash writes it anew", file.display());
    for row in rows {
        assert!(
            published.lines().any(|line| line == row),
            "{} says something else than: {row}\nif that is right: tests/run crash writes it anew",
            file.display()
        );
    }
    println!("{name}: {} times", rows.len());
}
