//! Everything that needs more than one crate: the lab and the tests on it.
//!
//! The lab is two real hosts, `storage` and `compute`, in QEMU's software emulation, with a private network between
//! them and Linux guests on `compute`. A test says [`Lab::up`], works with [`Lab::storage`], [`Lab::compute`] and
//! [`Lab::guest`], and goes back to a saved state with [`Lab::restore`]. Not here: anything that ships.

pub mod agents;
pub mod bench;
pub mod cache;
pub mod foreign;
pub mod guest;
pub mod host;
pub mod image;
pub mod instance;
pub mod lab;
pub mod leftovers;
pub mod lost;
pub mod progress;
pub mod qemu;
pub mod qmp;
pub(crate) mod saved;
pub mod soak;
pub mod tether;

pub use agents::{Agents, HostSetup};
pub use guest::{Disk, Guest};
pub use host::Host;
pub use lab::{Down, Lab, Options, State};
pub use tether::Tether;
