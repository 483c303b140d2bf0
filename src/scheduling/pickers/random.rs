//! `random-picker`

use crate::plugin::{Build, Maturity, ParamDoc, Plugin, PluginError};
use crate::scheduling::{Cycle, Picker, Scored};

/// Takes endpoints at random, whatever their totals.
#[derive(Debug)]
pub struct RandomPicker {
    max_endpoints: usize,
}

impl Plugin for RandomPicker {
    const TYPE: &'static str = "random-picker";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = super::PARAMETERS;
    const ABOUT: &'static str = "Picks endpoints at random.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        Ok(Self {
            max_endpoints: super::max_endpoints::<Self>(build)?,
        })
    }
}

impl Picker for RandomPicker {
    fn pick(&self, cycle: &Cycle<'_>, scored: &mut Vec<Scored>) {
        cycle.rng.borrow_mut().shuffle(scored);
        scored.truncate(self.max_endpoints);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduling::test_support::Pool;

    #[test]
    fn totals_do_not_matter() {
        let pool = Pool::new([]);
        let mut counts = [0; 4];
        for _ in 0..4000 {
            let mut scored: Vec<Scored> = (0..4)
                .map(|p| Scored {
                    position: p,
                    total: f64::from(p),
                })
                .collect();
            pool.with_cycle(|cycle, _| RandomPicker { max_endpoints: 2 }.pick(cycle, &mut scored));
            assert_eq!(scored.len(), 2);
            counts[scored[0].position as usize] += 1;
        }
        // 1000 each; five standard deviations are 137.
        assert!(
            counts.iter().all(|c| (863..=1137).contains(c)),
            "{counts:?}"
        );
    }
}
