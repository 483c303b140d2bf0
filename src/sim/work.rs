//! A request as the engine sees it, and what the HTTP side sees of it meanwhile.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::sync::Notify;

use super::events::{Event, Stored};
use super::hash::{BlockHash, ExtraKey};

/// A request as the engine sees it.
#[derive(Debug, Clone)]
pub struct Work {
    /// Tokens of the prompt, at least 1.
    pub prompt_tokens: usize,
    /// Hashes of the full blocks of prompt and output together: the engine caches what it generated
    /// as it caches prompts.
    pub hashes: Vec<BlockHash>,
    /// Output tokens to make, at least 1.
    pub max_tokens: usize,
    /// Adapter the request asks for.
    pub lora: Option<String>,
    /// What events tell of its blocks; `None` when nobody listens.
    pub content: Option<Content>,
}

/// What is in the blocks of a request.
#[derive(Debug, Clone)]
pub struct Content {
    /// Tokens of prompt and output.
    pub tokens: Vec<u32>,
    /// For each full block.
    pub extra_keys: Vec<Vec<ExtraKey>>,
    /// Number and name of the adapter.
    pub lora: Option<(u64, Arc<str>)>,
    /// What the request said of itself.
    pub session_id: Option<Arc<str>>,
    /// Tell the blocks that were hit as well.
    pub report_hits: bool,
}

impl Work {
    /// The event that blocks `from..to` were stored; `None` when nobody listens.
    pub(super) fn stored(&self, from: usize, to: usize, block_tokens: usize) -> Option<Event> {
        let content = self.content.as_ref()?;
        let tokens = content.tokens.get(from * block_tokens..to * block_tokens)?;
        let before = from.checked_sub(1).and_then(|index| self.hashes.get(index));
        Some(Event::Stored(Box::new(Stored {
            hashes: self.hashes.get(from..to)?.to_vec(),
            parent: before.copied(),
            tokens: tokens.to_vec(),
            block_tokens,
            lora: content.lora.clone(),
            extra_keys: content.extra_keys.get(from..to)?.to_vec(),
            session_id: content.session_id.clone(),
        })))
    }
}

/// What the HTTP side sees of a request. Dropping every other handle aborts it.
///
/// One task waits at a time, and says for which token: a batch of hundreds would otherwise wake
/// hundreds of tasks with every step, most of them for nothing.
#[derive(Debug, Default)]
pub struct Progress {
    generated: AtomicUsize,
    /// Output tokens that the waiting task wants to see.
    wanted: AtomicUsize,
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
        self.reach(seen.saturating_add(1)).await;
    }

    /// Waits for the end.
    pub async fn ended(&self) {
        self.reach(usize::MAX).await;
    }

    async fn reach(&self, tokens: usize) {
        loop {
            let changed = self.changed.notified();
            // Sequentially consistent, as in `set_generated`: either this sees the new count, or that
            // sees what is wanted and wakes.
            self.wanted.store(tokens, Ordering::SeqCst);
            if self.generated.load(Ordering::SeqCst) >= tokens || self.is_ended() {
                return;
            }
            changed.await;
        }
    }

    pub(super) fn set_generated(&self, tokens: usize) {
        self.generated.store(tokens, Ordering::SeqCst);
        if tokens >= self.wanted.load(Ordering::SeqCst) {
            self.changed.notify_waiters();
        }
    }

    pub(super) fn set_cached(&self, tokens: usize) {
        self.cached.store(tokens, Ordering::Release);
    }

    pub(super) fn end(&self, failed: bool) {
        self.failed.store(failed, Ordering::Release);
        self.ended.store(true, Ordering::Release);
        self.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn a_waiting_task_is_woken_by_the_token_it_wants_and_by_the_end() {
        let progress = Arc::new(Progress::default());
        let mut third = Box::pin(progress.beyond(2));
        assert!(third.as_mut().now_or_never().is_none());
        progress.set_generated(2);
        assert!(third.as_mut().now_or_never().is_none());
        progress.set_generated(3);
        third.await;
        let waiting = Arc::clone(&progress);
        let end = tokio::spawn(async move { waiting.ended().await });
        tokio::task::yield_now().await;
        progress.set_generated(9);
        progress.end(false);
        end.await.unwrap();
        assert!(!progress.is_failed());
    }
}
