//! Every plugin type, one line each.

use std::sync::Arc;

use crate::control::admitters::ProbabilisticAdmitter;
use crate::control::header_processors::AgentIdentity;
use crate::control::producers::approx_prefix::ApproxPrefixProducer;
use crate::control::producers::burst_prefix::BurstPrefixProducer;
use crate::control::producers::inflight_load::InFlightLoadProducer;
use crate::control::producers::mm_embeddings_cache::MmEmbeddingsCacheProducer;
use crate::control::producers::p2p_source::P2pSourceProducer;
use crate::control::producers::precise_prefix::{PrecisePrefixProducer, PrecisePrefixScorer};
use crate::control::producers::session_id::SessionIdProducer;
use crate::control::producers::token::TokenProducer;
use crate::control::screeners::DisaggregatedSetRolloutScreener;
use crate::control::session_affinity::{SessionAffinityFilter, SessionAffinityScorer};
use crate::datalayer::EndpointListener;
use crate::datalayer::discovery::{Discovery, FileDiscovery, MulticlusterFileDiscovery};
use crate::datalayer::extractors::{
    CoreMetricsExtractor, DcgmExtractor, Extractor, ModelsDataExtractor,
    MulticlusterMetricsExtractor, TopologyExtractor,
};
use crate::datalayer::sources::{
    DataSource, DcgmDataSource, EndpointNotificationSource, K8sNotificationSource,
    MetricsDataSource, ModelsDataSource, MulticlusterMetricsDataSource,
};
use crate::plugin::data::Declaration;
use crate::plugin::{Build, Maturity, ParamDoc, Plugin, PluginError, TypedName};
use crate::request::Parser;
use crate::request::anthropic::AnthropicParser;
use crate::request::openai::OpenAiParser;
use crate::request::passthrough::PassthroughParser;
use crate::request::sglang_http::SglangHttpParser;
use crate::request::vertexai::VertexAiParser;
use crate::request::vllm_grpc::VllmGrpcParser;
use crate::request::vllm_http::VllmHttpParser;
use crate::response::request_attribute_reporter::RequestAttributeReporter;
use crate::response::served_verifier::DestinationEndpointServedVerifier;
use crate::response::{ResponseCompleteHook, ResponseHeaderHook};
use crate::scheduling::deciders::{AlwaysDecider, AlwaysMultimodalDecider, PrefixBasedDecider};
use crate::scheduling::filters::{
    ByLabelFilter, ConcurrencyDetector, ContextLengthAware, DecodeFilter, EncodeFilter,
    EndpointAttributeFilter, HeaderBasedTestingFilter, LabelSelectorFilter, PrefillFilter,
    PrefixCacheAffinityFilter, TopologyAffinityFilter, UtilizationDetector, UtilizationFilter,
};
use crate::scheduling::pickers::{MaxScorePicker, RandomPicker, WeightedRandomPicker};
use crate::scheduling::profile_handlers::{
    DataParallelProfileHandler, DisaggHeadersHandler, DisaggProfileHandler, HeaderProfileHandler,
    PdProfileHandler, SingleProfileHandler,
};
use crate::scheduling::scorers::{
    ActiveRequestScorer, EndpointAttributeScorer, HeaderLabelAffinityScorer,
    KvCacheUtilizationScorer, LoadAwareScorer, LoraAffinityScorer, MmEmbeddingsCacheScorer,
    MulticlusterKvCacheUtilizationScorer, MulticlusterQueueScorer, NoHitLruScorer,
    PrefixCacheScorer, QueueScorer, RunningRequestsSizeScorer, TokenLoadScorer,
    TopologyAffinityScorer,
};
use crate::scheduling::{
    Admitter, DataProducer, Decider, Filter, Picker, PreRequest, ProfileHandler,
    RequestHeaderProcessor, SaturationDetector, Scorer, Screener,
};

/// One built plugin and the roles it can play.
#[derive(Debug, Clone, Default)]
pub struct Roles {
    /// Narrows candidates.
    pub filter: Option<Arc<dyn Filter>>,
    /// Rates candidates.
    pub scorer: Option<Arc<dyn Scorer>>,
    /// Chooses.
    pub picker: Option<Arc<dyn Picker>>,
    /// Runs profiles.
    pub profile_handler: Option<Arc<dyn ProfileHandler>>,
    /// Decides about stages of disaggregated serving.
    pub decider: Option<Arc<dyn Decider>>,
    /// Reads request headers.
    pub header_processor: Option<Arc<dyn RequestHeaderProcessor>>,
    /// Restricts candidates.
    pub screener: Option<Arc<dyn Screener>>,
    /// Computes data.
    pub producer: Option<Arc<dyn DataProducer>>,
    /// Refuses requests.
    pub admitter: Option<Arc<dyn Admitter>>,
    /// Runs after the pick.
    pub pre_request: Option<Arc<dyn PreRequest>>,
    /// Adds response headers.
    pub response_headers: Option<Arc<dyn ResponseHeaderHook>>,
    /// Runs at the end of a response.
    pub response_complete: Option<Arc<dyn ResponseCompleteHook>>,
    /// Measures the pool.
    pub saturation_detector: Option<Arc<dyn SaturationDetector>>,
    /// Reads bodies.
    pub parser: Option<Arc<dyn Parser>>,
    /// Wants to know endpoints.
    pub listener: Option<Arc<dyn EndpointListener>>,
    /// What is fetched from endpoints or told about them.
    pub data_source: Option<Arc<dyn DataSource>>,
    /// Reads what a polling source fetched.
    pub extractor: Option<Arc<dyn Extractor>>,
    /// Where endpoints come from.
    pub discovery: Option<Arc<dyn Discovery>>,
}

/// One instance of the configuration.
#[derive(Debug, Clone)]
pub struct Instance {
    /// Type as reported in metrics, and name.
    pub name: TypedName,
    /// Its entry in the registry.
    pub plugin_type: &'static str,
    /// What it was built from; `None` when the type ignores parameters.
    pub parameters: Option<serde_json::Value>,
    /// Why it is there.
    pub origin: Origin,
    /// What it can do.
    pub roles: Roles,
    /// Data keys it declared while it was built.
    pub declared: Vec<Declaration>,
}

/// Why an instance is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// The document lists it, at this position of `plugins`.
    Written(usize),
    /// Defaulting added it, for this reason.
    Added(String),
}

/// Builds an instance's roles.
type Factory = fn(&mut Build<'_>) -> Result<Roles, PluginError>;

/// What the registry knows of a type.
#[derive(Debug, Clone)]
pub struct PluginType {
    /// Registered name.
    pub type_name: &'static str,
    /// Roles, for people.
    pub kinds: &'static [&'static str],
    /// How settled it is.
    pub maturity: Maturity,
    /// Accepted parameters.
    pub parameters: &'static [ParamDoc],
    /// Any parameters are accepted and ignored.
    pub lenient: bool,
    /// One sentence.
    pub about: &'static str,
    /// For a deprecated name: what to write instead.
    pub replacement: Option<&'static str>,
    /// Type that instances report in metrics and logs.
    pub reported: &'static str,
    build: Option<Factory>,
}

/// Parameters that name another instance, which must exist and is built first. `deciders.*` stands for
/// every value of the object.
const REFERENCES: &[(&str, &[&str])] = &[
    (
        "disagg-profile-handler",
        &[
            "deciders.*",
            "deciderPluginName",
            "prefillDeciderPluginName",
            "encodeDeciderPluginName",
        ],
    ),
    (
        "pd-profile-handler",
        &["deciderPluginName", "prefixPluginName"],
    ),
];

impl PluginType {
    /// Builds an instance; `None` for a type of a later version.
    pub fn build(&self, build: &mut Build<'_>) -> Option<Result<Roles, PluginError>> {
        self.build.map(|make| make(build))
    }

    /// False for a type of a later version.
    pub fn is_available(&self) -> bool {
        self.build.is_some()
    }

    /// Default of the parameter called `name`, when it is a value.
    pub fn default_of(&self, name: &str) -> Option<serde_json::Value> {
        let mut parameters = self.parameters.iter();
        parameters.find(|p| p.name == name)?.default_value()
    }

    /// Names of the instances that `parameters` refer to.
    pub fn references<'a>(&self, parameters: Option<&'a serde_json::Value>) -> Vec<&'a str> {
        let Some((_, paths)) = REFERENCES.iter().find(|(name, _)| *name == self.type_name) else {
            return Vec::new();
        };
        let object = parameters.and_then(|p| p.as_object());
        let given = |key: &str| {
            let entries = object.into_iter().flatten();
            let key = key.to_owned();
            entries
                .filter(move |(k, _)| k.eq_ignore_ascii_case(&key))
                .map(|(_, value)| value)
        };
        let mut names = Vec::new();
        for path in *paths {
            let (key, inner) = path
                .split_once(".*")
                .map_or((*path, false), |(key, _)| (key, true));
            for value in given(key) {
                match value.as_object().filter(|_| inner) {
                    Some(object) => names.extend(object.values().filter_map(|v| v.as_str())),
                    None => names.extend(value.as_str()),
                }
            }
        }
        names.retain(|name| !name.is_empty());
        if self.type_name == PdProfileHandler::TYPE {
            let mut named = given("deciderPluginName").filter_map(|v| v.as_str());
            if named.all(str::is_empty) {
                names.push(PrefixBasedDecider::TYPE);
            }
        }
        names
    }

    /// The same plugin under the name it has where endpoints are whole clusters.
    fn over_clusters(mut self, name: &'static str) -> Self {
        self.type_name = name;
        self.reported = name;
        self.maturity = Maturity::Alpha;
        self
    }

    fn deprecated(mut self, name: &'static str, replacement: &'static str) -> Self {
        self.type_name = name;
        self.reported = name;
        self.replacement = Some(replacement);
        self
    }

    fn instead(mut self, replacement: &'static str) -> Self {
        self.replacement = Some(replacement);
        self
    }

    fn reports(mut self, type_name: &'static str) -> Self {
        self.reported = type_name;
        self
    }
}

/// All known types.
#[derive(Debug, Clone)]
pub struct Registry(Vec<PluginType>);

impl Registry {
    /// A registry of these types.
    pub fn new(types: Vec<PluginType>) -> Self {
        Self(types)
    }

    /// The type called `name`.
    pub fn get(&self, name: &str) -> Option<&PluginType> {
        self.0.iter().find(|t| t.type_name == name)
    }

    /// All types in listing order.
    pub fn types(&self) -> &[PluginType] {
        &self.0
    }
}

/// `plugin!(Struct, [kinds], |p, roles| assignments)`: a type whose instances play the given roles.
macro_rules! plugin {
    ($type:ty, [$($kind:literal => $role:ident),*]) => {
        PluginType {
            type_name: <$type as Plugin>::TYPE,
            kinds: &[$($kind),*],
            maturity: <$type as Plugin>::MATURITY,
            parameters: <$type as Plugin>::PARAMETERS,
            lenient: <$type as Plugin>::LENIENT,
            about: <$type as Plugin>::ABOUT,
            replacement: None,
            reported: <$type as Plugin>::TYPE,
            build: Some(|build| {
                let plugin = Arc::new(<$type as Plugin>::build(build)?);
                Ok(Roles { $($role: Some(Arc::clone(&plugin) as _),)* ..Roles::default() })
            }),
        }
    };
}

/// A type that is accepted and does nothing: queueing policies that defaulting names.
fn inert(
    type_name: &'static str,
    kind: &'static [&'static str],
    about: &'static str,
) -> PluginType {
    PluginType {
        type_name,
        kinds: kind,
        maturity: Maturity::Beta,
        parameters: &[],
        lenient: true,
        about,
        replacement: None,
        reported: type_name,
        build: Some(|_| Ok(Roles::default())),
    }
}

/// A type of the catalogue that a later version brings.
fn later(
    type_name: &'static str,
    kinds: &'static [&'static str],
    maturity: Maturity,
) -> PluginType {
    PluginType {
        type_name,
        kinds,
        maturity,
        parameters: &[],
        lenient: true,
        about: "Known, not yet available in this version.",
        replacement: None,
        reported: type_name,
        build: None,
    }
}

/// Types of the catalogue that are not available yet.
fn catalogue_to_come() -> Vec<PluginType> {
    use Maturity::{Alpha, Beta};
    vec![
        later("slo-headroom-tier-filter", &["filter"], Beta),
        later("latency-scorer", &["scorer"], Beta),
        later("predicted-latency-producer", &["data producer"], Beta),
        later("latency-slo-admitter", &["admitter"], Beta),
        later("round-robin-fairness-policy", &["fairness"], Beta),
        later("program-aware-fairness", &["fairness"], Beta),
        later("edf-ordering-policy", &["ordering"], Beta),
        later("slo-deadline-ordering-policy", &["ordering"], Beta),
        later("priority-holdback-policy", &["usage limit"], Alpha),
        later("soft-reflective-ceiling-policy", &["usage limit"], Alpha),
    ]
}

/// Stages of a request on endpoints of their own.
fn disaggregation() -> Vec<PluginType> {
    vec![
        plugin!(DisaggProfileHandler, ["profile handler" => profile_handler, "pre-request" => pre_request]),
        plugin!(DataParallelProfileHandler, ["profile handler" => profile_handler, "pre-request" => pre_request])
            .instead("single-profile-handler, with a gateway that supports several target ports"),
        plugin!(PdProfileHandler, ["profile handler" => profile_handler, "pre-request" => pre_request])
            .instead("disagg-profile-handler"),
        plugin!(PrefixBasedDecider, ["decider" => decider]),
        plugin!(AlwaysDecider, ["decider" => decider]),
        plugin!(AlwaysMultimodalDecider, ["decider" => decider]),
        plugin!(DisaggHeadersHandler, ["pre-request" => pre_request]).instead("disagg-profile-handler"),
        plugin!(DisaggHeadersHandler, ["pre-request" => pre_request])
            .deprecated("prefill-header-handler", "disagg-profile-handler")
            .reports("disagg-headers-handler"),
        plugin!(P2pSourceProducer, ["data producer" => producer, "pre-request" => pre_request]),
    ]
}

/// The registry of this build.
pub fn registry() -> Registry {
    let mut types = vec![
        plugin!(SingleProfileHandler, ["profile handler" => profile_handler]),
        plugin!(HeaderProfileHandler, ["profile handler" => profile_handler]),
        plugin!(DecodeFilter, ["filter" => filter]).reports("by-label"),
        plugin!(PrefillFilter, ["filter" => filter]).reports("by-label"),
        plugin!(EncodeFilter, ["filter" => filter]).reports("by-label"),
        plugin!(LabelSelectorFilter, ["filter" => filter]),
        plugin!(LabelSelectorFilter, ["filter" => filter])
            .deprecated("by-label-selector", "label-selector-filter"),
        plugin!(ByLabelFilter, ["filter" => filter])
            .deprecated("by-label", "label-selector-filter"),
        plugin!(PrefixCacheAffinityFilter, ["filter" => filter]),
        plugin!(HeaderBasedTestingFilter, ["filter" => filter]),
        plugin!(UtilizationFilter, ["filter" => filter]),
        plugin!(EndpointAttributeFilter, ["filter" => filter]),
        plugin!(TopologyAffinityFilter, ["filter" => filter]),
        plugin!(ConcurrencyDetector, ["filter" => filter, "saturation detector" => saturation_detector]),
        plugin!(UtilizationDetector, ["filter" => filter, "saturation detector" => saturation_detector]),
        plugin!(ContextLengthAware, ["filter" => filter, "scorer" => scorer]),
        plugin!(QueueScorer, ["scorer" => scorer]),
        plugin!(KvCacheUtilizationScorer, ["scorer" => scorer]),
        plugin!(RunningRequestsSizeScorer, ["scorer" => scorer]),
        plugin!(LoadAwareScorer, ["scorer" => scorer]),
        plugin!(PrefixCacheScorer, ["scorer" => scorer]),
        plugin!(PrefixCacheScorer, ["scorer" => scorer])
            .over_clusters("multicluster-prefix-cache-scorer"),
        plugin!(NoHitLruScorer, ["scorer" => scorer, "pre-request" => pre_request, "endpoint listener" => listener]),
        plugin!(LoraAffinityScorer, ["scorer" => scorer]),
        plugin!(ActiveRequestScorer, ["scorer" => scorer]),
        plugin!(TokenLoadScorer, ["scorer" => scorer]),
        plugin!(SessionAffinityFilter, ["filter" => filter, "request header" => header_processor, "pre-request" => pre_request, "response" => response_headers]),
        plugin!(SessionAffinityFilter, ["filter" => filter, "request header" => header_processor, "pre-request" => pre_request, "response" => response_headers])
            .over_clusters("multicluster-session-affinity-filter"),
        plugin!(SessionAffinityScorer, ["scorer" => scorer, "request header" => header_processor, "pre-request" => pre_request, "response" => response_headers]),
        plugin!(HeaderLabelAffinityScorer, ["scorer" => scorer]),
        plugin!(EndpointAttributeScorer, ["scorer" => scorer]),
        plugin!(TopologyAffinityScorer, ["scorer" => scorer]),
        plugin!(MulticlusterQueueScorer, ["scorer" => scorer]),
        plugin!(MulticlusterKvCacheUtilizationScorer, ["scorer" => scorer]),
        plugin!(MmEmbeddingsCacheScorer, ["scorer" => scorer]),
        plugin!(MaxScorePicker, ["picker" => picker]),
        plugin!(RandomPicker, ["picker" => picker]),
        plugin!(WeightedRandomPicker, ["picker" => picker]),
        plugin!(TokenProducer, ["data producer" => producer]),
        plugin!(TokenProducer, ["data producer" => producer])
            .deprecated("tokenizer", "token-producer"),
        plugin!(ApproxPrefixProducer, ["data producer" => producer, "pre-request" => pre_request, "endpoint listener" => listener]),
        plugin!(ApproxPrefixProducer, ["data producer" => producer, "pre-request" => pre_request, "endpoint listener" => listener])
            .over_clusters("multicluster-approx-prefix-cache-producer"),
        plugin!(PrecisePrefixProducer, ["data producer" => producer, "pre-request" => pre_request, "endpoint listener" => listener]),
        plugin!(PrecisePrefixScorer, ["scorer" => scorer, "data producer" => producer, "pre-request" => pre_request, "endpoint listener" => listener])
            .instead("precise-prefix-cache-producer and prefix-cache-scorer"),
        plugin!(BurstPrefixProducer, ["data producer" => producer]),
        plugin!(MmEmbeddingsCacheProducer, ["data producer" => producer, "pre-request" => pre_request, "endpoint listener" => listener]),
        plugin!(InFlightLoadProducer, ["data producer" => producer, "pre-request" => pre_request]),
        plugin!(SessionIdProducer, ["data producer" => producer]),
        plugin!(AgentIdentity, ["request header" => header_processor]),
        plugin!(DisaggregatedSetRolloutScreener, ["screener" => screener, "response" => response_headers, "endpoint listener" => listener]),
        plugin!(ProbabilisticAdmitter, ["admitter" => admitter]),
        plugin!(RequestAttributeReporter, ["response" => response_complete]),
        plugin!(DestinationEndpointServedVerifier, ["response" => response_headers]),
        plugin!(OpenAiParser, ["parser" => parser]),
        plugin!(AnthropicParser, ["parser" => parser]),
        plugin!(VllmHttpParser, ["parser" => parser]),
        plugin!(SglangHttpParser, ["parser" => parser]),
        plugin!(VllmGrpcParser, ["parser" => parser]),
        plugin!(VertexAiParser, ["parser" => parser]),
        plugin!(PassthroughParser, ["parser" => parser]),
        plugin!(MetricsDataSource, ["data source" => data_source]),
        plugin!(ModelsDataSource, ["data source" => data_source]),
        plugin!(DcgmDataSource, ["data source" => data_source]),
        plugin!(MulticlusterMetricsDataSource, ["data source" => data_source]),
        plugin!(K8sNotificationSource, ["data source" => data_source]),
        plugin!(EndpointNotificationSource, ["data source" => data_source]),
        plugin!(CoreMetricsExtractor, ["extractor" => extractor]),
        plugin!(ModelsDataExtractor, ["extractor" => extractor]),
        plugin!(DcgmExtractor, ["extractor" => extractor]),
        plugin!(MulticlusterMetricsExtractor, ["extractor" => extractor]),
        plugin!(TopologyExtractor, ["extractor" => listener]),
        plugin!(FileDiscovery, ["discovery" => discovery]),
        plugin!(MulticlusterFileDiscovery, ["discovery" => discovery]),
        inert(
            "fcfs-ordering-policy",
            &["ordering"],
            "Accepted: has no effect without flow control.",
        ),
        inert(
            "global-strict-fairness-policy",
            &["fairness"],
            "Accepted: has no effect without flow control.",
        ),
        inert(
            "static-usage-limit-policy",
            &["usage limit"],
            "Accepted: has no effect without flow control.",
        ),
    ];
    types.extend(disaggregation());
    types.extend(catalogue_to_come());
    Registry::new(types)
}
