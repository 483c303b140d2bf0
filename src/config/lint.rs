//! What an operator should know about a configuration that loads: old names and settings that have no
//! effect.

use super::Warning;
use super::builtin::{Instance, Origin, Registry, Roles};
use super::raw::{DataLayer, Document, ProfileEntry};
use super::resolved::ResolvedProfile;
use crate::plugin::data::KeyUse;

/// A loaded configuration, as far as the checks look at it.
pub(super) struct Loaded<'a> {
    pub(super) document: &'a Document,
    pub(super) registry: &'a Registry,
    pub(super) instances: &'a [Instance],
    pub(super) profiles: &'a [ResolvedProfile],
    /// Name of the saturation detector in use.
    pub(super) detector: &'a str,
    pub(super) parsers: &'a [Instance],
    pub(super) keys: &'a [KeyUse],
}

/// Parameters that are accepted for the sake of older documents: types (empty for all), parameter, what
/// to say.
const OLD_PARAMETERS: &[(&[&str], &str, &str)] = &[
    (
        &[
            "approx-prefix-cache-producer",
            "precise-prefix-cache-producer",
        ],
        "blockSize",
        "deprecated: use blockSizeTokens",
    ),
    (
        &["approx-prefix-cache-producer"],
        "maxPrefixBlocksToMatch",
        "deprecated: use maxPrefixTokensToMatch",
    ),
    (
        &["token-producer", "tokenizer"],
        "udsTokenizerConfig",
        "deprecated: use the vllm or the estimate backend",
    ),
    (
        &["active-request-scorer"],
        "requestTimeout",
        "has no effect",
    ),
    (&["no-hit-lru-scorer"], "prefixPluginType", "has no effect"),
    (
        &["no-hit-lru-scorer"],
        "prefixPluginName",
        "has no effect: use prefixMatchInfoProducerName",
    ),
    (&["pd-profile-handler"], "prefixPluginType", "has no effect"),
    (&["pd-profile-handler"], "prefixPluginName", "has no effect"),
    (
        &["inflight-load-producer"],
        "syncCrossReplicaState",
        "has no effect yet",
    ),
];

/// Every warning about settings, in the order of the document.
pub(super) fn without_effect(loaded: &Loaded<'_>) -> Vec<Warning> {
    let mut notes = Notes(Vec::new());
    deprecated_references(loaded.document, &mut notes);
    parameters(loaded, &mut notes);
    profile_entries(loaded, &mut notes);
    unused_instances(loaded, &mut notes);
    unread_producers(loaded, &mut notes);
    parsers(loaded, &mut notes);
    if let Some(layer) = &loaded.document.data_layer {
        data_layer(layer, loaded, &mut notes);
    }
    notes.0
}

struct Notes(Vec<Warning>);

impl Notes {
    fn add(&mut self, field: impl Into<String>, text: impl Into<String>) {
        self.0.push(Warning {
            line: None,
            field: field.into(),
            text: text.into(),
        });
    }
}

fn written(instance: &Instance) -> Option<usize> {
    match instance.origin {
        Origin::Written(position) => Some(position),
        Origin::Added(_) => None,
    }
}

fn deprecated_references(document: &Document, notes: &mut Notes) {
    let nested = document
        .flow_control
        .as_ref()
        .is_some_and(|flow| flow.saturation_detector.is_some());
    match &document.saturation_detector {
        Some(_) if nested => notes.add(
            "saturationDetector",
            "has no effect beside flowControl.saturationDetector",
        ),
        Some(_) => notes.add(
            "saturationDetector",
            "deprecated: use flowControl.saturationDetector",
        ),
        None => {}
    }
    let listed = document
        .request_handler
        .as_ref()
        .is_some_and(|handler| !handler.parsers.is_empty());
    match &document.parser {
        Some(_) if listed => notes.add("parser", "has no effect beside requestHandler.parsers"),
        Some(_) => notes.add("parser", "deprecated: use requestHandler.parsers"),
        None => {}
    }
}

fn parameters(loaded: &Loaded<'_>, notes: &mut Notes) {
    for (position, entry) in loaded.document.plugins.iter().enumerate() {
        let Some(object) = entry.parameters.as_ref().and_then(|p| p.as_object()) else {
            continue;
        };
        let field = format!("plugins[{position}].parameters");
        let plugin_type = loaded.registry.get(&entry.type_name);
        if plugin_type.is_some_and(|t| t.lenient) && !object.is_empty() {
            let text = format!("type {} ignores its parameters", entry.type_name);
            notes.add(field, text);
            continue;
        }
        let given = |name: &str| {
            let mut found = object.iter().filter(|(k, _)| k.eq_ignore_ascii_case(name));
            found.next().filter(|(_, v)| !v.is_null())
        };
        for (types, name, text) in OLD_PARAMETERS {
            let applies = types.contains(&entry.type_name.as_str());
            // To write the default down says nothing.
            let default = plugin_type.and_then(|t| t.default_of(name));
            let said = given(name).filter(|(_, value)| applies && default.as_ref() != Some(value));
            if let Some((key, _)) = said {
                notes.add(format!("{field}.{key}"), *text);
            }
        }
        let tokens = given("maxPrefixTokensToMatch").and_then(|(_, v)| v.as_f64());
        if let Some((key, _)) = given("maxPrefixBlocksToMatch").filter(|_| tokens != Some(0.0)) {
            notes.add(
                format!("{field}.{key}"),
                "has no effect unless maxPrefixTokensToMatch is 0",
            );
        }
    }
}

fn profile_entries(loaded: &Loaded<'_>, notes: &mut Notes) {
    let profiles: &[ProfileEntry] = &loaded.document.scheduling_profiles;
    for (index, profile) in profiles.iter().enumerate() {
        for (position, entry) in profile.plugins.iter().enumerate() {
            let name = &entry.plugin_ref;
            let Some(instance) = loaded.instances.iter().find(|i| i.name.name == *name) else {
                continue;
            };
            let field = format!("schedulingProfiles[{index}].plugins[{position}]");
            let roles = &instance.roles;
            if !selects(roles) {
                let text = format!("has no effect: '{name}' is no filter, scorer or picker");
                notes.add(field, text);
            } else if entry.weight.is_some() && roles.scorer.is_none() {
                notes.add(
                    format!("{field}.weight"),
                    format!("has no effect: '{name}' is no scorer"),
                );
            }
        }
    }
}

/// True for what profiles are made of.
fn selects(roles: &Roles) -> bool {
    roles.filter.is_some() || roles.scorer.is_some() || roles.picker.is_some()
}

/// True for an instance that works without being named anywhere.
fn always_runs(roles: &Roles) -> bool {
    roles.header_processor.is_some()
        || roles.screener.is_some()
        || roles.producer.is_some()
        || roles.admitter.is_some()
        || roles.response_headers.is_some()
        || roles.response_complete.is_some()
        || roles.profile_handler.is_some()
}

fn unused_instances(loaded: &Loaded<'_>, notes: &mut Notes) {
    let named: Vec<&str> = loaded
        .instances
        .iter()
        .filter_map(|i| Some((loaded.registry.get(i.plugin_type)?, i)))
        .flat_map(|(plugin_type, i)| plugin_type.references(i.parameters.as_ref()))
        .collect();
    for instance in loaded.instances {
        let Some(position) = written(instance) else {
            continue;
        };
        let roles = &instance.roles;
        let name = &instance.name.name;
        let in_profile = loaded.profiles.iter().any(|p| {
            let filters = p.filters.iter().map(|(n, _)| n);
            let scorers = p.scorers.iter().map(|(n, ..)| n);
            filters
                .chain(scorers)
                .chain([&p.picker.0])
                .any(|n| n.name == *name)
        });
        let is_detector = name == loaded.detector;
        if selects(roles) && !in_profile && !is_detector && !always_runs(roles) {
            notes.add(
                format!("plugins[{position}]"),
                format!("'{name}' has no effect: no scheduling profile names it"),
            );
        }
        if roles.decider.is_some() && !named.contains(&name.as_str()) {
            notes.add(
                format!("plugins[{position}]"),
                format!("'{name}' has no effect: no profile handler names it as a decider"),
            );
        }
        let parses = loaded.parsers.iter().any(|p| p.name.name == *name);
        if roles.parser.is_some() && !parses {
            notes.add(
                format!("plugins[{position}]"),
                format!("'{name}' has no effect: requestHandler.parsers does not name it"),
            );
        }
    }
}

/// Section 7: consumers are bound to the name of the default producer, so one that goes by another name
/// works for nobody and a second one is made.
fn unread_producers(loaded: &Loaded<'_>, notes: &mut Notes) {
    for instance in loaded
        .instances
        .iter()
        .filter(|i| i.roles.producer.is_some())
    {
        let Some(position) = written(instance) else {
            continue;
        };
        let name = &instance.name.name;
        let made: Vec<&KeyUse> = loaded
            .keys
            .iter()
            .filter(|k| k.produced_by.contains(name))
            .collect();
        let is_read = |k: &&KeyUse| !(k.required_by.is_empty() && k.optional_for.is_empty());
        if made.is_empty() || made.iter().any(is_read) {
            continue;
        }
        let second = loaded.instances.iter().find(|other| {
            written(other).is_none()
                && loaded.keys.iter().any(|k| {
                    k.produced_by.contains(&other.name.name)
                        && made.iter().any(|m| m.data_type == k.data_type)
                })
        });
        let Some(second) = second else { continue };
        let default = &second.name.name;
        notes.add(
            format!("plugins[{position}]"),
            format!(
                "nobody reads what '{name}' produces, and '{default}' was added beside it: rename it, \
                 or name it in the *ProducerName parameters of its consumers"
            ),
        );
    }
}

fn parsers(loaded: &Loaded<'_>, notes: &mut Notes) {
    let listed = loaded.document.request_handler.as_ref();
    let written = listed.map_or(0, |handler| handler.parsers.len());
    let mut fallback: Option<&str> = None;
    let mut types: Vec<&str> = Vec::new();
    for (position, parser) in loaded.parsers.iter().enumerate().take(written) {
        let field = format!("requestHandler.parsers[{position}]");
        if let Some(fallback) = fallback {
            let text = format!("has no effect: '{fallback}' before it takes every path");
            notes.add(field, text);
            continue;
        }
        if types.contains(&parser.plugin_type) {
            notes.add(
                field,
                format!(
                    "has no effect: a {} is listed before it",
                    parser.plugin_type
                ),
            );
            continue;
        }
        types.push(parser.plugin_type);
        let suffixes = parser.roles.parser.as_ref().map(|p| p.path_suffixes());
        if suffixes.is_some_and(<[_]>::is_empty) {
            fallback = Some(&parser.name.name);
        }
    }
}

fn data_layer(layer: &DataLayer, loaded: &Loaded<'_>, notes: &mut Notes) {
    if layer.peer_discovery.is_some() {
        notes.add("dataLayer.peerDiscovery", "has no effect");
    }
    if layer.cross_replica_sync_interval.is_some() {
        notes.add(
            "dataLayer.crossReplicaSyncInterval",
            "has no effect without crossReplicaSyncerPluginRef",
        );
    }
    let type_of = |name: &str| {
        let instance = loaded.instances.iter().find(|i| i.name.name == name);
        instance.map(|i| i.plugin_type)
    };
    let scraping: Vec<(usize, &str)> = layer
        .sources
        .iter()
        .enumerate()
        .filter(|(_, source)| type_of(&source.plugin_ref) == Some("metrics-data-source"))
        .map(|(position, source)| (position, source.plugin_ref.as_str()))
        .collect();
    if let [(position, name), .., (_, added)] = scraping.as_slice() {
        notes.add(
            format!("dataLayer.sources[{position}]"),
            format!(
                "every endpoint is scraped twice, by '{name}' and by '{added}'; with \
                 injectDefaults: false only by '{name}'"
            ),
        );
    }
}
