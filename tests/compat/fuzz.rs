//! Whatever the document says, loading ends with an error or a configuration, soon, and never panics.

use pinpod::config::{LoadOptions, builtin, load, show};
use pinpod::plugin::{Build, DataKeys, Parameters};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

/// Words of the schema and of the catalogue, and some that are neither.
fn word() -> impl Strategy<Value = String> {
    let registry = builtin::registry();
    let mut words: Vec<String> = registry
        .types()
        .iter()
        .map(|t| t.type_name.to_owned())
        .collect();
    words.extend(
        "apiVersion kind plugins name type parameters schedulingProfiles pluginRef weight dataLayer \
         injectDefaults sources extractors discovery flowControl maxBytes priorityBands priority \
         saturationDetector requestHandler parsers parser featureGates flowControl=true default \
         decode prefill 10Gi 200ms -1 null"
            .split_whitespace()
            .map(str::to_owned),
    );
    prop_oneof![
        4 => prop::sample::select(words),
        1 => "[a-zA-Z0-9 :#\\[\\]{}&*!|>'\"%@`,.-]{0,8}",
    ]
}

fn scalar() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-3i64..20).prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(|n| json!(n)),
        word().prop_map(Value::from),
    ]
}

fn tree() -> impl Strategy<Value = Value> {
    scalar().prop_recursive(4, 24, 5, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((word(), inner), 0..4)
                .prop_map(|entries| Value::Object(entries.into_iter().collect())),
        ]
    })
}

/// An instance of a type of the catalogue, mostly with parameters it knows.
fn plugin() -> impl Strategy<Value = Value> {
    let count = builtin::registry().types().len();
    let parameters = prop::collection::vec((any::<prop::sample::Index>(), tree()), 0..4);
    (0..count, parameters, prop::option::of(word())).prop_map(|(position, given, name)| {
        let registry = builtin::registry();
        let plugin = &registry.types()[position];
        let mut parameters = Map::new();
        for (index, value) in given {
            let known = plugin
                .parameters
                .get(index.index(plugin.parameters.len().max(1)));
            parameters.insert(known.map_or("unknown", |p| p.name).to_owned(), value);
        }
        let mut entry = json!({"type": plugin.type_name});
        if !parameters.is_empty() {
            entry["parameters"] = parameters.into();
        }
        if let Some(name) = name {
            entry["name"] = name.into();
        }
        entry
    })
}

/// A document near the schema.
fn document() -> impl Strategy<Value = Value> {
    let reference = word().prop_map(|name| json!({"pluginRef": name}));
    let weighted = (word(), prop::option::of(scalar()))
        .prop_map(|(name, weight)| json!({"pluginRef": name, "weight": weight}));
    let profiles = prop::collection::vec(
        (word(), prop::collection::vec(weighted, 0..4))
            .prop_map(|(name, plugins)| json!({"name": name, "plugins": plugins})),
        0..3,
    );
    let plugins = prop::collection::vec(plugin(), 0..6);
    let extra = prop::option::of((word(), tree()));
    let parts = (plugins, profiles, prop::option::of(reference), extra);
    parts.prop_map(|(plugins, profiles, reference, extra)| {
        let mut document = json!({
            "apiVersion": "llm-d.ai/v1alpha1",
            "kind": "EndpointPickerConfig",
            "plugins": plugins,
            "schedulingProfiles": profiles,
        });
        if let Some(reference) = reference {
            document["flowControl"] = json!({"saturationDetector": reference});
        }
        if let Some((key, value)) = extra {
            document[key] = value;
        }
        document
    })
}

/// Loads, and what loads is shown and loads again.
fn check(text: &str) {
    let options = LoadOptions {
        allow_experimental: true,
    };
    let registry = builtin::registry();
    let started = tokio::time::Instant::now();
    if let Ok(config) = load(Some(text), &options, &registry) {
        let shown = show::resolved(&config, &registry);
        let again = load(Some(&shown), &options, &registry);
        assert!(again.is_ok(), "{text}\n{shown}\n{:?}", again.err());
    }
    assert!(started.elapsed().as_secs() < 5, "{text}");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

    #[test]
    fn documents_near_the_schema_load_or_fail(document in document()) {
        check(&document.to_string());
    }

    #[test]
    fn any_tree_loads_or_fails(tree in tree()) {
        check(&tree.to_string());
        let envelope = json!({"apiVersion": "llm-d.ai/v1alpha1", "kind": "EndpointPickerConfig", "plugins": tree});
        check(&envelope.to_string());
    }

    #[test]
    fn any_text_loads_or_fails(text in "\\PC{0,200}", lines in prop::collection::vec("[a-zA-Z -]{0,6}[:\\[\\]{}&*!|>'\"%@#-]{0,3}[a-zA-Z0-9 ]{0,6}", 0..12)) {
        check(&text);
        check(&lines.join("\n"));
    }

    #[test]
    fn any_parameters_build_or_fail(tree in tree(), position in any::<prop::sample::Index>()) {
        let registry = builtin::registry();
        let plugin = &registry.types()[position.index(registry.types().len())];
        let mut given = vec![tree.clone()];
        given.extend(plugin.parameters.iter().map(|p| json!({p.name: tree.clone()})));
        for parameters in given {
            let mut keys = DataKeys::default();
            keys.enter("name");
            let parameters = Parameters(Some(parameters));
            let mut build = Build { name: "name", parameters: &parameters, keys: &mut keys };
            let _ = plugin.build(&mut build);
        }
    }
}
