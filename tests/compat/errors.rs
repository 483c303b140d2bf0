//! Every error of the load sequence, with line and field, and what is not an error.

use pinpod::config::{ConfigLoader, LoadOptions, ResolvedConfig, builtin};

use super::pool::load;

const HEAD: &str = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n";

fn error(body: &str) -> String {
    match load(&format!("{HEAD}{body}\n"), false) {
        Ok(_) => panic!("this loads: {body}"),
        Err(error) => error,
    }
}

fn resolved(body: &str) -> ResolvedConfig {
    load(&format!("{HEAD}{body}\n"), false).unwrap_or_else(|e| panic!("{body}: {e}"))
}

fn names(config: &ResolvedConfig) -> Vec<&str> {
    let instances = config.instances.iter();
    instances.map(|i| i.name.name.as_str()).collect()
}

/// Bodies begin on line 3.
#[test]
fn errors_carry_line_and_field() {
    for (body, wanted) in [
        // Decoding.
        (
            "surprise: 1",
            "line 3: surprise: failed to decode configuration: unknown field `surprise`",
        ),
        (
            "Plugins: []",
            "line 3: Plugins: failed to decode configuration: unknown field `Plugins`",
        ),
        (
            "plugins:\n- {type: random-picker}\n- {type: queue-scorer, Name: q}",
            "line 5: plugins[1].Name: failed to decode configuration: unknown field `Name`",
        ),
        (
            "plugins:\n- type: random-picker\n  parameters:\n    maxNumOfEndpoints: 1\n    maxNumOfEndpoints: 2",
            "line 7: ",
        ),
        ("plugins: []\nplugins: []", "line 4: "),
        (
            "schedulingProfiles:\n- name: a\n  plugins:\n  - pluginRef: b\n    weight: heavy",
            "line 7: schedulingProfiles[0].plugins[0].weight: failed to decode configuration: invalid type: string \"heavy\", expected f64",
        ),
        (
            "plugins: {type: a}",
            "line 3: plugins: failed to decode configuration: invalid type: map, expected a sequence",
        ),
        (
            "featureGates: [1]",
            "line 3: featureGates[0]: failed to decode configuration: invalid type: integer `1`, expected a string",
        ),
        (
            "dataLayer:\n  crossReplicaSyncInterval: 200",
            "line 4: dataLayer.crossReplicaSyncInterval: failed to decode configuration: invalid type: integer `200`, expected a string",
        ),
        (
            "dataLayer:\n  crossReplicaSyncInterval: soon",
            "line 4: dataLayer.crossReplicaSyncInterval: failed to decode configuration: \"soon\" is not a duration",
        ),
        (
            "requestHandler: {parser: {pluginRef: openai-parser}}",
            "line 3: requestHandler.parser: failed to decode configuration: unknown field `parser`",
        ),
        // The list.
        (
            "plugins:\n- {name: x}",
            "line 4: plugins[0]: plugin 'x' is missing a type",
        ),
        ("plugins: [{type: ''}]", "plugin '' is missing a type"),
        (
            "plugins:\n- {type: queue-scorer}\n- {name: queue-scorer, type: random-picker}",
            "line 5: plugins[1].name: duplicate plugin name 'queue-scorer'",
        ),
        (
            "plugins:\n- {type: queue-scorer}\n- {type: Queue-Scorer}",
            "line 5: plugins[1].type: plugin type 'Queue-Scorer' is not registered",
        ),
        // Names known only from older documentation, and test types.
        (
            "plugins: [{type: kv-cache-scorer}]",
            "plugin type 'kv-cache-scorer' is not registered",
        ),
        (
            "plugins: [{type: decision-tree-filter}]",
            "plugin type 'decision-tree-filter' is not registered",
        ),
        // Parameters that name plugins.
        (
            "plugins:\n- type: disagg-profile-handler\n  parameters: {deciders: {prefill: gone}}",
            "line 5: plugins[0].parameters: a plugin has a dependency on the unregistered plugin gone",
        ),
        (
            "plugins:\n- {name: a, type: pd-profile-handler, parameters: {deciderPluginName: b}}\n- {name: b, type: pd-profile-handler, parameters: {DeciderPluginName: a}}",
            "line 3: plugins: cycle detected: graph is not a DAG",
        ),
        // Factories.
        (
            "plugins:\n- type: prefix-cache-scorer\n  parameters:\n    matchLengthWeight: 3",
            "line 6: plugins[0].parameters.matchLengthWeight: failed to create plugin 'prefix-cache-scorer' (type: prefix-cache-scorer): matchLengthWeight: 3 is not within 0 and 1",
        ),
        (
            "plugins:\n- type: core-metrics-extractor\n  parameters:\n    engineConfigs:\n    - name: e\n      queuedSpec: q",
            "line 8: plugins[0].parameters.engineConfigs[0].queuedSpec: failed to create plugin 'core-metrics-extractor'",
        ),
        (
            "plugins:\n- {name: x, type: max-score-picker, parameters: [1]}",
            "line 4: plugins[0].parameters: failed to create plugin 'x' (type: max-score-picker): parameters: expected an object",
        ),
        // Profiles.
        (
            "schedulingProfiles:\n- plugins: []",
            "line 4: schedulingProfiles[0]: schedulingProfiles[0] is missing a name",
        ),
        (
            "schedulingProfiles:\n- name: a\n- name: a",
            "line 5: schedulingProfiles[1].name: schedulingProfiles[1] has duplicate name 'a'",
        ),
        (
            "schedulingProfiles:\n- name: a\n  plugins:\n  - weight: 1",
            "line 6: schedulingProfiles[0].plugins[0]: schedulingProfiles[a].plugins[0] is missing a 'pluginRef'",
        ),
        (
            "schedulingProfiles: [{name: a, plugins: [{pluginRef: x}]}]",
            "schedulingProfiles[a] references undefined plugin 'x'",
        ),
        (
            "plugins: [{type: max-score-picker}, {type: random-picker}]\nschedulingProfiles:\n- name: a\n  plugins:\n  - pluginRef: max-score-picker\n  - pluginRef: random-picker",
            "line 8: schedulingProfiles[0].plugins[1]: failed to set 'random-picker' as picker, already have a registered picker plugin 'max-score-picker'",
        ),
        // Handlers.
        (
            "schedulingProfiles: [{name: a}, {name: b}]",
            "no profile handler configured",
        ),
        (
            "plugins: [{name: h1, type: single-profile-handler}, {name: h2, type: single-profile-handler}]",
            "multiple profile handlers found ('h1', 'h2'); only one is allowed",
        ),
        (
            "plugins: [{type: single-profile-handler}]\nschedulingProfiles: [{name: a}, {name: b}]",
            "SingleProfileHandler cannot support multiple scheduling profiles",
        ),
        // Detector.
        (
            "flowControl:\n  saturationDetector: {pluginRef: x}",
            "line 4: flowControl.saturationDetector: saturation detector references undefined plugin 'x'",
        ),
        (
            "saturationDetector: {pluginRef: x}",
            "line 3: saturationDetector: saturation detector references undefined plugin 'x'",
        ),
        (
            "plugins: [{type: queue-scorer}]\nsaturationDetector: {pluginRef: queue-scorer}",
            "plugin 'queue-scorer' is not a fwkfc.SaturationDetector",
        ),
        // Parsers.
        (
            "requestHandler:\n  parsers:\n  - pluginRef: openai-parser\n  - pluginRef: x",
            "line 6: requestHandler.parsers[1].pluginRef: parser references undefined plugin 'x'",
        ),
        (
            "parser: {pluginRef: queue-scorer}",
            "line 3: parser.pluginRef: the plugin \"queue-scorer\" is not a parser plugin",
        ),
        // Data layer.
        (
            "dataLayer:\n  sources:\n  - pluginRef: x",
            "line 5: dataLayer.sources[0]: the plugin x is not registered",
        ),
        (
            "dataLayer: {discovery: {pluginRef: x}}",
            "the plugin x is not registered",
        ),
        (
            "dataLayer:\n  crossReplicaSyncerPluginRef: x",
            "line 4: dataLayer.crossReplicaSyncerPluginRef: the plugin x is not registered",
        ),
        (
            "dataLayer: {injectDefaults: false}\nplugins: [{type: random-picker}]",
            "line 3: dataLayer: data layer enabled but no data sources configured",
        ),
        // Keys.
        (
            "plugins:\n- {type: prefix-cache-scorer, parameters: {prefixMatchInfoProducerName: x}}",
            "line 4: plugins[0]: no default producer found for missing data key PrefixCacheMatchInfoDataKey/x, consumed by prefix-cache-scorer",
        ),
        // An instance that has a default producer's name and is another type.
        (
            "plugins: [{type: prefix-cache-scorer}, {name: approx-prefix-cache-producer, type: queue-scorer}]",
            "no default producer found for missing data key PrefixCacheMatchInfoDataKey/approx-prefix-cache-producer",
        ),
        // Gates.
        (
            "featureGates:\n- flowControl=off\n- nope",
            "line 4: featureGates[0]: off is not a valid value for the feature gate flowControl (error: ",
        ),
        (
            "featureGates: [haPopulateNonLeaderDatastore, dataLayer]",
            "line 3: featureGates[1]: feature gate 'dataLayer' is unknown or unregistered",
        ),
        (
            "featureGates: [enableLegacyMetrics]",
            "feature gate 'enableLegacyMetrics' is unknown or unregistered",
        ),
        (
            "featureGates: [flowControl= True ]",
            "feature gate 'flowControl' is known but not yet available in this version",
        ),
        // The queueing block is read strictly whatever the gate says, and checked when it is on.
        (
            "flowControl:\n  maxByte: 1",
            "line 4: flowControl.maxByte: failed to decode configuration: unknown field `maxByte`",
        ),
        (
            "flowControl:\n  maxBytes: lots",
            "line 4: flowControl.maxBytes: failed to decode configuration: \"lots\" is not a quantity",
        ),
        (
            "flowControl: {defaultRequestTTL: 5}",
            "flowControl.defaultRequestTTL: failed to decode configuration: invalid type: integer `5`",
        ),
        (
            "featureGates: [flowControl]\nflowControl:\n  maxRequests: -1",
            "line 5: flowControl.maxRequests: maxRequests must be non-negative, got -1",
        ),
        (
            "featureGates: [flowControl]\nflowControl:\n  priorityBands:\n  - {priority: 7}\n  - priority: 7",
            "line 7: flowControl.priorityBands[1]: duplicate priority level 7",
        ),
        (
            "featureGates: [flowControl]\nflowControl: {priorityBands: [{maxBytes: -1}]}",
            "flowControl.priorityBands[0].maxBytes: maxBytes must be non-negative, got -1",
        ),
        (
            "featureGates: [flowControl]\nflowControl:\n  defaultPriorityBand: {fairnessPolicyRef: gone}",
            "line 5: flowControl.defaultPriorityBand.fairnessPolicyRef: plugin \"gone\" not found",
        ),
        (
            "featureGates: [flowControl]\nflowControl: {usageLimitPolicyPluginRef: gone}",
            "plugin \"gone\" not found",
        ),
    ] {
        let error = error(body);
        let found = if wanted.starts_with("line ") {
            error.starts_with(wanted)
        } else {
            error.contains(wanted)
        };
        assert!(found, "{body}:\n got {error}\nwant {wanted}");
    }
}

#[test]
fn group_version_and_kind_are_said_and_known() {
    for (text, wanted) in [
        (
            "kind: EndpointPickerConfig",
            "apiVersion: failed to decode configuration: expected llm-d.ai/v1alpha1, got \"\"",
        ),
        (
            "apiVersion: llm-d.ai/v1\nkind: EndpointPickerConfig",
            "line 1: apiVersion: failed to decode configuration: expected llm-d.ai/v1alpha1, got \"llm-d.ai/v1\"",
        ),
        (
            "apiVersion: llm-d.ai/v1alpha1\nkind: InferencePool",
            "line 2: kind: failed to decode configuration: expected EndpointPickerConfig, got \"InferencePool\"",
        ),
        (
            "apiversion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig",
            "unknown field `apiversion`",
        ),
        ("", "kind: "),
        ("just words", "invalid type: string"),
        ("- a list", "invalid type: sequence"),
    ] {
        let error = load(text, false).map(|_| ()).unwrap_err();
        assert!(
            error.contains(wanted),
            "{text}:\n got {error}\nwant {wanted}"
        );
    }
}

#[test]
fn what_the_reference_accepts_is_accepted() {
    for body in [
        // Null is absence, at every level.
        "plugins:\nschedulingProfiles: null\nfeatureGates: ~\ndataLayer:\nflowControl:\nparser:\nrequestHandler:",
        "plugins: [{type: queue-scorer, name: null, parameters: null}]",
        "plugins: [{type: max-score-picker, parameters: {}}, {type: queue-scorer, parameters: {x: {y: 1}}}]",
        "plugins: [{type: max-score-picker, parameters: {MAXNUMOFENDPOINTS: 2}}]",
        "plugins: [{type: core-metrics-extractor, parameters: {EngineConfigs: [{NAME: e, QueuedRequestsSpec: q}]}}]",
        "plugins: [{type: approx-prefix-cache-producer, parameters: {lruCapacityPerServer: 1e4, autoTune: no}}]",
        // Weights are not checked.
        "plugins: [{type: queue-scorer}]\nschedulingProfiles: [{name: p, plugins: [{pluginRef: queue-scorer, weight: -1.5}]}]",
        "plugins: [{type: queue-scorer}]\nschedulingProfiles: [{name: p, plugins: [{pluginRef: queue-scorer, weight: 0}]}]",
        // The handler and the parsers take any parameters.
        "plugins: [{type: single-profile-handler, parameters: {a: 1}}, {type: openai-parser, parameters: {b: 2}}, {type: decode-filter, parameters: {c: 3}}]",
        // Spellings of gates.
        "featureGates: [flowControl=false, 'flowControl= F ', flowControl=0, haPopulateNonLeaderDatastore=t, haPopulateNonLeaderDatastore=TRUE]",
        // Queueing with the gate off.
        "flowControl: {maxBytes: 10Gi, maxRequests: 1k, defaultRequestTTL: 0s, noEndpointRequestTTL: 1m30s, enableEviction: true, usageLimitPolicyPluginRef: static-usage-limit-policy, defaultPriorityBand: {maxBytes: 500, orderingPolicyRef: fcfs-ordering-policy}, defaultNegativePriorityBand: {maxRequests: '100'}, priorityBands: [{priority: -10}, {priority: 100, fairnessPolicyRef: global-strict-fairness-policy}]}",
        "flowControl: {maxBytes: -1, priorityBands: [{}, {}], usageLimitPolicyPluginRef: gone}",
        "dataLayer: {peerDiscovery: {pluginRef: whatever}, crossReplicaSyncInterval: 1s}",
    ] {
        resolved(body);
    }
}

#[test]
fn defaults_are_filled_by_the_rules() {
    // 6.1 and 6.2: everything listed that filters, scores or picks, in the order of the document; an
    // explicit detector joins as a filter.
    let config = resolved(
        "plugins: [{type: utilization-detector}, {type: queue-scorer}, {type: decode-filter}]",
    );
    let profile = &config.profiles[0];
    assert_eq!(profile.name, "default");
    let filters: Vec<_> = profile
        .filters
        .iter()
        .map(|(n, _)| n.name.as_str())
        .collect();
    assert_eq!(filters, ["utilization-detector", "decode-filter"]);
    assert_eq!(profile.scorers[0].2, 1.0);
    assert_eq!(profile.picker.0.name, "max-score-picker");
    assert_eq!(config.profile_handler.0.name, "single-profile-handler");
    // Trap 2: any picker will do, whatever it was meant for.
    let config = resolved(
        "plugins: [{name: dice, type: random-picker}, {type: queue-scorer}]\nschedulingProfiles: [{name: p, plugins: [{pluginRef: queue-scorer}]}]",
    );
    assert_eq!(config.profiles[0].picker.0.name, "dice");
    assert!(!names(&config).contains(&"max-score-picker"));
    // 6.3: the detector is made only under its own name.
    assert_eq!(
        resolved("plugins: []").saturation_detector.0.name,
        "utilization-detector"
    );
    let config = resolved(
        "plugins: [{name: d, type: utilization-detector}]\nflowControl: {saturationDetector: {pluginRef: d}}",
    );
    assert_eq!(config.saturation_detector.0.name, "d");
    assert!(!names(&config).contains(&"utilization-detector"));
    // The nested reference wins over the deprecated one.
    let config = resolved(
        "plugins: [{name: d, type: utilization-detector}]\nflowControl: {saturationDetector: {pluginRef: d}}\nsaturationDetector: {pluginRef: gone}",
    );
    assert_eq!(config.saturation_detector.0.name, "d");
    // 6.4.
    let parsers = |config: &ResolvedConfig| -> Vec<String> {
        config.parsers.iter().map(|p| p.name.name.clone()).collect()
    };
    assert_eq!(
        parsers(&resolved("plugins: []")),
        [
            "openai-parser",
            "anthropic-parser",
            "vllmhttp-parser",
            "passthrough-parser"
        ]
    );
    assert_eq!(
        parsers(&resolved(
            "requestHandler: {parsers: [{pluginRef: sglanghttp-parser}]}"
        )),
        ["sglanghttp-parser"]
    );
    assert_eq!(
        parsers(&resolved("parser: {pluginRef: openai-parser}")),
        ["openai-parser"]
    );
    assert_eq!(
        parsers(&resolved(
            "parser: {pluginRef: gone}\nrequestHandler: {parsers: [{pluginRef: openai-parser}]}"
        )),
        ["openai-parser"]
    );
    // 6.5 and trap 5: the name counts, not the type.
    let sources = |body: &str| -> Vec<String> {
        let config = resolved(body);
        config.sources.iter().map(|s| s.name.name.clone()).collect()
    };
    let own = "plugins: [{name: mine, type: metrics-data-source}, {name: reader, type: core-metrics-extractor}]\ndataLayer:\n  sources: [{pluginRef: mine, extractors: [{pluginRef: reader}]}]\n";
    assert_eq!(sources(own), ["mine", "metrics-data-source"]);
    assert_eq!(sources(&format!("{own}  injectDefaults: false")), ["mine"]);
    assert_eq!(sources("plugins: []"), ["metrics-data-source"]);
    // 6.6: producers in the order of their keys, whatever the order of the document.
    let config = resolved(
        "plugins: [{type: inflight-load-producer}, {type: prefix-cache-scorer}, {type: approx-prefix-cache-producer}]",
    );
    let order: Vec<_> = config
        .producers
        .iter()
        .map(|(n, _)| n.name.as_str())
        .collect();
    assert_eq!(
        order,
        [
            "token-producer",
            "approx-prefix-cache-producer",
            "inflight-load-producer"
        ]
    );
}

#[test]
fn settings_without_effect_are_named() {
    for (body, wanted) in [
        (
            "plugins: [{type: queue-scorer, parameters: {x: 1}}]",
            "line 3: plugins[0].parameters: type queue-scorer ignores its parameters",
        ),
        (
            "plugins:\n- {type: queue-scorer}\n- {type: load-aware-scorer}\nschedulingProfiles: [{name: p, plugins: [{pluginRef: queue-scorer}]}]",
            "line 5: plugins[1]: 'load-aware-scorer' has no effect: no scheduling profile names it",
        ),
        (
            "plugins: [{type: token-producer}, {type: queue-scorer}]\nschedulingProfiles:\n- name: p\n  plugins:\n  - {pluginRef: queue-scorer}\n  - {pluginRef: token-producer}",
            "line 8: schedulingProfiles[0].plugins[1]: has no effect: 'token-producer' is no filter, scorer or picker",
        ),
        (
            "plugins: [{type: decode-filter}]\nschedulingProfiles: [{name: p, plugins: [{pluginRef: decode-filter, weight: 2}]}]",
            "schedulingProfiles[0].plugins[0].weight: has no effect: 'decode-filter' is no scorer",
        ),
        (
            "flowControl: {maxRequests: 5}",
            "line 3: flowControl: ignored without its feature gate, except saturationDetector",
        ),
        (
            "flowControl: {maxRequests: -5}",
            "flowControl.maxRequests: maxRequests must be non-negative, got -5",
        ),
        (
            "plugins: [{type: approx-prefix-cache-producer, parameters: {maxPrefixTokensToMatch: 4096, maxPrefixBlocksToMatch: 5}}]",
            "plugins[0].parameters.maxPrefixBlocksToMatch: has no effect unless maxPrefixTokensToMatch is 0",
        ),
        // Trap 4.
        (
            "plugins: [{name: mine, type: approx-prefix-cache-producer}, {type: prefix-cache-scorer}]",
            "plugins[0]: nobody reads what 'mine' produces, and 'approx-prefix-cache-producer' was added beside it",
        ),
        (
            "plugins: [{type: tokenizer}, {type: prefix-cache-scorer}]",
            "nobody reads what 'tokenizer' produces, and 'token-producer' was added beside it",
        ),
        (
            "plugins: [{type: tokenizer}]",
            "DEPRECATION warning: plugin is deprecated: type 'tokenizer', use token-producer",
        ),
        (
            "plugins: [{name: mine, type: metrics-data-source}, {name: reader, type: core-metrics-extractor}]\ndataLayer: {sources: [{pluginRef: mine, extractors: [{pluginRef: reader}]}]}",
            "dataLayer.sources[0]: every endpoint is scraped twice, by 'mine' and by 'metrics-data-source'",
        ),
        (
            "requestHandler: {parsers: [{pluginRef: passthrough-parser}, {pluginRef: openai-parser}]}",
            "requestHandler.parsers[1]: has no effect: 'passthrough-parser' before it takes every path",
        ),
        (
            "plugins: [{name: a, type: openai-parser}, {name: b, type: openai-parser}]\nrequestHandler: {parsers: [{pluginRef: a}, {pluginRef: b}]}",
            "requestHandler.parsers[1]: has no effect: a openai-parser is listed before it",
        ),
        (
            "plugins: [{type: sglanghttp-parser}]",
            "plugins[0]: 'sglanghttp-parser' has no effect: requestHandler.parsers does not name it",
        ),
        (
            "dataLayer: {peerDiscovery: {pluginRef: x}}",
            "dataLayer.peerDiscovery: has no effect",
        ),
        (
            "plugins: [{type: active-request-scorer, parameters: {RequestTimeout: 2m}}]",
            "plugins[0].parameters.RequestTimeout: has no effect",
        ),
        (
            "plugins: [{type: token-producer}]\nparser: {pluginRef: openai-parser}\nrequestHandler: {parsers: [{pluginRef: openai-parser}]}",
            "parser: has no effect beside requestHandler.parsers",
        ),
    ] {
        let config = resolved(body);
        let warnings: Vec<String> = config.warnings.iter().map(ToString::to_string).collect();
        let wanted_first = wanted.starts_with("line ");
        let found = warnings.iter().any(|w| {
            if wanted_first {
                w.starts_with(wanted)
            } else {
                w.contains(wanted)
            }
        });
        assert!(found, "{body}:\n got {warnings:#?}\nwant {wanted}");
    }
    // Nothing to say of what is plainly said.
    let quiet = resolved(
        "plugins: [{type: queue-scorer}, {type: utilization-detector}, {type: prefix-cache-scorer}]\nschedulingProfiles: [{name: p, plugins: [{pluginRef: queue-scorer, weight: 2}, {pluginRef: prefix-cache-scorer}]}]",
    );
    assert!(quiet.warnings.is_empty(), "{:?}", quiet.warnings);
}

/// Role filters report the type they grew out of; a deprecated label filter reports itself.
#[test]
fn reported_types_are_the_references_own() {
    let config = resolved(
        "plugins: [{type: decode-filter}, {name: p, type: prefill-filter}, {type: encode-filter}, {type: by-label-selector, parameters: {matchLabels: {a: b}}}, {type: label-selector-filter, parameters: {matchLabels: {a: b}}}]",
    );
    let reported: Vec<_> = config
        .instances
        .iter()
        .take(5)
        .map(|i| (i.name.type_name, i.plugin_type))
        .collect();
    assert_eq!(
        reported,
        [
            ("by-label", "decode-filter"),
            ("by-label", "prefill-filter"),
            ("by-label", "encode-filter"),
            ("by-label-selector", "by-label-selector"),
            ("label-selector-filter", "label-selector-filter"),
        ]
    );
    let registry = builtin::registry();
    let headers = registry.get("prefill-header-handler").unwrap();
    assert_eq!(headers.reported, "disagg-headers-handler");
}

#[test]
fn the_list_of_plugins_has_a_limit() {
    let body = |n: usize| -> String {
        let entry = |i: usize| format!("- {{name: q{i}, type: queue-scorer}}\n");
        format!("plugins:\n{}", (0..n).map(entry).collect::<String>())
    };
    assert_eq!(resolved(&body(1000)).profiles[0].scorers.len(), 1000);
    let wanted = "line 3: plugins: 1001 plugins, at most 1000";
    assert_eq!(error(&body(1001)), wanted);
}

/// Names of data keys are kept for the life of the process, so there is a limit to how many may come.
#[test]
fn data_keys_are_bounded_over_reloads() {
    let mut loader = ConfigLoader::new(LoadOptions::default(), builtin::registry());
    let body = |round: usize| {
        format!(
            "{HEAD}plugins: [{{name: index-{round}, type: approx-prefix-cache-producer}}, {{type: prefix-cache-scorer, parameters: {{prefixMatchInfoProducerName: index-{round}}}}}]\n"
        )
    };
    let mut loaded = 0;
    let error = loop {
        match loader.load(Some(&body(loaded))) {
            Ok(config) => loader.adopt(config),
            Err(error) => break error.to_string(),
        }
        loaded += 1;
        assert!(loaded < 1000, "no limit");
    };
    // Each round brings a match and a chain of its own, of 512 keys in all.
    assert!((200..=256).contains(&loaded), "{loaded}");
    assert!(
        error.contains("more than 512 data keys since the process started"),
        "{error}"
    );
    // What is known already still loads.
    assert!(loader.load(Some(&body(0))).is_ok());
}
