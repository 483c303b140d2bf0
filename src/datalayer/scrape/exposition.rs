//! The Prometheus text format, as far as it has to be read: lines of wanted families, the rest is
//! stepped over.

use memchr::memchr;

/// Which series of a family: `name` or `name{label=value,other="value"}`; equality only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetricSpec {
    name: String,
    labels: Vec<(String, String)>,
}

impl std::str::FromStr for MetricSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refuse = || format!("{text:?} is not of the form name or name{{label=value,...}}");
        let text = text.trim();
        let (name, labels) = match text.split_once('{') {
            None => (text, ""),
            Some((name, rest)) => (name, rest.strip_suffix('}').ok_or_else(refuse)?),
        };
        let valid = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | ':');
        if name.is_empty() || !name.chars().all(valid) {
            return Err(refuse());
        }
        let pairs = labels
            .split(',')
            .map(str::trim)
            .filter(|pair| !pair.is_empty())
            .map(|pair| {
                let (label, value) = pair.split_once('=').ok_or_else(refuse)?;
                let label = label.trim();
                if label.is_empty() || !label.chars().all(valid) {
                    return Err(refuse());
                }
                Ok((label.to_owned(), value.trim().trim_matches('"').to_owned()))
            });
        Ok(Self {
            name: name.to_owned(),
            labels: pairs.collect::<Result<_, _>>()?,
        })
    }
}

/// One sample of a wanted family.
#[derive(Debug, Clone, Copy)]
pub struct Sample<'a> {
    labels: &'a [u8],
    /// The value; finite.
    pub value: f64,
}

impl<'a> Sample<'a> {
    /// The raw value of a label, without resolving escapes.
    pub fn label(&self, name: &str) -> Option<&'a [u8]> {
        Labels(self.labels)
            .find(|(label, _)| *label == name.as_bytes())
            .map(|(_, value)| value)
    }

    fn matches(&self, spec: &MetricSpec) -> bool {
        spec.labels
            .iter()
            .all(|(label, value)| self.label(label) == Some(value.as_bytes()))
    }
}

/// What was found for one spec.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Found {
    /// Matching samples with a usable value.
    pub samples: u32,
    /// Their sum.
    pub sum: f64,
    /// The family is announced by a `# TYPE` line, even if it has no sample yet.
    pub declared: bool,
    /// Samples whose value cannot be true: not a number, infinite or negative.
    pub rejected: u32,
}

/// Walks the exposition once. For each sample of a family in `specs` calls `on_sample` with the
/// spec's position; a lying value is counted in `found` and not handed on.
pub fn scan(
    text: &[u8],
    specs: &[MetricSpec],
    found: &mut Vec<Found>,
    mut on_sample: impl FnMut(usize, Sample<'_>),
) {
    found.clear();
    found.resize(specs.len(), Found::default());
    let mut rest = text;
    while !rest.is_empty() {
        let end = memchr(b'\n', rest).unwrap_or(rest.len());
        let (line, tail) = rest.split_at(end);
        rest = tail.get(1..).unwrap_or_default();
        if let Some(declared) = line.strip_prefix(b"# TYPE ") {
            for (spec, found) in specs.iter().zip(found.iter_mut()) {
                let behind = declared.strip_prefix(spec.name.as_bytes());
                found.declared |= behind.is_some_and(|b| b.first() == Some(&b' '));
            }
            continue;
        }
        if line.first() == Some(&b'#') {
            continue;
        }
        for (position, (spec, found)) in specs.iter().zip(found.iter_mut()).enumerate() {
            let Some(behind) = line.strip_prefix(spec.name.as_bytes()) else {
                continue;
            };
            let Some((labels, value)) = split_sample(behind) else {
                continue;
            };
            let value = parse_value(value);
            let sample = Sample {
                labels,
                value: value.unwrap_or(f64::NAN),
            };
            if !sample.matches(spec) {
                continue;
            }
            if !sample.value.is_finite() || sample.value < 0.0 {
                found.rejected += 1;
                continue;
            }
            found.samples += 1;
            found.sum += sample.value;
            on_sample(position, sample);
        }
    }
}

/// Labels without braces, and what follows them.
fn split_sample(behind_name: &[u8]) -> Option<(&[u8], &[u8])> {
    match behind_name.first()? {
        b' ' | b'\t' => Some((b"", behind_name)),
        b'{' => {
            let mut quoted = false;
            let mut escaped = false;
            for (at, byte) in behind_name.iter().enumerate() {
                match byte {
                    _ if escaped => escaped = false,
                    b'\\' if quoted => escaped = true,
                    b'"' => quoted = !quoted,
                    b'}' if !quoted => {
                        return Some((behind_name.get(1..at)?, behind_name.get(at + 1..)?));
                    }
                    _ => {}
                }
            }
            None
        }
        // A longer name.
        _ => None,
    }
}

/// The value, before a time stamp or an exemplar.
fn parse_value(text: &[u8]) -> Option<f64> {
    let text = text.trim_ascii();
    let end = text
        .iter()
        .position(u8::is_ascii_whitespace)
        .unwrap_or(text.len());
    std::str::from_utf8(text.get(..end)?).ok()?.parse().ok()
}

/// Label pairs of a sample.
struct Labels<'a>(&'a [u8]);

impl<'a> Iterator for Labels<'a> {
    type Item = (&'a [u8], &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let equals = memchr(b'=', self.0)?;
        let name = self.0.get(..equals)?.trim_ascii();
        let value = self
            .0
            .get(equals + 1..)?
            .trim_ascii_start()
            .strip_prefix(b"\"")?;
        let mut escaped = false;
        let end = value.iter().position(|byte| match byte {
            _ if escaped => {
                escaped = false;
                false
            }
            b'\\' => {
                escaped = true;
                false
            }
            byte => *byte == b'"',
        })?;
        let rest = value.get(end + 1..).unwrap_or_default().trim_ascii_start();
        self.0 = rest.strip_prefix(b",").unwrap_or(rest).trim_ascii_start();
        Some((name, value.get(..end)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn found(text: &str, spec: &str) -> Found {
        let mut found = Vec::new();
        scan(
            text.as_bytes(),
            &[spec.parse().unwrap()],
            &mut found,
            |_, _| {},
        );
        found[0]
    }

    #[test]
    fn specs_are_read_strictly() {
        let spec: MetricSpec =
            r#" a:b { x = y , z="w" } "#.replace(" {", "{").trim().parse().unwrap();
        assert_eq!(
            spec.labels,
            [("x".into(), "y".into()), ("z".into(), "w".into())]
        );
        for bad in ["", "a b", "a{x", "a{x}", "{x=y}", "a{=y}", "a-b"] {
            assert!(bad.parse::<MetricSpec>().is_err(), "{bad}");
        }
    }

    #[test]
    fn samples_match_by_name_and_labels() {
        let text = "# TYPE q gauge\nq{e=\"0\",m=\"a,}\\\"b\"} 3\r\nq{e=\"1\"} 4.5 1700000000\nq_total 9\nqq 1\nq 2\n";
        assert_eq!(
            found(text, "q"),
            Found {
                samples: 3,
                sum: 9.5,
                declared: true,
                rejected: 0
            }
        );
        assert_eq!(found(text, "q{e=1}").sum, 4.5);
        assert_eq!(found(text, "q_total").sum, 9.0);
        assert_eq!(found(text, "none"), Found::default());
    }

    #[test]
    fn lies_and_garbage_are_not_samples() {
        let text = "q NaN\nq +Inf\nq -1\nq\nq{e=\"0\" 1\nq x\nq{} 1e400\n";
        let found = found(text, "q");
        // NaN, Inf, -1, `x` and 1e400 (infinite) are refused; the unfinished lines are no samples.
        assert_eq!((found.samples, found.rejected), (0, 5));
    }

    #[test]
    fn a_label_is_found_wherever_it_stands() {
        let sample = Sample {
            labels: br#"a="1",running_lora_adapters="x,y", b ="z""#,
            value: 0.0,
        };
        assert_eq!(sample.label("running_lora_adapters"), Some(&b"x,y"[..]));
        assert_eq!(sample.label("b"), Some(&b"z"[..]));
        assert_eq!(sample.label("c"), None);
    }

    proptest! {
        #[test]
        fn garbage_never_panics(text in prop::collection::vec(prop::sample::select(b"q{}=\"\\,# \n\t1.eN+-".to_vec()), 0..80)) {
            let mut found = Vec::new();
            scan(&text, &["q".parse().unwrap(), "q{e=1}".parse().unwrap()], &mut found, |_, sample| {
                sample.label("q");
            });
        }
    }
}
