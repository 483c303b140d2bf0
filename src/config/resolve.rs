//! Defaults, instances, references and checks: the load sequence of the contract.

use std::sync::Arc;

use super::builtin::{Instance, Origin, PluginType, Registry};
use super::gates::{self, Gates};
use super::raw::{Document, LEGACY_API_VERSION, PluginEntry};
use super::resolved::ResolvedConfig;
use super::{ConfigError, Problem, Warning, flow, lint, raw, tree};
use crate::control::producers::burst_prefix::BurstPrefixProducer;
use crate::control::producers::precise_prefix::{PrecisePrefixProducer, PrecisePrefixScorer};
use crate::plugin::data::KeyUse;
use crate::plugin::params::field_of;
use crate::plugin::{Build, DataKeys, Maturity, Parameters, Plugin, TypedName};
use crate::scheduling::attributes::{AGENT_IDENTITY, IN_FLIGHT_PRODUCER, PREFIX_MATCH};
use crate::scheduling::{DataProducer, SaturationDetector};

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
/// Instances a document may list; checks compare each with each.
const MAX_PLUGINS: usize = 1000;
/// Text of two errors about orders that do not exist.
pub(super) const CYCLE: &str = "cycle detected: graph is not a DAG";
const DETECTOR: &str = "utilization-detector";

/// Loads configurations one after the other, so that what can survive does.
///
/// An instance is used again when its name, its type and its parameters are unchanged, and so are the
/// instances its parameters refer to. It keeps its state: a prefix index, an LRU, sessions. What it reads
/// from others it reads through data keys, `<type>/<producer name>`, whose slots stay for the life of
/// the process; so it does not matter whether the producer behind a key was built anew. A producer that
/// is gone is what it would be at start: an error for those that require it, absent for the others.
#[derive(Debug)]
pub struct ConfigLoader {
    options: LoadOptions,
    registry: Registry,
    keys: DataKeys,
    instances: Vec<Instance>,
}

impl ConfigLoader {
    /// A loader that has loaded nothing yet.
    pub fn new(options: LoadOptions, registry: Registry) -> Self {
        Self {
            options,
            registry,
            keys: DataKeys::default(),
            instances: Vec::new(),
        }
    }

    /// Loads a document, or the built-in one when `text` is `None`. What it builds counts for the next
    /// one only once it is in use, see [`Self::adopt`].
    pub fn load(&self, text: Option<&str>) -> Result<ResolvedConfig, ConfigError> {
        let (value, lines) = tree::read(text.unwrap_or(raw::BUILT_IN))?;
        let mut keys = self.keys.clone();
        keys.restart();
        let line = |field: &str| lines.of(field).filter(|_| !field.is_empty());
        let loaded = raw::decode(value).and_then(|document| {
            let loader = Loader {
                registry: &self.registry,
                keys,
                before: &self.instances,
                instances: Vec::new(),
                reused: Vec::new(),
                warnings: Vec::new(),
            };
            loader.resolve(document, self.options)
        });
        match loaded {
            Ok(mut config) => {
                for warning in &mut config.warnings {
                    warning.line = line(&warning.field);
                }
                Ok(config)
            }
            Err(mut error) => {
                error.line = error.line.or_else(|| line(&error.field));
                Err(error)
            }
        }
    }

    /// `config` is in use: its instances are the ones to use again.
    pub fn adopt(&mut self, config: ResolvedConfig) {
        self.keys = config.slots;
        self.instances = config.instances;
    }
}

/// A producer and its identity.
pub(super) type NamedProducer = (TypedName, Arc<dyn DataProducer>);

/// One load: what was built so far.
pub(super) struct Loader<'a> {
    registry: &'a Registry,
    pub(super) keys: DataKeys,
    /// Instances of the configuration in use, to be used again.
    before: &'a [Instance],
    pub(super) instances: Vec<Instance>,
    /// Names of the instances that are used again.
    reused: Vec<String>,
    warnings: Vec<Warning>,
}

pub(super) fn invalid<T>(text: String) -> Result<T, ConfigError> {
    Err(Problem::Invalid(text).at(""))
}

impl Loader<'_> {
    /// Builds everything the document asks for and everything defaulting adds.
    fn resolve(
        mut self,
        mut document: Document,
        options: LoadOptions,
    ) -> Result<ResolvedConfig, ConfigError> {
        let gates = self.check_envelope(&document)?;
        // Slot 0 belongs to the default producer, which always runs: it is the accounting of every pick.
        self.keys
            .in_flight(IN_FLIGHT_PRODUCER)
            .map_err(|e| Problem::Invalid(e.to_string()).at(""))?;
        self.build_written(&document.plugins)?;
        let written_profiles = document.scheduling_profiles.clone();
        self.default_profiles(&mut document.scheduling_profiles)?;
        let detector = self.detector(&document)?;
        let parsers = self.parsers(&document)?;
        let mut layer = document.data_layer.take().unwrap_or_default();
        self.default_sources(&mut layer)?;
        let source_entries = layer.sources.clone();
        let discovery = self.discovery(layer.discovery.as_ref())?;
        let sources = self.data_sources(&source_entries)?;
        self.complete_producers()?;
        self.check_sources(&source_entries)?;
        self.ensure(
            IN_FLIGHT_PRODUCER,
            "every pick is booked on its endpoint until the request ends",
        )?;
        self.complete_producers()?;
        self.check_keys()?;
        let profile_handler = self.profile_handler(&document.scheduling_profiles)?;
        let profiles = document
            .scheduling_profiles
            .iter()
            .enumerate()
            .map(|(position, profile)| self.profile(position, profile))
            .collect::<Result<Vec<_>, _>>()?;
        self.check_maturity(options)?;
        let producers = self.producers_in_order()?;
        let agents = self.keys.published(AGENT_IDENTITY, |_| true);
        let agent_identity = agents.into_iter().next();
        let mut prefix_matches = self
            .keys
            .published(PREFIX_MATCH, |name| self.is_exact(name));
        prefix_matches.extend(self.keys.published(PREFIX_MATCH, |name| {
            self.knows_caches(name) && !self.is_exact(name)
        }));
        let keys: Vec<KeyUse> = self.keys.all().filter(|k| k.is_used()).cloned().collect();
        let instances = std::mem::take(&mut self.instances);
        document.scheduling_profiles = written_profiles;
        document.data_layer = Some(layer);
        let mut warnings = std::mem::take(&mut self.warnings);
        warnings.extend(lint::without_effect(&lint::Loaded {
            document: &document,
            registry: self.registry,
            instances: &instances,
            profiles: &profiles,
            detector: &detector.0.name,
            parsers: &parsers,
            keys: &keys,
        }));
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
            populate_standbys: gates.populate_standbys,
            listeners: instances
                .iter()
                .filter_map(|i| i.roles.listener.clone())
                .collect(),
            instances,
            document,
            keys,
            warnings,
            slots: self.keys,
        })
    }

    pub(super) fn warn(&mut self, field: impl Into<String>, text: String) {
        self.warnings.push(Warning {
            line: None,
            field: field.into(),
            text,
        });
    }

    fn check_envelope(&mut self, document: &Document) -> Result<Gates, ConfigError> {
        if document.api_version == LEGACY_API_VERSION {
            self.warn(
                "apiVersion",
                format!(
                    "DEPRECATION: {LEGACY_API_VERSION}, use {}",
                    raw::API_VERSION
                ),
            );
        }
        let gates = gates::read(&document.feature_gates)?;
        for (field, text) in flow::problems(document) {
            if gates.flow_control {
                return Err(Problem::Invalid(text).at(field));
            }
            self.warn(field, text);
        }
        if gates.flow_control {
            let text = "feature gate 'flowControl' is known but not yet available in this version";
            return Err(Problem::Invalid(text.to_owned()).at("featureGates"));
        }
        if document.flow_control.as_ref().is_some_and(flow::is_used) {
            let text = "ignored without its feature gate, except saturationDetector";
            self.warn("flowControl", text.to_owned());
        }
        if let Some(layer) = &document.data_layer
            && !layer.cross_replica_syncer_plugin_ref.is_empty()
        {
            return Err(Problem::Invalid(format!(
                "the plugin {} is not registered",
                layer.cross_replica_syncer_plugin_ref
            ))
            .at("dataLayer.crossReplicaSyncerPluginRef"));
        }
        Ok(gates)
    }

    /// Checks the list, then builds it: instances that others refer to first, the rest as written.
    fn build_written(&mut self, entries: &[PluginEntry]) -> Result<(), ConfigError> {
        if entries.len() > MAX_PLUGINS {
            let text = format!("{} plugins, at most {MAX_PLUGINS}", entries.len());
            return Err(Problem::Invalid(text).at("plugins"));
        }
        for (position, entry) in entries.iter().enumerate() {
            let fail = |key: &str, text: String| {
                Err(Problem::Invalid(text).at(format!("plugins[{position}]{key}")))
            };
            if entry.type_name.is_empty() {
                return fail("", format!("plugin '{}' is missing a type", entry.name));
            }
            let name = entry.instance_name();
            let mut before = entries.iter().take(position);
            if before.any(|other| other.instance_name() == name) {
                let key = if entry.name.is_empty() {
                    ".type"
                } else {
                    ".name"
                };
                return fail(key, format!("duplicate plugin name '{name}'"));
            }
            if self.registry.get(&entry.type_name).is_none() {
                let text = format!("plugin type '{}' is not registered", entry.type_name);
                return fail(".type", text);
            }
        }
        for position in self.build_order(entries)? {
            if let Some(entry) = entries.get(position) {
                self.build_entry(position, entry)?;
            }
        }
        // Hooks run and defaults apply in the order of the document.
        self.instances.sort_by_key(|i| match i.origin {
            Origin::Written(position) => position,
            Origin::Added(_) => usize::MAX,
        });
        Ok(())
    }

    /// Positions so that an instance comes after those its parameters name.
    fn build_order(&self, entries: &[PluginEntry]) -> Result<Vec<usize>, ConfigError> {
        let mut needs: Vec<Vec<usize>> = Vec::with_capacity(entries.len());
        for (position, entry) in entries.iter().enumerate() {
            let plugin_type = self.registry.get(&entry.type_name);
            let names = plugin_type.map(|t| t.references(entry.parameters.as_ref()));
            let mut found = Vec::new();
            for name in names.unwrap_or_default() {
                match entries.iter().position(|e| e.instance_name() == name) {
                    Some(other) => found.push(other),
                    None => {
                        return Err(Problem::Invalid(format!(
                            "a plugin has a dependency on the unregistered plugin {name}"
                        ))
                        .at(format!("plugins[{position}].parameters")));
                    }
                }
            }
            needs.push(found);
        }
        let mut order: Vec<usize> = Vec::with_capacity(entries.len());
        let mut done = vec![false; entries.len()];
        while order.len() < entries.len() {
            let is_done = |p: &usize| done.get(*p).copied().unwrap_or(true);
            let mut open = needs.iter().enumerate().filter(|(p, _)| !is_done(p));
            let Some((next, _)) = open.find(|(_, needs)| needs.iter().all(is_done)) else {
                return Err(Problem::Invalid(CYCLE.to_owned()).at("plugins"));
            };
            order.push(next);
            if let Some(flag) = done.get_mut(next) {
                *flag = true;
            }
        }
        Ok(order)
    }

    fn build_entry(&mut self, position: usize, entry: &PluginEntry) -> Result<(), ConfigError> {
        let field = format!("plugins[{position}]");
        let Some(plugin_type) = self.registry.get(&entry.type_name) else {
            return invalid(format!(
                "plugin type '{}' is not registered",
                entry.type_name
            ));
        };
        if let Some(replacement) = plugin_type.replacement {
            self.warn(
                format!("{field}.type"),
                format!(
                    "DEPRECATION warning: plugin is deprecated: type '{}', use {replacement}",
                    entry.type_name
                ),
            );
        }
        self.build(
            plugin_type,
            entry.instance_name().to_owned(),
            entry.parameters.clone(),
            Origin::Written(position),
        )
        .map_err(|error| at_parameter(error, &field))
    }

    /// Builds an instance, or takes the one of the configuration in use.
    fn build(
        &mut self,
        plugin_type: &PluginType,
        name: String,
        parameters: Option<serde_json::Value>,
        origin: Origin,
    ) -> Result<(), ConfigError> {
        let parameters = parameters.filter(|_| !plugin_type.lenient);
        self.keys.enter(&name);
        let same = self.before.iter().find(|i| {
            i.name.name == name
                && i.plugin_type == plugin_type.type_name
                && i.parameters == parameters
        });
        let references = plugin_type.references(parameters.as_ref());
        let settled = references
            .iter()
            .all(|r| self.reused.iter().any(|name| name == r));
        if let Some(same) = same.filter(|_| settled) {
            self.keys.declare_again(&same.declared);
            if let Some(decider) = &same.roles.decider {
                self.keys.offer(&name, Arc::clone(decider));
            }
            self.reused.push(name);
            self.instances.push(Instance {
                origin,
                ..same.clone()
            });
            return Ok(());
        }
        let input = Parameters(parameters);
        let mut build = Build {
            name: &name,
            parameters: &input,
            keys: &mut self.keys,
        };
        let Some(built) = plugin_type.build(&mut build) else {
            let type_name = plugin_type.type_name;
            return invalid(format!(
                "plugin type '{type_name}' is known but not yet available in this version"
            ));
        };
        let roles = built.map_err(|error| {
            Problem::Plugin {
                name: name.clone(),
                type_name: plugin_type.type_name.to_owned(),
                reason: error.to_string(),
            }
            .at("")
        })?;
        if let Some(decider) = &roles.decider {
            self.keys.offer(&name, Arc::clone(decider));
        }
        self.instances.push(Instance {
            name: TypedName {
                type_name: plugin_type.reported,
                name,
            },
            plugin_type: plugin_type.type_name,
            parameters: input.0,
            origin,
            roles,
            declared: self.keys.declared(),
        });
        Ok(())
    }

    /// Makes the instance called `type_name`, without parameters, when there is none.
    pub(super) fn ensure(&mut self, type_name: &str, why: &str) -> Result<(), ConfigError> {
        if self.find(type_name).is_some() {
            return Ok(());
        }
        let Some(plugin_type) = self.registry.get(type_name) else {
            return invalid(format!("plugin type '{type_name}' is not registered"));
        };
        let origin = Origin::Added(why.to_owned());
        self.build(plugin_type, type_name.to_owned(), None, origin)
    }

    /// True when the instance's prefix matches say what an endpoint holds. Those of a burst say where
    /// a prefix is about to go.
    fn knows_caches(&self, name: &str) -> bool {
        self.find(name)
            .is_some_and(|i| i.plugin_type != BurstPrefixProducer::TYPE)
    }

    /// True when its prefix matches say what engines report, where they do.
    fn is_exact(&self, name: &str) -> bool {
        const EXACT: [&str; 2] = [PrecisePrefixProducer::TYPE, PrecisePrefixScorer::TYPE];
        self.find(name)
            .is_some_and(|i| EXACT.contains(&i.plugin_type))
    }

    pub(super) fn find(&self, name: &str) -> Option<&Instance> {
        self.instances.iter().find(|i| i.name.name == name)
    }

    fn detector(
        &mut self,
        document: &Document,
    ) -> Result<(TypedName, Arc<dyn SaturationDetector>), ConfigError> {
        let nested = document
            .flow_control
            .as_ref()
            .and_then(|flow| flow.saturation_detector.as_ref());
        let (field, reference) = match (nested, &document.saturation_detector) {
            (Some(reference), _) => ("flowControl.saturationDetector", &*reference.plugin_ref),
            (None, Some(reference)) => ("saturationDetector", &*reference.plugin_ref),
            (None, None) => ("", ""),
        };
        let reference = if reference.is_empty() {
            DETECTOR
        } else {
            reference
        };
        if reference == DETECTOR {
            self.ensure(DETECTOR, "no saturation detector is named")?;
        }
        let Some(instance) = self.find(reference) else {
            return Err(Problem::Invalid(format!(
                "saturation detector references undefined plugin '{reference}'"
            ))
            .at(field));
        };
        match &instance.roles.saturation_detector {
            Some(detector) => Ok((instance.name.clone(), Arc::clone(detector))),
            None => Err(Problem::Invalid(format!(
                "plugin '{reference}' is not a fwkfc.SaturationDetector"
            ))
            .at(field)),
        }
    }

    fn parsers(&mut self, document: &Document) -> Result<Vec<Instance>, ConfigError> {
        let handler = document.request_handler.as_ref();
        let listed = handler.map(|h| h.parsers.as_slice()).unwrap_or_default();
        let mut names: Vec<(String, String)> = (0..)
            .zip(listed)
            .map(|(i, r)| {
                let field = format!("requestHandler.parsers[{i}].pluginRef");
                (field, r.plugin_ref.clone())
            })
            .collect();
        if names.is_empty() {
            match document.parser.as_ref() {
                Some(reference) => {
                    names.push(("parser.pluginRef".to_owned(), reference.plugin_ref.clone()));
                }
                None => {
                    names.extend(DEFAULT_PARSERS.map(|name| (String::new(), name.to_owned())));
                }
            }
        }
        let why = if names.iter().any(|(field, _)| field.is_empty()) {
            "no parsers are named"
        } else {
            "a parser reference without an instance names a type"
        };
        let mut parsers = Vec::new();
        for (field, name) in names {
            if self.find(&name).is_none() && self.registry.get(&name).is_none() {
                let text = format!("parser references undefined plugin '{name}'");
                return Err(Problem::Invalid(text).at(field));
            }
            self.ensure(&name, why).map_err(|e| e.at(field.clone()))?;
            match self.find(&name) {
                Some(instance) if instance.roles.parser.is_some() => parsers.push(instance.clone()),
                _ => {
                    let text = format!("the plugin {name:?} is not a parser plugin");
                    return Err(Problem::Invalid(text).at(field));
                }
            }
        }
        Ok(parsers)
    }

    /// The field of the document that an instance comes from.
    pub(super) fn field_of(&self, name: &str) -> String {
        match self.find(name).map(|i| &i.origin) {
            Some(Origin::Written(position)) => format!("plugins[{position}]"),
            _ => String::new(),
        }
    }

    fn check_maturity(&self, options: LoadOptions) -> Result<(), ConfigError> {
        for instance in &self.instances {
            let alpha = self
                .registry
                .get(instance.plugin_type)
                .is_some_and(|t| t.maturity == Maturity::Alpha);
            if alpha && !options.allow_experimental {
                return Err(Problem::Invalid(format!(
                    "plugin '{}' (type: '{}') has Alpha stability level, but command line flag \
                     --allow-experimental-plugins is not set",
                    instance.name.name, instance.plugin_type
                ))
                .at(self.field_of(&instance.name.name)));
            }
        }
        Ok(())
    }
}

/// Points an error of a plugin at its parameter, if the text names one.
fn at_parameter(error: ConfigError, entry: &str) -> ConfigError {
    let field = match &error.problem {
        Problem::Plugin { reason, .. } => match field_of(reason) {
            "" => entry.to_owned(),
            "parameters" => format!("{entry}.parameters"),
            field => format!("{entry}.parameters.{field}"),
        },
        _ => format!("{entry}.type"),
    };
    error.at(field)
}
