//! The process-wide recorder: counters and gauges are the Prometheus exporter's, but for those of single
//! endpoints (`departing.rs`); histograms are ours.
//!
//! The exporter keeps every observation until it is folded into buckets, 90 ns to store one and 16
//! bytes until then; a decision makes some forty. All our histograms have fixed bounds, so an
//! observation here is a binary search and two atomic additions, and memory does not grow.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use metrics::{
    Counter, Gauge, Histogram, HistogramFn, Key, KeyName, Label, Metadata, SharedString, Unit,
};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use parking_lot::Mutex;
use smallvec::SmallVec;

use super::departing::OfEndpoints;
use super::table::{Kind, Series, TABLE};

/// Bounds of a histogram that the table does not know; only tests make one.
const DEFAULT_BOUNDS: &[f64] = &[1.0];

/// Hands out the handles that code records to.
#[derive(Debug)]
pub(super) struct Recorder {
    plain: PrometheusRecorder,
    histograms: Arc<Histograms>,
    of_endpoints: Arc<OfEndpoints>,
}

/// What was recorded, as text.
#[derive(Debug, Clone)]
pub struct Exposition {
    plain: PrometheusHandle,
    histograms: Arc<Histograms>,
    of_endpoints: Arc<OfEndpoints>,
}

impl Recorder {
    pub(super) fn new() -> Self {
        let of_endpoints = Arc::default();
        super::register(&of_endpoints);
        Self {
            plain: PrometheusBuilder::new().build_recorder(),
            histograms: Arc::default(),
            of_endpoints,
        }
    }

    pub(super) fn exposition(&self) -> Exposition {
        Exposition {
            plain: self.plain.handle(),
            histograms: Arc::clone(&self.histograms),
            of_endpoints: Arc::clone(&self.of_endpoints),
        }
    }
}

impl Exposition {
    /// One that nothing is recorded to.
    #[cfg(test)]
    pub(crate) fn empty() -> Self {
        Recorder::new().exposition()
    }

    /// All series in the Prometheus text format, those of collectors brought up to date first.
    pub fn render(&self) -> String {
        super::collect::collect_all();
        let mut text = self.plain.render();
        self.histograms.render(&mut text);
        self.of_endpoints.render(&mut text);
        super::collect::expose_all(&mut text);
        text
    }
}

impl metrics::Recorder for Recorder {
    fn describe_counter(&self, name: KeyName, unit: Option<Unit>, help: SharedString) {
        self.plain.describe_counter(name, unit, help);
    }

    fn describe_gauge(&self, name: KeyName, unit: Option<Unit>, help: SharedString) {
        self.plain.describe_gauge(name, unit, help);
    }

    fn describe_histogram(&self, name: KeyName, _: Option<Unit>, help: SharedString) {
        let mut help_of = self.histograms.help.lock();
        help_of.insert(name.as_str().to_owned(), help);
    }

    fn register_counter(&self, key: &Key, metadata: &Metadata<'_>) -> Counter {
        let own = self.of_endpoints.counter(key);
        own.unwrap_or_else(|| self.plain.register_counter(key, metadata))
    }

    fn register_gauge(&self, key: &Key, metadata: &Metadata<'_>) -> Gauge {
        let own = self.of_endpoints.gauge(key);
        own.unwrap_or_else(|| self.plain.register_gauge(key, metadata))
    }

    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
        let mut series = self.histograms.series.lock();
        let shared = current_of(key).and_then(|current| series.get(&current).map(Arc::clone));
        let buckets = series.entry(key.clone()).or_insert_with(|| {
            shared.unwrap_or_else(|| Arc::new(Buckets::new(bounds_of(key.name()))))
        });
        Histogram::from_arc(Arc::clone(buckets))
    }
}

/// The series that `key`, a legacy name, stands beside, if both have the same labels.
fn current_of(key: &Key) -> Option<Key> {
    let current = TABLE
        .iter()
        .find(|series| series.twin == Some(key.name()))?;
    Some(Key::from_parts(
        current.name,
        key.labels().cloned().collect::<Vec<_>>(),
    ))
}

fn bounds_of(name: &str) -> &'static [f64] {
    let known = TABLE
        .iter()
        .find(|series| series.name == name || series.twin == Some(name));
    match known.map(|series| series.kind) {
        Some(Kind::Histogram(bounds)) => bounds,
        _ => DEFAULT_BOUNDS,
    }
}

/// Series by name and labels. Handles are made at start or once per capped label set, so the locks
/// are not on the request path.
#[derive(Debug, Default)]
struct Histograms {
    series: Mutex<BTreeMap<Key, Arc<Buckets>>>,
    help: Mutex<BTreeMap<String, SharedString>>,
}

/// One distribution. A request touches some thirty that nothing else keeps in the cache, so its parts
/// lie together.
#[derive(Debug)]
struct Buckets {
    /// Bits of the sum.
    sum: AtomicU64,
    bounds: &'static [f64],
    /// One for each bound and one above them; not cumulative.
    counts: SmallVec<[AtomicU64; 16]>,
}

impl Buckets {
    fn new(bounds: &'static [f64]) -> Self {
        Self {
            bounds,
            counts: (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect(),
            sum: AtomicU64::new(0),
        }
    }
}

impl HistogramFn for Buckets {
    fn record(&self, value: f64) {
        // A bound is inclusive.
        let bucket = self.bounds.partition_point(|bound| *bound < value);
        if let Some(count) = self.counts.get(bucket) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        let mut old = self.sum.load(Ordering::Relaxed);
        loop {
            let new = (f64::from_bits(old) + value).to_bits();
            let swapped =
                self.sum
                    .compare_exchange_weak(old, new, Ordering::Relaxed, Ordering::Relaxed);
            match swapped {
                Ok(_) => return,
                Err(current) => old = current,
            }
        }
    }
}

impl Histograms {
    fn render(&self, out: &mut String) {
        let help = self.help.lock();
        let mut family = "";
        let series = self.series.lock();
        for (key, buckets) in series.iter() {
            let name = key.name();
            if name != family {
                if let Some(help) = help.get(name) {
                    let _ = writeln!(out, "# HELP {name} {help}");
                }
                let _ = writeln!(out, "# TYPE {name} histogram");
                family = name;
            }
            buckets.render(name, &label_text(key.labels()), out);
        }
    }
}

impl Buckets {
    fn render(&self, name: &str, labels: &str, out: &mut String) {
        let mut total = 0;
        let bounds = self.bounds.iter().map(Some).chain([None]);
        for (bound, count) in bounds.zip(&self.counts) {
            total += count.load(Ordering::Relaxed);
            let comma = if labels.is_empty() { "" } else { "," };
            let _ = match bound {
                Some(bound) => {
                    writeln!(
                        out,
                        "{name}_bucket{{{labels}{comma}le=\"{bound}\"}} {total}"
                    )
                }
                None => writeln!(out, "{name}_bucket{{{labels}{comma}le=\"+Inf\"}} {total}"),
            };
        }
        let braced = if labels.is_empty() {
            String::new()
        } else {
            format!("{{{labels}}}")
        };
        let sum = f64::from_bits(self.sum.load(Ordering::Relaxed));
        let _ = writeln!(
            out,
            "{name}_sum{braced} {sum}\n{name}_count{braced} {total}\n"
        );
    }
}

/// Writes a gauge of the table, once for each of `rows`.
pub fn write_gauge(name: &str, rows: &[(Vec<Label>, f64)], out: &mut String) {
    let known = |series: &&Series| series.name == name || series.twin == Some(name);
    if let Some(series) = TABLE.iter().find(known) {
        let _ = writeln!(out, "# HELP {name} {}", series.help_of(name));
    }
    let _ = writeln!(out, "# TYPE {name} gauge");
    for (labels, value) in rows {
        let _ = writeln!(out, "{name}{{{}}} {value}", label_text(labels.iter()));
    }
    out.push('\n');
}

/// `name="value"` pairs, values escaped.
pub(super) fn label_text<'a>(labels: impl Iterator<Item = &'a Label>) -> String {
    let mut out = String::new();
    for label in labels {
        if !out.is_empty() {
            out.push(',');
        }
        let _ = write!(out, "{}=\"", label.key());
        for character in label.value().chars() {
            match character {
                '\\' => out.push_str("\\\\"),
                '"' => out.push_str("\\\""),
                '\n' => out.push_str("\\n"),
                other => out.push(other),
            }
        }
        out.push('"');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_legacy_name_shows_what_its_current_one_does() {
        let recorder = Recorder::new();
        let text = metrics::with_local_recorder(&recorder, || {
            let pair = |labels, twin_labels| {
                super::super::Pair::histogram(
                    "llm_d_epp_prefix_indexer_hit_ratio",
                    labels,
                    twin_labels,
                )
            };
            let labels = |value| vec![metrics::Label::new("a", value)];
            // Equal labels: one distribution with two names.
            pair(labels("x"), labels("x")).record(0.5);
            // Fewer: the twin adds up what the current name tells apart.
            pair(labels("y"), Vec::new()).record(0.5);
            pair(labels("z"), Vec::new()).record(0.5);
            recorder.exposition().render()
        });
        for (labels, current, twin) in [("{a=\"x\"}", 1, 1), ("{a=\"y\"}", 1, 0), ("", 0, 2)] {
            let has = |name: &str, count| {
                let line = format!("{name}_hit_ratio_count{labels} {count}\n");
                assert_eq!(text.contains(&line), count > 0, "{line}\nin\n{text}");
            };
            has("llm_d_epp_prefix_indexer", current);
            has("inference_extension_prefix_indexer", twin);
        }
    }

    #[test]
    fn observations_count_up_to_and_including_their_bound() {
        let recorder = Recorder::new();
        let text = metrics::with_local_recorder(&recorder, || {
            let odd = metrics::histogram!("llm_d_epp_prefix_indexer_hit_ratio", "a" => "x\"\\\n");
            // RATIO has the bounds 0, 0.1, ... 1.
            for value in [0.0, 0.05, 0.1, 0.11, 7.0] {
                odd.record(value);
            }
            metrics::histogram!("other").record(0.5);
            metrics::describe_histogram!("other", "Help.");
            recorder.exposition().render()
        });
        let labels = r#"a="x\"\\\n""#;
        for line in [
            format!("llm_d_epp_prefix_indexer_hit_ratio_bucket{{{labels},le=\"0\"}} 1"),
            format!("llm_d_epp_prefix_indexer_hit_ratio_bucket{{{labels},le=\"0.1\"}} 3"),
            format!("llm_d_epp_prefix_indexer_hit_ratio_bucket{{{labels},le=\"0.2\"}} 4"),
            format!("llm_d_epp_prefix_indexer_hit_ratio_bucket{{{labels},le=\"+Inf\"}} 5"),
            format!("llm_d_epp_prefix_indexer_hit_ratio_count{{{labels}}} 5"),
            "# HELP other Help.\n# TYPE other histogram\nother_bucket{le=\"1\"} 1".to_owned(),
            "other_sum 0.5\nother_count 1".to_owned(),
        ] {
            assert!(text.contains(&line), "missing {line}\nin\n{text}");
        }
        assert_eq!(
            text.matches("# TYPE llm_d_epp_prefix_indexer_hit_ratio ")
                .count(),
            1
        );
    }

    #[test]
    fn equal_labels_share_a_series() {
        let recorder = Recorder::new();
        let text = metrics::with_local_recorder(&recorder, || {
            metrics::histogram!("one", "l" => "v").record(1.0);
            metrics::histogram!("one", "l" => "v").record(2.0);
            recorder.exposition().render()
        });
        assert!(text.contains("one_count{l=\"v\"} 2"), "{text}");
    }
}
