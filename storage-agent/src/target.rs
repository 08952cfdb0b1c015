//! What makes a volume reachable. One back end so far: LIO, the kernel's own target.

pub(crate) mod configfs;
pub(crate) mod lio;
