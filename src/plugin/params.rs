//! Strict parameters: unknown names are errors, names match regardless of case, as upstream.

use serde::de::DeserializeOwned;
use serde_json::Value;

/// A parameter that cannot be used; the text names the field, the value and what was expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ParamError(pub String);

/// The raw `parameters` of one plugin entry; `None` when the key is absent.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Parameters(pub Option<Value>);

impl Parameters {
    /// Reads the block into `T`, which should be `#[serde(default, deny_unknown_fields,
    /// rename_all = "camelCase")]`. `fields` are the accepted names: keys are matched to them
    /// ignoring case, because the reference does. Absent, `null` and `{}` give `T`'s defaults.
    pub fn read<T: DeserializeOwned>(&self, fields: &[&str]) -> Result<T, ParamError> {
        let object = match &self.0 {
            None | Some(Value::Null) => serde_json::Map::new(),
            Some(Value::Object(object)) => object.clone(),
            Some(other) => {
                return Err(ParamError(format!(
                    "parameters: expected an object, got {other}"
                )));
            }
        };
        let renamed = object
            .into_iter()
            .map(|(key, value)| {
                let name = fields.iter().find(|f| f.eq_ignore_ascii_case(&key));
                (name.map_or(key, |f| (*f).to_owned()), value)
            })
            .collect();
        serde_json::from_value(Value::Object(renamed))
            .map_err(|e| ParamError(format!("parameters: {e}")))
    }
}
