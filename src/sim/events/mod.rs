//! KV events: what the prefix cache stores and loses, published as vLLM publishes it.
//!
//! [`event`] is one change and its bytes, written with `msgpack`; [`config`] vLLM's settings;
//! [`publisher`] numbers the batches, keeps the newest for replay and owns the sockets; `socket` is
//! the two kinds of them, which talk ZMTP as `zmtp` spells it. Engines hand over one batch a step.

pub mod config;
pub mod event;
mod msgpack;
pub mod publisher;
mod socket;
mod zmtp;

#[cfg(test)]
mod tests;

pub use config::EventsConfig;
pub use event::{Event, HashForm, Stored};
pub use publisher::Publisher;
