//! Who makes the data that plugins read: default producers, their order, and checks of the graph
//! (sections 6.6 and 7 of the contract).

use std::sync::Arc;

use super::builtin::Roles;
use super::resolve::{CYCLE, Loader, NamedProducer, invalid};
use super::{ConfigError, Problem};
use crate::plugin::data::KeyUse;
use crate::plugin::{MAX_COLUMNS, TypedName};
use crate::scheduling::DataProducer;
use crate::scheduling::attributes::{
    APPROX_PREFIX_PRODUCER, ENCODER_CACHE_MATCH, IN_FLIGHT, IN_FLIGHT_PRODUCER, MEDIA_FEATURES,
    MM_EMBEDDINGS_PRODUCER, PREFIX_MATCH, TOKEN_IDS, TOKEN_PRODUCER, TOKENIZED_PROMPT,
    UNCACHED_TOKENS,
};

/// Producer that is made for a required key nobody publishes: (data type, producer name, plugin type).
const DEFAULT_PRODUCERS: &[(&str, &str)] = &[
    (TOKENIZED_PROMPT, TOKEN_PRODUCER),
    (MEDIA_FEATURES, TOKEN_PRODUCER),
    (TOKEN_IDS, TOKEN_PRODUCER),
    (PREFIX_MATCH, APPROX_PREFIX_PRODUCER),
    (IN_FLIGHT, IN_FLIGHT_PRODUCER),
    (UNCACHED_TOKENS, IN_FLIGHT_PRODUCER),
    (ENCODER_CACHE_MATCH, MM_EMBEDDINGS_PRODUCER),
];

impl Loader<'_> {
    /// Section 6.6: makes default producers until every required key has one.
    pub(super) fn complete_producers(&mut self) -> Result<(), ConfigError> {
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
                let field = self.field_of(&consumer);
                return Err(Problem::Invalid(format!(
                    "no default producer found for missing data key {data_type}/{producer}, consumed by {consumer}"
                ))
                .at(field));
            }
            self.ensure(
                &producer,
                &format!("{consumer} needs {data_type}/{producer}"),
            )?;
        }
        Ok(())
    }

    /// What can be said of the keys once every producer is there.
    pub(super) fn check_keys(&mut self) -> Result<(), ConfigError> {
        if self.keys.keys().len() > MAX_COLUMNS {
            return invalid(format!(
                "more than {MAX_COLUMNS} data keys since the process started; restart it"
            ));
        }
        for key in self.keys.all() {
            let late = |name: &String| self.find(name).map_or(0, |i| layer(&i.roles).0);
            let Some((producer, made)) = key
                .produced_by
                .iter()
                .map(|p| (p, late(p)))
                .max_by_key(|(_, l)| *l)
            else {
                continue;
            };
            let read = |name: &String| self.find(name).map_or(u8::MAX, |i| layer(&i.roles).1);
            if let Some(consumer) = key.required_by.iter().find(|c| read(c) < made) {
                return Err(Problem::Invalid(format!(
                    "invalid plugin layer execution order: producer {producer} needs to be executed \
                     before consumer {consumer}"
                ))
                .at(self.field_of(consumer)));
            }
        }
        // A default that nobody asked for is simply not there; a name the document gives must exist.
        let is_default =
            |k: &&KeyUse| DEFAULT_PRODUCERS.contains(&(k.data_type.as_ref(), k.producer.as_str()));
        let missing = self.keys.all().filter(|k| k.produced_by.is_empty());
        let mut absent = Vec::new();
        for key in missing.filter(|k| !is_default(k)) {
            if let Some(consumer) = key.optional_for.first() {
                let (data_type, producer) = (&key.data_type, &key.producer);
                absent.push((
                    self.field_of(consumer),
                    format!("nobody produces {data_type}/{producer}, which {consumer} would use"),
                ));
            }
        }
        for (field, text) in absent {
            self.warn(field, text);
        }
        Ok(())
    }

    /// Producers so that each runs after those whose keys it reads; ties in document order.
    pub(super) fn producers_in_order(&self) -> Result<Vec<NamedProducer>, ConfigError> {
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
                return Err(Problem::Invalid(CYCLE.to_owned()).at("plugins"));
            };
            ordered.push(waiting.remove(next));
        }
        Ok(ordered)
    }
}

/// When in a request an instance has written its data, and when it first reads data of others.
fn layer(roles: &Roles) -> (u8, u8) {
    let hooks = [
        (roles.header_processor.is_some(), 1),
        (roles.screener.is_some(), 2),
        (roles.producer.is_some(), 3),
        (roles.admitter.is_some(), 4),
    ];
    let own = hooks
        .iter()
        .filter(|(has, _)| *has)
        .map(|(_, layer)| *layer);
    // Data sources and the like are ready before any request; profiles run last.
    (own.clone().max().unwrap_or(0), own.max().unwrap_or(u8::MAX))
}
