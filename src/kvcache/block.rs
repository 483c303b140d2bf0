//! From token ids to block keys: the names under which the index knows a block.
//!
//! A key commits to everything before it: it is a hash over the key of the block before, the block's
//! tokens and what else the engine mixes into its own hash (media, salt, embeddings). Keys are seeded
//! per process, never leave it, and are the same for a prompt and for the events of an engine that
//! computed it, whatever hash the engine uses itself.

//!
//! A block is hashed in two parts. Its content (tokens and extras) is hashed by itself, so that a
//! processor works on several blocks at once and a writer needs no lock for it; one multiplication then
//! chains it to the key before it. The tokens go through NH, the universal hash inside UMAC and VMAC:
//! with secret words, two different blocks have the same 128-bit sum with a chance of 2^-64, whoever
//! chose them. Like every 64-bit key, a key is then as good as chance: 10^8 keys collide anywhere with
//! 3 in 10,000.

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Name of one block of one prompt; says which tokens came before it as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockKey(pub u64);

/// What two prompts must share, beside their tokens, to share blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct KeySpace<'a> {
    /// Base model as the pool names it.
    pub model: &'a str,
    /// Adapter; the base model does not enter the key of an adapter's blocks.
    pub lora: Option<&'a str>,
    /// Tokens per block.
    pub block_size: u32,
}

/// Where the placeholder tokens of one media item stand in the prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MediaSpan<'a> {
    /// Content hash or id, as the engine names the item.
    pub identifier: &'a str,
    /// First token of the item, counted from the start of the prompt.
    pub offset: u32,
    /// Tokens of the item.
    pub length: u32,
}

/// Tokens hashed in one step.
const STEP: usize = 16;
/// Secret words of a hasher: one for each pair of tokens in a step, then one for each other use.
const WORDS: usize = STEP / 2 + 6;

/// Marks a start key, so that no block can be mistaken for one.
const START: u8 = 0;
const MODEL: u8 = 1;
const LORA: u8 = 2;
const MEDIA: u8 = 3;
const SALT: u8 = 4;
const EMBEDDINGS: u8 = 5;
const BARE: u8 = 6;
const UNKNOWN: u8 = 7;

/// What a block's key depends on beside its tokens, each part with a tag and its length so that no two
/// lists read the same. The buffer is reused from block to block.
#[derive(Debug, Default)]
pub struct Extras {
    bytes: Vec<u8>,
}

impl Extras {
    /// Forgets everything.
    pub fn clear(&mut self) {
        self.bytes.clear();
    }

    /// True when the key depends on the tokens alone.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// A media item; `offset` is its start minus the start of the block, negative when it began earlier.
    pub fn media(&mut self, identifier: &str, offset: i64) {
        self.part(MEDIA, identifier.as_bytes());
        self.bytes.extend_from_slice(&offset.to_le_bytes());
    }

    /// The prompt's salt; belongs to the first block only.
    pub fn salt(&mut self, salt: &str) {
        self.part(SALT, salt.as_bytes());
    }

    /// Digest of prompt embeddings.
    pub fn embeddings(&mut self, digest: &[u8]) {
        self.part(EMBEDDINGS, digest);
    }

    /// Text an older engine sent without saying what it is. Keys made with it equal no request's.
    pub fn bare(&mut self, text: &str) {
        self.part(BARE, text.as_bytes());
    }

    /// What an engine sent that nobody knows. Keys made with it equal no request's.
    pub fn unknown(&mut self, raw: &[u8]) {
        self.part(UNKNOWN, raw);
    }

    fn part(&mut self, tag: u8, bytes: &[u8]) {
        self.bytes.push(tag);
        self.bytes
            .extend_from_slice(&(bytes.len() as u64).to_le_bytes());
        self.bytes.extend_from_slice(bytes);
    }
}

/// Hash of a block's tokens and extras, whatever stands before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockContent(u64);

/// Makes block keys. One per process: keys of different hashers have nothing in common.
#[derive(Clone, Copy)]
pub struct BlockHasher {
    seed: u64,
    words: [u64; WORDS],
}

impl std::fmt::Debug for BlockHasher {
    /// Without the seed, which is a secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("BlockHasher")
    }
}

impl Default for BlockHasher {
    /// Secret words, so that nobody outside can build prompts that collide.
    fn default() -> Self {
        Self {
            seed: fastrand::u64(..),
            words: std::array::from_fn(|_| fastrand::u64(..)),
        }
    }
}

impl BlockHasher {
    /// A hasher with a known seed, for tests and measurements.
    pub fn with_seed(seed: u64) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        Self {
            seed,
            words: std::array::from_fn(|_| rng.u64(..)),
        }
    }

    /// What stands before the first block of every prompt in `space`.
    pub fn start(&self, space: &KeySpace<'_>) -> BlockKey {
        let mut parts = Extras::default();
        parts.bytes.push(START);
        match space.lora {
            Some(lora) => parts.part(LORA, lora.as_bytes()),
            None => parts.part(MODEL, space.model.as_bytes()),
        }
        parts
            .bytes
            .extend_from_slice(&space.block_size.to_le_bytes());
        BlockKey(xxh3_64_with_seed(&parts.bytes, self.seed))
    }

    /// Keys of a prompt's full blocks, in order, in place of what `out` held. Cost: 5 ns for a block
    /// of 16 tokens.
    pub fn request_keys(
        &self,
        space: &KeySpace<'_>,
        tokens: &[u32],
        salt: Option<&str>,
        media: &[MediaSpan<'_>],
        out: &mut Vec<BlockKey>,
    ) {
        out.clear();
        self.extend_request_keys(space, tokens, salt, media, out);
    }

    /// Goes on from the keys in `out`, which belong to the first blocks of this very prompt, and appends
    /// those of the blocks behind them. `tokens` is the whole prompt.
    pub fn extend_request_keys(
        &self,
        space: &KeySpace<'_>,
        tokens: &[u32],
        salt: Option<&str>,
        media: &[MediaSpan<'_>],
        out: &mut Vec<BlockKey>,
    ) {
        let block_size = space.block_size as usize;
        let done = out.len();
        let mut extend = |blocks: usize, media: &[MediaSpan<'_>], salt: Option<&str>| {
            let done = out.len();
            let parent = out.last().copied().unwrap_or_else(|| self.start(space));
            let from = done.saturating_mul(block_size);
            let to = from.saturating_add(blocks.saturating_mul(block_size));
            let tail = tokens.get(from..to.min(tokens.len())).unwrap_or_default();
            if media.is_empty() && salt.is_none() {
                // The usual prompt: the compiler leaves extras out of this loop.
                self.extend(parent, tail, block_size, out, |_, _| {});
                return;
            }
            self.extend(parent, tail, block_size, out, |index, extras| {
                overlapping(media, (done + index) * block_size, block_size, extras);
                if let Some(salt) = salt {
                    extras.salt(salt);
                }
            });
        };
        let salt = salt.filter(|salt| done == 0 && !salt.is_empty());
        if salt.is_some() {
            extend(1, media, salt);
        }
        extend(usize::MAX, media, None);
    }

    /// Appends the keys of the full blocks of `tokens`, which follow the block named `parent`. `extras_of`
    /// is asked once a block, with its number in `tokens` and an empty list to fill.
    pub fn extend(
        &self,
        parent: BlockKey,
        tokens: &[u32],
        block_size: usize,
        out: &mut Vec<BlockKey>,
        extras_of: impl FnMut(usize, &mut Extras),
    ) {
        let mut key = parent;
        out.reserve(tokens.len().checked_div(block_size).unwrap_or(0));
        self.each_content(tokens, block_size, extras_of, |content| {
            key = self.chain(key, content);
            out.push(key);
        });
    }

    /// Appends the contents of the full blocks of `tokens`; `extras_of` as in [`BlockHasher::extend`].
    pub fn contents(
        &self,
        tokens: &[u32],
        block_size: usize,
        out: &mut Vec<BlockContent>,
        extras_of: impl FnMut(usize, &mut Extras),
    ) {
        out.reserve(tokens.len().checked_div(block_size).unwrap_or(0));
        self.each_content(tokens, block_size, extras_of, |content| out.push(content));
    }

    /// Key of the block that follows the one named `parent`.
    #[inline]
    pub fn chain(&self, parent: BlockKey, content: BlockContent) -> BlockKey {
        let [.., first, second, _, _, _, _] = self.words;
        BlockKey(fold(parent.0 ^ first, content.0 ^ second))
    }

    fn each_content(
        &self,
        tokens: &[u32],
        block_size: usize,
        mut extras_of: impl FnMut(usize, &mut Extras),
        mut take: impl FnMut(BlockContent),
    ) {
        let mut extras = Extras::default();
        let mut finish = |index: usize, content: u64| {
            extras.clear();
            extras_of(index, &mut extras);
            take(self.with_extras(content, &extras));
        };
        if block_size == STEP {
            let (blocks, _) = tokens.as_chunks::<STEP>();
            for (index, block) in blocks.iter().enumerate() {
                finish(index, self.step(block));
            }
        } else if block_size > 0 {
            for (index, block) in tokens.chunks_exact(block_size).enumerate() {
                finish(index, self.steps(block));
            }
        }
    }

    /// Tokens of one step: the sum of the products of neighbouring words, each with a secret added.
    #[inline]
    fn step(&self, tokens: &[u32; STEP]) -> u64 {
        let [w0, w1, w2, w3, w4, w5, w6, w7, .., low, high, _, _] = self.words;
        let (pairs, _) = tokens.as_chunks::<4>();
        let [a, b, c, d] = pairs else {
            return 0;
        };
        let sum = product(a, w0, w1)
            .wrapping_add(product(b, w2, w3))
            .wrapping_add(product(c, w4, w5))
            .wrapping_add(product(d, w6, w7));
        let (upper, lower) = halves(sum);
        fold(lower ^ low, upper ^ high)
    }

    /// Any number of tokens. All blocks of a key space have equally many, so a last step that is filled
    /// up with zeros is told from none.
    fn steps(&self, block: &[u32]) -> u64 {
        let [.., between, _] = self.words;
        let (whole, rest) = block.as_chunks::<STEP>();
        let mut content = 0;
        for step in whole {
            content = fold(content ^ between, self.step(step)) ^ content.rotate_left(32);
        }
        if !rest.is_empty() {
            let mut last = [0; STEP];
            for (place, token) in last.iter_mut().zip(rest) {
                *place = *token;
            }
            content = fold(content ^ between, self.step(&last)) ^ content.rotate_left(32);
        }
        content
    }

    #[inline]
    fn with_extras(&self, content: u64, extras: &Extras) -> BlockContent {
        if extras.is_empty() {
            return BlockContent(content);
        }
        let [.., last] = self.words;
        let digest = xxh3_64_with_seed(&extras.bytes, self.seed);
        BlockContent(fold(content ^ last, digest))
    }
}

/// Four tokens and two secret words to one product; no bit is lost.
#[inline]
fn product(&[a, b, c, d]: &[u32; 4], first: u64, second: u64) -> u128 {
    let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    let (first, second) = (
        first.wrapping_add(pair(a, b)),
        second.wrapping_add(pair(c, d)),
    );
    u128::from(first) * u128::from(second)
}

/// Both halves of a product, laid over each other.
#[inline]
fn fold(a: u64, b: u64) -> u64 {
    let (upper, lower) = halves(u128::from(a) * u128::from(b));
    upper ^ lower
}

#[inline]
#[expect(
    clippy::cast_possible_truncation,
    reason = "the halves of a wider number"
)]
fn halves(n: u128) -> (u64, u64) {
    ((n >> 64) as u64, n as u64)
}

/// Lists the media that reach into the block, by position.
fn overlapping(media: &[MediaSpan<'_>], start: usize, block_size: usize, extras: &mut Extras) {
    if media.is_empty() {
        return;
    }
    let start = start as u64;
    let end = start + block_size as u64;
    let inside = |span: &&MediaSpan<'_>| {
        let first = u64::from(span.offset);
        first < end && first + u64::from(span.length) > start
    };
    let add = |extras: &mut Extras, span: &MediaSpan<'_>| {
        let offset = i64::from(span.offset).saturating_sub_unsigned(start);
        extras.media(span.identifier, offset);
    };
    if media.is_sorted_by_key(|span| span.offset) {
        for span in media.iter().filter(inside) {
            add(extras, span);
        }
        return;
    }
    let mut found: Vec<_> = media.iter().filter(inside).collect();
    found.sort_by_key(|span| span.offset);
    for span in found {
        add(extras, span);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPACE: KeySpace<'static> = KeySpace {
        model: "m",
        lora: None,
        block_size: 4,
    };

    fn keys(space: &KeySpace<'_>, tokens: &[u32], salt: Option<&str>) -> Vec<BlockKey> {
        let mut out = Vec::new();
        BlockHasher::with_seed(7).request_keys(space, tokens, salt, &[], &mut out);
        out
    }

    #[test]
    fn a_key_commits_to_everything_before_it() {
        let one = keys(&SPACE, &[1, 2, 3, 4, 5, 6, 7, 8, 9], None);
        let other = keys(&SPACE, &[1, 2, 3, 9, 5, 6, 7, 8], None);
        assert_eq!(one.len(), 2, "the ninth token fills no block");
        assert_ne!(one[0], other[0]);
        assert_ne!(one[1], other[1]);
    }

    #[test]
    fn model_adapter_block_size_and_salt_part_the_spaces() {
        let tokens = [1, 2, 3, 4];
        let spaces = [
            keys(&SPACE, &tokens, None),
            keys(
                &KeySpace {
                    model: "n",
                    ..SPACE
                },
                &tokens,
                None,
            ),
            keys(
                &KeySpace {
                    lora: Some("m"),
                    ..SPACE
                },
                &tokens,
                None,
            ),
            keys(
                &KeySpace {
                    block_size: 2,
                    ..SPACE
                },
                &tokens[..2],
                None,
            ),
            keys(&SPACE, &tokens, Some("tenant")),
        ];
        for (i, a) in spaces.iter().enumerate() {
            for b in &spaces[i + 1..] {
                assert_ne!(a, b);
            }
        }
        assert_eq!(
            keys(&SPACE, &tokens, Some("")),
            spaces[0],
            "an empty salt is none"
        );
    }

    #[test]
    fn a_prompt_that_grew_needs_its_tail_hashed_only() {
        let tokens: Vec<u32> = (0..40).collect();
        let media = [MediaSpan {
            identifier: "img",
            offset: 6,
            length: 20,
        }];
        let hasher = BlockHasher::with_seed(7);
        let (mut whole, mut grown) = (Vec::new(), Vec::new());
        hasher.request_keys(&SPACE, &tokens, Some("s"), &media, &mut whole);
        hasher.request_keys(&SPACE, &tokens[..18], Some("s"), &media, &mut grown);
        assert_eq!(grown.len(), 4);
        hasher.extend_request_keys(&SPACE, &tokens, Some("s"), &media, &mut grown);
        assert_eq!(grown, whole);
    }

    #[test]
    fn media_change_the_blocks_they_reach_and_those_behind() {
        let tokens = [0; 16];
        let hasher = BlockHasher::with_seed(7);
        let of = |media: &[MediaSpan<'_>]| {
            let mut out = Vec::new();
            hasher.request_keys(&SPACE, &tokens, None, media, &mut out);
            out
        };
        let span = |identifier, offset| MediaSpan {
            identifier,
            offset,
            length: 3,
        };
        let (none, a, b, moved) = (
            of(&[]),
            of(&[span("a", 4)]),
            of(&[span("b", 4)]),
            of(&[span("a", 5)]),
        );
        assert_eq!(
            [none[0], b[0], moved[0]],
            [a[0]; 3],
            "block 0 holds no image"
        );
        for i in 1..4 {
            assert!(a[i] != none[i] && a[i] != b[i] && a[i] != moved[i]);
        }
        assert_eq!(
            of(&[span("a", 9), span("b", 4)]),
            of(&[span("b", 4), span("a", 9)])
        );
    }

    #[test]
    fn every_token_of_a_block_counts_whatever_its_size() {
        let hasher = BlockHasher::with_seed(7);
        for block_size in [1, 3, 16, 17, 32, 100, 128] {
            let of = |tokens: &[u32]| {
                let mut out = Vec::new();
                hasher.extend(BlockKey(9), tokens, block_size, &mut out, |_, _| {});
                (out.len(), out[0])
            };
            let zeros = vec![0; block_size];
            let mut seen = vec![of(&zeros)];
            for at in 0..block_size {
                for token in [1, 1 << 31] {
                    let mut tokens = zeros.clone();
                    tokens[at] = token;
                    seen.push(of(&tokens));
                }
            }
            let n = seen.len();
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen.len(), n, "{block_size}");
            assert!(seen.iter().all(|(blocks, _)| *blocks == 1));
        }
    }

    #[test]
    fn tokens_of_two_blocks_do_not_change_places() {
        let one = keys(&SPACE, &[1, 2, 3, 4, 5, 6, 7, 8], None);
        let other = keys(&SPACE, &[5, 6, 7, 8, 1, 2, 3, 4], None);
        assert_ne!(one[1], other[1]);
    }

    #[test]
    fn contents_chain_to_the_same_keys() {
        let hasher = BlockHasher::with_seed(7);
        let tokens: Vec<u32> = (0..70).collect();
        let extras_of = |index: usize, extras: &mut Extras| {
            if index == 1 {
                extras.salt("s");
            }
        };
        for block_size in [4, 16] {
            let (mut contents, mut keys) = (Vec::new(), Vec::new());
            hasher.contents(&tokens, block_size, &mut contents, extras_of);
            hasher.extend(BlockKey(3), &tokens, block_size, &mut keys, extras_of);
            let mut key = BlockKey(3);
            let chained = contents.iter().map(|content| {
                key = hasher.chain(key, *content);
                key
            });
            assert_eq!(chained.collect::<Vec<_>>(), keys);
        }
    }

    #[test]
    fn keys_spread_over_all_bits() {
        // 4096 keys of nearly equal blocks: each bit is set in half of them, 2048 +- 32 (one sigma).
        let hasher = BlockHasher::with_seed(7);
        let mut ones = [0_u32; 64];
        for n in 0..4096 {
            let mut out = Vec::new();
            hasher.extend(BlockKey(0), &[n; 16], 16, &mut out, |_, _| {});
            for (bit, ones) in (0..64).zip(&mut ones) {
                *ones += u32::from(out[0].0 >> bit & 1 == 1);
            }
        }
        assert!(ones.iter().all(|n| (1850..2250).contains(n)), "{ones:?}");
    }

    #[test]
    fn parts_of_extras_do_not_run_into_each_other() {
        let (mut one, mut two) = (Extras::default(), Extras::default());
        one.bare("ab");
        one.bare("c");
        two.bare("a");
        two.bare("bc");
        assert_ne!(one.bytes, two.bytes);
    }
}
