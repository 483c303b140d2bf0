//! The document as it is written. Strict: unknown and repeated keys are errors, names are
//! case-sensitive; only `parameters` are left to their plugins.

use serde::Deserialize;
use serde_json::Value;

use super::quantity::Quantity;
use super::{ConfigError, Problem};
use crate::plugin::duration::GoDuration;
use crate::plugin::go_value::{Names, read_value};

/// Current group and version.
pub const API_VERSION: &str = "llm-d.ai/v1alpha1";
/// Earlier spelling, accepted with a warning.
pub const LEGACY_API_VERSION: &str = "inference.networking.x-k8s.io/v1alpha1";

/// The document used when none is given.
pub const BUILT_IN: &str = "
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- type: queue-scorer
- type: kv-cache-utilization-scorer
- type: prefix-cache-scorer
- type: metrics-data-source
- type: core-metrics-extractor
schedulingProfiles:
- name: default
  plugins:
  - {pluginRef: queue-scorer, weight: 2}
  - {pluginRef: kv-cache-utilization-scorer, weight: 2}
  - {pluginRef: prefix-cache-scorer, weight: 3}
dataLayer:
  sources:
  - pluginRef: metrics-data-source
    extractors: [{pluginRef: core-metrics-extractor}]
";

/// The whole document.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Document {
    /// `llm-d.ai/v1alpha1` or the legacy group.
    pub api_version: String,
    /// `EndpointPickerConfig`.
    pub kind: String,
    /// `name`, `name=true`, `name=false`.
    pub feature_gates: Vec<String>,
    /// Instances.
    pub plugins: Vec<PluginEntry>,
    /// Profiles in order.
    pub scheduling_profiles: Vec<ProfileEntry>,
    /// Sources, extractors, discovery.
    pub data_layer: Option<DataLayer>,
    /// Queueing; only its detector counts without the gate.
    pub flow_control: Option<FlowControl>,
    /// Parsers.
    pub request_handler: Option<RequestHandler>,
    /// Deprecated: `flowControl.saturationDetector`.
    pub saturation_detector: Option<Reference>,
    /// Deprecated: `requestHandler.parsers`.
    pub parser: Option<Reference>,
}

/// One plugin instance.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct PluginEntry {
    /// Registered type.
    #[serde(default, rename = "type")]
    pub type_name: String,
    /// Instance name; the type when empty.
    #[serde(default)]
    pub name: String,
    /// Handed to the plugin.
    #[serde(default)]
    pub parameters: Option<Value>,
}

/// One scheduling profile.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct ProfileEntry {
    /// Unique name.
    pub name: String,
    /// Filters, scorers and a picker.
    pub plugins: Vec<ProfilePlugin>,
}

/// A plugin of a profile.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct ProfilePlugin {
    /// Instance name.
    pub plugin_ref: String,
    /// Weight of a scorer.
    pub weight: Option<f64>,
}

/// `dataLayer`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct DataLayer {
    /// Add the default metrics source; true when absent.
    pub inject_defaults: Option<bool>,
    /// Sources with their extractors.
    pub sources: Vec<SourceEntry>,
    /// Endpoint discovery; switches Kubernetes off.
    pub discovery: Option<Reference>,
    /// Accepted; nothing reads it.
    pub peer_discovery: Option<Reference>,
    /// Accepted when empty; no such plugin exists.
    pub cross_replica_syncer_plugin_ref: String,
    /// Accepted with the above.
    pub cross_replica_sync_interval: Option<GoDuration>,
}

/// A data source and what reads it.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct SourceEntry {
    /// Source instance.
    pub plugin_ref: String,
    /// Extractor instances.
    pub extractors: Vec<Reference>,
}

/// `requestHandler`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct RequestHandler {
    /// Parser instances or types.
    pub parsers: Vec<Reference>,
}

/// A reference to an instance.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Reference {
    /// Instance name.
    pub plugin_ref: String,
}

/// `flowControl`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct FlowControl {
    /// Bytes queued over all bands; absent and 0 mean no limit.
    pub max_bytes: Option<Quantity>,
    /// Requests queued over all bands; absent and 0 mean no limit.
    pub max_requests: Option<Quantity>,
    /// How long a request may wait.
    #[serde(rename = "defaultRequestTTL")]
    pub default_request_ttl: Option<GoDuration>,
    /// How long a request may wait while there is no endpoint.
    #[serde(rename = "noEndpointRequestTTL")]
    pub no_endpoint_request_ttl: Option<GoDuration>,
    /// Template of bands that are made as priorities appear.
    pub default_priority_band: Option<PriorityBand>,
    /// The same for priorities below 0.
    pub default_negative_priority_band: Option<PriorityBand>,
    /// Bands with settings of their own.
    pub priority_bands: Vec<PriorityBand>,
    /// Usage limit policy instance.
    pub usage_limit_policy_plugin_ref: String,
    /// Saturation detector instance; counts with the gate off, too.
    pub saturation_detector: Option<Reference>,
    /// Revoke requests in flight.
    pub enable_eviction: Option<bool>,
}

/// A priority band of `flowControl`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct PriorityBand {
    /// Higher is served first.
    pub priority: i64,
    /// Bytes queued in the band.
    pub max_bytes: Option<Quantity>,
    /// Requests queued in the band.
    pub max_requests: Option<Quantity>,
    /// Fairness policy instance.
    pub fairness_policy_ref: String,
    /// Ordering policy instance.
    pub ordering_policy_ref: String,
}

/// Decodes a document and checks group, version and kind.
pub fn decode(value: Value) -> Result<Document, ConfigError> {
    let document: Document = read_value(value, Names::Exact)
        .map_err(|error| Problem::Decode(error.problem).at(error.path))?;
    if document.kind != "EndpointPickerConfig" {
        let text = format!("expected EndpointPickerConfig, got {:?}", document.kind);
        return Err(Problem::Decode(text).at("kind"));
    }
    if ![API_VERSION, LEGACY_API_VERSION].contains(&document.api_version.as_str()) {
        let text = format!("expected {API_VERSION}, got {:?}", document.api_version);
        return Err(Problem::Decode(text).at("apiVersion"));
    }
    Ok(document)
}

impl PluginEntry {
    /// The name, or the type when none is written.
    pub fn instance_name(&self) -> &str {
        if self.name.is_empty() {
            &self.type_name
        } else {
            &self.name
        }
    }
}
