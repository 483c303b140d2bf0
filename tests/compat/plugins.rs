//! The plugin list and the definitions it is made from.

use std::path::Path;

use pinpod::config::{PluginType, builtin, show};
use pinpod::plugin::{Build, DataKeys, Parameters};
use pinpod::scheduling::Decider;
use pinpod::scheduling::deciders::AlwaysDecider;
use serde_json::{Map, Value, json};

/// Parameters without which a type cannot be built.
const REQUIRED: &[(&str, &str)] = &[
    ("file-discovery", r#"{"path": "/endpoints.yaml"}"#),
    (
        "multicluster-file-discovery",
        r#"{"path": "/clusters.yaml"}"#,
    ),
    (
        "k8s-notification-source",
        r#"{"version": "v1", "kind": "Pod"}"#,
    ),
    ("by-label", r#"{"label": "tier", "validValues": ["gold"]}"#),
    (
        "utilization-filter",
        r#"{"conditions": [{"metric": "waiting-queue", "maxValue": 1}]}"#,
    ),
    (
        "endpoint-attribute-filter",
        r#"{"attribute": "a", "algorithm": {"type": "threshold", "threshold": {"operator": "Equal", "value": 1}}}"#,
    ),
    (
        "endpoint-attribute-scorer",
        r#"{"attributeKey": "a", "algorithm": {"type": "linear_lower_is_better"}}"#,
    ),
    (
        "header-label-affinity-scorer",
        r#"{"headerName": "x-slice", "labelKey": "slice"}"#,
    ),
    ("session-id-producer", r#"{"headerName": "x-session"}"#),
    (
        "request-attribute-reporter",
        r#"{"attributes": [{"key": {"name": "cost"}, "expression": "usage.prompt_tokens"}]}"#,
    ),
    (
        "disaggregatedset-rollout-screener",
        r#"{"scope": {"labelSelector": "a=b"}, "revisionGating": {"mode": "disabled"}}"#,
    ),
];

#[test]
fn the_reference_page_is_current() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/config/PLUGINS.md");
    let page = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        page == show::plugins(&builtin::registry()),
        "deploy/config/PLUGINS.md is out of date: run `make docs`"
    );
}

#[test]
fn every_type_of_the_catalogue_is_listed_once() {
    // The catalogue: kinds, Beta and Alpha, deprecated names.
    const CATALOGUE: &str = "label-selector-filter decode-filter prefill-filter encode-filter \
        prefix-cache-affinity-filter slo-headroom-tier-filter context-length-aware \
        utilization-detector concurrency-detector header-based-testing-filter utilization-filter \
        endpoint-attribute-filter session-affinity-filter topology-affinity-filter \
        multicluster-session-affinity-filter queue-scorer kv-cache-utilization-scorer \
        running-requests-size-scorer load-aware-scorer prefix-cache-scorer no-hit-lru-scorer \
        lora-affinity-scorer active-request-scorer token-load-scorer latency-scorer \
        mm-embeddings-cache-scorer session-affinity-scorer header-label-affinity-scorer \
        endpoint-attribute-scorer topology-affinity-scorer multicluster-queue-scorer \
        multicluster-kv-cache-utilization-scorer multicluster-prefix-cache-scorer max-score-picker \
        random-picker weighted-random-picker single-profile-handler disagg-profile-handler \
        data-parallel-profile-handler header-profile-handler prefix-based-pd-decider \
        always-disagg-pd-decider always-disagg-multimodal-decider token-producer \
        approx-prefix-cache-producer precise-prefix-cache-producer inflight-load-producer \
        predicted-latency-producer mm-embeddings-cache-producer session-id-producer \
        burst-prefix-cache-producer p2p-source-producer multicluster-approx-prefix-cache-producer \
        metrics-data-source models-data-source k8s-notification-source \
        endpoint-notification-source dcgm-data-source multicluster-metrics-data-source \
        core-metrics-extractor models-data-extractor dcgm-extractor topology-extractor \
        multicluster-metrics-extractor file-discovery multicluster-file-discovery openai-parser \
        anthropic-parser vllmhttp-parser sglanghttp-parser vllmgrpc-parser vertexai-parser \
        passthrough-parser latency-slo-admitter probabilistic-admitter \
        disaggregatedset-rollout-screener agent-identity request-attribute-reporter \
        destination-endpoint-served-verifier global-strict-fairness-policy \
        round-robin-fairness-policy program-aware-fairness fcfs-ordering-policy \
        edf-ordering-policy slo-deadline-ordering-policy static-usage-limit-policy \
        priority-holdback-policy soft-reflective-ceiling-policy by-label-selector by-label \
        disagg-headers-handler prefill-header-handler pd-profile-handler tokenizer \
        precise-prefix-cache-scorer";
    let registry = builtin::registry();
    for name in CATALOGUE.split_whitespace() {
        let entries = registry.types().iter().filter(|t| t.type_name == name);
        assert_eq!(entries.count(), 1, "{name}");
    }
    for plugin in registry.types() {
        assert!(!plugin.kinds.is_empty(), "{} has no kind", plugin.type_name);
        assert!(
            !plugin.about.is_empty(),
            "{} says nothing",
            plugin.type_name
        );
    }
}

#[test]
fn the_list_for_programs_says_the_same() {
    let list: Vec<Value> = serde_json::from_str(&show::plugins_json(&builtin::registry())).unwrap();
    let picker = list
        .iter()
        .find(|p| p["type"] == "max-score-picker")
        .unwrap();
    assert_eq!(
        *picker,
        json!({
            "type": "max-score-picker",
            "kinds": ["picker"],
            "maturity": "beta",
            "available": true,
            "deprecated": null,
            "ignoresParameters": false,
            "about": picker["about"],
            "parameters": [{
                "name": "maxNumOfEndpoints",
                "type": "int",
                "default": 1,
                "defaultText": "1",
                "help": picker["parameters"][0]["help"],
            }],
        })
    );
}

/// Builds an instance and shows what it became. Maps print in any order, so the letters are sorted.
fn built(plugin: &PluginType, parameters: Map<String, Value>) -> Result<String, String> {
    let mut keys = DataKeys::default();
    keys.enter("name");
    // The deprecated handler refers to it unless told otherwise.
    let decider: std::sync::Arc<dyn Decider> = std::sync::Arc::new(AlwaysDecider);
    keys.offer("prefix-based-pd-decider", decider);
    let parameters = Parameters(Some(Value::Object(parameters)));
    let mut build = Build {
        name: "name",
        parameters: &parameters,
        keys: &mut keys,
    };
    let roles = plugin
        .build(&mut build)
        .unwrap()
        .map_err(|e| e.to_string())?;
    let mut letters: Vec<char> = format!("{roles:?}").chars().collect();
    letters.sort_unstable();
    Ok(letters.into_iter().collect())
}

#[test]
fn documented_parameters_are_the_accepted_ones_and_so_are_their_defaults() {
    for plugin in builtin::registry().types() {
        if !plugin.is_available() {
            continue;
        }
        let name = plugin.type_name;
        let required = REQUIRED.iter().find(|(n, _)| *n == name);
        let required: Map<String, Value> =
            required.map_or_else(Map::new, |(_, json)| serde_json::from_str(json).unwrap());
        let bare = built(plugin, required.clone()).unwrap_or_else(|e| panic!("{name}: {e}"));
        for parameter in plugin.parameters {
            let mut given = required.clone();
            let value = parameter.default_value().unwrap_or(Value::Null);
            if !required.contains_key(parameter.name) {
                given.insert(parameter.name.to_uppercase(), value.clone());
            }
            let with = built(plugin, given)
                .unwrap_or_else(|e| panic!("{name} refuses {}: {value}: {e}", parameter.name));
            assert!(
                with == bare,
                "{name}: {value} is not the default of {}",
                parameter.name
            );
        }
        let mut unknown = required;
        unknown.insert("notAParameter".into(), json!(1));
        assert_eq!(built(plugin, unknown).is_ok(), plugin.lenient, "{name}");
    }
}
