//! What both agents share. Each module says what lives in it; nothing here knows a target, a volume or a domain.
//!
//! Tasks: the gRPC servers own one task per connection (`server`); each mutation is a task of its own that lives in
//! [`operations::Operations`] until it ends, whoever asked for it; external programs are children of the task that
//! started them (`command`). Shared state is the operations table and each journal's map, both behind a mutex that
//! is never held across an await.

pub mod command;
pub mod config;
pub mod daemon;
pub mod failure;
mod fault;
pub mod helper_process;
pub mod journal;
pub mod operations;
pub mod qcow2;
pub mod server;
pub mod services;
pub mod steps;
pub mod tls;
pub mod turns;
