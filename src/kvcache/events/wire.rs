//! Payload bytes to a [`Batch`]: both encodings of events, old and new, of vLLM, SGLang, TensorRT-LLM
//! and the llm-d simulator.
//!
//! A payload that is not well-formed is refused whole and nothing of it is applied. An event of an
//! unknown kind or with a wrong field is left out and counted; its neighbours stay.

use std::ops::Range;

pub use super::extra_keys::{BadExtraKeys, ExtraKey, ExtraKeys, extra_keys, without_adapter};
use super::msgpack::{Broken, Head, Reader, text};
use super::{Batch, Cleared, Event, Removed, Stored};

/// Events accepted in one batch. An engine step evicts and stores as many blocks as it computes
/// (thousands at most); the limit bounds memory, since an event takes ten times its bytes decoded.
pub const MAX_EVENTS: usize = 1 << 16;

/// Skipped events whose place is remembered; all are counted.
pub const MAX_SKIPPED_PLACES: usize = 64;

/// Elements each vector of a [`Scratch`] keeps between batches. A long prefill is 1 Mi tokens.
const KEPT_ELEMENTS: usize = 1 << 20;

/// Why a payload was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Cut short, not msgpack, or bytes follow the batch.
    #[error("payload is not one well-formed msgpack value")]
    Malformed,
    /// Well-formed, but not `[ts, events, rank]` nor the map of these.
    #[error("payload is not an event batch")]
    NotABatch,
    /// More than [`MAX_EVENTS`].
    #[error("batch has more than {MAX_EVENTS} events")]
    TooManyEvents,
}

impl From<Broken> for WireError {
    fn from(Broken: Broken) -> Self {
        Self::Malformed
    }
}

/// Why an event was left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SkipReason {
    /// The tag is none we know.
    UnknownTag,
    /// No tag, or a required field is missing or of the wrong type.
    Malformed,
}

/// Where an event was left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Skipped {
    /// Position among all events of the batch.
    pub index: u32,
    /// Why.
    pub reason: SkipReason,
}

/// What a batch held.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Decoded {
    /// Events handed over.
    pub events: usize,
    /// Events with an unknown tag.
    pub unknown: usize,
    /// Malformed events.
    pub malformed: usize,
}

/// Memory that decoding reuses: after the largest batch so far nothing is allocated.
#[derive(Debug, Default)]
pub struct Scratch {
    hashes: Vec<u64>,
    tokens: Vec<u32>,
    spans: Vec<Spans>,
    /// Empty between batches; only its allocation is kept.
    events: Vec<Event<'static>>,
    skipped: Vec<Skipped>,
}

/// Which part of the scratch vectors is an event's.
#[derive(Debug, Clone, Default)]
struct Spans {
    hashes: Range<usize>,
    tokens: Range<usize>,
}

impl Scratch {
    /// Decodes one payload and hands the batch to `apply`, once, or refuses it.
    ///
    /// Cost: O(bytes). Memory: at most one hash and one token for each byte of payload.
    pub fn decode(
        &mut self,
        payload: &[u8],
        apply: impl FnOnce(&Batch<'_>),
    ) -> Result<Decoded, WireError> {
        self.clear();
        let mut events = recycle(std::mem::take(&mut self.events));
        let decoded = self.scan(payload, &mut events).map(|frame| {
            for (event, span) in events.iter_mut().zip(&self.spans) {
                let hashes = self.hashes.get(span.hashes.clone()).unwrap_or_default();
                match event {
                    Event::Stored(stored) => {
                        stored.hashes = hashes;
                        stored.tokens = self.tokens.get(span.tokens.clone()).unwrap_or_default();
                    }
                    Event::Removed(removed) => removed.hashes = hashes,
                    Event::Cleared(_) => {}
                }
            }
            apply(&Batch {
                ts: frame.ts,
                data_parallel_rank: frame.rank,
                events: &events,
            });
            Decoded {
                events: events.len(),
                ..frame.decoded
            }
        });
        self.events = recycle(events);
        decoded
    }

    /// Events the last [`Scratch::decode`] left out, the first [`MAX_SKIPPED_PLACES`] of them.
    pub fn skipped(&self) -> &[Skipped] {
        &self.skipped
    }

    fn clear(&mut self) {
        self.hashes.clear();
        self.tokens.clear();
        self.spans.clear();
        self.skipped.clear();
        self.hashes.shrink_to(KEPT_ELEMENTS);
        self.tokens.shrink_to(KEPT_ELEMENTS);
    }

    fn scan<'a>(
        &mut self,
        payload: &'a [u8],
        events: &mut Vec<Event<'a>>,
    ) -> Result<Frame, WireError> {
        let mut reader = Reader::new(payload);
        let mut parts = Parts::default();
        match reader.head()? {
            Head::Array(n) => {
                for i in 0..n {
                    let part = [Part::Ts, Part::Events, Part::Rank].get(i as usize);
                    self.part(&mut reader, part.copied(), &mut parts, events)?;
                }
            }
            Head::Map(n) => {
                for _ in 0..n {
                    let part = match reader.value()?.0 {
                        Head::Str(b"ts") => Some(Part::Ts),
                        Head::Str(b"events") => Some(Part::Events),
                        Head::Str(b"data_parallel_rank") => Some(Part::Rank),
                        _ => None,
                    };
                    self.part(&mut reader, part, &mut parts, events)?;
                }
            }
            _ => return Err(WireError::NotABatch),
        }
        if !reader.rest().is_empty() {
            return Err(WireError::Malformed);
        }
        let (Some(ts), Some(decoded)) = (parts.ts, parts.decoded) else {
            return Err(WireError::NotABatch);
        };
        Ok(Frame {
            ts,
            rank: parts.rank,
            decoded,
        })
    }

    fn part<'a>(
        &mut self,
        reader: &mut Reader<'a>,
        part: Option<Part>,
        parts: &mut Parts,
        events: &mut Vec<Event<'a>>,
    ) -> Result<(), WireError> {
        match part {
            // A second list would mix its events with those of the first.
            Some(Part::Events) if parts.decoded.is_some() => return Err(WireError::NotABatch),
            Some(Part::Events) => parts.decoded = Some(self.scan_events(reader, events)?),
            Some(Part::Ts) => parts.ts = float(reader.value()?.0),
            Some(Part::Rank) => parts.rank = small(reader.value()?.0),
            None => reader.skip()?,
        }
        Ok(())
    }

    /// Reads the list of events and stands behind it.
    fn scan_events<'a>(
        &mut self,
        reader: &mut Reader<'a>,
        events: &mut Vec<Event<'a>>,
    ) -> Result<Decoded, WireError> {
        let Head::Array(n) = reader.head()? else {
            return Err(WireError::NotABatch);
        };
        if n as usize > MAX_EVENTS {
            return Err(WireError::TooManyEvents);
        }
        let mut decoded = Decoded::default();
        for index in 0..n {
            let mark = (self.hashes.len(), self.tokens.len());
            let mut scan = EventScan {
                reader: *reader,
                hashes: &mut self.hashes,
                tokens: &mut self.tokens,
            };
            match scan.event()? {
                Ok((event, spans)) => {
                    *reader = scan.reader;
                    events.push(event);
                    self.spans.push(spans);
                }
                Err(reason) => {
                    reader.skip()?;
                    self.hashes.truncate(mark.0);
                    self.tokens.truncate(mark.1);
                    match reason {
                        SkipReason::UnknownTag => decoded.unknown += 1,
                        SkipReason::Malformed => decoded.malformed += 1,
                    }
                    if self.skipped.len() < MAX_SKIPPED_PLACES {
                        self.skipped.push(Skipped { index, reason });
                    }
                }
            }
        }
        Ok(decoded)
    }
}

/// The engine's clock in a payload, without decoding its events. `None` when there is none.
pub fn timestamp(payload: &[u8]) -> Option<f64> {
    float(Reader::new(batch_part(payload, 0, b"ts")?).head().ok()?)
}

/// The rank in a payload, stepping over its events. `None` when there is none.
pub fn data_parallel_rank(payload: &[u8]) -> Option<u32> {
    let raw = batch_part(payload, 2, b"data_parallel_rank")?;
    small(Reader::new(raw).head().ok()?)
}

/// One part of a batch, of the array form or the map form.
fn batch_part<'a>(payload: &'a [u8], index: u32, name: &[u8]) -> Option<&'a [u8]> {
    let mut reader = Reader::new(payload);
    match reader.head().ok()? {
        Head::Array(n) if n > index => {
            for _ in 0..index {
                reader.skip().ok()?;
            }
            reader.raw().ok()
        }
        Head::Map(n) => {
            for _ in 0..n {
                let key = Reader::new(reader.raw().ok()?).head().ok()?;
                let value = reader.raw().ok()?;
                if key == Head::Str(name) {
                    return Some(value);
                }
            }
            None
        }
        _ => None,
    }
}

/// Turns an event vector into an empty one for another lifetime, with the same allocation.
#[expect(
    clippy::unnecessary_filter_map,
    reason = "a filter would keep the old lifetime"
)]
fn recycle<'b>(mut events: Vec<Event<'_>>) -> Vec<Event<'b>> {
    events.clear();
    // Collecting into a type of the same layout reuses the vector's memory.
    events.into_iter().filter_map(|_| None).collect()
}

struct Frame {
    ts: f64,
    rank: Option<u32>,
    decoded: Decoded,
}

#[derive(Clone, Copy)]
enum Part {
    Ts,
    Events,
    Rank,
}

/// The parts of a batch read so far, in whatever order they come.
#[derive(Default)]
struct Parts {
    ts: Option<f64>,
    rank: Option<u32>,
    decoded: Option<Decoded>,
}

fn float(head: Head<'_>) -> Option<f64> {
    match head {
        Head::Float(x) => Some(x),
        Head::Uint(n) => Some(n as f64),
        _ => None,
    }
}

fn small(head: Head<'_>) -> Option<u32> {
    match head {
        Head::Uint(n) => u32::try_from(n).ok(),
        _ => None,
    }
}

/// A block hash; of byte hashes the last 8 bytes, which is what engines send as an integer. (vLLM:
/// vllm/v1/core/kv_cache_utils.py)
fn hash(head: Head<'_>) -> Option<u64> {
    match head {
        Head::Uint(n) => Some(n),
        Head::Negative(n) => Some(n.cast_unsigned()),
        Head::Str(bytes) | Head::Bin(bytes) if !bytes.is_empty() => {
            let tail = bytes.get(bytes.len().saturating_sub(8)..)?;
            Some(tail.iter().fold(0, |n, b| n << 8 | u64::from(*b)))
        }
        _ => None,
    }
}

/// A required field.
#[derive(Clone, Default)]
enum Field<T> {
    #[default]
    Absent,
    Bad,
    Is(T),
}

impl<T> Field<T> {
    fn from_option(value: Option<T>) -> Self {
        value.map_or(Self::Bad, Self::Is)
    }

    fn required(self) -> Result<T, SkipReason> {
        match self {
            Self::Is(value) => Ok(value),
            Self::Absent | Self::Bad => Err(SkipReason::Malformed),
        }
    }
}

/// Fields of any event, as far as we use them.
#[derive(Default)]
struct Fields<'a> {
    hashes: Field<Range<usize>>,
    parent: Field<Option<u64>>,
    tokens: Field<Range<usize>>,
    block_size: Field<u32>,
    lora_name: Option<&'a str>,
    medium: Option<&'a str>,
    extra_keys: Option<&'a [u8]>,
    cache_salt: Option<&'a str>,
    group: Option<u32>,
    kind: Option<&'a str>,
}

#[derive(Clone, Copy)]
enum Slot {
    Hashes,
    Parent,
    Tokens,
    BlockSize,
    Medium,
    /// vLLM: adapter name; SGLang: metadata map.
    LoraNameOrMetadata,
    LoraName,
    ExtraKeys,
    Group,
    Kind,
    Metadata,
    Ignored,
}

/// Order of the array encoding, after the tag. (vLLM: vllm/distributed/kv_events.py)
const STORED: [Slot; 10] = [
    Slot::Hashes,
    Slot::Parent,
    Slot::Tokens,
    Slot::BlockSize,
    Slot::Ignored,
    Slot::Medium,
    Slot::LoraNameOrMetadata,
    Slot::ExtraKeys,
    Slot::Group,
    Slot::Kind,
];
const REMOVED: [Slot; 3] = [Slot::Hashes, Slot::Medium, Slot::Group];

fn slot_of_key(key: &[u8]) -> Slot {
    match key {
        b"block_hashes" => Slot::Hashes,
        b"parent_block_hash" => Slot::Parent,
        b"token_ids" => Slot::Tokens,
        b"block_size" => Slot::BlockSize,
        b"medium" => Slot::Medium,
        b"lora_name" => Slot::LoraName,
        b"extra_keys" => Slot::ExtraKeys,
        b"group_idx" => Slot::Group,
        b"kv_cache_spec_kind" => Slot::Kind,
        b"metadata" => Slot::Metadata,
        _ => Slot::Ignored,
    }
}

struct EventScan<'a, 's> {
    reader: Reader<'a>,
    hashes: &'s mut Vec<u64>,
    tokens: &'s mut Vec<u32>,
}

type Scanned<'a> = Result<(Event<'a>, Spans), SkipReason>;

impl<'a> EventScan<'a, '_> {
    /// Reads one event. The outer error ends the payload, the inner one only this event; then the
    /// position is undefined.
    fn event(&mut self) -> Result<Scanned<'a>, Broken> {
        match self.reader.head()? {
            Head::Array(n) => self.array_event(n),
            Head::Map(n) => self.map_event(n),
            _ => Ok(Err(SkipReason::Malformed)),
        }
    }

    fn array_event(&mut self, n: u32) -> Result<Scanned<'a>, Broken> {
        let Some(n) = n.checked_sub(1) else {
            return Ok(Err(SkipReason::Malformed));
        };
        let Head::Str(tag) = self.reader.head()? else {
            return Ok(Err(SkipReason::Malformed));
        };
        let slots: &[Slot] = match tag {
            b"BlockStored" => &STORED,
            b"BlockRemoved" => &REMOVED,
            _ => &[],
        };
        let mut fields = Fields::default();
        for i in 0..n {
            let slot = slots.get(i as usize).copied().unwrap_or(Slot::Ignored);
            self.field(slot, &mut fields)?;
        }
        Ok(event(tag, fields))
    }

    fn map_event(&mut self, n: u32) -> Result<Scanned<'a>, Broken> {
        let mut tag = None;
        let mut fields = Fields::default();
        for _ in 0..n {
            // A key may be any value, a container too.
            match self.reader.string()? {
                Some(b"type") => tag = self.reader.string()?,
                key => self.field(key.map_or(Slot::Ignored, slot_of_key), &mut fields)?,
            }
        }
        Ok(match tag {
            Some(tag) => event(tag, fields),
            None => Err(SkipReason::Malformed),
        })
    }

    /// Reads one value into its field and stands behind it, whatever it was.
    fn field(&mut self, slot: Slot, fields: &mut Fields<'a>) -> Result<(), Broken> {
        match slot {
            Slot::Hashes => fields.hashes = self.hash_list()?,
            Slot::Tokens => fields.tokens = self.token_list()?,
            Slot::Ignored => self.reader.skip()?,
            Slot::Medium => fields.medium = self.text()?,
            Slot::LoraName => fields.lora_name = self.text()?,
            Slot::Kind => fields.kind = self.text()?,
            Slot::BlockSize => {
                fields.block_size = Field::from_option(small(self.reader.whole()?));
            }
            Slot::Group => fields.group = small(self.reader.whole()?),
            Slot::Parent => {
                fields.parent = match self.reader.whole()? {
                    // The simulator's array form writes 0 for none.
                    Head::Nil | Head::Uint(0) => Field::Is(None),
                    head => Field::from_option(hash(head).map(Some)),
                }
            }
            Slot::ExtraKeys => {
                let (head, raw) = self.reader.value()?;
                fields.extra_keys = matches!(head, Head::Array(_)).then_some(raw);
            }
            Slot::LoraNameOrMetadata | Slot::Metadata => {
                let (head, raw) = self.reader.value()?;
                match (slot, head) {
                    (Slot::LoraNameOrMetadata, Head::Str(_)) => fields.lora_name = text(head),
                    _ => fields.cache_salt = salt_of(raw),
                }
            }
        }
        Ok(())
    }

    fn text(&mut self) -> Result<Option<&'a str>, Broken> {
        let bytes = self.reader.string()?;
        Ok(bytes.and_then(|bytes| std::str::from_utf8(bytes).ok()))
    }

    fn hash_list(&mut self) -> Result<Field<Range<usize>>, Broken> {
        let before = self.reader;
        let start = self.hashes.len();
        if let Head::Array(n) = self.reader.head()? {
            self.hashes
                .reserve((n as usize).min(self.reader.rest().len()));
            let mut good = true;
            for _ in 0..n {
                let Some(hash) = hash(self.reader.head()?) else {
                    good = false;
                    break;
                };
                self.hashes.push(hash);
            }
            if good {
                return Ok(Field::Is(start..self.hashes.len()));
            }
        }
        self.hashes.truncate(start);
        self.reader = before;
        self.reader.skip()?;
        Ok(Field::Bad)
    }

    fn token_list(&mut self) -> Result<Field<Range<usize>>, Broken> {
        let before = self.reader;
        let start = self.tokens.len();
        let Head::Array(n) = self.reader.head()? else {
            self.reader = before;
            self.reader.skip()?;
            return Ok(Field::Bad);
        };
        if self.reader.u32s(n, self.tokens)? {
            return Ok(Field::Is(start..self.tokens.len()));
        }
        self.tokens.truncate(start);
        self.reader = before;
        let list = self.reader.raw()?;
        // TensorRT-LLM may name tokens by strings; such blocks have a place but no reproducible key.
        Ok(if only_ints_and_strings(list)? {
            Field::Is(start..start)
        } else {
            Field::Bad
        })
    }
}

fn only_ints_and_strings(list: &[u8]) -> Result<bool, Broken> {
    let mut reader = Reader::new(list);
    let Head::Array(n) = reader.head()? else {
        return Ok(false);
    };
    let mut strings = false;
    for _ in 0..n {
        match reader.head()? {
            Head::Str(_) => strings = true,
            Head::Uint(_) => {}
            _ => return Ok(false),
        }
    }
    Ok(strings)
}

/// `cache_salt` of SGLang's metadata map.
fn salt_of(metadata: &[u8]) -> Option<&str> {
    let mut reader = Reader::new(metadata);
    let Ok(Head::Map(n)) = reader.head() else {
        return None;
    };
    for _ in 0..n {
        let key = Reader::new(reader.raw().ok()?).head().ok()?;
        let value = Reader::new(reader.raw().ok()?).head().ok()?;
        if key == Head::Str(b"cache_salt") {
            return text(value);
        }
    }
    None
}

fn event<'a>(tag: &[u8], fields: Fields<'a>) -> Scanned<'a> {
    match tag {
        b"BlockStored" => stored(fields),
        b"BlockRemoved" => removed(fields),
        b"AllBlocksCleared" => Ok((Event::Cleared(Cleared), Spans::default())),
        _ => Err(SkipReason::UnknownTag),
    }
}

fn stored(fields: Fields<'_>) -> Scanned<'_> {
    let spans = Spans {
        hashes: fields.hashes.required()?,
        tokens: fields.tokens.required()?,
    };
    let parent = match fields.parent {
        Field::Absent => None,
        parent => parent.required()?,
    };
    let stored = Stored {
        hashes: &[],
        parent,
        tokens: &[],
        block_size: fields.block_size.required()?,
        lora_name: fields.lora_name,
        medium: fields.medium.unwrap_or_default(),
        extra_keys: fields.extra_keys,
        cache_salt: fields.cache_salt,
        group: fields.group,
        kind: fields.kind,
    };
    Ok((Event::Stored(stored), spans))
}

fn removed(fields: Fields<'_>) -> Scanned<'_> {
    let spans = Spans {
        hashes: fields.hashes.required()?,
        tokens: 0..0,
    };
    let removed = Removed {
        hashes: &[],
        medium: fields.medium.unwrap_or_default(),
        group: fields.group,
    };
    Ok((Event::Removed(removed), spans))
}

#[cfg(test)]
mod tests;
