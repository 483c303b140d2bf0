//! Block keys of one request, and what they say of an endpoint that holds some.

use crate::kvcache::block::BlockKey;
use crate::scheduling::attributes::PrefixMatch;

/// Block keys of one request for one block size, prompt after prompt.
#[derive(Debug, Default, Clone)]
pub(super) struct Keys {
    pub(super) block_size: u32,
    pub(super) blocks: Vec<BlockKey>,
    /// End of each prompt's keys.
    pub(super) ends: Vec<usize>,
    /// Blocks of the prompts, those without keys included.
    pub(super) total_blocks: usize,
    /// Every prompt has keys to its end; none has media that only its engine knows.
    pub(super) whole: bool,
}

impl Keys {
    pub(super) fn prompts(&self) -> impl Iterator<Item = &[BlockKey]> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        let ranges = starts.zip(&self.ends);
        ranges.filter_map(|(from, to)| self.blocks.get(from..*to))
    }

    /// What an endpoint matches where some blocks have no keys: if it holds all that have some, what is
    /// guessed of the rest may be there as well; else a hole ends the prefix and no guess helps.
    pub(super) fn beyond(&self, found: PrefixMatch, guess: &PrefixMatch) -> PrefixMatch {
        if self.whole || (found.cached_blocks as usize) < self.blocks.len() {
            return found;
        }
        let guessed = guess.ratio() * f64::from(found.total_blocks);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a share of a u32"
        )]
        let guessed = (guessed as u32).min(found.total_blocks);
        PrefixMatch {
            matched_blocks: found.matched_blocks.max(guessed),
            ..found
        }
    }
}

/// Full blocks of a prompt that an engine can reuse: it computes the last token in any case.
pub(super) fn usable_blocks(tokens: usize, block_size: u32) -> u64 {
    tokens.saturating_sub(1) as u64 / u64::from(block_size.max(1))
}

/// As the contract publishes it: the weighted sum, cut to whole blocks, beside the blocks as they are.
pub(super) fn exact_match(
    keys: &Keys,
    score: Option<f64>,
    held: Option<(u32, u32)>,
) -> PrefixMatch {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "at most the number of keys times a weight, and saturating"
    )]
    let matched_blocks = score.unwrap_or(0.0).max(0.0) as u32;
    PrefixMatch {
        matched_blocks,
        total_blocks: u32::try_from(keys.total_blocks).unwrap_or(u32::MAX),
        block_size_tokens: keys.block_size,
        cached_blocks: held.map_or(0, |(any, _)| any),
        host_blocks: held.map(|(_, host)| host),
    }
}
