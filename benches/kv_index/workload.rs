//! What the index benches store and look up: 64 endpoints hold 35 of 150 conversations each, 375 blocks
//! that all holders share and 75 of the endpoint's own, 16 tokens a block: 1,008,000 entries.

pub(crate) const ENDPOINTS: u32 = 64;
pub(crate) const GROUPS: u32 = 150;
pub(crate) const GROUPS_EACH: u32 = 35;
pub(crate) const SHARED: u32 = 375;
pub(crate) const PRIVATE: u32 = 75;
pub(crate) const BLOCK: u32 = 16;
pub(crate) const ENTRIES: u32 = ENDPOINTS * GROUPS_EACH * (SHARED + PRIVATE);
/// Blocks of a prompt of 131,072 tokens less its template.
pub(crate) const LONG: u32 = 7500;
/// Long prompts that every endpoint holds a different part of.
pub(crate) const LONG_PROMPTS: u32 = 4;

/// Whether engines agree on block hashes: same algorithm and seed, or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hashes {
    Shared,
    Own,
}

/// A prompt as an engine reports it.
#[derive(Debug, Clone)]
pub(crate) struct Prompt {
    pub(crate) tokens: Vec<u32>,
    pub(crate) hashes: Vec<u64>,
}

impl Prompt {
    /// Its tail from block `from` on, with the hash of the block before.
    pub(crate) fn tail(&self, from: u32) -> (&[u32], &[u64], Option<u64>) {
        let at = from as usize;
        let parent = at.checked_sub(1).map(|before| self.hashes[before]);
        (
            &self.tokens[at * BLOCK as usize..],
            &self.hashes[at..],
            parent,
        )
    }
}

/// Conversation number `n` of an endpoint.
pub(crate) fn group_of(endpoint: u32, n: u32) -> u32 {
    (endpoint * 7 + n * 4) % GROUPS
}

/// A conversation of the group as it stands on the endpoint.
pub(crate) fn conversation(endpoint: u32, group: u32, hashes: Hashes) -> Prompt {
    prompt(endpoint, group, SHARED, SHARED + PRIVATE, hashes)
}

/// The endpoint's part of a long prompt: all but its last 10 blocks for each endpoint before it.
pub(crate) fn long(endpoint: u32, number: u32, hashes: Hashes) -> Prompt {
    let blocks = LONG - endpoint * 10;
    prompt(endpoint, GROUPS + number, blocks, blocks, hashes)
}

fn prompt(endpoint: u32, group: u32, shared: u32, blocks: u32, hashes: Hashes) -> Prompt {
    let name = |i: u32| {
        let owner = if i < shared { 0 } else { endpoint + 1 };
        mix(u64::from(group) << 40 | u64::from(owner) << 20 | u64::from(i))
    };
    let tokens = (0..blocks).flat_map(|i| {
        let seed = name(i);
        (0..u64::from(BLOCK)).map(move |t| u32::try_from(mix(seed + t) % 150_000).unwrap_or(0))
    });
    let engine = match hashes {
        Hashes::Shared => 1,
        Hashes::Own => u64::from(endpoint) + 2,
    };
    Prompt {
        tokens: tokens.collect(),
        hashes: (0..blocks).map(|i| mix(name(i) ^ mix(engine))).collect(),
    }
}

/// Spreads a number over 64 bits (the finaliser of splitmix64).
fn mix(n: u64) -> u64 {
    let n = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let n = (n ^ n >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ n >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ n >> 31
}
