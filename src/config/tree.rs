//! The text of a document as a value, and the line of everything in it.

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use serde_saphyr::Spanned;

use super::{ConfigError, Problem};

/// Deepest nesting of a document.
const MAX_DEPTH: usize = 64;
/// Values of a document, keys and aliased repetitions included.
const MAX_NODES: usize = 100_000;

/// Lines of a document, in its shape.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Lines {
    line: u64,
    inside: Inside,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
enum Inside {
    #[default]
    Nothing,
    Keys(Vec<(String, Lines)>),
    Items(Vec<Lines>),
}

impl Lines {
    /// The line of `path` (`plugins[3].parameters.lruSize`), or of the nearest thing around it. Keys
    /// match regardless of case, as parameters do.
    pub(super) fn of(&self, path: &str) -> Option<u64> {
        let deeper = match &self.inside {
            Inside::Nothing => None,
            Inside::Keys(keys) => keys
                .iter()
                .find_map(|(key, lines)| Some((after_key(path, key)?, lines))),
            Inside::Items(items) => {
                after_index(path).and_then(|(index, rest)| Some((rest, items.get(index)?)))
            }
        };
        match deeper {
            Some((rest, lines)) => lines.of(rest),
            None => Some(self.line).filter(|line| *line > 0),
        }
    }
}

/// What follows `key` in `path`. Keys may hold dots themselves, so the whole key is compared.
fn after_key<'a>(path: &'a str, key: &str) -> Option<&'a str> {
    let (head, rest) = path.split_at_checked(key.len())?;
    let matches = !key.is_empty() && head.eq_ignore_ascii_case(key);
    match rest.chars().next() {
        _ if !matches => None,
        None | Some('[') => Some(rest),
        Some('.') => rest.get(1..),
        Some(_) => None,
    }
}

fn after_index(path: &str) -> Option<(usize, &str)> {
    let (index, rest) = path.strip_prefix('[')?.split_once(']')?;
    Some((index.parse().ok()?, rest.strip_prefix('.').unwrap_or(rest)))
}

/// Reads YAML or JSON; a key that is given twice, anywhere, is an error. An empty text is `null`.
pub(super) fn read(text: &str) -> Result<(Value, Lines), ConfigError> {
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: MAX_DEPTH,
            max_nodes: MAX_NODES,
        },
        // As the reference's reader does.
        legacy_octal_numbers: true,
        with_snippet: false,
    };
    let node: Node = serde_saphyr::from_str_with_options(text, options).map_err(|error| {
        let line = error.location().map(|l| l.line());
        ConfigError {
            line: line.filter(|line| *line > 0),
            field: String::new(),
            problem: Problem::Decode(error.without_snippet().to_string()),
        }
    })?;
    Ok((node.value, node.lines))
}

/// A value with its lines.
struct Node {
    value: Value,
    lines: Lines,
}

/// The same without the line of the value itself.
struct Content(Value, Inside);

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Content>::deserialize(deserializer)?;
        let Content(value, inside) = spanned.value;
        let line = spanned.referenced.line();
        Ok(Self {
            value,
            lines: Lines { line, inside },
        })
    }
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ContentVisitor)
    }
}

struct ContentVisitor;

fn leaf(value: impl Into<Value>) -> Content {
    Content(value.into(), Inside::Nothing)
}

impl<'de> Visitor<'de> for ContentVisitor {
    type Value = Content;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<Content, E> {
        Ok(leaf(Value::Null))
    }

    fn visit_none<E>(self) -> Result<Content, E> {
        Ok(leaf(Value::Null))
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Content, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Content, E> {
        Ok(leaf(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Content, E> {
        Ok(leaf(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Content, E> {
        Ok(leaf(value))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Content, E> {
        let number = Number::from_f64(value);
        Ok(leaf(
            number.ok_or_else(|| E::custom("numbers must be finite"))?,
        ))
    }

    fn visit_str<E>(self, value: &str) -> Result<Content, E> {
        Ok(leaf(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Content, A::Error> {
        let (mut values, mut lines) = (Vec::new(), Vec::new());
        while let Some(node) = seq.next_element::<Node>()? {
            values.push(node.value);
            lines.push(node.lines);
        }
        Ok(Content(Value::Array(values), Inside::Items(lines)))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Content, A::Error> {
        let (mut object, mut lines) = (Map::new(), Vec::new());
        while let Some(key) = map.next_key::<Spanned<String>>()? {
            let node: Node = map.next_value()?;
            let at_key = Lines {
                line: key.referenced.line(),
                inside: node.lines.inside,
            };
            if object.contains_key(&key.value) {
                return Err(A::Error::custom(format!("duplicate key {:?}", key.value)));
            }
            lines.push((key.value.clone(), at_key));
            object.insert(key.value, node.value);
        }
        Ok(Content(Value::Object(object), Inside::Keys(lines)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::fmt::Write;

    fn value(text: &str) -> Value {
        read(text).map_err(|e| e.to_string()).unwrap().0
    }

    const TEXT: &str = "# a comment\nplugins:\n- type: a\n- name: b\n  parameters:\n    lruSize: 3\n    labels: {a.b/c: x,\n      d: y}\n";

    #[test]
    fn everything_has_a_line() {
        let (value, lines) = read(TEXT).unwrap();
        assert_eq!(value["plugins"][1]["parameters"]["labels"]["a.b/c"], "x");
        for (path, line) in [
            ("", 2),
            ("plugins", 2),
            ("plugins[0]", 3),
            ("plugins[0].type", 3),
            ("plugins[1]", 4),
            ("plugins[1].parameters", 5),
            ("plugins[1].parameters.LRUSize", 6),
            ("plugins[1].parameters.labels.a.b/c", 7),
            ("plugins[1].parameters.labels.d", 8),
            // Not there: the nearest thing around it.
            ("plugins[1].type", 4),
            ("plugins[7].type", 2),
            ("featureGates[0]", 2),
        ] {
            assert_eq!(lines.of(path), Some(line), "{path}");
        }
        assert_eq!(read("").unwrap().1.of("x"), Some(1));
    }

    #[test]
    fn json_is_read_with_its_lines() {
        let text = "{\n\t\"kind\": \"K\",\n\t\"plugins\": [\n\t\t{\"type\": \"a\\/b\\u00e9\"},\n\t\t{\"weight\": 1.5e1}\n\t]\n}\n";
        let (value, lines) = read(text).unwrap();
        assert_eq!(
            value,
            json!({"kind": "K", "plugins": [{"type": "a/bé"}, {"weight": 15.0}]})
        );
        assert_eq!(lines.of("plugins[1].weight"), Some(5));
    }

    #[test]
    fn scalars_are_what_yaml_says() {
        assert_eq!(
            value(
                "a: 010\nb: 0x10\nc: null\nd: ~\ne:\nf: '1'\ng: true\nh: yes\ni: 1.5\nj: -3\nk: 18446744073709551615"
            ),
            json!({"a": 8, "b": 16, "c": null, "d": null, "e": null, "f": "1", "g": true, "h": true, "i": 1.5, "j": -3, "k": u64::MAX})
        );
        assert_eq!(
            value("a: &x {b: 1}\nc: *x\nd: {<<: *x, e: 2}"),
            json!({"a": {"b": 1}, "c": {"b": 1}, "d": {"b": 1, "e": 2}})
        );
    }

    #[test]
    fn what_cannot_be_read_is_an_error_with_its_line() {
        for (text, line) in [
            ("a: 1\nb: 2\na: 3\n", Some(3)),
            ("a:\n  b: {c: 1,\n    c: 2}\n", Some(3)),
            ("{\"a\": 1,\n \"a\": 2}", Some(2)),
            ("a: [1, 2\n", None),
            ("a: .nan\n", Some(1)),
            ("a: b: c\n", Some(1)),
            ("a: *nobody\n", Some(1)),
            ("a: 1\n---\nb: 2\n", None),
        ] {
            let error = read(text).unwrap_err();
            assert!(line.is_none() || error.line == line, "{text:?}: {error}");
        }
        // A bomb is refused in bounded time and memory.
        let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for i in 1..12 {
            let alias = format!("*a{}", i - 1);
            let items = [alias.as_str(); 10].join(", ");
            writeln!(bomb, "a{i}: &a{i} [{items}]").unwrap();
        }
        assert!(read(&bomb).is_err());
        assert!(read(&"[".repeat(10_000)).is_err());
        assert!(read(&format!("{}{}", "[".repeat(60), "]".repeat(60))).is_ok());
    }
}
