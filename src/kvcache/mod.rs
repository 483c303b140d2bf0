//! What every endpoint's KV cache holds, block by block: the events engines publish ([`events`]), the
//! index made of them ([`index`], or one that replicas share, [`redis`]), and the tokens that name a block ([`tokens`]).
//!
//! Does not know ext_proc, scheduling or plugins.

pub mod block;
pub mod events;
pub mod index;
pub mod redis;
pub mod tokens;
