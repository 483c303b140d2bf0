//! Decoded KV events, borrowed from the message they came in, and [`EventSink`], who applies them.

/// One message of a publisher: the events of one engine step, in order.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    /// Engine's clock, seconds.
    pub ts: f64,
    /// Data-parallel rank as the batch names it.
    pub data_parallel_rank: Option<u32>,
    /// In the order they happened; a hash may be removed and stored again.
    pub events: &'a [Event<'a>],
}

/// One change of an engine's cache. Unknown tags and malformed events are counted by the decoder and
/// left out.
#[derive(Debug, Clone, Copy)]
pub enum Event<'a> {
    /// Blocks were stored.
    Stored(Stored<'a>),
    /// Copies of blocks were removed.
    Removed(Removed<'a>),
    /// Everything of this engine is gone, in all tiers.
    Cleared(Cleared),
}

/// A run of blocks was stored; one physical copy each.
#[derive(Debug, Clone, Copy)]
pub struct Stored<'a> {
    /// Engine hashes in prompt order, byte hashes reduced to their last 8 bytes.
    pub hashes: &'a [u64],
    /// Hash of the block before the first one; `None` at the start of a prompt.
    pub parent: Option<u64>,
    /// Tokens of the whole span; empty when the event only names a new location of known blocks.
    pub tokens: &'a [u32],
    /// Tokens per block; 0 when the event does not say.
    pub block_size: u32,
    /// Adapter the blocks were computed with.
    pub lora_name: Option<&'a str>,
    /// Medium as sent; empty means the GPU. Compare without case.
    pub medium: &'a str,
    /// Raw msgpack of `extra_keys` (an array with nil or an array for each hash), read by
    /// `wire::extra_keys`.
    pub extra_keys: Option<&'a [u8]>,
    /// Salt from SGLang's metadata map, where vLLM has it among `extra_keys`.
    pub cache_salt: Option<&'a str>,
    /// KV cache group of a hybrid model.
    pub group: Option<u32>,
    /// `kv_cache_spec_kind`, for example `full_attention`.
    pub kind: Option<&'a str>,
}

/// One copy of each hash was removed from a medium.
#[derive(Debug, Clone, Copy)]
pub struct Removed<'a> {
    /// Engine hashes, as in [`Stored::hashes`].
    pub hashes: &'a [u64],
    /// As in [`Stored::medium`].
    pub medium: &'a str,
    /// As in [`Stored::group`].
    pub group: Option<u32>,
}

/// `AllBlocksCleared`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cleared;

/// How much an endpoint's part of the index can be trusted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum StreamState {
    /// No event seen and no connection: nothing is known.
    #[default]
    Down = 0,
    /// Connected, older history is being replayed; what is known is a lower bound.
    Joining = 1,
    /// Every event since the base was applied.
    Live = 2,
    /// Events are missing, or may be: a replay is under way, a connection came anew and nothing has told yet
    /// that none was missed, or a payload did not decode. What is known may be stale.
    Gap = 3,
}

/// Takes the events of one publisher (one endpoint, one data-parallel rank), from one task.
pub trait EventSink: Send {
    /// Applies one batch; called in sequence order, never twice for the same sequence number.
    fn apply(&mut self, batch: &Batch<'_>);

    /// The engine restarted, or events were lost for good: forget all of it.
    fn reset(&mut self);

    /// The trust in this endpoint's part changed.
    fn set_state(&mut self, state: StreamState);

    /// Messages have this topic from now on; replays of older engines have none.
    fn on_topic(&mut self, _topic: &[u8]) {}

    /// The endpoint left the pool: what comes now goes nowhere, and its publisher, should it still be
    /// there, may belong to another endpoint by now.
    fn is_gone(&self) -> bool {
        false
    }
}
