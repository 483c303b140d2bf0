//! `mm-embeddings-cache-producer`: which endpoints were sent which images, videos and audio clips.

use std::cell::RefCell;
use std::sync::Arc;

use serde::Deserialize;
use smallvec::SmallVec;

use super::prefix_index::{DEFAULT_BUDGET_BYTES, PrefixIndex, WalkScratch};
use crate::datalayer::{Endpoint, EndpointListener};
use crate::plugin::{Attributes, Build, Column, Maturity, ParamDoc, Plugin, PluginError};
use crate::request::InferenceRequest;
use crate::scheduling::attributes::{
    ENCODER_CACHE_MATCH, EncoderCacheMatch, MEDIA_FEATURES, MM_EMBEDDINGS_PRODUCER, MediaFeature,
    TOKEN_PRODUCER,
};
use crate::scheduling::{
    Candidate, Cycle, DataProducer, Outcome, PreRequest, ProducerError, SchedulingResult,
};
use crate::telemetry::metrics::EncoderCacheSeries;

/// Size of an endpoint's encoder cache unless configured.
const DEFAULT_CACHE_MIB: i64 = 4096;
/// What one item is taken to need there.
const ITEM_MIB: i64 = 2;
/// Distinct items of a request that are looked up and learned; more than any engine admits.
const MAX_ITEMS: usize = 256;
/// Internal column with the request's distinct items.
const ITEMS: &str = "mm-embeddings-cache-items";
/// Profile whose picks all get media: the sidecar spreads the items of a request over them.
const ENCODE_PROFILE: &str = "encode";

const MODALITIES: [&str; 3] = ["image", "video", "audio"];

/// Guesses which media each endpoint has encoded from what it was sent; a pick counts at once.
///
/// An item is a content hash, whatever the model and tenant: an encoder's output depends on neither.
/// Its size is its placeholder tokens. Each endpoint remembers its `cacheSizeInMBPerServer / 2`
/// youngest items, and all endpoints together at most what [`DEFAULT_BUDGET_BYTES`] hold.
///
/// Learned are the first pick of every profile and all picks of the profile `encode`; the reference
/// learns the primary profile only, so that with a separate encode stage it never knows the
/// endpoints that encode. Media behind fallback picks of the primary profile are not learned: the
/// proxy sends them nothing unless the first pick fails.
///
/// A request without media finds the media column unwritten and costs nothing else.
#[derive(Debug)]
pub struct MmEmbeddingsCacheProducer {
    /// Every item is a chain of its own.
    index: PrefixIndex,
    capacity: u32,
    media: Column<MediaFeature>,
    items: Column<Item>,
    matches: Column<EncoderCacheMatch>,
    series: Arc<EncoderCacheSeries<{ MODALITIES.len() }>>,
}

/// A distinct item of a request.
#[derive(Debug, Clone, Copy)]
struct Item {
    hash: u64,
    tokens: u32,
    /// Position in [`MODALITIES`].
    modality: usize,
}

/// What one candidate holds of a request.
#[derive(Debug, Clone, Copy, Default)]
struct Tally {
    items: [u32; MODALITIES.len()],
    size: u64,
}

impl Tally {
    fn add(&mut self, item: &Item) {
        if let Some(items) = self.items.get_mut(item.modality) {
            *items += 1;
        }
        self.size += u64::from(item.tokens);
    }

    fn items(&self) -> u32 {
        self.items.iter().sum()
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Settings {
    #[serde(rename = "cacheSizeInMBPerServer")]
    cache_mib: i64,
}

/// The walk, and the tallies by candidate.
#[derive(Debug, Default)]
struct Scratch {
    walk: WalkScratch,
    tallies: Vec<Tally>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl Plugin for MmEmbeddingsCacheProducer {
    const TYPE: &'static str = MM_EMBEDDINGS_PRODUCER;
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[ParamDoc {
        name: "cacheSizeInMBPerServer",
        kind: "int",
        default: "4096",
        help: "Size of an endpoint's encoder cache in MiB; one item is remembered for every 2 MiB. 0 and less mean the default.",
    }];
    const ABOUT: &'static str = "Matches media against what was sent to each endpoint.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<Self, _>()?;
        let mib = if settings.cache_mib > 0 {
            settings.cache_mib
        } else {
            DEFAULT_CACHE_MIB
        };
        Ok(Self {
            index: PrefixIndex::new(DEFAULT_BUDGET_BYTES),
            capacity: u32::try_from(mib / ITEM_MIB).unwrap_or(u32::MAX).max(1),
            media: build.keys.require(MEDIA_FEATURES, TOKEN_PRODUCER),
            items: build.keys.produce(ITEMS),
            matches: build.keys.produce(ENCODER_CACHE_MATCH),
            series: EncoderCacheSeries::registered(Self::TYPE, build.name, MODALITIES),
        })
    }
}

/// The distinct items among `media`, at most [`MAX_ITEMS`].
fn distinct(media: &[MediaFeature]) -> SmallVec<[Item; 8]> {
    let mut items: SmallVec<[Item; 8]> = SmallVec::new();
    for feature in media {
        if items.len() == MAX_ITEMS {
            break;
        }
        let modality = MODALITIES.iter().position(|m| *m == feature.modality);
        let known = items.iter().any(|item| item.hash == feature.hash);
        if let (Some(modality), false) = (modality, known) {
            items.push(Item {
                hash: feature.hash,
                tokens: feature.tokens,
                modality,
            });
        }
    }
    items
}

impl MmEmbeddingsCacheProducer {
    /// Fills `scratch.tallies`, one for each candidate.
    fn look_up(&self, items: &[Item], candidates: &[Candidate], scratch: &mut Scratch) {
        scratch.tallies.clear();
        scratch.tallies.resize(candidates.len(), Tally::default());
        for item in items {
            let found = self.index.match_chain(&[item.hash], &mut scratch.walk);
            for (tally, candidate) in scratch.tallies.iter_mut().zip(candidates) {
                if found
                    .iter()
                    .any(|f| f.endpoint == candidate.endpoint.index.0)
                {
                    tally.add(item);
                }
            }
        }
    }

    fn record(&self, total: &Tally, candidates: &[Candidate], tallies: &[Tally]) {
        self.series.queried(&total.items);
        for (tally, candidate) in tallies.iter().zip(candidates) {
            let held = tally.items();
            if held > 0 {
                let spec = &candidate.endpoint.spec;
                self.series.hit(&spec.namespace, &spec.name, &tally.items);
            }
            self.series
                .ratio(f64::from(held) / f64::from(total.items()));
        }
    }
}

impl DataProducer for MmEmbeddingsCacheProducer {
    fn produce(
        &self,
        _: &InferenceRequest,
        candidates: &[Candidate],
        attributes: &mut Attributes,
    ) -> Result<(), ProducerError> {
        let Some(media) = attributes.get(self.media) else {
            return Ok(());
        };
        let items = distinct(media);
        if items.is_empty() {
            return Ok(());
        }
        let mut total = Tally::default();
        items.iter().for_each(|item| total.add(item));
        SCRATCH.with_borrow_mut(|scratch| {
            self.look_up(&items, candidates, scratch);
            self.record(&total, candidates, &scratch.tallies);
            let found = scratch.tallies.iter().map(|tally| EncoderCacheMatch {
                matched_items: tally.items(),
                request_items: total.items(),
                matched_size: tally.size,
                request_size: total.size,
            });
            attributes.write(self.matches).extend(found);
        });
        attributes.write(self.items).extend(items);
        Ok(())
    }
}

impl PreRequest for MmEmbeddingsCacheProducer {
    fn on_pick(
        &self,
        cycle: &Cycle<'_>,
        candidates: &[Candidate],
        result: &SchedulingResult,
        _: &mut Outcome,
    ) {
        let Some(items) = cycle.attributes.get(self.items) else {
            return;
        };
        for profile in result.profiles() {
            let picks = if &*profile.profile == ENCODE_PROFILE {
                profile.picks.as_slice()
            } else {
                profile.picks.get(..1).unwrap_or_default()
            };
            let picked = picks.iter().filter_map(|&p| candidates.get(p as usize));
            for Candidate { endpoint, .. } in picked {
                for item in items {
                    let gone = || endpoint.is_removed();
                    self.index
                        .insert(endpoint.index.0, &[item.hash], 0, self.capacity, gone);
                }
            }
        }
    }
}

impl EndpointListener for MmEmbeddingsCacheProducer {
    fn added(&self, _: &Arc<Endpoint>) {}

    fn removed(&self, endpoint: &Arc<Endpoint>) {
        self.index.forget(endpoint.index.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduling::ProfilePicks;
    use crate::scheduling::test_support::{Pool, endpoint};
    use metrics_exporter_prometheus::PrometheusBuilder;

    fn feature(modality: &'static str, hash: u64, tokens: u32) -> MediaFeature {
        MediaFeature {
            prompt: 0,
            modality,
            hash,
            offset: 0,
            tokens,
        }
    }

    fn images(hashes: impl IntoIterator<Item = u64>) -> Vec<MediaFeature> {
        hashes
            .into_iter()
            .map(|h| feature("image", h, 10))
            .collect()
    }

    fn pick(profile: &str, picks: &[u32]) -> ProfilePicks {
        ProfilePicks {
            profile: profile.into(),
            picks: picks.iter().copied().collect(),
        }
    }

    /// What each endpoint holds of `media`; then `profiles` picks, the first one being primary.
    fn round(
        producer: &MmEmbeddingsCacheProducer,
        pool: &Pool,
        media: &[MediaFeature],
        profiles: &[(&str, &[u32])],
    ) -> Option<Vec<EncoderCacheMatch>> {
        let mut attributes = pool.keys.new_attributes();
        if !media.is_empty() {
            attributes.write(producer.media).extend_from_slice(media);
        }
        producer
            .produce(&pool.request, &pool.candidates, &mut attributes)
            .unwrap();
        let cycle = Cycle {
            request: &pool.request,
            attributes: &attributes,
            now: tokio::time::Instant::now(),
            rng: &pool.rng,
        };
        let mut profiles = profiles.iter().map(|(name, picks)| pick(name, picks));
        let result = SchedulingResult {
            primary: profiles.next().unwrap(),
            others: profiles.collect(),
        };
        producer.on_pick(&cycle, &pool.candidates, &result, &mut Outcome::default());
        attributes.get(producer.matches).map(<[_]>::to_vec)
    }

    fn sizes(found: Option<Vec<EncoderCacheMatch>>) -> Vec<u64> {
        found.unwrap().iter().map(|m| m.matched_size).collect()
    }

    #[test]
    fn sizes_and_items_of_what_was_sent_before_match() {
        let mut pool = Pool::new([endpoint("a"), endpoint("b")]);
        let producer: MmEmbeddingsCacheProducer = pool.plugin("{}");
        let first = [feature("image", 1, 100), feature("video", 2, 900)];
        round(&producer, &pool, &first, &[("default", &[1])]);
        // Item 1 twice counts once: 100 + 900 + 50 tokens, of which b was sent 1 and 2.
        let second = [
            feature("image", 1, 100),
            feature("video", 2, 900),
            feature("audio", 3, 50),
            feature("image", 1, 100),
        ];
        let found = |matched_items, matched_size| EncoderCacheMatch {
            matched_items,
            request_items: 3,
            matched_size,
            request_size: 1050,
        };
        let got = round(&producer, &pool, &second, &[("default", &[0])]);
        assert_eq!(got, Some(vec![found(0, 0), found(2, 1000)]));
        // The pick counts at once, and the endpoint that left is forgotten.
        producer.removed(&pool.candidates[1].endpoint);
        let got = round(&producer, &pool, &second, &[("default", &[0])]);
        assert_eq!(got, Some(vec![found(3, 1050), found(0, 0)]));
    }

    #[test]
    fn a_request_without_media_publishes_and_learns_nothing() {
        let mut pool = Pool::new([endpoint("a")]);
        let producer: MmEmbeddingsCacheProducer = pool.plugin("{}");
        assert_eq!(round(&producer, &pool, &[], &[("default", &[0])]), None);
        assert!(producer.index.is_empty());
    }

    #[test]
    fn every_stage_is_learned_and_every_encoder() {
        let mut pool = Pool::new(["d", "d2", "p", "e", "e2"].map(endpoint));
        let producer: MmEmbeddingsCacheProducer = pool.plugin("{}");
        let media = images([1]);
        let stages: [(&str, &[u32]); 3] =
            [("decode", &[0, 1]), ("encode", &[3, 4]), ("prefill", &[2])];
        round(&producer, &pool, &media, &stages);
        let got = round(&producer, &pool, &media, &[("decode", &[0])]);
        // All but the second, unused pick of the primary profile.
        assert_eq!(sizes(got), [10, 0, 10, 10, 10]);
    }

    #[test]
    fn an_endpoint_remembers_one_item_for_two_mebibytes() {
        let mut pool = Pool::new([endpoint("a"), endpoint("b")]);
        for (parameters, items) in [
            ("{}", 2048),
            (r#"{"cacheSizeInMBPerServer": 0}"#, 2048),
            (r#"{"cacheSizeInMBPerServer": -5}"#, 2048),
            (r#"{"cacheSizeInMBPerServer": 100}"#, 50),
            (r#"{"cacheSizeInMBPerServer": 1}"#, 1),
        ] {
            let producer: MmEmbeddingsCacheProducer = pool.plugin(parameters);
            assert_eq!(producer.capacity, items, "{parameters}");
        }
        let producer: MmEmbeddingsCacheProducer = pool.plugin(r#"{"cacheSizeInMBPerServer": 8}"#);
        for hash in 1..=6 {
            round(&producer, &pool, &images([hash]), &[("default", &[0])]);
        }
        // Four fit: 3 to 6, ten tokens each; b never got any.
        let got = round(&producer, &pool, &images(1..=6), &[("default", &[1])]);
        assert_eq!(sizes(got), [40, 0]);
    }

    #[test]
    fn items_past_the_bound_are_ignored() {
        let mut pool = Pool::new([endpoint("a")]);
        let producer: MmEmbeddingsCacheProducer = pool.plugin("{}");
        let got = round(&producer, &pool, &images(0..300), &[("default", &[0])]).unwrap();
        assert_eq!(got[0].request_items, 256);
        let got = round(&producer, &pool, &images([255, 256]), &[("default", &[0])]).unwrap();
        assert_eq!(got[0].matched_items, 1);
    }

    #[test]
    fn a_removed_endpoint_learns_nothing() {
        use crate::datalayer::{EndpointSpec, EndpointStore};
        let store = EndpointStore::default();
        store.replace(vec![EndpointSpec {
            name: "a".to_owned(),
            namespace: "default".to_owned(),
            address: ([10, 0, 0, 9], 8000).into(),
            labels: std::collections::BTreeMap::new(),
            rank: 0,
            details: crate::datalayer::EndpointDetails::default(),
        }]);
        let mut pool = Pool::new([endpoint("a")]);
        pool.candidates[0].endpoint = Arc::clone(&store.snapshot()[0]);
        store.replace(Vec::new());
        let producer: MmEmbeddingsCacheProducer = pool.plugin("{}");
        round(&producer, &pool, &images([1]), &[("default", &[0])]);
        assert!(producer.index.is_empty());
    }

    #[test]
    fn the_old_parameter_is_refused() {
        use crate::plugin::{DataKeys, Parameters};
        let parameters = Parameters(Some(serde_json::json!({"cacheSizeInMB": 1})));
        let built = MmEmbeddingsCacheProducer::build(&mut Build {
            name: "p",
            parameters: &parameters,
            keys: &mut DataKeys::default(),
        });
        let error = built.unwrap_err().to_string();
        assert!(error.contains("unknown field `cacheSizeInMB`"), "{error}");
    }

    #[test]
    fn lookups_are_counted_by_modality_and_pod() {
        let recorder = PrometheusBuilder::new().build_recorder();
        let handle = recorder.handle();
        metrics::with_local_recorder(&recorder, || {
            let mut pool = Pool::new([endpoint("a"), endpoint("b")]);
            let producer: MmEmbeddingsCacheProducer = pool.plugin("{}");
            let media = [
                feature("image", 1, 9),
                feature("image", 2, 9),
                feature("video", 3, 9),
            ];
            round(&producer, &pool, &media[..1], &[("default", &[1])]);
            round(&producer, &pool, &media, &[("default", &[1])]);
        });
        let text = handle.render();
        let own = r#"plugin_type="mm-embeddings-cache-producer",plugin_name="mm-embeddings-cache-producer""#;
        for line in [
            // One image, then two; the second time b holds the first one.
            format!(r#"llm_d_epp_encoder_cache_queries_total{{{own},modality="image"}} 3"#),
            format!(r#"llm_d_epp_encoder_cache_queries_total{{{own},modality="video"}} 1"#),
            format!(
                r#"llm_d_epp_encoder_cache_hits_total{{{own},pod="default/b",modality="image"}} 1"#
            ),
            // Two endpoints in two lookups: 0, 0, 0 and 1/3.
            format!("llm_d_epp_encoder_cache_hit_ratio_count{{{own}}} 4"),
        ] {
            assert!(text.contains(&line), "missing {line}\nin\n{text}");
        }
        assert!(!text.contains(r#"pod="default/a""#), "{text}");
    }
}
