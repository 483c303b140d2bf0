//! The resolved configuration and the plugin list, for people.

use std::fmt::Write;

use super::{Registry, ResolvedConfig};
use crate::plugin::Maturity;

/// The resolved configuration as YAML: what runs, with defaults filled and weights shown.
pub fn resolved(config: &ResolvedConfig) -> String {
    let mut out = String::from("plugins:\n");
    for instance in &config.instances {
        let _ = writeln!(
            out,
            "- {{name: {:?}, type: {}}}",
            instance.name.name, instance.plugin_type
        );
    }
    let _ = writeln!(
        out,
        "profileHandler: {:?}\nschedulingProfiles:",
        config.profile_handler.0.name
    );
    for profile in &config.profiles {
        let _ = writeln!(out, "- name: {:?}", profile.name);
        list(
            &mut out,
            "  filters",
            profile.filters.iter().map(|(n, _)| format!("{:?}", n.name)),
        );
        let scorers = profile
            .scorers
            .iter()
            .map(|(n, _, w)| format!("{{name: {:?}, weight: {w:?}}}", n.name));
        list(&mut out, "  scorers", scorers);
        let _ = writeln!(out, "  picker: {:?}", profile.picker.0.name);
    }
    list(
        &mut out,
        "producers",
        config
            .producers
            .iter()
            .map(|(n, _)| format!("{:?}", n.name)),
    );
    list(
        &mut out,
        "parsers",
        config.parsers.iter().map(|p| format!("{:?}", p.name.name)),
    );
    let _ = writeln!(
        out,
        "saturationDetector: {:?}",
        config.saturation_detector.0.name
    );
    list(
        &mut out,
        "metricsSources",
        config.sources.iter().map(|s| format!("{:?}", s.name.name)),
    );
    let discovery = if config.discovery.is_some() {
        "file"
    } else {
        "none"
    };
    let _ = writeln!(out, "discovery: {discovery}");
    out
}

fn list(out: &mut String, name: &str, items: impl Iterator<Item = String>) {
    let items: Vec<String> = items.collect();
    let _ = writeln!(out, "{name}: [{}]", items.join(", "));
}

/// Every available plugin type with its parameters, as Markdown.
pub fn plugins(registry: &Registry) -> String {
    let mut out = String::new();
    for plugin in registry.types().iter().filter(|p| p.is_available()) {
        let maturity = if plugin.maturity == Maturity::Alpha {
            "alpha"
        } else {
            "beta"
        };
        let _ = writeln!(
            out,
            "## {}\n\n{} ({maturity}). {}",
            plugin.type_name,
            plugin.kinds.join(", "),
            plugin.about
        );
        if let Some(replacement) = plugin.replacement {
            let _ = writeln!(out, "Deprecated: use `{replacement}`.");
        }
        if !plugin.parameters.is_empty() {
            let _ = writeln!(
                out,
                "\n| parameter | type | default | meaning |\n|---|---|---|---|"
            );
        }
        for parameter in plugin.parameters {
            let _ = writeln!(
                out,
                "| `{}` | {} | {} | {} |",
                parameter.name, parameter.kind, parameter.default, parameter.help
            );
        }
        out.push('\n');
    }
    let later: Vec<_> = registry
        .types()
        .iter()
        .filter(|p| !p.is_available())
        .map(|p| p.type_name)
        .collect();
    let _ = writeln!(out, "Known, not yet available: {}.", later.join(", "));
    out
}
