//! Counters and gauges about one endpoint each. The exporter would keep them for good, and pools whose
//! endpoints come and go would never stop growing; here they go when their endpoint has.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use metrics::{Counter, Gauge, Key};
use parking_lot::Mutex;

use super::collect::{Collect, IsThere};
use super::recorder::label_text;
use super::table::TABLE;

/// Series by name and labels. Handles are made once per label set, so the lock is not on the request path.
#[derive(Debug, Default)]
pub(super) struct OfEndpoints(Mutex<BTreeMap<Key, Series>>);

#[derive(Debug)]
struct Series {
    kind: Kind,
    /// A count, or the bits of a float.
    value: Arc<AtomicU64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Counter,
    Gauge,
}

impl OfEndpoints {
    /// The counter `key`, if it is about an endpoint.
    pub(super) fn counter(&self, key: &Key) -> Option<Counter> {
        endpoint_of(key)?;
        Some(Counter::from_arc(self.value(key, Kind::Counter)))
    }

    /// The gauge `key`, if it is about an endpoint.
    pub(super) fn gauge(&self, key: &Key) -> Option<Gauge> {
        endpoint_of(key)?;
        Some(Gauge::from_arc(self.value(key, Kind::Gauge)))
    }

    fn value(&self, key: &Key, kind: Kind) -> Arc<AtomicU64> {
        let mut all = self.0.lock();
        let series = all.entry(key.clone()).or_insert_with(|| Series {
            kind,
            value: Arc::default(),
        });
        Arc::clone(&series.value)
    }

    /// Writes all of them in the Prometheus text format.
    pub(super) fn render(&self, out: &mut String) {
        let all = self.0.lock();
        let mut family = "";
        for (key, Series { kind, value }) in all.iter() {
            let name = key.name();
            let value = value.load(Ordering::Relaxed);
            let (kind, value) = match kind {
                Kind::Counter => ("counter", value.to_string()),
                Kind::Gauge => ("gauge", f64::from_bits(value).to_string()),
            };
            if name != family {
                let known = |series: &&super::table::Series| {
                    series.name == name || series.twin == Some(name)
                };
                if let Some(series) = TABLE.iter().find(known) {
                    let _ = writeln!(out, "# HELP {name} {}", series.help_of(name));
                }
                let _ = writeln!(out, "# TYPE {name} {kind}");
                family = name;
            }
            let _ = writeln!(out, "{name}{{{}}} {value}", label_text(key.labels()));
        }
        if !family.is_empty() {
            out.push('\n');
        }
    }
}

impl Collect for OfEndpoints {
    /// What is still held is still counted, as by a request to an endpoint that has left.
    fn forget_departed(&self, is_there: IsThere<'_>) {
        self.0.lock().retain(|key, series| {
            let (name, namespace) = endpoint_of(key).unwrap_or_default();
            name.is_empty() || is_there(name, namespace) || Arc::strong_count(&series.value) > 1
        });
    }
}

/// Name and, where the labels tell, namespace of the endpoint that a series is about. The name is empty for
/// what of such a family is about none: a family is written in one place.
fn endpoint_of(key: &Key) -> Option<(&str, Option<&str>)> {
    let label = |wanted: &str| {
        let mut labels = key.labels();
        labels
            .find(|l| l.key() == wanted)
            .map(metrics::Label::value)
    };
    if let Some(name) = label("endpoint_name").or_else(|| label("pod_name")) {
        return Some((name, label("namespace")));
    }
    let (namespace, name) = label("pod")?.split_once('/')?;
    Some((name, Some(namespace)))
}

#[cfg(test)]
mod tests {
    use super::super::recorder::Recorder;
    use super::super::{EncoderCacheSeries, InFlightSeries, Metrics, forget_departed};

    // Other tests ask the same collectors at the same time: each names endpoints of its own.

    #[test]
    fn series_go_with_their_endpoint_once_nothing_holds_them() {
        let recorder = Recorder::new();
        metrics::with_local_recorder(&recorder, || {
            let metrics = Metrics::new();
            let series = InFlightSeries::registered();
            let encoders = EncoderCacheSeries::registered("t", "n", ["image"]);
            let booked = series.gauges(("stays", "ns"), "p", "f", 0);
            booked.add(1, 5);
            series.gauges(("goes", "ns"), "p", "f", 0).add(1, 0);
            for endpoint in ["stays", "goes"] {
                metrics.scheduled("m", Some((endpoint, "ns", 80)));
                encoders.hit("ns", endpoint, &[3]);
            }
            metrics.scheduled("m", None);
            let rows = |what: &str| {
                let text = recorder.exposition().render();
                text.lines()
                    .filter(|l| !l.starts_with('#') && l.contains(what))
                    .map(str::to_owned)
                    .collect::<Vec<_>>()
            };
            let count = |what: &str| rows(what).len();
            let forget = |gone: &[&str]| {
                // What a cache lets go of is not held any more the next time.
                for _ in 0..2 {
                    forget_departed(&|name, namespace| {
                        !(gone.contains(&name) && namespace.is_none_or(|n| n == "ns"))
                    });
                }
            };
            // Requests, tokens, attempts under two names, hits.
            assert_eq!((count("stays"), count("goes")), (5, 5));
            forget(&["goes"]);
            assert_eq!((count("stays"), count("goes")), (5, 0));
            forget(&["stays"]);
            assert_eq!(count("stays"), 2, "what is booked is still held");
            // It comes back under its name, while the old request still runs.
            series.gauges(("stays", "ns"), "p", "f", 0).add(1, 0);
            metrics.scheduled("m", Some(("stays", "ns", 80)));
            let values: Vec<String> = rows("stays")
                .iter()
                .filter_map(|row| Some(row.rsplit_once(' ')?.1.to_owned()))
                .collect();
            assert_eq!(values, ["1", "2", "5", "1"], "attempts, requests, tokens");
            drop(booked);
            let failures = r#"llm_d_epp_scheduler_attempts_total{status="failure""#;
            assert_eq!(count(failures), 1, "a failure has no endpoint, and stays");
            let text = recorder.exposition().render();
            let mut families: Vec<&str> =
                text.lines().filter(|l| l.starts_with("# TYPE")).collect();
            let all = families.len();
            families.sort_unstable();
            families.dedup();
            assert_eq!(families.len(), all, "a family is written once:\n{text}");
        });
    }

    #[test]
    fn pools_that_are_replaced_a_thousand_times_leave_no_more_than_the_last() {
        let recorder = Recorder::new();
        metrics::with_local_recorder(&recorder, || {
            let metrics = Metrics::new();
            let series = InFlightSeries::registered();
            for round in 0..1000 {
                for pod in 0..4 {
                    let name = format!("replaced-{round}-{pod}");
                    series.gauges((&name, "ns"), "p", "f", 0).add(1, 1);
                    series.gauges((&name, "ns"), "p", "f", 0).add(-1, -1);
                    metrics.scheduled("m", Some((&name, "ns", 80)));
                }
                let current = format!("replaced-{round}-");
                for _ in 0..2 {
                    forget_departed(&|name, _| {
                        !name.starts_with("replaced-") || name.starts_with(&current)
                    });
                }
            }
            let text = recorder.exposition().render();
            let rows = text.lines().filter(|l| l.contains("\"replaced-"));
            assert_eq!(rows.count(), 4 * 4);
        });
    }
}
