//! How much of a prompt with media is known without the engine that reads the media.
//!
//! A template puts a placeholder where a medium is, and the engine's processor makes of it as many tokens
//! as the medium needs. Text and tokens before the first placeholder do not depend on that. Where it
//! begins is found by rendering the chat twice, with the media and with a text in their place: as far as
//! both agree there is none.

use serde_json::Value;

/// Bytes that two texts have in common at their beginning, whole characters.
pub(super) fn common_bytes(one: &str, other: &str) -> usize {
    let pairs = one.chars().zip(other.chars());
    let common = pairs.take_while(|(a, b)| a == b);
    common.map(|(c, _)| c.len_utf8()).sum()
}

/// How many of `ids`, those of a prompt, are the engine's for certain. `known` are the ids of its text up
/// to the first placeholder, which begins with the next of `ids` if `placeholder`, else with something
/// that is not in them. `is_added` tells tokens that are found before the text is split into words, and
/// `media` are ids that belong to media wherever they stand.
pub(super) fn exact_ids(
    ids: &[u32],
    known: &[u32],
    placeholder: bool,
    is_added: impl Fn(u32) -> bool,
    media: &[u32],
) -> usize {
    let common = ids.iter().zip(known).take_while(|(a, b)| a == b).count();
    // A placeholder made of plain characters, and one not seen, may be joined with what is before it.
    let next = ids.get(known.len()).copied().filter(|_| placeholder);
    let apart = common == known.len() && next.is_some_and(is_added);
    let exact = if apart {
        common
    } else {
        common.saturating_sub(1)
    };
    // Where a client writes a placeholder itself, the engine may take that for the medium's place.
    let own = ids.iter().take(exact).position(|id| media.contains(id));
    own.unwrap_or(exact)
}

/// Ids that `config.json` names as a medium's: `image_token_id`, `vision_start_token_id`,
/// `audio_token_index` and the like, in it and in the parts of a composed model.
pub(super) fn ids_of(config: &Value) -> Vec<u32> {
    const SENSES: [&str; 7] = ["image", "video", "audio", "vision", "media", "boi", "eoi"];
    const PARTS: [&str; 2] = ["thinker_config", "text_config"];
    let entries = config.as_object().into_iter().flatten();
    let own = entries.filter_map(|(name, value)| {
        let names_id = name.ends_with("token_id") || name.ends_with("token_index");
        let of_medium = SENSES.iter().any(|sense| name.contains(sense));
        let id = value.as_u64().filter(|_| names_id && of_medium)?;
        u32::try_from(id).ok()
    });
    let parts = PARTS.iter().map(|part| &config[*part]);
    let inner = parts.filter(|part| part.is_object()).flat_map(ids_of);
    own.chain(inner).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn texts_agree_in_whole_characters() {
        // U+00E9 and U+00E8 share their first byte.
        assert_eq!(common_bytes("a\u{e9}b", "a\u{e8}b"), 1);
        assert_eq!(common_bytes("same", "same"), 4);
        assert_eq!(common_bytes("", "a"), 0);
    }

    #[test]
    fn ids_before_a_placeholder_are_exact_and_the_last_one_only_if_nothing_can_join_it() {
        let exact = |ids: &[u32], known: &[u32], placeholder| {
            exact_ids(ids, known, placeholder, |id| id >= 100, &[])
        };
        // 100 is a token of its own.
        assert_eq!(exact(&[1, 2, 3, 100, 4], &[1, 2, 3], true), 3);
        // Plain characters: the last token before them may become another.
        assert_eq!(exact(&[1, 2, 3, 9, 4], &[1, 2, 3], true), 2);
        // It became another.
        assert_eq!(exact(&[1, 2, 7, 4], &[1, 2, 3], true), 1);
        // Not in the prompt.
        assert_eq!(exact(&[1, 2, 3, 100, 4], &[1, 2, 3], false), 2);
        assert_eq!(exact(&[100], &[], true), 0);
        assert_eq!(exact(&[9], &[], false), 0);
    }

    #[test]
    fn a_placeholder_in_the_clients_text_ends_what_is_exact() {
        let ids = [1, 2, 50, 3, 100, 4];
        assert_eq!(exact_ids(&ids, &ids[..4], true, |id| id >= 50, &[50]), 2);
    }

    #[test]
    fn ids_of_media_are_read_from_every_published_spelling() {
        let mut ids = ids_of(&json!({
            "image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7,
            "audio_token_index": 8, "boi_token_index": 9, "bos_token_id": 1, "pad_token_id": null,
            "image_size": 448, "thinker_config": {"audio_token_id": 10},
        }));
        ids.sort_unstable();
        assert_eq!(ids, [5, 6, 7, 8, 9, 10]);
        assert_eq!(ids_of(&serde_json::Value::Null), [0; 0]);
    }
}
