//! `disagg_decision_total` and `pd_decision_total`: where the stages of requests ran.

use metrics::Counter;

use super::cache::{self, HandleCache, NameCaps};
use super::{Pair, labels};

/// Label of requests that name no model.
const NO_MODEL: &str = "unknown";

/// Decisions of one profile handler, `N` kinds of them. Label sets are bounded by the models that have a
/// name of their own times the kinds.
pub struct DecisionSeries<const N: usize> {
    metric: &'static str,
    plugin_type: &'static str,
    plugin_name: String,
    kinds: [&'static str; N],
    caps: NameCaps,
    counters: HandleCache<String, [Pair<Counter>; N]>,
}

impl<const N: usize> std::fmt::Debug for DecisionSeries<N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DecisionSeries").finish_non_exhaustive()
    }
}

impl<const N: usize> DecisionSeries<N> {
    /// The series `metric` of one plugin instance; decisions are counted by their position in `kinds`.
    pub fn new(
        metric: &'static str,
        plugin_type: &'static str,
        plugin_name: &str,
        kinds: [&'static str; N],
    ) -> Self {
        Self {
            metric,
            plugin_type,
            plugin_name: plugin_name.to_owned(),
            kinds,
            caps: NameCaps::default(),
            counters: HandleCache::default(),
        }
    }

    /// Counts a decision for `model`. One hash lookup when the model was seen before.
    pub fn count(&self, model: &str, kind: usize) {
        let model = if model.is_empty() { NO_MODEL } else { model };
        let same = |key: &String| key == model;
        let counters = self.counters.get_or_make(cache::hash(&model), same, || {
            let shown = self.caps.model(model);
            let counters = self.kinds.map(|kind| {
                let twin = [("model_name", shown.as_str()), ("decision_type", kind)];
                let own = [
                    ("plugin_name", self.plugin_name.as_str()),
                    ("plugin_type", self.plugin_type),
                    twin[0],
                    twin[1],
                ];
                Pair::counter(self.metric, labels(&own), labels(&twin))
            });
            (model.to_owned(), counters)
        });
        if let Some(counter) = counters.get(kind) {
            counter.increment();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::recorder::Recorder;
    use super::*;

    #[test]
    fn decisions_are_counted_by_model_under_both_names() {
        let recorder = Recorder::new();
        metrics::with_local_recorder(&recorder, || {
            let name = "llm_d_epp_disagg_decision_total";
            let series = DecisionSeries::new(name, "t", "n", ["decode-only", "prefill-decode"]);
            series.count("m", 1);
            series.count("m", 1);
            series.count("", 0);
        });
        let text = recorder.exposition().render();
        for line in [
            r#"llm_d_epp_disagg_decision_total{plugin_name="n",plugin_type="t",model_name="m",decision_type="prefill-decode"} 2"#,
            r#"llm_d_inference_scheduler_disagg_decision_total{model_name="m",decision_type="prefill-decode"} 2"#,
            r#"llm_d_epp_disagg_decision_total{plugin_name="n",plugin_type="t",model_name="unknown",decision_type="decode-only"} 1"#,
        ] {
            assert!(text.contains(line), "missing {line}\nin\n{text}");
        }
    }
}
