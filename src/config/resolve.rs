//! Defaults, instances, references and checks: the load sequence of the contract.

use std::sync::Arc;

use super::ConfigError;
use super::builtin::{Instance, PluginType, Registry, Roles};
use super::raw::{
    DataLayer, Document, LEGACY_API_VERSION, PluginEntry, ProfileEntry, Reference, SourceEntry,
};
use crate::control::director::ActiveConfig;
use crate::datalayer::EndpointListener;
use crate::datalayer::discovery::file::FileDiscovery;
use crate::datalayer::scrape::{CoreMetricsExtractor, MetricsDataSource};
use crate::plugin::data::KeyUse;
use crate::plugin::{Build, Column, DataKeys, Hook, Maturity, Parameters, TypedName};
use crate::request::parsers::ParserSet;
use crate::response::ResponseHooks;
use crate::scheduling::attributes::{
    AGENT_IDENTITY, APPROX_PREFIX_PRODUCER, IN_FLIGHT, IN_FLIGHT_PRODUCER, PREFIX_MATCH,
    PrefixMatch, TOKEN_PRODUCER, TOKENIZED_PROMPT, UNCACHED_TOKENS,
};
use crate::scheduling::scheduler::{Profile, Scheduler};
use crate::scheduling::{DataProducer, Filter, Picker, ProfileHandler, SaturationDetector, Scorer};

/// What besides the document decides about loading.
#[derive(Debug, Clone, Copy, Default)]
pub struct LoadOptions {
    /// `--allow-experimental-plugins`.
    pub allow_experimental: bool,
}

/// Instances that a feature of a later version reads, or that defaulting names.
const DEFAULT_PARSERS: [&str; 4] = [
    "openai-parser",
    "anthropic-parser",
    "vllmhttp-parser",
    "passthrough-parser",
];
const METRICS_SOURCE: &str = "metrics-data-source";
const METRICS_EXTRACTOR: &str = "core-metrics-extractor";
const DETECTOR: &str = "utilization-detector";

/// Producer that is made for a required key nobody publishes: (data type, producer name, plugin type).
const DEFAULT_PRODUCERS: &[(&str, &str)] = &[
    (TOKENIZED_PROMPT, TOKEN_PRODUCER),
    (PREFIX_MATCH, APPROX_PREFIX_PRODUCER),
    (IN_FLIGHT, IN_FLIGHT_PRODUCER),
    (UNCACHED_TOKENS, IN_FLIGHT_PRODUCER),
];

/// A configuration with everything looked up.
#[derive(Debug)]
pub struct ResolvedConfig {
    /// All instances, written ones in document order, then created ones.
    pub instances: Vec<Instance>,
    /// Profiles in order.
    pub profiles: Vec<ResolvedProfile>,
    /// Runs them.
    pub profile_handler: (TypedName, Arc<dyn ProfileHandler>),
    /// In the order they run.
    pub producers: Vec<(TypedName, Arc<dyn DataProducer>)>,
    /// Fairness id that a header processor publishes, if there is one.
    pub agent_identity: Option<Column<String>>,
    /// Every prefix match that some instance publishes.
    pub prefix_matches: Vec<Column<PrefixMatch>>,
    /// Parser instances in order.
    pub parsers: Vec<Instance>,
    /// Decides about shedding.
    pub saturation_detector: (TypedName, Arc<dyn SaturationDetector>),
    /// Metric sources with their extractors.
    pub sources: Vec<(TypedName, Arc<MetricsDataSource>, Arc<CoreMetricsExtractor>)>,
    /// Endpoint discovery, when the document names one.
    pub discovery: Option<Arc<FileDiscovery>>,
    /// Plugins that follow endpoints.
    pub listeners: Vec<Arc<dyn EndpointListener>>,
    /// What an operator should know; logged at start.
    pub warnings: Vec<String>,
}

/// One profile.
#[derive(Debug)]
pub struct ResolvedProfile {
    /// Name.
    pub name: String,
    /// Filters in order.
    pub filters: Vec<(TypedName, Arc<dyn Filter>)>,
    /// Scorers with weights.
    pub scorers: Vec<(TypedName, Arc<dyn Scorer>, f64)>,
    /// The picker.
    pub picker: (TypedName, Arc<dyn Picker>),
}

impl ResolvedConfig {
    /// The part that requests use.
    pub fn activate(&self) -> ActiveConfig {
        let profiles = self.profiles.iter().map(|profile| Profile {
            name: profile.name.as_str().into(),
            filters: profile
                .filters
                .iter()
                .map(|(name, plugin)| Hook::new("Filter", name.clone(), Arc::clone(plugin)))
                .collect(),
            scorers: profile
                .scorers
                .iter()
                .map(|(name, plugin, weight)| {
                    (
                        Hook::new("Scorer", name.clone(), Arc::clone(plugin)),
                        *weight,
                    )
                })
                .collect(),
            picker: Hook::new(
                "Picker",
                profile.picker.0.clone(),
                Arc::clone(&profile.picker.1),
            ),
        });
        let response = ResponseHooks {
            headers: self.hooks("ResponseReceived", |roles| roles.response_headers.clone()),
            complete: self.hooks("ResponseStreaming", |roles| roles.response_complete.clone()),
        };
        let producers = self.producers.iter();
        ActiveConfig {
            parsers: ParserSet::new(self.parsers.iter().filter_map(|i| i.roles.parser.clone())),
            header_processors: self.hooks("RequestHeader", |roles| roles.header_processor.clone()),
            agent_identity: self.agent_identity,
            saturation: Arc::clone(&self.saturation_detector.1),
            screeners: self.hooks("Screener", |roles| roles.screener.clone()),
            producers: producers
                .map(|(name, plugin)| Hook::new("DataProducer", name.clone(), Arc::clone(plugin)))
                .collect(),
            admitters: self.hooks("Admission", |roles| roles.admitter.clone()),
            scheduler: Scheduler::new(Arc::clone(&self.profile_handler.1), profiles.collect()),
            prefix_matches: self.prefix_matches.clone(),
            pre_request: self.hooks("PreRequest", |roles| roles.pre_request.clone()),
            response_hooks: (!response.is_empty()).then(|| Arc::new(response)),
        }
    }

    /// Every instance that plays a role, in document order, timed as `extension_point`.
    fn hooks<T: ?Sized>(
        &self,
        extension_point: &'static str,
        role: impl Fn(&Roles) -> Option<Arc<T>>,
    ) -> Vec<Hook<T>> {
        self.instances
            .iter()
            .filter_map(|i| Some(Hook::new(extension_point, i.name.clone(), role(&i.roles)?)))
            .collect()
    }
}

/// Builds everything the document asks for and everything defaulting adds.
pub fn resolve(
    mut document: Document,
    options: &LoadOptions,
    registry: &Registry,
) -> Result<ResolvedConfig, ConfigError> {
    let mut loader = Loader {
        registry,
        keys: DataKeys::default(),
        instances: Vec::new(),
        warnings: Vec::new(),
    };
    loader.check_envelope(&document)?;
    // Slot 0 belongs to the default producer, which always runs: it is the accounting of every pick.
    loader
        .keys
        .in_flight(IN_FLIGHT_PRODUCER)
        .map_err(|e| ConfigError::Invalid(e.to_string()))?;
    for entry in std::mem::take(&mut document.plugins) {
        loader.add(entry)?;
    }
    loader.default_profiles(&mut document.scheduling_profiles)?;
    let detector = loader.detector(&document)?;
    let parsers = loader.parsers(&document)?;
    let (sources, discovery) = loader.data_layer(document.data_layer.take().unwrap_or_default())?;
    loader.ensure(IN_FLIGHT_PRODUCER)?;
    loader.complete_producers()?;
    let profile_handler = loader.profile_handler(&document.scheduling_profiles)?;
    let profiles = document
        .scheduling_profiles
        .iter()
        .map(|p| loader.profile(p))
        .collect::<Result<_, _>>()?;
    loader.check_maturity(*options)?;
    let producers = loader.producers_in_order()?;
    let agent_identity = loader.keys.published(AGENT_IDENTITY).into_iter().next();
    let prefix_matches = loader.keys.published(PREFIX_MATCH);
    let instances = loader.instances;
    Ok(ResolvedConfig {
        profiles,
        profile_handler,
        producers,
        agent_identity,
        prefix_matches,
        parsers,
        saturation_detector: detector,
        sources,
        discovery,
        listeners: instances
            .iter()
            .filter_map(|i| i.roles.listener.clone())
            .collect(),
        instances,
        warnings: loader.warnings,
    })
}

/// A producer and its identity.
type NamedProducer = (TypedName, Arc<dyn DataProducer>);

struct Loader<'a> {
    registry: &'a Registry,
    keys: DataKeys,
    instances: Vec<Instance>,
    warnings: Vec<String>,
}

fn invalid<T>(text: String) -> Result<T, ConfigError> {
    Err(ConfigError::Invalid(text))
}

impl Loader<'_> {
    fn check_envelope(&mut self, document: &Document) -> Result<(), ConfigError> {
        if document.api_version == LEGACY_API_VERSION {
            self.warnings.push(format!(
                "DEPRECATION: apiVersion {LEGACY_API_VERSION}, use {}",
                super::raw::API_VERSION
            ));
        }
        for gate in &document.feature_gates {
            let (name, value) = gate.split_once('=').unwrap_or((gate, "true"));
            let value = value.trim().to_ascii_lowercase();
            let on = match value.as_str() {
                "1" | "t" | "true" => true,
                "0" | "f" | "false" => false,
                _ => {
                    return invalid(format!(
                        "{value} is not a valid value for the feature gate {name}"
                    ));
                }
            };
            match name.trim() {
                "flowControl" if on => {
                    return invalid(
                        "feature gate 'flowControl' is known but not yet available in this version"
                            .into(),
                    );
                }
                "flowControl" | "haPopulateNonLeaderDatastore" => {}
                other => {
                    return invalid(format!("feature gate '{other}' is unknown or unregistered"));
                }
            }
        }
        if let Some(flow) = &document.flow_control
            && flow.keys().any(|key| key != "saturationDetector")
        {
            self.warnings.push(
                "flowControl is ignored without its feature gate, except saturationDetector".into(),
            );
        }
        if let Some(layer) = &document.data_layer
            && !layer.cross_replica_syncer_plugin_ref.is_empty()
        {
            return invalid(format!(
                "the plugin {} is not registered",
                layer.cross_replica_syncer_plugin_ref
            ));
        }
        Ok(())
    }

    /// Builds one written instance.
    fn add(&mut self, entry: PluginEntry) -> Result<(), ConfigError> {
        if entry.type_name.is_empty() {
            return invalid(format!("plugin '{}' is missing a type", entry.name));
        }
        let name = if entry.name.is_empty() {
            entry.type_name.clone()
        } else {
            entry.name
        };
        if self.find(&name).is_some() {
            return invalid(format!("duplicate plugin name '{name}'"));
        }
        let Some(plugin_type) = self.registry.get(&entry.type_name) else {
            return invalid(format!(
                "plugin type '{}' is not registered",
                entry.type_name
            ));
        };
        if let Some(replacement) = plugin_type.replacement {
            self.warnings.push(format!(
                "DEPRECATION warning: plugin is deprecated: type '{}', use '{replacement}'",
                entry.type_name
            ));
        }
        let given = entry
            .parameters
            .as_ref()
            .and_then(|p| p.as_object())
            .is_some_and(|p| !p.is_empty());
        if plugin_type.lenient && given {
            self.warnings.push(format!(
                "plugin '{name}' (type: {}) ignores its parameters",
                entry.type_name
            ));
        }
        let instance = build(
            plugin_type,
            name,
            &Parameters(entry.parameters),
            &mut self.keys,
        )?;
        self.instances.push(instance);
        Ok(())
    }

    /// The instance called `type_name`, made without parameters when there is none.
    fn ensure(&mut self, type_name: &str) -> Result<(), ConfigError> {
        if self.find(type_name).is_some() {
            return Ok(());
        }
        let entry = PluginEntry {
            type_name: type_name.to_owned(),
            name: String::new(),
            parameters: None,
        };
        self.add(entry)
    }

    fn find(&self, name: &str) -> Option<&Instance> {
        self.instances.iter().find(|i| i.name.name == name)
    }

    /// Section 6.2: a profile over everything listed, a picker for each profile.
    fn default_profiles(&mut self, profiles: &mut Vec<ProfileEntry>) -> Result<(), ConfigError> {
        if profiles.is_empty() {
            let usable = self.instances.iter().filter(|i| {
                i.roles.filter.is_some() || i.roles.scorer.is_some() || i.roles.picker.is_some()
            });
            let plugins = usable.map(|i| super::raw::ProfilePlugin {
                plugin_ref: i.name.name.clone(),
                weight: None,
            });
            profiles.push(ProfileEntry {
                name: "default".into(),
                plugins: plugins.collect(),
            });
        }
        for (position, profile) in profiles.iter().enumerate() {
            if profile.name.is_empty() {
                return invalid(format!("schedulingProfiles[{position}] is missing a name"));
            }
            if profiles
                .iter()
                .take(position)
                .any(|p| p.name == profile.name)
            {
                return invalid(format!(
                    "schedulingProfiles[{position}] has duplicate name '{}'",
                    profile.name
                ));
            }
        }
        if !self.instances.iter().any(|i| i.roles.picker.is_some()) {
            self.ensure("max-score-picker")?;
        }
        if profiles.len() == 1
            && !self
                .instances
                .iter()
                .any(|i| i.roles.profile_handler.is_some())
        {
            self.ensure("single-profile-handler")?;
        }
        Ok(())
    }

    fn profile_handler(
        &self,
        profiles: &[ProfileEntry],
    ) -> Result<(TypedName, Arc<dyn ProfileHandler>), ConfigError> {
        let mut handlers = self
            .instances
            .iter()
            .filter_map(|i| Some((i.name.clone(), i.roles.profile_handler.clone()?)));
        let Some(first) = handlers.next() else {
            return invalid("no profile handler configured".into());
        };
        if let Some(second) = handlers.next() {
            let (a, b) = (first.0.name, second.0.name);
            return invalid(format!(
                "multiple profile handlers found ('{a}', '{b}'); only one is allowed"
            ));
        }
        if first.0.type_name == "single-profile-handler" && profiles.len() > 1 {
            return invalid(
                "SingleProfileHandler cannot support multiple scheduling profiles".into(),
            );
        }
        Ok(first)
    }

    fn profile(&self, entry: &ProfileEntry) -> Result<ResolvedProfile, ConfigError> {
        let mut filters = Vec::new();
        let mut scorers = Vec::new();
        let mut picker: Option<(TypedName, Arc<dyn Picker>)> = None;
        for (position, plugin) in entry.plugins.iter().enumerate() {
            if plugin.plugin_ref.is_empty() {
                return invalid(format!(
                    "schedulingProfiles[{}].plugins[{position}] is missing a 'pluginRef'",
                    entry.name
                ));
            }
            let Some(instance) = self.find(&plugin.plugin_ref) else {
                return invalid(format!(
                    "schedulingProfiles[{}] references undefined plugin '{}'",
                    entry.name, plugin.plugin_ref
                ));
            };
            let name = || instance.name.clone();
            if let Some(filter) = &instance.roles.filter {
                filters.push((name(), Arc::clone(filter)));
            }
            if let Some(scorer) = &instance.roles.scorer {
                scorers.push((name(), Arc::clone(scorer), plugin.weight.unwrap_or(1.0)));
            }
            if let Some(own) = &instance.roles.picker {
                if let Some((before, _)) = &picker {
                    return invalid(format!(
                        "failed to set '{}' as picker, already have a registered picker plugin '{}'",
                        instance.name.name, before.name
                    ));
                }
                picker = Some((name(), Arc::clone(own)));
            }
        }
        // Any picker will do for a profile that names none.
        let any = || {
            self.instances
                .iter()
                .find_map(|i| Some((i.name.clone(), i.roles.picker.clone()?)))
        };
        let Some(picker) = picker.or_else(any) else {
            return invalid(format!("schedulingProfiles[{}] has no picker", entry.name));
        };
        Ok(ResolvedProfile {
            name: entry.name.clone(),
            filters,
            scorers,
            picker,
        })
    }

    fn detector(
        &mut self,
        document: &Document,
    ) -> Result<(TypedName, Arc<dyn SaturationDetector>), ConfigError> {
        let nested = document
            .flow_control
            .as_ref()
            .and_then(|flow| flow.get("saturationDetector"));
        let nested: Option<Reference> = match nested {
            None | Some(serde_json::Value::Null) => None,
            Some(value) => Some(serde_json::from_value(value.clone()).map_err(|e| {
                ConfigError::Decode(format!("flowControl.saturationDetector: {e}"))
            })?),
        };
        let reference = match nested.as_ref().or(document.saturation_detector.as_ref()) {
            Some(reference) if !reference.plugin_ref.is_empty() => reference.plugin_ref.clone(),
            _ => DETECTOR.to_owned(),
        };
        if reference == DETECTOR {
            self.ensure(DETECTOR)?;
        }
        let Some(instance) = self.find(&reference) else {
            return invalid(format!(
                "saturation detector references undefined plugin '{reference}'"
            ));
        };
        match &instance.roles.saturation_detector {
            Some(detector) => Ok((instance.name.clone(), Arc::clone(detector))),
            None => invalid(format!(
                "plugin '{reference}' is not a fwkfc.SaturationDetector"
            )),
        }
    }

    fn parsers(&mut self, document: &Document) -> Result<Vec<Instance>, ConfigError> {
        let listed = document
            .request_handler
            .as_ref()
            .map(|h| h.parsers.as_slice())
            .unwrap_or_default();
        let mut names: Vec<String> = listed.iter().map(|r| r.plugin_ref.clone()).collect();
        if names.is_empty() {
            match document.parser.as_ref() {
                Some(reference) => names.push(reference.plugin_ref.clone()),
                None => names.extend(DEFAULT_PARSERS.map(str::to_owned)),
            }
        }
        let mut parsers = Vec::new();
        for name in names {
            if self.find(&name).is_none() && self.registry.get(&name).is_none() {
                return invalid(format!("parser references undefined plugin '{name}'"));
            }
            // A reference without an instance names a type.
            self.ensure(&name)?;
            match self.find(&name) {
                Some(instance) if instance.roles.parser.is_some() => parsers.push(instance.clone()),
                _ => return invalid(format!("the plugin {name:?} is not a parser plugin")),
            }
        }
        Ok(parsers)
    }

    #[expect(
        clippy::type_complexity,
        reason = "the pair is taken apart at its only caller"
    )]
    fn data_layer(
        &mut self,
        layer: DataLayer,
    ) -> Result<
        (
            Vec<(TypedName, Arc<MetricsDataSource>, Arc<CoreMetricsExtractor>)>,
            Option<Arc<FileDiscovery>>,
        ),
        ConfigError,
    > {
        let mut entries = layer.sources;
        // The comparison is with the reference's name, not its type: a source of the same type under
        // another name does not suppress the default one.
        let wants_default = layer.inject_defaults.unwrap_or(true);
        if wants_default && !entries.iter().any(|s| s.plugin_ref == METRICS_SOURCE) {
            self.ensure(METRICS_SOURCE)?;
            self.ensure(METRICS_EXTRACTOR)?;
            let extractors = vec![Reference {
                plugin_ref: METRICS_EXTRACTOR.to_owned(),
            }];
            entries.push(SourceEntry {
                plugin_ref: METRICS_SOURCE.to_owned(),
                extractors,
            });
        }
        let mut sources = Vec::new();
        for entry in &entries {
            let Some(source) = self.find(&entry.plugin_ref) else {
                return invalid(format!("the plugin {} is not registered", entry.plugin_ref));
            };
            let Some(metrics) = source.roles.metrics_source.clone() else {
                if source.plugin_type == "endpoint-notification-source" {
                    continue;
                }
                return invalid(format!(
                    "the plugin {} is not a fwkdl.DataSource",
                    entry.plugin_ref
                ));
            };
            let name = source.name.clone();
            for reference in &entry.extractors {
                let Some(extractor) = self.find(&reference.plugin_ref) else {
                    return invalid(format!(
                        "the plugin {} is not registered",
                        reference.plugin_ref
                    ));
                };
                let Some(extractor) = extractor.roles.metrics_extractor.clone() else {
                    return invalid(format!(
                        "the plugin {} does not read {}",
                        reference.plugin_ref, entry.plugin_ref
                    ));
                };
                sources.push((name.clone(), Arc::clone(&metrics), extractor));
            }
        }
        let discovery = match layer.discovery {
            None => None,
            Some(reference) => match self.find(&reference.plugin_ref) {
                None => {
                    return invalid(format!(
                        "the plugin {} is not registered",
                        reference.plugin_ref
                    ));
                }
                Some(instance) => match &instance.roles.file_discovery {
                    Some(discovery) => Some(Arc::clone(discovery)),
                    None => {
                        return invalid(format!(
                            "the plugin {} is not an endpoint discovery",
                            reference.plugin_ref
                        ));
                    }
                },
            },
        };
        Ok((sources, discovery))
    }

    /// Section 6.6: makes default producers until every required key has one.
    fn complete_producers(&mut self) -> Result<(), ConfigError> {
        loop {
            if let Some(key) = self.keys.mismatches().first() {
                return invalid(format!(
                    "data type mismatch between produced and consumed data for key {key}"
                ));
            }
            let missing = self
                .keys
                .all()
                .find(|k| k.produced_by.is_empty() && !k.required_by.is_empty());
            let Some(key) = missing else { break };
            let (data_type, producer, consumer) = (
                key.data_type.clone(),
                key.producer.clone(),
                key.required_by.first().cloned().unwrap_or_default(),
            );
            let default = DEFAULT_PRODUCERS
                .iter()
                .any(|(t, p)| *t == data_type && *p == producer);
            if !default || self.find(&producer).is_some() {
                return invalid(format!(
                    "no default producer found for missing data key {data_type}/{producer}, consumed by {consumer}"
                ));
            }
            self.ensure(&producer)?;
        }
        // A default that nobody asked for is simply not there; a name the document gives must exist.
        let is_default =
            |k: &&KeyUse| DEFAULT_PRODUCERS.contains(&(k.data_type.as_ref(), k.producer.as_str()));
        let missing = self.keys.all().filter(|k| k.produced_by.is_empty());
        for key in missing.filter(|k| !is_default(k)) {
            if let Some(consumer) = key.optional_for.first() {
                let (data_type, producer) = (&key.data_type, &key.producer);
                self.warnings.push(format!(
                    "nobody produces {data_type}/{producer}, which {consumer} would use"
                ));
            }
        }
        Ok(())
    }

    /// Producers so that each runs after those whose keys it reads; ties in document order.
    fn producers_in_order(&self) -> Result<Vec<NamedProducer>, ConfigError> {
        let mut waiting: Vec<(TypedName, Arc<dyn DataProducer>)> = self
            .instances
            .iter()
            .filter_map(|i| Some((i.name.clone(), i.roles.producer.clone()?)))
            .collect();
        let mut ordered = Vec::new();
        while !waiting.is_empty() {
            let depends = |name: &str| {
                let reads = self.keys.all().filter(move |k| {
                    k.required_by
                        .iter()
                        .chain(&k.optional_for)
                        .any(|consumer| consumer == name)
                });
                let names: Vec<&String> = reads
                    .flat_map(|k| &k.produced_by)
                    .filter(|p| *p != name)
                    .collect();
                waiting
                    .iter()
                    .any(|(other, _)| names.contains(&&other.name))
            };
            let Some(next) = waiting.iter().position(|(name, _)| !depends(&name.name)) else {
                return invalid("cycle detected: graph is not a DAG".into());
            };
            ordered.push(waiting.remove(next));
        }
        Ok(ordered)
    }

    fn check_maturity(&self, options: LoadOptions) -> Result<(), ConfigError> {
        for instance in &self.instances {
            let alpha = self
                .registry
                .get(instance.plugin_type)
                .is_some_and(|t| t.maturity == Maturity::Alpha);
            if alpha && !options.allow_experimental {
                return invalid(format!(
                    "plugin '{}' (type: '{}') has Alpha stability level, but command line flag \
                     --allow-experimental-plugins is not set",
                    instance.name.name, instance.plugin_type
                ));
            }
        }
        Ok(())
    }
}

fn build(
    plugin_type: &PluginType,
    name: String,
    parameters: &Parameters,
    keys: &mut DataKeys,
) -> Result<Instance, ConfigError> {
    keys.enter(&name);
    let ignored = Parameters::default();
    let parameters = if plugin_type.lenient {
        &ignored
    } else {
        parameters
    };
    let mut input = Build {
        name: &name,
        parameters,
        keys,
    };
    let Some(built) = plugin_type.build(&mut input) else {
        let type_name = plugin_type.type_name;
        return invalid(format!(
            "plugin type '{type_name}' is known but not yet available in this version"
        ));
    };
    let roles = built.map_err(|error| ConfigError::Plugin {
        name: name.clone(),
        type_name: plugin_type.type_name.to_owned(),
        reason: error.to_string(),
    })?;
    // Role filters report the type they grew out of.
    let reported = match plugin_type.type_name {
        "decode-filter" | "prefill-filter" | "encode-filter" => "by-label",
        other => other,
    };
    Ok(Instance {
        name: TypedName {
            type_name: reported,
            name,
        },
        plugin_type: plugin_type.type_name,
        roles,
    })
}
