//! The engine: continuous batching in steps over a block pool, on a virtual clock.
//!
//! The scheduler says what a step runs, the profile how long that takes. Time is virtual: a step's
//! duration is divided by the time scale and slept once, against a deadline, so that late wake-ups do
//! not add up; what the host cannot keep up with is counted as lag.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::events::{Event, Publisher};
use super::hash::BlockHash;
use super::latency::Profile;
use super::scheduler::{Plan, Scheduler, Sequence};
use super::totals::Totals;
use super::transfer::{Pull, Role};
use super::work::{Progress, Work};

/// Most lag before the virtual clock gives up catching up.
const MAX_LAG: Duration = Duration::from_millis(200);

/// Size and speed of an engine.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// What a step costs.
    pub profile: Profile,
    /// Times faster than real time.
    pub time_scale: f64,
    /// KV blocks, vLLM's unused null block included.
    pub blocks: usize,
    /// Tokens of a block.
    pub block_tokens: usize,
    /// Requests in a step.
    pub max_num_seqs: usize,
    /// Tokens in a step.
    pub max_num_batched_tokens: usize,
    /// Steps that are computed and slept as one when only decoding; keeps small hosts up with high
    /// time scales.
    pub steps_per_tick: usize,
    /// LoRA adapters that fit at once, at least 1.
    pub max_loras: usize,
    /// Tokens of a request, prompt and output together.
    pub max_model_len: usize,
    /// What the pod is for, when KV is handed from pod to pod.
    pub kv_role: Option<Role>,
}

impl EngineConfig {
    /// Tokens that the blocks hold.
    pub fn kv_tokens(&self) -> usize {
        self.blocks.saturating_sub(1) * self.block_tokens
    }

    /// Most tokens of a request that can be served.
    pub fn longest_request(&self) -> usize {
        self.max_model_len.min(self.kv_tokens())
    }

    /// Time of the simulated engine between two instants.
    pub fn virtual_seconds(&self, from: Instant, to: Instant) -> f64 {
        to.saturating_duration_since(from).as_secs_f64() * self.time_scale
    }
}

/// A reading of the engine.
#[derive(Debug, Clone)]
pub struct Stats {
    /// Requests in steps.
    pub running: usize,
    /// Requests in the queue, those whose KV is pulled included.
    pub waiting: usize,
    /// Those of them whose adapter has no place, or whose KV is not there yet.
    pub deferred: usize,
    /// Those of them whose KV is pulled now.
    pub pulling: usize,
    /// Those of them whose KV was pulled.
    pub pulled: usize,
    /// Share of blocks held.
    pub kv_usage: f64,
    /// Blocks held: by requests, and for other pods.
    pub held_blocks: usize,
    /// Ended requests whose blocks wait for another pod.
    pub kept: usize,
    /// Counters and distributions.
    pub totals: Totals,
    /// Adapters of running requests.
    pub running_loras: BTreeSet<String>,
    /// Adapters of waiting requests.
    pub waiting_loras: BTreeSet<String>,
}

/// One engine. Cheap to share.
#[derive(Debug)]
pub struct Engine {
    config: EngineConfig,
    scheduler: Mutex<Scheduler>,
    wake: Notify,
    /// Requests whose KV is pulled. Outlives a restart, as they do.
    pulling: AtomicUsize,
    publisher: Option<Publisher>,
}

/// A pull that is under way, until it is dropped.
#[derive(Debug)]
pub(super) struct Pulling<'a>(&'a AtomicUsize);

impl Drop for Pulling<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Engine {
    /// An idle engine; [`Self::run`] makes it work. What its cache stores and loses goes to
    /// `publisher`.
    pub fn new(config: EngineConfig, publisher: Option<Publisher>) -> Arc<Self> {
        Arc::new(Self {
            scheduler: Mutex::new(Scheduler::new(&config, publisher.is_some())),
            config,
            wake: Notify::new(),
            pulling: AtomicUsize::new(0),
            publisher,
        })
    }

    /// Who publishes its events.
    pub fn publisher(&self) -> Option<&Publisher> {
        self.publisher.as_ref()
    }

    /// Queues a request. `None` when it can never fit.
    pub fn submit(&self, work: Work) -> Option<Arc<Progress>> {
        if work.prompt_tokens + work.max_tokens > self.config.longest_request() {
            return None;
        }
        let progress = Arc::new(Progress::default());
        let sequence = Sequence::new(work, Arc::clone(&progress), Instant::now());
        self.scheduler.lock().queue(sequence);
        self.wake.notify_one();
        Some(progress)
    }

    /// A reading for metrics.
    pub fn stats(&self) -> Stats {
        let mut scheduler = self.scheduler.lock();
        scheduler.expire(Instant::now());
        let owned = |names: BTreeSet<&str>| names.into_iter().map(str::to_owned).collect();
        let pulling = self.pulling.load(Ordering::Relaxed);
        Stats {
            running: scheduler.running(),
            waiting: scheduler.waiting() + pulling,
            deferred: scheduler.deferred(&self.config) + pulling,
            pulling,
            pulled: scheduler.pulled(),
            kv_usage: scheduler.pool.usage(),
            held_blocks: scheduler.pool.held_blocks(),
            kept: scheduler.kept(),
            totals: scheduler.totals.clone(),
            running_loras: owned(scheduler.running_loras()),
            waiting_loras: owned(scheduler.waiting_loras()),
        }
    }

    /// Prompt tokens of `hashes`, from the first, that a request would find in the cache now.
    pub(super) fn cached_tokens(&self, hashes: &[BlockHash], prompt_tokens: usize) -> usize {
        let usable = prompt_tokens.saturating_sub(1) / self.config.block_tokens;
        let hashes = hashes.get(..usable).unwrap_or(hashes);
        self.scheduler.lock().pool.cached_prefix(hashes) * self.config.block_tokens
    }

    /// Prompt tokens kept for another pod under a name.
    pub(super) fn kept_tokens(&self, name: &str) -> Option<usize> {
        let mut scheduler = self.scheduler.lock();
        scheduler.expire(Instant::now());
        scheduler.kept_tokens(name)
    }

    /// Another pod has what was kept for it.
    pub(super) fn free_kept(&self, name: &str) {
        let mut scheduler = self.scheduler.lock();
        scheduler.expire(Instant::now());
        scheduler.free_kept(name);
    }

    /// Another pod gave what was to be pulled.
    pub(super) fn observe_pull(&self, pull: &Pull) {
        let mut scheduler = self.scheduler.lock();
        let observed = &mut scheduler.totals.observed;
        observed.transfer.observe(pull.seconds, 1);
        observed.transfer_post.observe(0.0, 1);
        observed.transfer_bytes.observe(pull.bytes, 1);
        observed
            .transfer_descriptors
            .observe(pull.descriptors as f64, 1);
    }

    /// Begins to wait for another pod's KV.
    pub(super) fn begin_pull(&self) -> Pulling<'_> {
        self.pulling.fetch_add(1, Ordering::Relaxed);
        Pulling(&self.pulling)
    }

    /// Another pod did not give what was to be pulled.
    pub(super) fn count_failed_pull(&self) {
        self.scheduler.lock().totals.failed_pulls += 1;
    }

    /// Forgets cached content, as `/reset_prefix_cache` does; not while requests hold blocks. The
    /// event goes out with the next step.
    pub fn reset_cache(&self) -> bool {
        self.scheduler.lock().pool.reset()
    }

    /// What a crash does: every request fails, cache and counters are empty, events begin anew.
    pub fn restart(&self) {
        let mut scheduler = self.scheduler.lock();
        scheduler.fail_all();
        let life = scheduler.life + 1;
        *scheduler = Scheduler::new(&self.config, self.publisher.is_some());
        scheduler.life = life;
        if let Some(publisher) = &self.publisher {
            publisher.restart(life);
        }
    }

    /// Works until `shutdown`.
    pub async fn run(self: Arc<Self>, shutdown: CancellationToken) {
        let mut clock = Instant::now();
        loop {
            if self.scheduler.lock().is_idle() {
                tokio::select! {
                    () = shutdown.cancelled() => return,
                    () = self.wake.notified() => {}
                }
                clock = Instant::now();
                continue;
            }
            let (plan, duration) = self.begin();
            clock += duration.div_f64(self.config.time_scale);
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep_until(clock) => {}
            }
            let now = Instant::now();
            let late = now.saturating_duration_since(clock);
            let (life, events) = {
                let mut scheduler = self.scheduler.lock();
                scheduler.apply(&plan, &self.config, now);
                if late > MAX_LAG {
                    clock += late;
                    scheduler.totals.lag_seconds += late.as_secs_f64() * self.config.time_scale;
                }
                (scheduler.life, scheduler.pool.take_events())
            };
            self.publish(life, events).await;
        }
    }

    /// Publishes the events of a step. Waits while the publisher's queue is full, as vLLM's engine
    /// does.
    async fn publish(&self, life: u64, events: Vec<Event>) {
        if let Some(publisher) = &self.publisher
            && !events.is_empty()
        {
            publisher.publish(life, events).await;
        }
    }

    /// Plans a tick and says how long it takes.
    fn begin(&self) -> (Plan, Duration) {
        let mut scheduler = self.scheduler.lock();
        let plan = scheduler.plan(&self.config, Instant::now());
        let held = scheduler.pool.held_blocks() * self.config.block_tokens;
        let step = self
            .config
            .profile
            .step(plan.prefill_tokens, held, scheduler.running());
        #[expect(clippy::cast_possible_truncation, reason = "a handful of steps")]
        let duration = step * plan.steps as u32;
        (plan, duration)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::work::Handover;

    fn config(blocks: usize) -> EngineConfig {
        EngineConfig {
            // 10 ms a step, 1 ms a prompt token, nothing else: easy to add up.
            profile: Profile {
                base: 0.01,
                prefill_token: 0.001,
                kv_token: 0.0,
                sequence: 0.0,
                kv_tokens: 0,
            },
            time_scale: 1.0,
            // One block more, as one is set aside.
            blocks: blocks + 1,
            block_tokens: 4,
            max_num_seqs: 8,
            max_num_batched_tokens: 100,
            steps_per_tick: 1,
            max_loras: 1,
            max_model_len: 1000,
            kv_role: None,
        }
    }

    fn work(root: u64, prompt_tokens: usize, max_tokens: usize) -> Work {
        let hashes = (0..prompt_tokens as u64 / 4)
            .map(|i| (root * 1000 + i).into())
            .collect();
        Work {
            prompt_tokens,
            hashes,
            max_tokens,
            lora: None,
            content: None,
            handover: Handover::None,
        }
    }

    fn start(config: EngineConfig) -> (Arc<Engine>, CancellationToken) {
        let engine = Engine::new(config, None);
        let shutdown = CancellationToken::new();
        tokio::spawn(Arc::clone(&engine).run(shutdown.clone()));
        (engine, shutdown)
    }

    #[tokio::test(start_paused = true)]
    async fn steps_add_up() {
        let (engine, _shutdown) = start(config(100));
        let begun = Instant::now();
        let progress = engine.submit(work(1, 20, 3)).unwrap();
        progress.beyond(0).await;
        // First step: 10 ms + 20 tokens * 1 ms, and it yields the first token.
        assert_eq!(begun.elapsed(), Duration::from_millis(30));
        progress.ended().await;
        assert_eq!(
            begun.elapsed(),
            Duration::from_millis(50),
            "two decode steps of 10 ms"
        );
        assert_eq!(engine.stats().totals.generation_tokens, 3);
        assert_eq!(engine.stats().kv_usage, 0.0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_repeated_prompt_computes_only_its_last_block() {
        let (engine, _shutdown) = start(config(100));
        engine.submit(work(1, 20, 1)).unwrap().ended().await;
        let begun = Instant::now();
        let progress = engine.submit(work(1, 20, 1)).unwrap();
        progress.ended().await;
        // At most 19 tokens may be hits: 4 blocks of 4. 10 ms + 4 * 1 ms.
        assert_eq!(
            (progress.cached(), begun.elapsed()),
            (16, Duration::from_millis(14))
        );
        let totals = engine.stats().totals;
        assert_eq!((totals.queried_tokens, totals.hit_tokens), (40, 16));
        assert_eq!(
            (totals.prompt_tokens, totals.cached_prompt_tokens),
            (40, 16)
        );
    }

    #[tokio::test(start_paused = true)]
    async fn long_prompts_are_cut_to_the_budget() {
        let (engine, _shutdown) = start(config(100));
        let begun = Instant::now();
        engine.submit(work(1, 250, 1)).unwrap().ended().await;
        // Three steps of 100, 100 and 50 tokens: 3 * 10 + 250 ms.
        assert_eq!(begun.elapsed(), Duration::from_millis(280));
    }

    #[tokio::test(start_paused = true)]
    async fn what_does_not_fit_waits_for_blocks() {
        // 10 blocks: one request of 20 + 4 tokens needs 6, so the second waits.
        let (engine, _shutdown) = start(config(10));
        let first = engine.submit(work(1, 20, 4)).unwrap();
        let second = engine.submit(work(2, 20, 4)).unwrap();
        first.beyond(0).await;
        assert_eq!((engine.stats().running, engine.stats().waiting), (1, 1));
        second.ended().await;
        assert!(first.is_ended() && !second.is_failed());
        assert!(engine.submit(work(3, 100, 1)).is_none(), "never fits");
    }

    #[tokio::test(start_paused = true)]
    async fn decoding_out_of_blocks_preempts_and_recovers() {
        // Two requests of 2 blocks each in 5 blocks, both want to grow to 4: one is thrown back.
        let (engine, _shutdown) = start(config(5));
        let (a, b) = (
            engine.submit(work(1, 8, 8)).unwrap(),
            engine.submit(work(2, 8, 8)).unwrap(),
        );
        a.ended().await;
        b.ended().await;
        let stats = engine.stats();
        assert!(stats.totals.preemptions > 0);
        assert_eq!(
            (
                stats.totals.finished,
                stats.totals.generation_tokens,
                stats.kv_usage
            ),
            (2, 16, 0.0)
        );
    }

    #[tokio::test(start_paused = true)]
    async fn an_abandoned_request_frees_its_blocks() {
        let (engine, _shutdown) = start(config(100));
        let progress = engine.submit(work(1, 20, 50)).unwrap();
        progress.beyond(3).await;
        drop(progress);
        tokio::time::sleep(Duration::from_millis(100)).await;
        let stats = engine.stats();
        assert_eq!(
            (stats.running, stats.totals.aborted, stats.kv_usage),
            (0, 1, 0.0)
        );
    }

    #[tokio::test(start_paused = true)]
    async fn adapters_wait_for_a_place() {
        let (engine, _shutdown) = start(config(100));
        let lora = |name: &str| Work {
            lora: Some(name.to_owned()),
            ..work(1, 8, 4)
        };
        let a = engine.submit(lora("a")).unwrap();
        let b = engine.submit(lora("b")).unwrap();
        a.beyond(0).await;
        let stats = engine.stats();
        assert!(stats.running_loras.contains("a") && stats.waiting_loras.contains("b"));
        b.ended().await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_pulled_what_had_expired_is_late() {
        let (engine, _shutdown) = start(config(100));
        let lease = Duration::from_secs(1);
        for (name, pulled_after, late, expired) in [("in time", 0, 0, 0), ("late", 2, 1, 1)] {
            let kept = Work {
                handover: Handover::Keep {
                    request: name.into(),
                    lease,
                },
                ..work(1, 20, 1)
            };
            engine.submit(kept).unwrap().ended().await;
            assert!(engine.stats().kv_usage > 0.0);
            tokio::time::sleep(Duration::from_secs(pulled_after)).await;
            engine.free_kept(name);
            let stats = engine.stats();
            let counted = (stats.totals.late_notifications, stats.totals.expired);
            assert_eq!((counted, stats.kv_usage), ((late, expired), 0.0), "{name}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_restart_fails_requests_and_empties_the_cache() {
        let (engine, _shutdown) = start(config(100));
        engine.submit(work(1, 20, 1)).unwrap().ended().await;
        let lost = engine.submit(work(2, 20, 50)).unwrap();
        lost.beyond(0).await;
        engine.restart();
        assert!(lost.is_failed());
        let progress = engine.submit(work(1, 20, 1)).unwrap();
        progress.ended().await;
        assert_eq!(progress.cached(), 0);
    }
}
