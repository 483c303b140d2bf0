//! Chat templates as Hugging Face runs them: Jinja with `trim_blocks`, `lstrip_blocks`, loop controls,
//! Python's methods, `raise_exception`, `strftime_now` and a `tojson` of its own.
//!
//! Upstream: `transformers/utils/chat_template_utils.py`. A template and what it is fed come from
//! outside, so fuel, depth and output are bounded.

use std::io;
use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::ValueKind;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value, escape_formatter};
use serde_json::Value as Json;

use super::messages::{Wants, field, replace};
use super::special::SpecialTokens;
use super::tokenizer::{LoadError, MAX_CONFIG_BYTES, read};
use super::{content_format, filters, methods, python, repr};

/// Steps of one rendering, where 64 bytes of text count as one: 2,000 messages take about 100,000.
pub const FUEL: u64 = 4_000_000;
/// Largest rendered prompt: four times a body of 4 MiB.
pub const MAX_RENDERED_BYTES: usize = 16 << 20;
/// Nested blocks, macros and calls.
pub const MAX_RECURSION: usize = 200;

/// Put behind a message that is to be continued, to find its end in the rendered text.
const CONTINUE_TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";
const NAME: &str = "chat";

/// Why a chat has no prompt.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RenderError {
    /// The template failed or refused (`raise_exception`).
    #[error("chat template: {0}")]
    Template(String),
    /// The rendered prompt is larger than [`MAX_RENDERED_BYTES`].
    #[error("rendered chat is larger than {MAX_RENDERED_BYTES} bytes")]
    TooLarge,
    /// The last message cannot be continued.
    #[error("final message cannot be continued")]
    Continue,
}

/// What a template is given.
#[derive(Debug, Clone, Default)]
pub struct Chat {
    /// From [`super::messages::conversation`].
    pub messages: Vec<Value>,
    /// From [`super::messages::tools`].
    pub tools: Option<Value>,
    /// As the client sent them.
    pub documents: Option<Value>,
    /// Further variables, later ones win.
    pub variables: Vec<(String, Value)>,
    /// Ask the template to open the assistant's turn.
    pub add_generation_prompt: bool,
    /// Leave the last message open.
    pub continue_final_message: bool,
}

/// One compiled template.
pub struct Template {
    env: Environment<'static>,
    wants: Wants,
    reads_content: bool,
    system_first: bool,
}

impl std::fmt::Debug for Template {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Template")
            .field("wants", &self.wants)
            .finish_non_exhaustive()
    }
}

impl Template {
    /// Compiles `source`.
    pub fn compile(source: &str) -> Result<Self, RenderError> {
        let mut env = environment().map_err(|e| failed(&e))?;
        // Jinja's lexer reads every line end as a line feed.
        let source = &source.replace("\r\n", "\n").replace('\r', "\n");
        let runnable = without_generation_tags(source);
        // Of these tags the engine's test of a template knows nothing, and fails.
        let system_first = runnable != *source;
        env.add_template_owned(NAME, runnable)
            .map_err(|e| failed(&e))?;
        let system_first = system_first || refuses_inner_system(env.clone());
        Ok(Self {
            env,
            wants: Wants {
                format: content_format::detect(source),
                developer: source.contains("\"developer\"") || source.contains("'developer'"),
            },
            reads_content: source.contains("content"),
            system_first,
        })
    }

    /// How this template wants messages.
    pub fn wants(&self) -> Wants {
        self.wants
    }

    /// True when system messages between others have to go to the front.
    pub fn system_first(&self) -> bool {
        self.system_first
    }

    /// The prompt of `chat`. Cost: about 1 ms per 100 KB.
    pub fn render(&self, chat: &Chat) -> Result<String, RenderError> {
        if !chat.continue_final_message {
            return self.run(chat, &chat.messages);
        }
        if !self.reads_content {
            return Err(RenderError::Continue);
        }
        let mut messages = chat.messages.clone();
        let text = mark_final(&mut messages).ok_or(RenderError::Continue)?;
        let rendered = self.run(chat, &messages)?;
        cut_at_tag(&rendered, &text).ok_or(RenderError::Continue)
    }

    fn run(&self, chat: &Chat, messages: &[Value]) -> Result<String, RenderError> {
        let or_none = |value: &Option<Value>| value.clone().unwrap_or(Value::from(()));
        let fixed = [
            ("messages".to_owned(), Value::from(messages.to_vec())),
            ("tools".to_owned(), or_none(&chat.tools)),
            ("documents".to_owned(), or_none(&chat.documents)),
            (
                "add_generation_prompt".to_owned(),
                Value::from(chat.add_generation_prompt),
            ),
        ];
        let context = Value::from_pairs(chat.variables.iter().cloned().chain(fixed));
        let template = self.env.get_template(NAME).map_err(|e| failed(&e))?;
        let mut out = Bounded::with_room(messages);
        let result = template.render_captured_to(context, &mut out).map(|_| ());
        if out.full {
            return Err(RenderError::TooLarge);
        }
        result.map_err(|e| failed(&e))?;
        String::from_utf8(out.bytes).map_err(|e| RenderError::Template(e.to_string()))
    }
}

/// The templates of a model: one for all, or one more for requests with tools.
#[derive(Debug)]
pub struct Templates {
    default: Template,
    tool_use: Option<Template>,
    /// `bos_token` and others, for all templates.
    special: Vec<(String, Value)>,
}

impl Templates {
    /// Reads the templates of a model's directory: `chat_template.jinja`, else the entry in `config`
    /// (its `tokenizer_config.json`), else `chat_template.json`. `None` when there is none.
    pub fn load(directory: &Path, config: &Json) -> Result<Option<Self>, LoadError> {
        const FILE: &str = "chat_template.jinja";
        const PROCESSOR: &str = "chat_template.json";
        let special = special_tokens(directory, config)?;
        if directory.join(FILE).exists() {
            let bytes = read(directory, FILE, MAX_CONFIG_BYTES)?;
            let source = String::from_utf8(bytes).map_err(|e| LoadError::invalid(FILE, e))?;
            return Self::new(&source, None, special).map(Some);
        }
        let entry = &config["chat_template"];
        if !entry.is_null() {
            return Self::entry(entry, special);
        }
        if directory.join(PROCESSOR).exists() {
            let bytes = read(directory, PROCESSOR, MAX_CONFIG_BYTES)?;
            let json: Json =
                serde_json::from_slice(&bytes).map_err(|e| LoadError::invalid(PROCESSOR, e))?;
            return Self::entry(&json["chat_template"], special);
        }
        Ok(None)
    }

    /// One template for everything, for example from a file given by name.
    pub fn new(
        default: &str,
        tool_use: Option<&str>,
        special: Vec<(String, Value)>,
    ) -> Result<Self, LoadError> {
        let compile = |source: &str| {
            Template::compile(source).map_err(|e| LoadError::invalid("chat template", e))
        };
        Ok(Self {
            default: compile(default)?,
            tool_use: tool_use.map(compile).transpose()?,
            special,
        })
    }

    fn entry(entry: &Json, special: Vec<(String, Value)>) -> Result<Option<Self>, LoadError> {
        if let Some(source) = entry.as_str() {
            return Self::new(source, None, special).map(Some);
        }
        let named = |name: &str| {
            entry
                .as_array()?
                .iter()
                .find(|one| one["name"] == name)
                .and_then(|one| one["template"].as_str())
        };
        match named("default") {
            Some(default) => Self::new(default, named("tool_use"), special).map(Some),
            None => Err(LoadError::invalid(
                "chat template",
                "no template named default",
            )),
        }
    }

    /// The template for a request.
    pub fn choose(&self, tools: bool) -> &Template {
        match &self.tool_use {
            Some(template) if tools => template,
            _ => &self.default,
        }
    }

    /// True when one of them wants system messages in front.
    pub fn system_first(&self) -> bool {
        let tool_use = self.tool_use.as_ref();
        self.default.system_first || tool_use.is_some_and(Template::system_first)
    }

    /// Special tokens by name, the variables every rendering starts with.
    pub fn special(&self) -> &[(String, Value)] {
        &self.special
    }
}

/// `bos_token`, `eos_token` and the like, as templates know them.
pub(super) fn special_tokens(
    directory: &Path,
    config: &Json,
) -> Result<Vec<(String, Value)>, LoadError> {
    let tokens = SpecialTokens::read(directory, config)?;
    let named = tokens.named();
    Ok(named
        .map(|(name, text)| (name.to_owned(), text.into()))
        .collect())
}

/// As the engine finds out: a conversation with a system message in the middle, in an environment
/// that has Jinja's own functions only.
fn refuses_inner_system(mut env: Environment<'static>) -> bool {
    env.remove_global("strftime_now");
    let turn = |role: &'static str| {
        let pairs = [("role", role), ("content", "t")];
        Value::from_pairs(pairs.map(|(name, value)| (Value::from(name), Value::from(value))))
    };
    let messages: Vec<Value> = ["system", "user", "system", "user"].map(turn).into();
    let context = Value::from_pairs([
        ("messages", Value::from(messages)),
        ("add_generation_prompt", Value::from(false)),
    ]);
    let template = env.get_template(NAME);
    template.and_then(|t| t.render(context)).is_err()
}

/// A writer that refuses more than [`MAX_RENDERED_BYTES`].
#[derive(Debug)]
struct Bounded {
    bytes: Vec<u8>,
    full: bool,
}

impl Bounded {
    /// With room for the messages' texts, so that a long prompt is not moved while it grows.
    fn with_room(messages: &[Value]) -> Self {
        let texts = messages.iter().filter_map(|message| {
            let content = message.get_attr("content").ok()?;
            content.as_str().map(str::len)
        });
        let room = texts.sum::<usize>().min(MAX_RENDERED_BYTES);
        Self {
            bytes: Vec::with_capacity(room + room / 8),
            full: false,
        }
    }
}

impl io::Write for Bounded {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + piece.len() > MAX_RENDERED_BYTES {
            self.full = true;
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(piece);
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn failed(error: &Error) -> RenderError {
    RenderError::Template(error.to_string())
}

fn environment() -> Result<Environment<'static>, Error> {
    let mut env = Environment::new();
    let mut syntax = SyntaxConfig::builder();
    syntax.trim_blocks(true).lstrip_blocks(true);
    env.set_syntax(syntax.build()?);
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_fuel(Some(FUEL));
    env.set_recursion_limit(MAX_RECURSION);
    env.set_unknown_method_callback(methods::call);
    env.set_formatter(|out, state, value| match value.kind() {
        ValueKind::Number | ValueKind::Seq | ValueKind::Map => {
            Ok(out.write_str(&repr::text(state, value)?)?)
        }
        _ => escape_formatter(out, state, value),
    });
    filters::add(&mut env);
    env.add_function("raise_exception", |text: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, text))
    });
    env.add_function("strftime_now", |format: &str| python::strftime_now(format));
    Ok(env)
}

/// `{% generation %}` marks training text and changes nothing else.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest.get(start..).and_then(|tag| tag.find("%}")) else {
            break;
        };
        let (before, tag) = rest.split_at(start);
        let (tag, behind) = tag.split_at(length + 2);
        out.push_str(before);
        let inner = tag.trim_start_matches("{%").trim_end_matches("%}");
        match inner.trim_matches(['-', '+']).trim() {
            "generation" => out.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", "endif")),
            _ => out.push_str(tag),
        }
        rest = behind;
    }
    out + rest
}

/// Puts the tag behind the last text of the last message and returns that text.
fn mark_final(messages: &mut [Value]) -> Option<String> {
    let last = messages.last_mut()?;
    let content = field(last, "content")?;
    let (text, marked) = if let Some(text) = content.as_str() {
        (
            text.to_owned(),
            Value::from(format!("{text}{CONTINUE_TAG}")),
        )
    } else {
        let mut parts: Vec<Value> = content.try_iter().ok()?.collect();
        let part = parts
            .iter_mut()
            .rev()
            .find(|part| field(part, "text").is_some())?;
        let text = field(part, "text")?.as_str()?.to_owned();
        *part = replace(part, "text", Value::from(format!("{text}{CONTINUE_TAG}"))).ok()?;
        (text, Value::from(parts))
    };
    *last = replace(last, "content", marked).ok()?;
    Some(text)
}

fn cut_at_tag(rendered: &str, text: &str) -> Option<String> {
    let tag = CONTINUE_TAG.trim_end();
    if !rendered.contains(text.trim()) {
        return None;
    }
    let at = rendered.rfind(tag)?;
    let (before, behind) = rendered.split_at(at);
    // Where the template trimmed the message, the space behind the tag is gone and so is ours.
    let kept = if behind.starts_with(CONTINUE_TAG) {
        before
    } else {
        before.trim_end()
    };
    Some(kept.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Value {
        serde_json::from_str(json).unwrap()
    }

    fn render(source: &str, variables: &[(&str, Value)]) -> Result<String, RenderError> {
        let chat = Chat {
            variables: variables
                .iter()
                .map(|(name, value)| ((*name).to_owned(), value.clone()))
                .collect(),
            ..Chat::default()
        };
        Template::compile(source)?.render(&chat)
    }

    /// `jinja2.json` holds templates and what jinja2 3.1.6 makes of them in the environment that
    /// transformers sets up, with these two variables.
    #[test]
    fn templates_give_what_jinja2_gives() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tokenizer/jinja2.json");
        let cases: Vec<(String, String)> =
            serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        assert!(cases.len() > 40);
        let x = parse(r#"{"z":"é<","a":1,"b":{"c":[1.0,true,null],"d":{},"e":[]},"f":1.5}"#);
        let s = parse(r#"{"items":{"type":"string"},"type":"array"}"#);
        let mut wrong = Vec::new();
        for (source, expected) in cases {
            let got = render(&source, &[("x", x.clone()), ("s", s.clone())]);
            if got.as_ref() != Ok(&expected) {
                wrong.push(format!("{source:?}\n  want {expected:?}\n  got  {got:?}"));
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }

    #[test]
    fn floats_are_printed_as_python_does() {
        assert_eq!(
            render("{{ 1e20 }} {{ 0.5 }} {{ 3.0 }}", &[]).unwrap(),
            "1e+20 0.5 3.0"
        );
    }

    /// Python has them, we do not: the request goes on without tokens instead of with wrong ones.
    #[test]
    fn what_is_not_known_is_an_error() {
        for source in [
            "{{ '%s' % 'a' }}",
            "{{ 'x'.casefold() }}",
            "{{ '½'.isdigit() }}",
            "{{ x | wordwrap }}",
        ] {
            assert!(render(source, &[]).is_err(), "{source}");
        }
    }

    #[test]
    fn raise_exception_is_an_error_with_its_text() {
        let error = render("{{ raise_exception('roles must alternate') }}", &[]).unwrap_err();
        assert!(
            error.to_string().contains("roles must alternate"),
            "{error}"
        );
    }

    #[test]
    fn line_ends_of_a_template_are_line_feeds() {
        // jinja2 3.1.6 gives "a\nb\nc\n".
        let text = render("a\r\n{% if true %}\r\nb\rc{{ '\r\n' }}{% endif %}", &[]).unwrap();
        assert_eq!(text, "a\nb\nc\n");
    }

    #[test]
    fn generation_tags_change_nothing() {
        let text = render("a {%- generation -%} b {%- endgeneration %} c", &[]).unwrap();
        assert_eq!(text, "ab c");
    }

    #[test]
    fn endless_work_runs_out_of_fuel() {
        let loops = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
        let error = render(loops, &[]).unwrap_err();
        assert!(error.to_string().contains("fuel"), "{error}");
    }

    #[test]
    fn output_is_bounded() {
        // 17 * 1 MiB is above 16 MiB.
        let big = Value::from("x".repeat(1 << 20));
        let error = render(
            "{% for i in range(17) %}{{ big }}{% endfor %}",
            &[("big", big)],
        );
        assert_eq!(error.unwrap_err(), RenderError::TooLarge);
    }

    #[test]
    fn recursion_is_bounded() {
        assert!(render("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", &[]).is_err());
    }

    fn continued(source: &str, content: &str) -> Result<String, RenderError> {
        let message = format!(r#"{{"role":"assistant","content":{content}}}"#);
        let chat = Chat {
            messages: vec![parse(&message)],
            continue_final_message: true,
            ..Chat::default()
        };
        Template::compile(source)?.render(&chat)
    }

    #[test]
    fn a_continued_message_stays_open() {
        let plain = "{% for m in messages %}<{{ m.content }}>{% endfor %}";
        assert_eq!(continued(plain, "\"The tide \"").unwrap(), "<The tide ");
        // The template trims, so the message ends without its space.
        let trimming = "{% for m in messages %}<{{ m.content | trim }}>{% endfor %}";
        assert_eq!(continued(trimming, "\"The tide \"").unwrap(), "<The tide");
        let parts =
            "{% for m in messages %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endfor %}";
        let content = r#"[{"type":"text","text":"a"},{"type":"text","text":"b"}]"#;
        assert_eq!(continued(parts, content).unwrap(), "[a][b");
        let silent = "{% for m in messages %}{{ m.role }}{% endfor %}";
        assert_eq!(continued(silent, "\"x\""), Err(RenderError::Continue));
    }

    #[test]
    fn tools_choose_their_own_template() {
        let entry = serde_json::json!([
            {"name": "default", "template": "D"},
            {"name": "tool_use", "template": "T{{ bos_token }}"},
        ]);
        let special = vec![("bos_token".to_owned(), Value::from("<s>"))];
        let templates = Templates::entry(&entry, special.clone()).unwrap().unwrap();
        let chat = Chat {
            variables: special,
            ..Chat::default()
        };
        assert_eq!(templates.choose(false).render(&chat).unwrap(), "D");
        assert_eq!(templates.choose(true).render(&chat).unwrap(), "T<s>");
    }

    #[test]
    fn templates_that_refuse_a_system_message_in_the_middle_are_known() {
        let first = |source: &str| Template::compile(source).unwrap().system_first();
        let body = "{% for m in messages %}{{ m.role }}{% endfor %}";
        assert!(!first(body));
        let guard = "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('x') }}{% endif %}{% endfor %}";
        assert!(first(guard));
        assert!(first("{{ strftime_now('%Y') }}"));
        assert!(!first(
            "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}"
        ));
        assert!(first(&format!(
            "{{% generation %}}x{{% endgeneration %}}{body}"
        )));
    }

    #[test]
    fn special_tokens_are_strings_or_objects() {
        let config = serde_json::json!({
            "bos_token": null, "eos_token": {"content": "</s>"}, "pad_token": "<p>",
        });
        let tokens = special_tokens(Path::new("no such directory"), &config).unwrap();
        let names: Vec<(&str, &str)> = tokens
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str().unwrap()))
            .collect();
        assert_eq!(names, [("eos_token", "</s>"), ("pad_token", "<p>")]);
    }
}
