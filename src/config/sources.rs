//! Data sources with their extractors, and endpoint discovery (sections 6.5, 8 and 9 of the contract).

use std::sync::Arc;

use super::builtin::Instance;
use super::raw::{DataLayer, Reference, SourceEntry};
use super::resolve::{Loader, invalid};
use super::resolved::ResolvedSource;
use super::{ConfigError, Problem};
use crate::datalayer::discovery::Discovery;
use crate::datalayer::sources::Payload;
use crate::scheduling::attributes::IN_FLIGHT_PRODUCER;

const METRICS_SOURCE: &str = "metrics-data-source";
const METRICS_EXTRACTOR: &str = "core-metrics-extractor";
/// Types that documents list under an endpoint source. They follow endpoints by themselves.
const FOLLOW_ENDPOINTS: [&str; 4] = [
    IN_FLIGHT_PRODUCER,
    "precise-prefix-cache-producer",
    "precise-prefix-cache-scorer",
    "mm-embeddings-cache-producer",
];
/// Types that documents list under a source of pods.
const READ_PODS: [&str; 2] = ["topology-extractor", "disaggregatedset-rollout-screener"];

impl Loader<'_> {
    /// Section 6.5: the default metrics source.
    pub(super) fn default_sources(&mut self, layer: &mut DataLayer) -> Result<(), ConfigError> {
        // The comparison is with the reference's name, not its type: a source of the same type under
        // another name does not suppress the default one.
        let wants_default = layer.inject_defaults.unwrap_or(true);
        if wants_default && !layer.sources.iter().any(|s| s.plugin_ref == METRICS_SOURCE) {
            let why = "dataLayer.injectDefaults is not false and no source is called \
                       metrics-data-source";
            self.ensure(METRICS_SOURCE, why)?;
            self.ensure(METRICS_EXTRACTOR, why)?;
            let extractors = vec![Reference {
                plugin_ref: METRICS_EXTRACTOR.to_owned(),
            }];
            layer.sources.push(SourceEntry {
                plugin_ref: METRICS_SOURCE.to_owned(),
                extractors,
            });
        }
        Ok(())
    }

    /// A data layer needs something to do. The in-flight producer follows endpoints by itself, so it
    /// counts when the document asks for it.
    pub(super) fn check_sources(&self, entries: &[SourceEntry]) -> Result<(), ConfigError> {
        let wired = self
            .instances
            .iter()
            .any(|i| i.name.type_name == IN_FLIGHT_PRODUCER);
        if entries.is_empty() && !wired {
            let text = "data layer enabled but no data sources configured".to_owned();
            return Err(Problem::Invalid(text).at("dataLayer"));
        }
        Ok(())
    }

    /// Section 8: sources with their extractors.
    pub(super) fn data_sources(
        &mut self,
        entries: &[SourceEntry],
    ) -> Result<Vec<ResolvedSource>, ConfigError> {
        let mut sources = Vec::new();
        for (position, entry) in entries.iter().enumerate() {
            let field = format!("dataLayer.sources[{position}]");
            let name = &entry.plugin_ref;
            if entries.iter().take(position).any(|e| e.plugin_ref == *name) {
                let text = format!("duplicate polling source name: '{name}'");
                return Err(Problem::Invalid(text).at(field));
            }
            let source = self.source(&field, entry).map_err(|e| e.at(field))?;
            sources.extend(source);
        }
        self.warn_of_idle_extractors(entries);
        Ok(sources)
    }

    /// One entry; `None` for a source that is told instead of polled.
    fn source(
        &mut self,
        field: &str,
        entry: &SourceEntry,
    ) -> Result<Option<ResolvedSource>, ConfigError> {
        let instance = self.registered(&entry.plugin_ref)?;
        let Some(source) = instance.roles.data_source.clone() else {
            return invalid(format!(
                "the plugin {} is not a fwkdl.DataSource",
                entry.plugin_ref
            ));
        };
        let name = instance.name.clone();
        let payload = source.payload();
        let mut readers: Vec<&Instance> = Vec::new();
        for reference in &entry.extractors {
            let reader = self.registered(&reference.plugin_ref)?;
            if !fits(reader, &payload) {
                return invalid(format!(
                    "the plugin {} (type: {}) cannot read source '{}', which delivers {payload}",
                    reference.plugin_ref, reader.plugin_type, name.name
                ));
            }
            if readers.iter().any(|r| r.plugin_type == reader.plugin_type) {
                return invalid(format!(
                    "duplicate extractor type configured for the same source: '{}' (type: {}) on '{}'",
                    reference.plugin_ref, reader.plugin_type, name.name
                ));
            }
            readers.push(reader);
        }
        let extractors: Vec<_> = readers
            .iter()
            .filter_map(|i| Some((i.name.clone(), i.roles.extractor.clone()?)))
            .collect();
        if let Payload::Objects(_) = payload {
            let text = format!(
                "source '{}' delivers nothing: Kubernetes is not available in this version",
                name.name
            );
            self.warn(field, text);
        }
        if source.http().is_none() {
            return Ok(None);
        }
        if extractors.is_empty() {
            let text = format!("source '{}' has no extractors and is not polled", name.name);
            self.warn(field, text);
            return Ok(None);
        }
        Ok(Some(ResolvedSource {
            name,
            source,
            extractors,
        }))
    }

    fn warn_of_idle_extractors(&mut self, entries: &[SourceEntry]) {
        let fed = |name: &str| {
            let mut references = entries.iter().flat_map(|e| &e.extractors);
            references.any(|r| r.plugin_ref == name)
        };
        let idle = self
            .instances
            .iter()
            .filter(|i| i.roles.extractor.is_some());
        let warnings: Vec<(String, String)> = idle
            .filter(|i| !fed(&i.name.name))
            .map(|i| {
                let name = &i.name.name;
                let text = format!("extractor '{name}' is on no source: it reads nothing");
                (self.field_of(name), text)
            })
            .collect();
        for (field, text) in warnings {
            self.warn(field, text);
        }
    }

    pub(super) fn discovery(
        &self,
        reference: Option<&Reference>,
    ) -> Result<Option<Arc<dyn Discovery>>, ConfigError> {
        let Some(reference) = reference else {
            return Ok(None);
        };
        match &self.registered(&reference.plugin_ref)?.roles.discovery {
            Some(discovery) => Ok(Some(Arc::clone(discovery))),
            None => invalid(format!(
                "the plugin {} is not an endpoint discovery",
                reference.plugin_ref
            )),
        }
    }

    fn registered(&self, name: &str) -> Result<&Instance, ConfigError> {
        self.find(name)
            .ok_or_else(|| Problem::Invalid(format!("the plugin {name} is not registered")).at(""))
    }
}

/// Whether `instance` may be listed under a source that delivers `payload`.
fn fits(instance: &Instance, payload: &Payload) -> bool {
    match payload {
        Payload::Endpoints => {
            instance.roles.listener.is_some() || FOLLOW_ENDPOINTS.contains(&instance.plugin_type)
        }
        Payload::Objects(kind) => kind.is_pod() && READ_PODS.contains(&instance.plugin_type),
        polled => instance
            .roles
            .extractor
            .as_ref()
            .is_some_and(|e| e.reads() == *polled),
    }
}
