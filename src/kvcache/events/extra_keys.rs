//! What besides its tokens makes a block what it is: adapter, multimodal items, salt, embeddings.
//!
//! One rule for every index: an element that nobody knows is handed over as [`ExtraKey::Unknown`], so that
//! its block gets a key that no request has; a list that has not one entry for each block says nothing of
//! any, and the whole event is dropped and counted.

use super::msgpack::{Broken, Head, Reader, text};

/// One element of a block's extra keys. They carry no tags: an adapter's name and a salt are both
/// [`ExtraKey::Str`], told apart by [`super::Stored::lora_name`] and by the block's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtraKey<'a> {
    /// Cache salt, or a multimodal identifier of an engine that sends no offset.
    Str(&'a str),
    /// A multimodal item that overlaps the block.
    Mm {
        /// Content hash or user's id.
        identifier: &'a str,
        /// Item start minus block start, in tokens; negative in continuation blocks.
        offset: i64,
    },
    /// Digest of prompt embeddings.
    Bytes(&'a [u8]),
    /// Anything else, as raw msgpack.
    Unknown(&'a [u8]),
}

/// The list has not one entry for each block, or is cut short.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadExtraKeys;

impl From<Broken> for BadExtraKeys {
    fn from(Broken: Broken) -> Self {
        Self
    }
}

/// The blocks of a `BlockStored`, in the order of its hashes.
#[derive(Debug, Clone)]
pub struct ExtraKeys<'a> {
    reader: Reader<'a>,
    lora: Option<&'a str>,
}

/// Reads [`super::Stored::extra_keys`] of an event with this many hashes and this adapter. `None` when no
/// block has any, which costs a look at each byte.
pub fn extra_keys<'a>(
    raw: &'a [u8],
    hashes: usize,
    lora: Option<&'a str>,
) -> Result<Option<ExtraKeys<'a>>, BadExtraKeys> {
    const NIL: u8 = 0xc0;
    let mut reader = Reader::new(raw);
    match reader.head()? {
        Head::Array(blocks) if blocks as usize == hashes => {}
        _ => return Err(BadExtraKeys),
    }
    let blocks = reader.rest();
    if blocks.len() == hashes && blocks.iter().all(|byte| *byte == NIL) {
        return Ok(None);
    }
    Ok(Some(ExtraKeys { reader, lora }))
}

impl<'a> ExtraKeys<'a> {
    /// Hands over the next block's elements. The adapter's name is left out, since the start of a prompt's
    /// keys has it, and so is the adapter before a multimodal identifier: engines put it there (`name:`)
    /// where the adapter changes how media are read.
    pub fn next_block(&mut self, mut take: impl FnMut(ExtraKey<'a>)) -> Result<(), BadExtraKeys> {
        let start = self.reader;
        let elements = match self.reader.head()? {
            Head::Nil => 0,
            Head::Array(n) => n,
            _ => {
                self.reader = start;
                take(ExtraKey::Unknown(self.reader.raw()?));
                0
            }
        };
        let mut lora = self.lora;
        for _ in 0..elements {
            match key(&mut self.reader)? {
                ExtraKey::Str(text) if lora == Some(text) => lora = None,
                ExtraKey::Mm { identifier, offset } => take(ExtraKey::Mm {
                    identifier: without_adapter(identifier, self.lora),
                    offset,
                }),
                key => take(key),
            }
        }
        Ok(())
    }
}

/// A multimodal identifier without the adapter that engines may put before it.
pub fn without_adapter<'a>(identifier: &'a str, lora: Option<&str>) -> &'a str {
    let adapter = lora.filter(|name| !name.is_empty());
    let rest = adapter.and_then(|name| identifier.strip_prefix(name)?.strip_prefix(':'));
    rest.unwrap_or(identifier)
}

fn key<'a>(reader: &mut Reader<'a>) -> Result<ExtraKey<'a>, Broken> {
    let start = *reader;
    let known = match reader.head()? {
        head @ Head::Str(_) => text(head).map(ExtraKey::Str),
        Head::Bin(bytes) => Some(ExtraKey::Bytes(bytes)),
        Head::Array(2) => item(reader)?,
        _ => None,
    };
    if let Some(known) = known {
        return Ok(known);
    }
    *reader = start;
    reader.raw().map(ExtraKey::Unknown)
}

fn item<'a>(reader: &mut Reader<'a>) -> Result<Option<ExtraKey<'a>>, Broken> {
    let (identifier, offset) = (reader.head()?, reader.head()?);
    let offset = match offset {
        Head::Uint(n) => i64::try_from(n).ok(),
        Head::Negative(n) => Some(n),
        _ => None,
    };
    let identifier = text(identifier);
    Ok(identifier
        .zip(offset)
        .map(|(identifier, offset)| ExtraKey::Mm { identifier, offset }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks<'a>(
        raw: &'a [u8],
        hashes: usize,
        lora: Option<&'a str>,
    ) -> Result<Vec<Vec<ExtraKey<'a>>>, BadExtraKeys> {
        let Some(mut keys) = extra_keys(raw, hashes, lora)? else {
            return Ok(vec![Vec::new(); hashes]);
        };
        let mut blocks = Vec::new();
        for _ in 0..hashes {
            let mut block = Vec::new();
            keys.next_block(|key| block.push(key))?;
            blocks.push(block);
        }
        Ok(blocks)
    }

    fn mm(identifier: &str, offset: i64) -> ExtraKey<'_> {
        ExtraKey::Mm { identifier, offset }
    }

    #[test]
    fn blocks_keep_their_places_and_odd_elements_are_unknown() {
        // [nil, ["s", ["m", -3], bin 0xff, 5, ["m"], {"a": [1]}, nil, ["m", "n"]], "x", ["t"]]
        let raw = [
            0x94, 0xc0, 0x98, 0xa1, b's', 0x92, 0xa1, b'm', 0xfd, 0xc4, 1, 0xff, 5, 0x91, 0xa1,
            b'm', 0x81, 0xa1, b'a', 0x91, 1, 0xc0, 0x92, 0xa1, b'm', 0xa1, b'n', 0xa1, b'x', 0x91,
            0xa1, b't',
        ];
        assert_eq!(
            blocks(&raw, 4, None).unwrap(),
            [
                vec![],
                vec![
                    ExtraKey::Str("s"),
                    mm("m", -3),
                    ExtraKey::Bytes(&[0xff]),
                    ExtraKey::Unknown(&[5]),
                    ExtraKey::Unknown(&[0x91, 0xa1, b'm']),
                    ExtraKey::Unknown(&[0x81, 0xa1, b'a', 0x91, 1]),
                    ExtraKey::Unknown(&[0xc0]),
                    ExtraKey::Unknown(&[0x92, 0xa1, b'm', 0xa1, b'n']),
                ],
                vec![ExtraKey::Unknown(&[0xa1, b'x'])],
                vec![ExtraKey::Str("t")],
            ]
        );
    }

    #[test]
    fn a_list_of_another_length_is_refused() {
        let two_nil = [0x92, 0xc0, 0xc0];
        assert!(extra_keys(&two_nil, 2, None).unwrap().is_none());
        for hashes in [0, 1, 3] {
            assert!(extra_keys(&two_nil, hashes, None).is_err(), "{hashes}");
        }
        for none in [&[0xc0][..], &[0x81, 0xc0, 0xc0], &[5], b""] {
            assert!(extra_keys(none, 1, None).is_err(), "{none:?}");
        }
    }

    #[test]
    fn the_adapter_is_left_out_wherever_engines_put_it() {
        // [["lora-1", "tenant"], ["lora-1", ["lora-1:abc", 7]], ["lora-1", "lora-1"]]
        let raw = b"\x93\x92\xa6lora-1\xa6tenant\x92\xa6lora-1\x92\xaalora-1:abc\x07\x92\xa6lora-1\xa6lora-1";
        assert_eq!(
            blocks(raw, 3, Some("lora-1")).unwrap(),
            [
                vec![ExtraKey::Str("tenant")],
                vec![mm("abc", 7)],
                vec![ExtraKey::Str("lora-1")],
            ]
        );
        let base = blocks(raw, 3, None).unwrap();
        assert_eq!(base[1], [ExtraKey::Str("lora-1"), mm("lora-1:abc", 7)]);
        assert_eq!(without_adapter("lora-1abc", Some("lora-1")), "lora-1abc");
        assert_eq!(without_adapter(":abc", Some("")), ":abc");
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
            assert_eq!(blocks(raw, 1, None).unwrap(), [[mm("a", offset)]]);
        }
    }

    #[test]
    fn what_ends_early_is_an_error() {
        let raw = b"\x91\x93\xa6tenant\x92\xa1a\x07\xc4\x02de";
        assert!(blocks(raw, 1, None).is_ok());
        for cut in 0..raw.len() {
            assert_eq!(blocks(&raw[..cut], 1, None), Err(BadExtraKeys), "{cut}");
        }
        let huge = b"\x91\xdd\xff\xff\xff\xff\xdd\xff\xff\xff\xff";
        assert_eq!(blocks(huge, 1, None), Err(BadExtraKeys));
    }
}
