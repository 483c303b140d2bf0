//! `encoder_cache_*`: what the multimodal producers look up and find.

use std::sync::Arc;

use metrics::{Counter, Histogram};

use super::cache::{self, HandleCache};
use super::{Collect, IsThere, labels, register};

/// Series of one producer instance. Label sets are bounded by the pool times the modalities.
pub struct EncoderCacheSeries<const M: usize> {
    plugin: [String; 2],
    modalities: [&'static str; M],
    queries: [Counter; M],
    hits: HandleCache<PodLabels, [Counter; M]>,
    ratio: Histogram,
}

#[derive(Debug, PartialEq, Eq)]
struct PodLabels {
    namespace: String,
    name: String,
}

impl<const M: usize> std::fmt::Debug for EncoderCacheSeries<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EncoderCacheSeries").finish_non_exhaustive()
    }
}

impl<const M: usize> EncoderCacheSeries<M> {
    /// Handles for the instance `plugin_name`; counts come in the order of `modalities`.
    pub fn registered(
        plugin_type: &str,
        plugin_name: &str,
        modalities: [&'static str; M],
    ) -> Arc<Self> {
        let own = [("plugin_type", plugin_type), ("plugin_name", plugin_name)];
        let queries = modalities.map(|modality| {
            let list = labels(&[own[0], own[1], ("modality", modality)]);
            metrics::counter!("llm_d_epp_encoder_cache_queries_total", list)
        });
        let series = Arc::new(Self {
            plugin: [plugin_type, plugin_name].map(str::to_owned),
            modalities,
            queries,
            hits: HandleCache::default(),
            ratio: metrics::histogram!("llm_d_epp_encoder_cache_hit_ratio", labels(&own)),
        });
        register(&series);
        series
    }

    /// Distinct items of a request that were looked up.
    pub fn queried(&self, items: &[u32; M]) {
        add(&self.queries, items);
    }

    /// Items of the request that one endpoint holds. One hash lookup when it held any before.
    pub fn hit(&self, namespace: &str, name: &str, items: &[u32; M]) {
        let probe = (namespace, name);
        let same = |key: &PodLabels| (key.namespace.as_str(), key.name.as_str()) == probe;
        let counters: Arc<[Counter; M]> = self.hits.get_or_make(cache::hash(&probe), same, || {
            let pod = format!("{namespace}/{name}");
            let counters = self.modalities.map(|modality| {
                let list = labels(&[
                    ("plugin_type", &self.plugin[0]),
                    ("plugin_name", &self.plugin[1]),
                    ("pod", &pod),
                    ("modality", modality),
                ]);
                metrics::counter!("llm_d_epp_encoder_cache_hits_total", list)
            });
            let key = PodLabels {
                namespace: namespace.to_owned(),
                name: name.to_owned(),
            };
            (key, counters)
        });
        add(counters.as_slice(), items);
    }

    /// Share of the request's items that one candidate holds.
    pub fn ratio(&self, share: f64) {
        self.ratio.record(share);
    }
}

impl<const M: usize> Collect for EncoderCacheSeries<M> {
    fn forget_departed(&self, is_there: IsThere<'_>) {
        self.hits
            .retain(|key| is_there(&key.name, Some(&key.namespace)));
    }
}

fn add(counters: &[Counter], items: &[u32]) {
    for (counter, items) in counters.iter().zip(items) {
        if *items > 0 {
            counter.increment(u64::from(*items));
        }
    }
}
