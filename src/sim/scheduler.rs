//! Which requests a step runs, and over which blocks (`vllm/v1/core/sched/scheduler.py`).
//!
//! A step first serves the running requests in their order, each up to the tokens it lacks: the rest
//! of its prompt, or the one token that the step before generated. When blocks run out, the request
//! admitted last is thrown back to the queue; after that a step admits none. Otherwise what is left
//! of the token budget goes to waiting requests, first come first served, but past those whose
//! adapter has no place. A request is admitted when the blocks for all its tokens are there.
//!
//! Full blocks can be hit as soon as a step is to compute them, also later in the same step. Knows
//! nothing of durations: it is told the time.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use tokio::time::Instant;

use super::engine::EngineConfig;
use super::kv::{BlockId, BlockPool};
use super::totals::Totals;
use super::work::{Handover, Progress, Work};

/// A request in the engine.
#[derive(Debug)]
pub(super) struct Sequence {
    work: Work,
    progress: Arc<Progress>,
    blocks: Vec<BlockId>,
    /// Prompt and output tokens whose KV exists.
    computed: usize,
    generated: usize,
    /// Blocks whose content is registered.
    filled: usize,
    preemptions: u32,
    arrived: Instant,
    /// Of the first admission.
    admitted: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Instant,
}

impl Sequence {
    pub(super) fn new(work: Work, progress: Arc<Progress>, now: Instant) -> Self {
        Self {
            work,
            progress,
            blocks: Vec::new(),
            computed: 0,
            generated: 0,
            filled: 0,
            preemptions: 0,
            arrived: now,
            admitted: None,
            first_token: None,
            last_token: now,
        }
    }

    /// Prompt and output tokens that exist.
    fn tokens(&self) -> usize {
        self.work.prompt_tokens + self.generated
    }

    /// Only the newest output token is to be computed.
    fn decodes(&self) -> bool {
        self.generated > 0 && self.computed + 1 == self.tokens()
    }

    /// The KV of its prompt was pulled. After a preemption that is gone or found in the cache.
    fn takes_pulled(&self) -> bool {
        self.work.handover == Handover::Pulled && self.preemptions == 0
    }

    /// The client holds no handle any more.
    fn is_abandoned(&self) -> bool {
        Arc::strong_count(&self.progress) == 1
    }
}

/// What one tick does.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Plan {
    /// Position in the batch and tokens to compute.
    scheduled: Vec<(usize, usize)>,
    /// Tokens of prompts among them.
    pub(super) prefill_tokens: usize,
    /// Steps that the tick stands for; more than 1 only when all of the batch decodes.
    pub(super) steps: usize,
}

/// Blocks of an ended request that wait for another pod.
#[derive(Debug)]
struct Kept {
    blocks: Vec<BlockId>,
    tokens: usize,
    until: Instant,
}

/// The queue, the batch and the blocks.
#[derive(Debug)]
pub(super) struct Scheduler {
    pub(super) pool: BlockPool,
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
    /// By name. Each holds a block or more, so the pool bounds them.
    kept: HashMap<Arc<str>, Kept>,
    pub(super) totals: Totals,
    /// Restarts before this life of the engine.
    pub(super) life: u64,
}

impl Scheduler {
    /// An idle one, whose pool tells what happens in it when `watched`.
    pub(super) fn new(config: &EngineConfig, watched: bool) -> Self {
        let pool = if watched {
            BlockPool::watched(config.blocks)
        } else {
            BlockPool::new(config.blocks)
        };
        Self {
            pool,
            waiting: VecDeque::new(),
            running: Vec::new(),
            kept: HashMap::new(),
            totals: Totals::new(config.max_model_len),
            life: 0,
        }
    }

    pub(super) fn queue(&mut self, sequence: Sequence) {
        self.waiting.push_back(sequence);
    }

    pub(super) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    pub(super) fn running(&self) -> usize {
        self.running.len()
    }

    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Waiting requests whose adapter has no place beside the running ones.
    pub(super) fn deferred(&self, config: &EngineConfig) -> usize {
        let running = self.running_loras();
        let defers = |sequence: &&Sequence| !fits(sequence, &running, config);
        self.waiting.iter().filter(defers).count()
    }

    /// Waiting requests whose KV was pulled and has not been used.
    pub(super) fn pulled(&self) -> usize {
        self.waiting.iter().filter(|s| s.takes_pulled()).count()
    }

    pub(super) fn running_loras(&self) -> BTreeSet<&str> {
        loras(self.running.iter())
    }

    pub(super) fn waiting_loras(&self) -> BTreeSet<&str> {
        loras(self.waiting.iter())
    }

    /// Fails every request.
    pub(super) fn fail_all(&mut self) {
        let lost = self.waiting.drain(..).chain(self.running.drain(..));
        lost.for_each(|sequence| sequence.progress.end(true));
    }

    /// Ended requests whose blocks wait for another pod.
    pub(super) fn kept(&self) -> usize {
        self.kept.len()
    }

    /// Prompt tokens kept under a name.
    pub(super) fn kept_tokens(&self, name: &str) -> Option<usize> {
        self.kept.get(name).map(|kept| kept.tokens)
    }

    /// Gives up blocks that were pulled, unless their time had ended before.
    pub(super) fn free_kept(&mut self, name: &str) {
        if let Some(kept) = self.kept.remove(name) {
            self.pool.release(&kept.blocks);
        } else {
            self.totals.late_notifications += 1;
        }
    }

    /// Gives up blocks that waited too long.
    pub(super) fn expire(&mut self, now: Instant) {
        let (pool, totals) = (&mut self.pool, &mut self.totals);
        self.kept.retain(|_, kept| {
            let stays = kept.until > now;
            if !stays {
                pool.release(&kept.blocks);
                totals.expired += 1;
            }
            stays
        });
    }

    /// Plans a tick: drops abandoned requests, gives the batch its tokens, admits waiting requests.
    pub(super) fn plan(&mut self, config: &EngineConfig, now: Instant) -> Plan {
        self.drop_abandoned();
        self.expire(now);
        let mut plan = Plan {
            steps: self.steps(config),
            ..Plan::default()
        };
        let mut budget = config.max_num_batched_tokens;
        let before = self.totals.preemptions;
        let mut position = 0;
        while budget > 0 && position < self.running.len() {
            if !self.make_room(position, plan.steps, config) {
                break;
            }
            budget -= self.schedule(position, budget, config, &mut plan);
            position += 1;
        }
        let preempted = self.totals.preemptions > before;
        while !preempted && budget > 0 && self.running.len() < config.max_num_seqs {
            if !self.admit(config, now) {
                break;
            }
            budget -= self.schedule(self.running.len() - 1, budget, config, &mut plan);
        }
        plan
    }

    /// Applies a tick once its time has passed.
    pub(super) fn apply(&mut self, plan: &Plan, config: &EngineConfig, now: Instant) {
        let mut step_tokens = 0;
        for &(position, tokens) in &plan.scheduled {
            let Some(sequence) = self.running.get_mut(position) else {
                continue;
            };
            sequence.computed += tokens;
            if sequence.computed < sequence.tokens() {
                continue;
            }
            // The step that computes the last token yields the next one.
            if sequence.first_token.is_none() {
                let known = sequence.progress.not_computed();
                step_tokens += sequence.work.prompt_tokens.saturating_sub(known);
            }
            step_tokens += self.generate(position, plan.steps, config, now);
        }
        let steps = plan.steps.max(1) as u64;
        let per_step = step_tokens as f64 / steps as f64;
        self.totals.observed.step_tokens.observe(per_step, steps);
        self.finish(config, now);
    }

    fn drop_abandoned(&mut self) {
        let (pool, totals) = (&mut self.pool, &mut self.totals);
        let mut stays = |sequence: &Sequence| {
            if sequence.is_abandoned() {
                totals.aborted += 1;
                pool.release(&sequence.blocks);
            }
            !sequence.is_abandoned()
        };
        self.waiting.retain(&mut stays);
        self.running.retain(&mut stays);
    }

    /// Steps that can be done as one: all decode, none waits, and blocks last.
    fn steps(&self, config: &EngineConfig) -> usize {
        if !self.waiting.is_empty() || !self.running.iter().all(Sequence::decodes) {
            return 1;
        }
        let left = self.running.iter().map(|s| s.work.max_tokens - s.generated);
        let steps = config.steps_per_tick.min(left.min().unwrap_or(1)).max(1);
        let blocks = steps.div_ceil(config.block_tokens) * self.running.len();
        if blocks <= self.pool.free_blocks() {
            steps
        } else {
            1
        }
    }

    /// Gives the request at `position` up to `budget` tokens of those it lacks; returns how many.
    fn schedule(
        &mut self,
        position: usize,
        budget: usize,
        config: &EngineConfig,
        plan: &mut Plan,
    ) -> usize {
        let Some(sequence) = self.running.get(position) else {
            return 0;
        };
        let tokens = (sequence.tokens() - sequence.computed).min(budget);
        if !sequence.decodes() {
            plan.prefill_tokens += tokens;
        }
        let upto = sequence.computed + tokens;
        plan.scheduled.push((position, tokens));
        self.register(position, upto, config);
        tokens
    }

    /// The first `tokens` tokens of the request are computed by the step that begins: their full
    /// blocks can be hit from now on.
    fn register(&mut self, position: usize, tokens: usize, config: &EngineConfig) {
        let Some(sequence) = self.running.get_mut(position) else {
            return;
        };
        let (from, full) = (sequence.filled, tokens / config.block_tokens);
        if full <= from {
            return;
        }
        let fresh = sequence.work.hashes.iter().zip(&sequence.blocks);
        for (hash, &id) in fresh.skip(from).take(full - from) {
            self.pool.fill(id, *hash);
        }
        sequence.filled = full;
        if let Some(event) = sequence.work.stored(from, full, config.block_tokens) {
            self.pool.write_down(event);
        }
    }

    /// Blocks for all tokens of the request at `position` and the `steps - 1` next ones; false when
    /// it was itself thrown back for want of them.
    fn make_room(&mut self, position: usize, steps: usize, config: &EngineConfig) -> bool {
        loop {
            let Some(sequence) = self.running.get_mut(position) else {
                return false;
            };
            let needed = (sequence.tokens() + steps - 1).div_ceil(config.block_tokens);
            if sequence.blocks.len() >= needed {
                return true;
            }
            if let Some(id) = self.pool.extend() {
                sequence.blocks.push(id);
            } else {
                self.preempt();
            }
        }
    }

    /// Throws the request admitted last back to the head of the queue. It keeps its output; its
    /// blocks can be hit until others take them.
    fn preempt(&mut self) {
        let Some(mut victim) = self.running.pop() else {
            return;
        };
        self.pool.release(&std::mem::take(&mut victim.blocks));
        victim.computed = 0;
        victim.filled = 0;
        victim.preemptions += 1;
        self.waiting.push_front(victim);
        self.totals.preemptions += 1;
    }

    /// Moves the first waiting request that may run into the batch.
    fn admit(&mut self, config: &EngineConfig, now: Instant) -> bool {
        let running = self.running_loras();
        let may_run = |sequence: &Sequence| fits(sequence, &running, config);
        let Some(index) = self.waiting.iter().position(may_run) else {
            return false;
        };
        let Some(sequence) = self.waiting.get_mut(index) else {
            return false;
        };
        let tokens = sequence.tokens();
        // The last token is always computed, so at most tokens - 1 can come from the cache.
        let usable = (tokens - 1) / config.block_tokens;
        let hashes = &sequence.work.hashes;
        let candidates = hashes.get(..usable.min(hashes.len())).unwrap_or_default();
        let hits = self.pool.cached_prefix(candidates);
        let fresh = tokens.div_ceil(config.block_tokens) - hits;
        let Some(blocks) = self.pool.allocate(candidates, hits, fresh) else {
            return false;
        };
        let Some(mut sequence) = self.waiting.remove(index) else {
            self.pool.release(&blocks);
            return false;
        };
        let cached = hits * config.block_tokens;
        let pulled = sequence.takes_pulled();
        if sequence.preemptions == 0 {
            self.totals.queried_tokens += sequence.work.prompt_tokens as u64;
            self.totals.hit_tokens += cached as u64;
            let missed = (tokens - cached) as u64;
            if config.kv_role.is_some() {
                self.totals.external_queried_tokens += missed;
            }
            if pulled {
                self.totals.external_hit_tokens += missed;
                sequence.progress.set_pulled(tokens - 1 - cached);
            }
        }
        if sequence.admitted.is_none() {
            sequence.admitted = Some(now);
            sequence.progress.set_cached(cached);
        }
        let reports = sequence
            .work
            .content
            .as_ref()
            .is_some_and(|content| content.report_hits);
        if let Some(event) = sequence.work.stored(0, hits, config.block_tokens)
            && reports
            && hits > 0
        {
            self.pool.write_down(event);
        }
        sequence.blocks = blocks;
        sequence.computed = if pulled { tokens - 1 } else { cached };
        sequence.filled = hits;
        self.running.push(sequence);
        true
    }

    /// Adds the tokens of `steps` steps to the request at `position`; returns how many.
    fn generate(
        &mut self,
        position: usize,
        steps: usize,
        config: &EngineConfig,
        now: Instant,
    ) -> usize {
        let Some(sequence) = self.running.get_mut(position) else {
            return 0;
        };
        let tokens = steps.min(sequence.work.max_tokens - sequence.generated);
        sequence.generated += tokens;
        // All but the newest were computed by the steps between.
        sequence.computed = sequence.tokens() - 1;
        self.totals.generation_tokens += tokens as u64;
        let seconds = |since: Instant| config.virtual_seconds(since, now);
        let observed = &mut self.totals.observed;
        if sequence.first_token.is_none() {
            sequence.first_token = Some(now);
            self.totals.prompt_tokens += sequence.work.prompt_tokens as u64;
            self.totals.cached_prompt_tokens += sequence.progress.cached() as u64;
            self.totals.pulled_prompt_tokens += sequence.progress.pulled() as u64;
            observed.ttft.observe(seconds(sequence.arrived), 1);
        } else {
            let between = seconds(sequence.last_token) / tokens.max(1) as f64;
            observed.between_tokens.observe(between, tokens as u64);
        }
        sequence.last_token = now;
        sequence.progress.set_generated(sequence.generated);
        let computed = sequence.computed;
        self.register(position, computed, config);
        tokens
    }

    /// Ends what has all its tokens.
    fn finish(&mut self, config: &EngineConfig, now: Instant) {
        let (pool, totals, kept) = (&mut self.pool, &mut self.totals, &mut self.kept);
        self.running.retain(|sequence| {
            let done = sequence.generated >= sequence.work.max_tokens;
            if done {
                match &sequence.work.handover {
                    Handover::Keep { request, lease } => {
                        keep(kept, pool, sequence, request, now + *lease);
                    }
                    Handover::None | Handover::Pulled => pool.release(&sequence.blocks),
                }
                observe_finished(totals, sequence, config, now);
                sequence.progress.end(false);
            }
            !done
        });
    }
}

/// Keeps the blocks of a request that ends for another pod, and tells their numbers.
fn keep(
    all: &mut HashMap<Arc<str>, Kept>,
    pool: &mut BlockPool,
    sequence: &Sequence,
    name: &Arc<str>,
    until: Instant,
) {
    // vLLM's block 0 is the one set aside.
    let numbers = sequence.blocks.iter().map(|id| id + 1).collect();
    sequence.progress.set_kept(numbers);
    let kept = Kept {
        blocks: sequence.blocks.clone(),
        tokens: sequence.work.prompt_tokens,
        until,
    };
    // Of two requests of one name the later stays.
    if let Some(earlier) = all.insert(Arc::clone(name), kept) {
        pool.release(&earlier.blocks);
    }
}

fn loras<'a>(sequences: impl Iterator<Item = &'a Sequence>) -> BTreeSet<&'a str> {
    sequences.filter_map(|s| s.work.lora.as_deref()).collect()
}

/// The adapter of `sequence`, if any, has a place beside those running.
fn fits(sequence: &Sequence, running: &BTreeSet<&str>, config: &EngineConfig) -> bool {
    let Some(lora) = sequence.work.lora.as_deref() else {
        return true;
    };
    running.contains(lora) || running.len() < config.max_loras
}

fn observe_finished(totals: &mut Totals, sequence: &Sequence, config: &EngineConfig, now: Instant) {
    totals.finished += 1;
    let seconds = |from: Instant, to: Instant| config.virtual_seconds(from, to);
    let observed = &mut totals.observed;
    let prompt = sequence.work.prompt_tokens;
    observed.prompt_tokens.observe(prompt as f64, 1);
    observed
        .generation_tokens
        .observe(sequence.generated as f64, 1);
    observed
        .max_tokens
        .observe(sequence.work.max_tokens as f64, 1);
    observed.completions.observe(1.0, 1);
    observed
        .preemptions
        .observe(f64::from(sequence.preemptions), 1);
    let computed = prompt.saturating_sub(sequence.progress.not_computed());
    observed.computed_prompt_tokens.observe(computed as f64, 1);
    observed
        .end_to_end
        .observe(seconds(sequence.arrived, now), 1);
    let (Some(admitted), Some(first)) = (sequence.admitted, sequence.first_token) else {
        return;
    };
    let last = sequence.last_token;
    let decode = seconds(first, last);
    observed
        .queue
        .observe(seconds(sequence.arrived, admitted), 1);
    observed.prefill.observe(seconds(admitted, first), 1);
    observed.decode.observe(decode, 1);
    observed.inference.observe(seconds(admitted, last), 1);
    let gaps = sequence.generated.saturating_sub(1).max(1);
    observed.per_output_token.observe(decode / gaps as f64, 1);
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::sim::Profile;
    use crate::sim::transfer::Role;

    /// Blocks of 4 tokens, `blocks` of them usable.
    fn config(blocks: usize) -> EngineConfig {
        EngineConfig {
            profile: Profile::H100_8B,
            time_scale: 2.0,
            blocks: blocks + 1,
            block_tokens: 4,
            max_num_seqs: 8,
            max_num_batched_tokens: 100,
            steps_per_tick: 1,
            max_loras: 1,
            max_model_len: 1000,
            kv_role: Some(Role::Both),
        }
    }

    /// A request whose blocks, output included, are those of `root`.
    fn work(root: u64, prompt_tokens: usize, max_tokens: usize) -> Work {
        let blocks = (prompt_tokens + max_tokens) as u64 / 4;
        Work {
            prompt_tokens,
            hashes: (0..blocks)
                .map(|block| (root * 1000 + block).into())
                .collect(),
            max_tokens,
            lora: None,
            content: None,
            handover: Handover::None,
        }
    }

    /// A scheduler under test with a clock that goes on by 10 ms a step.
    struct Bench {
        config: EngineConfig,
        scheduler: Scheduler,
        now: Instant,
    }

    impl Bench {
        fn new(config: EngineConfig) -> Self {
            Self {
                scheduler: Scheduler::new(&config, false),
                config,
                now: Instant::now(),
            }
        }

        fn queue(&mut self, work: Work) -> Arc<Progress> {
            let progress = Arc::new(Progress::default());
            let sequence = Sequence::new(work, Arc::clone(&progress), self.now);
            self.scheduler.queue(sequence);
            progress
        }

        fn step(&mut self) -> Plan {
            let plan = self.scheduler.plan(&self.config, self.now);
            self.now += Duration::from_millis(10);
            self.scheduler.apply(&plan, &self.config, self.now);
            plan
        }

        fn finish(&mut self, progress: &Progress) {
            for _ in 0..1000 {
                if progress.is_ended() {
                    return;
                }
                self.step();
            }
            panic!("the request does not end");
        }
    }

    #[test]
    fn what_was_generated_is_hit_by_the_next_turn() {
        // 8 + 9 tokens: the KV of the last one is never computed, so 16 tokens are 4 full blocks.
        let mut bench = Bench::new(config(100));
        let first = bench.queue(work(1, 8, 9));
        bench.finish(&first);
        let next = bench.queue(work(1, 21, 1));
        bench.finish(&next);
        assert_eq!(next.cached(), 16);
        // 8 + 8: only 15 tokens have KV, 3 full blocks.
        let first = bench.queue(work(2, 8, 8));
        bench.finish(&first);
        let next = bench.queue(work(2, 21, 1));
        bench.finish(&next);
        assert_eq!(next.cached(), 12);
    }

    #[test]
    fn equal_prompts_of_one_step_are_computed_once() {
        let mut bench = Bench::new(config(100));
        let (a, b) = (bench.queue(work(1, 20, 1)), bench.queue(work(1, 20, 1)));
        // The second finds 4 of its 5 blocks, as the last token is always computed: 20 + 4.
        assert_eq!(bench.step().prefill_tokens, 24);
        assert_eq!((a.cached(), b.cached()), (0, 16));
        assert!(a.is_ended() && b.is_ended());
    }

    #[test]
    fn chunks_of_a_prompt_can_be_hit_before_its_end() {
        let mut bench = Bench::new(config(100));
        let _long = bench.queue(work(1, 150, 1));
        assert_eq!(bench.step().prefill_tokens, 100, "the budget");
        let other = bench.queue(work(1, 90, 1));
        // 50 are left of the long one; the other lacks 90 - 88 = 2, as 22 blocks are hit.
        assert_eq!(bench.step().prefill_tokens, 52);
        assert_eq!(other.cached(), 88);
    }

    #[test]
    fn a_preempted_request_finds_its_own_blocks_again() {
        // 7 blocks. Each takes 2 for its prompt, a third with its first output token and would take a
        // fourth with its fifth; then one is left.
        let mut bench = Bench::new(config(7));
        let (a, b) = (bench.queue(work(1, 8, 9)), bench.queue(work(2, 8, 9)));
        while bench.scheduler.totals.preemptions == 0 {
            bench.step();
        }
        assert_eq!(
            (bench.scheduler.running(), bench.scheduler.waiting()),
            (1, 1)
        );
        let kept = b.generated();
        assert!(kept > 0 && !b.is_ended());
        bench.finish(&a);
        let resumed = bench.step();
        // It has 8 + 5 tokens, the first 12 of them in 3 cached blocks: one is left to compute.
        assert_eq!((kept, resumed.scheduled.clone()), (5, vec![(0, 1)]));
        bench.finish(&b);
        assert_eq!((b.generated(), b.cached()), (9, 0));
        let totals = &bench.scheduler.totals;
        assert_eq!((totals.queried_tokens, totals.hit_tokens), (16, 0));
        assert_eq!((totals.prompt_tokens, totals.generation_tokens), (16, 18));
        assert_eq!(totals.observed.preemptions.sum(), 1.0);
    }

    #[test]
    fn requests_pass_one_whose_adapter_has_no_place() {
        let mut bench = Bench::new(config(100));
        let adapted = |lora: &str, root| Work {
            lora: Some(lora.to_owned()),
            ..work(root, 8, 4)
        };
        let _a = bench.queue(adapted("a", 1));
        let b = bench.queue(adapted("b", 2));
        let base = bench.queue(work(3, 8, 4));
        bench.step();
        assert_eq!((b.generated(), base.generated()), (0, 1));
        let scheduler = &bench.scheduler;
        assert_eq!(
            (scheduler.waiting(), scheduler.deferred(&bench.config)),
            (1, 1)
        );
        bench.finish(&b);
    }

    fn named(root: u64, prompt_tokens: usize, lease: u64) -> Work {
        Work {
            handover: Handover::Keep {
                request: "a".into(),
                lease: Duration::from_millis(lease),
            },
            ..work(root, prompt_tokens, 1)
        }
    }

    #[test]
    fn kept_blocks_are_held_until_they_are_pulled_or_their_lease_ends() {
        let mut bench = Bench::new(config(10));
        // 9 tokens in 3 blocks, the last partly filled.
        let progress = bench.queue(named(1, 9, 100));
        bench.finish(&progress);
        assert_eq!(progress.kept(), [1, 2, 3]);
        assert_eq!(bench.scheduler.kept_tokens("a"), Some(9));
        assert_eq!(bench.scheduler.pool.held_blocks(), 3);
        bench.scheduler.free_kept("a");
        bench.scheduler.free_kept("a");
        assert_eq!(
            (
                bench.scheduler.pool.held_blocks(),
                bench.scheduler.kept_tokens("a")
            ),
            (0, None)
        );

        let progress = bench.queue(named(2, 9, 100));
        bench.finish(&progress);
        bench
            .scheduler
            .expire(bench.now + Duration::from_millis(99));
        assert_eq!(bench.scheduler.pool.held_blocks(), 3);
        bench
            .scheduler
            .expire(bench.now + Duration::from_millis(100));
        assert_eq!(
            (
                bench.scheduler.pool.held_blocks(),
                bench.scheduler.totals.expired
            ),
            (0, 1)
        );
    }

    #[test]
    fn a_pulled_prompt_computes_only_its_last_token() {
        let mut bench = Bench::new(config(100));
        let first = bench.queue(work(1, 8, 1));
        bench.finish(&first);
        let pulled = Work {
            handover: Handover::Pulled,
            ..work(1, 21, 1)
        };
        let progress = bench.queue(pulled);
        assert_eq!(bench.step().prefill_tokens, 1);
        // 8 are cached, 12 of the other 13 pulled, the last computed.
        assert_eq!((progress.cached(), progress.pulled()), (8, 12));
        let totals = &bench.scheduler.totals;
        assert_eq!(
            (totals.external_queried_tokens, totals.external_hit_tokens),
            (8 + 13, 13)
        );
        assert_eq!(totals.pulled_prompt_tokens, 12);
        // Its full blocks are cached like computed ones: 5 of 21 tokens.
        let again = bench.queue(work(1, 21, 1));
        bench.finish(&again);
        assert_eq!(again.cached(), 20);
    }

    #[test]
    fn durations_are_those_of_the_simulated_engine() {
        // 10 ms a step at twice the speed are 20 ms.
        let mut bench = Bench::new(config(100));
        let progress = bench.queue(work(1, 8, 3));
        bench.finish(&progress);
        let observed = &bench.scheduler.totals.observed;
        let near = |sum: f64, expected: f64| (sum - expected).abs() < 1e-9;
        assert!(near(observed.ttft.sum(), 0.02));
        assert!(near(observed.between_tokens.sum(), 0.04) && observed.between_tokens.count() == 2);
        assert!(near(observed.per_output_token.sum(), 0.02));
        assert!(near(observed.end_to_end.sum(), 0.06) && near(observed.decode.sum(), 0.04));
        // Three steps: 8 prompt tokens and one of output, then one each.
        let steps = &observed.step_tokens;
        assert_eq!((steps.count(), steps.sum()), (3, 11.0));
    }

    #[test]
    fn a_recorded_run_out_of_blocks_gives_the_recorded_bytes() {
        use crate::sim::events::{HashForm, event::payload};
        use crate::sim::fixtures::{hex, recording, unhex};
        use crate::sim::hash::{BlockHasher, Extras, HashAlgorithm};
        use crate::sim::work::Content;

        let frames: Vec<serde_json::Value> = recording("kv-events/evict.jsonl")
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        // Steps of the recording, one request each, by prompt and output tokens.
        let requests = [
            ("fill-0", 137, 1),
            ("fill-1", 115, 1),
            ("fill-2", 108, 1),
            ("fill-3", 128, 1),
            ("fill-4", 122, 1),
            ("first-again", 137, 1),
            // Hits all it can: no event.
            ("fill-4", 122, 1),
            ("long-decode", 115, 120),
        ];
        let hasher = BlockHasher::new(HashAlgorithm::Sha256, None);
        let config = EngineConfig {
            blocks: 24,
            block_tokens: 16,
            max_num_batched_tokens: 8192,
            ..config(0)
        };
        let mut scheduler = Scheduler::new(&config, true);
        assert!(
            scheduler.pool.reset(),
            "the recorded run began with a reset"
        );
        let mut own = Vec::new();
        let mut now = Instant::now();
        for (step, prompt_tokens, max_tokens) in requests {
            let tokens = recorded_tokens(&frames, step, prompt_tokens + max_tokens);
            let (hashes, extra_keys) = hasher.chain(&tokens, 16, &Extras::default());
            let work = Work {
                prompt_tokens,
                hashes,
                max_tokens,
                lora: None,
                content: Some(Content {
                    tokens,
                    extra_keys,
                    lora: None,
                    session_id: None,
                    report_hits: false,
                }),
                handover: Handover::None,
            };
            let progress = Arc::new(Progress::default());
            scheduler.queue(Sequence::new(work, Arc::clone(&progress), now));
            while !progress.is_ended() {
                let plan = scheduler.plan(&config, now);
                now += Duration::from_millis(10);
                scheduler.apply(&plan, &config, now);
                let events = scheduler.pool.take_events();
                if !events.is_empty() {
                    own.push(events);
                }
            }
        }
        for (frame, events) in frames.iter().zip(&own) {
            // From the bytes: reading the decimal digits would round.
            let time = &unhex(frame["payload_hex"].as_str().unwrap())[2..10];
            let time = f64::from_be_bytes(time.try_into().unwrap());
            assert_eq!(
                hex(&payload(time, events, 0, HashForm::Integer)),
                frame["payload_hex"].as_str().unwrap(),
                "{}",
                frame["seq"]
            );
        }
        assert_eq!(own.len(), 21, "numbers 0 to 20 are those of these requests");
    }

    /// The tokens of a recorded request, from its events; what lies in no full block is 0.
    fn recorded_tokens(frames: &[serde_json::Value], step: &str, count: usize) -> Vec<u32> {
        let of_step = frames.iter().filter(|frame| frame["step"] == step);
        let events = of_step.flat_map(|frame| frame["batch"][1].as_array().unwrap());
        let ids = events
            .filter_map(|event| event["token_ids"].as_array())
            .flatten();
        let mut tokens: Vec<u32> = ids
            .map(|id| u32::try_from(id.as_u64().unwrap()).unwrap())
            .collect();
        tokens.resize(count, 0);
        tokens
    }
}
