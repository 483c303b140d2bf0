//! A pool in process: endpoints with given metrics and labels, and a director that picks among them.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use pinpod::config::{ConfigLoader, LoadOptions, ResolvedConfig, builtin};
use pinpod::control::director::DirectorOptions;
use pinpod::control::{BodyKnowledge, Decision, Director, Intake, Step, Subset};
use pinpod::datalayer::{
    Endpoint, EndpointDetails, EndpointSpec, EndpointStore, EngineMetrics, LoraState,
};
use pinpod::plugin::InFlightSlot;
use pinpod::telemetry::metrics::Metrics;
use tokio::time::Instant;

/// An idle, scraped endpoint and what makes it different.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    name: &'static str,
    labels: BTreeMap<String, String>,
    metrics: EngineMetrics,
    load: (i64, i64),
}

pub(crate) fn node(name: &'static str) -> Node {
    Node {
        name,
        labels: BTreeMap::new(),
        metrics: EngineMetrics {
            updated_at: Some(Instant::now()),
            ..EngineMetrics::default()
        },
        load: (0, 0),
    }
}

impl Node {
    pub(crate) fn label(mut self, key: &str, value: &str) -> Self {
        self.labels.insert(key.to_owned(), value.to_owned());
        self
    }

    pub(crate) fn role(self, role: &str) -> Self {
        self.label("llm-d.ai/role", role)
    }

    pub(crate) fn waiting(mut self, requests: u32) -> Self {
        self.metrics.waiting_requests = requests;
        self
    }

    pub(crate) fn kv(mut self, usage: f64) -> Self {
        self.metrics.kv_cache_usage = usage;
        self
    }

    /// KV blocks of 64 tokens that its engine has.
    pub(crate) fn blocks(mut self, blocks: u32) -> Self {
        self.metrics.kv_blocks = Some(blocks);
        self.metrics.block_size_tokens = Some(64);
        self
    }

    pub(crate) fn adapter(mut self, name: &str) -> Self {
        self.metrics.lora = Some(Arc::new(LoraState {
            active: vec![name.to_owned()],
            waiting: Vec::new(),
            max_active: 1,
        }));
        self
    }

    /// Requests and tokens booked by other requests.
    pub(crate) fn load(mut self, requests: i64, tokens: i64) -> Self {
        self.load = (requests, tokens);
        self
    }
}

/// A configuration at work.
pub(crate) struct Pool {
    pub(crate) config: ResolvedConfig,
    director: Director,
    store: Arc<EndpointStore>,
    asked: std::cell::Cell<u32>,
}

pub(crate) fn load(text: &str, alpha: bool) -> Result<ResolvedConfig, String> {
    let options = LoadOptions {
        allow_experimental: alpha,
    };
    ConfigLoader::new(options, builtin::registry())
        .load(Some(text))
        .map_err(|e| e.to_string())
}

impl Pool {
    pub(crate) fn new(config: ResolvedConfig) -> Self {
        let store = Arc::new(EndpointStore::default());
        for listener in &config.listeners {
            store.subscribe(Arc::clone(listener));
        }
        let options = DirectorOptions {
            ignore_subset: false,
            emit_scores: false,
            strip_control_headers: true,
            seed: Some(7),
        };
        let active = config.activate();
        Self {
            director: Director::new(Arc::clone(&store), active, options, Metrics::new()),
            config,
            store,
            asked: std::cell::Cell::new(0),
        }
    }

    /// Makes the pool these endpoints. One whose name and labels are as before is the same one.
    pub(crate) fn set(&self, nodes: &[Node]) {
        let specs = nodes.iter().enumerate().map(|(position, node)| {
            let port = 8000 + u16::try_from(position).unwrap();
            EndpointSpec {
                name: node.name.to_owned(),
                namespace: "default".to_owned(),
                address: ([10, 0, 0, 1], port).into(),
                labels: node.labels.clone(),
                rank: 0,
                details: EndpointDetails::default(),
            }
        });
        self.store.replace(specs.collect());
        for (endpoint, node) in self.store.snapshot().iter().zip(nodes) {
            endpoint.set_metrics(node.metrics.clone());
            let load = endpoint.in_flight(InFlightSlot::default());
            load.book(node.load.0 - load.requests(), node.load.1 - load.tokens());
        }
    }

    pub(crate) fn endpoint(&self, name: &str) -> Arc<Endpoint> {
        let pool = self.store.snapshot();
        let found = pool.iter().find(|e| e.spec.name == name);
        Arc::clone(found.unwrap())
    }

    /// Where a completion of `prompt` goes, with another request id each time. It ends at once.
    pub(crate) fn pick(&self, prompt: &str) -> String {
        let body = format!(r#"{{"model": "m", "prompt": "{prompt}"}}"#);
        self.pick_body("/v1/completions", &body, &[])
    }

    pub(crate) fn pick_body(&self, path: &str, body: &str, headers: &[(&str, &str)]) -> String {
        let names = self.names(&self.decide(path, body, headers).destination);
        names.first().unwrap().clone()
    }

    /// Names behind a list of addresses.
    pub(crate) fn names(&self, destination: &Bytes) -> Vec<String> {
        let addresses = String::from_utf8(destination.to_vec()).unwrap();
        let pool = self.store.snapshot();
        let name = |address: &str| {
            let endpoint = pool.iter().find(|e| e.host_port_str() == address).unwrap();
            endpoint.spec.name.clone()
        };
        addresses.split(',').map(name).collect()
    }

    pub(crate) fn decide(&self, path: &str, body: &str, headers: &[(&str, &str)]) -> Box<Decision> {
        self.try_decide(path, body, headers).unwrap()
    }

    pub(crate) fn try_decide(
        &self,
        path: &str,
        body: &str,
        headers: &[(&str, &str)],
    ) -> Result<Box<Decision>, String> {
        match self.begin(path, body, headers) {
            Step::Done(decision) => decision.map_err(|e| e.to_string()),
            Step::Wait(_) => panic!("this document waits"),
        }
    }

    fn begin(&self, path: &str, body: &str, headers: &[(&str, &str)]) -> Step {
        self.asked.set(self.asked.get() + 1);
        let id = format!("request-{}", self.asked.get());
        // A request may bring an id of its own, or an empty one, which is as good as none.
        let id = if headers.iter().any(|(name, _)| *name == "x-request-id") {
            None
        } else {
            Some(("x-request-id", id.as_str()))
        };
        let lines: Vec<_> = std::iter::once((":path", path)).chain(id).collect();
        let intake = Intake {
            headers: lines
                .iter()
                .chain(headers)
                .map(|(k, v)| ((*k).to_owned(), Bytes::copy_from_slice(v.as_bytes())))
                .collect(),
            body: [Bytes::copy_from_slice(body.as_bytes())]
                .into_iter()
                .collect(),
            early: None,
            subset: Subset::Any,
            received_at: Instant::now(),
            trace: pinpod::telemetry::trace::Span::default(),
        };
        self.director.decide(intake, BodyKnowledge::Complete)
    }

    /// Where completions of `prompts` go that arrive together and may wait for each other.
    pub(crate) fn together(&self, prompts: &[&str]) -> Vec<String> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        let _context = runtime.enter();
        let begun: Vec<Step> = prompts
            .iter()
            .map(|prompt| {
                let body = format!(r#"{{"model": "m", "prompt": "{prompt}"}}"#);
                self.begin("/v1/completions", &body, &[])
            })
            .collect();
        let name = |step| {
            let decision = runtime.block_on(self.finish(step)).unwrap();
            self.names(&decision.destination).remove(0)
        };
        begun.into_iter().map(name).collect()
    }

    async fn finish(&self, mut step: Step) -> Result<Box<Decision>, String> {
        loop {
            match step {
                Step::Done(decision) => return decision.map_err(|e| e.to_string()),
                Step::Wait(mut waiting) => {
                    let prepared = std::future::poll_fn(|cx| waiting.poll(cx)).await;
                    step = self.director.resume(*waiting, prepared);
                }
            }
        }
    }

    /// The different answers to eight requests with the same prompt.
    pub(crate) fn answers(&self, prompt: &str) -> Vec<String> {
        let mut names: Vec<String> = (0..8).map(|_| self.pick(prompt)).collect();
        names.sort_unstable();
        names.dedup();
        names
    }
}

/// A prompt of about ten 64-token blocks, different for each `topic`.
pub(crate) fn prompt(topic: &str) -> String {
    format!("{topic} and what else there is to say of it. ").repeat(60)
}
