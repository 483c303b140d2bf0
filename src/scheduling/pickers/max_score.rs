//! `max-score-picker`

use crate::plugin::{Build, Maturity, ParamDoc, Plugin, PluginError};
use crate::scheduling::{Cycle, Picker, Scored};

/// Takes the highest totals; ties are random.
#[derive(Debug)]
pub struct MaxScorePicker {
    max_endpoints: usize,
}

impl Default for MaxScorePicker {
    fn default() -> Self {
        Self { max_endpoints: 1 }
    }
}

impl Plugin for MaxScorePicker {
    const TYPE: &'static str = "max-score-picker";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = super::PARAMETERS;
    const ABOUT: &'static str = "Picks the endpoints with the highest totals; ties are random.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        Ok(Self {
            max_endpoints: super::max_endpoints::<Self>(build)?,
        })
    }
}

impl Picker for MaxScorePicker {
    fn pick(&self, cycle: &Cycle<'_>, scored: &mut Vec<Scored>) {
        let mut rng = cycle.rng.borrow_mut();
        // One endpoint is the common case: a single pass with reservoir choice among ties.
        if self.max_endpoints == 1 {
            let mut best: Option<Scored> = None;
            let mut ties = 0u32;
            for candidate in scored.iter() {
                match best {
                    Some(b) if candidate.total < b.total => {}
                    #[expect(clippy::float_cmp, reason = "a tie is an exactly equal total")]
                    Some(b) if candidate.total == b.total => {
                        ties += 1;
                        if rng.u32(..ties) == 0 {
                            best = Some(*candidate);
                        }
                    }
                    _ => {
                        best = Some(*candidate);
                        ties = 1;
                    }
                }
            }
            scored.clear();
            scored.extend(best);
            return;
        }
        rng.shuffle(scored);
        scored.sort_by(|a, b| b.total.total_cmp(&a.total));
        scored.truncate(self.max_endpoints);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduling::test_support::Pool;

    fn pick(max_endpoints: usize, totals: &[f64]) -> Vec<u32> {
        let pool = Pool::new([]);
        let mut scored: Vec<Scored> = totals
            .iter()
            .zip(0..)
            .map(|(&total, position)| Scored { position, total })
            .collect();
        pool.with_cycle(|cycle, _| MaxScorePicker { max_endpoints }.pick(cycle, &mut scored));
        scored.iter().map(|s| s.position).collect()
    }

    #[test]
    fn the_highest_totals_come_first() {
        assert_eq!(pick(1, &[0.1, 0.9, 0.5]), [1]);
        assert_eq!(pick(2, &[0.1, 0.9, 0.5]), [1, 2]);
        assert_eq!(pick(9, &[-1.0, 0.0]), [1, 0]);
    }

    #[test]
    fn ties_are_spread_evenly() {
        let pool = Pool::new([]);
        let mut counts = [0; 3];
        for _ in 0..3000 {
            let mut scored: Vec<Scored> = (0..3)
                .map(|position| Scored {
                    position,
                    total: 1.0,
                })
                .collect();
            pool.with_cycle(|cycle, _| MaxScorePicker::default().pick(cycle, &mut scored));
            counts[scored[0].position as usize] += 1;
        }
        // 1000 each; five standard deviations of a binomial (3000, 1/3) are 129.
        assert!(
            counts.iter().all(|c| (871..=1129).contains(c)),
            "{counts:?}"
        );
    }
}
