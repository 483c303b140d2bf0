//! Extra keys of an event as parts of a block's key.

use crate::kvcache::block::Extras;
use crate::kvcache::events::wire::ExtraKey;

/// Adds one element of a block's list. A bare string is the salt where `first` says that the block begins
/// a prompt.
pub(super) fn add(key: ExtraKey<'_>, first: bool, extras: &mut Extras) {
    match key {
        ExtraKey::Str(text) if first => extras.salt(text),
        ExtraKey::Str(text) => extras.bare(text),
        ExtraKey::Mm { identifier, offset } => extras.media(identifier, offset),
        ExtraKey::Bytes(digest) => extras.embeddings(digest),
        ExtraKey::Unknown(raw) => extras.unknown(raw),
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
    fn a_string_is_the_salt_in_the_first_block_only() {
        let of = |first| key(|_, extras| add(ExtraKey::Str("s"), first, extras));
        let salted = key(|_, extras| extras.salt("s"));
        assert_eq!(of(true), salted);
        assert_ne!(of(false), salted);
    }

    #[test]
    fn an_unknown_element_makes_a_key_that_no_request_has() {
        let plain = key(|_, _| {});
        // The text "s", and the bytes of a digest, as they come on the wire.
        for raw in [&[0xa1, b's'][..], &[0xc4, 1, 0xff], &[0xc0], b"s"] {
            let unknown = key(|_, extras| add(ExtraKey::Unknown(raw), true, extras));
            for known in [
                plain,
                key(|_, extras| extras.salt("s")),
                key(|_, extras| extras.media("s", 0)),
                key(|_, extras| extras.embeddings(&[0xff])),
                key(|_, extras| extras.embeddings(raw)),
            ] {
                assert_ne!(unknown, known, "{raw:?}");
            }
        }
    }
}
