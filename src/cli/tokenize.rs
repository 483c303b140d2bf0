//! `pinpod tokenize`

use std::io::{BufRead, Read, Write};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, anyhow, bail};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::kvcache::tokens::hub::{DEFAULT_REVISION, Hub, HubSettings, Repo};
use crate::kvcache::tokens::service::{
    MAX_BODY_BYTES, ModelSettings, Settings, TokenService, Tokenized,
};
use crate::request::anthropic::AnthropicParser;
use crate::request::openai::OpenAiParser;
use crate::request::parsers::ParserSet;
use crate::request::vllm_http::VllmHttpParser;
use crate::request::{Body, InferenceRequest, Parser};

/// The one model of this command, whatever the bodies name.
const MODEL: &str = "model";

/// Flags of `tokenize`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Reads request bodies from standard input, one JSON object a line, and prints one \
line for each: {\"prompts\": [[ids], ..]}, or {\"error\": \"why\"} where `serve` would go on without \
ids. A body with `messages` is a chat, one with `input` a response, another a completion; \
{\"path\": \"/v1/messages\", \"body\": {..}} names its API."
)]
pub(super) struct TokenizeArgs {
    /// Directory with the tokenizer, tokenizer_config.json and the chat template
    #[arg(long, required_unless_present = "repo", conflicts_with = "repo")]
    model_dir: Option<PathBuf>,
    /// Model on the Hugging Face hub, owner/name, instead of a directory
    #[arg(long)]
    repo: Option<String>,
    /// Its branch, tag or commit
    #[arg(long, requires = "repo", default_value = DEFAULT_REVISION)]
    revision: String,
    /// Chat template instead of the model's own
    #[arg(long)]
    chat_template: Option<PathBuf>,
}

/// A line that names its API.
#[derive(Deserialize)]
struct Addressed<'a> {
    path: String,
    #[serde(borrow)]
    body: &'a RawValue,
}

/// Fields that tell what a body without a path is.
#[derive(Deserialize)]
struct Telling<'a> {
    #[serde(borrow)]
    messages: Option<&'a RawValue>,
    #[serde(borrow)]
    input: Option<&'a RawValue>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Line<'a> {
    Done { prompts: Vec<&'a [u32]> },
    Failed { error: String },
}

/// Answers every line of standard input with the ids that `serve` would compute.
pub(super) fn run(args: &TokenizeArgs) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let directory = match (&args.model_dir, &args.repo) {
        (Some(directory), _) => directory.clone(),
        (None, Some(repo)) => runtime.block_on(fetch(repo, &args.revision))?,
        (None, None) => bail!("--model-dir or --repo is required"),
    };
    let settings = Settings {
        models: vec![ModelSettings {
            name: MODEL.to_owned(),
            directory,
            // Relative to the caller, not to the model.
            chat_template: args
                .chat_template
                .as_ref()
                .map(std::path::absolute)
                .transpose()?,
            ..ModelSettings::default()
        }],
        poll: None,
        ..Settings::default()
    };
    let service = TokenService::load(settings).context("cannot load the model")?;
    let parsers: [Arc<dyn Parser>; 3] = [
        Arc::new(OpenAiParser),
        Arc::new(AnthropicParser),
        Arc::new(VllmHttpParser),
    ];
    let parsers = ParserSet::new(parsers);
    let mut input = std::io::stdin().lock();
    let mut output = std::io::stdout().lock();
    let mut line = Vec::new();
    while read_line(&mut input, &mut line)? {
        if line.trim_ascii().is_empty() {
            continue;
        }
        let answered = runtime.block_on(answer(&service, &parsers, &line));
        let answer = match &answered {
            Ok(tokens) => Line::Done {
                prompts: tokens.prompts.iter().map(|p| p.ids.as_slice()).collect(),
            },
            Err(error) => Line::Failed {
                error: format!("{error:#}"),
            },
        };
        serde_json::to_writer(&mut output, &answer)?;
        output.write_all(b"\n")?;
        output.flush()?;
    }
    Ok(())
}

/// Directory of a model of the hub, fetched as `serve` would.
async fn fetch(repo: &str, revision: &str) -> anyhow::Result<PathBuf> {
    let hub = Hub::new(HubSettings::from_env())?;
    let repo = Repo::new(repo, revision)?;
    let snapshot = hub.fetch(&repo).await.context("cannot fetch the model")?;
    Ok(snapshot.directory)
}

/// Reads one line into `line`; false at the end.
fn read_line(input: &mut impl BufRead, line: &mut Vec<u8>) -> anyhow::Result<bool> {
    line.clear();
    let limit = MAX_BODY_BYTES as u64 + 1;
    let read = input.take(limit).read_until(b'\n', line)?;
    if read as u64 == limit {
        bail!("a line is longer than {MAX_BODY_BYTES} bytes");
    }
    Ok(read > 0)
}

async fn answer(
    service: &TokenService,
    parsers: &ParserSet,
    line: &[u8],
) -> anyhow::Result<Tokenized> {
    let (path, body) = match serde_json::from_slice::<Addressed<'_>>(line) {
        Ok(addressed) => (addressed.path, addressed.body.get().as_bytes()),
        Err(_) => (path_of(line)?.to_owned(), line),
    };
    let body = Body::from(Bytes::copy_from_slice(body));
    let path = path.trim_start_matches('/');
    let payload = parsers.resolve(path)?.parse(path, &body)?;
    let mut request = InferenceRequest::new("1", payload, body);
    MODEL.clone_into(&mut request.target_model);
    let tokens = service.tokenize(&request).wait().await?;
    if tokens.prompts.is_empty() {
        return Err(anyhow!("no prompt"));
    }
    Ok(tokens)
}

fn path_of(line: &[u8]) -> anyhow::Result<&'static str> {
    let telling: Telling<'_> = serde_json::from_slice(line).context("not a request body")?;
    Ok(match (telling.messages, telling.input) {
        (Some(_), _) => "/v1/chat/completions",
        (None, Some(_)) => "/v1/responses",
        (None, None) => "/v1/completions",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_tell_what_a_body_is() {
        let path = |body: &str| path_of(body.as_bytes()).unwrap();
        assert_eq!(path(r#"{"messages": []}"#), "/v1/chat/completions");
        assert_eq!(path(r#"{"input": "a"}"#), "/v1/responses");
        assert_eq!(path(r#"{"prompt": "a"}"#), "/v1/completions");
        assert!(path_of(b"{").is_err());
    }

    #[test]
    fn lines_are_bounded() {
        let mut line = Vec::new();
        let mut short: &[u8] = b"a\nb";
        assert!(read_line(&mut short, &mut line).unwrap());
        assert_eq!(line, b"a\n");
        assert!(read_line(&mut short, &mut line).unwrap());
        assert_eq!(line, b"b");
        assert!(!read_line(&mut short, &mut line).unwrap());
        let mut long = std::io::BufReader::new(std::io::repeat(b'x'));
        assert!(read_line(&mut long, &mut line).is_err());
    }
}
