//! Who gets in, and who may do what: a real agent process without pools, over loopback, with certificates made here. Needs no
//! root and no kernel module. What the roles' rules make of certificates is tested beside them.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends where it fails, also in its helpers"
)]

mod agent;
mod crowd;
mod pki;
mod refusals;
mod reload;
mod roles;
