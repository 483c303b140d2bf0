//! Work on a body while it arrives: reading it, decoding the text of its first prompt, and hashing that in
//! blocks.
//!
//! A piece that was just received lies in the processor's cache; a long body that is read only once it
//! is complete has to be fetched from memory again. What was made early is used only if the finished
//! payload says that it was the beginning of the prompt, so the outcome never depends on it.

use std::ops::Range;
use std::sync::Arc;

use smallvec::SmallVec;
use xxhash_rust::xxh64::xxh64;

use super::text::{Unescape, has_control, is_quoted};
use super::{Body, ParseError, Payload, Prompt, Segment, TextEncoding};

/// Bytes of a token where no tokenizer is asked.
pub const TOKEN_BYTES: usize = 4;
/// A block of up to 256 tokens that straddles slices is put together without an allocation.
const INLINE_BLOCK_BYTES: usize = 1024;
/// Strings of at least so many bytes are worth keeping.
pub const LONG_TEXT_BYTES: usize = 1024;
/// Body bytes up to which texts are kept.
pub const MAX_KEPT_BYTES: usize = 32 << 20;

/// A parser at work on one body.
pub trait Reading: Send + std::fmt::Debug {
    /// Reads what `body` has more than at the last call. An error is kept for [`Self::finish`].
    fn advance(&mut self, body: &Body);

    /// The first prompt so far.
    fn settled(&self) -> Settled<'_>;

    /// The body is complete: what [`super::Parser::parse`] would have returned.
    fn finish(self: Box<Self>, body: &Body) -> Result<Payload, ParseError>;
}

/// Segments of the first prompt that are known while the body is read, as far as can be told.
#[derive(Debug, Default)]
pub struct Settled<'a> {
    /// Complete ones, in order.
    pub closed: [&'a [Segment]; 4],
    /// The string behind them whose end has not arrived: where it begins, and whether it has escapes so
    /// far.
    pub open: Option<(usize, bool)>,
}

/// What to do with the text of the first prompt while it arrives.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EarlyWork {
    /// Hash its blocks.
    pub blocks: Option<EarlyBlocks>,
    /// Keep its long strings decoded.
    pub texts: bool,
}

/// Blocks to hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EarlyBlocks {
    /// Tokens of a block: a guess.
    pub tokens: u32,
    /// How many are wanted at most.
    pub max: usize,
}

impl EarlyWork {
    /// The work that two wish for; one size of blocks is hashed, that of the first.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            blocks: self.blocks.or(other.blocks),
            texts: self.texts || other.texts,
        }
    }
}

/// One body that is read while it arrives.
#[derive(Debug)]
pub struct Early {
    reading: Box<dyn Reading>,
    prompt: Option<Box<EarlyPrompt>>,
}

impl Early {
    /// Goes on with `reading`, and with `work` on the text.
    pub fn new(reading: Box<dyn Reading>, work: EarlyWork) -> Self {
        let wanted = work != EarlyWork::default();
        let prompt = wanted.then(|| Box::new(EarlyPrompt::new(work)));
        Self { reading, prompt }
    }

    /// Reads what `body` has more than at the last call.
    pub fn advance(&mut self, body: &Body) {
        self.reading.advance(body);
        if let Some(prompt) = &mut self.prompt {
            prompt.follow(&self.reading.settled(), body);
        }
    }

    /// The body is complete.
    pub fn finish(self, body: &Body) -> Result<(Payload, Option<Box<EarlyPrompt>>), ParseError> {
        let payload = self.reading.finish(body)?;
        let first = match payload.prompts.first() {
            Some(Prompt::Text(segments)) => segments.as_slice(),
            _ => &[],
        };
        let prompt = self.prompt.and_then(|prompt| prompt.confirm(first, body));
        Ok((payload, prompt))
    }
}

/// What was made of the leading text of a prompt, up to its end or its first media item.
#[derive(Debug)]
pub struct EarlyPrompt {
    /// `None` when nobody wants blocks.
    hasher: Option<BlockHasher>,
    hashes: Vec<u64>,
    /// Decoded bytes.
    bytes: u64,
    /// Segments read to their end.
    closed: SmallVec<[Range<usize>; 8]>,
    /// Start of the segment that is being read, and how far it was.
    current: Option<Range<usize>>,
    unescape: Unescape,
    keep_texts: bool,
    /// Decoded text of the current segment from its start on, where texts are kept, else of the last slice.
    decoded: Vec<u8>,
    /// The current segment is no text of a JSON string.
    spoilt: bool,
    texts: Vec<EarlyText>,
    /// Media were met, or the order was not what it seemed: nothing more is read.
    stopped: bool,
}

/// A long JSON string of a body, decoded.
#[derive(Debug, Clone)]
pub struct EarlyText {
    /// Where it lies in the body, without its quotes.
    pub range: Range<usize>,
    /// What it stands for.
    pub text: Arc<str>,
}

impl EarlyPrompt {
    fn new(work: EarlyWork) -> Self {
        let hasher = work
            .blocks
            .map(|blocks| BlockHasher::new(blocks.tokens as usize, blocks.max));
        Self {
            hasher,
            hashes: Vec::new(),
            bytes: 0,
            closed: SmallVec::new(),
            current: None,
            unescape: Unescape::default(),
            keep_texts: work.texts,
            decoded: Vec::new(),
            spoilt: false,
            texts: Vec::new(),
            stopped: false,
        }
    }

    /// Segments of the prompt that were read.
    pub fn segments(&self) -> usize {
        self.closed.len()
    }

    /// Decoded bytes of these segments.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Those of these segments that are JSON strings of at least [`LONG_TEXT_BYTES`].
    pub fn texts(&self) -> &[EarlyText] {
        &self.texts
    }

    /// Appends at most `max_blocks` unchained hashes of these segments to `hashes`. Returns the hasher
    /// that goes on behind them; `None` when it was other blocks that were hashed, or fewer.
    pub fn resume(
        &self,
        block_tokens: usize,
        max_blocks: usize,
        hashes: &mut Vec<u64>,
    ) -> Option<BlockHasher> {
        let mut hasher = self.hasher.clone()?;
        let known = self.hashes.len().min(max_blocks);
        let room = max_blocks - known;
        if hasher.block_bytes != block_bytes(block_tokens) || (hasher.room == 0 && room > 0) {
            return None;
        }
        hashes.extend_from_slice(self.hashes.get(..known).unwrap_or_default());
        hasher.room = room;
        Some(hasher)
    }

    fn follow(&mut self, settled: &Settled<'_>, body: &Body) {
        let mut passed = self.closed.len();
        for segments in settled.closed {
            let new = segments.get(passed..).unwrap_or_default();
            passed -= passed.min(segments.len());
            for segment in new {
                self.close(segment, body);
            }
        }
        if let Some((start, escaped)) = settled.open {
            self.read(start, body.len(), escaped, body);
        }
    }

    /// Reads a complete segment.
    fn close(&mut self, segment: &Segment, body: &Body) {
        let Segment::Body { range, encoding } = segment else {
            self.stopped = true;
            return;
        };
        let escaped = *encoding == TextEncoding::JsonEscaped;
        self.read(range.start, range.end, escaped, body);
        if self.stopped {
            return;
        }
        let from = self.begin_slice();
        self.unescape.finish(&mut self.decoded);
        self.take(from);
        self.keep(range, body);
        self.current = None;
        self.closed.push(range.clone());
    }

    /// Reads the segment that begins at `start` up to `end`. Without escapes so far, everything read
    /// of it before was plain.
    fn read(&mut self, start: usize, end: usize, escaped: bool, body: &Body) {
        if self.stopped {
            return;
        }
        let current = self.current.get_or_insert(start..start);
        if current.start != start {
            self.stopped = true;
            return;
        }
        let before = std::mem::replace(&mut current.end, end);
        if self.keep_texts && body.len() > MAX_KEPT_BYTES {
            self.keep_texts = false;
            self.texts = Vec::new();
        }
        for slice in body.slices(before..end) {
            if !escaped && !self.keep_texts {
                self.bytes += slice.len() as u64;
                if let Some(hasher) = &mut self.hasher {
                    hasher.push(slice, &mut self.hashes);
                }
                continue;
            }
            let from = self.begin_slice();
            if escaped {
                self.unescape.push(slice, &mut self.decoded);
            } else {
                self.decoded.extend_from_slice(slice);
            }
            self.take(from);
            self.spoilt |= self.keep_texts && has_control(slice);
        }
    }

    /// Where what is decoded next begins.
    fn begin_slice(&mut self) -> usize {
        if !self.keep_texts {
            self.decoded.clear();
        }
        self.decoded.len()
    }

    /// Hashes what was decoded from `from` on.
    fn take(&mut self, from: usize) {
        let new = self.decoded.get(from..).unwrap_or_default();
        self.bytes += new.len() as u64;
        if let Some(hasher) = &mut self.hasher {
            hasher.push(new, &mut self.hashes);
        }
    }

    /// Keeps the decoded segment at `range`, if it is a string and long.
    fn keep(&mut self, range: &Range<usize>, body: &Body) {
        let spoilt = std::mem::take(&mut self.spoilt);
        let lossy = std::mem::take(&mut self.unescape.lossy);
        let long = self.keep_texts && range.len() >= LONG_TEXT_BYTES;
        if long
            && !spoilt
            && !lossy
            && is_quoted(body, range)
            && let Ok(text) = std::str::from_utf8(&self.decoded)
        {
            let (range, text) = (range.clone(), Arc::from(text));
            self.texts.push(EarlyText { range, text });
        }
        self.decoded.clear();
    }

    /// Checks what was read against the prompt, and reads on to its end or its first media item.
    fn confirm(mut self: Box<Self>, prompt: &[Segment], body: &Body) -> Option<Box<Self>> {
        let same = |(read, segment): (&Range<usize>, &Segment)| matches!(segment, Segment::Body { range, .. } if range == read);
        let agrees = self.closed.len() <= prompt.len() && self.closed.iter().zip(prompt).all(same);
        if !agrees {
            return self.texts_only();
        }
        let rest = prompt.get(self.closed.len()..).unwrap_or_default();
        self.stopped = false;
        let text = |segment: &&Segment| matches!(segment, Segment::Body { .. });
        for segment in rest.iter().take_while(text) {
            self.close(segment, body);
        }
        // Something was read that is not the prompt's next segment.
        if self.stopped || self.current.is_some() {
            return self.texts_only();
        }
        Some(self)
    }

    /// What is true of strings wherever in a prompt they stand.
    fn texts_only(mut self: Box<Self>) -> Option<Box<Self>> {
        self.hasher = None;
        self.closed.clear();
        self.bytes = 0;
        (!self.texts.is_empty()).then_some(self)
    }
}

fn block_bytes(block_tokens: usize) -> usize {
    block_tokens.max(1) * TOKEN_BYTES
}

/// Cuts a byte stream into blocks and hashes each with xxHash64, seed 0. Whole blocks inside one slice
/// are hashed in place; only blocks that straddle slices are copied.
#[derive(Debug, Clone)]
pub struct BlockHasher {
    block_bytes: usize,
    room: usize,
    partial: SmallVec<[u8; INLINE_BLOCK_BYTES]>,
}

impl BlockHasher {
    /// A hasher that stops after `max_blocks`.
    pub fn new(block_tokens: usize, max_blocks: usize) -> Self {
        Self {
            block_bytes: block_bytes(block_tokens),
            room: max_blocks,
            partial: SmallVec::new(),
        }
    }

    /// Takes more of the stream; appends the hash of every block that it completes.
    pub fn push(&mut self, mut bytes: &[u8], hashes: &mut Vec<u64>) {
        if self.room == 0 {
            return;
        }
        if !self.partial.is_empty() {
            let missing = self.block_bytes - self.partial.len();
            let (head, tail) = bytes.split_at(missing.min(bytes.len()));
            self.partial.extend_from_slice(head);
            bytes = tail;
            if self.partial.len() < self.block_bytes {
                return;
            }
            self.block_of_partial(hashes);
        }
        let mut blocks = bytes.chunks_exact(self.block_bytes);
        for block in &mut blocks {
            self.block(block, hashes);
        }
        self.partial.extend_from_slice(blocks.remainder());
    }

    /// Pushes `count` copies of one token.
    pub fn repeat(&mut self, token: [u8; TOKEN_BYTES], count: u32, hashes: &mut Vec<u64>) {
        const RUN: usize = 64;
        let mut run = [0; RUN * TOKEN_BYTES];
        for bytes in run.chunks_exact_mut(TOKEN_BYTES) {
            bytes.copy_from_slice(&token);
        }
        let mut left = count as usize;
        while left > 0 && self.room > 0 {
            let now = left.min(RUN);
            self.push(run.get(..now * TOKEN_BYTES).unwrap_or_default(), hashes);
            left -= now;
        }
    }

    /// Fills the current token up with zeros.
    pub fn align(&mut self, hashes: &mut Vec<u64>) {
        let rest = self.partial.len() % TOKEN_BYTES;
        if rest > 0 {
            self.push(&[0; TOKEN_BYTES][rest..], hashes);
        }
    }

    /// The stream ended: a partial block counts.
    pub fn finish(mut self, hashes: &mut Vec<u64>) {
        self.align(hashes);
        if !self.partial.is_empty() {
            self.block_of_partial(hashes);
        }
    }

    fn block_of_partial(&mut self, hashes: &mut Vec<u64>) {
        let block = std::mem::take(&mut self.partial);
        self.block(&block, hashes);
        self.partial = block;
        self.partial.clear();
    }

    fn block(&mut self, bytes: &[u8], hashes: &mut Vec<u64>) {
        if self.room > 0 {
            self.room -= 1;
            hashes.push(xxh64(bytes, 0));
        }
    }
}
