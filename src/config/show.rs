//! The resolved configuration and the plugin list, for people.

use std::fmt::Write;

use serde_json::{Value, json};

use super::builtin::{Instance, Origin, PluginType, Registry};
use super::raw::{self, DataLayer};
use super::{ResolvedConfig, ResolvedProfile};
use crate::plugin::Maturity;
use crate::plugin::data::KeyUse;

/// The configuration as a document that says everything: defaults filled, instances that were added
/// with the reason, profiles with weights and pickers, sources, parsers, detector. Loading it gives the
/// same configuration. How data flows between plugins follows in comments.
pub fn resolved(config: &ResolvedConfig, registry: &Registry) -> String {
    let mut out = format!(
        "apiVersion: {}\nkind: EndpointPickerConfig\n",
        raw::API_VERSION
    );
    list(&mut out, 0, "featureGates", &config.document.feature_gates);
    out.push_str("plugins:\n");
    for instance in &config.instances {
        instance_entry(&mut out, instance, registry.get(instance.plugin_type));
    }
    out.push_str("schedulingProfiles:\n");
    for profile in &config.profiles {
        profile_entry(&mut out, profile);
    }
    if let Some(layer) = &config.document.data_layer {
        data_layer(&mut out, layer);
    }
    out.push_str("requestHandler:\n  parsers:\n");
    for parser in &config.parsers {
        let _ = writeln!(out, "  - pluginRef: {}", text(&parser.name.name));
    }
    let _ = writeln!(
        out,
        "flowControl:\n  saturationDetector:\n    pluginRef: {}",
        text(&config.saturation_detector.0.name)
    );
    data_flow(&mut out, config);
    out
}

fn instance_entry(out: &mut String, instance: &Instance, plugin_type: Option<&PluginType>) {
    if let Origin::Added(why) = &instance.origin {
        let _ = writeln!(out, "# added: {why}");
    }
    let _ = writeln!(
        out,
        "- name: {}\n  type: {}",
        text(&instance.name.name),
        text(instance.plugin_type)
    );
    let parameters = plugin_type.map(|t| effective(t, instance.parameters.as_ref()));
    let parameters = parameters.unwrap_or_default();
    if !parameters.is_empty() {
        out.push_str("  parameters:\n");
    }
    for (name, value) in parameters {
        let _ = writeln!(out, "    {name}: {}", scalar(&value));
    }
}

/// Every parameter with its value: as given, or the default where that is a value.
fn effective(plugin_type: &PluginType, given: Option<&Value>) -> Vec<(&'static str, Value)> {
    let object = given.and_then(Value::as_object);
    let written = |name: &str| {
        let mut entries = object.into_iter().flatten();
        // Of spellings that differ in case the last counts.
        entries
            .rfind(|(key, value)| key.eq_ignore_ascii_case(name) && !value.is_null())
            .map(|(_, value)| value.clone())
    };
    plugin_type
        .parameters
        .iter()
        .filter_map(|doc| Some((doc.name, written(doc.name).or_else(|| doc.default_value())?)))
        .collect()
}

fn profile_entry(out: &mut String, profile: &ResolvedProfile) {
    let _ = writeln!(out, "- name: {}\n  plugins:", text(&profile.name));
    let weight_of = |name: &str| {
        let mut found = profile.scorers.iter().filter(|(n, ..)| n.name == name);
        found.next().map(|(_, _, weight)| *weight)
    };
    let filters = profile.filters.iter().map(|(n, _)| &n.name);
    for name in filters.clone() {
        reference(out, name, weight_of(name));
    }
    for (name, _, weight) in &profile.scorers {
        if !filters.clone().any(|filter| *filter == name.name) {
            reference(out, &name.name, Some(*weight));
        }
    }
    reference(out, &profile.picker.0.name, None);
}

fn reference(out: &mut String, name: &str, weight: Option<f64>) {
    let _ = writeln!(out, "  - pluginRef: {}", text(name));
    if let Some(weight) = weight {
        let _ = writeln!(out, "    weight: {weight}");
    }
}

fn data_layer(out: &mut String, layer: &DataLayer) {
    // Everything is said below, so nothing may be added.
    out.push_str("dataLayer:\n  injectDefaults: false\n");
    if let Some(discovery) = &layer.discovery {
        let name = text(&discovery.plugin_ref);
        let _ = writeln!(out, "  discovery:\n    pluginRef: {name}");
    }
    if !layer.sources.is_empty() {
        out.push_str("  sources:\n");
    }
    for source in &layer.sources {
        let _ = writeln!(out, "  - pluginRef: {}", text(&source.plugin_ref));
        if !source.extractors.is_empty() {
            out.push_str("    extractors:\n");
        }
        for extractor in &source.extractors {
            let _ = writeln!(out, "    - pluginRef: {}", text(&extractor.plugin_ref));
        }
    }
}

fn data_flow(out: &mut String, config: &ResolvedConfig) {
    let producers: Vec<&str> = config
        .producers
        .iter()
        .map(|(n, _)| n.name.as_str())
        .collect();
    let _ = writeln!(
        out,
        "# Profile handler: {}\n# Producers, in the order they run: {}\n# Data:",
        config.profile_handler.0.name,
        producers.join(", ")
    );
    for key in &config.keys {
        let _ = writeln!(out, "#   {}", key_line(key));
    }
}

fn key_line(key: &KeyUse) -> String {
    let names = |names: &[String]| {
        let mut names: Vec<&str> = names.iter().map(String::as_str).collect();
        names.dedup();
        names.join(", ")
    };
    let mut line = format!("{}/{}: ", key.data_type, key.producer);
    if key.produced_by.is_empty() {
        line.push_str("made by nobody");
    } else {
        let _ = write!(line, "made by {}", names(&key.produced_by));
    }
    for (users, what) in [
        (&key.required_by, "required by"),
        (&key.optional_for, "read when present by"),
    ] {
        if !users.is_empty() {
            let _ = write!(line, "; {what} {}", names(users));
        }
    }
    line
}

fn list(out: &mut String, indent: usize, name: &str, items: &[String]) {
    if !items.is_empty() {
        let _ = writeln!(out, "{:indent$}{name}:", "");
    }
    for item in items {
        let _ = writeln!(out, "{:indent$}- {}", "", text(item));
    }
}

/// A string as YAML; quoted unless it is plainly a name.
fn text(value: &str) -> String {
    let plain = value.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/')
        && value
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-_./".contains(c))
        // YAML 1.1 has many words for these.
        && !["y", "n", "yes", "no", "on", "off", "true", "false", "null"]
            .contains(&value.to_ascii_lowercase().as_str());
    if plain {
        value.to_owned()
    } else {
        Value::from(value).to_string()
    }
}

/// A value on one line. JSON is YAML.
fn scalar(value: &Value) -> String {
    match value {
        Value::String(value) => text(value),
        other => other.to_string(),
    }
}

/// The reference page: every plugin type with its parameters, as Markdown.
pub fn plugins(registry: &Registry) -> String {
    let mut out = String::from(
        "# Plugins\n\n\
         Printed by `pinpod plugins`, from the definitions that read the configuration. Alpha types need\n\
         `--allow-experimental-plugins`. Names of parameters match in any case; a type that ignores\n\
         parameters says so, all others refuse names that are not listed.\n",
    );
    for kind in kinds(registry) {
        let _ = writeln!(out, "\n## {}\n", capitalized(kind));
        for plugin in registry.types().iter().filter(|p| first_kind(p) == kind) {
            plugin_section(&mut out, plugin);
        }
        while out.ends_with("\n\n") {
            out.pop();
        }
    }
    out
}

fn first_kind(plugin: &PluginType) -> &'static str {
    plugin.kinds.first().copied().unwrap_or("other")
}

/// Kinds in the order of their first type.
fn kinds(registry: &Registry) -> Vec<&'static str> {
    let mut kinds = Vec::new();
    for plugin in registry.types() {
        let kind = first_kind(plugin);
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    kinds
}

fn capitalized(kind: &str) -> String {
    let mut letters = kind.chars();
    let first = letters.next().map(|c| c.to_ascii_uppercase());
    first.into_iter().chain(letters).collect()
}

fn maturity(plugin: &PluginType) -> &'static str {
    match plugin.maturity {
        Maturity::Alpha => "alpha",
        Maturity::Beta => "beta",
    }
}

fn plugin_section(out: &mut String, plugin: &PluginType) {
    let _ = writeln!(
        out,
        "### {}\n\n{} ({}). {}",
        plugin.type_name,
        capitalized(&plugin.kinds.join(", ")),
        maturity(plugin),
        plugin.about
    );
    if let Some(replacement) = plugin.replacement {
        let _ = writeln!(out, "\nDeprecated: use {replacement}.");
    }
    if plugin.is_available() && plugin.lenient {
        out.push_str("\nIgnores any parameters.\n");
    }
    if !plugin.parameters.is_empty() {
        out.push_str("\n| parameter | type | default | meaning |\n|---|---|---|---|\n");
    }
    for parameter in plugin.parameters {
        let default = parameter.default_value();
        let default = match default {
            Some(value) => format!("`{}`", scalar(&value)),
            None => parameter.default.to_owned(),
        };
        let _ = writeln!(
            out,
            "| `{}` | {} | {default} | {} |",
            parameter.name, parameter.kind, parameter.help
        );
    }
    out.push('\n');
}

/// The plugin list for programs: an array of objects.
pub fn plugins_json(registry: &Registry) -> String {
    let types = registry.types().iter().map(|plugin| {
        let parameters = plugin.parameters.iter().map(|parameter| {
            json!({
                "name": parameter.name,
                "type": parameter.kind,
                "default": parameter.default_value(),
                "defaultText": parameter.default,
                "help": parameter.help,
            })
        });
        json!({
            "type": plugin.type_name,
            "kinds": plugin.kinds,
            "maturity": maturity(plugin),
            "available": plugin.is_available(),
            "deprecated": plugin.replacement,
            "ignoresParameters": plugin.lenient && plugin.is_available(),
            "about": plugin.about,
            "parameters": parameters.collect::<Vec<_>>(),
        })
    });
    let mut text = format!("{:#}", Value::Array(types.collect()));
    text.push('\n');
    text
}
