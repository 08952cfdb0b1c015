//! The host's side of an export. One initiator so far: open-iscsi with the kernel's iscsi_tcp.

pub(crate) mod device;
mod failures;
pub(crate) mod iscsi;
pub(crate) mod node_record;
pub(crate) mod session;
