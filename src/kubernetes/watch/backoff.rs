//! How long to wait before the next try.

use std::time::Duration;

/// Pause after the first failure.
const FIRST: Duration = Duration::from_millis(500);
/// Longest pause.
const LONGEST: Duration = Duration::from_secs(15);

/// Doubles from half a second to fifteen. Half of each pause is random, so that all replicas of all
/// pools do not come back to a server at once.
#[derive(Debug, Clone)]
pub struct Backoff {
    next: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { next: FIRST }
    }
}

impl Backoff {
    /// The pause after another failure.
    pub fn pause(&mut self) -> Duration {
        let pause = self.next;
        self.next = (pause * 2).min(LONGEST);
        pause.mul_f64(0.5 + fastrand::f64() / 2.0)
    }

    /// True once the pauses grow no more.
    pub fn is_longest(&self) -> bool {
        self.next >= LONGEST
    }

    /// Something worked.
    pub fn reset(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_limit_and_half_of_each_is_random() {
        let mut backoff = Backoff::default();
        // 0.5, 1, 2, 4, 8, then 15 for good.
        for longest in [0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0] {
            let pause = backoff.pause().as_secs_f64();
            assert!(
                (longest / 2.0..=longest).contains(&pause),
                "{pause} of {longest}"
            );
        }
        assert!(backoff.is_longest());
        backoff.reset();
        assert!(!backoff.is_longest());
        assert!(backoff.pause() <= FIRST);
    }
}
