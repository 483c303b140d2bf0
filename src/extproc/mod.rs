//! Envoy's dialect: ext_proc messages in, ext_proc messages out.
//!
//! [`service`] is the gRPC face over [`wire`], [`stream`] the state machine of one HTTP request, [`mutation`],
//! [`immediate`] and [`reply`] build messages and decide nothing. What to answer is decided by
//! [`crate::control::Director`]; this room knows no endpoints, plugins or prompts.

pub mod immediate;
pub mod mutation;
pub mod proto;
pub mod reply;
pub mod server;
pub mod service;
pub mod stream;
pub mod wire;
