//! The whole `tether` command against two fake agents over TLS.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test ends where it fails, also in its helpers")]

mod attach;
mod detach;
mod doctor;
mod extend;
mod fakes;
mod hosts;
mod overview;
mod pki;
mod pool;
mod reconcile;
mod watch;
