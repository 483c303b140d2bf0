//! Documents with stages on endpoints of their own: what they are for, seen at the decision.

use super::pool::{Pool, load, node, prompt};

pub(crate) const PD: &str = include_str!("../../deploy/config/pd.yaml");
pub(crate) const EPD: &str = include_str!("../../deploy/config/epd.yaml");

fn shipped(text: &str) -> Pool {
    Pool::new(load(text, false).unwrap())
}

/// Where a request goes: the destination, then `prefill=` and `encode=` as far as there are such headers.
fn stages_of(pool: &Pool, path: &str, body: &str) -> String {
    let decision = pool.decide(path, body, &[]);
    let mut text = pool.names(&decision.destination).join("+");
    for (header, stage) in [
        ("x-encoder-hosts-ports", "encode"),
        ("x-prefiller-host-port", "prefill"),
    ] {
        let set = decision
            .set_headers
            .iter()
            .find(|(name, _)| *name == header);
        let removed = decision.remove_headers.iter().any(|name| name == header);
        assert_ne!(set.is_some(), removed, "{header} is set or removed");
        if let Some((_, value)) = set {
            text += &[" ", stage, "=", &pool.names(value).join("+")].concat();
        }
    }
    text
}

fn stages(pool: &Pool, prompt: &str) -> String {
    let body = format!(r#"{{"model": "m", "prompt": "{prompt}"}}"#);
    stages_of(pool, "/v1/completions", &body)
}

fn stages_of_image(pool: &Pool) -> String {
    let body = r#"{"model": "m", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://pictures.test/boat.png"}}, {"type": "text", "text": "?"}]}]}"#;
    stages_of(pool, "/v1/chat/completions", body)
}

fn decode_is_needed(pool: &Pool) {
    pool.set(&[node("p").role("prefill"), node("e").role("encode")]);
    let error = pool
        .try_decide("/v1/completions", r#"{"model": "m", "prompt": "p"}"#, &[])
        .unwrap_err();
    assert!(
        error.contains("failed to find available decode workers"),
        "{error}"
    );
}

/// A cold prompt of some 640 tokens goes through prefill, the same one again does not, nor does one below
/// the bound, which is at most 16 tokens, or any when there is no prefill endpoint.
pub(crate) fn cold_prompts_prefill_elsewhere(pool: &Pool) {
    pool.set(&[node("p").role("prefill"), node("d").role("decode")]);
    assert_eq!(stages(pool, &prompt("rivers")), "d prefill=p");
    assert_eq!(stages(pool, &prompt("rivers")), "d");
    assert_eq!(stages(pool, "hi"), "d");
    pool.set(&[node("d").role("decode")]);
    assert_eq!(stages(pool, &prompt("lamps")), "d");
    decode_is_needed(pool);
}

/// As above, and the prefill endpoint is one of the decode endpoint's zone, whatever the list's order.
pub(crate) fn prefill_is_near(pool: &Pool) {
    let zone = "topology.kubernetes.io/zone";
    pool.set(&[
        node("p1").role("prefill").label(zone, "1"),
        node("p2").role("prefill").label(zone, "2"),
        node("d2").role("decode").label(zone, "2"),
    ]);
    assert_eq!(stages(pool, &prompt("rivers")), "d2 prefill=p2");
    pool.set(&[
        node("p1").role("prefill").label(zone, "1"),
        node("p2").role("prefill").label(zone, "2"),
        node("d1").role("decode").label(zone, "1"),
    ]);
    assert_eq!(stages(pool, &prompt("bridges")), "d1 prefill=p1");
    decode_is_needed(pool);
}

/// Images are encoded elsewhere, long prompts prefilled elsewhere; an image counts for its tokens.
pub(crate) fn images_and_cold_prompts_elsewhere(pool: &Pool) {
    pool.set(&[
        node("e").role("encode"),
        node("p").role("prefill"),
        node("d").role("decode"),
    ]);
    assert_eq!(stages_of_image(pool), "d encode=e prefill=p");
    assert_eq!(stages(pool, &prompt("rivers")), "d prefill=p");
    assert_eq!(stages(pool, "hi"), "d");
    // Nobody is left to encode, and what there is to prefill was seen before.
    pool.set(&[
        node("e").role("idle"),
        node("p").role("prefill"),
        node("d").role("decode"),
    ]);
    assert_eq!(stages_of_image(pool), "d");
    decode_is_needed(pool);
}

pub(crate) fn images_elsewhere(pool: &Pool) {
    pool.set(&[node("e").role("encode"), node("d").role("decode")]);
    assert_eq!(stages_of_image(pool), "d encode=e");
    assert_eq!(stages(pool, &prompt("rivers")), "d");
    decode_is_needed(pool);
}

/// Every prompt, however short and often seen.
pub(crate) fn prefill_always_elsewhere(pool: &Pool) {
    pool.set(&[
        node("p1").role("prefill").waiting(5),
        node("p2").role("prefill"),
        node("d").role("decode"),
    ]);
    let all: Vec<String> = (0..4).map(|_| stages(pool, "hi")).collect();
    assert!(all.iter().all(|s| s.starts_with("d prefill=p")), "{all:?}");
    pool.set(&[node("d").role("decode")]);
    assert_eq!(stages(pool, "hi"), "d");
    decode_is_needed(pool);
}

/// The decider's bound is 0, which never splits.
pub(crate) fn nothing_is_split(pool: &Pool) {
    pool.set(&[node("p").role("prefill"), node("d").role("decode")]);
    assert_eq!(stages(pool, &prompt("rivers")), "d");
    decode_is_needed(pool);
}

/// The request goes to the primary port, which is the first rank's, and a header names the rank.
pub(crate) fn the_rank_is_in_a_header(pool: &Pool) {
    pool.set(&[
        node("rank-0").role("prefill"),
        node("rank-1").role("decode"),
    ]);
    let body = r#"{"model": "m", "prompt": "p"}"#;
    let decision = pool.decide("/v1/completions", body, &[]);
    assert_eq!(pool.names(&decision.destination), ["rank-0"]);
    let header = decision
        .set_headers
        .iter()
        .find(|(name, _)| *name == "x-data-parallel-host-port");
    assert_eq!(pool.names(&header.unwrap().1), ["rank-1"]);
    assert!(decision.scores.is_none());
}

/// Neither role nor stage, only labels; the deprecated headers handler has nothing to say.
pub(crate) fn labels_beside_a_headers_handler(pool: &Pool) {
    pool.set(&[
        node("a").label("tier", "gold").label("zone", "b"),
        node("b").label("tier", "tin").label("zone", "a"),
        node("c")
            .label("tier", "gold")
            .label("zone", "a")
            .waiting(3),
        node("d").label("tier", "gold"),
    ]);
    assert_eq!(stages(pool, "hi"), "d");
}

#[test]
fn the_shipped_documents_split_what_is_worth_it() {
    let pool = shipped(PD);
    let nodes = [
        node("p1").role("prefill"),
        node("p2").role("prefill").load(1, 128_000),
        node("d").role("decode"),
    ];
    pool.set(&nodes);
    // Some 640 tokens: 512 and more are missing. p1 has less to compute.
    assert_eq!(stages(&pool, &prompt("rivers")), "d prefill=p1+p2");
    assert_eq!(stages(&pool, &prompt("rivers")), "d");
    assert_eq!(stages(&pool, &"a word ".repeat(200)), "d", "350 tokens");

    let pool = shipped(EPD);
    pool.set(&[
        node("e1").role("encode").waiting(1),
        node("e2").role("encode"),
        node("p").role("prefill"),
        node("d").role("decode"),
    ]);
    assert!(stages_of_image(&pool).starts_with("d encode=e2+e1"));
    assert_eq!(stages(&pool, "hi"), "d");
}

/// Samples of the contract (configuration, 14.3 and 14.4).
#[test]
fn published_samples_do_what_they_are_for() {
    const HEAD: &str = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\nplugins:\n";
    let pool = shipped(&format!(
        "{HEAD}- {{type: prefill-filter}}
- {{type: decode-filter}}
- {{name: long-cold-prompts, type: prefix-based-pd-decider, parameters: {{nonCachedTokens: 512, promptTokens: 1024}}}}
- type: disagg-profile-handler
  parameters:
    stageOrder: decode-first
    profiles: {{decode: decode, prefill: prefill}}
    deciders: {{prefill: long-cold-prompts}}
- {{type: prefix-cache-scorer}}
- {{type: queue-scorer}}
- {{type: active-request-scorer}}
- {{type: max-score-picker}}
schedulingProfiles:
- name: prefill
  plugins: [{{pluginRef: prefill-filter}}, {{pluginRef: prefix-cache-scorer, weight: 3}}, {{pluginRef: queue-scorer, weight: 2}}, {{pluginRef: max-score-picker}}]
- name: decode
  plugins: [{{pluginRef: decode-filter}}, {{pluginRef: active-request-scorer, weight: 2}}, {{pluginRef: prefix-cache-scorer, weight: 2}}, {{pluginRef: max-score-picker}}]
"
    ));
    pool.set(&[node("p").role("prefill"), node("d").role("decode")]);
    assert_eq!(
        stages(&pool, &prompt("rivers")),
        "d",
        "640 tokens are not long"
    );
    let long = format!("{}{}", prompt("bridges"), prompt("lamps"));
    assert_eq!(stages(&pool, &long), "d prefill=p");

    let pool = shipped(&format!(
        "{HEAD}- {{type: encode-filter}}
- {{type: prefill-filter}}
- {{type: decode-filter}}
- {{name: any-media, type: always-disagg-multimodal-decider}}
- {{name: split-always, type: always-disagg-pd-decider}}
- {{type: disagg-profile-handler, parameters: {{deciders: {{encode: any-media, prefill: split-always}}}}}}
- {{type: queue-scorer}}
- {{type: running-requests-size-scorer}}
- {{name: all-encoders, type: max-score-picker, parameters: {{maxNumOfEndpoints: 3}}}}
- {{name: one, type: max-score-picker}}
schedulingProfiles:
- name: encode
  plugins: [{{pluginRef: encode-filter}}, {{pluginRef: queue-scorer}}, {{pluginRef: all-encoders}}]
- name: prefill
  plugins: [{{pluginRef: prefill-filter}}, {{pluginRef: queue-scorer, weight: 2}}, {{pluginRef: one}}]
- name: decode
  plugins: [{{pluginRef: decode-filter}}, {{pluginRef: running-requests-size-scorer}}, {{pluginRef: one}}]
"
    ));
    pool.set(&[
        node("e1").role("encode"),
        node("e2").role("encode").waiting(1),
        node("e3").role("encode").waiting(2),
        node("p").role("prefill"),
        node("d").role("decode"),
    ]);
    assert_eq!(stages_of_image(&pool), "d encode=e1+e2+e3 prefill=p");
    assert_eq!(stages(&pool, "hi"), "d prefill=p");
}
