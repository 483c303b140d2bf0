//! Strict parameters: unknown names are errors, names match regardless of case, as upstream.

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::go_value::{Names, read_value};

/// A parameter that cannot be used. The text begins with the field and a colon, then names the value
/// and what was expected: `engineConfigs[0].name: ...`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ParamError(pub String);

impl ParamError {
    /// The field that the text begins with, or the empty string.
    pub fn field(&self) -> &str {
        field_of(&self.0)
    }
}

/// What stands before the first colon of `text`, when it looks like the path of a field.
pub(crate) fn field_of(text: &str) -> &str {
    match text.split_once(": ") {
        Some((field, _)) if !field.contains(char::is_whitespace) => field,
        _ => "",
    }
}

/// The raw `parameters` of one plugin entry; `None` when the key is absent.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Parameters(pub Option<Value>);

impl Parameters {
    /// Reads the block into `T`, which should be `#[serde(default, deny_unknown_fields,
    /// rename_all = "camelCase")]`. `fields` are the accepted names. Names match ignoring case at every
    /// level and `null` leaves a field at its default, because Go reads JSON so. Absent, `null` and
    /// `{}` give `T`'s defaults.
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
        let known = |key: &String| fields.iter().any(|f| f.eq_ignore_ascii_case(key));
        if let Some(key) = object.keys().find(|key| !known(key)) {
            let expected = if fields.is_empty() {
                "there are no fields".to_owned()
            } else {
                format!("expected one of {}", fields.join(", "))
            };
            return Err(ParamError(format!(
                "{key}: unknown field `{key}`, {expected}"
            )));
        }
        read_value(Value::Object(object), Names::AnyCase).map_err(|e| ParamError(e.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use serde_json::json;

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(default, deny_unknown_fields, rename_all = "camelCase")]
    struct Settings {
        lru_size: i64,
        inner: Option<Inner>,
        list: Vec<Inner>,
    }

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(default, deny_unknown_fields, rename_all = "camelCase")]
    struct Inner {
        socket_port: u16,
        on: bool,
    }

    const FIELDS: &[&str] = &["lruSize", "inner", "list"];

    fn read(value: Value) -> Result<Settings, String> {
        Parameters(Some(value))
            .read(FIELDS)
            .map_err(|e| e.to_string())
    }

    #[test]
    fn names_match_in_any_case_at_every_level() {
        let settings =
            read(json!({"LRUSIZE": 3, "Inner": {"SocketPort": 5556}, "list": [{"ON": true}]}));
        assert_eq!(
            settings.unwrap(),
            Settings {
                lru_size: 3,
                inner: Some(Inner {
                    socket_port: 5556,
                    on: false
                }),
                list: vec![Inner {
                    socket_port: 0,
                    on: true
                }],
            }
        );
    }

    #[test]
    fn absent_null_and_empty_are_the_defaults() {
        for value in [None, Some(Value::Null), Some(json!({}))] {
            let settings: Settings = Parameters(value).read(FIELDS).unwrap();
            assert_eq!(settings, Settings::default());
        }
        assert_eq!(
            read(json!({"lruSize": null, "inner": null, "list": null})),
            Ok(Settings::default())
        );
    }

    #[test]
    fn errors_begin_with_the_field() {
        for (value, wanted) in [
            (
                json!({"wrong": 1}),
                "wrong: unknown field `wrong`, expected one of lruSize, inner, list",
            ),
            (
                json!({"inner": {"wrong": 1}}),
                "inner.wrong: unknown field `wrong`",
            ),
            (
                json!({"list": [{}, {"socketPort": "x"}]}),
                "list[1].socketPort: invalid type: string \"x\", expected u16",
            ),
            (
                json!({"list": [{"socketPort": 70_000}]}),
                "list[0].socketPort: invalid value: integer `70000`, expected u16",
            ),
            (
                json!({"lruSize": 1.5}),
                "lruSize: invalid type: floating point `1.5`, expected i64",
            ),
            (
                json!({"list": {}}),
                "list: invalid type: map, expected a sequence",
            ),
            (json!([]), "parameters: expected an object, got []"),
        ] {
            let error = read(value).unwrap_err();
            assert!(error.starts_with(wanted), "{error}");
        }
        assert_eq!(ParamError("a[0].b: no".into()).field(), "a[0].b");
        assert_eq!(ParamError("not a field: no".into()).field(), "");
    }
}
