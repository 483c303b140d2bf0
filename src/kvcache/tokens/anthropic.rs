//! Anthropic `messages` bodies as the chats vLLM makes of them.
//!
//! Upstream: `vllm/entrypoints/anthropic/serving.py`, 0.32. System texts are joined; a system text that
//! begins with a client's billing header is left out; results of tools become messages of their own,
//! before the text they were sent with.

use minijinja::Value;
use minijinja::value::ValueKind;

use super::messages::{BILLING_HEADER, Map, MessageError, field, keys, sequence};

/// What a model's templates decide about the conversion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// System messages between others go to the front, because a template refuses them elsewhere.
    pub system_first: bool,
    /// `reasoning_effort` that stands for `thinking: {"type": "disabled"}`.
    pub disabled_effort: &'static str,
}

/// The chat body for `body`.
pub fn to_chat(body: &Value, rules: Rules) -> Result<Value, MessageError> {
    let given = field(body, "messages").ok_or(MessageError::Invalid("messages is not a list"))?;
    let given = sequence(&given, "messages is not a list")?;
    let mut messages = Vec::with_capacity(given.len() + 1);
    let mut system = system_texts(field(body, "system"))?;
    let mut others = Vec::with_capacity(given.len());
    for message in &given {
        let role = field(message, "role");
        let role = role.as_ref().and_then(Value::as_str);
        match role.ok_or(MessageError::Invalid("message without role"))? {
            "system" => {
                let text = system_texts(field(message, "content"))?.concat();
                match text.as_str() {
                    "" => {}
                    // Of the texts that are not part of a list only these are looked at.
                    text if text.starts_with(BILLING_HEADER) => {}
                    _ if rules.system_first => system.push(text),
                    _ => others.push(plain("system", text)),
                }
            }
            role @ ("user" | "assistant") => convert(message, role, &mut others)?,
            _ => return Err(MessageError::Invalid("unknown role")),
        }
    }
    if !system.is_empty() {
        messages.push(plain("system", system.concat()));
    }
    messages.append(&mut others);
    let mut chat = Map::default();
    chat.push("messages", Value::from(messages));
    if let Some(tools) = field(body, "tools") {
        chat.push("tools", convert_tools(&tools)?);
    }
    if let Some(effort) = effort(body, rules) {
        chat.push("reasoning_effort", effort);
    }
    if let Some(options) = field(body, "chat_template_kwargs") {
        chat.push("chat_template_kwargs", options);
    }
    Ok(chat.build())
}

fn plain(role: &str, text: String) -> Value {
    let mut message = Map::default();
    message.push("role", Value::from(role));
    message.push("content", Value::from(text));
    message.build()
}

fn kind(block: &Value) -> String {
    field(block, "type").map_or_else(String::new, |kind| kind.to_string())
}

/// Texts of a system prompt, billing headers left out.
fn system_texts(content: Option<Value>) -> Result<Vec<String>, MessageError> {
    let keep = |text: &str| !text.is_empty() && !text.starts_with(BILLING_HEADER);
    let Some(content) = content else {
        return Ok(Vec::new());
    };
    if let Some(text) = content.as_str() {
        return Ok(vec![text.to_owned()]
            .into_iter()
            .filter(|t| !t.is_empty())
            .collect());
    }
    let mut texts = Vec::new();
    for block in sequence(&content, "content is neither a string nor a list")? {
        match kind(&block).as_str() {
            "text" => texts.extend(text_of(&block, "text").filter(|text| keep(text))),
            "tool_addition" | "tool_removal" => {
                return Err(MessageError::Unsupported("a change of tools"));
            }
            _ => {}
        }
    }
    Ok(texts)
}

fn text_of(block: &Value, name: &str) -> Option<String> {
    field(block, name).and_then(|text| text.as_str().map(ToOwned::to_owned))
}

/// Appends what becomes of one message.
fn convert(message: &Value, role: &str, out: &mut Vec<Value>) -> Result<(), MessageError> {
    let content =
        field(message, "content").ok_or(MessageError::Invalid("message without content"))?;
    if let Some(text) = content.as_str() {
        out.push(plain(role, text.to_owned()));
        return Ok(());
    }
    let (mut parts, mut calls, mut thoughts) = (Vec::new(), Vec::new(), Vec::new());
    for block in sequence(&content, "content is neither a string nor a list")? {
        match kind(&block).as_str() {
            "text" => {
                let text = text_of(&block, "text").filter(|text| !text.is_empty());
                parts.extend(text.map(|text| part("text", "text", Value::from(text))));
            }
            "image" => parts.extend(image(&block)),
            "thinking" => thoughts.extend(text_of(&block, "thinking")),
            "tool_use" => calls.push(call(&block)?),
            "tool_result" if role == "user" => result(&block, out)?,
            "tool_result" => {
                // Other contents are printed as Python would.
                let text = text_of(&block, "content");
                let text = text.ok_or(MessageError::Unsupported("a result of the assistant"))?;
                parts.push(part(
                    "text",
                    "text",
                    Value::from(format!("Tool result: {text}")),
                ));
            }
            "redacted_thinking" | "tool_reference" => {}
            _ => return Err(MessageError::Invalid("unknown block")),
        }
    }
    if role == "user" && parts.is_empty() {
        return Ok(());
    }
    let mut converted = Map::default();
    converted.push("role", Value::from(role));
    if !thoughts.is_empty() {
        converted.push("reasoning", Value::from(thoughts.concat()));
    }
    if !calls.is_empty() {
        converted.push("tool_calls", Value::from(calls));
    }
    match parts.as_slice() {
        [] => {}
        [only] if kind(only) == "text" => {
            converted.push("content", only.get_attr("text").unwrap_or_default());
        }
        _ => converted.push("content", Value::from(parts)),
    }
    out.push(converted.build());
    Ok(())
}

fn part(kind: &str, name: &str, value: Value) -> Value {
    let mut part = Map::default();
    part.push("type", Value::from(kind));
    part.push(name, value);
    part.build()
}

/// An image as a part of a chat.
fn image(block: &Value) -> Option<Value> {
    let source = field(block, "source")?;
    let url = if kind(&source) == "url" {
        text_of(&source, "url").unwrap_or_default()
    } else {
        let media = text_of(&source, "media_type").unwrap_or_else(|| "image/jpeg".to_owned());
        format!(
            "data:{media};base64,{}",
            text_of(&source, "data").unwrap_or_default()
        )
    };
    let mut inner = Map::default();
    inner.push("url", Value::from(url));
    Some(part("image_url", "image_url", inner.build()))
}

fn call(block: &Value) -> Result<Value, MessageError> {
    // Without an id the engine makes one of the time.
    let id = field(block, "id").ok_or(MessageError::Unsupported("a call without id"))?;
    let mut function = Map::default();
    function.push("name", field(block, "name").unwrap_or(Value::from("")));
    let input = field(block, "input").unwrap_or_else(|| Map::default().build());
    function.push("arguments", input);
    let mut call = Map::default();
    call.push("id", id);
    call.push("type", Value::from("function"));
    call.push("function", function.build());
    Ok(call.build())
}

/// The message a tool's result becomes, and one of its images if it has any.
fn result(block: &Value, out: &mut Vec<Value>) -> Result<(), MessageError> {
    let (mut texts, mut images) = (Vec::new(), Vec::new());
    let content = field(block, "content");
    if let Some(text) = content.as_ref().and_then(Value::as_str) {
        texts.push(text.to_owned());
    } else if let Some(list) = content {
        for item in sequence(&list, "content is neither a string nor a list")? {
            match kind(&item).as_str() {
                "text" => texts.push(text_of(&item, "text").unwrap_or_default()),
                "image" => images.extend(image(&item)),
                "tool_reference" => return Err(MessageError::Unsupported("a tool reference")),
                _ => {}
            }
        }
    }
    let mut message = Map::default();
    message.push("role", Value::from("tool"));
    message.push(
        "tool_call_id",
        field(block, "tool_use_id").unwrap_or(Value::from("")),
    );
    message.push("content", Value::from(texts.join("\n")));
    out.push(message.build());
    if !images.is_empty() {
        let mut message = Map::default();
        message.push("role", Value::from("user"));
        message.push("content", Value::from(images));
        out.push(message.build());
    }
    Ok(())
}

fn convert_tools(tools: &Value) -> Result<Value, MessageError> {
    let convert = |tool: &Value| {
        let schema = field(tool, "input_schema").filter(|s| s.kind() == ValueKind::Map);
        let schema = schema.ok_or(MessageError::Invalid("tool without input_schema"))?;
        let mut function = Map::default();
        for name in ["name", "description"] {
            function.push(name, field(tool, name).unwrap_or(Value::from(())));
        }
        function.push("parameters", with_type(&schema)?);
        for name in ["strict", "defer_loading"] {
            if let Some(value) = field(tool, name) {
                function.push(name, value);
            }
        }
        Ok(part("function", "function", function.build()))
    };
    let list = sequence(tools, "tools is not a list")?;
    let converted: Result<Vec<Value>, MessageError> = list.iter().map(convert).collect();
    Ok(Value::from(converted?))
}

/// A schema says that it is an object, at its end if it did not.
fn with_type(schema: &Value) -> Result<Value, MessageError> {
    let names = keys(schema)?;
    if names.iter().any(|name| name.as_str() == Some("type")) {
        return Ok(schema.clone());
    }
    let mut out = Map::default();
    for name in names {
        let value = schema.get_item(&name).unwrap_or_default();
        out.push(name.as_str().unwrap_or_default(), value);
    }
    out.push("type", Value::from("object"));
    Ok(out.build())
}

fn effort(body: &Value, rules: Rules) -> Option<Value> {
    let thinking = field(body, "thinking").map(|thinking| kind(&thinking));
    if thinking.as_deref() == Some("disabled") {
        return Some(Value::from(rules.disabled_effort));
    }
    field(&field(body, "output_config")?, "effort")
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Rules = Rules {
        system_first: false,
        disabled_effort: "none",
    };

    fn chat(json: &str, rules: Rules) -> Result<String, MessageError> {
        let body: Value = serde_json::from_str(json).unwrap();
        to_chat(&body, rules).map(|chat| serde_json::to_string(&chat).unwrap())
    }

    #[test]
    fn system_texts_are_joined_without_billing_headers() {
        let body = r#"{"system":[{"type":"text","text":"x-anthropic-billing-header: 1"},{"type":"text","text":"One."},{"type":"text","text":" Two."}],
            "messages":[{"role":"user","content":"a"},{"role":"system","content":"Mind."}]}"#;
        assert_eq!(
            chat(body, RULES).unwrap(),
            r#"{"messages":[{"role":"system","content":"One. Two."},{"role":"user","content":"a"},{"role":"system","content":"Mind."}]}"#
        );
        let first = Rules {
            system_first: true,
            ..RULES
        };
        assert_eq!(
            chat(body, first).unwrap(),
            r#"{"messages":[{"role":"system","content":"One. Two.Mind."},{"role":"user","content":"a"}]}"#
        );
    }

    #[test]
    fn results_come_before_the_text_they_were_sent_with() {
        let body = r#"{"messages":[
            {"role":"assistant","content":[{"type":"thinking","thinking":"hm"},{"type":"text","text":"I look."},
                {"type":"tool_use","id":"t1","name":"f","input":{"z":1,"a":[2.0]}}]},
            {"role":"user","content":[{"type":"text","text":"go on"},
                {"type":"tool_result","tool_use_id":"t1","content":[{"type":"text","text":"r1"},{"type":"text","text":"r2"}]}]},
            {"role":"user","content":[{"type":"tool_result","tool_use_id":"t2","content":"x"}]}]}"#;
        assert_eq!(
            chat(body, RULES).unwrap(),
            r#"{"messages":[{"role":"assistant","reasoning":"hm","tool_calls":[{"id":"t1","type":"function","function":{"name":"f","arguments":{"z":1,"a":[2.0]}}}],"content":"I look."},{"role":"tool","tool_call_id":"t1","content":"r1\nr2"},{"role":"user","content":"go on"},{"role":"tool","tool_call_id":"t2","content":"x"}]}"#
        );
    }

    #[test]
    fn tools_become_functions_of_objects() {
        let body = r#"{"messages":[],"tools":[{"name":"f","input_schema":{"properties":{}},"strict":true}],
            "thinking":{"type":"disabled"},"output_config":{"effort":"high"}}"#;
        assert_eq!(
            chat(body, RULES).unwrap(),
            r#"{"messages":[],"tools":[{"type":"function","function":{"name":"f","description":null,"parameters":{"properties":{},"type":"object"},"strict":true}}],"reasoning_effort":"none"}"#
        );
    }

    #[test]
    fn what_is_not_known_is_refused() {
        let refused =
            |message: &str| chat(&format!(r#"{{"messages":[{message}]}}"#), RULES).unwrap_err();
        assert_eq!(
            refused(r#"{"role":"system","content":[{"type":"tool_addition"}]}"#),
            MessageError::Unsupported("a change of tools")
        );
        assert_eq!(
            refused(r#"{"role":"assistant","content":[{"type":"tool_use","name":"f"}]}"#),
            MessageError::Unsupported("a call without id")
        );
        assert_eq!(
            refused(r#"{"role":"robot","content":"a"}"#),
            MessageError::Invalid("unknown role")
        );
    }
}
