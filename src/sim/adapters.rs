//! LoRA adapters: those named at the start, and those loaded and unloaded while serving.

use std::path::Path;

use http::StatusCode;
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::{Value, json};

use super::ask::Refusal;

/// Adapters that can be loaded at once; one more is refused.
const MAX_ADAPTERS: usize = 1024;

/// One adapter.
#[derive(Debug, Clone)]
pub(super) struct Adapter {
    /// From 1, in order of loading.
    pub(super) number: u64,
    pub(super) name: String,
    pub(super) path: String,
}

/// The adapters of a pod.
#[derive(Debug)]
pub(super) struct Adapters(Mutex<Loaded>);

#[derive(Debug, Default)]
struct Loaded {
    adapters: Vec<Adapter>,
    /// The highest number given so far.
    numbers: u64,
}

impl Loaded {
    fn add(&mut self, name: String, path: String) {
        self.numbers += 1;
        self.adapters.push(Adapter {
            number: self.numbers,
            name,
            path,
        });
    }
}

/// Body of a request to load or unload.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct AdapterRequest {
    lora_name: String,
    lora_path: String,
    load_inplace: bool,
}

impl Adapters {
    /// Those named at the start; the name stands for the path too.
    pub(super) fn new(names: &[String]) -> Self {
        let mut loaded = Loaded::default();
        for name in names {
            loaded.add(name.clone(), name.clone());
        }
        Self(Mutex::new(loaded))
    }

    pub(super) fn find(&self, name: &str) -> Option<Adapter> {
        let loaded = self.0.lock();
        loaded
            .adapters
            .iter()
            .find(|adapter| adapter.name == name)
            .cloned()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.lock().adapters.is_empty()
    }

    /// Loads an adapter; returns what to tell the client. An absolute path has to exist, anything
    /// else stands for the name of a repository.
    pub(super) fn load(&self, request: AdapterRequest) -> Result<String, Refusal> {
        let AdapterRequest {
            lora_name: name,
            lora_path: path,
            load_inplace,
        } = request;
        if name.is_empty() || path.is_empty() {
            return Err(wrong_input(
                "Both 'lora_name' and 'lora_path' must be provided.",
            ));
        }
        let mut all = self.0.lock();
        let full = all.adapters.len() >= MAX_ADAPTERS;
        let known = all.adapters.iter_mut().find(|adapter| adapter.name == name);
        if known.is_some() && !load_inplace {
            return Err(wrong_input(&format!(
                "The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set \
                 'load_inplace' to True."
            )));
        }
        if Path::new(&path).is_absolute() && !Path::new(&path).exists() {
            let text = format!("Loading lora {name} failed: No adapter found for {path}");
            return Err(Refusal::not_found(&text, None));
        }
        let done = format!("Success: LoRA adapter '{name}' added successfully.");
        match known {
            Some(adapter) => adapter.path = path,
            None if full => return Err(wrong_input("The simulator holds no more adapters.")),
            None => all.add(name, path),
        }
        Ok(done)
    }

    /// Unloads an adapter; returns what to tell the client.
    pub(super) fn unload(&self, request: &AdapterRequest) -> Result<String, Refusal> {
        let name = &request.lora_name;
        if name.is_empty() {
            return Err(wrong_input(
                "'lora_name' needs to be provided to unload a LoRA adapter.",
            ));
        }
        let adapters = &mut self.0.lock().adapters;
        let Some(index) = adapters.iter().position(|adapter| adapter.name == *name) else {
            let text = format!("The lora adapter '{name}' cannot be found.");
            return Err(Refusal::not_found(&text, None));
        };
        adapters.remove(index);
        Ok(format!(
            "Success: LoRA adapter '{name}' removed successfully."
        ))
    }

    /// The list of models: the base model, and each adapter as its child.
    pub(super) fn models(&self, base: &str, max_model_len: usize, now: u64) -> Value {
        let entry = |id: &str, root: &str, parent: Option<&str>, length: Option<usize>| {
            json!({
                "id": id, "object": "model", "created": now, "owned_by": "vllm", "root": root, "parent": parent,
                "max_model_len": length, "permission": [permission(now)],
            })
        };
        let mut models = vec![entry(base, base, None, Some(max_model_len))];
        let loaded = self.0.lock();
        models.extend(
            loaded
                .adapters
                .iter()
                .map(|a| entry(&a.name, &a.path, Some(base), None)),
        );
        json!({"object": "list", "data": models})
    }
}

fn wrong_input(message: &str) -> Refusal {
    Refusal::new(StatusCode::BAD_REQUEST, "InvalidUserInput", message, None)
}

fn permission(now: u64) -> Value {
    json!({
        "id": format!("modelperm-{:016x}", fastrand::u64(..)), "object": "model_permission", "created": now,
        "allow_create_engine": false, "allow_sampling": true, "allow_logprobs": true,
        "allow_search_indices": false, "allow_view": true, "allow_fine_tuning": false, "organization": "*",
        "group": null, "is_blocking": false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(name: &str) -> AdapterRequest {
        AdapterRequest {
            lora_name: name.to_owned(),
            lora_path: "organisation/adapter".to_owned(),
            load_inplace: false,
        }
    }

    #[test]
    fn the_number_of_adapters_is_bounded() {
        let adapters = Adapters::new(&[]);
        for number in 0..MAX_ADAPTERS {
            adapters.load(request(&number.to_string())).unwrap();
        }
        assert!(adapters.load(request("one-more")).is_err());
        adapters.unload(&request("7")).unwrap();
        assert!(adapters.load(request("one-more")).is_ok() && adapters.find("7").is_none());
    }

    #[test]
    fn an_adapter_is_replaced_only_when_asked_to() {
        let adapters = Adapters::new(&["a".to_owned()]);
        assert!(adapters.load(request("a")).is_err());
        let in_place = AdapterRequest {
            load_inplace: true,
            ..request("a")
        };
        adapters.load(in_place).unwrap();
        let models = adapters.models("base", 1, 0);
        assert_eq!(models["data"].as_array().map(Vec::len), Some(2));
        assert_eq!(models["data"][1]["root"], "organisation/adapter");
    }
}
