//! Which requests are recorded.

use super::context::{SpanContext, TraceId};

/// Share of the traces that begin here and are recorded, unless it is said otherwise.
pub const DEFAULT_RATIO: f64 = 0.1;

/// `parentbased_traceidratio`: a request that is part of a trace is recorded when that is; of the others a
/// share is, by their new trace id.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampler {
    /// Ids are compared by 63 bits, as all OpenTelemetry samplers do, so that they agree.
    below: u64,
}

impl Sampler {
    /// Records this share of new traces; 0 and less none, 1 and more all.
    pub fn new(ratio: f64) -> Self {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "0 to 2^63, and saturating"
        )]
        let below = (ratio.clamp(0.0, 1.0) * (1u64 << 63) as f64) as u64;
        Self { below }
    }

    /// Whether to record a request of this trace.
    pub fn samples(&self, trace: TraceId, parent: Option<&SpanContext>) -> bool {
        match parent {
            Some(parent) => parent.sampled,
            None => trace.low() >> 1 < self.below,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context(low: u64, flags: &str) -> SpanContext {
        SpanContext::parse(&format!(
            "00-{:032x}-00f067aa0ba902b7-{flags}",
            u128::from(low) | 1 << 64
        ))
        .unwrap()
    }

    #[test]
    fn a_parent_decides() {
        for (ratio, flags, sampled) in [(0.0, "01", true), (1.0, "00", false), (1.0, "02", false)] {
            let parent = context(7, flags);
            let sampler = Sampler::new(ratio);
            assert_eq!(sampler.samples(parent.trace, Some(&parent)), sampled);
        }
    }

    #[test]
    fn without_one_the_trace_id_decides() {
        // 0.25 of 2^63 is 2^61, and an id counts without its lowest bit: 2^62 is the first one out.
        for (ratio, low, sampled) in [
            (0.25, (1 << 62) - 1, true),
            (0.25, 1 << 62, false),
            (0.0, 0, false),
            (-1.0, 0, false),
            (1.0, u64::MAX, true),
            (7.0, u64::MAX, true),
        ] {
            let sampler = Sampler::new(ratio);
            let trace = context(low, "00").trace;
            assert_eq!(sampler.samples(trace, None), sampled, "{ratio} {low}");
        }
    }

    #[test]
    fn about_the_ratio_is_recorded() {
        let sampler = Sampler::new(DEFAULT_RATIO);
        let sampled = (0..20_000).filter(|_| sampler.samples(TraceId::random(), None));
        // 2000 expected, with a standard deviation of 42.
        assert!((1700..2300).contains(&sampled.count()));
    }
}
