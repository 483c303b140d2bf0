//! A few threads that do what would hold up the picks of other requests.

use std::collections::VecDeque;
use std::num::NonZero;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::stats::TokenStats;

/// Jobs that may wait unless configured. At 10 ms each (a 30 KB prompt) and two workers the last one
/// waits about a second, which is longer than its request should.
pub const DEFAULT_QUEUE: usize = 256;

type Job = Box<dyn FnOnce() + Send>;

/// Why a job has no result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    /// The queue is full; the request goes on without the result.
    #[error("tokenizer queue is full")]
    Full,
    /// The job panicked, or the pool is shutting down.
    #[error("tokenizer worker gave no result")]
    Lost,
}

/// What a [`Pool`] has done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// Jobs waiting now.
    pub queued: usize,
    /// Jobs run to their end.
    pub done: u64,
    /// Jobs refused because the queue was full.
    pub refused: u64,
    /// Jobs whose request had gone before they ran.
    pub abandoned: u64,
    /// Jobs that panicked.
    pub panicked: u64,
}

struct Shared {
    state: Mutex<State>,
    work: Condvar,
    stats: Arc<TokenStats>,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    closed: bool,
}

/// Worker threads with one bounded queue. Dropping it ends the threads after their current job.
pub struct Pool {
    shared: Arc<Shared>,
    queue: usize,
    workers: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool")
            .field("workers", &self.workers.len())
            .field("queue", &self.queue)
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

impl Pool {
    /// Half the cores, at least one: the others pick.
    pub fn default_workers() -> usize {
        std::thread::available_parallelism()
            .map_or(1, NonZero::get)
            .div_ceil(2)
    }

    /// Starts `workers` threads; up to `queue` jobs wait for them, more are refused. What happens is
    /// counted in `stats`.
    pub fn new(workers: usize, queue: usize, stats: Arc<TokenStats>) -> std::io::Result<Self> {
        let mut pool = Self {
            shared: Arc::new(Shared {
                state: Mutex::default(),
                work: Condvar::new(),
                stats,
            }),
            queue,
            workers: Vec::new(),
        };
        for number in 0..workers.max(1) {
            let shared = Arc::clone(&pool.shared);
            let worker = std::thread::Builder::new()
                .name(format!("tokenizer-{number}"))
                .spawn(move || shared.run())?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// Counters.
    pub fn stats(&self) -> PoolStats {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let stats = &self.shared.stats;
        PoolStats {
            queued: stats.waiting.load(Ordering::Relaxed),
            done: count(&stats.done),
            refused: count(&stats.refused),
            abandoned: count(&stats.abandoned),
            panicked: count(&stats.panicked),
        }
    }

    /// Queues `work`; the future ends with its result. Dropping the future before a worker got to it
    /// saves the work.
    pub fn run<T: Send + 'static, F: FnOnce() -> T + Send + 'static>(
        &self,
        work: F,
    ) -> Result<impl Future<Output = Result<T, PoolError>> + Send + use<T, F>, PoolError> {
        let (sender, receiver) = oneshot::channel();
        let stats = Arc::clone(&self.shared.stats);
        let queued = Instant::now();
        let job = Box::new(move || {
            let started = Instant::now();
            stats.wait.observe(started - queued);
            if sender.is_closed() {
                TokenStats::add(&stats.abandoned);
                return;
            }
            let result = work();
            stats.work.observe(started.elapsed());
            TokenStats::add(&stats.done);
            // The request may have gone meanwhile.
            let _ = sender.send(result);
        });
        self.push(job)?;
        Ok(async move { receiver.await.map_err(|_| PoolError::Lost) })
    }

    fn push(&self, job: Job) -> Result<(), PoolError> {
        let mut state = self.shared.state.lock();
        if state.jobs.len() >= self.queue {
            TokenStats::add(&self.shared.stats.refused);
            return Err(PoolError::Full);
        }
        state.jobs.push_back(job);
        // Under the lock, so that the gauge cannot stay behind the queue.
        let waiting = state.jobs.len();
        self.shared.stats.waiting.store(waiting, Ordering::Relaxed);
        drop(state);
        self.shared.work.notify_one();
        Ok(())
    }
}

impl Shared {
    fn run(&self) {
        while let Some(job) = self.next() {
            self.stats.running.fetch_add(1, Ordering::Relaxed);
            // Everything a job touches is behind locks that do not poison, or its own.
            if catch_unwind(AssertUnwindSafe(job)).is_err() {
                TokenStats::add(&self.stats.panicked);
            }
            self.stats.running.fetch_sub(1, Ordering::Relaxed);
        }
    }

    fn next(&self) -> Option<Job> {
        let mut state = self.state.lock();
        loop {
            if state.closed {
                return None;
            }
            if let Some(job) = state.jobs.pop_front() {
                let waiting = state.jobs.len();
                self.stats.waiting.store(waiting, Ordering::Relaxed);
                return Some(job);
            }
            self.work.wait(&mut state);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        {
            let mut state = self.shared.state.lock();
            state.closed = true;
            // Their requests learn at once that nothing will come.
            state.jobs.clear();
            self.shared.stats.waiting.store(0, Ordering::Relaxed);
        }
        self.shared.work.notify_all();
        let this = std::thread::current().id();
        for worker in self.workers.drain(..) {
            // A job may hold the last reference to its pool.
            if worker.thread().id() != this {
                let _ = worker.join();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(workers: usize, queue: usize) -> Pool {
        Pool::new(workers, queue, Arc::default()).unwrap()
    }

    /// Keeps the only worker busy until the sender is dropped or used.
    fn block(
        pool: &Pool,
    ) -> (
        oneshot::Sender<()>,
        impl Future<Output = Result<(), PoolError>> + use<>,
    ) {
        let (release, wait) = oneshot::channel::<()>();
        let (started, running) = std::sync::mpsc::sync_channel(1);
        let blocked = pool
            .run(move || {
                started.send(()).unwrap();
                let _ = wait.blocking_recv();
            })
            .unwrap();
        running.recv().unwrap();
        (release, blocked)
    }

    #[tokio::test]
    async fn work_is_done_elsewhere() {
        let pool = pool(2, 8);
        let here = std::thread::current().id();
        let there = pool
            .run(|| std::thread::current().id())
            .unwrap()
            .await
            .unwrap();
        assert_ne!(here, there);
        assert_eq!(pool.stats().done, 1);
    }

    #[tokio::test]
    async fn a_full_queue_refuses() {
        let pool = pool(1, 1);
        let (release, blocked) = block(&pool);
        let waiting = pool.run(|| 1).unwrap();
        assert_eq!(pool.run(|| 2).err(), Some(PoolError::Full));
        assert_eq!((pool.stats().queued, pool.stats().refused), (1, 1));
        let stats = Arc::clone(&pool.shared.stats);
        assert_eq!(stats.running.load(Ordering::Relaxed), 1);
        drop(release);
        blocked.await.unwrap();
        assert_eq!(waiting.await, Ok(1));
        assert_eq!(stats.waiting.load(Ordering::Relaxed), 0);
        assert_eq!((stats.wait.count(), stats.work.count()), (2, 2));
    }

    #[tokio::test]
    async fn work_nobody_waits_for_is_not_done() {
        let pool = pool(1, 4);
        let (release, blocked) = block(&pool);
        drop(pool.run(|| panic!("must not run")).unwrap());
        let last = pool.run(|| ()).unwrap();
        drop(release);
        blocked.await.unwrap();
        last.await.unwrap();
        assert_eq!((pool.stats().abandoned, pool.stats().panicked), (1, 0));
    }

    #[tokio::test]
    async fn a_panic_ends_one_job() {
        let pool = pool(1, 4);
        let lost = pool.run(|| panic!("on purpose")).unwrap();
        assert_eq!(lost.await, Err(PoolError::Lost));
        assert_eq!(pool.run(|| 7).unwrap().await, Ok(7));
        assert_eq!(pool.stats().panicked, 1);
    }

    #[tokio::test]
    async fn dropping_the_pool_answers_those_who_wait() {
        let pool = pool(1, 4);
        let (release, blocked) = block(&pool);
        let waiting = pool.run(|| 1).unwrap();
        let ending = std::thread::spawn(move || drop(pool));
        assert_eq!(waiting.await, Err(PoolError::Lost));
        drop(release);
        blocked.await.unwrap();
        ending.join().unwrap();
    }
}
