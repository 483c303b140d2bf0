//! Reads a JSON value into a struct by the rules of Go's `encoding/json`, which the reference uses, and
//! says in errors where the value stands.
//!
//! Differences from serde_json: `null` leaves a field, a list or an object as if it were absent; an
//! integer may be written `1e3`; and names can match regardless of case.

use serde::de::value::StrDeserializer;
use serde::de::{
    self, DeserializeOwned, DeserializeSeed, IntoDeserializer, MapAccess, SeqAccess, Unexpected,
    Visitor,
};
use serde_json::{Map, Number, Value};

/// How keys find their fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Names {
    /// The document: as spelled.
    Exact,
    /// Parameters: an exact match, else one that differs in case only.
    AnyCase,
}

/// A value that does not fit. Shown as `path: problem`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ValueError {
    /// Where, for example `plugins[3].name`; empty for the value itself.
    pub path: String,
    /// What is wrong.
    pub problem: String,
}

impl std::fmt::Display for ValueError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.problem)
    }
}

impl std::error::Error for ValueError {}

impl de::Error for ValueError {
    fn custom<T: std::fmt::Display>(text: T) -> Self {
        Self {
            path: String::new(),
            problem: text.to_string(),
        }
    }
}

impl ValueError {
    fn under(mut self, parent: &str) -> Self {
        let dot = !self.path.is_empty() && !self.path.starts_with('[');
        self.path = format!("{parent}{}{}", if dot { "." } else { "" }, self.path);
        self
    }
}

/// Reads `value` into `T`.
pub fn read_value<T: DeserializeOwned>(value: Value, names: Names) -> Result<T, ValueError> {
    T::deserialize(Reader { value, names })
}

struct Reader {
    value: Value,
    names: Names,
}

impl Reader {
    fn unexpected(&self, expected: &dyn de::Expected) -> ValueError {
        let found = match &self.value {
            Value::Null => Unexpected::Unit,
            Value::Bool(b) => Unexpected::Bool(*b),
            Value::Number(_) => Unexpected::Other("number"),
            Value::String(s) => Unexpected::Str(s),
            Value::Array(_) => Unexpected::Seq,
            Value::Object(_) => Unexpected::Map,
        };
        de::Error::invalid_type(found, expected)
    }

    fn fields<'de, V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ValueError> {
        let object = match self.value {
            Value::Null => Map::new(),
            Value::Object(object) => object,
            _ => return Err(self.unexpected(&visitor)),
        };
        let mut entries: Vec<Entry> = Vec::with_capacity(object.len());
        for (key, value) in object {
            let fold = |f: &&&str| self.names == Names::AnyCase && f.eq_ignore_ascii_case(&key);
            let exact = fields.iter().find(|f| **f == key);
            let Some(field) = exact.or_else(|| fields.iter().find(fold)) else {
                entries.push(Entry {
                    name: key.clone(),
                    written: key,
                    value,
                });
                continue;
            };
            if value.is_null() {
                continue;
            }
            // Of spellings that differ in case the last counts.
            entries.retain(|e| e.name != **field);
            entries.push(Entry {
                name: (*field).to_owned(),
                written: key,
                value,
            });
        }
        visitor.visit_map(Entries::new(entries, self.names))
    }
}

/// A key that found its field.
struct Entry {
    name: String,
    written: String,
    value: Value,
}

struct Entries {
    rest: std::vec::IntoIter<Entry>,
    names: Names,
    current: Option<(String, Value)>,
}

impl Entries {
    fn new(entries: Vec<Entry>, names: Names) -> Self {
        Self {
            rest: entries.into_iter(),
            names,
            current: None,
        }
    }

    fn of_map(object: Map<String, Value>, names: Names) -> Self {
        let entries = object.into_iter().map(|(key, value)| Entry {
            name: key.clone(),
            written: key,
            value,
        });
        Self::new(entries.collect(), names)
    }
}

impl<'de> MapAccess<'de> for Entries {
    type Error = ValueError;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, ValueError> {
        let Some(entry) = self.rest.next() else {
            return Ok(None);
        };
        let key: StrDeserializer<'_, ValueError> = entry.name.as_str().into_deserializer();
        let key = seed.deserialize(key).map_err(|e| e.under(&entry.written))?;
        self.current = Some((entry.written, entry.value));
        Ok(Some(key))
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(
        &mut self,
        seed: V,
    ) -> Result<V::Value, ValueError> {
        let Some((key, value)) = self.current.take() else {
            return Err(de::Error::custom("a value was asked for before its key"));
        };
        let names = self.names;
        seed.deserialize(Reader { value, names })
            .map_err(|e| e.under(&key))
    }
}

struct Items {
    rest: std::vec::IntoIter<Value>,
    position: usize,
    names: Names,
}

impl<'de> SeqAccess<'de> for Items {
    type Error = ValueError;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, ValueError> {
        let Some(value) = self.rest.next() else {
            return Ok(None);
        };
        let position = self.position;
        self.position += 1;
        let names = self.names;
        seed.deserialize(Reader { value, names })
            .map(Some)
            .map_err(|e| e.under(&format!("[{position}]")))
    }
}

fn visit_number<'de, V: Visitor<'de>>(number: &Number, visitor: V) -> Result<V::Value, ValueError> {
    if let Some(n) = number.as_u64() {
        visitor.visit_u64(n)
    } else if let Some(n) = number.as_i64() {
        visitor.visit_i64(n)
    } else {
        visitor.visit_f64(number.as_f64().unwrap_or(f64::NAN))
    }
}

/// `1e3` is 1000 where an integer is wanted, as long as it is exact.
fn visit_integer<'de, V: Visitor<'de>>(
    number: &Number,
    visitor: V,
) -> Result<V::Value, ValueError> {
    const EXACT: f64 = 9_007_199_254_740_992.0;
    match number.as_f64() {
        Some(n) if number.is_f64() && n.fract() == 0.0 && n.abs() <= EXACT =>
        {
            #[expect(clippy::cast_possible_truncation, reason = "integral and below 2^53")]
            visitor.visit_i64(n as i64)
        }
        _ => visit_number(number, visitor),
    }
}

macro_rules! integers {
    ($($method:ident)*) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ValueError> {
            match &self.value {
                Value::Number(number) => visit_integer(number, visitor),
                _ => self.deserialize_any(visitor),
            }
        })*
    };
}

impl<'de> de::Deserializer<'de> for Reader {
    type Error = ValueError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ValueError> {
        let names = self.names;
        match self.value {
            Value::Null => visitor.visit_unit(),
            Value::Bool(b) => visitor.visit_bool(b),
            Value::Number(n) => visit_number(&n, visitor),
            Value::String(s) => visitor.visit_string(s),
            Value::Array(items) => visitor.visit_seq(Items {
                rest: items.into_iter(),
                position: 0,
                names,
            }),
            Value::Object(object) => visitor.visit_map(Entries::of_map(object, names)),
        }
    }

    integers! {
        deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64 deserialize_i128
        deserialize_u8 deserialize_u16 deserialize_u32 deserialize_u64 deserialize_u128
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ValueError> {
        match self.value {
            Value::Null => visitor.visit_str(""),
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ValueError> {
        self.deserialize_string(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ValueError> {
        match self.value {
            Value::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, ValueError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, ValueError> {
        if self.value.is_null() {
            self.value = Value::Array(Vec::new());
        }
        match self.value {
            Value::Array(_) => self.deserialize_any(visitor),
            _ => Err(self.unexpected(&visitor)),
        }
    }

    fn deserialize_map<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, ValueError> {
        if self.value.is_null() {
            self.value = Value::Object(Map::new());
        }
        match self.value {
            Value::Object(_) => self.deserialize_any(visitor),
            _ => Err(self.unexpected(&visitor)),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ValueError> {
        self.fields(fields, visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ValueError> {
        match &self.value {
            Value::String(name) => {
                let name: StrDeserializer<'_, ValueError> = name.as_str().into_deserializer();
                visitor.visit_enum(name)
            }
            _ => Err(self.unexpected(&visitor)),
        }
    }

    serde::forward_to_deserialize_any! {
        bool f32 f64 char bytes byte_buf unit unit_struct tuple tuple_struct identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use serde_json::json;

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(default, deny_unknown_fields, rename_all = "camelCase")]
    struct All {
        count: u32,
        ratio: f64,
        on: bool,
        text: String,
        raw: Value,
    }

    #[test]
    fn a_value_must_have_the_type_of_its_field() {
        let all: All = read_value(
            json!({"count": 1e3, "ratio": 2, "on": true, "text": "on", "raw": "on"}),
            Names::Exact,
        )
        .unwrap();
        assert_eq!((all.count, all.ratio, all.on), (1000, 2.0, true));
        assert_eq!((all.text.as_str(), all.raw), ("on", json!("on")));
        for (value, problem) in [
            (
                json!({"on": "true"}),
                "on: invalid type: string \"true\", expected a boolean",
            ),
            (
                json!({"text": 8}),
                "text: invalid type: integer `8`, expected a string",
            ),
            (
                json!({"count": -1}),
                "count: invalid value: integer `-1`, expected u32",
            ),
            (
                json!({"ratio": "2"}),
                "ratio: invalid type: string \"2\", expected f64",
            ),
            (json!({"Count": 1}), "Count: unknown field `Count`"),
            (json!([1]), "invalid type: sequence"),
        ] {
            let error = read_value::<All>(value, Names::Exact)
                .unwrap_err()
                .to_string();
            assert!(error.starts_with(problem), "{error}");
        }
    }

    #[test]
    fn of_two_spellings_the_last_counts() {
        // Keys come sorted, capitals first.
        let all: All = read_value(json!({"COUNT": 1, "count": 2}), Names::AnyCase).unwrap();
        assert_eq!(all.count, 2);
        let all: All = read_value(json!({"COUNT": 1, "count": null}), Names::AnyCase).unwrap();
        assert_eq!(all.count, 1);
    }
}
