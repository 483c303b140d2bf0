//! From token ids to block keys: the names under which the index knows a block.
//!
//! A key commits to everything before it: it is a hash over the key of the block before, the block's
//! tokens and what else the engine mixes into its own hash (media, salt, embeddings). Keys are seeded
//! per process, never leave it, and are the same for a prompt and for the events of an engine that
//! computed it, whatever hash the engine uses itself.

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

const PARENT_BYTES: usize = size_of::<u64>();
const TOKEN_BYTES: usize = size_of::<u32>();

/// Marks a start key, so that no block can be mistaken for one.
const START: u8 = 0;
const MODEL: u8 = 1;
const LORA: u8 = 2;
const MEDIA: u8 = 3;
const SALT: u8 = 4;
const EMBEDDINGS: u8 = 5;
const BARE: u8 = 6;

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

    fn part(&mut self, tag: u8, bytes: &[u8]) {
        self.bytes.push(tag);
        self.bytes
            .extend_from_slice(&(bytes.len() as u64).to_le_bytes());
        self.bytes.extend_from_slice(bytes);
    }
}

/// Makes block keys. One per process: keys of different hashers have nothing in common.
#[derive(Clone, Copy)]
pub struct BlockHasher {
    seed: u64,
}

impl std::fmt::Debug for BlockHasher {
    /// Without the seed, which is a secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("BlockHasher")
    }
}

impl Default for BlockHasher {
    /// A secret seed, so that nobody outside can build prompts that collide.
    fn default() -> Self {
        Self::with_seed(fastrand::u64(..))
    }
}

impl BlockHasher {
    /// A hasher with a known seed, for tests and measurements.
    pub fn with_seed(seed: u64) -> Self {
        Self { seed }
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

    /// Keys of a prompt's full blocks, in order, in place of what `out` held. Cost: 7 to 9 ns for a
    /// block of 16 tokens.
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
        let parent = out.last().copied().unwrap_or_else(|| self.start(space));
        let block_size = space.block_size as usize;
        let done = out.len();
        let tail = tokens
            .get(done.saturating_mul(block_size)..)
            .unwrap_or_default();
        self.extend(parent, tail, block_size, out, |index, extras| {
            let block = done + index;
            overlapping(media, block * block_size, block_size, extras);
            if block == 0
                && let Some(salt) = salt.filter(|salt| !salt.is_empty())
            {
                extras.salt(salt);
            }
        });
    }

    /// Appends the keys of the full blocks of `tokens`, which follow the block named `parent`. `extras_of`
    /// is asked once a block, with its number in `tokens` and an empty list to fill.
    pub fn extend(
        &self,
        parent: BlockKey,
        tokens: &[u32],
        block_size: usize,
        out: &mut Vec<BlockKey>,
        mut extras_of: impl FnMut(usize, &mut Extras),
    ) {
        if block_size == 0 {
            return;
        }
        let mut extras = Extras::default();
        let fixed = PARENT_BYTES + TOKEN_BYTES * block_size;
        let mut bytes = vec![0; fixed];
        let mut key = parent;
        out.reserve(tokens.len() / block_size);
        for (index, block) in tokens.chunks_exact(block_size).enumerate() {
            extras.clear();
            extras_of(index, &mut extras);
            bytes.truncate(fixed);
            if let Some((head, body)) = bytes.split_first_chunk_mut::<PARENT_BYTES>() {
                *head = key.0.to_le_bytes();
                // Compiles to a copy; an iterator over bytes does not.
                for (place, token) in body.chunks_exact_mut(TOKEN_BYTES).zip(block) {
                    place.copy_from_slice(&token.to_le_bytes());
                }
            }
            bytes.extend_from_slice(&extras.bytes);
            key = BlockKey(xxh3_64_with_seed(&bytes, self.seed));
            out.push(key);
        }
    }
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
    fn parts_of_extras_do_not_run_into_each_other() {
        let (mut one, mut two) = (Extras::default(), Extras::default());
        one.bare("ab");
        one.bare("c");
        two.bare("a");
        two.bare("bc");
        assert_ne!(one.bytes, two.bytes);
    }
}
