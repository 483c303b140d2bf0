//! `extra_keys` of a store event, read from its msgpack as far as block keys need it.

use crate::kvcache::block::Extras;

/// Nested containers inside an element nobody knows are skipped to this depth.
const MAX_DEPTH: u32 = 8;

/// The message ended early or holds a byte msgpack does not define.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Malformed;

/// Reads the lists of an event's blocks one after the other.
#[derive(Debug)]
pub(super) struct ExtraKeys<'a> {
    bytes: &'a [u8],
    left: u64,
}

/// Head of one msgpack value; the content of strings is already taken.
enum Value<'a> {
    Nil,
    Int(i64),
    Text(&'a [u8]),
    Binary(&'a [u8]),
    Array(u64),
    Map(u64),
    Other,
}

impl<'a> ExtraKeys<'a> {
    /// Starts at the outer array; nil and anything else that is no array mean no extras.
    pub(super) fn new(raw: &'a [u8]) -> Result<Self, Malformed> {
        let mut keys = Self {
            bytes: raw,
            left: 0,
        };
        if let Value::Array(n) = keys.value()? {
            keys.left = n;
        }
        Ok(keys)
    }

    /// Adds the next block's list to `extras`. The adapter's name is left out because the start key has
    /// it; another bare string is the salt where `first` says the block begins a prompt.
    pub(super) fn next_block(
        &mut self,
        lora: Option<&str>,
        first: bool,
        extras: &mut Extras,
    ) -> Result<(), Malformed> {
        if self.left == 0 {
            return Ok(());
        }
        self.left -= 1;
        let elements = match self.value()? {
            Value::Array(n) => n,
            Value::Map(n) => {
                self.skip(n.saturating_mul(2), MAX_DEPTH)?;
                0
            }
            _ => 0,
        };
        let mut lora = lora.map(str::as_bytes);
        for _ in 0..elements {
            match self.value()? {
                Value::Text(text) if lora == Some(text) => lora = None,
                Value::Text(text) => {
                    let text = str::from_utf8(text).map_err(|_| Malformed)?;
                    if first {
                        extras.salt(text);
                    } else {
                        extras.bare(text);
                    }
                }
                Value::Binary(digest) => extras.embeddings(digest),
                Value::Array(n) => self.media(n, extras)?,
                Value::Map(n) => self.skip(n.saturating_mul(2), MAX_DEPTH)?,
                Value::Nil | Value::Int(_) | Value::Other => {}
            }
        }
        Ok(())
    }

    /// `[identifier, offset]`; of any other array a bare mark of its first string stays.
    fn media(&mut self, elements: u64, extras: &mut Extras) -> Result<(), Malformed> {
        let mut identifier = None;
        let mut offset = None;
        for n in 0..elements {
            match (n, self.value()?) {
                (0, Value::Text(text)) => {
                    identifier = Some(str::from_utf8(text).map_err(|_| Malformed)?);
                }
                (1, Value::Int(number)) => offset = Some(number),
                (_, Value::Array(n)) => self.skip(n, MAX_DEPTH)?,
                (_, Value::Map(n)) => self.skip(n.saturating_mul(2), MAX_DEPTH)?,
                _ => {}
            }
        }
        match (identifier, offset) {
            (Some(identifier), Some(offset)) => extras.media(identifier, offset),
            (Some(identifier), None) => extras.bare(identifier),
            (None, _) => {}
        }
        Ok(())
    }

    fn skip(&mut self, values: u64, depth: u32) -> Result<(), Malformed> {
        let depth = depth.checked_sub(1).ok_or(Malformed)?;
        for _ in 0..values {
            match self.value()? {
                Value::Array(n) => self.skip(n, depth)?,
                Value::Map(n) => self.skip(n.saturating_mul(2), depth)?,
                _ => {}
            }
        }
        Ok(())
    }

    fn value(&mut self) -> Result<Value<'a>, Malformed> {
        let [tag] = *self.take(1)? else {
            return Err(Malformed);
        };
        Ok(match tag {
            0x00..=0x7f => Value::Int(i64::from(tag)),
            0xe0..=0xff => Value::Int(i64::from(tag.cast_signed())),
            0x80..=0x8f => Value::Map(u64::from(tag & 0x0f)),
            0x90..=0x9f => Value::Array(u64::from(tag & 0x0f)),
            0xa0..=0xbf => Value::Text(self.take(u64::from(tag & 0x1f))?),
            0xc0 => Value::Nil,
            0xc2 | 0xc3 => Value::Other,
            0xc4..=0xc6 => {
                let n = self.number(1 << (tag - 0xc4))?;
                Value::Binary(self.take(n)?)
            }
            0xc7..=0xc9 => {
                let n = self.number(1 << (tag - 0xc7))?;
                self.take(n.saturating_add(1))?;
                Value::Other
            }
            0xca => self.other(4)?,
            0xcb => self.other(8)?,
            0xcc..=0xcf => Value::Int(self.number(1 << (tag - 0xcc))?.cast_signed()),
            0xd0..=0xd3 => {
                let width = 1 << (tag - 0xd0);
                let unused = 64 - 8 * u32::from(width);
                Value::Int((self.number(width)? << unused).cast_signed() >> unused)
            }
            0xd4..=0xd8 => self.other(1 + (1 << (tag - 0xd4)))?,
            0xd9..=0xdb => {
                let n = self.number(1 << (tag - 0xd9))?;
                Value::Text(self.take(n)?)
            }
            0xdc | 0xdd => Value::Array(self.number(2 << (tag - 0xdc))?),
            0xde | 0xdf => Value::Map(self.number(2 << (tag - 0xde))?),
            0xc1 => return Err(Malformed),
        })
    }

    fn other(&mut self, bytes: u64) -> Result<Value<'a>, Malformed> {
        self.take(bytes).map(|_| Value::Other)
    }

    /// Unsigned big-endian number of `width` bytes, at most 8.
    fn number(&mut self, width: u8) -> Result<u64, Malformed> {
        let bytes = self.take(u64::from(width))?;
        Ok(bytes.iter().fold(0, |n, &byte| n << 8 | u64::from(byte)))
    }

    fn take(&mut self, n: u64) -> Result<&'a [u8], Malformed> {
        let n = usize::try_from(n).map_err(|_| Malformed)?;
        let (taken, rest) = self.bytes.split_at_checked(n).ok_or(Malformed)?;
        self.bytes = rest;
        Ok(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvcache::block::{BlockHasher, BlockKey};

    /// What `extras` makes of an empty block.
    fn key(extras: impl FnMut(usize, &mut Extras)) -> BlockKey {
        let mut out = Vec::new();
        BlockHasher::with_seed(1).extend(BlockKey(0), &[0], 1, &mut out, extras);
        out[0]
    }

    #[test]
    fn adapter_is_dropped_and_salt_found() {
        // [["lora-1", "tenant"], ["lora-1"], nil]
        let raw = b"\x93\x92\xa6lora-1\xa6tenant\x91\xa6lora-1\xc0";
        let mut keys = ExtraKeys::new(raw).unwrap();
        let mut extras = Extras::default();
        let salted = key(|_, extras| keys.next_block(Some("lora-1"), true, extras).unwrap());
        assert_eq!(salted, key(|_, extras| extras.salt("tenant")));
        for _ in 0..3 {
            keys.next_block(Some("lora-1"), false, &mut extras).unwrap();
            assert!(extras.is_empty());
        }
    }

    #[test]
    fn media_offsets_of_every_width_and_sign() {
        for (raw, offset) in [
            (&b"\x91\x91\x92\xa1a\x07"[..], 7),
            (b"\x91\x91\x92\xa1a\xff", -1),
            (b"\x91\x91\x92\xa1a\xd0\x80", -128),
            (b"\x91\x91\x92\xd9\x01a\xd1\xff\x00", -256),
            (b"\x91\x91\x92\xa1a\xcd\x01\x00", 256),
            (b"\x91\x91\x92\xa1a\xd3\xff\xff\xff\xff\xff\xff\xff\xfe", -2),
        ] {
            let mut keys = ExtraKeys::new(raw).unwrap();
            let read = key(|_, extras| keys.next_block(None, false, extras).unwrap());
            assert_eq!(read, key(|_, extras| extras.media("a", offset)), "{offset}");
        }
    }

    #[test]
    fn what_ends_early_is_an_error() {
        let raw = b"\x91\x93\xa6tenant\x92\xa1a\x07\xc4\x02de";
        for cut in 0..raw.len() {
            let read = ExtraKeys::new(&raw[..cut])
                .and_then(|mut keys| keys.next_block(None, true, &mut Extras::default()));
            assert_eq!(read, Err(Malformed), "{cut}");
        }
        let huge = b"\xdd\xff\xff\xff\xff\xdd\xff\xff\xff\xff";
        let mut keys = ExtraKeys::new(huge).unwrap();
        let read = keys.next_block(None, true, &mut Extras::default());
        assert_eq!(read, Err(Malformed));
    }
}
