//! Chat messages and tools as vLLM hands them to a template.
//!
//! Upstream: `vllm/renderers/chat_utils/`. Content becomes a string or a list of text parts, whatever
//! the client sent; fields no template knows are dropped; arguments of tool calls become objects.

use minijinja::Value;
use minijinja::value::ValueKind;

use super::content_format::ContentFormat;

/// Messages of one request; a body may be megabytes of empty ones.
pub const MAX_MESSAGES: usize = 100_000;
/// Fields of a part that are its content; the others reach the template.
const PART_FIELDS: &[&str] = &[
    "type",
    "text",
    "image_url",
    "input_audio",
    "file",
    "refusal",
    "audio_url",
    "video_url",
    "image_embeds",
    "audio_embeds",
    "video_embeds",
    "image_pil",
    "uuid",
    "prompt_embeds",
    "data",
    "name",
    "tool_reference",
    "thinking",
    "closed",
];
/// A system text that starts so is cut in versions that differ among engines.
pub(super) const BILLING_HEADER: &str = "x-anthropic-billing-header";

/// Why a chat cannot be rendered here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// The engine refuses it too.
    #[error("{0}")]
    Invalid(&'static str),
    /// Only the engine knows how many tokens the media become.
    #[error("media in the prompt")]
    Media,
    /// Engines differ in it, or it is not known here.
    #[error("{0} is not rendered here")]
    Unsupported(&'static str),
}

/// Stands for what an engine puts in the place of media; a character that no client's text should have.
pub(super) const MARK: &str = "\u{f8ff}\u{e000}";

/// What becomes of media in a chat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Media {
    /// [`MessageError::Media`].
    Refuse,
    /// As an engine gives them to a template that wants parts: `{"type": "image"}`. In a string they
    /// begin the message, in words that only the engine's model knows: [`Self::Mark`].
    AsParts,
    /// A text that nothing else has, `MARK`.
    Mark,
}

/// What of a template decides how it is given messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wants {
    /// Form of content.
    pub format: ContentFormat,
    /// It knows the role `developer`; others get the system's.
    pub developer: bool,
}

/// The conversation that a template sees.
pub fn conversation(
    messages: &Value,
    wants: Wants,
    media: Media,
) -> Result<Vec<Value>, MessageError> {
    let list = sequence(messages, "messages is not a list")?;
    if list.len() > MAX_MESSAGES {
        return Err(MessageError::Invalid("too many messages"));
    }
    let converted: Result<Vec<Value>, MessageError> = list
        .iter()
        .map(|message| convert(message, wants.format, media))
        .collect();
    let converted = converted?;
    let is_developer = |m: &Value| role_of(m).as_deref() == Some("developer");
    if wants.developer || !converted.iter().any(is_developer) {
        return Ok(converted);
    }
    let as_system = |message: Value| {
        if is_developer(&message) {
            replace_role(&message)
        } else {
            Ok(message)
        }
    };
    let renamed: Result<Vec<Value>, MessageError> = converted.into_iter().map(as_system).collect();
    Ok(system_first(renamed?))
}

fn role_of(message: &Value) -> Option<String> {
    field(message, "role").and_then(|role| role.as_str().map(ToOwned::to_owned))
}

/// A developer's message as the system's, without its tools.
fn replace_role(message: &Value) -> Result<Value, MessageError> {
    let mut out = Map::default();
    for key in keys(message)? {
        match key.as_str() {
            Some("tools") => {}
            Some("role") => out.push("role", Value::from("system")),
            _ => out
                .0
                .push((key.clone(), message.get_item(&key).unwrap_or_default())),
        }
    }
    Ok(out.build())
}

/// All system texts as one message at the beginning, unless there is one only and it is there.
fn system_first(messages: Vec<Value>) -> Vec<Value> {
    let is_system = |m: &Value| role_of(m).as_deref() == Some("system");
    if !messages.iter().skip(1).any(is_system) {
        return messages;
    }
    let (system, others): (Vec<Value>, Vec<Value>) = messages.into_iter().partition(is_system);
    let texts = system.iter().filter_map(|message| {
        let content = field(message, "content")?;
        if let Some(text) = content.as_str() {
            return Some(text.to_owned());
        }
        let parts = content.try_iter().ok()?;
        let texts: Vec<String> = parts
            .filter_map(|part| field(&part, "text").map(|text| text.to_string()))
            .collect();
        Some(texts.join("\n"))
    });
    let texts: Vec<String> = texts.filter(|text| !text.is_empty()).collect();
    let mut merged = Map::default();
    merged.push("role", Value::from("system"));
    merged.push("content", Value::from(texts.join("\n\n")));
    std::iter::once(merged.build()).chain(others).collect()
}

/// Tools in the shape vLLM's request model writes them: `type` and `function`, which has `name`,
/// `description` and `parameters` (null where missing), then `strict` and `defer_loading` if they are
/// set. Other fields do not reach the template.
pub fn tools(tools: &Value) -> Result<Value, MessageError> {
    let dump = |tool: &Value| {
        let function =
            field(tool, "function").ok_or(MessageError::Invalid("tool without function"))?;
        let deferred = field(tool, "defer_loading");
        let mut inner = Map::default();
        for name in ["name", "description", "parameters"] {
            inner.push(name, field(&function, name).unwrap_or(Value::from(())));
        }
        if let Some(strict) = field(&function, "strict") {
            inner.push("strict", strict);
        }
        if let Some(deferred) = field(&function, "defer_loading").or(deferred.clone()) {
            inner.push("defer_loading", deferred);
        }
        let mut outer = Map::default();
        outer.push("type", Value::from("function"));
        outer.push("function", inner.build());
        if let Some(deferred) = deferred {
            outer.push("defer_loading", deferred);
        }
        Ok(outer.build())
    };
    let list = sequence(tools, "tools is not a list")?;
    let dumped: Result<Vec<Value>, MessageError> = list.iter().map(dump).collect();
    Ok(Value::from(dumped?))
}

/// A field that is present and not null.
pub fn field(value: &Value, name: &str) -> Option<Value> {
    let found = value.get_attr(name).ok()?;
    (!found.is_undefined() && !found.is_none()).then_some(found)
}

/// Keys in order of insertion.
#[derive(Debug, Default)]
pub struct Map(Vec<(Value, Value)>);

impl Map {
    /// Appends a key that is not there yet.
    pub fn push(&mut self, key: &str, value: Value) {
        self.0.push((Value::from(key), value));
    }

    /// The map as templates see it.
    pub fn build(self) -> Value {
        Value::from_pairs(self.0)
    }
}

/// Keys of an object in order.
pub fn keys(object: &Value) -> Result<Vec<Value>, MessageError> {
    if object.kind() != ValueKind::Map {
        return Err(MessageError::Invalid("not an object"));
    }
    let keys = object.try_iter();
    Ok(keys
        .map_err(|_| MessageError::Invalid("not an object"))?
        .collect())
}

pub(super) fn sequence(value: &Value, otherwise: &'static str) -> Result<Vec<Value>, MessageError> {
    if value.kind() != ValueKind::Seq {
        return Err(MessageError::Invalid(otherwise));
    }
    let items = value.try_iter();
    Ok(items
        .map_err(|_| MessageError::Invalid(otherwise))?
        .collect())
}

fn convert(message: &Value, format: ContentFormat, media: Media) -> Result<Value, MessageError> {
    let role = field(message, "role").ok_or(MessageError::Invalid("message without role"))?;
    let role_name = role
        .as_str()
        .ok_or(MessageError::Invalid("role is not a string"))?
        .to_owned();
    let mut out = Map::default();
    out.push("role", role);
    out.push("content", content(message, &role_name, format, media)?);
    match role_name.as_str() {
        "assistant" => {
            if let Some(calls) = field(message, "tool_calls") {
                let calls = tool_calls(&calls)?;
                if !calls.is_empty() {
                    out.push("tool_calls", Value::from(calls));
                }
            }
            match (
                field(message, "reasoning"),
                field(message, "reasoning_content"),
            ) {
                (Some(reasoning), _) => {
                    out.push("reasoning", reasoning.clone());
                    out.push("reasoning_content", reasoning);
                }
                (None, Some(_)) => return Err(MessageError::Unsupported("reasoning_content")),
                (None, None) => {}
            }
        }
        "tool" => {
            if let Some(id) = field(message, "tool_call_id") {
                out.push("tool_call_id", id);
            }
        }
        _ => {}
    }
    for name in ["name", "task"] {
        if let Some(value) = field(message, name).filter(|v| v.as_str().is_some()) {
            out.push(name, value);
        }
    }
    if role_name == "developer" {
        out.push("tools", field(message, "tools").unwrap_or(Value::from(())));
    }
    Ok(out.build())
}

fn content(
    message: &Value,
    role: &str,
    format: ContentFormat,
    media: Media,
) -> Result<Value, MessageError> {
    let given = match field(message, "content") {
        None => Vec::new(),
        Some(text) if text.as_str().is_some() => vec![text],
        Some(list) => sequence(&list, "content is neither a string nor a list")?,
    };
    let mut parts = Vec::with_capacity(given.len());
    for part in &given {
        let read = match modality(part) {
            Some(modality) if media != Media::Refuse => Part::Medium(modality),
            _ => match part_text(part)? {
                Some(text) => Part::Text(text),
                None => continue,
            },
        };
        if let Part::Text(text) = &read {
            let text = text.as_str().unwrap_or_default();
            if role == "system" && text.starts_with(BILLING_HEADER) {
                return Err(MessageError::Unsupported("a billing header"));
            }
            if media != Media::Refuse && text.contains(MARK) {
                return Err(MessageError::Media);
            }
        }
        parts.push((read, part));
    }
    if format == ContentFormat::String || role == "tool" {
        // The usual message: its text is not copied.
        if let [(Part::Text(text), _)] = parts.as_slice() {
            return Ok(text.clone());
        }
        // As a string empty parts vanish; in a tool's list of parts they stay as empty lines.
        let keep_empty = format == ContentFormat::Parts;
        let lines = parts.iter().filter_map(|(part, _)| match part {
            Part::Text(text) => text.as_str(),
            Part::Medium(_) => None,
        });
        let mut lines: Vec<&str> = lines.filter(|t| keep_empty || !t.is_empty()).collect();
        // Whatever the order of the parts: engines put all placeholders first unless told otherwise.
        if parts
            .iter()
            .any(|(part, _)| matches!(part, Part::Medium(_)))
        {
            lines.insert(0, MARK);
        }
        return Ok(Value::from(lines.join("\n")));
    }
    let wrapped: Result<Vec<Value>, MessageError> = parts
        .into_iter()
        .map(|(read, part)| wrap(read, part, media))
        .collect();
    Ok(Value::from(wrapped?))
}

/// A part as it was read.
enum Part {
    Text(Value),
    /// Its modality.
    Medium(&'static str),
}

/// A part as a template sees it.
fn wrap(read: Part, part: &Value, media: Media) -> Result<Value, MessageError> {
    let mut map = Map::default();
    let text = match read {
        Part::Medium(modality) if media == Media::AsParts => {
            map.push("type", Value::from(modality));
            return Ok(map.build());
        }
        Part::Medium(_) => Value::from(MARK),
        Part::Text(text) => text,
    };
    map.push("type", Value::from("text"));
    map.push("text", text);
    if part.as_str().is_none() && modality(part).is_none() {
        for key in keys(part)? {
            let name = key.as_str().unwrap_or_default();
            if !PART_FIELDS.contains(&name) {
                map.push(name, part.get_item(&key).unwrap_or_default());
            }
        }
    }
    Ok(map.build())
}

/// The modality of a part that is a medium of a kind known here.
fn modality(part: &Value) -> Option<&'static str> {
    if part.as_str().is_some() {
        return None;
    }
    let named = |names: &[&'static str]| names.iter().copied().find(|n| field(part, n).is_some());
    let kind = match field(part, "type") {
        Some(kind) => kind.as_str()?.to_owned(),
        // Engines tell by the field that is there.
        None => named(&["image_url", "input_audio", "audio_url", "video_url"])?.to_owned(),
    };
    Some(match kind.as_str() {
        "image_url" | "input_image" | "image_embeds" | "image_pil" => "image",
        "input_audio" | "audio_url" | "audio_embeds" => "audio",
        "video_url" | "video_embeds" => "video",
        _ => return None,
    })
}

/// The text of a part, `None` for one that is skipped.
fn part_text(part: &Value) -> Result<Option<Value>, MessageError> {
    if part.as_str().is_some() {
        return Ok(Some(part.clone()));
    }
    let kind = field(part, "type").ok_or(MessageError::Media)?;
    let name = match kind.as_str() {
        Some("text" | "input_text" | "output_text") => "text",
        Some("refusal") => "refusal",
        Some("thinking") => "thinking",
        _ => return Err(MessageError::Media),
    };
    match field(part, name) {
        None => Ok(None),
        Some(text) if text.as_str().is_some() => Ok(Some(text)),
        Some(_) => Err(MessageError::Invalid("text of a part is not a string")),
    }
}

fn tool_calls(calls: &Value) -> Result<Vec<Value>, MessageError> {
    let list = sequence(calls, "tool_calls is not a list")?;
    list.iter()
        .map(|call| {
            let function = field(call, "function")
                .filter(|f| f.kind() == ValueKind::Map)
                .ok_or(MessageError::Invalid("tool call without function"))?;
            let function = replace(&function, "arguments", arguments(&function))?;
            replace(call, "function", function)
        })
        .collect()
}

/// Arguments as an object; what is none becomes an empty one.
fn arguments(function: &Value) -> Value {
    let empty = || Map::default().build();
    let Some(given) = field(function, "arguments") else {
        return empty();
    };
    let parsed = match given.as_str() {
        Some(text) => serde_json::from_str::<Value>(text).unwrap_or_default(),
        None => given,
    };
    if parsed.kind() == ValueKind::Map {
        parsed
    } else {
        empty()
    }
}

/// `object` with `key` set, at its place or at the end.
pub fn replace(object: &Value, key: &str, value: Value) -> Result<Value, MessageError> {
    let mut map = Map::default();
    let mut value = Some(value);
    for known in keys(object)? {
        let current = if known.as_str() == Some(key) {
            value.take().unwrap_or_default()
        } else {
            object.get_item(&known).unwrap_or_default()
        };
        map.0.push((known, current));
    }
    if let Some(value) = value {
        map.push(key, value);
    }
    Ok(map.build())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Value {
        serde_json::from_str(json).unwrap()
    }

    fn one(json: &str, format: ContentFormat) -> Result<String, MessageError> {
        let wants = Wants {
            format,
            developer: true,
        };
        let list = conversation(&parse(&format!("[{json}]")), wants, Media::Refuse)?;
        Ok(serde_json::to_string(&list[0]).unwrap())
    }

    #[test]
    fn content_has_the_form_the_template_wants() {
        let parts = r#"{"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":""},"b"]}"#;
        assert_eq!(
            one(parts, ContentFormat::String).unwrap(),
            r#"{"role":"user","content":"a\nb"}"#
        );
        assert_eq!(
            one(parts, ContentFormat::Parts).unwrap(),
            r#"{"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":""},{"type":"text","text":"b"}]}"#
        );
        let text = r#"{"role":"user","content":"a","extra":1}"#;
        assert_eq!(
            one(text, ContentFormat::Parts).unwrap(),
            r#"{"role":"user","content":[{"type":"text","text":"a"}]}"#
        );
    }

    #[test]
    fn no_content_is_empty() {
        let none = r#"{"role":"assistant","content":null}"#;
        assert_eq!(
            one(none, ContentFormat::String).unwrap(),
            r#"{"role":"assistant","content":""}"#
        );
        assert_eq!(
            one(none, ContentFormat::Parts).unwrap(),
            r#"{"role":"assistant","content":[]}"#
        );
    }

    #[test]
    fn results_of_tools_are_strings_in_both_forms() {
        let tool = r#"{"role":"tool","tool_call_id":"c1","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]}"#;
        let expected = r#"{"role":"tool","content":"a\nb","tool_call_id":"c1"}"#;
        assert_eq!(one(tool, ContentFormat::String).unwrap(), expected);
        assert_eq!(one(tool, ContentFormat::Parts).unwrap(), expected);
    }

    #[test]
    fn arguments_of_tool_calls_become_objects_in_order() {
        let call = |arguments: &str| {
            one(
                &format!(r#"{{"role":"assistant","tool_calls":[{{"id":"1","function":{{"name":"f","arguments":{arguments}}}}}]}}"#),
                ContentFormat::String,
            )
            .unwrap()
        };
        let expected = |arguments: &str| {
            format!(
                r#"{{"role":"assistant","content":"","tool_calls":[{{"id":"1","function":{{"name":"f","arguments":{arguments}}}}}]}}"#
            )
        };
        assert_eq!(call(r#""{\"z\":1,\"a\":2}""#), expected(r#"{"z":1,"a":2}"#));
        for none in [r#""""#, "null", r#""[1]""#, r#""{broken""#] {
            assert_eq!(call(none), expected("{}"), "{none}");
        }
    }

    #[test]
    fn a_developer_is_the_system_where_the_template_knows_none() {
        let given = |json: &str, developer| {
            let wants = Wants {
                format: ContentFormat::String,
                developer,
            };
            let list = conversation(&parse(json), wants, Media::Refuse).unwrap();
            serde_json::to_string(&list).unwrap()
        };
        let first =
            r#"[{"role":"developer","content":"a","tools":[1]},{"role":"user","content":"u"}]"#;
        assert_eq!(
            given(first, false),
            r#"[{"role":"system","content":"a"},{"role":"user","content":"u"}]"#
        );
        assert_eq!(given(first, true), first);
        // Several system texts become one in front, which are joined by an empty line.
        let later = r#"[{"role":"system","content":"s"},{"role":"user","content":"u"},{"role":"developer","content":"d"},{"role":"developer","content":""}]"#;
        assert_eq!(
            given(later, false),
            r#"[{"role":"system","content":"s\n\nd"},{"role":"user","content":"u"}]"#
        );
        // Without a developer nothing moves.
        let none = r#"[{"role":"user","content":"u"},{"role":"system","content":"s"}]"#;
        assert_eq!(given(none, false), none);
    }

    #[test]
    fn no_tool_calls_are_left_out() {
        let message = r#"{"role":"assistant","content":"a","tool_calls":[]}"#;
        assert_eq!(
            one(message, ContentFormat::String).unwrap(),
            r#"{"role":"assistant","content":"a"}"#
        );
    }

    #[test]
    fn tools_have_the_fields_of_the_request_model() {
        let dump = |json: &str| serde_json::to_string(&tools(&parse(json)).unwrap()).unwrap();
        assert_eq!(
            dump(
                r#"[{"x":1,"function":{"strict":true,"y":2,"parameters":{},"name":"f"},"type":"function"}]"#
            ),
            r#"[{"type":"function","function":{"name":"f","description":null,"parameters":{},"strict":true}}]"#
        );
        assert_eq!(
            dump(r#"[{"function":{"name":"f","strict":null},"defer_loading":true}]"#),
            r#"[{"type":"function","function":{"name":"f","description":null,"parameters":null,"defer_loading":true},"defer_loading":true}]"#
        );
    }

    #[test]
    fn media_have_the_place_an_engine_gives_them() {
        let given = r#"[{"role":"user","content":[{"type":"text","text":"a"},{"type":"image_url","image_url":{"url":"x"},"uuid":"u"},{"input_audio":{"data":""}},{"type":"text","text":"b"}]}]"#;
        let content = |format, media| {
            let wants = Wants {
                format,
                developer: true,
            };
            let list = conversation(&parse(given), wants, media).unwrap();
            serde_json::to_string(&field(&list[0], "content").unwrap()).unwrap()
        };
        let mark = serde_json::to_string(MARK).unwrap();
        let mark = mark.trim_matches('"');
        assert_eq!(
            content(ContentFormat::Parts, Media::AsParts),
            r#"[{"type":"text","text":"a"},{"type":"image"},{"type":"audio"},{"type":"text","text":"b"}]"#
        );
        assert_eq!(
            content(ContentFormat::Parts, Media::Mark),
            format!(
                r#"[{{"type":"text","text":"a"}},{{"type":"text","text":"{mark}"}},{{"type":"text","text":"{mark}"}},{{"type":"text","text":"b"}}]"#
            )
        );
        // Placeholders are put in front of the texts.
        for media in [Media::AsParts, Media::Mark] {
            let string = content(ContentFormat::String, media);
            assert_eq!(string, format!(r#""{mark}\na\nb""#));
        }
    }

    #[test]
    fn what_only_the_engine_knows_is_refused() {
        let refused = |json: &str| one(json, ContentFormat::String).unwrap_err();
        assert_eq!(
            refused(r#"{"role":"user","content":[{"type":"image_url","image_url":{"url":"x"}}]}"#),
            MessageError::Media
        );
        assert_eq!(
            refused(r#"{"role":"assistant","reasoning_content":"x"}"#),
            MessageError::Unsupported("reasoning_content")
        );
        assert_eq!(
            refused(r#"{"content":"x"}"#),
            MessageError::Invalid("message without role")
        );
    }
}
