//! Kubernetes label selectors in their text form: `a=b,c!=d,e in (x,y),f notin (z),g,!h,n>1,m<5`.

use std::collections::BTreeMap;

/// A conjunction of requirements; empty matches everything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selector(Vec<Requirement>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Requirement {
    key: String,
    test: Test,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Test {
    Exists,
    Absent,
    In(Vec<String>),
    /// Also holds without the label.
    NotIn(Vec<String>),
    Above(i64),
    Below(i64),
}

impl Selector {
    /// Reads the text form; an error says which requirement it is about.
    pub fn parse(text: &str) -> Result<Self, String> {
        let parts = split_outside_parentheses(text);
        let requirements = parts.into_iter().map(Requirement::parse);
        requirements.collect::<Result<_, _>>().map(Self)
    }

    /// True when all requirements hold.
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.0.iter().all(|requirement| requirement.holds(labels))
    }
}

/// Cuts at the commas that are not inside parentheses.
fn split_outside_parentheses(text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let (mut start, mut depth) = (0, 0u32);
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'(' => depth += 1,
            b')' => depth = depth.saturating_sub(1),
            b',' if depth == 0 => {
                parts.extend(text.get(start..at));
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.extend(text.get(start..));
    parts
}

impl Requirement {
    fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let refuse = || format!("{text:?} is not a label requirement");
        let requirement = |key: &str, test| {
            let key = key.trim();
            is_word(key)
                .then(|| Self {
                    key: key.to_owned(),
                    test,
                })
                .ok_or_else(refuse)
        };
        let word = |value: &str| {
            let value = value.trim();
            (value.is_empty() || is_word(value))
                .then(|| value.to_owned())
                .ok_or_else(refuse)
        };
        let number = |value: &str| value.trim().parse().map_err(|_| refuse());
        if let Some(key) = text.strip_prefix('!') {
            return requirement(key, Test::Absent);
        }
        if let Some((key, values)) = text.split_once("!=") {
            return requirement(key, Test::NotIn(vec![word(values)?]));
        }
        if let Some((key, value)) = text.split_once("==").or_else(|| text.split_once('=')) {
            return requirement(key, Test::In(vec![word(value)?]));
        }
        if let Some((key, value)) = text.split_once('>') {
            return requirement(key, Test::Above(number(value)?));
        }
        if let Some((key, value)) = text.split_once('<') {
            return requirement(key, Test::Below(number(value)?));
        }
        let Some((head, list)) = text.split_once('(') else {
            return requirement(text, Test::Exists);
        };
        let list = list.strip_suffix(')').ok_or_else(refuse)?;
        let values = list.split(',').map(word).collect::<Result<Vec<_>, _>>()?;
        let mut head = head.split_whitespace();
        match (head.next(), head.next(), head.next()) {
            (Some(key), Some("in"), None) => requirement(key, Test::In(values)),
            (Some(key), Some("notin"), None) => requirement(key, Test::NotIn(values)),
            _ => Err(refuse()),
        }
    }

    fn holds(&self, labels: &BTreeMap<String, String>) -> bool {
        let value = labels.get(&self.key);
        let number = || value.and_then(|v| v.parse::<i64>().ok());
        match &self.test {
            Test::Exists => value.is_some(),
            Test::Absent => value.is_none(),
            Test::In(values) => value.is_some_and(|v| values.contains(v)),
            Test::NotIn(values) => value.is_none_or(|v| !values.contains(v)),
            Test::Above(limit) => number().is_some_and(|n| n > *limit),
            Test::Below(limit) => number().is_some_and(|n| n < *limit),
        }
    }
}

/// The characters of label keys and values.
fn is_word(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"-_./".contains(&b);
    !text.is_empty() && text.bytes().all(allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels() -> BTreeMap<String, String> {
        [("app", "llm"), ("tier", "gold"), ("size", "8")]
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .into()
    }

    #[test]
    fn every_operator_holds_where_kubernetes_says() {
        for (text, holds) in [
            ("app=llm", true),
            ("app==llm", true),
            ("app=x", false),
            ("app!=x", true),
            ("app!=llm", false),
            ("none!=x", true),
            ("tier in (gold, lead)", true),
            ("tier in (lead)", false),
            ("none in (a)", false),
            ("tier notin (lead,tin)", true),
            ("tier notin (gold)", false),
            ("none notin (a)", true),
            ("app", true),
            ("none", false),
            ("!none", true),
            ("! app", false),
            ("size>7", true),
            ("size > 8", false),
            ("size<9", true),
            ("tier<9", false),
            ("example.com/none=", false),
            (" app = llm , tier in (gold,lead), !none ", true),
            ("app=llm,tier=tin", false),
        ] {
            let selector = Selector::parse(text).unwrap();
            assert_eq!(selector.matches(&labels()), holds, "{text}");
        }
    }

    #[test]
    fn other_text_is_refused() {
        for text in [
            "",
            ",",
            "a,",
            "a b",
            "=x",
            "a in",
            "a in x",
            "a in (x",
            "a of (x)",
            "in (x)",
            "a>x",
            "a=b c",
            "a=(b)",
            "a in ((x))",
            "a=b)",
        ] {
            assert!(Selector::parse(text).is_err(), "{text}");
        }
    }
}
