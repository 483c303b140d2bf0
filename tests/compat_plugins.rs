//! Documents that use the plugins around scheduling, and what their maturity asks for.

use super::*;

/// Plugins, profiles and more by what the document is for; all need no other file.
const DOCUMENTS: &[(&str, &str)] = &[
    (
        "session affinity for payloads nobody reads",
        "plugins:\n- {type: passthrough-parser}\n- {type: active-request-scorer}\n- {type: session-affinity-scorer}\nschedulingProfiles:\n- {name: default, plugins: [{pluginRef: active-request-scorer, weight: 1}, {pluginRef: session-affinity-scorer, weight: 1}]}\nrequestHandler: {parsers: [{pluginRef: passthrough-parser}]}\n",
    ),
    (
        "sessions by cookie",
        "plugins:\n- {name: cookie, type: session-id-producer, parameters: {cookieName: sid}}\n- {type: agent-identity, parameters: {additionalSessionHeaders: [X-Agent]}}\n- {type: session-affinity-filter, parameters: {strategy: session_id, sessionIdConfig: {evictionTtlSeconds: 60, sources: [{attribute: SessionIDDataKey, producer: cookie}, {attribute: agent-identity}, {header: X-Session-Id}]}}}\n",
    ),
    (
        "burst",
        "plugins:\n- {type: token-producer}\n- {type: decode-filter}\n- {type: burst-prefix-cache-producer, parameters: {windowDurationMs: 50, maxPerReplica: 4, minColocateBlocks: 2, balanceBy: tokens}}\n- {type: prefix-cache-scorer, parameters: {prefixMatchInfoProducerName: burst-prefix-cache-producer}}\n- {type: load-aware-scorer}\n- {type: max-score-picker}\n- {type: single-profile-handler}\nschedulingProfiles:\n- {name: default, plugins: [{pluginRef: decode-filter}, {pluginRef: prefix-cache-scorer, weight: 2}, {pluginRef: load-aware-scorer, weight: 1}, {pluginRef: max-score-picker}]}\n",
    ),
    (
        "gpu attributes",
        "plugins:\n- {type: dcgm-data-source, parameters: {port: 9400, interval: 1s}}\n- {type: dcgm-extractor}\n- {type: endpoint-attribute-filter, parameters: {attribute: GPUUtilization, producer: dcgm-extractor, fallbackOnEmpty: true, algorithm: {type: threshold, threshold: {operator: LessThan, value: 0.95}}}}\n- {type: endpoint-attribute-scorer, parameters: {attributeKey: GPUUtilization, producer: dcgm-extractor, algorithm: {type: linear_lower_is_better, normalization: {fixedRange: {min: 0, max: 1}}}}}\n- {type: kv-cache-utilization-scorer}\n- {type: decode-filter}\ndataLayer:\n  sources: [{pluginRef: dcgm-data-source, extractors: [{pluginRef: dcgm-extractor}]}]\n",
    ),
    (
        "topology",
        "plugins:\n- {type: topology-extractor}\n- {type: topology-affinity-filter, parameters: {minAffinity: rack}}\n- {type: topology-affinity-scorer}\n",
    ),
    (
        "profile by header",
        "plugins:\n- {type: header-profile-handler, parameters: {headerName: X-Stage}}\n- {name: p, type: label-selector-filter, parameters: {matchLabels: {stage: prefill}}}\n- {name: d, type: label-selector-filter, parameters: {matchLabels: {stage: decode}}}\nschedulingProfiles:\n- {name: prefill, plugins: [{pluginRef: p}]}\n- {name: decode, plugins: [{pluginRef: d}]}\n",
    ),
    (
        "clusters",
        "plugins:\n- {type: multicluster-metrics-data-source}\n- {type: multicluster-metrics-extractor}\n- {type: multicluster-queue-scorer}\n- {type: multicluster-kv-cache-utilization-scorer}\n- {name: prefix, type: multicluster-approx-prefix-cache-producer}\n- {type: multicluster-prefix-cache-scorer, parameters: {prefixMatchInfoProducerName: prefix}}\n- {type: multicluster-session-affinity-filter}\ndataLayer:\n  sources: [{pluginRef: multicluster-metrics-data-source, extractors: [{pluginRef: multicluster-metrics-extractor}]}]\n",
    ),
    (
        "rollout",
        "plugins:\n- {type: disaggregatedset-rollout-screener, parameters: {scope: {labelSelector: 'app=llm'}, headerSelectors: [{name: slice, headerName: x-slice, labelKey: slice, mode: prefer}], revisionGating: {mode: max-role, requireRoles: {values: [prefill, decode]}}}}\n- {type: header-label-affinity-scorer, parameters: {headerName: x-slice, labelKey: slice}}\n",
    ),
    (
        "utilization",
        "plugins:\n- {type: utilization-filter, parameters: {fallbackOnEmpty: true, conditions: [{metric: active-requests, maxValue: 64}, {metric: kv-cache-utilization, maxValue: 0.9}]}}\n",
    ),
    (
        "shedding and limits",
        "plugins:\n- {type: probabilistic-admitter, parameters: {power: 4, k: 200}}\n- {type: random-picker}\n- {type: concurrency-detector, parameters: {maxConcurrency: 132, headroom: 0}}\nsaturationDetector: {pluginRef: concurrency-detector}\n",
    ),
    (
        "reports and tests",
        "plugins:\n- {type: request-attribute-reporter, parameters: {attributes: [{key: {namespace: envoy.lb, name: cost}, expression: usage.completion_tokens, condition: has(usage.completion_tokens)}]}}\n- {type: destination-endpoint-served-verifier}\n- {type: header-based-testing-filter}\n",
    ),
    (
        "labels of old",
        "plugins:\n- {type: by-label, parameters: {label: tier, validValues: [gold], allowsNoLabel: true}}\n",
    ),
];

#[test]
fn documents_of_the_catalogue_load() {
    for (name, text) in DOCUMENTS {
        let config = resolve_alpha(text);
        assert!(config.is_ok(), "{name}: {:?}", config.err());
        let config = config.unwrap();
        let deprecations = config.warnings.iter().filter(|w| w.text.contains("DEPREC"));
        let wanted = usize::from(text.contains("by-label"));
        assert_eq!(
            deprecations.count(),
            wanted,
            "{name}: {:?}",
            config.warnings
        );
        config.activate();
    }
}

#[test]
fn alpha_plugins_ask_for_the_flag() {
    let alpha: Vec<&str> = builtin::registry()
        .types()
        .iter()
        .filter(|t| t.maturity == pinpod::plugin::Maturity::Alpha)
        .map(|t| t.type_name)
        .collect();
    for name in [
        "utilization-filter",
        "endpoint-attribute-filter",
        "session-affinity-filter",
        "topology-affinity-filter",
        "multicluster-session-affinity-filter",
        "session-affinity-scorer",
        "header-label-affinity-scorer",
        "endpoint-attribute-scorer",
        "topology-affinity-scorer",
        "multicluster-queue-scorer",
        "multicluster-kv-cache-utilization-scorer",
        "multicluster-prefix-cache-scorer",
        "header-profile-handler",
        "burst-prefix-cache-producer",
        "multicluster-approx-prefix-cache-producer",
        "disaggregatedset-rollout-screener",
        "agent-identity",
    ] {
        assert!(alpha.contains(&name), "{name}");
    }
    for name in [
        "by-label",
        "header-based-testing-filter",
        "concurrency-detector",
        "session-id-producer",
        "probabilistic-admitter",
        "request-attribute-reporter",
        "destination-endpoint-served-verifier",
    ] {
        assert!(!alpha.contains(&name), "{name}");
    }
    let error = resolve(&format!("{HEAD}plugins: [{{type: agent-identity}}]\n")).unwrap_err();
    assert!(error.contains("--allow-experimental-plugins"), "{error}");
}

#[test]
fn a_session_source_of_the_wrong_type_is_an_error() {
    let text = "plugins:\n- {type: session-affinity-filter, parameters: {strategy: session_id, sessionIdConfig: {sources: [{attribute: TokenizedPrompt, producer: token-producer}]}}}\n- {type: prefix-cache-scorer}\n";
    let error = resolve_alpha(text).unwrap_err();
    assert!(error.contains("data type mismatch"), "{error}");
}

#[test]
fn a_multicluster_scorer_needs_its_extractor() {
    let text = "plugins: [{type: multicluster-queue-scorer}]\n";
    let error = resolve_alpha(text).unwrap_err();
    let wanted = "no default producer found for missing data key llm-d.ai/multicluster-queue-size/";
    assert!(error.contains(wanted), "{error}");
}

#[test]
fn an_attribute_that_nobody_keeps_is_a_warning() {
    let text = "plugins: [{type: endpoint-attribute-filter, parameters: {attribute: mine, algorithm: {type: threshold, threshold: {operator: Equal, value: 1}}}}]\n";
    let config = resolve_alpha(text).unwrap();
    let told = config.warnings.iter().any(|w| {
        w.text
            .contains("nobody produces mine/core-metrics-extractor")
    });
    assert!(told, "{:?}", config.warnings);
}
