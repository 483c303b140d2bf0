//! `models-data-extractor`

use std::borrow::Cow;
use std::sync::Arc;

use serde::Deserialize;
use tokio::time::Instant;

use super::{Extraction, Extractor};
use crate::datalayer::Endpoint;
use crate::datalayer::sources::Payload;
use crate::plugin::{Build, EndpointColumn, Maturity, ParamDoc, Plugin, PluginError};

/// Attribute that is published: `Vec<ModelEntry>`.
pub const MODELS: &str = "/v1/models";
/// Its producer, whatever the instance is called.
pub const MODELS_PRODUCER: &str = "models-data-extractor";
/// Models that are read of one list; a longer one is cut and counted as an error.
const MAX_MODELS: usize = 1024;
/// Longest name that is kept; an entry with a longer one is left out and counted as an error.
const MAX_NAME_BYTES: usize = 1024;

/// One model that an endpoint serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelEntry {
    /// Name that requests use.
    pub id: String,
    /// Base model of an adapter.
    pub parent: Option<String>,
}

/// Reads which models an endpoint serves.
#[derive(Debug)]
pub struct ModelsDataExtractor {
    column: EndpointColumn<Vec<ModelEntry>>,
}

#[derive(Deserialize)]
struct List<'a> {
    #[serde(borrow)]
    data: Vec<Item<'a>>,
}

#[derive(Deserialize)]
struct Item<'a> {
    #[serde(borrow, default)]
    id: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    parent: Option<Cow<'a, str>>,
}

impl Plugin for ModelsDataExtractor {
    const TYPE: &'static str = MODELS_PRODUCER;
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[];
    const LENIENT: bool = true;
    const ABOUT: &'static str = "Reads the models an endpoint serves.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        Ok(Self {
            column: build.keys.endpoint_produce_as(MODELS, Self::TYPE)?,
        })
    }
}

impl Extractor for ModelsDataExtractor {
    fn reads(&self) -> Payload {
        Payload::Models
    }

    fn extract(&self, endpoint: &Endpoint, body: &[u8], _: Instant) -> Extraction {
        let Ok(list) = serde_json::from_slice::<List<'_>>(body) else {
            return Extraction {
                errors: 1,
                refreshed: false,
            };
        };
        let listed = list.data.len();
        let usable = |item: &Item<'_>| {
            let fits = |name: &Cow<'_, str>| name.len() <= MAX_NAME_BYTES;
            item.id
                .as_ref()
                .is_some_and(|id| !id.is_empty() && fits(id))
                && item.parent.as_ref().is_none_or(fits)
        };
        let models: Vec<ModelEntry> = list
            .data
            .into_iter()
            .take(MAX_MODELS)
            .filter(usable)
            .filter_map(|item| {
                Some(ModelEntry {
                    id: item.id?.into_owned(),
                    parent: item.parent.map(Cow::into_owned).filter(|p| !p.is_empty()),
                })
            })
            .collect();
        let left_out = listed != models.len();
        if endpoint.attribute(self.column).as_deref() != Some(&models) {
            endpoint.set_attribute(self.column, Arc::new(models));
        }
        Extraction {
            errors: u32::from(left_out),
            refreshed: true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datalayer::extractors::test_support::{build, endpoint};
    use crate::plugin::DataKeys;

    fn reader() -> impl Fn(&str) -> (u32, Option<Arc<Vec<ModelEntry>>>) {
        let mut keys = DataKeys::default();
        let extractor: ModelsDataExtractor = build(&mut keys, "list", r#"{"x": 1}"#).unwrap();
        let column = keys.endpoint_require(MODELS, MODELS_PRODUCER).unwrap();
        let endpoint = endpoint("e", &[]);
        move |body| {
            let outcome = extractor.extract(&endpoint, body.as_bytes(), Instant::now());
            (outcome.errors, endpoint.attribute(column))
        }
    }

    #[test]
    fn ids_and_parents_are_kept() {
        let read = reader();
        // As vLLM answers, shortened.
        let (errors, models) = read(
            r#"{"object": "list", "data": [{"id": "base", "object": "model", "owned_by": "vllm", "root": "/m", "parent": null, "max_model_len": 4096}, {"id": "sq\u006c", "parent": "base", "permission": [{}]}]}"#,
        );
        let entry = |id: &str, parent: Option<&str>| ModelEntry {
            id: id.to_owned(),
            parent: parent.map(str::to_owned),
        };
        assert_eq!(errors, 0);
        let first = models.unwrap();
        assert_eq!(*first, [entry("base", None), entry("sql", Some("base"))]);
        // What cannot be read leaves the last list.
        for bad in ["", "[]", "{}", r#"{"data": 1}"#, r#"{"data": [{"id": 1}]}"#] {
            let (errors, models) = read(bad);
            assert_eq!((errors, models.as_ref()), (1, Some(&first)), "{bad}");
        }
        assert_eq!(read(r#"{"data": []}"#).1.unwrap().len(), 0);
    }

    #[test]
    fn lists_and_names_are_bounded() {
        let read = reader();
        let list = |ids: &[String]| {
            let items: Vec<_> = ids.iter().map(|id| serde_json::json!({"id": id})).collect();
            serde_json::json!({ "data": items }).to_string()
        };
        let mut ids: Vec<String> = (0..MAX_MODELS).map(|n| n.to_string()).collect();
        let (errors, models) = read(&list(&ids));
        assert_eq!((errors, models.unwrap().len()), (0, MAX_MODELS));
        ids.push("one more".to_owned());
        let (errors, models) = read(&list(&ids));
        assert_eq!((errors, models.unwrap().len()), (1, MAX_MODELS));
        let long = [
            "x".repeat(MAX_NAME_BYTES),
            "x".repeat(MAX_NAME_BYTES + 1),
            String::new(),
        ];
        let (errors, models) = read(&list(&long));
        assert_eq!((errors, models.unwrap().len()), (1, 1));
    }
}
