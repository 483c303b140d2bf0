//! What users bring along: configuration documents, as they are published.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::too_many_lines,
    reason = "a test fails by panicking, and its tables are long"
)]

#[path = "alloc.rs"]
mod alloc;
#[path = "compat_plugins.rs"]
mod catalogue;
#[path = "compat/corpus.rs"]
mod corpus;
#[path = "compat/disagg.rs"]
mod disagg;
#[path = "compat/doctor.rs"]
mod doctor;
#[path = "compat/drop_in.rs"]
mod drop_in;
#[path = "compat/election.rs"]
mod election;
#[path = "compat/errors.rs"]
mod errors;
#[path = "compat/fuzz.rs"]
mod fuzz;
#[path = "compat/manifests.rs"]
mod manifests;
#[path = "compat/metrics_tls.rs"]
mod metrics_tls;
#[path = "compat/plugins.rs"]
mod plugins;
#[path = "compat/pool.rs"]
mod pool;
#[path = "compat/process.rs"]
mod process;
#[path = "compat/schema.rs"]
mod schema;
#[path = "tidy.rs"]
mod tidy;
#[path = "compat/traces.rs"]
mod traces;

/// The scripted API server of the unit tests. It names rooms by `crate::`, hence the next line.
#[path = "../src/kubernetes/testing.rs"]
#[allow(
    dead_code,
    clippy::expect_used,
    reason = "written for more tests than these, which may expect"
)]
mod api_server;
use pinpod::{datalayer, kubernetes};

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
    let tokenizer = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tokenizer");
    let precise =
        include_str!("../deploy/config/precise.yaml").replace("/models/my-model", tokenizer);
    for text in [
        include_str!("../deploy/config/random.yaml"),
        include_str!("../deploy/config/recommended.yaml"),
        &precise,
    ] {
        let config = resolve(text).unwrap();
        assert!(config.warnings.is_empty(), "{:?}", config.warnings);
        assert!(
            show::resolved(&config, &builtin::registry()).contains("type: single-profile-handler")
        );
    }
    for text in [disagg::PD, disagg::EPD] {
        let config = resolve(text).unwrap();
        assert!(config.warnings.is_empty(), "{:?}", config.warnings);
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
        // The router part of the multimodal serving guide, and a model with fixed frame costs.
        (
            "multimodal",
            "plugins:\n- type: token-producer\n  parameters:\n    estimate:\n      image: {mode: dynamic, dynamic: {factor: 1024}, defaultResolution: {width: 1280, height: 720}}\n      video:\n        defaultResolution: {width: 1280, height: 720}\n        defaultDuration: 30\n        tokensPerFrame: {mode: dynamic, dynamic: {factor: 1024}}\n        frames: {mode: sampled, minFrames: 4, maxFrames: 768, sampled: {sampleFPS: 2, temporalPatchSize: 2}}\n        maxVideoTokens: 16384\n- {type: approx-prefix-cache-producer}\n- {type: inflight-load-producer}\n- {type: prefix-cache-affinity-filter, parameters: {affinityThreshold: 0.6, maxTTFTPenaltyMs: 36000}}\n- {type: token-load-scorer}\nschedulingProfiles:\n- {name: default, plugins: [{pluginRef: prefix-cache-affinity-filter}, {pluginRef: token-load-scorer}]}\n",
        ),
        (
            "fixed frames",
            "plugins:\n- type: token-producer\n  parameters: {estimate: {image: {mode: static, static: {staticToken: 280}}, video: {tokensPerFrame: {mode: static, static: {numTokensPerFrame: 70}}, frames: {mode: strided, maxFrames: 32, strided: {defaultSourceFPS: 24, frameStride: 24}}}}}\n",
        ),
        (
            "embeddings cache",
            "plugins:\n- {type: token-producer}\n- {type: endpoint-notification-source}\n- {type: mm-embeddings-cache-producer, parameters: {cacheSizeInMBPerServer: 2048}}\n- {type: mm-embeddings-cache-scorer}\n- {type: queue-scorer}\n- {type: decode-filter}\nschedulingProfiles:\n- {name: default, plugins: [{pluginRef: decode-filter}, {pluginRef: mm-embeddings-cache-scorer, weight: 4}, {pluginRef: queue-scorer, weight: 1}]}\ndataLayer:\n  sources: [{pluginRef: endpoint-notification-source, extractors: [{pluginRef: mm-embeddings-cache-producer}]}]\n",
        ),
        (
            "long context",
            "plugins:\n- {type: token-producer}\n- {type: decode-filter}\n- {type: context-length-aware, parameters: {enableFiltering: true}}\nschedulingProfiles:\n- {name: default, plugins: [{pluginRef: token-producer}, {pluginRef: decode-filter}, {pluginRef: context-length-aware, weight: 3}]}\n",
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
            "disagg-profile-handler: there is no scheduling profile called 'decode' to decode with",
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
        (
            "plugins: [{type: mm-embeddings-cache-producer, parameters: {cacheSizeInMB: 2048}}]",
            "unknown field `cacheSizeInMB`",
        ),
        (
            "plugins: [{type: token-producer, parameters: {estimate: {image: {mode: static}}}}]",
            "estimate.image.static.staticToken: must be above 0",
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

const TOPOLOGY: &str = "plugins:\n- {type: topology-extractor}\n- {name: pods, type: k8s-notification-source, parameters: {version: v1, kind: Pod}}\n- {type: endpoint-notification-source, parameters: {x: 1}}\n- {type: approx-prefix-cache-producer}\n- {type: inflight-load-producer}\ndataLayer: {sources: [{pluginRef: pods, extractors: [{pluginRef: topology-extractor}]}, {pluginRef: endpoint-notification-source, extractors: [{pluginRef: topology-extractor}, {pluginRef: approx-prefix-cache-producer}, {pluginRef: inflight-load-producer}]}]}\n";

fn resolve_alpha(text: &str) -> Result<pinpod::config::ResolvedConfig, String> {
    let options = LoadOptions {
        allow_experimental: true,
    };
    load(
        Some(&format!("{HEAD}{text}")),
        &options,
        &builtin::registry(),
    )
    .map_err(|e| e.to_string())
}

/// Sources with their extractors, by name.
fn wiring(config: &pinpod::config::ResolvedConfig) -> Vec<(&str, Vec<&str>)> {
    config
        .sources
        .iter()
        .map(|s| {
            let readers = s.extractors.iter().map(|(n, _)| n.name.as_str());
            (s.name.name.as_str(), readers.collect())
        })
        .collect()
}

#[test]
fn published_data_layers_load() {
    // GPU utilization from a DCGM exporter.
    let gpu = resolve_alpha("plugins:\n- {type: dcgm-data-source, parameters: {port: 9400, interval: 1s, useNodeAddress: true}}\n- {type: dcgm-extractor}\n- {type: kv-cache-utilization-scorer}\n- {type: decode-filter}\ndataLayer: {sources: [{pluginRef: dcgm-data-source, extractors: [{pluginRef: dcgm-extractor}]}]}\n").unwrap();
    assert_eq!(
        wiring(&gpu),
        [
            ("dcgm-data-source", vec!["dcgm-extractor"]),
            ("metrics-data-source", vec!["core-metrics-extractor"])
        ]
    );
    assert!(gpu.warnings.is_empty(), "{:?}", gpu.warnings);
    // A source under another name does not suppress the default one.
    let models = resolve_alpha("plugins:\n- {name: scrape, type: metrics-data-source}\n- {type: models-data-source}\n- {type: models-data-extractor}\n- {name: own, type: core-metrics-extractor}\ndataLayer: {sources: [{pluginRef: scrape, extractors: [{pluginRef: own}]}, {pluginRef: models-data-source, extractors: [{pluginRef: models-data-extractor}]}]}\n").unwrap();
    assert_eq!(
        wiring(&models),
        [
            ("scrape", vec!["own"]),
            ("models-data-source", vec!["models-data-extractor"]),
            ("metrics-data-source", vec!["core-metrics-extractor"])
        ]
    );
    let clusters = resolve_alpha("plugins:\n- {name: peers, type: multicluster-file-discovery, parameters: {path: /srv/clusters.yaml, watchFile: true}}\n- {name: scrape, type: multicluster-metrics-data-source, parameters: {insecureSkipVerify: true}}\n- {name: read, type: multicluster-metrics-extractor}\n- {type: random-picker}\ndataLayer: {injectDefaults: false, discovery: {pluginRef: peers}, sources: [{pluginRef: scrape, extractors: [{pluginRef: read}]}]}\n").unwrap();
    assert_eq!(wiring(&clusters), [("scrape", vec!["read"])]);
    assert!(clusters.discovery.is_some());
    // Notification sources are told, not polled; plugins follow endpoints by themselves.
    let topology = resolve_alpha(TOPOLOGY).unwrap();
    assert_eq!(
        wiring(&topology),
        [("metrics-data-source", vec!["core-metrics-extractor"])]
    );
    let nothing = "source 'pods' delivers nothing";
    let told = topology
        .warnings
        .iter()
        .filter(|w| w.text.contains(nothing));
    assert_eq!(told.count(), 1, "{:?}", topology.warnings);
}

#[test]
fn data_layer_errors_name_what_is_wrong() {
    let source = |name: &str, extractors: &str| {
        format!("dataLayer: {{sources: [{{pluginRef: {name}, extractors: [{extractors}]}}]}}\n")
    };
    let core = "{pluginRef: core-metrics-extractor}";
    let metrics = "plugins: [{type: metrics-data-source}, {type: core-metrics-extractor}, {name: second, type: core-metrics-extractor}, {type: models-data-extractor}, {type: queue-scorer}, {type: endpoint-notification-source}, {name: jobs, type: k8s-notification-source, parameters: {group: batch, version: v1, kind: Job}}, {type: topology-extractor}]\n";
    for (layer, wanted) in [
        (source("nobody", ""), "the plugin nobody is not registered"),
        (source("queue-scorer", ""), "the plugin queue-scorer is not a fwkdl.DataSource"),
        (source("metrics-data-source", "{pluginRef: nobody}"), "the plugin nobody is not registered"),
        (
            source("metrics-data-source", "{pluginRef: models-data-extractor}"),
            "the plugin models-data-extractor (type: models-data-extractor) cannot read source 'metrics-data-source', which delivers Prometheus text",
        ),
        (
            source("metrics-data-source", "{pluginRef: queue-scorer}"),
            "the plugin queue-scorer (type: queue-scorer) cannot read source",
        ),
        (
            source("endpoint-notification-source", core),
            "cannot read source 'endpoint-notification-source', which delivers endpoint events",
        ),
        (
            source("jobs", "{pluginRef: topology-extractor}"),
            "cannot read source 'jobs', which delivers batch/v1 Job objects",
        ),
        (
            source("metrics-data-source", &format!("{core}, {{pluginRef: second}}")),
            "duplicate extractor type configured for the same source",
        ),
        (
            "dataLayer: {sources: [{pluginRef: metrics-data-source}, {pluginRef: metrics-data-source}]}\n".to_owned(),
            "duplicate polling source name",
        ),
        (
            "dataLayer: {discovery: {pluginRef: queue-scorer}}\n".to_owned(),
            "the plugin queue-scorer is not an endpoint discovery",
        ),
        (
            "dataLayer: {discovery: {pluginRef: nobody}}\n".to_owned(),
            "the plugin nobody is not registered",
        ),
    ] {
        let error = resolve_alpha(&format!("{metrics}{layer}")).unwrap_err();
        assert!(error.contains(wanted), "{layer}:\n got {error}\nwant {wanted}");
    }
    for (plugin, wanted) in [
        ("{type: k8s-notification-source}", "version: is required"),
        (
            "{type: core-metrics-extractor, parameters: {engineConfigs: [{name: x, customMetrics: [{attributeKey: WaitingQueueSize, metricSpec: m}]}]}}",
            "data type mismatch between produced and consumed data for key WaitingQueueSize/core-metrics-extractor",
        ),
    ] {
        let error = resolve_alpha(&format!("plugins: [{plugin}]\n")).unwrap_err();
        assert!(error.contains(wanted), "{plugin}: {error}");
    }
    for alpha in [
        "dcgm-data-source",
        "dcgm-extractor",
        "topology-extractor",
        "multicluster-metrics-data-source",
        "multicluster-metrics-extractor",
        "{type: multicluster-file-discovery, parameters: {path: x}}",
    ] {
        let entry = if alpha.starts_with('{') {
            alpha.to_owned()
        } else {
            format!("{{type: {alpha}}}")
        };
        let error = resolve(&format!("{HEAD}plugins: [{entry}]\n")).unwrap_err();
        assert!(
            error.contains("has Alpha stability level"),
            "{alpha}: {error}"
        );
    }
}

#[test]
fn every_metric_scorer_needs_the_extractor() {
    for scorer in [
        "queue-scorer",
        "kv-cache-utilization-scorer",
        "running-requests-size-scorer",
        "load-aware-scorer",
        "lora-affinity-scorer",
    ] {
        let text =
            format!("{HEAD}dataLayer: {{injectDefaults: false}}\nplugins: [{{type: {scorer}}}]\n");
        let error = resolve(&text).unwrap_err();
        assert!(
            error.contains("/core-metrics-extractor, consumed by"),
            "{scorer}: {error}"
        );
    }
}

#[test]
fn a_media_scorer_brings_its_producers() {
    let text = "plugins: [{type: mm-embeddings-cache-scorer}]\n";
    let config = resolve(&format!("{HEAD}{text}")).unwrap();
    let order: Vec<_> = config
        .producers
        .iter()
        .map(|(n, _)| n.name.as_str())
        .filter(|name| !name.starts_with("inflight"))
        .collect();
    assert_eq!(order, ["token-producer", "mm-embeddings-cache-producer"]);
    assert_eq!(config.listeners.len(), 1);
}
