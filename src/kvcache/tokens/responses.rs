//! OpenAI `responses` bodies as the chats vLLM makes of them.
//!
//! Upstream: `vllm/entrypoints/openai/responses/utils.py` and `protocol.py`, 0.32. Calls, reasoning and
//! text of one turn are items of their own in a request and one message in a chat. What an earlier
//! response left at an engine is not known here.

use minijinja::Value;

use super::messages::{Map, MessageError, field, sequence};

/// One message while items are added to it.
#[derive(Debug, Default)]
struct Message {
    role: String,
    content: Option<Value>,
    reasoning: Option<Value>,
    calls: Vec<Value>,
    call_id: Option<Value>,
}

/// The chat body for `body`.
pub fn to_chat(body: &Value) -> Result<Value, MessageError> {
    for (name, what) in [
        ("previous_response_id", "an earlier response"),
        ("previous_input_messages", "earlier messages"),
        ("prompt", "a stored prompt"),
    ] {
        if field(body, name).is_some() {
            return Err(MessageError::Unsupported(what));
        }
    }
    let truncation = body.get_attr("truncation").unwrap_or_default();
    if !truncation.is_undefined() && truncation.as_str() != Some("disabled") {
        return Err(MessageError::Unsupported("a prompt that may be cut"));
    }
    let mut messages = Vec::new();
    if let Some(text) = field(body, "instructions").filter(Value::is_true) {
        messages.push(Message::plain("system", text));
    }
    let input = field(body, "input").ok_or(MessageError::Invalid("no input"))?;
    let mut open = false;
    if input.as_str().is_some() {
        messages.push(Message::plain("user", input));
    } else {
        let items = sequence(&input, "input is neither a string nor a list")?;
        let behind = messages.len();
        for item in &items {
            // Instructions are no part of the turns.
            add(item, behind, &mut messages)?;
        }
        open = items.last().map_or(Ok(false), is_open)?;
    }
    let messages: Vec<Value> = messages.into_iter().map(Message::build).collect();
    let mut chat = Map::default();
    chat.push("messages", Value::from(messages));
    if let Some(tools) = tools(body)? {
        chat.push("tools", tools);
    }
    chat.push("add_generation_prompt", Value::from(!open));
    chat.push("continue_final_message", Value::from(open));
    if let Some(effort) = field(body, "reasoning").and_then(|r| field(&r, "effort")) {
        chat.push("reasoning_effort", effort);
    }
    if let Some(options) = field(body, "chat_template_kwargs") {
        chat.push("chat_template_kwargs", options);
    }
    // Unlike a chat, whose template has them.
    chat.push("add_special_tokens", Value::from(true));
    Ok(chat.build())
}

impl Message {
    fn new(role: &str) -> Self {
        Self {
            role: role.to_owned(),
            ..Self::default()
        }
    }

    fn plain(role: &str, content: Value) -> Self {
        Self {
            content: Some(content),
            ..Self::new(role)
        }
    }

    fn build(self) -> Value {
        let mut out = Map::default();
        out.push("role", Value::from(self.role));
        let calls = Some(self.calls).filter(|calls| !calls.is_empty());
        for (name, value) in [
            ("content", self.content),
            ("reasoning", self.reasoning),
            ("tool_calls", calls.map(Value::from)),
            ("tool_call_id", self.call_id),
        ] {
            if let Some(value) = value {
                out.push(name, value);
            }
        }
        out.build()
    }
}

fn text_of(value: &Value, name: &str) -> Option<String> {
    field(value, name).and_then(|text| text.as_str().map(ToOwned::to_owned))
}

/// The assistant's message an item may go on with.
fn turn(behind: usize, messages: &mut [Message]) -> Option<&mut Message> {
    let last = messages.get_mut(behind..)?.last_mut();
    last.filter(|message| message.role == "assistant")
}

fn add(item: &Value, behind: usize, messages: &mut Vec<Message>) -> Result<(), MessageError> {
    let kind = text_of(item, "type");
    match kind.as_deref() {
        Some("function_call") => {
            let call = call(item)?;
            match turn(behind, messages) {
                Some(message) => message.calls.push(call),
                None => messages.push(Message {
                    calls: vec![call],
                    ..Message::new("assistant")
                }),
            }
        }
        Some("reasoning") => {
            let text = Some(Value::from(reasoning(item)?));
            match turn(behind, messages).filter(|message| message.reasoning.is_none()) {
                Some(message) => message.reasoning = text,
                None => messages.push(Message {
                    reasoning: text,
                    ..Message::new("assistant")
                }),
            }
        }
        Some("function_call_output") => messages.push(Message {
            content: Some(content(field(item, "output"))?),
            call_id: field(item, "call_id"),
            ..Message::new("tool")
        }),
        Some("custom_tool_call" | "custom_tool_call_output") => {
            return Err(MessageError::Unsupported("a custom tool"));
        }
        None | Some("message") => said(item, behind, messages)?,
        Some(_) => return Err(MessageError::Invalid("unknown item of input")),
    }
    Ok(())
}

/// A message with a role.
fn said(item: &Value, behind: usize, messages: &mut Vec<Message>) -> Result<(), MessageError> {
    let role = text_of(item, "role").ok_or(MessageError::Invalid("message without role"))?;
    let given = field(item, "content");
    if role != "assistant" {
        messages.push(Message::plain(&role, content(given)?));
        return Ok(());
    }
    // Of an assistant's parts only the first counts.
    let text = match &given {
        Some(text) if text.as_str().is_some() => given.clone(),
        Some(list) => {
            let parts = sequence(list, "content is neither a string nor a list")?;
            let first = parts
                .first()
                .ok_or(MessageError::Unsupported("a silent assistant"))?;
            let refused = field(first, "type").is_some_and(|kind| kind.as_str() == Some("refusal"));
            if refused {
                return Err(MessageError::Invalid("a refusal has no text"));
            }
            field(first, "text")
        }
        None => None,
    };
    let text = text.ok_or(MessageError::Invalid("message without text"))?;
    match turn(behind, messages).filter(|message| message.content.is_none()) {
        Some(message) => message.content = Some(text),
        None => messages.push(Message::plain("assistant", text)),
    }
    Ok(())
}

/// Content of others than the assistant, of whose parts only type and text are kept.
fn content(given: Option<Value>) -> Result<Value, MessageError> {
    let given = given.ok_or(MessageError::Invalid("message without content"))?;
    if given.as_str().is_some() {
        return Ok(given);
    }
    let parts = sequence(&given, "content is neither a string nor a list")?;
    let parts = parts.iter().map(|part| {
        match text_of(part, "type").as_deref() {
            Some("input_text" | "output_text") => {}
            // Where it lies in the prompt is told by the chat.
            Some("input_image") => return Ok(part.clone()),
            _ => return Err(MessageError::Media),
        }
        let mut out = Map::default();
        for name in ["type", "text"] {
            out.push(name, field(part, name).unwrap_or_default());
        }
        Ok(out.build())
    });
    let parts: Result<Vec<Value>, MessageError> = parts.collect();
    Ok(Value::from(parts?))
}

fn call(item: &Value) -> Result<Value, MessageError> {
    let required = |name: &'static str| {
        text_of(item, name).ok_or(MessageError::Invalid(
            "a call lacks a name, id or arguments",
        ))
    };
    let mut name = required("name")?;
    if let Some(space) = text_of(item, "namespace").filter(|space| !space.is_empty()) {
        name = format!("{space}__{name}");
    }
    let mut function = Map::default();
    function.push("name", Value::from(name));
    function.push("arguments", Value::from(required("arguments")?));
    let mut call = Map::default();
    call.push("id", Value::from(required("call_id")?));
    call.push("function", function.build());
    call.push("type", Value::from("function"));
    Ok(call.build())
}

/// The first text of what was thought, else of its summary.
fn reasoning(item: &Value) -> Result<String, MessageError> {
    if field(item, "encrypted_content").is_some_and(|text| text.is_true()) {
        return Err(MessageError::Invalid("encrypted reasoning"));
    }
    for name in ["content", "summary"] {
        let list = field(item, name).map(|list| sequence(&list, "reasoning is not a list"));
        let list = list.transpose()?.unwrap_or_default();
        if let Some(first) = list.first() {
            return text_of(first, "text").ok_or(MessageError::Invalid("reasoning without text"));
        }
    }
    Ok(String::new())
}

/// True when the last item is to be continued.
fn is_open(last: &Value) -> Result<bool, MessageError> {
    let kind = text_of(last, "type");
    let status = text_of(last, "status");
    let open = matches!(status.as_deref(), Some("in_progress" | "incomplete"));
    let listed = field(last, "content").is_some_and(|content| content.as_str().is_none());
    match kind.as_deref() {
        _ if !open => Ok(false),
        Some("reasoning") => Ok(true),
        Some("message") if listed && text_of(last, "role").as_deref() == Some("assistant") => {
            Ok(true)
        }
        // Which fields of such a message survive depends on how it is told from others.
        None | Some("message") => Err(MessageError::Unsupported("a status of this message")),
        Some(_) => Ok(false),
    }
}

/// Functions only; tools of other types are not shown to a model.
fn tools(body: &Value) -> Result<Option<Value>, MessageError> {
    let Some(given) = field(body, "tools").filter(Value::is_true) else {
        return Ok(None);
    };
    let mut shown = Vec::new();
    for tool in sequence(&given, "tools is not a list")? {
        match text_of(&tool, "type").as_deref() {
            Some("function") => {
                let mut outer = Map::default();
                outer.push("type", Value::from("function"));
                outer.push("function", tool);
                shown.push(outer.build());
            }
            Some("custom" | "namespace") => return Err(MessageError::Unsupported("such a tool")),
            Some(_) => {}
            None => return Err(MessageError::Invalid("tool without type")),
        }
    }
    Ok(Some(Value::from(shown)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(input: &str) -> Result<String, MessageError> {
        let body: Value = serde_json::from_str(&format!(r#"{{"input":{input}}}"#)).unwrap();
        let chat = to_chat(&body)?;
        Ok(serde_json::to_string(&field(&chat, "messages").unwrap()).unwrap())
    }

    #[test]
    fn items_of_one_turn_are_one_message() {
        let input = r#"[{"role":"user","content":[{"type":"input_text","text":"q","x":1}]},
            {"type":"reasoning","id":"r","summary":[],"content":[{"type":"reasoning_text","text":"hm"}]},
            {"type":"message","role":"assistant","content":[{"type":"output_text","text":"I look."},{"type":"output_text","text":"not read"}]},
            {"type":"function_call","call_id":"c1","name":"f","arguments":"{\"a\":1}"},
            {"type":"function_call","call_id":"c2","name":"g","namespace":"n","arguments":""},
            {"type":"function_call_output","call_id":"c1","output":"7"},
            {"role":"assistant","content":"Seven."}]"#;
        assert_eq!(
            messages(input).unwrap(),
            r#"[{"role":"user","content":[{"type":"input_text","text":"q"}]},{"role":"assistant","content":"I look.","reasoning":"hm","tool_calls":[{"id":"c1","function":{"name":"f","arguments":"{\"a\":1}"},"type":"function"},{"id":"c2","function":{"name":"n__g","arguments":""},"type":"function"}]},{"role":"tool","content":"7","tool_call_id":"c1"},{"role":"assistant","content":"Seven."}]"#
        );
    }

    #[test]
    fn a_second_text_opens_a_new_message() {
        let input = r#"[{"role":"assistant","content":"a"},{"role":"assistant","content":"b"}]"#;
        assert_eq!(
            messages(input).unwrap(),
            r#"[{"role":"assistant","content":"a"},{"role":"assistant","content":"b"}]"#
        );
    }

    #[test]
    fn tools_are_functions_and_special_tokens_are_added() {
        let body = r#"{"instructions":"Be brief.","input":"q","reasoning":{"effort":"low"},
            "tools":[{"type":"web_search"},{"type":"function","name":"f","parameters":{}}]}"#;
        let chat = to_chat(&serde_json::from_str(body).unwrap()).unwrap();
        assert_eq!(
            serde_json::to_string(&chat).unwrap(),
            r#"{"messages":[{"role":"system","content":"Be brief."},{"role":"user","content":"q"}],"tools":[{"type":"function","function":{"type":"function","name":"f","parameters":{}}}],"add_generation_prompt":true,"continue_final_message":false,"reasoning_effort":"low","add_special_tokens":true}"#
        );
    }

    #[test]
    fn an_unfinished_message_is_continued() {
        let body = r#"{"input":[{"type":"message","role":"assistant","status":"incomplete","content":[{"type":"output_text","text":"It was"}]}]}"#;
        let chat = to_chat(&serde_json::from_str(body).unwrap()).unwrap();
        assert!(field(&chat, "continue_final_message").unwrap().is_true());
        assert!(!field(&chat, "add_generation_prompt").unwrap().is_true());
    }

    #[test]
    fn what_an_engine_remembers_is_not_guessed() {
        for (body, what) in [
            (
                r#"{"input":"a","previous_response_id":"r"}"#,
                "an earlier response",
            ),
            (
                r#"{"input":"a","truncation":"auto"}"#,
                "a prompt that may be cut",
            ),
            (
                r#"{"input":"a","tools":[{"type":"custom","name":"x"}]}"#,
                "such a tool",
            ),
        ] {
            let error = to_chat(&serde_json::from_str(body).unwrap()).unwrap_err();
            assert_eq!(error, MessageError::Unsupported(what));
        }
        let image =
            r#"[{"role":"user","content":[{"type":"input_image","image_url":"http://x"}]}]"#;
        assert_eq!(messages(image), Ok(image.to_owned()));
        let file = r#"[{"role":"user","content":[{"type":"input_file","file_id":"f"}]}]"#;
        assert_eq!(messages(file), Err(MessageError::Media));
    }
}
