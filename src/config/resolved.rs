//! A loaded configuration: every instance in its place, and the part of it that requests use.

use std::sync::Arc;

use super::Warning;
use super::builtin::{Instance, Roles};
use super::raw::Document;
use crate::control::director::ActiveConfig;
use crate::datalayer::EndpointListener;
use crate::datalayer::discovery::Discovery;
use crate::datalayer::extractors::Extractor;
use crate::datalayer::sources::DataSource;
use crate::plugin::data::KeyUse;
use crate::plugin::{Column, DataKeys, Hook, TypedName};
use crate::request::parsers::ParserSet;
use crate::response::ResponseHooks;
use crate::scheduling::attributes::PrefixMatch;
use crate::scheduling::scheduler::{Profile, Scheduler};
use crate::scheduling::{DataProducer, Filter, Picker, ProfileHandler, SaturationDetector, Scorer};

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
    /// Every prefix match that some instance publishes, those by KV events first.
    pub prefix_matches: Vec<Column<PrefixMatch>>,
    /// Parser instances in order.
    pub parsers: Vec<Instance>,
    /// Decides about shedding.
    pub saturation_detector: (TypedName, Arc<dyn SaturationDetector>),
    /// Polling sources with their extractors.
    pub sources: Vec<ResolvedSource>,
    /// Endpoint discovery, when the document names one.
    pub discovery: Option<Arc<dyn Discovery>>,
    /// Whether replicas that do not lead fill their pool too (`haPopulateNonLeaderDatastore`).
    pub populate_standbys: bool,
    /// Plugins that follow endpoints.
    pub listeners: Vec<Arc<dyn EndpointListener>>,
    /// The document, its data sources completed and its profiles as written.
    pub document: Document,
    /// Who makes and who reads what.
    pub keys: Vec<KeyUse>,
    /// What an operator should know; logged at start.
    pub warnings: Vec<Warning>,
    /// Where every key is kept, for the configuration after this one.
    pub(super) slots: DataKeys,
}

/// One polling source.
#[derive(Debug)]
pub struct ResolvedSource {
    /// Its identity.
    pub name: TypedName,
    /// What is fetched.
    pub source: Arc<dyn DataSource>,
    /// Who reads it, in order.
    pub extractors: Vec<(TypedName, Arc<dyn Extractor>)>,
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
            scheduler: Scheduler::new(Arc::clone(&self.profile_handler.1), profiles.collect())
                .with_prefix_matches(self.prefix_matches.clone()),
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
