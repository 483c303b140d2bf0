//! What Python writes where a template asks for it: `json.dumps` and `strftime`.

use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

/// Nesting of a value written as JSON; Python gives up near 1000.
const MAX_DEPTH: usize = 200;
/// Spaces before a line.
pub const MAX_INDENT: usize = 200;

/// `json.dumps` with the arguments that Hugging Face's `tojson` filter takes.
#[derive(Debug, Clone)]
pub struct JsonStyle {
    ensure_ascii: bool,
    sort_keys: bool,
    indent: Option<String>,
    item: String,
    key: String,
}

impl Default for JsonStyle {
    fn default() -> Self {
        Self {
            ensure_ascii: false,
            sort_keys: false,
            indent: None,
            item: ", ".to_owned(),
            key: ": ".to_owned(),
        }
    }
}

/// The `tojson` filter: `ensure_ascii=False`, and nothing escaped for HTML.
pub fn tojson(state: &State<'_, '_>, value: &Value, options: &Kwargs) -> Result<String, Error> {
    let style = JsonStyle::read(options)?;
    let mut out = String::new();
    dump(value, &style, 0, &mut out)?;
    state.consume_fuel(out.len() as u64 / 64)?;
    Ok(out)
}

impl JsonStyle {
    fn read(options: &Kwargs) -> Result<Self, Error> {
        let mut style = Self::default();
        if let Some(indent) = options
            .get::<Option<Value>>("indent")?
            .filter(|v| !v.is_none())
        {
            // With an indent lines end in the separator, so it has no space.
            ",".clone_into(&mut style.item);
            style.indent = Some(match indent.as_str() {
                Some(text) => text.to_owned(),
                None => " ".repeat(usize::try_from(indent).unwrap_or(0).min(MAX_INDENT)),
            });
        }
        let separators = options.get::<Option<Value>>("separators")?;
        if let Some(separators) = separators.filter(|v| !v.is_none()) {
            let mut parts = separators.try_iter()?.map(|part| part.to_string());
            let (Some(item), Some(key), None) = (parts.next(), parts.next(), parts.next()) else {
                return Err(invalid("separators must be two strings"));
            };
            (style.item, style.key) = (item, key);
        }
        let truth = |name: &str| -> Result<bool, Error> {
            Ok(options
                .get::<Option<Value>>(name)?
                .is_some_and(|v| v.is_true()))
        };
        style.ensure_ascii = truth("ensure_ascii")?;
        style.sort_keys = truth("sort_keys")?;
        options.assert_all_used()?;
        Ok(style)
    }

    fn new_line(&self, depth: usize, out: &mut String) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            for _ in 0..depth {
                out.push_str(indent);
            }
        }
    }
}

fn invalid(text: &'static str) -> Error {
    Error::new(ErrorKind::InvalidOperation, text)
}

fn dump(value: &Value, style: &JsonStyle, depth: usize, out: &mut String) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return Err(invalid("value nested too deep for tojson"));
    }
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => dump_number(value, out),
        ValueKind::String => quote(value.as_str().unwrap_or_default(), style.ensure_ascii, out),
        ValueKind::Map => dump_map(value, style, depth, out)?,
        ValueKind::Seq | ValueKind::Iterable => {
            let mut items = value.try_iter()?.peekable();
            if items.peek().is_none() {
                out.push_str("[]");
                return Ok(());
            }
            out.push('[');
            for (at, item) in items.enumerate() {
                if at > 0 {
                    out.push_str(&style.item);
                }
                style.new_line(depth + 1, out);
                dump(&item, style, depth + 1, out)?;
            }
            style.new_line(depth, out);
            out.push(']');
        }
        _ => return Err(invalid("value is not JSON serializable")),
    }
    Ok(())
}

fn dump_map(value: &Value, style: &JsonStyle, depth: usize, out: &mut String) -> Result<(), Error> {
    let mut keys: Vec<Value> = value.try_iter()?.collect();
    if keys.is_empty() {
        out.push_str("{}");
        return Ok(());
    }
    if style.sort_keys {
        keys.sort();
    }
    out.push('{');
    for (at, key) in keys.iter().enumerate() {
        if at > 0 {
            out.push_str(&style.item);
        }
        style.new_line(depth + 1, out);
        if let Some(text) = key.as_str() {
            quote(text, style.ensure_ascii, out);
        } else {
            // Python turns other keys into strings of their JSON.
            out.push('"');
            dump(key, style, depth + 1, out)?;
            out.push('"');
        }
        out.push_str(&style.key);
        dump(&value.get_item(key)?, style, depth + 1, out)?;
    }
    style.new_line(depth, out);
    out.push('}');
    Ok(())
}

fn dump_number(value: &Value, out: &mut String) {
    if value.is_integer() {
        let _ = write!(out, "{value}");
    } else {
        out.push_str(&json_float(
            f64::try_from(value.clone()).unwrap_or(f64::NAN),
        ));
    }
}

/// `json.dumps` of a float.
fn json_float(value: f64) -> String {
    match value {
        f64::INFINITY => "Infinity".to_owned(),
        f64::NEG_INFINITY => "-Infinity".to_owned(),
        value if value.is_nan() => "NaN".to_owned(),
        value => float_repr(value),
    }
}

/// Python's `repr` of a float: shortest digits, positional for exponents from -4 to 15.
pub fn float_repr(value: f64) -> String {
    if !value.is_finite() {
        return format!("{value}").to_lowercase();
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let fixed = format!("{value}");
        return if fixed.contains('.') {
            fixed
        } else {
            fixed + ".0"
        };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.unsigned_abs())
}

fn quote(text: &str, ensure_ascii: bool, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if c < ' ' || (ensure_ascii && !c.is_ascii()) => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// `datetime.now().strftime(format)`. The clock is UTC, as in the containers engines run in.
pub fn strftime_now(format: &str) -> Result<String, Error> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    strftime(format, since.map_or(0, |since| since.as_secs()))
}

const DAYS: [&str; 7] = [
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// `strftime` at `seconds` after 1970, UTC, English names; directives that templates use.
pub fn strftime(format: &str, seconds: u64) -> Result<String, Error> {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let date = Date::of(days);
    let day_name = DAYS.get((days % 7) as usize).copied().unwrap_or_default();
    let month_name = MONTHS.get(date.month - 1).copied().unwrap_or_default();
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let _ = match chars.next() {
            Some('Y') => write!(out, "{}", date.year),
            Some('y') => write!(out, "{:02}", date.year % 100),
            Some('m') => write!(out, "{:02}", date.month),
            Some('d') => write!(out, "{:02}", date.day),
            Some('e') => write!(out, "{:2}", date.day),
            Some('j') => write!(out, "{:03}", date.day_of_year),
            Some('B') => write!(out, "{month_name}"),
            Some('b' | 'h') => write!(out, "{month_name:.3}"),
            Some('A') => write!(out, "{day_name}"),
            Some('a') => write!(out, "{day_name:.3}"),
            Some('H') => write!(out, "{hour:02}"),
            Some('I') => write!(out, "{:02}", (hour + 11) % 12 + 1),
            Some('M') => write!(out, "{minute:02}"),
            Some('S') => write!(out, "{second:02}"),
            Some('p') => write!(out, "{}", if hour < 12 { "AM" } else { "PM" }),
            Some('F') => write!(out, "{}-{:02}-{:02}", date.year, date.month, date.day),
            Some('T') => write!(out, "{hour:02}:{minute:02}:{second:02}"),
            Some('%') => write!(out, "%"),
            _ => return Err(invalid("strftime directive is not supported")),
        };
    }
    Ok(out)
}

struct Date {
    year: u64,
    /// 1 to 12.
    month: usize,
    day: u64,
    day_of_year: u64,
}

impl Date {
    /// The date `days` after 1970-01-01.
    fn of(mut days: u64) -> Self {
        let leap = |year: u64| {
            year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
        };
        let mut year = 1970;
        loop {
            let length = if leap(year) { 366 } else { 365 };
            if days < length {
                break;
            }
            days -= length;
            year += 1;
        }
        let day_of_year = days + 1;
        let february = if leap(year) { 29 } else { 28 };
        let lengths = [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
        let mut month = 1;
        for length in lengths {
            if days < length {
                break;
            }
            days -= length;
            month += 1;
        }
        Self {
            year,
            month,
            day: days + 1,
            day_of_year,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_written_as_python_does() {
        // repr() of CPython 3.11.
        for (value, repr) in [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (-2.5, "-2.5"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (123_456.789, "123456.789"),
        ] {
            assert_eq!(float_repr(value), repr);
        }
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        // `date -u -d @1795346037`: Sun Nov 22 11:13:57 2026 (the recording), day 326 of the year.
        let at = 1_795_346_037;
        assert_eq!(strftime("%d %b %Y", at).unwrap(), "22 Nov 2026");
        assert_eq!(
            strftime("%A, %B %e %j", at).unwrap(),
            "Sunday, November 22 326"
        );
        assert_eq!(
            strftime("%F %T %I %p%%", at).unwrap(),
            "2026-11-22 11:13:57 11 AM%"
        );
        // 2024-02-29 23:00:00, a leap day.
        assert_eq!(
            strftime("%Y-%m-%d %I%p", 1_709_247_600).unwrap(),
            "2024-02-29 11PM"
        );
        assert!(strftime("%Q", 0).is_err());
    }
}
