//! `mm-embeddings-cache-scorer`

use serde::Deserialize;

use crate::plugin::{Build, Column, Maturity, ParamDoc, Plugin, PluginError};
use crate::scheduling::attributes::{
    ENCODER_CACHE_MATCH, EncoderCacheMatch, MM_EMBEDDINGS_PRODUCER, producer_or,
};
use crate::scheduling::{Candidates, Cycle, Scorer};

/// Prefers endpoints that have encoded more of the request's media before.
///
/// Score: size of the matched items / size of the request's distinct items, in placeholder tokens; 0
/// without media.
/// Input: the encoder cache column of the named producer, computed for this request.
#[derive(Debug)]
pub struct MmEmbeddingsCacheScorer {
    matches: Column<EncoderCacheMatch>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    producer_name: String,
}

impl Plugin for MmEmbeddingsCacheScorer {
    const TYPE: &'static str = "mm-embeddings-cache-scorer";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[ParamDoc {
        name: "producerName",
        kind: "string",
        default: "mm-embeddings-cache-producer",
        help: "Instance that says which media each endpoint has encoded.",
    }];
    const ABOUT: &'static str = "Prefers endpoints that have encoded the request's media before.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<Self, _>()?;
        let producer = producer_or(&settings.producer_name, MM_EMBEDDINGS_PRODUCER);
        Ok(Self {
            matches: build.keys.require(ENCODER_CACHE_MATCH, producer),
        })
    }
}

impl Scorer for MmEmbeddingsCacheScorer {
    fn score(&self, cycle: &Cycle<'_>, candidates: Candidates<'_>, scores: &mut [f64]) {
        let Some(matches) = cycle.attributes.get(self.matches) else {
            return;
        };
        for (score, (position, _)) in scores.iter_mut().zip(candidates.iter()) {
            *score = matches.get(position).map_or(0.0, EncoderCacheMatch::ratio);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduling::test_support::{Pool, endpoint};

    fn scores(pool: &Pool, scorer: &MmEmbeddingsCacheScorer, sizes: &[(u64, u64)]) -> Vec<f64> {
        let mut attributes = pool.keys.new_attributes();
        if !sizes.is_empty() {
            let found = sizes.iter().map(|&(matched_size, request_size)| {
                let items = EncoderCacheMatch::default();
                EncoderCacheMatch {
                    matched_size,
                    request_size,
                    ..items
                }
            });
            attributes.write(scorer.matches).extend(found);
        }
        let cycle = Cycle {
            request: &pool.request,
            attributes: &attributes,
            now: tokio::time::Instant::now(),
            rng: &pool.rng,
        };
        // The last candidate was filtered out; positions still address the column.
        let mut scores = vec![0.0; 2];
        let selected = Candidates::new(&pool.candidates, &[1, 0]);
        scorer.score(&cycle, selected, &mut scores);
        scores
    }

    #[test]
    fn the_score_is_the_matched_share_by_size() {
        let mut pool = Pool::new(["a", "b", "c"].map(endpoint));
        let scorer: MmEmbeddingsCacheScorer = pool.plugin("{}");
        // b holds 900 of 1000 tokens, a 100.
        let sizes = [(100, 1000), (900, 1000), (1000, 1000)];
        assert_eq!(scores(&pool, &scorer, &sizes), [0.9, 0.1]);
    }

    #[test]
    fn a_request_without_media_scores_nothing() {
        let mut pool = Pool::new(["a", "b"].map(endpoint));
        let scorer: MmEmbeddingsCacheScorer = pool.plugin(r#"{"producerName": "other"}"#);
        assert_eq!(scores(&pool, &scorer, &[]), [0.0, 0.0]);
        assert_eq!(scores(&pool, &scorer, &[(0, 0), (0, 0)]), [0.0, 0.0]);
    }
}
