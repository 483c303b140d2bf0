//! What lies in slower memory, told by KV events, where endpoints are chosen: it ranks lower, but it need
//! not be computed, and host memory is what peers can be sent.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use pinpod::datalayer::{EndpointDetails, EndpointSpec};

use super::*;

/// 20 full blocks of 16 and six tokens more.
const PROMPT: std::ops::RangeInclusive<u32> = 1..=326;
const DOCUMENT: &str = "apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- {type: precise-prefix-cache-producer, parameters: {kvEventsConfig: {zmqEndpoint: 'tcp://SOCKET'}}}
- {type: prefill-filter}
- {type: decode-filter}
- {type: prefix-based-pd-decider, parameters: {nonCachedTokens: MISSING}}
- type: disagg-profile-handler
  parameters: {deciders: {prefill: prefix-based-pd-decider} PAIRING}
schedulingProfiles:
- {name: prefill, plugins: [{pluginRef: prefill-filter}]}
- {name: decode, plugins: [{pluginRef: decode-filter}]}
";

/// An endpoint with a role, and what its events told: leading blocks of the prompt, and in which memory.
struct Node {
    name: &'static str,
    role: &'static str,
    held: Option<(usize, &'static str)>,
}

const fn node(name: &'static str, role: &'static str) -> Node {
    Node {
        name,
        role,
        held: None,
    }
}

impl Node {
    const fn holds(self, blocks: usize, medium: &'static str) -> Self {
        Self {
            held: Some((blocks, medium)),
            ..self
        }
    }

    fn spec(&self) -> EndpointSpec {
        EndpointSpec {
            name: self.name.to_owned(),
            namespace: "default".to_owned(),
            address: self.name.parse::<SocketAddr>().unwrap(),
            labels: [("llm-d.ai/role".to_owned(), self.role.to_owned())].into(),
            rank: 0,
            details: EndpointDetails::default(),
        }
    }
}

/// Destination, then the header called `header`, for the prompt once all events were applied.
async fn decide(document: &str, nodes: &[Node], header: &str) -> (String, Option<String>) {
    exposition();
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let socket = free.local_addr().unwrap();
    drop(free);
    let document = document.replace("SOCKET", &socket.to_string());
    let options = LoadOptions {
        allow_experimental: true,
    };
    let config = load(Some(&document), &options, &builtin::registry()).unwrap();
    let store = Arc::new(EndpointStore::default());
    for listener in &config.listeners {
        store.subscribe(Arc::clone(listener));
    }
    store.replace(nodes.iter().map(Node::spec).collect());
    let options = DirectorOptions {
        ignore_subset: false,
        emit_scores: false,
        strip_control_headers: true,
        seed: Some(1),
    };
    let director = Director::new(store, config.activate(), options, Metrics::new());

    let mut engines = Vec::new();
    for node in nodes {
        let mut engine = Engine::start(socket, node.name).await;
        if let Some((blocks, medium)) = node.held {
            let hashes: Vec<u64> = (1..).take(blocks).collect();
            let ids: Vec<u32> = PROMPT.take(blocks * BLOCK).collect();
            let payload = events::stored_in(medium, 0, &hashes, &ids, None, None);
            let seq = 0_u64.to_be_bytes();
            let frames = message(&[engine.topic.as_bytes(), &seq, &payload]);
            engine.stream.write_all(&frames).await.unwrap();
        }
        engines.push(engine);
    }
    let told = nodes.iter().filter(|node| node.held.is_some()).count() as u64;
    let mut polls = 0;
    loop {
        let overview = director.overview();
        let publishers = &overview["producers"]["precise-prefix-cache-producer"]["publishers"];
        let applied = publishers.as_array().into_iter().flatten();
        let applied = applied.filter_map(|p| p["stats"]["applied"].as_u64());
        if applied.sum::<u64>() >= told {
            break;
        }
        polls += 1;
        assert!(polls < 4000, "events do not arrive: {overview}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }

    let mut headers = Headers::default();
    headers.push(":path".to_owned(), Bytes::from_static(b"/v1/completions"));
    let body = json!({"model": "base", "prompt": PROMPT.collect::<Vec<u32>>()}).to_string();
    let intake = Intake {
        headers,
        body: Body::from(body.as_str()),
        early: None,
        subset: Subset::Any,
        received_at: Instant::now(),
        trace: pinpod::telemetry::trace::Span::default(),
    };
    let Step::Done(decision) = director.decide(intake, BodyKnowledge::Complete) else {
        panic!("nothing to wait for");
    };
    let decision = decision.unwrap();
    let text = |value: &Bytes| String::from_utf8(value.to_vec()).unwrap();
    let set = decision
        .set_headers
        .iter()
        .find(|(name, _)| *name == header);
    (
        text(&decision.destination),
        set.map(|(_, value)| text(value)),
    )
}

const D1: &str = "10.2.0.1:8000";
const D2: &str = "10.2.0.2:8000";
const P1: &str = "10.2.0.3:8000";
const P2: &str = "10.2.0.4:8000";
const PREFILL: &str = "x-prefiller-host-port";

#[tokio::test]
async fn what_is_cached_in_any_memory_need_not_be_computed() {
    // 326 - 10 * 16 = 166 are missing. By rank, 0.8 * 10 blocks, it would be 198.
    for (missing, split) in [(166, true), (167, false), (198, false)] {
        let document = DOCUMENT
            .replace("MISSING", &missing.to_string())
            .replace("PAIRING", "");
        let nodes = [node(D1, "decode").holds(10, "CPU"), node(P1, "prefill")];
        let (decode, prefill) = decide(&document, &nodes, PREFILL).await;
        assert_eq!(decode, D1);
        assert_eq!(prefill.as_deref(), split.then_some(P1), "{missing}");
    }
    // In the memory that ranks highest it is the same.
    let document = DOCUMENT.replace("MISSING", "167").replace("PAIRING", "");
    let nodes = [node(D1, "decode").holds(10, "GPU"), node(P1, "prefill")];
    assert_eq!(decide(&document, &nodes, PREFILL).await.1, None);
}

#[tokio::test]
async fn a_pair_costs_what_has_to_be_computed_and_sent() {
    // Prefill at 0.1 ms a token: P1 16.6 ms, P2 0.1 * (326 - 9 * 16) = 18.2; by rank P1 would be at 19.8.
    // Transfer at 0.1 ms: D1 16.6, D2 18.2, and by rank the other way round as well.
    let pairing = ", pairing: {prefillTokensPerSecond: 10000, decodeMsPerRequest: 0, transferMsPer1kTokens: {unknown: 100}}";
    let document = DOCUMENT.replace("MISSING", "1").replace("PAIRING", pairing);
    let nodes = [
        node(D1, "decode").holds(10, "CPU"),
        node(D2, "decode").holds(9, "GPU"),
        node(P1, "prefill").holds(10, "CPU"),
        node(P2, "prefill").holds(9, "GPU"),
    ];
    let chosen = decide(&document, &nodes, PREFILL).await;
    assert_eq!(chosen, (D1.to_owned(), Some(P1.to_owned())));
}

#[tokio::test]
async fn a_peer_is_asked_for_what_its_host_memory_holds() {
    let document = "apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- {type: precise-prefix-cache-producer, parameters: {kvEventsConfig: {zmqEndpoint: 'tcp://SOCKET'}}}
- {type: p2p-source-producer, parameters: {prefixMatchInfoProducerName: precise-prefix-cache-producer}}
- {type: label-selector-filter, parameters: {matchLabels: {llm-d.ai/role: decode}}}
schedulingProfiles:
- {name: default, plugins: [{pluginRef: label-selector-filter}]}
";
    // The first has more, but only in GPU memory, from where nothing is sent.
    let nodes = [
        node(D1, "decode"),
        node(P1, "other").holds(10, "GPU"),
        node(P2, "other").holds(6, "CPU"),
    ];
    let chosen = decide(document, &nodes, "x-kv-cache-source-host-port").await;
    assert_eq!(chosen, (D1.to_owned(), Some(P2.to_owned())));
}
