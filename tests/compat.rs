//! What users bring along: configuration documents, as they are published.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::too_many_lines,
    reason = "a test fails by panicking, and its tables are long"
)]

#[path = "compat/plugins.rs"]
mod plugins;
#[path = "tidy.rs"]
mod tidy;

use pinpod::config::{LoadOptions, builtin, load, show};

fn resolve(text: &str) -> Result<pinpod::config::ResolvedConfig, String> {
    load(Some(text), &LoadOptions::default(), &builtin::registry()).map_err(|e| e.to_string())
}

const HEAD: &str = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n";

#[test]
fn the_built_in_document_is_the_published_one() {
    let config = load(None, &LoadOptions::default(), &builtin::registry()).unwrap();
    let profile = &config.profiles[0];
    let weights: Vec<_> = profile
        .scorers
        .iter()
        .map(|(n, _, w)| (n.name.as_str(), *w))
        .collect();
    assert_eq!(
        weights,
        [
            ("queue-scorer", 2.0),
            ("kv-cache-utilization-scorer", 2.0),
            ("prefix-cache-scorer", 3.0)
        ]
    );
    assert_eq!(profile.picker.0.name, "max-score-picker");
    let producers: Vec<_> = config
        .producers
        .iter()
        .map(|(n, _)| n.name.as_str())
        .collect();
    assert_eq!(
        producers,
        [
            "token-producer",
            "approx-prefix-cache-producer",
            "inflight-load-producer"
        ]
    );
    assert_eq!(config.parsers.len(), 4);
    assert_eq!(config.sources.len(), 1);
}

#[test]
fn shipped_documents_load_without_warnings() {
    for text in [
        include_str!("../deploy/config/random.yaml"),
        include_str!("../deploy/config/recommended.yaml"),
    ] {
        let config = resolve(text).unwrap();
        assert!(config.warnings.is_empty(), "{:?}", config.warnings);
        assert!(
            show::resolved(&config, &builtin::registry()).contains("type: single-profile-handler")
        );
    }
}

#[test]
fn published_samples_load() {
    for (name, text) in [
        // The optimized baseline of the guides.
        (
            "baseline",
            "plugins:\n- {type: queue-scorer}\n- {type: kv-cache-utilization-scorer}\n- {type: prefix-cache-scorer}\n- {type: no-hit-lru-scorer}\nschedulingProfiles:\n- name: default\n  plugins: [{pluginRef: queue-scorer, weight: 2}, {pluginRef: kv-cache-utilization-scorer, weight: 2}, {pluginRef: prefix-cache-scorer, weight: 3}, {pluginRef: no-hit-lru-scorer, weight: 2}]\n",
        ),
        // Operators write the handler and picker out, and give the handler parameters it ignores.
        (
            "operator",
            "plugins:\n- {type: single-profile-handler, parameters: {x: 1}}\n- {type: queue-scorer}\n- {type: prefix-cache-scorer}\n- {type: max-score-picker}\nschedulingProfiles:\n- {name: default, plugins: [{pluginRef: queue-scorer, weight: 2}, {pluginRef: prefix-cache-scorer, weight: 3}, {pluginRef: max-score-picker}]}\n",
        ),
        (
            "lora",
            "plugins:\n- {name: home, type: lora-affinity-scorer}\n- {name: pick, type: weighted-random-picker}\n- type: core-metrics-extractor\n  parameters: {engineConfigs: [{name: vllm, queuedRequestsSpec: \"vllm:num_requests_waiting\", runningRequestsSpec: \"vllm:num_requests_running\", kvUsageSpec: \"vllm:kv_cache_usage_perc\", loraSpec: \"vllm:lora_requests_info\", cacheInfoSpec: \"vllm:cache_config_info\", cacheBlockSizeLabelName: block_size, cacheNumBlocksLabelName: num_gpu_blocks}]}\nschedulingProfiles:\n- {name: adapters, plugins: [{pluginRef: home, weight: 4}, {pluginRef: pick}]}\n",
        ),
        (
            "agentic",
            "plugins:\n- {type: approx-prefix-cache-producer, parameters: {autoTune: false, blockSizeTokens: 128, lruCapacityPerServer: 400000, maxPrefixTokensToMatch: 200000}}\n- {type: inflight-load-producer, parameters: {addEstimatedOutputTokens: false}}\n- {type: prefix-cache-affinity-filter, parameters: {affinityThreshold: 0.75, maxTTFTPenaltyMs: 9000, peakPrefillThroughput: 12000}}\n- {type: token-load-scorer}\nschedulingProfiles:\n- {name: default, plugins: [{pluginRef: prefix-cache-affinity-filter}, {pluginRef: token-load-scorer}]}\n",
        ),
        (
            "no kubernetes",
            "plugins:\n- {name: list, type: file-discovery, parameters: {path: /srv/endpoints.yaml, watchFile: true}}\n- {name: scrape, type: metrics-data-source, parameters: {scheme: http, path: /metrics, interval: 100ms}}\n- {name: parse, type: core-metrics-extractor, parameters: {defaultEngine: sglang}}\n- {type: queue-scorer}\n- {type: openai-parser}\n- {type: sglanghttp-parser}\n- {type: passthrough-parser}\ndataLayer:\n  injectDefaults: false\n  discovery: {pluginRef: list}\n  sources: [{pluginRef: scrape, extractors: [{pluginRef: parse}]}]\nrequestHandler: {parsers: [{pluginRef: openai-parser}, {pluginRef: sglanghttp-parser}, {pluginRef: passthrough-parser}]}\n",
        ),
        ("json", "{\"plugins\": [{\"type\": \"random-picker\"}]}"),
    ] {
        let text = match text.strip_prefix('{') {
            Some(rest) => format!(
                "{{\"apiVersion\": \"llm-d.ai/v1alpha1\", \"kind\": \"EndpointPickerConfig\", {rest}"
            ),
            None => format!("{HEAD}{text}"),
        };
        assert!(resolve(&text).is_ok(), "{name}: {:?}", resolve(&text).err());
    }
}

#[test]
fn the_legacy_group_and_deprecated_names_load_with_warnings() {
    let text = "apiVersion: inference.networking.x-k8s.io/v1alpha1\nkind: EndpointPickerConfig\nplugins:\n- {name: mono, type: by-label-selector, parameters: {matchLabels: {tier: gold}}}\n- {type: approx-prefix-cache-producer, parameters: {blockSize: 64, maxPrefixBlocksToMatch: 256}}\n- {type: utilization-detector, parameters: {queueDepthThreshold: 8, metricsStalenessThreshold: 500ms}}\n- {type: openai-parser}\nsaturationDetector: {pluginRef: utilization-detector}\nparser: {pluginRef: openai-parser}\n";
    let config = resolve(text).unwrap();
    let warnings: Vec<String> = config.warnings.iter().map(ToString::to_string).collect();
    assert_eq!(
        warnings,
        [
            "line 1: apiVersion: DEPRECATION: inference.networking.x-k8s.io/v1alpha1, use llm-d.ai/v1alpha1",
            "line 4: plugins[0].type: DEPRECATION warning: plugin is deprecated: type 'by-label-selector', use label-selector-filter",
            "line 8: saturationDetector: deprecated: use flowControl.saturationDetector",
            "line 9: parser: deprecated: use requestHandler.parsers",
            "line 5: plugins[1].parameters.blockSize: deprecated: use blockSizeTokens",
            "line 5: plugins[1].parameters.maxPrefixBlocksToMatch: deprecated: use maxPrefixTokensToMatch",
            "line 5: plugins[1].parameters.maxPrefixBlocksToMatch: has no effect unless maxPrefixTokensToMatch is 0",
        ]
    );
    assert_eq!(config.parsers.len(), 1);
    assert_eq!(
        config.profiles[0].filters.len(),
        2,
        "the listed detector joins as a filter"
    );
}

#[test]
fn errors_name_what_is_wrong() {
    for (text, wanted) in [
        (
            "plugins: [{type: nobody}]",
            "plugin type 'nobody' is not registered",
        ),
        (
            "plugins: [{type: disagg-profile-handler}]",
            "plugin type 'disagg-profile-handler' is known but not yet available in this version",
        ),
        ("plugins: [{name: x}]", "plugin 'x' is missing a type"),
        (
            "plugins: [{type: queue-scorer}, {type: queue-scorer}]",
            "duplicate plugin name 'queue-scorer'",
        ),
        (
            "schedulingProfiles: [{plugins: []}]",
            "schedulingProfiles[0] is missing a name",
        ),
        (
            "schedulingProfiles: [{name: a}, {name: a}]",
            "schedulingProfiles[1] has duplicate name 'a'",
        ),
        (
            "schedulingProfiles: [{name: a, plugins: [{weight: 1}]}]",
            "schedulingProfiles[a].plugins[0] is missing a 'pluginRef'",
        ),
        (
            "schedulingProfiles: [{name: a, plugins: [{pluginRef: x}]}]",
            "schedulingProfiles[a] references undefined plugin 'x'",
        ),
        (
            "schedulingProfiles: [{name: a}, {name: b}]",
            "no profile handler configured",
        ),
        (
            "plugins: [{type: single-profile-handler}]\nschedulingProfiles: [{name: a}, {name: b}]",
            "SingleProfileHandler cannot support multiple scheduling profiles",
        ),
        (
            "plugins: [{type: max-score-picker}, {type: random-picker}]",
            "failed to set 'random-picker' as picker, already have a registered picker plugin 'max-score-picker'",
        ),
        (
            "saturationDetector: {pluginRef: x}",
            "saturation detector references undefined plugin 'x'",
        ),
        (
            "plugins: [{type: queue-scorer}]\nsaturationDetector: {pluginRef: queue-scorer}",
            "plugin 'queue-scorer' is not a fwkfc.SaturationDetector",
        ),
        (
            "requestHandler: {parsers: [{pluginRef: x}]}",
            "parser references undefined plugin 'x'",
        ),
        (
            "requestHandler: {parsers: [{pluginRef: queue-scorer}]}",
            "the plugin \"queue-scorer\" is not a parser plugin",
        ),
        (
            "featureGates: [nope]",
            "feature gate 'nope' is unknown or unregistered",
        ),
        (
            "featureGates: [flowControl=maybe]",
            "maybe is not a valid value for the feature gate flowControl",
        ),
        (
            "featureGates: [flowControl]",
            "feature gate 'flowControl' is known but not yet available in this version",
        ),
        (
            "plugins: [{type: prefix-cache-scorer, parameters: {prefixMatchInfoProducerName: x}}]",
            "no default producer found for missing data key PrefixCacheMatchInfoDataKey/x, consumed by prefix-cache-scorer",
        ),
        (
            "dataLayer: {injectDefaults: false}\nplugins: [{type: queue-scorer}]",
            "no default producer found for missing data key WaitingQueueSize/core-metrics-extractor",
        ),
        (
            "plugins: [{type: prefix-cache-scorer, parameters: {matchLengthWeight: 3}}]",
            "failed to create plugin 'prefix-cache-scorer' (type: prefix-cache-scorer): matchLengthWeight: 3 is not within 0 and 1",
        ),
        (
            "plugins: [{type: max-score-picker, parameters: {wrong: 3}}]",
            "unknown field `wrong`",
        ),
        ("surprise: 1", "failed to decode configuration"),
        ("Plugins: []", "failed to decode configuration"),
        ("plugins: []\nplugins: []", "failed to decode configuration"),
    ] {
        let error = resolve(&format!("{HEAD}{text}\n")).unwrap_err();
        assert!(
            error.contains(wanted),
            "{text}:\n got {error}\nwant {wanted}"
        );
    }
    assert!(
        resolve("kind: EndpointPickerConfig\napiVersion: v2\n")
            .unwrap_err()
            .contains("apiVersion")
    );
    assert!(
        resolve("kind: Pod\napiVersion: llm-d.ai/v1alpha1\n")
            .unwrap_err()
            .contains("kind")
    );
}
