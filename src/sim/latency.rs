//! What an engine step costs, from first principles.
//!
//! A step reads the weights once, computes its prompt tokens, and reads the KV cache of its running
//! requests. Blocks that requests share are counted once, as shared-prefix attention kernels read
//! them; an engine without such kernels decodes slower than this.

use std::fmt;
use std::time::Duration;

/// Seconds of the parts of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Profile {
    /// Every step: weights over memory bandwidth, and launch overhead.
    pub base: f64,
    /// Per prompt token computed: 2 FLOP per weight over achieved FLOP/s.
    pub prefill_token: f64,
    /// Per token of KV cache that running requests hold: its bytes over memory bandwidth.
    pub kv_token: f64,
    /// Per request in the batch: sampling and scheduling.
    pub sequence: f64,
    /// KV cache size in tokens, unless given.
    pub kv_tokens: usize,
}

impl Profile {
    /// Llama-3-8B-class model in bf16 on one H100 80GB (3.35 TB/s, 989 TFLOP/s; 70 % and 50 % of
    /// which are reached): 16 GB of weights are 6.8 ms; 2 * 8e9 FLOP are 32 us a token; 128 KiB of KV
    /// a token are 0.056 us. 72 GB usable less weights leave 430,000 tokens.
    pub const H100_8B: Self = Self {
        base: 7.0e-3,
        prefill_token: 3.2e-5,
        kv_token: 5.6e-8,
        sequence: 1.0e-5,
        kv_tokens: 430_000,
    };

    /// Qwen3-32B-class model in bf16 on two H100 80GB with tensor parallelism: 64 GB of weights over
    /// 6.7 TB/s are 13.6 ms; 2 * 32e9 FLOP are 65 us a token (15,400 tokens/s); 256 KiB of KV a token
    /// are 0.056 us. The KV size is the published 307,328 tokens.
    pub const H100_32B: Self = Self {
        base: 1.4e-2,
        prefill_token: 6.5e-5,
        kv_token: 5.6e-8,
        sequence: 1.0e-5,
        kv_tokens: 307_328,
    };

    /// The profile called `name`.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "h100-8b" => Some(Self::H100_8B),
            "h100-32b" => Some(Self::H100_32B),
            _ => None,
        }
    }

    /// Duration of a step.
    pub fn step(&self, prefill_tokens: usize, held_kv_tokens: usize, sequences: usize) -> Duration {
        let seconds = self.base
            + self.prefill_token * prefill_tokens as f64
            + self.kv_token * held_kv_tokens as f64
            + self.sequence * sequences as f64;
        Duration::from_secs_f64(seconds)
    }
}

/// The formula in words.
impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "continuous batching; a step takes {:.1} ms, {:.0} us for each prompt token computed, {:.0} us for each \
             request and {:.3} us for each KV token held",
            1e3 * self.base,
            1e6 * self.prefill_token,
            1e6 * self.sequence,
            1e6 * self.kv_token,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_the_sum_of_its_parts() {
        // 14 ms + 1000 * 65 us + 100,000 * 0.056 us + 50 * 10 us = 14 + 65 + 5.6 + 0.5 ms.
        let step = Profile::H100_32B.step(1000, 100_000, 50);
        assert!((step.as_secs_f64() - 0.0851).abs() < 1e-9, "{step:?}");
        assert_eq!(Profile::named("h100-8b"), Some(Profile::H100_8B));
        assert_eq!(Profile::named("a100"), None);
        let words = Profile::H100_32B.to_string();
        assert!(
            words.contains("14.0 ms, 65 us for each prompt token"),
            "{words}"
        );
    }
}
