//! A table with a row for each measurement and a column for each run.

use std::fmt::Write;

use super::report::{Measured, Times};

/// Which of two values is the better one.
#[derive(Clone, Copy)]
pub(super) enum Better {
    Lower,
    Higher,
}

impl Better {
    /// By which factor `other` is better than `base`; below 1 it is worse.
    pub(super) fn ratio(self, base: f64, other: f64) -> Option<f64> {
        let (worse, better) = match self {
            Self::Lower => (base, other),
            Self::Higher => (other, base),
        };
        (better > 0.0).then(|| worse / better)
    }

    /// The same in words; a dash when nothing can be said.
    pub(super) fn factor(self, base: f64, other: f64) -> String {
        let ratio = self.ratio(base, other);
        ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}x"))
    }
}

/// A number of a distribution, and its name.
pub(super) type Part = (&'static str, fn(&Times) -> f64);
pub(super) const MEAN: Part = ("mean", |times| times.mean);
pub(super) const P50: Part = ("p50", |times| times.p50);
pub(super) const P90: Part = ("p90", |times| times.p90);
pub(super) const P99: Part = ("p99", |times| times.p99);

/// Seconds with milliseconds.
pub(super) fn seconds(value: f64) -> String {
    format!("{value:.3}")
}

/// Without a fraction.
pub(super) fn whole(value: f64) -> String {
    format!("{value:.0}")
}

/// Rows written so far. Two runs are compared: the first is the base.
pub(super) struct Table<'a> {
    runs: &'a [Measured],
    pub(super) text: String,
}

impl<'a> Table<'a> {
    /// The head.
    pub(super) fn new(title: &str, runs: &'a [Measured]) -> Self {
        let mut table = Self {
            runs,
            text: String::new(),
        };
        let names = runs.iter().map(|run| run.name.clone()).collect();
        table.row(title, names, "better by");
        table
    }

    fn row(&mut self, name: &str, cells: Vec<String>, comparison: &str) {
        let _ = write!(self.text, "{name:<36}");
        for cell in cells {
            let _ = write!(self.text, "{cell:>16}");
        }
        if self.runs.len() == 2 && !comparison.is_empty() {
            let _ = write!(self.text, "{comparison:>14}");
        }
        self.text.push('\n');
    }

    /// Values that can be compared; a dash where there is none.
    pub(super) fn number(
        &mut self,
        name: &str,
        better: Better,
        value: impl Fn(&Measured) -> Option<f64>,
        shown: fn(f64) -> String,
    ) {
        let values: Vec<Option<f64>> = self.runs.iter().map(value).collect();
        let cell = |value: &Option<f64>| value.map_or_else(|| "-".to_owned(), shown);
        let comparison = match values[..] {
            [Some(base), Some(other)] => better.factor(base, other),
            _ => String::new(),
        };
        self.row(name, values.iter().map(cell).collect(), &comparison);
    }

    /// Parts of distributions of times, in seconds.
    pub(super) fn times(
        &mut self,
        name: &str,
        parts: &[Part],
        value: impl Fn(&Measured) -> Option<Times>,
    ) {
        for (part, of) in parts {
            let value = |run: &Measured| value(run).as_ref().map(of);
            let name = format!("{name} {part}, s");
            self.number(&name, Better::Lower, value, seconds);
        }
    }

    /// Values that cannot be compared.
    pub(super) fn text(&mut self, name: &str, value: impl Fn(&Measured) -> String) {
        self.row(name, self.runs.iter().map(value).collect(), "");
    }

    /// How many were sent, and how many failed.
    pub(super) fn requests(&mut self) {
        self.text("requests", |run| run.requests.to_string());
        self.text("  failed", |run| run.failed.to_string());
    }

    /// What pinpod adds, and how far the parts that measure kept up.
    pub(super) fn measurement(&mut self) {
        let bound = |us: Option<f64>| us.map_or("> 100000".to_owned(), |us| format!("<= {us:.0}"));
        self.text("added by pinpod, mean, us (wall)", |run| {
            whole(run.decision.mean_us)
        });
        self.text("  p50", |run| bound(run.decision.p50_us));
        self.text("  p99", |run| bound(run.decision.p99_us));
        self.text("client lag p99, s", |run| seconds(run.client_lag_p99));
        self.text("engine lag, s", |run| format!("{:.1}", run.engine_lag));
    }
}
