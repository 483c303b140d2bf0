//! Filters and tests as jinja2 has them, where minijinja's give something else or refuse.

use minijinja::value::{Kwargs, Rest, ValueKind, ValueOrKwargs, from_args};
use minijinja::{Environment, Error, ErrorKind, State, Value, filters};

use super::{methods, python, repr};

type Args = Rest<ValueOrKwargs>;

/// Puts them in the place of minijinja's.
pub(super) fn add(env: &mut Environment<'_>) {
    env.add_filter("tojson", tojson);
    env.add_filter("indent", indent);
    env.add_filter("trim", trim);
    env.add_filter("default", default);
    env.add_filter("d", default);
    env.add_filter("int", int);
    env.add_filter("float", float);
    env.add_filter("sort", sort);
    env.add_filter("dictsort", dictsort);
    env.add_filter("attr", attr);
    env.add_filter("string", repr::text);
    env.add_test("sequence", |value: &Value| {
        let kinds = [ValueKind::Seq, ValueKind::Map, ValueKind::String];
        kinds.contains(&value.kind())
    });
    env.add_test("iterable", |value: &Value| {
        !value.is_none() && value.try_iter().is_ok()
    });
}

/// Arguments by name, those given by place under `names`.
fn named(args: Args, names: &[&str]) -> Result<Kwargs, Error> {
    let args = args.into_values();
    let (placed, named): (&[Value], Kwargs) = from_args(&args)?;
    if placed.len() > names.len() {
        return Err(Error::from(ErrorKind::TooManyArguments));
    }
    let mut all: Vec<(String, Value)> = Vec::new();
    for name in named.args() {
        all.push((name.to_owned(), named.get(name)?));
    }
    let placed = names.iter().zip(placed);
    all.extend(placed.map(|(name, value)| ((*name).to_owned(), value.clone())));
    Ok(all.into_iter().collect())
}

fn tojson(state: &State<'_, '_>, value: &Value, args: Args) -> Result<String, Error> {
    let names = ["ensure_ascii", "indent", "separators", "sort_keys"];
    python::tojson(state, value, &named(args, &names)?)
}

/// minijinja drops the line feed at the end, and knows fewer line ends.
fn indent(state: &State<'_, '_>, value: &Value, args: Args) -> Result<String, Error> {
    let options = named(args, &["width", "first", "blank"])?;
    let first = given(&options, "first", false)?.is_true();
    let blank = given(&options, "blank", false)?.is_true();
    let width: Option<Value> = options.get("width")?;
    options.assert_all_used()?;
    let by = match width.as_ref().and_then(Value::as_str) {
        Some(text) => text.to_owned(),
        None => " ".repeat(
            width
                .map_or(Ok(4), usize::try_from)?
                .min(python::MAX_INDENT),
        ),
    };
    let text = repr::text(state, value)? + "\n";
    let mut out = String::with_capacity(text.len());
    for (number, line) in methods::lines(&text, false).into_iter().enumerate() {
        if number > 0 {
            out.push('\n');
        }
        if if number == 0 {
            first
        } else {
            blank || !line.is_empty()
        } {
            out.push_str(&by);
        }
        out.push_str(line);
        // Many short lines cost what they become.
        state.consume_fuel(by.len() as u64 / 64)?;
    }
    Ok(out)
}

fn trim(state: &State<'_, '_>, value: &Value, args: Args) -> Result<Value, Error> {
    let options = named(args, &["chars"])?;
    let chars: Option<String> = options.get("chars")?;
    options.assert_all_used()?;
    if let Some(text) = value.as_str() {
        let trimmed = methods::strip(text, chars.as_deref());
        let same = trimmed.len() == text.len();
        return Ok(if same { value.clone() } else { trimmed.into() });
    }
    let text = repr::text(state, value)?;
    Ok(methods::strip(&text, chars.as_deref()).into())
}

fn default(value: &Value, args: Args) -> Result<Value, Error> {
    let options = named(args, &["default_value", "boolean"])?;
    let other = given(&options, "default_value", "")?;
    let boolean = given(&options, "boolean", false)?.is_true();
    options.assert_all_used()?;
    let absent = value.is_undefined() || (boolean && !value.is_true());
    Ok(if absent { other } else { value.clone() })
}

/// What cannot be read is 0, or what is asked for instead.
fn int(state: &State<'_, '_>, value: &Value, args: Args) -> Result<Value, Error> {
    let options = named(args, &["default", "base"])?;
    let other = given(&options, "default", 0)?;
    let base = options.get("base")?;
    options.assert_all_used()?;
    let read = filters::int(state, &stripped(value), None, base, no_options());
    Ok(read.ok().filter(|_| !value.is_none()).unwrap_or(other))
}

fn float(state: &State<'_, '_>, value: &Value, args: Args) -> Result<Value, Error> {
    let options = named(args, &["default"])?;
    let other = given(&options, "default", 0.0)?;
    options.assert_all_used()?;
    let read = filters::float(state, &stripped(value), None, no_options());
    Ok(read.ok().filter(|_| !value.is_none()).unwrap_or(other))
}

/// An argument, also one that is `none`.
fn given(options: &Kwargs, name: &str, otherwise: impl Into<Value>) -> Result<Value, Error> {
    if options.has(name) {
        options.get(name)
    } else {
        Ok(otherwise.into())
    }
}

fn no_options() -> Kwargs {
    std::iter::empty::<(String, Value)>().collect()
}

/// A text as Python's numbers are read from it.
fn stripped(value: &Value) -> Value {
    let text = value.as_str().map(|text| methods::strip(text, None));
    text.map_or_else(|| value.clone(), Value::from)
}

fn sort(state: &State<'_, '_>, value: Value, args: Args) -> Result<Value, Error> {
    filters::sort(
        state,
        value,
        named(args, &["reverse", "case_sensitive", "attribute"])?,
    )
}

fn dictsort(value: &Value, args: Args) -> Result<Value, Error> {
    filters::dictsort(value, named(args, &["case_sensitive", "by", "reverse"])?)
}

/// Attributes only, and what comes from JSON has none.
fn attr(value: &Value, name: &Value) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::Plain => filters::attr(value, name),
        _ => Ok(Value::UNDEFINED),
    }
}
