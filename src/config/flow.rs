//! Checks of the `flowControl` block, which this version reads and does not run.

use super::raw::{Document, FlowControl, PriorityBand};

/// Policies that exist without being listed.
const DEFAULT_POLICIES: [&str; 3] = [
    "fcfs-ordering-policy",
    "global-strict-fairness-policy",
    "static-usage-limit-policy",
];

/// Every problem of the block, as field and text. With the gate on the first is an error; with the
/// gate off the block is ignored, so they are warnings.
pub(super) fn problems(document: &Document) -> Vec<(String, String)> {
    let Some(flow) = &document.flow_control else {
        return Vec::new();
    };
    let mut problems = Vec::new();
    caps(flow, &mut problems);
    levels(flow, &mut problems);
    for (field, name) in references(flow) {
        let listed = document.plugins.iter().any(|p| p.instance_name() == name);
        if !listed && !DEFAULT_POLICIES.contains(&name) {
            problems.push((field, format!("plugin {name:?} not found")));
        }
    }
    problems
}

/// True when the block says more than which detector to use.
pub(super) fn is_used(flow: &FlowControl) -> bool {
    let FlowControl {
        max_bytes,
        max_requests,
        default_request_ttl,
        no_endpoint_request_ttl,
        default_priority_band,
        default_negative_priority_band,
        priority_bands,
        usage_limit_policy_plugin_ref,
        saturation_detector: _,
        enable_eviction,
    } = flow;
    max_bytes.is_some()
        || max_requests.is_some()
        || default_request_ttl.is_some()
        || no_endpoint_request_ttl.is_some()
        || default_priority_band.is_some()
        || default_negative_priority_band.is_some()
        || !priority_bands.is_empty()
        || !usage_limit_policy_plugin_ref.is_empty()
        || enable_eviction.is_some()
}

fn bands(flow: &FlowControl) -> impl Iterator<Item = (String, &PriorityBand)> {
    let templates = [
        ("defaultPriorityBand", &flow.default_priority_band),
        (
            "defaultNegativePriorityBand",
            &flow.default_negative_priority_band,
        ),
    ];
    let templates = templates
        .into_iter()
        .filter_map(|(name, band)| Some((format!("flowControl.{name}"), band.as_ref()?)));
    let listed = flow.priority_bands.iter().enumerate();
    templates.chain(listed.map(|(i, band)| (format!("flowControl.priorityBands[{i}]"), band)))
}

fn caps(flow: &FlowControl, problems: &mut Vec<(String, String)>) {
    let of_all = std::iter::once(("flowControl".to_owned(), flow.max_bytes, flow.max_requests));
    let of_bands = bands(flow).map(|(field, band)| (field, band.max_bytes, band.max_requests));
    for (field, bytes, requests) in of_all.chain(of_bands) {
        for (name, cap) in [("maxBytes", bytes), ("maxRequests", requests)] {
            if let Some(cap) = cap.filter(|cap| cap.0 < 0) {
                problems.push((
                    format!("{field}.{name}"),
                    format!("{name} must be non-negative, got {}", cap.0),
                ));
            }
        }
    }
}

fn levels(flow: &FlowControl, problems: &mut Vec<(String, String)>) {
    for (position, band) in flow.priority_bands.iter().enumerate() {
        let mut before = flow.priority_bands.iter().take(position);
        if before.any(|other| other.priority == band.priority) {
            problems.push((
                format!("flowControl.priorityBands[{position}]"),
                format!("duplicate priority level {}", band.priority),
            ));
        }
    }
}

fn references(flow: &FlowControl) -> impl Iterator<Item = (String, &str)> {
    let of_bands = bands(flow).flat_map(|(field, band)| {
        [
            (
                format!("{field}.fairnessPolicyRef"),
                band.fairness_policy_ref.as_str(),
            ),
            (
                format!("{field}.orderingPolicyRef"),
                band.ordering_policy_ref.as_str(),
            ),
        ]
    });
    let limit = (
        "flowControl.usageLimitPolicyPluginRef".to_owned(),
        flow.usage_limit_policy_plugin_ref.as_str(),
    );
    of_bands.chain([limit]).filter(|(_, name)| !name.is_empty())
}
