//! The Prometheus text format, as far as it has to be read: lines of wanted families, the rest is
//! stepped over.

use memchr::{memchr, memchr_iter};
use smallvec::SmallVec;

/// Which series of a family: `name` or `name{label=value,other="value"}`; equality only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetricSpec {
    name: String,
    labels: Vec<(String, String)>,
    signed: bool,
}

impl MetricSpec {
    /// Takes negative values for true. Counts and shares have none, other numbers may.
    #[must_use]
    pub fn signed(mut self) -> Self {
        self.signed = true;
        self
    }
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
            signed: false,
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
    /// Samples whose value cannot be true: not a number, infinite or, unless allowed, negative.
    pub rejected: u32,
}

impl Found {
    /// Mean of the samples; `None` without any.
    pub fn mean(&self) -> Option<f64> {
        (self.samples > 0).then(|| self.sum / f64::from(self.samples))
    }
}

/// One [`Found`] for each spec, in their order.
pub type Findings = SmallVec<[Found; 12]>;

/// The specs one reader looks for, arranged so that nearly every line is passed over after a look at
/// one byte, and none is compared with a name twice.
#[derive(Debug, Clone)]
pub struct Wanted {
    specs: Vec<MetricSpec>,
    names: Vec<Name>,
    /// Length of what all names begin with, `vllm:` for example.
    common: usize,
    /// Bytes that follow it in a line of a wanted family.
    next: Box<[bool; 256]>,
}

/// What ends a name.
const NAME_ENDS: &[u8] = b"{ \t";

#[derive(Debug, Clone)]
struct Name {
    text: Box<[u8]>,
    /// Specs of this family.
    specs: SmallVec<[usize; 4]>,
}

impl Name {
    /// What follows the name, when `line` is of this family.
    fn strip<'t>(&self, line: &'t [u8]) -> Option<&'t [u8]> {
        let end = line.get(self.text.len())?;
        if NAME_ENDS.contains(end) {
            line.strip_prefix(&*self.text)
        } else {
            None
        }
    }
}

impl Wanted {
    /// Looks for `specs`; positions in what [`Self::scan`] reports are theirs.
    pub fn new(specs: Vec<MetricSpec>) -> Self {
        let mut names: Vec<Name> = Vec::new();
        for (position, spec) in specs.iter().enumerate() {
            match names.iter_mut().find(|n| *n.text == *spec.name.as_bytes()) {
                Some(name) => name.specs.push(position),
                None => names.push(Name {
                    text: spec.name.as_bytes().into(),
                    specs: SmallVec::from_slice(&[position]),
                }),
            }
        }
        let common = common_prefix(&names);
        let mut next = Box::new([false; 256]);
        for name in &names {
            let following = match name.text.get(common) {
                Some(byte) => std::slice::from_ref(byte),
                None => NAME_ENDS,
            };
            for byte in following {
                next[usize::from(*byte)] = true;
            }
        }
        Self {
            specs,
            names,
            common,
            next,
        }
    }

    /// The names that `line` may begin with: none for most lines.
    fn names_for(&self, line: &[u8]) -> &[Name] {
        match line.get(self.common) {
            Some(byte) if self.next[usize::from(*byte)] => &self.names,
            _ => &[],
        }
    }

    /// Walks the exposition once. For each sample that a spec matches calls `on_sample` with the
    /// spec's position; a lying value is counted in `found` and not handed on. No allocation for up to
    /// twelve specs.
    pub fn scan<'t>(
        &self,
        text: &'t [u8],
        found: &mut Findings,
        mut on_sample: impl FnMut(usize, Sample<'t>),
    ) {
        found.clear();
        found.resize(self.specs.len(), Found::default());
        let mut start = 0;
        for end in memchr_iter(b'\n', text).chain([text.len()]) {
            let line = text.get(start..end).unwrap_or_default();
            start = end + 1;
            if let Some(comment) = line.strip_prefix(b"#") {
                if let Some(declared) = comment.strip_prefix(b" TYPE ") {
                    self.declare(declared, found);
                }
                continue;
            }
            for name in self.names_for(line) {
                if let Some(behind) = name.strip(line) {
                    self.sample(name, behind, found, &mut on_sample);
                }
            }
        }
    }

    fn declare(&self, declared: &[u8], found: &mut Findings) {
        let names = self.names_for(declared).iter();
        let matching = names.filter(|n| n.strip(declared).is_some());
        for &position in matching.flat_map(|name| &name.specs) {
            if let Some(found) = found.get_mut(position) {
                found.declared = true;
            }
        }
    }

    fn sample<'t>(
        &self,
        name: &Name,
        behind_name: &'t [u8],
        found: &mut Findings,
        on_sample: &mut impl FnMut(usize, Sample<'t>),
    ) {
        let Some((labels, value)) = split_sample(behind_name) else {
            return;
        };
        let sample = Sample {
            labels,
            value: parse_value(value).unwrap_or(f64::NAN),
        };
        for &position in &name.specs {
            let (Some(spec), Some(found)) = (self.specs.get(position), found.get_mut(position))
            else {
                continue;
            };
            if !sample.matches(spec) {
                continue;
            }
            let sum = found.sum + sample.value;
            if !sum.is_finite() || (sample.value < 0.0 && !spec.signed) {
                found.rejected += 1;
                continue;
            }
            found.samples += 1;
            found.sum = sum;
            on_sample(position, sample);
        }
    }
}

/// Length of the beginning that all names share.
fn common_prefix(names: &[Name]) -> usize {
    let Some((first, others)) = names.split_first() else {
        return 0;
    };
    let shared = |other: &Name| {
        let pairs = first.text.iter().zip(&other.text);
        pairs.take_while(|(a, b)| a == b).count()
    };
    let lengths = others.iter().map(shared);
    lengths.min().unwrap_or(first.text.len())
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
        let mut found = Findings::new();
        Wanted::new(vec![spec.parse().unwrap()]).scan(text.as_bytes(), &mut found, |_, _| {});
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
    fn negative_numbers_are_true_where_they_may_be() {
        let spec = "t".parse::<MetricSpec>().unwrap().signed();
        let mut found = Findings::new();
        Wanted::new(vec![spec]).scan(b"t -3\nt 1\nt NaN\n", &mut found, |_, _| {});
        assert_eq!((found[0].sum, found[0].rejected), (-2.0, 1));
        // Two finite values whose sum is not.
        let huge = self::found("q 1e308\nq 1e308\n", "q");
        assert_eq!((huge.samples, huge.rejected), (1, 1));
    }

    #[test]
    fn specs_of_one_family_share_its_samples() {
        let wanted = Wanted::new(vec![
            "q{t=a}".parse().unwrap(),
            "other".parse().unwrap(),
            "q{t=b}".parse().unwrap(),
        ]);
        let mut found = Findings::new();
        let mut seen = Vec::new();
        let text = b"# TYPE q gauge\nq{t=\"b\"} 2\nq{t=\"a\"} 1\nother 7";
        wanted.scan(text, &mut found, |position, sample| {
            seen.push((position, sample.value));
        });
        assert_eq!(seen, [(2, 2.0), (0, 1.0), (1, 7.0)]);
        let declared: Vec<bool> = found.iter().map(|f| f.declared).collect();
        assert_eq!(declared, [true, false, true]);
    }

    #[test]
    fn a_name_that_begins_another_is_found_beside_it() {
        let wanted = Wanted::new(vec!["ab".parse().unwrap(), "abc".parse().unwrap()]);
        let mut found = Findings::new();
        wanted.scan(
            b"ab 1\nabc 2\nab{} 3\nabd 4\na 5\nab",
            &mut found,
            |_, _| {},
        );
        assert_eq!((found[0].sum, found[1].sum), (4.0, 2.0));
        Wanted::new(Vec::new()).scan(b"ab 1\n", &mut found, |_, _| {});
        assert!(found.is_empty());
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

    /// The walk without any shortcut.
    fn naive(text: &[u8], name: &str) -> (u32, f64) {
        let mut found = (0, 0.0);
        for line in text.split(|b| *b == b'\n') {
            let Some(behind) = line.strip_prefix(name.as_bytes()) else {
                continue;
            };
            let Some((_, value)) = split_sample(behind) else {
                continue;
            };
            if let Some(value) = parse_value(value).filter(|v| v.is_finite() && *v >= 0.0) {
                found.0 += 1;
                found.1 += value;
            }
        }
        found
    }

    proptest! {
        #[test]
        fn shortcuts_find_what_a_plain_walk_finds(text in prop::collection::vec(prop::sample::select(b"abbc{} \n12".to_vec()), 0..120)) {
            let names = ["ab", "abb", "b", "ac"];
            for skip in 0..names.len() {
                let wanted = Wanted::new(names[skip..].iter().map(|n| n.parse().unwrap()).collect());
                let mut found = Findings::new();
                wanted.scan(&text, &mut found, |_, _| {});
                for (name, found) in names[skip..].iter().zip(&found) {
                    prop_assert_eq!((found.samples, found.sum), naive(&text, name));
                }
            }
        }

        #[test]
        fn garbage_never_panics(text in prop::collection::vec(prop::sample::select(b"q{}=\"\\,# \n\t1.eN+-".to_vec()), 0..80)) {
            let wanted = Wanted::new(vec!["q".parse().unwrap(), "q{e=1}".parse().unwrap()]);
            wanted.scan(&text, &mut Findings::new(), |_, sample| {
                sample.label("q");
            });
        }
    }
}
