//! KV events of one engine, from the socket to a sink.
//!
//! [`event`] is what a decoded event looks like and who takes it.

pub mod event;

pub use event::{Batch, Cleared, Event, EventSink, Removed, Stored, StreamState};
