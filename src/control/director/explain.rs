//! What producers know about a request that nobody sent, for the admin endpoint.

use std::cell::RefCell;
use std::sync::Arc;

use bytes::Bytes;
use serde_json::{Map, Value, json};

use super::{Director, in_time};
use crate::control::RequestError;
use crate::control::intake::{BodyKnowledge, read_request, request_id};
use crate::plugin::Attributes;
use crate::request::{Body, Headers};
use crate::scheduling::Candidate;

impl Director {
    /// Reads `body` as a request to `path` and lets the producers work on it as they do for any request,
    /// over the whole pool; then asks them what they found. Nothing is picked and nothing learned;
    /// producers whose work changes what later requests get are left out. Their own counters count it.
    pub async fn explain(&self, path: &str, body: Bytes) -> Result<Value, RequestError> {
        let config = self.active.load_full();
        let mut headers = Headers::default();
        headers.push(":path".to_owned(), Bytes::copy_from_slice(path.as_bytes()));
        let body = Body::from(body);
        let request = {
            let rules = self.rules.load();
            let with = (&**rules, &RefCell::default());
            let whole = BodyKnowledge::Complete;
            let id = request_id(&headers);
            let request = (headers, body, None);
            read_request(&config.parsers, &id, request, whole, with)?.request
        };
        let pool = self.store.snapshot();
        let candidates: Vec<_> = pool
            .iter()
            .map(|endpoint| Candidate::new(Arc::clone(endpoint)))
            .collect();
        let mut attributes = Attributes::default();
        let mut explained = Map::new();
        for producer in config.producers.iter().filter(|p| p.plugin.is_pure()) {
            let plugin = &producer.plugin;
            let result = match plugin.prepare(&request, &candidates, &attributes) {
                Some(preparation) => in_time(preparation).await.and_then(|prepared| {
                    plugin.produce_prepared(prepared, &request, &candidates, &mut attributes)
                }),
                None => plugin.produce(&request, &candidates, &mut attributes),
            };
            let name = producer.name.name.clone();
            if let Err(error) = result {
                explained.insert(name, json!({"error": error.to_string()}));
                break;
            }
            if let Some(value) = plugin.explain(&request, &candidates, &attributes) {
                explained.insert(name, value);
            }
        }
        Ok(json!({
            "model": request.target_model,
            "prompts": request.payload.prompts.len(),
            "producers": explained,
        }))
    }

    /// The state of every producer that has some to show.
    pub fn overview(&self) -> Value {
        let config = self.active.load_full();
        let pool = self.store.snapshot();
        let producers = config.producers.iter().filter_map(|producer| {
            let value = producer.plugin.overview(&pool)?;
            Some((producer.name.name.clone(), value))
        });
        json!({"producers": producers.collect::<Map<_, _>>()})
    }
}
