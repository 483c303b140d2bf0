//! Shared-prefix traffic: groups of prompts with a long common beginning, arriving at random.
//!
//! The shape is that of the published "KV-cache wins" benchmark: many customers (groups), each with a
//! long system prompt and several questions, Poisson arrivals at a ladder of rates, prompts repeated
//! in shuffled rounds.

use bytes::Bytes;

/// Bytes that the simulator and the picker count as one token.
const TOKEN_BYTES: usize = 4;

/// Parameters of a run. Times are virtual seconds.
#[derive(Debug, Clone)]
pub struct Workload {
    /// Groups with a prefix of their own.
    pub groups: usize,
    /// Prompts of a group.
    pub prompts_per_group: usize,
    /// Tokens that the prompts of a group share.
    pub prefix_tokens: usize,
    /// Tokens behind them.
    pub question_tokens: usize,
    /// Output tokens.
    pub output_tokens: usize,
    /// (requests per second, seconds), one after the other.
    pub ladder: Vec<(f64, f64)>,
    /// Of arrivals and order.
    pub seed: u64,
}

/// One request to send.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Arrival {
    /// Virtual seconds from the start.
    pub at: f64,
    /// Index of the prompt.
    pub prompt: usize,
    /// Index of the ladder's rung.
    pub rung: usize,
}

impl Workload {
    /// The published workload: 150 groups of 5, 6,000 + 1,200 tokens in, 1,000 out, 3 to 60
    /// requests/s.
    pub fn published() -> Self {
        let ladder = [
            (15.0, 50.0),
            (3.0, 20.0),
            (10.0, 20.0),
            (15.0, 20.0),
            (20.0, 38.0),
            (22.0, 34.0),
            (25.0, 30.0),
            (30.0, 25.0),
            (35.0, 21.0),
            (40.0, 38.0),
            (43.0, 36.0),
            (46.0, 33.0),
            (49.0, 30.0),
            (52.0, 29.0),
            (55.0, 27.0),
            (57.0, 26.0),
            (60.0, 25.0),
        ];
        Self {
            groups: 150,
            prompts_per_group: 5,
            prefix_tokens: 6000,
            question_tokens: 1200,
            output_tokens: 1000,
            ladder: ladder.to_vec(),
            seed: 42,
        }
    }

    /// The same shape for four pods and a minute: a third of the groups, a quarter of the output.
    pub fn small() -> Self {
        Self {
            groups: 50,
            output_tokens: 250,
            ladder: vec![(5.0, 20.0), (10.0, 20.0), (20.0, 40.0), (30.0, 40.0)],
            ..Self::published()
        }
    }

    /// Virtual seconds of arrivals.
    pub fn duration(&self) -> f64 {
        self.ladder.iter().map(|(_, seconds)| seconds).sum()
    }

    /// All arrivals in order of time; equal for equal seeds.
    pub fn arrivals(&self) -> Vec<Arrival> {
        let mut rng = fastrand::Rng::with_seed(self.seed);
        let mut order: Vec<usize> = (0..self.groups * self.prompts_per_group).collect();
        rng.shuffle(&mut order);
        let mut arrivals = Vec::new();
        let mut start = 0.0;
        for (rung, (rate, seconds)) in self.ladder.iter().enumerate() {
            let end = start + seconds;
            let mut at = start;
            loop {
                // Exponential gaps make a Poisson process; 1 - U is never 0.
                at += -(1.0 - rng.f64()).ln() / rate;
                if at >= end {
                    break;
                }
                let prompt = order
                    .get(arrivals.len() % order.len().max(1))
                    .copied()
                    .unwrap_or(0);
                arrivals.push(Arrival { at, prompt, rung });
            }
            start = end;
        }
        arrivals
    }

    /// Request bodies by prompt index.
    pub fn bodies(&self, model: &str) -> Vec<Bytes> {
        let prompts = 0..self.groups * self.prompts_per_group;
        prompts.map(|prompt| self.body(model, prompt)).collect()
    }

    fn body(&self, model: &str, prompt: usize) -> Bytes {
        let mut text = words(
            2 * (prompt / self.prompts_per_group) as u64,
            self.prefix_tokens,
        );
        text.push_str(&words(2 * prompt as u64 + 1, self.question_tokens));
        let body = serde_json::json!({
            "model": model, "prompt": text, "max_tokens": self.output_tokens, "stream": true,
        });
        Bytes::from(body.to_string())
    }
}

/// `tokens` tokens of text that differs by `seed`.
fn words(seed: u64, tokens: usize) -> String {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut text = String::with_capacity(tokens * TOKEN_BYTES);
    for _ in 0..tokens {
        text.extend((0..TOKEN_BYTES - 1).map(|_| rng.lowercase()));
        text.push(' ');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_ladder_gives_its_published_number_of_requests() {
        let workload = Workload::published();
        assert!((workload.duration() - 502.0).abs() < 1e-9);
        let arrivals = workload.arrivals();
        // The rates add up to 17,084 expected arrivals; five standard deviations are 653.
        let expected: f64 = workload
            .ladder
            .iter()
            .map(|(rate, seconds)| rate * seconds)
            .sum();
        assert!((expected - 17_084.0).abs() < 1e-9, "{expected}");
        assert!((arrivals.len() as f64 - expected).abs() < 5.0 * expected.sqrt());
        assert!(arrivals.windows(2).all(|pair| pair[0].at <= pair[1].at));
        assert_eq!(arrivals, workload.arrivals());
    }

    #[test]
    fn prompts_of_a_group_share_exactly_the_prefix() {
        let workload = Workload::small();
        let text = |prompt| {
            let body: serde_json::Value =
                serde_json::from_slice(&workload.body("m", prompt)).unwrap();
            body["prompt"].as_str().unwrap().to_owned()
        };
        let (a, b, c) = (text(0), text(1), text(5));
        assert_eq!(a.len(), 7200 * 4);
        assert_eq!(a[..24_000], b[..24_000]);
        assert_ne!(a[24_000..24_100], b[24_000..24_100]);
        assert_ne!(a[..100], c[..100]);
    }
}
