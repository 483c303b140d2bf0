//! `request-attribute-reporter`: a number computed from usage, for the proxy's dynamic metadata.

use std::cell::RefCell;
use std::collections::HashMap;

use cel::common::ast::{EntryExpr, Expr};
use cel::{Context, IdedExpr, Program, Value};
use serde::Deserialize;

use super::usage::Usage;
use super::{MetadataNumber, ResponseCompleteHook};
use crate::plugin::{Build, Maturity, ParamDoc, ParamError, Plugin, PluginError};

/// Namespace of numbers that name none.
const DEFAULT_NAMESPACE: &str = "envoy.lb";
/// The one variable of expressions.
const USAGE: &str = "usage";
/// Longest expression. With [`MAX_DEPTH`] and without loops this bounds an evaluation to some hundred
/// steps.
const MAX_EXPRESSION_BYTES: usize = 512;
/// Deepest nesting of an expression, so that evaluating it needs little stack.
const MAX_DEPTH: usize = 32;
/// The parser recurses deeply for every level before it notices that there are too many: about 64 KiB
/// each in a debug build, at most one level a byte.
const PARSER_STACK_BYTES: usize = 64 << 20;
/// What an expression may call besides operators.
const FUNCTIONS: [&str; 5] = ["double", "int", "size", "string", "uint"];

/// Reports one number at the end of a response.
///
/// The value of a CEL expression over `usage` (`prompt_tokens`, `completion_tokens`, `total_tokens`,
/// `prompt_tokens_details.cached_tokens`; doubles, as in JSON), truncated to an integer, if the
/// condition holds. 0, an error, or a value that is no number: nothing is reported. Usage that could
/// not be read counts as 0, and details are there only when the engine gave them.
#[derive(Debug)]
pub struct RequestAttributeReporter {
    namespace: String,
    name: String,
    expression: Formula,
    condition: Option<Formula>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Settings {
    attributes: Vec<Attribute>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Attribute {
    key: Key,
    expression: String,
    condition: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Key {
    namespace: String,
    name: String,
}

impl Plugin for RequestAttributeReporter {
    const TYPE: &'static str = "request-attribute-reporter";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[ParamDoc {
        name: "attributes",
        kind: "list",
        default: "",
        help: "Exactly one {key {namespace envoy.lb, name}, expression, condition}: CEL over usage; name and expression are required.",
    }];
    const ABOUT: &'static str =
        "Reports a number computed from usage in the response's dynamic metadata.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<Self, _>()?;
        let refuse = |text: String| Err(PluginError::Parameter(ParamError(text)));
        let [attribute] = settings.attributes.as_slice() else {
            let given = settings.attributes.len();
            return refuse(format!("attributes: takes exactly one entry, got {given}"));
        };
        if attribute.key.name.is_empty() {
            return refuse("attributes[0].key.name: is required".to_owned());
        }
        if attribute.expression.trim().is_empty() {
            return refuse("attributes[0].expression: is required".to_owned());
        }
        let condition = Some(&attribute.condition).filter(|text| !text.trim().is_empty());
        let namespace = &attribute.key.namespace;
        Ok(Self {
            namespace: if namespace.is_empty() {
                DEFAULT_NAMESPACE.to_owned()
            } else {
                namespace.clone()
            },
            name: attribute.key.name.clone(),
            expression: Formula::compile("expression", &attribute.expression)?,
            condition: condition
                .map(|text| Formula::compile("condition", text))
                .transpose()?,
        })
    }
}

impl ResponseCompleteHook for RequestAttributeReporter {
    fn on_complete(&self, usage: Option<&Usage>, metadata: &mut Vec<MetadataNumber>) {
        let usage = usage.copied().unwrap_or_default();
        CONTEXT.with_borrow_mut(|context| {
            context.add_variable_from_value(USAGE, variable(&usage));
            let condition = self.condition.as_ref();
            if condition.is_some_and(|c| c.value(context) != Some(Value::Bool(true))) {
                return;
            }
            let number = self.expression.value(context).and_then(|v| number(&v));
            if let Some(value) = number.map(f64::trunc).filter(|n| *n != 0.0) {
                metadata.push(MetadataNumber {
                    namespace: self.namespace.clone(),
                    name: self.name.clone(),
                    value,
                });
            }
        });
    }
}

thread_local! {
    /// Standard functions, and the usage at hand. Costly to make, so each thread keeps its own.
    static CONTEXT: RefCell<Context<'static, 'static>> = RefCell::default();
}

/// A checked expression.
#[derive(Debug)]
struct Formula(Program);

impl Formula {
    /// Compiles `text` if it is short, shallow, free of loops, and knows what it speaks of.
    fn compile(field: &'static str, text: &str) -> Result<Self, ParamError> {
        let refuse = |reason: &str| ParamError(format!("attributes[0].{field}: {reason}"));
        if text.len() > MAX_EXPRESSION_BYTES {
            let reason = format!("is longer than {MAX_EXPRESSION_BYTES} bytes");
            return Err(refuse(&reason));
        }
        let source = text.to_owned();
        let compile = move || {
            let program = Program::compile(&source).map_err(|e| e.to_string())?;
            check(&program)?;
            Ok(program)
        };
        // On a thread of its own for its stack, which also keeps a panic of the parser from us.
        let parser = std::thread::Builder::new()
            .name(format!("cel {field}"))
            .stack_size(PARSER_STACK_BYTES)
            .spawn(compile)
            .map_err(|e| refuse(&format!("no thread to parse it: {e}")))?;
        let parsed: Result<Program, String> = parser
            .join()
            .unwrap_or_else(|_| Err("cannot be parsed".to_owned()));
        parsed.map(Self).map_err(|reason| refuse(&reason))
    }

    /// The value; an error is logged, because it may come with every response.
    fn value(&self, context: &Context<'_, '_>) -> Option<Value> {
        let result = self.0.execute(context);
        result
            .inspect_err(|error| tracing::debug!(%error, "usage expression failed"))
            .ok()
    }
}

fn check(program: &Program) -> Result<(), String> {
    check_shape(program.expression(), MAX_DEPTH)?;
    let references = program.references();
    let variables = references.variables();
    if let Some(name) = variables.iter().find(|name| **name != USAGE) {
        return Err(format!("there is no variable {name:?}, only {USAGE:?}"));
    }
    let functions = references.functions();
    let known = |name: &&str| name.contains(['_', '@']) || FUNCTIONS.contains(name);
    match functions.iter().find(|name| !known(name)) {
        Some(name) => Err(format!(
            "there is no function {name:?}, only {}",
            FUNCTIONS.join(", ")
        )),
        None => Ok(()),
    }
}

/// Refuses loops, messages, and nesting past `levels`.
fn check_shape(expression: &IdedExpr, levels: usize) -> Result<(), String> {
    let Some(levels) = levels.checked_sub(1) else {
        return Err(format!("is nested more than {MAX_DEPTH} levels deep"));
    };
    let check = |e: &IdedExpr| check_shape(e, levels);
    match &expression.expr {
        Expr::Unspecified | Expr::Ident(_) | Expr::Literal(_) => Ok(()),
        Expr::Comprehension(_) => Err("loops over lists and maps are not supported".to_owned()),
        Expr::Struct(_) => Err("messages are not supported".to_owned()),
        Expr::Select(select) => check(&select.operand),
        Expr::List(list) => list.elements.iter().try_for_each(check),
        Expr::Call(call) => {
            let target = call.target.as_deref();
            target.into_iter().chain(&call.args).try_for_each(check)
        }
        Expr::Map(map) => map.entries.iter().try_for_each(|entry| match &entry.expr {
            EntryExpr::StructField(field) => check(&field.value),
            EntryExpr::MapEntry(entry) => {
                check(&entry.key)?;
                check(&entry.value)
            }
        }),
    }
}

/// `usage` as expressions see it.
fn variable(usage: &Usage) -> Value {
    let count = |tokens: u64| Value::Float(tokens as f64);
    let mut fields = HashMap::from([
        ("prompt_tokens", count(usage.prompt_tokens)),
        ("completion_tokens", count(usage.completion_tokens)),
        ("total_tokens", count(usage.total_tokens)),
    ]);
    if let Some(cached) = usage.cached_tokens {
        let details = HashMap::from([("cached_tokens", count(cached))]);
        fields.insert("prompt_tokens_details", details.into());
    }
    fields.into()
}

fn number(value: &Value) -> Option<f64> {
    let number = match value {
        Value::Int(n) => *n as f64,
        Value::UInt(n) => *n as f64,
        Value::Float(n) => *n,
        _ => return None,
    };
    number.is_finite().then_some(number)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::plugin::{DataKeys, Parameters};

    fn build(parameters: serde_json::Value) -> Result<RequestAttributeReporter, String> {
        let parameters = Parameters(Some(parameters));
        let mut keys = DataKeys::default();
        let built = RequestAttributeReporter::build(&mut Build {
            name: "r",
            parameters: &parameters,
            keys: &mut keys,
        });
        built.map_err(|e| e.to_string())
    }

    fn reporter(expression: &str, condition: &str) -> Result<RequestAttributeReporter, String> {
        build(serde_json::json!({"attributes": [
            {"key": {"name": "cost"}, "expression": expression, "condition": condition}
        ]}))
    }

    const USAGE: Usage = Usage {
        prompt_tokens: 100,
        completion_tokens: 20,
        total_tokens: 120,
        cached_tokens: Some(64),
        has_details: true,
    };

    fn reported(reporter: &RequestAttributeReporter, usage: Option<&Usage>) -> Option<f64> {
        let mut metadata = Vec::new();
        reporter.on_complete(usage, &mut metadata);
        assert!(metadata.len() <= 1);
        metadata.first().map(|number| number.value)
    }

    #[test]
    fn the_expression_is_reported_when_the_condition_holds() {
        for (expression, condition, wanted) in [
            (
                "usage.completion_tokens",
                "has(usage.completion_tokens)",
                Some(20.0),
            ),
            (
                "usage.prompt_tokens + usage.completion_tokens",
                "",
                Some(120.0),
            ),
            (
                // 100 - 64 + 20 * 4.
                "usage.prompt_tokens - usage.prompt_tokens_details.cached_tokens + usage.completion_tokens * 4.0",
                "",
                Some(116.0),
            ),
            ("usage.total_tokens / 7.0", "", Some(17.0)),
            ("0.0 - usage.total_tokens / 7.0", "", Some(-17.0)),
            ("int(usage.total_tokens) * 2", "", Some(240.0)),
            ("uint(usage.total_tokens)", "", Some(120.0)),
            ("usage.total_tokens > 100 ? 1 : 2", "", Some(1.0)),
            (
                "usage['total_tokens']",
                "usage.total_tokens == 120.0",
                Some(120.0),
            ),
            ("usage.total_tokens", "usage.total_tokens < 100", None),
            ("usage.total_tokens", "usage.total_tokens", None),
            ("usage.total_tokens", "usage.nothing > 1", None),
            ("usage.nothing", "", None),
            ("usage.total_tokens / 0.0", "", None),
            ("1 / 0", "", None),
            ("0.9", "", None),
            ("'120'", "", None),
            ("usage", "", None),
        ] {
            let reporter = reporter(expression, condition).unwrap();
            let got = reported(&reporter, Some(&USAGE));
            assert_eq!(got, wanted, "{expression} if {condition}");
        }
    }

    #[test]
    fn unread_usage_is_zero_and_details_may_be_missing() {
        let total = reporter("usage.total_tokens", "").unwrap();
        assert_eq!(reported(&total, None), None);
        let one_more = reporter("usage.total_tokens + 1.0", "").unwrap();
        assert_eq!(reported(&one_more, None), Some(1.0));
        let plain = Usage {
            cached_tokens: None,
            has_details: false,
            ..USAGE
        };
        let cached = "usage.prompt_tokens_details.cached_tokens";
        let bare = reporter(cached, "").unwrap();
        assert_eq!(reported(&bare, Some(&plain)), None);
        assert_eq!(reported(&bare, Some(&USAGE)), Some(64.0));
        let guarded = reporter(
            &format!("has(usage.prompt_tokens_details) ? {cached} : -1.0"),
            "",
        );
        assert_eq!(reported(&guarded.unwrap(), Some(&plain)), Some(-1.0));
    }

    #[test]
    fn the_namespace_is_envoy_lb_unless_named() {
        for (key, wanted) in [
            (serde_json::json!({"name": "n"}), "envoy.lb"),
            (
                serde_json::json!({"name": "n", "namespace": "mine"}),
                "mine",
            ),
        ] {
            let reporter =
                build(serde_json::json!({"attributes": [{"key": key, "expression": "1"}]}));
            let mut metadata = Vec::new();
            reporter.unwrap().on_complete(None, &mut metadata);
            assert_eq!(metadata[0].namespace, wanted);
            assert_eq!((metadata[0].name.as_str(), metadata[0].value), ("n", 1.0));
        }
    }

    #[test]
    fn parameters_are_mandatory_and_checked() {
        let one = serde_json::json!({"key": {"name": "n"}, "expression": "1"});
        for (parameters, wanted) in [
            (
                serde_json::json!({}),
                "attributes: takes exactly one entry, got 0",
            ),
            (
                serde_json::json!({"attributes": [one, one]}),
                "attributes: takes exactly one entry, got 2",
            ),
            (
                serde_json::json!({"attributes": [{"expression": "1"}]}),
                "attributes[0].key.name: is required",
            ),
            (
                serde_json::json!({"attributes": [{"key": {"name": "n"}}]}),
                "attributes[0].expression: is required",
            ),
        ] {
            assert_eq!(build(parameters).unwrap_err(), wanted);
        }
    }

    #[test]
    fn hostile_expressions_are_refused_at_start() {
        let half = MAX_EXPRESSION_BYTES / 2;
        for (expression, wanted) in [
            ("1 +".to_owned(), "Syntax error"),
            (
                "1".repeat(MAX_EXPRESSION_BYTES + 1),
                "is longer than 512 bytes",
            ),
            ("(".repeat(2 * half), "attributes[0].expression"),
            ("[".repeat(2 * half), "attributes[0].expression"),
            ("{".repeat(2 * half), "attributes[0].expression"),
            ("\"".repeat(2 * half), "attributes[0].expression"),
            ("é".repeat(half), "Syntax error"),
            (format!("1{}", "+1".repeat(half - 1)), "nested more than 32"),
            (
                format!("usage{}", ".a".repeat(half - 3)),
                "nested more than 32",
            ),
            (
                "[1,2].map(x, [1,2].map(y, x))".to_owned(),
                "loops over lists",
            ),
            ("usage.all(x, true)".to_owned(), "loops over lists"),
            ("usages.total_tokens".to_owned(), "no variable \"usages\""),
            ("min(1, 2)".to_owned(), "no function \"min\""),
            ("'a'.matches('a')".to_owned(), "no function \"matches\""),
        ] {
            let text = reporter(&expression, "").unwrap_err();
            assert!(text.contains(wanted), "{expression}: {text}");
            let text = reporter("1", &expression).unwrap_err();
            assert!(text.contains("attributes[0].condition"), "{text}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn no_expression_panics(
            tokens in prop::collection::vec(
                prop::sample::select(vec![
                    "usage", ".", "total_tokens", "1", "2.5", "0u", "'s'", "+", "-", "*", "/", "%",
                    "(", ")", "[", "]", "{", "}", "?", ":", "==", "<", "&&", "||", "!", ",", "int",
                    "has", "in", "null", "true", "size", "9223372036854775807", " ",
                ]),
                1..24,
            )
        ) {
            if let Ok(reporter) = reporter(&tokens.concat(), "") {
                reported(&reporter, Some(&USAGE));
            }
        }
    }
}
