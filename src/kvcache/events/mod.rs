//! KV events of one engine, from the socket to a sink.
//!
//! Entry points: [`pool::SubscriberPool`] (we dial every engine) and [`central::serve`] (engines dial us).
//! On the way of a message: `zmtp` (bytes to frames), [`frames`] (frames to a numbered payload),
//! [`subscriber`] and [`replay`] (order, gaps, restarts), [`wire`] (payload to events), [`event`] (what a
//! sink is given).
//!
//! ZMTP is spoken here and not by a library because of the bounds a publisher must not be able to break.
//! `zeromq` 0.7.0 reserves what a frame header claims, up to the address space, has no limit on the size
//! or the number of frames of a message, and reconnects behind our back, where we must know of every
//! new connection to tell a restart. libzmq can limit a frame but not a message, needs a C++ build and
//! threads of its own. What a subscriber needs of ZMTP 3.0 fits in one file.

pub mod central;
pub mod event;
mod extra_keys;
pub mod frames;
mod msgpack;
pub mod pool;
pub mod replay;
pub mod stats;
mod stream;
pub mod subscriber;
#[cfg(test)]
pub(crate) mod testing;
pub mod wire;
pub mod zmtp;

pub use event::{Batch, Cleared, Event, EventSink, Removed, Stored, StreamState};
