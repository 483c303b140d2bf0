//! Logs and metrics. Every other room may use this one; it knows none of them.

pub mod log;
pub mod metrics;
pub mod server;
