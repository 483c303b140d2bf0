//! Numbers that are kept elsewhere and read when somebody asks for the metrics.

use std::sync::{Arc, Weak};

use metrics::Counter;
use parking_lot::Mutex;

/// Copies numbers of its own into metrics, or writes them itself.
pub trait Collect: Send + Sync {
    /// Called before every exposition, from one task at a time or several.
    fn collect(&self) {}

    /// Writes series that are there only while what they are about is: a registered one stays for good.
    fn expose(&self, _out: &mut String) {}

    /// Lets go of what it keeps of endpoints that have left.
    fn forget_departed(&self, _is_there: IsThere<'_>) {}
}

/// Tells whether an endpoint is in the pool, by name and, where it is known, namespace.
pub type IsThere<'a> = &'a dyn Fn(&str, Option<&str>) -> bool;

/// Collectors that are still alive. Plugins are few, so the list needs no bound of its own.
static COLLECTORS: Mutex<Vec<Weak<dyn Collect>>> = Mutex::new(Vec::new());

/// Asks `collector` before every exposition, for as long as it lives.
pub fn register<C: Collect + 'static>(collector: &Arc<C>) {
    let weak: Weak<C> = Arc::downgrade(collector);
    let mut collectors = COLLECTORS.lock();
    collectors.retain(|other| other.strong_count() > 0);
    collectors.push(weak);
}

/// Those that are alive. A collector may take locks of its own, and may be the last to hold itself, so
/// nothing is asked of it under the lock.
fn alive() -> Vec<Arc<dyn Collect>> {
    let collectors = COLLECTORS.lock();
    collectors.iter().filter_map(Weak::upgrade).collect()
}

/// Lets all of them count.
pub(super) fn collect_all() {
    for collector in alive() {
        collector.collect();
    }
}

/// Lets all of them forget endpoints that have left. What one holds of another's goes the next time.
pub fn forget_departed(is_there: IsThere<'_>) {
    for collector in alive() {
        collector.forget_departed(is_there);
    }
}

/// Lets all of them write.
pub(super) fn expose_all(out: &mut String) {
    for collector in alive() {
        collector.expose(out);
    }
}

/// A counter that follows a total kept elsewhere.
pub struct Follow {
    counter: Counter,
    seen: u64,
}

impl std::fmt::Debug for Follow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Follow")
            .field("seen", &self.seen)
            .finish_non_exhaustive()
    }
}

impl Follow {
    /// Follows a total that begins at 0. The series is there from now on.
    pub fn new(counter: Counter) -> Self {
        counter.increment(0);
        Self { counter, seen: 0 }
    }

    /// Counts what the total grew by; one that shrank began anew.
    pub fn to(&mut self, total: u64) {
        let grown = total.checked_sub(self.seen).unwrap_or(total);
        if grown > 0 {
            self.counter.increment(grown);
        }
        self.seen = total;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[derive(Default)]
    struct Asked(AtomicU64);

    impl Collect for Asked {
        fn collect(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn the_living_are_asked() {
        let (one, other) = (Arc::new(Asked::default()), Arc::new(Asked::default()));
        register(&one);
        register(&other);
        collect_all();
        let before = other.0.load(Ordering::Relaxed);
        drop(one);
        collect_all();
        // Tests of other modules may render at the same time, so at least one more.
        assert!(other.0.load(Ordering::Relaxed) > before);
    }

    #[test]
    fn a_total_that_shrinks_began_anew() {
        let recorder = super::super::recorder::Recorder::new();
        let text = metrics::with_local_recorder(&recorder, || {
            let mut follow = Follow::new(metrics::counter!("followed"));
            // 5, then 2 more, then a new total that is at 3: 5 + 2 + 3.
            for total in [5, 7, 3] {
                follow.to(total);
            }
            recorder.exposition().render()
        });
        assert!(text.contains("followed 10\n"), "{text}");
    }
}
