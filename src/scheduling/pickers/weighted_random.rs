//! `weighted-random-picker`

use crate::plugin::{Build, Maturity, ParamDoc, Plugin, PluginError};
use crate::scheduling::{Cycle, Picker, Scored};

/// Takes endpoints with probability proportional to their totals, without replacement
/// (Efraimidis and Spirakis: sort by `U^(1/total)`). Without a positive total the choice is uniform.
#[derive(Debug)]
pub struct WeightedRandomPicker {
    max_endpoints: usize,
}

impl Plugin for WeightedRandomPicker {
    const TYPE: &'static str = "weighted-random-picker";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = super::PARAMETERS;
    const ABOUT: &'static str = "Picks endpoints with probability proportional to their totals.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        Ok(Self {
            max_endpoints: super::max_endpoints::<Self>(build)?,
        })
    }
}

impl Picker for WeightedRandomPicker {
    fn pick(&self, cycle: &Cycle<'_>, scored: &mut Vec<Scored>) {
        let mut rng = cycle.rng.borrow_mut();
        rng.shuffle(scored);
        if scored.iter().any(|s| s.total > 0.0) {
            for candidate in scored.iter_mut() {
                candidate.total = if candidate.total > 0.0 {
                    rng.f64().powf(1.0 / candidate.total)
                } else {
                    0.0
                };
            }
            scored.sort_by(|a, b| b.total.total_cmp(&a.total));
        }
        scored.truncate(self.max_endpoints);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduling::test_support::Pool;

    fn shares(totals: [f64; 3]) -> [u32; 3] {
        let pool = Pool::new([]);
        let mut counts = [0; 3];
        for _ in 0..4000 {
            let mut scored: Vec<Scored> = totals
                .iter()
                .zip(0..)
                .map(|(&total, position)| Scored { position, total })
                .collect();
            pool.with_cycle(|cycle, _| {
                WeightedRandomPicker { max_endpoints: 1 }.pick(cycle, &mut scored);
            });
            counts[scored[0].position as usize] += 1;
        }
        counts
    }

    #[test]
    fn shares_follow_the_totals() {
        // Weights 3:1:0 of 4000 picks are 3000, 1000, 0; five standard deviations are 137.
        let [a, b, c] = shares([3.0, 1.0, 0.0]);
        assert!(
            (2863..=3137).contains(&a) && (863..=1137).contains(&b) && c == 0,
            "{a} {b} {c}"
        );
    }

    #[test]
    fn without_a_positive_total_the_choice_is_uniform() {
        // 1333 each; five standard deviations are 149.
        assert!(
            shares([0.0, -1.0, 0.0])
                .iter()
                .all(|c| (1184..=1482).contains(c))
        );
    }
}
