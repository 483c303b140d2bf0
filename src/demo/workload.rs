//! Shared-prefix traffic: groups of prompts with a long common beginning, arriving at random.
//!
//! The shape is that of the published "KV-cache wins" benchmark: many customers (groups), each with a
//! long system prompt and several questions, Poisson arrivals at a ladder of rates, prompts repeated
//! in shuffled rounds.

use bytes::Bytes;
use serde::Serialize;

/// Bytes that the simulator and the picker count as one token.
const TOKEN_BYTES: usize = 4;

/// When a rung of the ladder begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Pacing {
    /// Once every request of the rung before has ended, so that no rung inherits a backlog. This is
    /// how inference-perf, the load generator of the published run, goes through its stages; as
    /// there, a rung has exactly rate x seconds requests.
    Draining,
    /// When the rung before has lasted its seconds, whatever is still unanswered: a backlog carries
    /// over. The number of requests is that of a Poisson process.
    Continuous,
}

/// One rung of the ladder.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Rung {
    /// Requests per virtual second.
    pub rate: f64,
    /// Virtual seconds of arrivals.
    pub seconds: f64,
    /// It fills the caches; shown beside the others, not one of the measured rates.
    pub warm_up: bool,
}

impl Rung {
    /// A measured rung.
    pub fn new(rate: f64, seconds: f64) -> Self {
        Self {
            rate,
            seconds,
            warm_up: false,
        }
    }

    /// A rung in front of the measured ones.
    pub fn warm_up(rate: f64, seconds: f64) -> Self {
        Self {
            warm_up: true,
            ..Self::new(rate, seconds)
        }
    }

    /// Requests of the rung when it has exactly as many as are expected.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a count; the cast saturates"
    )]
    fn requests(&self) -> usize {
        (self.rate * self.seconds).round() as usize
    }
}

/// Parameters of a run. Times are virtual seconds.
#[derive(Debug, Clone, Serialize)]
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
    /// Rates, one after the other.
    pub ladder: Vec<Rung>,
    /// When each begins.
    pub pacing: Pacing,
    /// Of arrivals and order.
    pub seed: u64,
}

/// One request to send.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Arrival {
    /// Virtual seconds from the start of its stage.
    pub at: f64,
    /// Index of the prompt.
    pub prompt: usize,
    /// Index of the ladder's rung.
    pub rung: usize,
}

impl Workload {
    /// The published workload: 150 groups of 5, 6,000 + 1,200 tokens in, 1,000 out, a warm-up, then 3
    /// to 60 requests/s.
    pub fn published() -> Self {
        let measured = [
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
        let measured = measured
            .into_iter()
            .map(|(rate, seconds)| Rung::new(rate, seconds));
        Self {
            groups: 150,
            prompts_per_group: 5,
            prefix_tokens: 6000,
            question_tokens: 1200,
            output_tokens: 1000,
            ladder: std::iter::once(Rung::warm_up(15.0, 50.0))
                .chain(measured)
                .collect(),
            pacing: Pacing::Draining,
            seed: 42,
        }
    }

    /// The same shape for four pods and a minute: a third of the groups, a quarter of the output.
    pub fn small() -> Self {
        Self {
            groups: 50,
            output_tokens: 250,
            ladder: vec![
                Rung::warm_up(10.0, 20.0),
                Rung::new(5.0, 20.0),
                Rung::new(15.0, 30.0),
                Rung::new(30.0, 30.0),
            ],
            ..Self::published()
        }
    }

    /// Long prompts that share nothing, as many as there are requests: nothing is ever found in a
    /// cache. Four pods with an H100-class 32B model are busy with prompts for a fifth to two fifths of their time.
    pub fn long_prompts() -> Self {
        let ladder = [2.0, 3.0, 4.0].map(|rate| Rung::new(rate, 30.0));
        Self {
            groups: 0,
            prompts_per_group: 1,
            prefix_tokens: 0,
            question_tokens: 6000,
            output_tokens: 300,
            ladder: ladder.to_vec(),
            ..Self::published()
        }
        .without_repetition()
    }

    /// A group of one prompt for each request of the ladder, when its rungs drain.
    #[must_use]
    pub fn without_repetition(self) -> Self {
        Self {
            groups: self.ladder.iter().map(Rung::requests).sum(),
            prompts_per_group: 1,
            ..self
        }
    }

    /// What is sent on one clock; each stage ends with its last answer, before the next begins. A
    /// stage is a rung when they drain, else the whole ladder. Arrivals are in order of time, prompts
    /// go on in their shuffled order from rung to rung; equal for equal seeds.
    pub fn stages(&self) -> Vec<Vec<Arrival>> {
        let mut rng = fastrand::Rng::with_seed(self.seed);
        let mut order: Vec<usize> = (0..self.groups * self.prompts_per_group).collect();
        rng.shuffle(&mut order);
        let mut prompts = order.into_iter().cycle();
        match self.pacing {
            Pacing::Draining => {
                let rungs = self.ladder.iter().enumerate();
                rungs
                    .map(|(index, rung)| counted(&mut rng, rung, index, &mut prompts))
                    .collect()
            }
            Pacing::Continuous => vec![self.continuous(&mut rng, &mut prompts)],
        }
    }

    fn continuous(
        &self,
        rng: &mut fastrand::Rng,
        prompts: &mut impl Iterator<Item = usize>,
    ) -> Vec<Arrival> {
        let mut arrivals = Vec::new();
        let mut start = 0.0;
        for (index, rung) in self.ladder.iter().enumerate() {
            let end = start + rung.seconds;
            let mut at = start + gap(rng, rung.rate);
            while at < end {
                let Some(prompt) = prompts.next() else {
                    return arrivals;
                };
                arrivals.push(Arrival {
                    at,
                    prompt,
                    rung: index,
                });
                at += gap(rng, rung.rate);
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

/// Exactly the expected number of requests of `rung`, in a Poisson process at its rate.
fn counted(
    rng: &mut fastrand::Rng,
    rung: &Rung,
    index: usize,
    prompts: &mut impl Iterator<Item = usize>,
) -> Vec<Arrival> {
    let mut at = 0.0;
    let arrivals = prompts.take(rung.requests()).map(|prompt| {
        at += gap(rng, rung.rate);
        Arrival {
            at,
            prompt,
            rung: index,
        }
    });
    arrivals.collect()
}

/// Seconds between two arrivals: exponential gaps make a Poisson process; 1 - U is never 0.
fn gap(rng: &mut fastrand::Rng, rate: f64) -> f64 {
    -(1.0 - rng.f64()).ln() / rate
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
    fn draining_stages_have_the_published_number_of_requests() {
        let stages = Workload::published().stages();
        let counts: Vec<usize> = stages.iter().map(Vec::len).collect();
        // rate * seconds: 15 * 50, 3 * 20, 10 * 20, 15 * 20, 20 * 38, 22 * 34, 25 * 30, ...
        assert_eq!(
            counts,
            [
                750, 60, 200, 300, 760, 748, 750, 750, 735, 1520, 1548, 1518, 1470, 1508, 1485,
                1482, 1500
            ]
        );
        for (index, stage) in stages.iter().enumerate() {
            assert!(
                stage
                    .iter()
                    .all(|arrival| arrival.rung == index && arrival.at > 0.0)
            );
            assert!(stage.windows(2).all(|pair| pair[0].at < pair[1].at));
        }
        // 1,500 gaps of mean 1/60 s: 25 s, standard deviation 25 / sqrt(1500) = 0.65 s.
        let last = stages.last().and_then(|stage| stage.last()).unwrap();
        assert!((last.at - 25.0).abs() < 5.0 * 0.65, "{}", last.at);
        assert_eq!(stages, Workload::published().stages());
    }

    #[test]
    fn prompts_go_on_in_shuffled_rounds_over_the_stages() {
        let workload = Workload::published();
        let prompts: Vec<usize> = workload
            .stages()
            .iter()
            .flatten()
            .map(|arrival| arrival.prompt)
            .collect();
        let mut round = prompts[..750].to_vec();
        round.sort_unstable();
        assert!(
            round.iter().copied().eq(0..750),
            "each prompt once in a round"
        );
        assert!(prompts.windows(751).all(|window| window[0] == window[750]));
        let other = Workload {
            seed: 43,
            ..workload
        };
        assert_ne!(other.stages()[0][0].prompt, prompts[0]);
    }

    #[test]
    fn long_prompts_are_sent_once() {
        let workload = Workload::long_prompts();
        let arrivals: Vec<Arrival> = workload.stages().concat();
        let mut prompts: Vec<usize> = arrivals.iter().map(|arrival| arrival.prompt).collect();
        // (2 + 3 + 4) * 30.
        assert_eq!(prompts.len(), 270);
        prompts.sort_unstable();
        assert!(prompts.into_iter().eq(0..270));
        let body = |prompt| String::from_utf8(workload.body("m", prompt).to_vec()).unwrap();
        assert!(body(0).len() > 24_000);
        assert_ne!(body(0)[..60], body(1)[..60], "not even the first block");
    }

    #[test]
    fn continuous_arrivals_are_one_stage_as_long_as_the_ladder() {
        let workload = Workload {
            pacing: Pacing::Continuous,
            ..Workload::published()
        };
        let stages = workload.stages();
        assert_eq!(stages.len(), 1);
        let arrivals = &stages[0];
        // The rates add up to 17,084 expected arrivals in 502 s; five standard deviations are 653.
        assert!((arrivals.len() as f64 - 17_084.0).abs() < 653.0);
        assert!(arrivals.windows(2).all(|pair| pair[0].at <= pair[1].at));
        assert!(arrivals.iter().all(|arrival| arrival.at < 502.0));
        assert!(
            arrivals
                .iter()
                .all(|arrival| (arrival.rung == 0) == (arrival.at < 50.0))
        );
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
