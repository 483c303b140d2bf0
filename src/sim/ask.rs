//! What the simulator reads of a request, and refusals in vLLM's words.

use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::text::{append, from_ids};
use super::transfer::TransferParams;

/// Output tokens of a request that names no limit: vLLM's default for completions. A chat would go on
/// until the model ends it, which a simulated one never does.
const DEFAULT_MAX_TOKENS: usize = 16;
/// Role that a chat template opens for the answer.
const ASSISTANT: &[u8] = b"assistant";
/// What is said of a request that failed inside the engine.
const PULL_FAILED: &str = "Internal server error";

/// An inference request.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Ask {
    pub(super) model: Option<String>,
    messages: Option<Vec<Message>>,
    prompt: Option<Prompt>,
    pub(super) stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    max_tokens: Option<i64>,
    max_completion_tokens: Option<i64>,
    pub(super) cache_salt: Option<String>,
    add_generation_prompt: Option<bool>,
    continue_final_message: bool,
    tools: Option<Value>,
    /// For `/tokenize`.
    pub(super) return_token_strs: bool,
    /// Echoed in KV events.
    pub(super) session_id: Option<String>,
    vllm_xargs: Option<Value>,
    kv_transfer_params: Option<Value>,
}

/// When a stream tells usage.
#[derive(Debug, Default, Clone, Copy, Deserialize)]
#[serde(default)]
pub(super) struct StreamOptions {
    /// In an event of its own at the end.
    pub(super) include_usage: bool,
    /// In every event as well.
    pub(super) continuous_usage_stats: bool,
}

#[derive(Debug, Deserialize)]
struct Message {
    #[serde(default)]
    role: String,
    #[serde(default)]
    content: Value,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Prompt {
    Text(String),
    Ids(Vec<u32>),
}

impl Ask {
    /// Reads a body.
    pub(super) fn parse(body: &[u8]) -> Result<Self, Refusal> {
        serde_json::from_slice(body).map_err(|error| Refusal::invalid(&error.to_string(), None))
    }

    /// The options of the stream, which only a stream may have.
    pub(super) fn stream_options(&self) -> Result<StreamOptions, Refusal> {
        match self.stream_options {
            Some(_) if self.stream != Some(true) => Err(Refusal::bad_parameter(
                "Stream options can only be defined when `stream=True`.",
                "stream_options",
                None,
            )),
            options => Ok(options.unwrap_or_default()),
        }
    }

    /// The tokens of the prompt, as bytes.
    pub(super) fn tokens(&self, chat: bool) -> Result<Vec<u8>, Refusal> {
        if chat {
            self.chat_tokens()
        } else {
            self.prompt_tokens()
        }
    }

    /// What it says about KV on other pods; nothing when it is no such object.
    pub(super) fn transfer_params(&self) -> Option<TransferParams> {
        let params = self.kv_transfer_params.as_ref()?;
        TransferParams::deserialize(params).ok()
    }

    /// KV events are to tell also the blocks that are hit.
    pub(super) fn reports_hits(&self) -> bool {
        let mode = self
            .vllm_xargs
            .as_ref()
            .and_then(|args| args.get("kv_cache_report_mode"));
        mode.and_then(Value::as_str) == Some("full")
    }

    /// The tokens of a chat, as a template would lay them out: the tools as JSON, each message behind
    /// its role, then the role of the answer.
    fn chat_tokens(&self) -> Result<Vec<u8>, Refusal> {
        let Some(messages) = &self.messages else {
            return Err(Refusal::invalid("Field required", Some("body.messages")));
        };
        if messages.is_empty() {
            let text = "Cannot apply chat template to an empty conversation. Provide at least one message.";
            return Err(Refusal::bad_request(text, None));
        }
        let mut tokens = Vec::new();
        if let Some(tools) = &self.tools {
            append(&mut tokens, tools.to_string().as_bytes());
        }
        for message in messages {
            append(&mut tokens, message.role.as_bytes());
            append(&mut tokens, &message.text());
        }
        if self.add_generation_prompt != Some(false) && !self.continue_final_message {
            append(&mut tokens, ASSISTANT);
        }
        Ok(tokens)
    }

    /// The tokens of a completion's prompt.
    fn prompt_tokens(&self) -> Result<Vec<u8>, Refusal> {
        let mut tokens = Vec::new();
        match &self.prompt {
            Some(Prompt::Text(text)) => append(&mut tokens, text.as_bytes()),
            Some(Prompt::Ids(ids)) => tokens = from_ids(ids),
            None => {}
        }
        if tokens.is_empty() {
            let text = "Either prompt or prompt_embeds must be provided and non-empty.";
            return Err(Refusal::bad_parameter(text, "prompt", None));
        }
        Ok(tokens)
    }

    /// Whether it is given as messages.
    pub(super) fn is_chat(&self) -> bool {
        self.messages.is_some()
    }

    /// Output tokens to make.
    pub(super) fn max_tokens(&self) -> Result<usize, Refusal> {
        let Some(limit) = self.max_completion_tokens.or(self.max_tokens) else {
            return Ok(DEFAULT_MAX_TOKENS);
        };
        match usize::try_from(limit) {
            Ok(limit) if limit > 0 => Ok(limit),
            _ => {
                let text = format!("max_tokens must be at least 1, got {limit}.");
                Err(Refusal::bad_parameter(&text, "max_tokens", Some(limit)))
            }
        }
    }
}

impl Message {
    /// The text of its parts, one after the other.
    fn text(&self) -> Vec<u8> {
        match &self.content {
            Value::String(text) => text.clone().into_bytes(),
            Value::Array(parts) => {
                let texts = parts.iter().filter_map(|part| part.get("text")?.as_str());
                texts.collect::<String>().into_bytes()
            }
            _ => Vec::new(),
        }
    }
}

/// Why a request is not served, as vLLM says it.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) status: StatusCode,
    kind: &'static str,
    message: String,
    param: Option<&'static str>,
}

impl Refusal {
    /// The schema does not allow it.
    pub(super) fn invalid(what: &str, param: Option<&'static str>) -> Self {
        let message = format!("1 validation error:\n  {what}");
        Self::new(StatusCode::BAD_REQUEST, "Bad Request", &message, param)
    }

    /// The engine does not allow it.
    pub(super) fn bad_request(message: &str, param: Option<&'static str>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "BadRequestError", message, param)
    }

    /// The same, naming the parameter and its value in the text too.
    pub(super) fn bad_parameter(message: &str, param: &'static str, value: Option<i64>) -> Self {
        let value = value.map_or_else(String::new, |value| format!(", value={value}"));
        let message = format!("{message} (parameter={param}{value})");
        Self::bad_request(&message, Some(param))
    }

    /// Neither the model nor an adapter has that name.
    pub(super) fn unknown_model(asked: &str, served: &str) -> Self {
        let message = format!("The model `{asked}` does not exist. Valid aliases: {served}.");
        Self::not_found(&message, Some("model"))
    }

    /// What it names is not there.
    pub(super) fn not_found(message: &str, param: Option<&'static str>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "NotFoundError", message, param)
    }

    /// The request is longer than the model's context.
    pub(super) fn too_long(prompt_tokens: usize, max_tokens: usize, limit: usize) -> Self {
        let which = if prompt_tokens > limit {
            format!(
                "your prompt contains {prompt_tokens} input tokens, which exceeds this limit even without any output \
                 tokens. Please reduce the length of the input prompt."
            )
        } else {
            format!(
                "{max_tokens} output tokens were requested behind {prompt_tokens} input tokens. Please reduce the \
                 length of the input prompt or the number of requested output tokens."
            )
        };
        let message =
            format!("This model's maximum context length is {limit} tokens. However, {which}");
        let value = i64::try_from(prompt_tokens).unwrap_or(i64::MAX);
        Self::bad_parameter(&message, "input_tokens", Some(value))
    }

    /// The engine ends with the process.
    pub(super) fn engine_died() -> Self {
        let text = "EngineCore encountered an issue. See stack trace (above) for the root cause.";
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "InternalServerError",
            text,
            None,
        )
    }

    /// The KV of the prompt could not be had from the other pod.
    pub(super) fn pull_failed() -> Self {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "InternalServerError",
            PULL_FAILED,
            None,
        )
    }

    /// vLLM learns of it when a stream has begun.
    pub(super) fn comes_late(&self) -> bool {
        self.message == PULL_FAILED
    }

    /// A route that has to be opened by a flag.
    pub(super) fn closed() -> Self {
        let text = "This endpoint is disabled. Start the server with --enable-scale-out to use it.";
        Self::new(StatusCode::FORBIDDEN, "Forbidden", text, None)
    }

    /// Any refusal.
    pub(super) fn new(
        status: StatusCode,
        kind: &'static str,
        message: &str,
        param: Option<&'static str>,
    ) -> Self {
        Self {
            status,
            kind,
            message: message.to_owned(),
            param,
        }
    }

    /// The body of the answer.
    pub(super) fn body(&self) -> Value {
        let error = json!({
            "message": self.message, "type": self.kind, "param": self.param, "code": self.status.as_u16(),
        });
        json!({ "error": error })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(body: &Value) -> Ask {
        Ask::parse(body.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn the_answer_of_a_turn_continues_its_prompt_in_the_next() {
        let first = ask(&json!({"messages": [{"role": "user", "content": "hello"}]}));
        let next = ask(&json!({"messages": [
            {"role": "user", "content": [{"type": "text", "text": "hello"}]},
            {"role": "assistant", "content": " sea map"}, {"role": "user", "content": "more"},
        ]}));
        let (first, next) = (first.chat_tokens().unwrap(), next.chat_tokens().unwrap());
        // user, hello, assistant: 1 + 2 + 3 tokens.
        assert_eq!(first.len(), 6 * 4);
        assert!(next.starts_with(&[&first, &b" sea map"[..]].concat()));
    }

    #[test]
    fn text_and_ids_give_tokens_and_nothing_is_refused() {
        let tokens = |body: &Value| ask(body).prompt_tokens();
        assert_eq!(tokens(&json!({"prompt": "abcde"})).unwrap(), b"abcde\0\0\0");
        assert_eq!(
            tokens(&json!({"prompt": [0x6463_6261, 0x65]})).unwrap(),
            b"abcde\0\0\0"
        );
        for empty in [json!({}), json!({"prompt": ""}), json!({"prompt": []})] {
            assert!(tokens(&empty).is_err(), "{empty}");
        }
    }
}
