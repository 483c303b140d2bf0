//! What besides its tokens makes a block what it is: adapter, multimodal items, salt, embeddings.

use super::msgpack::{Head, Reader, text};

/// One element of a block's extra keys. They carry no tags: an adapter's name and a salt are both
/// [`ExtraKey::Str`], told apart by [`super::Stored::lora_name`] and by the block's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtraKey<'a> {
    /// Adapter name, cache salt, or a multimodal identifier of an engine that sends no offset.
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
}

/// The blocks of a `BlockStored`, in the order of its hashes; each item iterates over the keys of one
/// block and is empty where the engine sent nil.
#[derive(Debug, Clone)]
pub struct ExtraKeys<'a> {
    reader: Reader<'a>,
    blocks: u32,
}

/// Reads [`super::Stored::extra_keys`]. Never fails: what has an unexpected shape is left out, blocks
/// keep their places.
pub fn extra_keys(raw: &[u8]) -> ExtraKeys<'_> {
    let mut reader = Reader::new(raw);
    let blocks = match reader.head() {
        Ok(Head::Array(n)) => n,
        _ => 0,
    };
    ExtraKeys { reader, blocks }
}

impl ExtraKeys<'_> {
    /// Whether no block has any extra key. O(blocks), a byte each.
    pub fn all_nil(&self) -> bool {
        self.reader.rest().iter().all(|b| *b == 0xc0)
    }
}

impl<'a> Iterator for ExtraKeys<'a> {
    type Item = BlockKeys<'a>;

    fn next(&mut self) -> Option<BlockKeys<'a>> {
        self.blocks = self.blocks.checked_sub(1)?;
        let mut reader = Reader::new(self.reader.raw().ok()?);
        let keys = match reader.head() {
            Ok(Head::Array(n)) => n,
            _ => 0,
        };
        Some(BlockKeys { reader, keys })
    }
}

/// The extra keys of one block.
#[derive(Debug, Clone)]
pub struct BlockKeys<'a> {
    reader: Reader<'a>,
    keys: u32,
}

impl<'a> Iterator for BlockKeys<'a> {
    type Item = ExtraKey<'a>;

    fn next(&mut self) -> Option<ExtraKey<'a>> {
        while let Some(keys) = self.keys.checked_sub(1) {
            self.keys = keys;
            if let Some(key) = key(self.reader.raw().ok()?) {
                return Some(key);
            }
        }
        None
    }
}

fn key(raw: &[u8]) -> Option<ExtraKey<'_>> {
    let mut reader = Reader::new(raw);
    match reader.head().ok()? {
        head @ Head::Str(_) => text(head).map(ExtraKey::Str),
        Head::Bin(bytes) => Some(ExtraKey::Bytes(bytes)),
        Head::Array(2) => item(&mut reader),
        _ => None,
    }
}

fn item<'a>(reader: &mut Reader<'a>) -> Option<ExtraKey<'a>> {
    let identifier = text(reader.head().ok()?)?;
    let offset = match reader.head().ok()? {
        Head::Uint(n) => i64::try_from(n).ok()?,
        Head::Negative(n) => n,
        _ => return None,
    };
    Some(ExtraKey::Mm { identifier, offset })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_keep_their_places_and_odd_elements_are_left_out() {
        // [nil, ["s", ["m", -3], bin 0xff, 5, ["m"]], "x", ["t"]]
        let raw = [
            0x94, 0xc0, 0x95, 0xa1, b's', 0x92, 0xa1, b'm', 0xfd, 0xc4, 1, 0xff, 5, 0x91, 0xa1,
            b'm', 0xa1, b'x', 0x91, 0xa1, b't',
        ];
        let blocks: Vec<Vec<_>> = extra_keys(&raw).map(Iterator::collect).collect();
        assert_eq!(
            blocks,
            [
                vec![],
                vec![
                    ExtraKey::Str("s"),
                    ExtraKey::Mm {
                        identifier: "m",
                        offset: -3
                    },
                    ExtraKey::Bytes(&[0xff]),
                ],
                vec![],
                vec![ExtraKey::Str("t")],
            ]
        );
        assert!(!extra_keys(&raw).all_nil());
        assert!(extra_keys(&[0x92, 0xc0, 0xc0]).all_nil());
    }
}
