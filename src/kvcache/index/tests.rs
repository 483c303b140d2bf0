//! The index against published scenarios, a plain model, and its bounds.

mod bounds;
mod model;
mod scenarios;
mod sharing;

use crate::kvcache::events::Stored;

/// A dense store on the GPU as a current engine sends it.
fn stored<'a>(hashes: &'a [u64], parent: Option<u64>, tokens: &'a [u32], size: u32) -> Stored<'a> {
    Stored {
        hashes,
        parent,
        tokens,
        block_size: size,
        lora_name: None,
        medium: "GPU",
        extra_keys: None,
        cache_salt: None,
        group: Some(0),
        kind: Some("full_attention"),
    }
}
