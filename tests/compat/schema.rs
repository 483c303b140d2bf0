//! A checker for the schemas in `tests/data/schemas`: the part of OpenAPI v3 that Kubernetes uses, as
//! strict as an API server with field validation set to Strict.

use std::collections::BTreeMap;

use serde_json::Value;

/// Every schema there is.
pub(crate) struct Schemas {
    kinds: BTreeMap<String, Value>,
    definitions: BTreeMap<String, Value>,
}

impl Schemas {
    pub(crate) fn load() -> Self {
        let texts = [
            include_str!("../data/schemas/kubernetes-1.33.json"),
            include_str!("../data/schemas/inference.json"),
            include_str!("../data/schemas/gateway.json"),
            include_str!("../data/schemas/kserve.json"),
            include_str!("../data/schemas/monitoring.json"),
        ];
        let mut schemas = Self {
            kinds: BTreeMap::new(),
            definitions: BTreeMap::new(),
        };
        for text in texts {
            let file: Value = serde_json::from_str(text).unwrap();
            let take = |key: &str| {
                let entries = file.get(key).and_then(Value::as_object).cloned();
                entries.unwrap_or_default().into_iter()
            };
            schemas.kinds.extend(take("kinds"));
            schemas.definitions.extend(take("definitions"));
        }
        schemas
    }

    /// The schema of an `apiVersion/Kind`.
    pub(crate) fn kind(&self, kind: &str) -> Option<&Value> {
        self.kinds.get(kind)
    }

    /// What is wrong with `manifest`, one line each.
    pub(crate) fn check(&self, manifest: &Value) -> Vec<String> {
        let text = |key: &str| manifest[key].as_str().unwrap_or_default().to_owned();
        let kind = format!("{}/{}", text("apiVersion"), text("kind"));
        let Some(schema) = self.kinds.get(&kind) else {
            return vec![format!("no schema for {kind}")];
        };
        let mut errors = Vec::new();
        // A custom resource's own schema leaves these three to the API server.
        let named = schema["$ref"].as_str().map(|name| &self.definitions[name]);
        let mut schema = named.unwrap_or(schema).clone();
        let fields = schema["properties"].as_object_mut().unwrap();
        for name in ["apiVersion", "kind"] {
            let anything = serde_json::json!({"type": "string"});
            fields.entry(name).or_insert(anything);
        }
        let metadata = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta";
        fields.insert("metadata".to_owned(), serde_json::json!({"$ref": metadata}));
        self.value(&schema, manifest, &kind, &mut errors);
        if manifest["metadata"]["name"]
            .as_str()
            .is_none_or(str::is_empty)
        {
            errors.push(format!("{kind}: metadata.name is missing"));
        }
        errors
    }

    fn value(&self, schema: &Value, value: &Value, path: &str, errors: &mut Vec<String>) {
        if let Some(name) = schema["$ref"].as_str() {
            let target = &self.definitions[name];
            return self.value(target, value, path, errors);
        }
        if schema["x-kubernetes-int-or-string"] == true {
            if !value.is_string() && !value.is_i64() {
                errors.push(format!("{path}: neither integer nor string"));
            }
            return;
        }
        for key in ["anyOf", "oneOf"] {
            if let Some(options) = schema[key].as_array() {
                let fits = options.iter().any(|option| {
                    let mut found = Vec::new();
                    self.value(&merged(schema, option), value, path, &mut found);
                    found.is_empty()
                });
                if !fits {
                    errors.push(format!("{path}: fits none of the alternatives"));
                }
            }
        }
        if !type_fits(&schema["type"], value) {
            errors.push(format!("{path}: {value} is not {}", schema["type"]));
            return;
        }
        if let Some(allowed) = schema["enum"].as_array()
            && !allowed.contains(value)
        {
            errors.push(format!("{path}: {value} is not one of {allowed:?}"));
        }
        bounds(schema, value, path, errors);
        match value {
            Value::Object(fields) => self.fields(schema, fields, path, errors),
            Value::Array(items) => {
                for (index, item) in items.iter().enumerate() {
                    self.value(&schema["items"], item, &format!("{path}[{index}]"), errors);
                }
            }
            _ => {}
        }
    }

    fn fields(
        &self,
        schema: &Value,
        fields: &serde_json::Map<String, Value>,
        path: &str,
        errors: &mut Vec<String>,
    ) {
        for required in schema["required"].as_array().into_iter().flatten() {
            let name = required.as_str().unwrap();
            if !fields.contains_key(name) {
                errors.push(format!("{path}: {name} is missing"));
            }
        }
        for (name, field) in fields {
            let inner = format!("{path}.{name}");
            let declared = schema["properties"].get(name);
            match (declared, &schema["additionalProperties"]) {
                (Some(declared), _) => self.value(declared, field, &inner, errors),
                (None, additional @ Value::Object(_)) => {
                    self.value(additional, field, &inner, errors);
                }
                (None, Value::Bool(true)) => {}
                (None, _) if is_open(schema) => {}
                (None, _) => errors.push(format!("{inner}: unknown field")),
            }
        }
    }
}

/// An alternative with the types of the schema it belongs to, which it only narrows.
fn merged(schema: &Value, option: &Value) -> Value {
    let mut merged = option.clone();
    if merged.get("properties").is_none()
        && let (Some(fields), Some(properties)) = (merged.as_object_mut(), schema.get("properties"))
    {
        fields.insert("properties".to_owned(), properties.clone());
    }
    merged
}

/// Fields nobody declared are allowed: a schema that says nothing, or says so.
fn is_open(schema: &Value) -> bool {
    schema["x-kubernetes-preserve-unknown-fields"] == true
        || schema.get("properties").is_none()
            && schema.get("additionalProperties").is_none()
            && schema.get("required").is_none()
}

fn type_fits(types: &Value, value: &Value) -> bool {
    let fits = |name: &str| match name {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64(),
        "number" => value.is_number(),
        "null" => value.is_null(),
        other => panic!("schema type {other}"),
    };
    match types {
        Value::Null => true,
        Value::String(name) => fits(name),
        Value::Array(names) => names.iter().any(|name| fits(name.as_str().unwrap())),
        other => panic!("schema type {other}"),
    }
}

fn bounds(schema: &Value, value: &Value, path: &str, errors: &mut Vec<String>) {
    let size = match value {
        Value::String(text) => Some(("Length", text.chars().count())),
        Value::Array(items) => Some(("Items", items.len())),
        Value::Object(fields) => Some(("Properties", fields.len())),
        _ => None,
    };
    if let Some((what, size)) = size {
        let bound = |end: &str| schema[format!("{end}{what}")].as_u64();
        if bound("min").is_some_and(|min| (size as u64) < min)
            || bound("max").is_some_and(|max| (size as u64) > max)
        {
            errors.push(format!("{path}: {size} is out of bounds"));
        }
    }
    if let Some(number) = value.as_f64()
        && (schema["minimum"].as_f64().is_some_and(|min| number < min)
            || schema["maximum"].as_f64().is_some_and(|max| number > max))
    {
        errors.push(format!("{path}: {number} is out of bounds"));
    }
}

#[test]
fn the_checker_sees_what_an_api_server_would_refuse() {
    let schemas = Schemas::load();
    let pool = |spec: &str| -> Vec<String> {
        let text = format!(
            "{{apiVersion: inference.networking.k8s.io/v1, kind: InferencePool, metadata: {{name: p}}, spec: {spec}}}"
        );
        schemas.check(&serde_saphyr::from_str(&text).unwrap())
    };
    let kind = "inference.networking.k8s.io/v1/InferencePool";
    let good = "{selector: {matchLabels: {a: b}}, targetPorts: [{number: 8000}], endpointPickerRef: {name: e, port: {number: 9002}}}";
    assert_eq!(pool(good), [""; 0]);
    assert_eq!(
        pool(&good.replace("name: e", "name: e, failureMode: FailClosed")),
        [format!(
            "{kind}.spec.endpointPickerRef.failureMode: \"FailClosed\" is not one of [String(\"FailOpen\"), String(\"FailClose\")]"
        )]
    );
    assert_eq!(
        pool(&good.replace("8000", "80000")),
        [format!(
            "{kind}.spec.targetPorts[0].number: 80000 is out of bounds"
        )]
    );
    assert_eq!(
        pool(&good.replace("targetPorts", "targetPort")),
        [
            format!("{kind}.spec: targetPorts is missing"),
            format!("{kind}.spec.targetPort: unknown field")
        ]
    );
    assert_eq!(
        pool(&good.replace("a: b", "a: 1")),
        [format!(
            "{kind}.spec.selector.matchLabels.a: 1 is not \"string\""
        )]
    );
    let deployment = |container: &str| -> Vec<String> {
        let text = format!(
            "{{apiVersion: apps/v1, kind: Deployment, metadata: {{name: d}}, spec: {{selector: {{}}, template: {{spec: {{containers: [{container}]}}}}}}}}"
        );
        schemas.check(&serde_saphyr::from_str(&text).unwrap())
    };
    let at = "apps/v1/Deployment.spec.template.spec.containers[0]";
    assert_eq!(
        deployment("{name: c, ports: [{containerPort: 1, name: x}]}"),
        [""; 0]
    );
    assert_eq!(
        deployment("{name: c, arg: [a]}"),
        [format!("{at}.arg: unknown field")]
    );
    assert_eq!(
        deployment("{name: c, resources: {requests: {cpu: 1, memory: true}}}"),
        [format!(
            "{at}.resources.requests.memory: fits none of the alternatives"
        )]
    );
    assert_eq!(
        deployment("{args: [1]}"),
        [
            format!("{at}: name is missing"),
            format!("{at}.args[0]: 1 is not [\"string\",\"null\"]")
        ]
    );
}
