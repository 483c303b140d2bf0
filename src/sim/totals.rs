//! What an engine counted and observed since its start or restart, as vLLM's metrics define it.

/// Seconds until a first token.
const TTFT: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
/// Seconds between tokens.
const BETWEEN: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
];
/// Seconds of a request or a phase of it.
const PHASE: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
];
/// Tokens of a step.
const STEP_TOKENS: &[f64] = &[
    1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0,
];
/// Seconds of a transfer of KV.
const TRANSFER: &[f64] = &[
    0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 5.0,
];
/// Seconds until it is under way.
const POST: &[f64] = &[
    0.001, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 5.0,
];
/// Bytes of it: from 2 KiB to 8 GiB, each four times the one before.
const TRANSFER_BYTES: &[f64] = &[
    2048.0,
    8192.0,
    32_768.0,
    131_072.0,
    524_288.0,
    2_097_152.0,
    8_388_608.0,
    33_554_432.0,
    134_217_728.0,
    536_870_912.0,
    2_147_483_648.0,
    8_589_934_592.0,
];
/// Descriptors of it.
const DESCRIPTORS: &[f64] = &[
    10.0, 20.0, 30.0, 50.0, 75.0, 100.0, 200.0, 400.0, 1000.0, 2000.0, 4000.0, 10_000.0, 20_000.0,
    50_000.0,
];
/// Completions of one request.
const COMPLETIONS: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0];
/// Preemptions of one request.
const PREEMPTIONS: &[f64] = &[1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0];

/// A cumulative distribution.
#[derive(Debug, Clone, PartialEq)]
pub struct Histogram {
    bounds: Vec<f64>,
    /// Observations by bucket, one more than bounds.
    counts: Vec<u64>,
    sum: f64,
}

impl Histogram {
    fn new(bounds: impl Into<Vec<f64>>) -> Self {
        let bounds = bounds.into();
        Self {
            counts: vec![0; bounds.len() + 1],
            bounds,
            sum: 0.0,
        }
    }

    /// Adds `n` observations of `value`.
    pub fn observe(&mut self, value: f64, n: u64) {
        let bucket = self.bounds.partition_point(|bound| *bound < value);
        if let Some(count) = self.counts.get_mut(bucket) {
            *count += n;
        }
        self.sum += value * n as f64;
    }

    /// Upper bounds with the number of observations at or below, the last one infinite.
    pub fn cumulative(&self) -> impl Iterator<Item = (f64, u64)> + '_ {
        let bounds = self.bounds.iter().copied().chain([f64::INFINITY]);
        bounds.zip(&self.counts).scan(0, |below, (bound, count)| {
            *below += count;
            Some((bound, *below))
        })
    }

    /// Sum of the observations.
    pub fn sum(&self) -> f64 {
        self.sum
    }

    /// Number of observations.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }
}

/// 1, 2, 5, 10, 20, 50 ... up to the longest context, as vLLM derives its bounds for token counts.
fn token_bounds(max_model_len: usize) -> Vec<f64> {
    let decades = (0..).map(|exponent| 10_usize.saturating_pow(exponent));
    decades
        .flat_map(|decade| [1, 2, 5].map(|mantissa| decade.saturating_mul(mantissa)))
        .take_while(|bound| *bound <= max_model_len && *bound < usize::MAX)
        .map(|bound| bound as f64)
        .collect()
}

/// Distributions. Times are virtual seconds: those of the simulated engine, whatever its time scale.
#[derive(Debug, Clone, PartialEq)]
pub struct Observed {
    /// Prompt tokens of finished requests.
    pub prompt_tokens: Histogram,
    /// Output tokens of finished requests.
    pub generation_tokens: Histogram,
    /// Tokens of a step: output tokens, and prompts' computed tokens in the step that ends them.
    pub step_tokens: Histogram,
    /// Completions asked for.
    pub completions: Histogram,
    /// Output tokens asked for.
    pub max_tokens: Histogram,
    /// From arrival to the first token.
    pub ttft: Histogram,
    /// Between two tokens of a request.
    pub between_tokens: Histogram,
    /// Mean of that over a finished request.
    pub per_output_token: Histogram,
    /// From arrival to the end.
    pub end_to_end: Histogram,
    /// From arrival to the first step.
    pub queue: Histogram,
    /// From the first step to the last token.
    pub inference: Histogram,
    /// From the first step to the first token.
    pub prefill: Histogram,
    /// From the first to the last token.
    pub decode: Histogram,
    /// Times a finished request was thrown back.
    pub preemptions: Histogram,
    /// Prompt tokens that were not cached.
    pub computed_prompt_tokens: Histogram,
    /// Of a pull, from its beginning to its last byte.
    pub transfer: Histogram,
    /// Until it is under way: nothing, here.
    pub transfer_post: Histogram,
    /// Bytes of a pull, whole blocks.
    pub transfer_bytes: Histogram,
    /// Runs of neighbouring blocks of a pull.
    pub transfer_descriptors: Histogram,
}

impl Observed {
    fn new(max_model_len: usize) -> Self {
        let tokens = || Histogram::new(token_bounds(max_model_len));
        Self {
            prompt_tokens: tokens(),
            generation_tokens: tokens(),
            step_tokens: Histogram::new(STEP_TOKENS),
            completions: Histogram::new(COMPLETIONS),
            max_tokens: tokens(),
            ttft: Histogram::new(TTFT),
            between_tokens: Histogram::new(BETWEEN),
            per_output_token: Histogram::new(BETWEEN),
            end_to_end: Histogram::new(PHASE),
            queue: Histogram::new(PHASE),
            inference: Histogram::new(PHASE),
            prefill: Histogram::new(PHASE),
            decode: Histogram::new(PHASE),
            preemptions: Histogram::new(PREEMPTIONS),
            computed_prompt_tokens: tokens(),
            transfer: Histogram::new(TRANSFER),
            transfer_post: Histogram::new(POST),
            transfer_bytes: Histogram::new(TRANSFER_BYTES),
            transfer_descriptors: Histogram::new(DESCRIPTORS),
        }
    }
}

/// Counters and distributions.
#[derive(Debug, Clone, PartialEq)]
pub struct Totals {
    /// Prompt tokens of admitted requests; one that comes back after a preemption is not counted again.
    pub queried_tokens: u64,
    /// Those found in the cache.
    pub hit_tokens: u64,
    /// Prompt tokens of requests that got their first token.
    pub prompt_tokens: u64,
    /// Those of them that came from the cache.
    pub cached_prompt_tokens: u64,
    /// Prompt tokens that were not found in the own cache, of pods that hand over KV.
    pub external_queried_tokens: u64,
    /// Those of them that another pod had.
    pub external_hit_tokens: u64,
    /// Prompt tokens of requests that got their first token, pulled from another pod.
    pub pulled_prompt_tokens: u64,
    /// Requests whose kept blocks nobody pulled in time.
    pub expired: u64,
    /// Pulls that failed.
    pub failed_pulls: u64,
    /// Pods that said they had pulled what was not kept any more.
    pub late_notifications: u64,
    /// Output tokens.
    pub generation_tokens: u64,
    /// Finished by reaching their length.
    pub finished: u64,
    /// Given up by their clients.
    pub aborted: u64,
    /// Thrown back to the queue for want of blocks.
    pub preemptions: u64,
    /// Virtual seconds the host was late.
    pub lag_seconds: f64,
    /// Distributions.
    pub observed: Observed,
}

impl Totals {
    /// Nothing yet, of an engine with this context length.
    pub fn new(max_model_len: usize) -> Self {
        Self {
            queried_tokens: 0,
            hit_tokens: 0,
            prompt_tokens: 0,
            cached_prompt_tokens: 0,
            external_queried_tokens: 0,
            external_hit_tokens: 0,
            pulled_prompt_tokens: 0,
            expired: 0,
            failed_pulls: 0,
            late_notifications: 0,
            generation_tokens: 0,
            finished: 0,
            aborted: 0,
            preemptions: 0,
            lag_seconds: 0.0,
            observed: Observed::new(max_model_len),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_count_what_is_at_or_below_their_bound() {
        let mut histogram = Histogram::new([1.0, 2.0]);
        histogram.observe(1.0, 2);
        histogram.observe(1.5, 1);
        histogram.observe(7.0, 1);
        let buckets: Vec<_> = histogram.cumulative().collect();
        assert_eq!(buckets, [(1.0, 2), (2.0, 3), (f64::INFINITY, 4)]);
        assert_eq!((histogram.sum(), histogram.count()), (10.5, 4));
    }

    #[test]
    fn token_bounds_end_at_the_context_length() {
        assert_eq!(token_bounds(100), [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]);
        assert_eq!(token_bounds(99).last(), Some(&50.0));
        assert!(token_bounds(usize::MAX).len() < 64);
    }
}
