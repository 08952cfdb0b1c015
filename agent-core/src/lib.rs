//! What both agents share. Each module says what lives in it; nothing here knows a target, a volume or a domain.
//!
//! Tasks: the gRPC servers own one task per connection (`server`); each call that may change something is a task until its
//! line is in the audit (`audit`), and each mutation one that lives in [`operations::Operations`] until it ends, whoever asked
//! for it; external programs are children of the task that
//! started them (`command`). Shared state is the operations table and each journal's map, both behind a mutex that
//! is never held across an await.

pub mod audit;
pub mod command;
pub mod config;
pub mod daemon;
pub mod doctor;
pub mod events;
pub mod failure;
mod fault;
pub mod force;
mod gate;
pub mod helper_process;
pub mod journal;
mod log;
pub mod metrics;
pub mod objects;
pub mod operations;
pub mod program;
pub mod qcow2;
pub mod reconcile;
pub mod roles;
pub mod server;
pub mod services;
pub mod steps;
pub mod stuck;
pub mod tcp_probe;
pub mod tls;
pub mod turns;
mod watchdog;
