//! A model of the hub on its way into use: from the cache at once, from the hub as soon as it answers.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;

use super::{Hub, HubError, Repo};
use crate::kvcache::tokens::slot::Slot;
use crate::kvcache::tokens::stats::TokenStats;

/// First pause before the hub is asked again; doubles.
const MIN_PAUSE: Duration = Duration::from_secs(1);
/// Longest pause, and the only one where asking soon cannot help.
const MAX_PAUSE: Duration = Duration::from_mins(5);
/// How often a cache is looked at that others fill.
const OFFLINE_PAUSE: Duration = Duration::from_secs(30);

/// Pauses between attempts.
#[derive(Debug)]
struct Backoff {
    next: Duration,
}

impl Backoff {
    fn new() -> Self {
        Self { next: MIN_PAUSE }
    }

    /// Half to all of the pause, so that replicas that started together do not ask together; never less
    /// than the server asked for.
    fn pause(&mut self, error: &HubError) -> Duration {
        let pause = match error {
            HubError::Offline(_) => OFFLINE_PAUSE,
            error if error.is_lasting() => MAX_PAUSE,
            _ => self.next,
        };
        self.next = (self.next * 2).min(MAX_PAUSE);
        let jittered = pause.mul_f64(0.5 + fastrand::f64() / 2.0);
        jittered.max(error.retry_after().unwrap_or_default())
    }
}

/// Brings `repo` into `slot`; ends once the newest files are there, however often that takes.
pub(in crate::kvcache::tokens) async fn follow(slot: Arc<Slot>, hub: Arc<Hub>, repo: Repo) {
    let cached = hub.cached(&repo);
    if let Some(cached) = &cached {
        slot.take(cached);
        if hub.is_settled(&repo) {
            return;
        }
    }
    let mut backoff = Backoff::new();
    loop {
        let before = hub.downloads();
        let fetched = hub.fetch(&repo).await;
        TokenStats::add_n(&slot.stats().hub_downloads, hub.downloads() - before);
        let error = match fetched {
            Ok(snapshot) => {
                TokenStats::add(&slot.stats().hub_resolved);
                // What was loaded from the cache may be just that.
                slot.take(&snapshot);
                return;
            }
            Err(error) => error,
        };
        TokenStats::add(&slot.stats().hub_failures);
        slot.not_fetched(&error.to_string());
        sleep(backoff.pause(&error)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn within(pause: Duration, seconds: u64) -> bool {
        let full = Duration::from_secs(seconds);
        (full / 2..=full).contains(&pause)
    }

    #[test]
    fn pauses_double_up_to_a_bound_and_are_jittered() {
        let mut backoff = Backoff::new();
        let error = HubError::Exchange {
            host: "h".to_owned(),
            reason: "refused".to_owned(),
        };
        for seconds in [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300] {
            let pause = backoff.pause(&error);
            assert!(within(pause, seconds), "{pause:?} of {seconds}");
        }
        let mut drawn: Vec<_> = (0..8).map(|_| backoff.pause(&error)).collect();
        drawn.dedup();
        assert!(drawn.len() > 1, "always the same");
    }

    #[test]
    fn a_server_may_ask_for_more_and_what_lasts_is_not_asked_soon() {
        let busy = HubError::Status {
            host: "h".to_owned(),
            status: 429,
            retry_after: Some(Duration::from_secs(90)),
        };
        assert_eq!(Backoff::new().pause(&busy), Duration::from_secs(90));
        let denied = HubError::Denied {
            id: "a/b".to_owned(),
            status: 401,
        };
        assert!(within(Backoff::new().pause(&denied), 300));
        assert!(within(
            Backoff::new().pause(&HubError::Offline("a/b".into())),
            30
        ));
    }
}
