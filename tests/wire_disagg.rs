//! Stages on endpoints of their own, as Envoy sees the decision: destination, headers, accounting.

use std::net::SocketAddr;

use pinpod::datalayer::{EndpointDetails, EndpointSpec};

use super::*;

const PD: &str = "apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- {type: encode-filter}
- {type: prefill-filter}
- {type: decode-filter}
- {type: queue-scorer}
- {type: always-disagg-multimodal-decider}
- {type: prefix-based-pd-decider, parameters: {nonCachedTokens: 16}}
- type: disagg-profile-handler
  parameters: {deciders: {encode: always-disagg-multimodal-decider, prefill: prefix-based-pd-decider}}
schedulingProfiles:
- {name: encode, plugins: [{pluginRef: encode-filter}, {pluginRef: queue-scorer}]}
- {name: prefill, plugins: [{pluginRef: prefill-filter}, {pluginRef: queue-scorer}]}
- {name: decode, plugins: [{pluginRef: decode-filter}, {pluginRef: queue-scorer}]}
";

const DECODE: &str = "10.0.0.1:8000";
const PREFILL: &str = "10.0.0.2:8000";
const ENCODE: &str = "[fd00::3]:8000";

/// The headers that steer a sidecar.
const STEERING: [&str; 4] = [
    "x-prefiller-host-port",
    "x-encoder-hosts-ports",
    "x-data-parallel-host-port",
    "x-kv-cache-source-host-port",
];

/// A picker over endpoints of these roles.
fn with_roles(config: &str, roles: &[(&str, &str)]) -> Picker {
    let picker = picker_with(Some(config), "10.9.9.9:1");
    let specs = roles.iter().map(|(role, address)| EndpointSpec {
        name: format!("{role}-{address}"),
        namespace: "default".to_owned(),
        address: address.parse::<SocketAddr>().unwrap(),
        labels: [("llm-d.ai/role".to_owned(), (*role).to_owned())].into(),
        rank: 0,
        details: EndpointDetails::default(),
    });
    picker.store.replace(specs.collect());
    picker
}

fn all_roles() -> Picker {
    let roles = [("decode", DECODE), ("prefill", PREFILL), ("encode", ENCODE)];
    with_roles(PD, &roles)
}

/// Requests in flight on the endpoint with this address.
fn load(picker: &Picker, address: &str) -> i64 {
    let pool = picker.store.snapshot();
    let found = pool.iter().find(|e| e.host_port_str() == address).unwrap();
    found.in_flight(InFlightSlot::default()).requests()
}

/// A client that forges every steering header.
fn forged(path: &str, more: &[(&str, &str)]) -> ProcessingRequest {
    let mut lines = vec![(":path", path), ("x-request-id", "id")];
    lines.extend(STEERING.map(|name| (name, "192.0.2.1:1")));
    lines.extend(more);
    message(Request::RequestHeaders(headers(&lines, false)))
}

fn completion(prompt: &str) -> Vec<u8> {
    format!(r#"{{"model":"m","prompt":"{prompt}"}}"#).into_bytes()
}

/// A prompt of some 100 tokens about `topic`.
fn long(topic: &str) -> Vec<u8> {
    completion(&format!("{topic} and what there is to say. ").repeat(16))
}

/// Destination, prefill and encode header of the reply; checks that what is not set is removed.
fn steering(reply: &ProcessingResponse) -> [Option<String>; 3] {
    let set = set_headers(reply);
    let removed = common(reply).header_mutation.unwrap().remove_headers;
    for name in STEERING {
        let times = removed.iter().filter(|r| *r == name).count();
        assert_eq!(
            times,
            usize::from(!set.contains_key(name)),
            "{name}: {removed:?}"
        );
    }
    ["x-gateway-destination-endpoint", STEERING[0], STEERING[1]].map(|name| set.get(name).cloned())
}

fn routed(picker: &Picker, path: &str, body: &[u8]) -> [Option<String>; 3] {
    let mut exchange = picker.exchange();
    let replies = run(&mut exchange, [forged(path, &[]), request_body(body, true)]);
    steering(&replies[0])
}

fn some<const N: usize>(values: [&str; N]) -> [Option<String>; N] {
    values.map(|value| (!value.is_empty()).then(|| value.to_owned()))
}

#[test]
fn long_cold_prompts_go_through_prefill_and_nothing_forged_survives() {
    let picker = all_roles();
    let ask = |body: &[u8]| routed(&picker, "/v1/completions", body);
    assert_eq!(ask(&long("rivers")), some([DECODE, PREFILL, ""]));
    assert_eq!(
        ask(&long("rivers")),
        some([DECODE, "", ""]),
        "cached on the decode endpoint"
    );
    assert_eq!(ask(&completion("hi")), some([DECODE, "", ""]), "short");
    let image = br#"{"model":"m","messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"https://pictures.test/a.png"}}]}]}"#;
    let staged = routed(&picker, "/v1/chat/completions", image);
    assert_eq!(staged, some([DECODE, PREFILL, ENCODE]));
    assert_eq!(picker.in_flight(), 0, "every stream ended");
}

#[test]
fn a_stage_that_nobody_can_do_is_done_by_decode() {
    let picker = with_roles(PD, &[("decode", DECODE)]);
    let staged = routed(&picker, "/v1/completions", &long("rivers"));
    assert_eq!(staged, some([DECODE, "", ""]));
}

#[test]
fn without_a_decode_endpoint_the_request_is_refused() {
    let picker = with_roles(PD, &[("prefill", PREFILL), ("encode", ENCODE)]);
    let mut exchange = picker.exchange();
    let replies = run(
        &mut exchange,
        [
            forged("/v1/completions", &[]),
            request_body(&long("rivers"), true),
        ],
    );
    let (status, text) = immediate(&replies[0]);
    assert_eq!(status, 429);
    assert!(
        text.contains("failed to find available decode workers"),
        "{text}"
    );
    assert_eq!(picker.in_flight(), 0);
}

#[test]
fn buffered_and_header_only_requests_are_stripped_too() {
    let picker = all_roles();
    let mut exchange = picker.exchange();
    let first = with_modes(
        forged("/v1/completions", &[]),
        BodySendMode::Buffered,
        BodySendMode::None,
        false,
    );
    let mut replies = run(&mut exchange, [first]);
    replies.extend(run(&mut exchange, [request_body(&long("rivers"), true)]));
    let decided = replies
        .iter()
        .find(|r| set_headers(r).contains_key("x-gateway-destination-endpoint"));
    assert_eq!(steering(decided.unwrap()), some([DECODE, PREFILL, ""]));

    let mut exchange = picker.exchange();
    let lines = [(":path", "/v1/models"), (STEERING[0], "192.0.2.1:1")];
    let get = message(Request::RequestHeaders(headers(&lines, true)));
    let replies = run(&mut exchange, [get]);
    let [_, prefill, encode] = steering(&replies[0]);
    assert_eq!((prefill, encode), (None, None));
}

#[test]
fn prefill_is_booked_until_the_first_byte_and_decode_until_the_end() {
    let picker = all_roles();
    let loads = |picker: &Picker| [PREFILL, DECODE].map(|address| load(picker, address));
    let begin = |topic: &str| {
        let mut exchange = picker.exchange();
        let request = [
            forged("/v1/completions", &[]),
            request_body(&long(topic), true),
        ];
        run(&mut exchange, request);
        exchange
    };
    let mut exchange = begin("rivers");
    assert_eq!(loads(&picker), [1, 1]);
    run(&mut exchange, [response_headers(false)]);
    assert_eq!(
        loads(&picker),
        [1, 1],
        "an engine answers headers before it computed anything"
    );
    run(&mut exchange, [response_body(b"data: {}\n\n", false)]);
    assert_eq!(loads(&picker), [0, 1]);
    run(&mut exchange, [response_body(b"data: {}\n\n", false)]);
    assert_eq!(loads(&picker), [0, 1], "released once");
    run(&mut exchange, [response_body(b"", true)]);
    assert_eq!(loads(&picker), [0, 0]);
    drop(exchange);
    assert_eq!(loads(&picker), [0, 0]);

    // A client that leaves at any stage leaves nothing behind.
    for stage in 0..3 {
        let mut exchange = begin(&format!("topic {stage}"));
        assert_eq!(loads(&picker), [1, 1]);
        let rest = [response_headers(false), response_body(b"x", false)];
        run(&mut exchange, rest.into_iter().take(stage));
        drop(exchange);
        assert_eq!(loads(&picker), [0, 0], "stage {stage}");
    }
}

#[test]
fn conditional_decode_needs_a_cached_prefix_on_the_pick() {
    let picker = with_roles(PD, &[("decode", DECODE)]);
    let ask = |prefer: &str| {
        let mut exchange = picker.exchange();
        let first = forged("/v1/completions", &[("prefer", prefer)]);
        run(&mut exchange, [first, request_body(&long("rivers"), true)]).remove(0)
    };
    let refused = ask("respond-async, If-Available; wait=10");
    assert_eq!(
        immediate(&refused),
        (
            412,
            "inference error: PreconditionFailed - no decode worker has the requested KV cache"
                .to_owned()
        ),
    );
    assert_eq!(steering(&ask("respond-async")), some([DECODE, "", ""]));
    assert_eq!(
        steering(&ask("if-available")),
        some([DECODE, "", ""]),
        "cached now"
    );
}

#[test]
fn a_header_names_the_stage_for_a_coordinator() {
    let config = "apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- {type: header-profile-handler}
- {type: encode-filter}
- {type: prefill-filter}
- {type: decode-filter}
schedulingProfiles:
- {name: encode, plugins: [{pluginRef: encode-filter}]}
- {name: prefill, plugins: [{pluginRef: prefill-filter}]}
- {name: decode, plugins: [{pluginRef: decode-filter}]}
";
    let roles = [("decode", DECODE), ("prefill", PREFILL), ("encode", ENCODE)];
    let picker = with_roles(config, &roles);
    for (profile, wanted) in [
        ("encode", ENCODE),
        ("prefill", PREFILL),
        ("decode", DECODE),
        ("", DECODE),
    ] {
        let first = forged("/v1/completions", &[("epp-profile", profile)]);
        let mut exchange = picker.exchange();
        let replies = run(&mut exchange, [first, request_body(BODY, true)]);
        assert_eq!(steering(&replies[0]), some([wanted, "", ""]), "{profile}");
    }
}

#[test]
fn ranks_behind_one_port_are_named_in_a_header() {
    let config = "apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- {type: data-parallel-profile-handler}
- {type: decode-filter}
- {type: queue-scorer}
schedulingProfiles:
- {name: default, plugins: [{pluginRef: decode-filter}, {pluginRef: queue-scorer}]}
";
    let roles = [("prefill", "10.0.0.1:8000"), ("decode", "10.0.0.1:8001")];
    let picker = with_roles(config, &roles);
    let mut exchange = picker.exchange();
    let first = forged("/v1/completions", &[]);
    let replies = run(&mut exchange, [first, request_body(BODY, true)]);
    assert_eq!(steering(&replies[0])[0].as_deref(), Some("10.0.0.1:8000"));
    let set = set_headers(&replies[0]);
    assert_eq!(set["x-data-parallel-host-port"], "10.0.0.1:8001");
    let metadata = format!("{:?}", replies[0].dynamic_metadata);
    assert!(!metadata.contains("endpoint-scores"), "{metadata}");
    assert!(metadata.contains("10.0.0.1:8000"), "{metadata}");
    assert_eq!(load(&picker, "10.0.0.1:8001"), 1, "the rank is booked");
}

#[test]
fn a_deprecated_handler_and_its_headers_plugin_work_together() {
    let config = "apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- {type: prefill-header-handler, parameters: {prefillProfile: first}}
- {type: always-disagg-pd-decider}
- {type: pd-profile-handler, parameters: {prefillProfile: first, deciderPluginName: always-disagg-pd-decider, primaryPort: 9000}}
- {type: prefill-filter}
- {type: decode-filter}
schedulingProfiles:
- {name: first, plugins: [{pluginRef: prefill-filter}]}
- {name: decode, plugins: [{pluginRef: decode-filter}]}
";
    let picker = with_roles(config, &[("decode", DECODE), ("prefill", PREFILL)]);
    let mut exchange = picker.exchange();
    let first = forged("/v1/completions", &[]);
    let replies = run(&mut exchange, [first, request_body(BODY, true)]);
    assert_eq!(steering(&replies[0]), some(["10.0.0.1:9000", PREFILL, ""]));
    assert_eq!(
        set_headers(&replies[0])["x-data-parallel-host-port"],
        DECODE
    );
    // The stage is known as prefill, whatever its profile is called: released at the first byte.
    assert_eq!(load(&picker, PREFILL), 1);
    run(
        &mut exchange,
        [response_headers(false), response_body(b"x", false)],
    );
    assert_eq!(load(&picker, PREFILL), 0);
}
