//! Metric handles, resolved once and kept: nothing on the request path looks a label set up by text
//! except one cached lookup per request.

mod cache;
mod collect;
mod departing;
mod disagg;
mod encoder_cache;
mod kubernetes;
mod recorder;
mod series;
pub mod table;

use std::sync::Arc;
use std::time::Duration;

use metrics::{Counter, Gauge, Histogram, Label};
use tokio::time::Instant;

use cache::{HandleCache, NameCaps};
pub use collect::{Collect, Follow, IsThere, forget_departed, register};
pub use disagg::DecisionSeries;
pub use encoder_cache::EncoderCacheSeries;
pub use kubernetes::{LeaseSeries, WatchSeries};
use recorder::Recorder;
pub use recorder::{Exposition, write_gauge};
pub use series::{Completion, RequestSeries, RunningGuard};
use table::{Kind, TABLE, twin_of};

/// Installs the process-wide recorder and returns what renders it. Call once, before any handle.
pub fn install() -> anyhow::Result<Exposition> {
    let recorder = Recorder::new();
    let exposition = recorder.exposition();
    metrics::set_global_recorder(recorder)
        .map_err(|e| anyhow::anyhow!("a metrics recorder exists already: {e}"))?;
    describe();
    Ok(exposition)
}

/// Runs `test` under a recorder of its own; handles made on this thread meanwhile count there.
#[cfg(test)]
pub(crate) fn counted(test: impl FnOnce()) -> Exposition {
    let recorder = Recorder::new();
    metrics::with_local_recorder(&recorder, test);
    recorder.exposition()
}

fn describe() {
    for series in TABLE {
        let describe = |name: &'static str, help: String| match series.kind {
            Kind::Counter => metrics::describe_counter!(name, help),
            Kind::Gauge => metrics::describe_gauge!(name, help),
            Kind::Histogram(_) => metrics::describe_histogram!(name, help),
        };
        for name in [Some(series.name), series.twin].into_iter().flatten() {
            describe(name, series.help_of(name));
        }
    }
}

/// How changes of the configuration file went.
pub struct ConfigReloads {
    ok: Counter,
    error: Counter,
    last_success: Gauge,
}

impl std::fmt::Debug for ConfigReloads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ConfigReloads")
    }
}

impl ConfigReloads {
    /// The series of a process whose first configuration is in use.
    pub fn new() -> Self {
        let count = |result| metrics::counter!("pinpod_config_reloads_total", "result" => result);
        let reloads = Self {
            ok: count("ok"),
            error: count("error"),
            last_success: metrics::gauge!("pinpod_config_last_reload_success"),
        };
        // Both results are there from the start, so that a rate can be taken of them.
        reloads.ok.increment(0);
        reloads.error.increment(0);
        reloads.last_success.set(1.0);
        reloads
    }

    /// Counts a reload.
    pub fn record(&self, ok: bool) {
        if ok { &self.ok } else { &self.error }.increment(1);
        self.last_success.set(if ok { 1.0 } else { 0.0 });
    }
}

impl Default for ConfigReloads {
    fn default() -> Self {
        Self::new()
    }
}

/// A current series and its legacy twin, written together.
#[derive(Clone)]
pub struct Pair<T> {
    current: T,
    twin: Option<T>,
}

impl<T> std::fmt::Debug for Pair<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.twin.is_some() {
            "Pair(with twin)"
        } else {
            "Pair"
        })
    }
}

impl Pair<Counter> {
    /// Handles for `name` with `labels`, and its twin with `twin_labels`.
    pub fn counter(name: &'static str, labels: Vec<Label>, twin_labels: Vec<Label>) -> Self {
        Self {
            current: metrics::counter!(name, labels),
            twin: twin_of(name).map(|twin| metrics::counter!(twin, twin_labels)),
        }
    }

    /// Adds one.
    pub fn increment(&self) {
        self.current.increment(1);
        if let Some(twin) = &self.twin {
            twin.increment(1);
        }
    }
}

impl Pair<Gauge> {
    /// Handles for `name` with `labels`, and its twin with `twin_labels`.
    pub fn gauge(name: &'static str, labels: Vec<Label>, twin_labels: Vec<Label>) -> Self {
        Self {
            current: metrics::gauge!(name, labels),
            twin: twin_of(name).map(|twin| metrics::gauge!(twin, twin_labels)),
        }
    }

    /// Sets both.
    pub fn set(&self, value: f64) {
        self.current.set(value);
        if let Some(twin) = &self.twin {
            twin.set(value);
        }
    }

    /// Adds `delta` to both.
    pub fn add(&self, delta: f64) {
        self.current.increment(delta);
        if let Some(twin) = &self.twin {
            twin.increment(delta);
        }
    }
}

impl Pair<Histogram> {
    /// Handles for `name` with `labels`, and its twin with `twin_labels`.
    ///
    /// With equal labels both are one distribution under two names, which the recorder sees to, so
    /// that an observation is recorded once.
    pub fn histogram(name: &'static str, labels: Vec<Label>, twin_labels: Vec<Label>) -> Self {
        let same = labels == twin_labels;
        let current = metrics::histogram!(name, labels);
        let twin = twin_of(name).map(|twin| metrics::histogram!(twin, twin_labels));
        Self {
            current,
            twin: twin.filter(|_| !same),
        }
    }

    /// Records one observation.
    pub fn record(&self, value: f64) {
        self.current.record(value);
        if let Some(twin) = &self.twin {
            twin.record(value);
        }
    }
}

/// Label list from pairs.
pub fn labels(pairs: &[(&'static str, &str)]) -> Vec<Label> {
    pairs
        .iter()
        .map(|(name, value)| Label::new(*name, (*value).to_owned()))
        .collect()
}

/// Series that are not owned by one plugin. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Metrics(Arc<Inner>);

struct Inner {
    caps: NameCaps,
    requests: HandleCache<RequestLabels, RequestSeries>,
    attempts: HandleCache<AttemptLabels, Pair<Counter>>,
    rewrites: HandleCache<[String; 3], Pair<Counter>>,
    decision: Histogram,
    processing: Histogram,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct RequestLabels {
    model: String,
    target_model: String,
    fairness_id: String,
    priority: i32,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct AttemptLabels {
    target_model: String,
    endpoint: Option<EndpointLabels>,
}

/// How an endpoint appears in labels.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct EndpointLabels {
    /// Endpoint name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its port.
    pub port: u16,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// Handles of the installed recorder; without one they record nothing.
    pub fn new() -> Self {
        let inner = Arc::new(Inner {
            caps: NameCaps::default(),
            requests: HandleCache::default(),
            attempts: HandleCache::default(),
            rewrites: HandleCache::default(),
            decision: metrics::histogram!("pinpod_decision_duration_seconds"),
            processing: metrics::histogram!("llm_d_epp_request_processing_duration_seconds"),
        });
        register(&inner);
        Self(inner)
    }

    /// The series of one label set. One hash lookup when it was used before.
    pub fn request_series(
        &self,
        model: &str,
        target: &str,
        fairness_id: &str,
        priority: i32,
    ) -> Arc<RequestSeries> {
        let probe = (model, target, fairness_id, priority);
        let same = |key: &RequestLabels| {
            (
                key.model.as_str(),
                key.target_model.as_str(),
                key.fairness_id.as_str(),
                key.priority,
            ) == probe
        };
        self.0.requests.get_or_make(cache::hash(&probe), same, || {
            let key = RequestLabels {
                model: model.to_owned(),
                target_model: target.to_owned(),
                fairness_id: fairness_id.to_owned(),
                priority,
            };
            let caps = &self.0.caps;
            let capped = (
                caps.model(model),
                caps.model(target),
                caps.fairness(fairness_id),
            );
            (
                key,
                RequestSeries::new(&capped.0, &capped.1, &capped.2, priority),
            )
        })
    }

    /// A scheduling attempt: the endpoint chosen, or a failure.
    pub fn scheduled(&self, target_model: &str, endpoint: Option<(&str, &str, u16)>) {
        let probe = (target_model, endpoint);
        let same = |key: &AttemptLabels| {
            let known = key
                .endpoint
                .as_ref()
                .map(|e| (e.name.as_str(), e.namespace.as_str(), e.port));
            (key.target_model.as_str(), known) == probe
        };
        let pair = self.0.attempts.get_or_make(cache::hash(&probe), same, || {
            let target = self.0.caps.model(target_model);
            let (name, namespace, port) = endpoint.map_or(
                (String::new(), String::new(), String::new()),
                |(name, namespace, port)| (name.to_owned(), namespace.to_owned(), port.to_string()),
            );
            let status = if endpoint.is_some() {
                "success"
            } else {
                "failure"
            };
            let with = |endpoint_label| {
                labels(&[
                    ("status", status),
                    ("target_model_name", &target),
                    (endpoint_label, &name),
                    ("namespace", &namespace),
                    ("port", &port),
                ])
            };
            let pair = Pair::counter(
                "llm_d_epp_scheduler_attempts_total",
                with("endpoint_name"),
                with("pod_name"),
            );
            let endpoint = endpoint.map(|(name, namespace, port)| EndpointLabels {
                name: name.to_owned(),
                namespace: namespace.to_owned(),
                port,
            });
            (
                AttemptLabels {
                    target_model: target_model.to_owned(),
                    endpoint,
                },
                pair,
            )
        });
        pair.increment();
    }

    /// The object `rule` sent a request for `model` to `target`. Names that objects mention are not
    /// capped; `model` is one of them when the rule is `exact`.
    pub fn rewritten(&self, rule: &str, model: &str, target: &str, exact: bool) {
        let probe = [rule, model, target];
        let same = |key: &[String; 3]| key.each_ref().map(String::as_str) == probe;
        let pair = self.0.rewrites.get_or_make(cache::hash(&probe), same, || {
            let model_label = if exact {
                model.to_owned()
            } else {
                self.0.caps.model(model)
            };
            let list = labels(&[
                ("model_rewrite_name", rule),
                ("model_name", &model_label),
                ("target_model", target),
            ]);
            let pair = Pair::counter(
                "llm_d_epp_model_rewrite_decisions_total",
                list.clone(),
                list,
            );
            (probe.map(str::to_owned), pair)
        });
        pair.increment();
    }

    /// Time from the complete request to its decision.
    pub fn decision(&self, took: Duration) {
        self.0.decision.record(took.as_secs_f64());
    }

    /// Time from a request's arrival to its answer.
    pub fn request_processed(&self, took: Duration) {
        self.0.processing.record(took.as_secs_f64());
    }

    /// The proxy gave a request up in `phase`, one of a closed set.
    pub fn aborted(&self, phase: &'static str) {
        metrics::counter!("pinpod_aborted_requests_total", "phase" => phase).increment(1);
    }

    /// Announces the build.
    pub fn announce_build(&self) {
        let commit = option_env!("PINPOD_COMMIT").unwrap_or("unknown");
        let list = labels(&[("commit", commit), ("build_ref", env!("CARGO_PKG_VERSION"))]);
        Pair::gauge("llm_d_epp_info", list.clone(), list).set(1.0);
    }
}

impl Collect for Inner {
    fn forget_departed(&self, is_there: IsThere<'_>) {
        let there = |e: &EndpointLabels| is_there(&e.name, Some(&e.namespace));
        self.attempts
            .retain(|key| key.endpoint.as_ref().is_none_or(there));
    }
}

/// Gauges of the load one in-flight producer booked, by endpoint and flow. Label sets are bounded by
/// the pool times the fairness ids that have a name of their own.
#[derive(Default)]
pub struct InFlightSeries {
    caps: NameCaps,
    gauges: HandleCache<InFlightLabels, InFlightGauges>,
}

impl std::fmt::Debug for InFlightSeries {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InFlightSeries").finish_non_exhaustive()
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct InFlightLabels {
    endpoint: String,
    namespace: String,
    producer: String,
    fairness_id: String,
    priority: i32,
}

/// One label set of [`InFlightSeries`].
pub struct InFlightGauges {
    labels: InFlightLabels,
    requests: Gauge,
    tokens: Gauge,
}

impl std::fmt::Debug for InFlightGauges {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InFlightGauges").finish_non_exhaustive()
    }
}

impl InFlightGauges {
    /// Adds to both gauges; negative values take back.
    pub fn add(&self, requests: i64, tokens: i64) {
        if requests != 0 {
            self.requests.increment(requests as f64);
        }
        if tokens != 0 {
            self.tokens.increment(tokens as f64);
        }
    }
}

impl Collect for InFlightSeries {
    fn forget_departed(&self, is_there: IsThere<'_>) {
        self.gauges
            .retain(|key| is_there(&key.endpoint, Some(&key.namespace)));
    }
}

impl InFlightSeries {
    /// Series that forget endpoints which have left.
    pub fn registered() -> Arc<Self> {
        let series = Arc::default();
        register(&series);
        series
    }

    /// The gauges of one endpoint and flow. One hash lookup when they were used before.
    pub fn gauges(
        &self,
        endpoint: (&str, &str),
        producer: &str,
        fairness_id: &str,
        priority: i32,
    ) -> Arc<InFlightGauges> {
        let probe = (endpoint, producer, fairness_id, priority);
        let same = |key: &InFlightLabels| {
            (
                (key.endpoint.as_str(), key.namespace.as_str()),
                key.producer.as_str(),
                key.fairness_id.as_str(),
                key.priority,
            ) == probe
        };
        self.gauges.get_or_make(cache::hash(&probe), same, || {
            let list = labels(&[
                ("endpoint_name", endpoint.0),
                ("namespace", endpoint.1),
                ("producer_name", producer),
                ("fairness_id", &self.caps.fairness(fairness_id)),
                ("priority", &priority.to_string()),
            ]);
            let key = InFlightLabels {
                endpoint: endpoint.0.to_owned(),
                namespace: endpoint.1.to_owned(),
                producer: producer.to_owned(),
                fairness_id: fairness_id.to_owned(),
                priority,
            };
            let gauges = InFlightGauges {
                labels: key.clone(),
                requests: metrics::gauge!("llm_d_epp_inflight_requests", list.clone()),
                tokens: metrics::gauge!("llm_d_epp_inflight_tokens", list),
            };
            (key, gauges)
        })
    }

    /// The gauges of another endpoint for the flow of `gauges`.
    pub fn same_flow(
        &self,
        gauges: &InFlightGauges,
        endpoint: (&str, &str),
    ) -> Arc<InFlightGauges> {
        let flow = &gauges.labels;
        self.gauges(endpoint, &flow.producer, &flow.fairness_id, flow.priority)
    }
}

/// `extproc_*` series, opt-in.
#[derive(Debug)]
pub struct ExtProcStreams {
    inflight: Pair<Gauge>,
    duration: Pair<Histogram>,
}

impl Default for ExtProcStreams {
    fn default() -> Self {
        Self {
            inflight: Pair::gauge("llm_d_epp_extproc_streams_inflight", Vec::new(), Vec::new()),
            duration: Pair::histogram(
                "llm_d_epp_extproc_stream_duration_seconds",
                Vec::new(),
                Vec::new(),
            ),
        }
    }
}

impl ExtProcStreams {
    /// Counts a stream as open until the guard is closed.
    pub fn open(self: &Arc<Self>) -> StreamGuard {
        self.inflight.add(1.0);
        StreamGuard {
            streams: Arc::clone(self),
            opened_at: Instant::now(),
        }
    }
}

/// An open ext_proc stream.
#[derive(Debug)]
pub struct StreamGuard {
    streams: Arc<ExtProcStreams>,
    opened_at: Instant,
}

impl StreamGuard {
    /// The stream ended with `code`, spelled as Go does (`OK`, `Canceled`, …).
    pub fn close(self, code: &'static str) {
        self.streams.inflight.add(-1.0);
        self.streams
            .duration
            .record(self.opened_at.elapsed().as_secs_f64());
        metrics::counter!("llm_d_epp_extproc_streams_total", "code" => code).increment(1);
    }
}

/// What `record` wrote through handles it made, as text.
#[cfg(test)]
pub(crate) fn recorded(record: impl FnOnce()) -> String {
    let recorder = Recorder::new();
    metrics::with_local_recorder(&recorder, record);
    recorder.exposition().render()
}

/// Runs `work` with a recorder of its own on this thread, whose text it can look at.
#[cfg(test)]
pub(crate) async fn recording<F: Future<Output = ()>>(work: impl FnOnce(Exposition) -> F) {
    let recorder = Recorder::new();
    let _local = metrics::set_default_local_recorder(&recorder);
    work(recorder.exposition()).await;
}

/// Sum of the samples of `name` that have all these labels, as `key="value"`; `None` without one.
#[cfg(test)]
pub(crate) fn sample(shown: &Exposition, name: &str, labels: &[&str]) -> Option<f64> {
    let text = shown.render();
    let values = text.lines().filter_map(|line| {
        let (head, value) = line.rsplit_once(' ')?;
        let named = head.split('{').next() == Some(name);
        (named && labels.iter().all(|label| head.contains(label))).then(|| value.parse::<f64>())
    });
    let values: Vec<f64> = values.map(Result::unwrap).collect();
    (!values.is_empty()).then(|| values.iter().sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Renders what `record` wrote to a recorder of its own.
    fn exposition(record: impl FnOnce(&Metrics)) -> String {
        let recorder = Recorder::new();
        metrics::with_local_recorder(&recorder, || {
            describe();
            record(&Metrics::new());
        });
        recorder.exposition().render()
    }

    #[test]
    fn a_request_writes_the_current_series_and_its_twin() {
        let text = exposition(|metrics| {
            let series = metrics.request_series("m", "t", "f", -1);
            series.scheduled(100);
            series.usage(7, 3, Some(0));
        });
        let full = r#"model_name="m",target_model_name="t",fairness_id="f",priority="-1""#;
        for line in [
            format!("llm_d_epp_request_total{{{full}}} 1"),
            r#"inference_objective_request_total{model_name="m",target_model_name="t",priority="-1"} 1"#.to_owned(),
            // 100 bytes fall into the second bucket of REQ (64, 128).
            format!(r#"llm_d_epp_request_size_bytes_bucket{{{full},le="64"}} 0"#),
            format!(r#"llm_d_epp_request_size_bytes_bucket{{{full},le="128"}} 1"#),
            r#"inference_objective_prompt_cached_tokens_count{model_name="m",target_model_name="t"} 1"#.to_owned(),
            "# HELP inference_objective_request_total [ALPHA] [Deprecated: Use llm_d_epp_request_total] Requests routed."
                .to_owned(),
            "# TYPE llm_d_epp_request_size_bytes histogram".to_owned(),
        ] {
            assert!(text.contains(&line), "missing {line}\nin\n{text}");
        }
    }

    #[test]
    fn the_thousand_and_first_model_becomes_other() {
        let text = exposition(|metrics| {
            for i in 0..=1000 {
                metrics
                    .request_series(&format!("m{i}"), &format!("m{i}"), "f", 0)
                    .scheduled(1);
            }
            metrics.request_series("", "", "f", 0).scheduled(1);
        });
        assert!(text.contains(r#"llm_d_epp_request_total{model_name="m999","#));
        assert!(!text.contains(r#"llm_d_epp_request_total{model_name="m1000","#));
        assert!(text.contains(r#"llm_d_epp_request_total{model_name="other","#));
        assert!(
            text.contains(r#"llm_d_epp_request_total{model_name="","#),
            "empty is never capped"
        );
    }

    #[test]
    fn attempts_name_the_endpoint() {
        let text = exposition(|metrics| {
            metrics.scheduled("t", Some(("pod-0", "ns", 8000)));
            metrics.scheduled("t", None);
        });
        let line = r#"llm_d_epp_scheduler_attempts_total{status="success",target_model_name="t",endpoint_name="pod-0",namespace="ns",port="8000"} 1"#;
        assert!(text.contains(line), "{text}");
        assert!(text.contains(r#"inference_extension_scheduler_attempts_total{status="failure","#));
    }

    #[test]
    fn load_in_flight_is_shown_by_endpoint_and_flow() {
        let text = exposition(|_| {
            let series = InFlightSeries::default();
            let gauges = || series.gauges(("pod-0", "ns"), "inflight-load-producer", "f", 3);
            gauges().add(1, 700);
            gauges().add(1, 100);
            gauges().add(0, -700);
        });
        let labels = r#"{endpoint_name="pod-0",namespace="ns",producer_name="inflight-load-producer",fairness_id="f",priority="3"}"#;
        assert!(
            text.contains(&format!("llm_d_epp_inflight_requests{labels} 2\n")),
            "{text}"
        );
        assert!(
            text.contains(&format!("llm_d_epp_inflight_tokens{labels} 100\n")),
            "{text}"
        );
    }

    #[test]
    fn every_name_is_listed_once() {
        let mut names: Vec<_> = TABLE
            .iter()
            .flat_map(|s| std::iter::once(s.name).chain(s.twin))
            .collect();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
    }
}
