//! Two copies of one value: readers are sent to one while the writer changes the other.
//!
//! A reader waits for nobody: the copy it is sent to is one the writer has left. The writer waits for
//! readers that still look at the copy it wants, which is a microsecond, and only when it publishes twice
//! within one look-up. Every change is made twice, on either copy, so changes are small and were thought
//! out before (see [`super::view`]).

use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::{RwLock, RwLockReadGuard};

/// See the module.
#[derive(Debug)]
pub(super) struct Copies<T> {
    both: [Apart<RwLock<T>>; 2],
    /// Where readers are sent.
    front: Apart<AtomicUsize>,
}

/// Shares no line of the processors' caches with anything else, nor the pair of lines that are fetched
/// together: what the writer changes is not taken from readers of something beside it.
#[derive(Debug)]
#[repr(align(128))]
struct Apart<T>(T);

impl<T> Copies<T> {
    /// Both values must be equal.
    pub(super) fn new(one: T, other: T) -> Self {
        Self {
            both: [one, other].map(|copy| Apart(RwLock::new(copy))),
            front: Apart(AtomicUsize::new(0)),
        }
    }

    /// The published value; it stays as it is while the guard lives. Never waits: it tries again only
    /// when the other copy was published while the first try went on.
    pub(super) fn read(&self) -> RwLockReadGuard<'_, T> {
        loop {
            if let Some(guard) = self.read_copy(self.front.0.load(Ordering::Acquire)) {
                return guard;
            }
            std::hint::spin_loop();
        }
    }

    /// The copy `number`, if it is the published one. Asked again under the guard: a reader that was late
    /// may come to a copy which the writer has left and not yet published, and the next reader would see
    /// an older value than this one did.
    fn read_copy(&self, number: usize) -> Option<RwLockReadGuard<'_, T>> {
        let [first, second] = &self.both;
        let Apart(copy) = if number == 0 { first } else { second };
        let guard = copy.try_read()?;
        (self.front.0.load(Ordering::Acquire) == number).then_some(guard)
    }

    /// Has `change` bring the other copy up to date and further, and publishes it. One writer at a time:
    /// the caller holds a lock that says so.
    pub(super) fn publish<R>(&self, change: impl FnOnce(&mut T) -> R) -> R {
        let [first, second] = &self.both;
        let (back, number) = match self.front.0.load(Ordering::Relaxed) {
            0 => (second, 1),
            _ => (first, 0),
        };
        let mut guard = back.0.write();
        let result = change(&mut guard);
        // Left before readers are sent there.
        drop(guard);
        self.front.0.store(number, Ordering::Release);
        result
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;
    use std::thread;

    use super::*;

    #[test]
    fn readers_see_whole_changes_and_never_wait_for_one() {
        let copies = Copies::new((0_u64, 0_u64), (0, 0));
        copies.publish(|value| {
            *value = (1, 1);
            // The writer is in the middle of a change, and readers go on.
            assert_eq!(*copies.read(), (0, 0));
        });
        assert_eq!(*copies.read(), (1, 1));
        let held = copies.read();
        copies.publish(|value| *value = (2, 2));
        assert_eq!((*held, *copies.read()), ((1, 1), (2, 2)));
    }

    #[test]
    fn a_late_reader_is_sent_on_to_the_published_copy() {
        let copies = Copies::new(0, 0);
        assert_eq!(copies.read_copy(0).as_deref(), Some(&0));
        assert!(copies.read_copy(1).is_none());
        copies.publish(|value| *value = 1);
        assert!(copies.read_copy(0).is_none());
        assert_eq!(copies.read_copy(1).as_deref(), Some(&1));
    }

    #[test]
    fn threads_see_either_value_of_a_pair_and_never_a_mix() {
        let copies = Arc::new(Copies::new((0_u64, 0_u64), (0, 0)));
        let done = Arc::new(AtomicBool::new(false));
        let readers: Vec<_> = (0..2)
            .map(|_| {
                let (copies, done) = (Arc::clone(&copies), Arc::clone(&done));
                thread::spawn(move || {
                    let mut newest = 0;
                    while !done.load(Ordering::Relaxed) {
                        let (one, other) = *copies.read();
                        assert_eq!(one, other);
                        assert!(one >= newest, "a reader never goes back in time");
                        newest = one;
                    }
                })
            })
            .collect();
        for n in 1..20_000 {
            copies.publish(|value| {
                value.0 = n;
                value.1 = n;
            });
        }
        done.store(true, Ordering::Relaxed);
        for reader in readers {
            reader.join().unwrap();
        }
    }
}
