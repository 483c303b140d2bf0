//! Python's methods that templates call: those of `minijinja-contrib`, and where Python's do more or
//! otherwise. What is in neither is an error, so that a prompt goes without tokens instead of with
//! wrong ones.

use minijinja::value::{Kwargs, Tuple, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

/// What `str.isspace` says: Unicode's white space and four separators.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// `str.strip`, of white space or of `chars`.
pub(super) fn strip<'a>(text: &'a str, chars: Option<&str>) -> &'a str {
    lstrip(rstrip(text, chars), chars)
}

fn lstrip<'a>(text: &'a str, chars: Option<&str>) -> &'a str {
    match chars {
        Some(chars) => text.trim_start_matches(|c| chars.contains(c)),
        None => text.trim_start_matches(is_space),
    }
}

fn rstrip<'a>(text: &'a str, chars: Option<&str>) -> &'a str {
    match chars {
        Some(chars) => text.trim_end_matches(|c| chars.contains(c)),
        None => text.trim_end_matches(is_space),
    }
}

/// `str.splitlines`, with or without what ends each line.
pub(super) fn lines(text: &str, keep_ends: bool) -> Vec<&str> {
    let ends = |c| {
        matches!(
            c,
            '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'
                ..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    let mut all = Vec::new();
    let mut rest = text;
    while let Some((line, end)) = rest.find(ends).and_then(|at| rest.split_at_checked(at)) {
        let length = if end.starts_with("\r\n") {
            2
        } else {
            end.chars().next().map_or(0, char::len_utf8)
        };
        let (whole, behind) = rest.split_at(line.len() + length);
        all.push(if keep_ends { whole } else { line });
        rest = behind;
    }
    if !rest.is_empty() {
        all.push(rest);
    }
    all
}

/// Calls a method of a value.
pub(super) fn call(
    state: &mut State<'_, '_>,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    match (value.kind(), value.as_str()) {
        (ValueKind::String, Some(text)) => match of_string(text, name, args)? {
            Some(result) => Ok(result),
            None => unknown_method_callback(state, value, name, args),
        },
        (ValueKind::Seq | ValueKind::Map, _) if name == "copy" => {
            let () = from_args(args)?;
            Ok(value.clone())
        }
        (ValueKind::Seq, _) if name == "index" => {
            let (wanted,): (&Value,) = from_args(args)?;
            let at = value.try_iter()?.position(|item| item == *wanted);
            at.map(Value::from)
                .ok_or_else(|| invalid("value is not in list"))
        }
        _ => unknown_method_callback(state, value, name, args),
    }
}

/// `None` for what `minijinja-contrib` does as Python does, or not at all.
fn of_string(text: &str, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let value = match name {
        "strip" => Value::from(strip(text, from_args::<(Option<&str>,)>(args)?.0)),
        "lstrip" => Value::from(lstrip(text, from_args::<(Option<&str>,)>(args)?.0)),
        "rstrip" => Value::from(rstrip(text, from_args::<(Option<&str>,)>(args)?.0)),
        "isspace" => Value::from(!text.is_empty() && text.chars().all(is_space)),
        "isdigit" | "isdecimal" => {
            // Which other digits count differs between the two.
            if text.chars().any(|c| !c.is_ascii() && c.is_numeric()) {
                return Err(invalid("digits beyond ASCII"));
            }
            Value::from(!text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()))
        }
        "title" => Value::from(title(text)),
        "swapcase" => text.chars().map(swapped).collect::<String>().into(),
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "split" => split(text, args)?,
        "rsplit" => rsplit(text, args)?,
        "splitlines" => {
            let (keep_ends, named): (Option<bool>, Kwargs) = from_args(args)?;
            let named_ends: Option<bool> = named.get("keepends")?;
            named.assert_all_used()?;
            let keep_ends = keep_ends.or(named_ends).unwrap_or(false);
            lines(text, keep_ends).into_iter().collect()
        }
        "partition" | "rpartition" => partition(text, name == "rpartition", args)?,
        "find" | "rfind" | "index" | "rindex" | "count" => search(text, name, args)?,
        "startswith" | "endswith" if args.len() > 1 => ends(text, name, args)?,
        "center" | "ljust" | "rjust" | "zfill" => padded(text, name, args)?,
        _ => return Ok(None),
    };
    Ok(Some(value))
}

fn invalid(text: &'static str) -> Error {
    Error::new(ErrorKind::InvalidOperation, text)
}

/// `str.title`: each row of letters by itself, so that `it's` becomes `It'S`; the filter does otherwise.
fn title(text: &str) -> String {
    // Digraphs that are upper and lower case at once.
    let cased =
        |c: char| c.is_lowercase() || c.is_uppercase() || matches!(c, 'ǅ' | 'ǈ' | 'ǋ' | 'ǲ');
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while !rest.is_empty() {
        let (between, behind) = rest.split_at(rest.find(cased).unwrap_or(rest.len()));
        let end = behind.find(|c| !cased(c)).unwrap_or(behind.len());
        let (word, behind) = behind.split_at(end);
        out.push_str(between);
        out.push_str(&capitalized(word));
        rest = behind;
    }
    out
}

fn capitalized(word: &str) -> String {
    let mut chars = word.chars();
    let Some(first) = chars.next() else {
        return String::new();
    };
    let mut upper = first.to_uppercase();
    let mut out = String::with_capacity(word.len());
    match upper.next() {
        Some('Ǆ') => out.push('ǅ'),
        Some('Ǉ') => out.push('ǈ'),
        Some('Ǌ') => out.push('ǋ'),
        Some('Ǳ') => out.push('ǲ'),
        Some(c) => out.push(c),
        None => {}
    }
    // A ligature is several letters, of which the first is large.
    out.extend(upper.flat_map(char::to_lowercase));
    out + &chars.as_str().to_lowercase()
}

fn swapped(c: char) -> String {
    if c.is_uppercase() {
        c.to_lowercase().collect()
    } else {
        c.to_uppercase().collect()
    }
}

/// Separator and number of splits, by place or name.
fn split_args(args: &[Value]) -> Result<(Option<String>, Option<usize>), Error> {
    let (sep, max, named): (Option<String>, Option<i64>, Kwargs) = from_args(args)?;
    let (named_sep, named_max): (Option<String>, Option<i64>) =
        (named.get("sep")?, named.get("maxsplit")?);
    named.assert_all_used()?;
    let sep = sep.or(named_sep);
    if sep.as_deref() == Some("") {
        return Err(invalid("empty separator"));
    }
    Ok((sep, max.or(named_max).and_then(|max| max.try_into().ok())))
}

fn split(text: &str, args: &[Value]) -> Result<Value, Error> {
    let (sep, max) = split_args(args)?;
    let max = max.unwrap_or(usize::MAX);
    let Some(sep) = sep else {
        let mut parts = Vec::new();
        let mut rest = lstrip(text, None);
        while !rest.is_empty() {
            let end = rest.find(is_space).filter(|_| parts.len() < max);
            let (part, behind) = rest.split_at(end.unwrap_or(rest.len()));
            parts.push(part);
            rest = lstrip(behind, None);
        }
        return Ok(parts.into_iter().collect());
    };
    Ok(text.splitn(max.saturating_add(1), &sep).collect())
}

fn rsplit(text: &str, args: &[Value]) -> Result<Value, Error> {
    match split_args(args)? {
        (Some(sep), Some(max)) => {
            let parts = text.rsplitn(max.saturating_add(1), &sep);
            let parts: Vec<&str> = parts.collect();
            Ok(parts.into_iter().rev().collect())
        }
        (None, Some(_)) => Err(invalid("rsplit at white space, so many times")),
        (_, None) => split(text, args),
    }
}

fn partition(text: &str, last: bool, args: &[Value]) -> Result<Value, Error> {
    let (sep,): (&str,) = from_args(args)?;
    if sep.is_empty() {
        return Err(invalid("empty separator"));
    }
    let found = if last {
        text.rsplit_once(sep)
    } else {
        text.split_once(sep)
    };
    let parts = match found {
        Some((before, behind)) => [before, sep, behind],
        None if last => ["", "", text],
        None => [text, "", ""],
    };
    Ok(Value::from(Tuple::from(parts.map(Value::from))))
}

/// The part of a text between two positions, which count characters and from the end when negative, and
/// where it begins; `None` when it begins behind the end.
fn between(text: &str, from: Option<i64>, to: Option<i64>) -> Option<(&str, usize)> {
    let length = i64::try_from(text.chars().count()).ok()?;
    let place = |at: i64| if at < 0 { (at + length).max(0) } else { at };
    let from = place(from.unwrap_or(0));
    let to = place(to.unwrap_or(length)).min(length);
    if from > to {
        return None;
    }
    let byte = |at: i64| {
        let at = usize::try_from(at).ok()?;
        let starts = text.char_indices().map(|(byte, _)| byte);
        starts.chain([text.len()]).nth(at)
    };
    Some((
        text.get(byte(from)?..byte(to)?)?,
        usize::try_from(from).ok()?,
    ))
}

/// `find`, `index` and `count` with their siblings.
fn search(text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let (wanted, from, to): (&str, Option<i64>, Option<i64>) = from_args(args)?;
    let part = between(text, from, to);
    if name == "count" {
        return Ok(part
            .map_or(0, |(part, _)| part.matches(wanted).count())
            .into());
    }
    let found = part.and_then(|(part, start)| {
        let at = if name.starts_with('r') {
            part.rfind(wanted)
        } else {
            part.find(wanted)
        };
        Some(start + part.get(..at?)?.chars().count())
    });
    match found {
        Some(at) => Ok(at.into()),
        None if name.ends_with("find") => Ok((-1).into()),
        None => Err(invalid("substring not found")),
    }
}

/// `startswith` and `endswith` of a part.
fn ends(text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let (wanted, from, to): (&str, Option<i64>, Option<i64>) = from_args(args)?;
    let part = between(text, from, to).map(|(part, _)| part);
    Ok(part
        .is_some_and(|part| match name {
            "startswith" => part.starts_with(wanted),
            _ => part.ends_with(wanted),
        })
        .into())
}

/// Longest text that padding makes: templates draw lines with it.
const MAX_WIDTH: usize = 4096;

fn padded(text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let (width, fill): (i64, Option<char>) = from_args(args)?;
    let width = usize::try_from(width).unwrap_or(0);
    if width > MAX_WIDTH {
        return Err(invalid("too wide"));
    }
    let length = text.chars().count();
    let missing = width.saturating_sub(length);
    let fill = |n: usize| String::from(fill.unwrap_or(' ')).repeat(n);
    Ok(Value::from(match name {
        "ljust" => text.to_owned() + &fill(missing),
        "rjust" => fill(missing) + text,
        "center" => {
            // CPython puts the odd one to the left where the width is odd.
            let left = missing / 2 + (missing & width & 1);
            fill(left) + text + &fill(missing - left)
        }
        _ => {
            let (sign, digits) = text.split_at(usize::from(text.starts_with(['+', '-'])));
            format!("{sign}{}{digits}", "0".repeat(missing))
        }
    }))
}
