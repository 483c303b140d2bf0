//! The engine: continuous batching in steps over a block pool, on a virtual clock.
//!
//! Each step runs all running requests one token further and spends what is left of its token budget
//! on prompts, first those begun, then those waiting, first come first served (`vllm/v1/core/sched`).
//! Time is virtual: a step's duration is divided by the time scale and slept once, against a deadline,
//! so that late wake-ups do not add up; what the host cannot keep up with is counted as lag.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::kv::{BlockId, BlockPool};
use super::latency::Profile;

/// Most lag before the virtual clock gives up catching up.
const MAX_LAG: Duration = Duration::from_millis(200);

/// Size and speed of an engine.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// What a step costs.
    pub profile: Profile,
    /// Times faster than real time.
    pub time_scale: f64,
    /// KV blocks.
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
    /// LoRA adapters that fit at once.
    pub max_loras: usize,
}

/// A request as the engine sees it.
#[derive(Debug, Clone)]
pub struct Work {
    /// Tokens of the prompt, at least 1.
    pub prompt_tokens: usize,
    /// Hashes of its full blocks.
    pub hashes: Vec<u64>,
    /// Output tokens to make, at least 1.
    pub max_tokens: usize,
    /// Adapter the request asks for.
    pub lora: Option<String>,
}

/// What the HTTP side sees of a request. Dropping every other handle aborts it.
#[derive(Debug, Default)]
pub struct Progress {
    generated: AtomicUsize,
    cached: AtomicUsize,
    ended: AtomicBool,
    failed: AtomicBool,
    changed: Notify,
}

impl Progress {
    /// Output tokens so far.
    pub fn generated(&self) -> usize {
        self.generated.load(Ordering::Acquire)
    }

    /// Prompt tokens found in the cache.
    pub fn cached(&self) -> usize {
        self.cached.load(Ordering::Acquire)
    }

    /// No more tokens will come.
    pub fn is_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// The engine dropped the request.
    pub fn is_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// Waits until more than `seen` tokens exist or the request ended.
    pub async fn beyond(&self, seen: usize) {
        loop {
            let changed = self.changed.notified();
            if self.generated() > seen || self.is_ended() {
                return;
            }
            changed.await;
        }
    }

    fn end(&self, failed: bool) {
        self.failed.store(failed, Ordering::Release);
        self.ended.store(true, Ordering::Release);
        self.changed.notify_waiters();
    }
}

/// Counters since start or restart.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Totals {
    /// Prompt tokens of admitted requests.
    pub queried_tokens: u64,
    /// Those found in the cache.
    pub hit_tokens: u64,
    /// Prompt tokens computed or found.
    pub prompt_tokens: u64,
    /// Output tokens.
    pub generation_tokens: u64,
    /// Finished by reaching their length.
    pub finished: u64,
    /// Given up by their clients.
    pub aborted: u64,
    /// Thrown back to the queue for want of blocks.
    pub preemptions: u64,
    /// Virtual seconds the host was late.
    pub lag_seconds: f64,
}

/// A reading of the engine.
#[derive(Debug, Clone, Default)]
pub struct Stats {
    /// Requests in steps.
    pub running: usize,
    /// Requests in the queue.
    pub waiting: usize,
    /// Share of blocks held.
    pub kv_usage: f64,
    /// Counters.
    pub totals: Totals,
    /// Adapters of running requests.
    pub running_loras: BTreeSet<String>,
    /// Adapters of waiting requests that no running one has.
    pub waiting_loras: BTreeSet<String>,
}

#[derive(Debug)]
struct Sequence {
    work: Work,
    progress: Arc<Progress>,
    blocks: Vec<BlockId>,
    /// Prompt and output tokens whose KV exists.
    computed: usize,
    generated: usize,
    /// Blocks whose content is registered.
    filled: usize,
}

impl Sequence {
    /// Tokens to have computed before the next output: the prompt, and after a preemption also what
    /// was generated before it.
    fn target(&self) -> usize {
        self.work.prompt_tokens + self.generated
    }

    /// The client holds no handle any more.
    fn is_abandoned(&self) -> bool {
        Arc::strong_count(&self.progress) == 1
    }
}

#[derive(Debug)]
struct State {
    pool: BlockPool,
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
    totals: Totals,
}

/// One engine. Cheap to share.
#[derive(Debug)]
pub struct Engine {
    config: EngineConfig,
    state: Mutex<State>,
    wake: Notify,
}

/// What one tick does.
#[derive(Debug, Default)]
struct Plan {
    /// Prompt tokens per running position.
    prefill: Vec<(usize, usize)>,
    prefill_tokens: usize,
    /// Decode steps of the tick.
    steps: usize,
}

impl Engine {
    /// An idle engine; [`Self::run`] makes it work.
    pub fn new(config: EngineConfig) -> Arc<Self> {
        let state = State {
            pool: BlockPool::new(config.blocks),
            waiting: VecDeque::new(),
            running: Vec::new(),
            totals: Totals::default(),
        };
        Arc::new(Self {
            config,
            state: Mutex::new(state),
            wake: Notify::new(),
        })
    }

    /// Queues a request. `None` when it can never fit.
    pub fn submit(&self, work: Work) -> Option<Arc<Progress>> {
        let blocks = (work.prompt_tokens + work.max_tokens).div_ceil(self.config.block_tokens);
        if blocks > self.config.blocks {
            return None;
        }
        let progress = Arc::new(Progress::default());
        let sequence = Sequence {
            work,
            progress: Arc::clone(&progress),
            blocks: Vec::new(),
            computed: 0,
            generated: 0,
            filled: 0,
        };
        self.state.lock().waiting.push_back(sequence);
        self.wake.notify_one();
        Some(progress)
    }

    /// A reading for metrics.
    pub fn stats(&self) -> Stats {
        let state = self.state.lock();
        let loras = |sequences: &mut dyn Iterator<Item = &Sequence>| -> BTreeSet<String> {
            sequences.filter_map(|s| s.work.lora.clone()).collect()
        };
        let running_loras = loras(&mut state.running.iter());
        let waiting_loras = loras(&mut state.waiting.iter());
        Stats {
            running: state.running.len(),
            waiting: state.waiting.len(),
            kv_usage: state.pool.usage(),
            totals: state.totals.clone(),
            waiting_loras: waiting_loras.difference(&running_loras).cloned().collect(),
            running_loras,
        }
    }

    /// Forgets cached content, as `/reset_prefix_cache` does.
    pub fn reset_cache(&self) {
        self.state.lock().pool.reset();
    }

    /// What a crash does: every request fails, cache and counters are empty.
    pub fn restart(&self) {
        let mut state = self.state.lock();
        let lost = std::mem::take(&mut state.waiting)
            .into_iter()
            .chain(std::mem::take(&mut state.running));
        lost.for_each(|sequence| sequence.progress.end(true));
        state.pool = BlockPool::new(self.config.blocks);
        state.totals = Totals::default();
    }

    /// Works until `shutdown`.
    pub async fn run(self: Arc<Self>, shutdown: CancellationToken) {
        let mut clock = Instant::now();
        loop {
            let idle = {
                let state = self.state.lock();
                state.waiting.is_empty() && state.running.is_empty()
            };
            if idle {
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
            self.finish(&plan);
            let late = Instant::now().saturating_duration_since(clock);
            if late > MAX_LAG {
                clock += late;
                self.state.lock().totals.lag_seconds += late.as_secs_f64() * self.config.time_scale;
            }
        }
    }

    /// Plans a tick: drops abandoned requests, admits waiting ones, hands out the token budget.
    fn begin(&self) -> (Plan, Duration) {
        let mut state = self.state.lock();
        let state = &mut *state;
        state.drop_abandoned();
        let mut plan = Plan::default();
        let mut budget = self.config.max_num_batched_tokens;
        let decoding = state
            .running
            .iter()
            .filter(|s| s.computed >= s.target())
            .count();
        budget = budget.saturating_sub(decoding);
        for (position, sequence) in state.running.iter().enumerate() {
            let missing = sequence
                .target()
                .saturating_sub(sequence.computed)
                .min(budget);
            if missing > 0 {
                plan.prefill.push((position, missing));
                budget -= missing;
            }
        }
        while budget > 0 && state.running.len() < self.config.max_num_seqs {
            let Some(missing) = state.admit(&self.config) else {
                break;
            };
            let now = missing.min(budget);
            plan.prefill.push((state.running.len() - 1, now));
            budget -= now;
        }
        plan.prefill_tokens = plan.prefill.iter().map(|(_, tokens)| tokens).sum();
        plan.steps = 1;
        if plan.prefill.is_empty() && state.waiting.is_empty() {
            let shortest = state
                .running
                .iter()
                .map(|s| s.work.max_tokens - s.generated)
                .min()
                .unwrap_or(1);
            plan.steps = self.config.steps_per_tick.min(shortest).max(1);
        }
        let held = state.pool.held_blocks() * self.config.block_tokens;
        let step = self
            .config
            .profile
            .step(plan.prefill_tokens, held, state.running.len());
        #[expect(clippy::cast_possible_truncation, reason = "a handful of steps")]
        let duration = step * plan.steps as u32;
        (plan, duration)
    }

    /// Applies a tick once its time has passed.
    fn finish(&self, plan: &Plan) {
        let mut state = self.state.lock();
        let state = &mut *state;
        let mut decoding: Vec<bool> = state
            .running
            .iter()
            .map(|s| s.computed >= s.target())
            .collect();
        for &(position, tokens) in &plan.prefill {
            let Some(sequence) = state.running.get_mut(position) else {
                continue;
            };
            sequence.computed += tokens;
            // The step that computes the last prompt token also yields the first output token.
            if let Some(decodes) = decoding.get_mut(position) {
                *decodes = sequence.computed >= sequence.target();
            }
        }
        let mut position = 0;
        // A step may throw requests off the end of the batch.
        while position < state.running.len() {
            if decoding.get(position) == Some(&true) {
                state.decode(position, plan.steps, &self.config);
            }
            position += 1;
        }
        let totals = &mut state.totals;
        let pool = &mut state.pool;
        state.running.retain_mut(|sequence| {
            let done = sequence.generated >= sequence.work.max_tokens;
            if done {
                pool.release(&sequence.blocks);
                totals.finished += 1;
                sequence.progress.end(false);
            }
            !done
        });
    }
}

impl State {
    fn drop_abandoned(&mut self) {
        let Self {
            pool,
            waiting,
            running,
            totals,
        } = self;
        waiting.retain(|sequence| {
            totals.aborted += u64::from(sequence.is_abandoned());
            !sequence.is_abandoned()
        });
        running.retain(|sequence| {
            if sequence.is_abandoned() {
                totals.aborted += 1;
                pool.release(&sequence.blocks);
            }
            !sequence.is_abandoned()
        });
    }

    /// Moves the first waiting request into the batch; returns the prompt tokens it has to compute.
    fn admit(&mut self, config: &EngineConfig) -> Option<usize> {
        let sequence = self.waiting.front()?;
        if let Some(lora) = &sequence.work.lora {
            let mut active: BTreeSet<&String> = self
                .running
                .iter()
                .filter_map(|s| s.work.lora.as_ref())
                .collect();
            active.insert(lora);
            if active.len() > config.max_loras {
                return None;
            }
        }
        let target = sequence.target();
        // The last token is always computed, so at most target - 1 can come from the cache.
        let usable = (target - 1) / config.block_tokens;
        let candidates = sequence
            .work
            .hashes
            .get(..usable.min(sequence.work.hashes.len()))
            .unwrap_or_default();
        let hits = self.pool.cached_prefix(candidates);
        let fresh = target.div_ceil(config.block_tokens) - hits;
        let blocks = self.pool.allocate(candidates, hits, fresh)?;
        let mut sequence = self.waiting.pop_front()?;
        let cached = hits * config.block_tokens;
        if sequence.generated == 0 {
            self.totals.queried_tokens += sequence.work.prompt_tokens as u64;
            self.totals.hit_tokens += cached as u64;
            self.totals.prompt_tokens += sequence.work.prompt_tokens as u64;
            sequence.progress.cached.store(cached, Ordering::Release);
        }
        sequence.blocks = blocks;
        sequence.computed = cached;
        sequence.filled = hits;
        let missing = target - cached;
        self.running.push(sequence);
        Some(missing)
    }

    /// Runs one sequence `steps` tokens further. When blocks run out, the request admitted last is
    /// thrown back to the queue and recomputed later, if need be this one itself.
    fn decode(&mut self, position: usize, steps: usize, config: &EngineConfig) {
        self.register(position);
        for _ in 0..steps {
            if !self.make_room(position, config) {
                return;
            }
            let Some(sequence) = self.running.get_mut(position) else {
                return;
            };
            if sequence.generated >= sequence.work.max_tokens {
                break;
            }
            sequence.generated += 1;
            // The newest token's KV is written by the next step.
            sequence.computed = sequence.target();
            self.totals.generation_tokens += 1;
        }
        if let Some(sequence) = self.running.get(position) {
            sequence
                .progress
                .generated
                .store(sequence.generated, Ordering::Release);
            sequence.progress.changed.notify_waiters();
        }
    }

    /// The prompt is computed: its full blocks can be hit from now on.
    fn register(&mut self, position: usize) {
        let Some(sequence) = self.running.get_mut(position) else {
            return;
        };
        for (hash, &id) in sequence
            .work
            .hashes
            .iter()
            .zip(&sequence.blocks)
            .skip(sequence.filled)
        {
            self.pool.fill(id, *hash);
        }
        sequence.filled = sequence.work.hashes.len();
    }

    /// A block for the next token of the sequence at `position`; false when it was thrown back.
    fn make_room(&mut self, position: usize, config: &EngineConfig) -> bool {
        loop {
            let Some(sequence) = self.running.get_mut(position) else {
                return false;
            };
            let last_token = sequence.generated + 1 >= sequence.work.max_tokens;
            let needed = (sequence.target() + 1).div_ceil(config.block_tokens);
            if last_token || sequence.blocks.len() >= needed {
                return true;
            }
            if let Some(id) = self.pool.extend() {
                sequence.blocks.push(id);
                return true;
            }
            let Some(mut victim) = self.running.pop() else {
                return false;
            };
            self.pool.release(&std::mem::take(&mut victim.blocks));
            victim.computed = 0;
            victim.filled = 0;
            self.waiting.push_front(victim);
            self.totals.preemptions += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
            blocks,
            block_tokens: 4,
            max_num_seqs: 8,
            max_num_batched_tokens: 100,
            steps_per_tick: 1,
            max_loras: 1,
        }
    }

    fn work(root: u64, prompt_tokens: usize, max_tokens: usize) -> Work {
        let hashes = (0..prompt_tokens as u64 / 4)
            .map(|i| root * 1000 + i)
            .collect();
        Work {
            prompt_tokens,
            hashes,
            max_tokens,
            lora: None,
        }
    }

    async fn ended(progress: &Progress) {
        let mut seen = 0;
        while !progress.is_ended() {
            progress.beyond(seen).await;
            seen = progress.generated();
        }
    }

    fn start(config: EngineConfig) -> (Arc<Engine>, CancellationToken) {
        let engine = Engine::new(config);
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
        ended(&progress).await;
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
        ended(&engine.submit(work(1, 20, 1)).unwrap()).await;
        let begun = Instant::now();
        let progress = engine.submit(work(1, 20, 1)).unwrap();
        ended(&progress).await;
        // At most 19 tokens may be hits: 4 blocks of 4. 10 ms + 4 * 1 ms.
        assert_eq!(
            (progress.cached(), begun.elapsed()),
            (16, Duration::from_millis(14))
        );
        let totals = engine.stats().totals;
        assert_eq!((totals.queried_tokens, totals.hit_tokens), (40, 16));
    }

    #[tokio::test(start_paused = true)]
    async fn long_prompts_are_cut_to_the_budget() {
        let (engine, _shutdown) = start(config(100));
        let begun = Instant::now();
        ended(&engine.submit(work(1, 250, 1)).unwrap()).await;
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
        ended(&second).await;
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
        ended(&a).await;
        ended(&b).await;
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
        ended(&b).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_restart_fails_requests_and_empties_the_cache() {
        let (engine, _shutdown) = start(config(100));
        ended(&engine.submit(work(1, 20, 1)).unwrap()).await;
        let lost = engine.submit(work(2, 20, 50)).unwrap();
        lost.beyond(0).await;
        engine.restart();
        assert!(lost.is_failed());
        let progress = engine.submit(work(1, 20, 1)).unwrap();
        ended(&progress).await;
        assert_eq!(progress.cached(), 0);
    }
}
