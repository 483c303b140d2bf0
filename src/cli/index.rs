//! `pinpod index`

use std::fmt::Write as _;
use std::io::{IsTerminal, Read};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use http::{Method, Request, header};
use http_body_util::Full;
use serde_json::{Value, json};

use crate::doctor::http::send;

/// The picker has as long as it needs to tokenize a long prompt.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Flags of `index`.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("what").required(true).args(["prompt", "body", "totals"]))]
pub(super) struct IndexArgs {
    /// Metrics port of the picker
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:9090")]
    server: String,
    /// The port speaks TLS; any certificate is accepted
    #[arg(long)]
    tls: bool,
    /// File with the bearer token that the port asks for in a cluster
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Text of a completion
    #[arg(long, value_name = "TEXT", requires = "model")]
    prompt: Option<String>,
    /// Model of --prompt
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// File with the body of a request; - is standard input
    #[arg(long, value_name = "FILE")]
    body: Option<PathBuf>,
    /// Path of --body; without it a body with messages is a chat, any other a completion
    #[arg(long, value_name = "PATH", requires = "body")]
    path: Option<String>,
    /// Totals of every endpoint, and lag and gaps of every publisher
    #[arg(long)]
    totals: bool,
    /// Print JSON to a terminal as well
    #[arg(long)]
    json: bool,
}

/// Asks and prints.
#[expect(clippy::print_stdout, reason = "the output that was asked for")]
pub(super) fn run(args: &IndexArgs) -> anyhow::Result<()> {
    let answer = answer(args)?;
    if args.json || !std::io::stdout().is_terminal() {
        println!("{}", serde_json::to_string_pretty(&answer)?);
    } else if args.totals {
        print!("{}", totals_table(&answer));
    } else {
        print!("{}", prompt_table(&answer));
    }
    Ok(())
}

fn answer(args: &IndexArgs) -> anyhow::Result<Value> {
    let question = question(args)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    // Made inside: a timeout needs the runtime's clock from the start.
    let asking = async { tokio::time::timeout(TIMEOUT, ask(args, question)).await };
    runtime
        .block_on(asking)
        .with_context(|| format!("no answer from {} within {TIMEOUT:?}", args.server))?
}

/// Path and body to ask with; no body asks for totals.
struct Question {
    path: String,
    body: Option<Vec<u8>>,
}

fn question(args: &IndexArgs) -> anyhow::Result<Question> {
    const INDEX: &str = "/debug/kv-index";
    if args.totals {
        return Ok(Question {
            path: INDEX.to_owned(),
            body: None,
        });
    }
    if let Some(prompt) = &args.prompt {
        let body = json!({"model": args.model, "prompt": prompt});
        return Ok(Question {
            path: format!("{INDEX}/v1/completions"),
            body: Some(serde_json::to_vec(&body)?),
        });
    }
    let Some(file) = &args.body else {
        bail!("one of --prompt, --body and --totals");
    };
    let mut body = Vec::new();
    if file.as_os_str() == "-" {
        std::io::stdin().read_to_end(&mut body)?;
    } else {
        body = std::fs::read(file).with_context(|| format!("--body {}", file.display()))?;
    }
    let path = args.path.clone().unwrap_or_else(|| {
        let chat =
            serde_json::from_slice::<Value>(&body).is_ok_and(|body| body.get("messages").is_some());
        let api = if chat {
            "chat/completions"
        } else {
            "completions"
        };
        format!("/v1/{api}")
    });
    Ok(Question {
        path: format!("{INDEX}/{}", path.trim_start_matches('/')),
        body: Some(body),
    })
}

async fn ask(args: &IndexArgs, question: Question) -> anyhow::Result<Value> {
    let method = if question.body.is_some() {
        Method::POST
    } else {
        Method::GET
    };
    let mut request = Request::builder()
        .method(method)
        .uri(question.path)
        .header(header::CONTENT_TYPE, "application/json");
    if let Some(file) = &args.token_file {
        let token = std::fs::read_to_string(file)
            .with_context(|| format!("--token-file {}", file.display()))?;
        request = request.header(header::AUTHORIZATION, format!("Bearer {}", token.trim()));
    }
    let request = request.body(Full::new(question.body.unwrap_or_default().into()))?;
    let (status, body) = send(&args.server, args.tls, request)
        .await
        .map_err(|problem| anyhow!("--server {}: {problem}", args.server))?;
    if status != 200 {
        bail!("{status}: {}", String::from_utf8_lossy(&body).trim());
    }
    serde_json::from_slice(&body).context("the answer is not JSON")
}

/// One line for each endpoint and prompt.
fn prompt_table(answer: &Value) -> String {
    let mut out = String::new();
    let mut shown = false;
    for (name, producer) in entries(answer.get("producers")) {
        if let Some(error) = producer.get("error") {
            let _ = writeln!(out, "{name}: {}", text(error));
        }
        for (number, prompt) in items(producer.get("prompts")).enumerate() {
            shown = true;
            let _ = writeln!(
                out,
                "{name}, prompt {}: {} tokens, adapter {}, salted {}",
                number + 1,
                text(&prompt["tokens"]),
                text(&producer["adapter"]),
                text(&producer["salted"]),
            );
            let mut rows = vec![
                [
                    "endpoint", "state", "blocks", "of", "tiers", "since", "newest",
                ]
                .map(str::to_owned)
                .to_vec(),
            ];
            for endpoint in items(prompt.get("endpoints")) {
                let tiers = entries(endpoint.get("tiers"));
                let tiers: Vec<_> = tiers.map(|(t, n)| format!("{t} {}", text(n))).collect();
                rows.push(vec![
                    text(&endpoint["endpoint"]),
                    text(&endpoint["trust"]),
                    text(&endpoint["matchedBlocks"]),
                    text(&endpoint["totalBlocks"]),
                    if tiers.is_empty() {
                        "-".to_owned()
                    } else {
                        tiers.join(", ")
                    },
                    age(&endpoint["sinceSecondsAgo"]),
                    age(&endpoint["newestSecondsAgo"]),
                ]);
            }
            out.push_str(&columns(&rows));
        }
    }
    if !shown && out.is_empty() {
        out.push_str("no precise prefix producer has ids of this prompt\n");
    }
    out
}

/// Models that are tokenized in the process.
fn models_table(producer: &Value) -> String {
    let head = ["model", "tokenizer", "commit", "error"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for model in items(producer.get("models")) {
        let loaded = model["loaded"] == true;
        rows.push(vec![
            text(&model["model"]),
            if loaded { "loaded" } else { "missing" }.to_owned(),
            text(&model["commit"]),
            text(&model["error"]),
        ]);
    }
    columns(&rows)
}

/// Endpoints, then publishers.
fn totals_table(answer: &Value) -> String {
    let mut out = String::new();
    for (name, producer) in entries(answer.get("producers")) {
        if producer.get("models").is_some() {
            let _ = writeln!(out, "{name}");
            out.push_str(&models_table(producer));
            continue;
        }
        let index = &producer["index"];
        let _ = writeln!(
            out,
            "{name}: {} blocks in {} runs, {} of {} bytes",
            text(&index["blocks"]),
            text(&index["runs"]),
            text(&index["bytes"]),
            text(&index["maxBytes"]),
        );
        let mut rows = vec![
            [
                "endpoint",
                "block size",
                "runs",
                "blocks by tier",
                "hit parity",
            ]
            .map(str::to_owned)
            .to_vec(),
        ];
        for endpoint in items(producer.get("endpoints")) {
            let tiers = entries(endpoint.get("blocks"));
            let tiers: Vec<_> = tiers.map(|(t, n)| format!("{t} {}", text(n))).collect();
            let broken = items(endpoint.get("parityBroken")).count();
            rows.push(vec![
                text(&endpoint["endpoint"]),
                text(&endpoint["blockSize"]),
                text(&endpoint["runs"]),
                if tiers.is_empty() {
                    "-".to_owned()
                } else {
                    tiers.join(", ")
                },
                if broken > 0 {
                    format!("BROKEN ({broken})")
                } else {
                    text(&endpoint["parity"])
                },
            ]);
        }
        out.push_str(&columns(&rows));
        let mut rows = vec![
            [
                "publisher",
                "rank",
                "state",
                "lag ms",
                "events",
                "gaps",
                "losses",
                "replays",
                "duplicates",
            ]
            .map(str::to_owned)
            .to_vec(),
        ];
        for publisher in items(producer.get("publishers")) {
            let stats = &publisher["stats"];
            let mut row = vec![text(&publisher["endpoint"]), text(&publisher["rank"])];
            let keys = [
                "state",
                "lagMs",
                "events",
                "gaps",
                "losses",
                "replays",
                "duplicates",
            ];
            row.extend(keys.map(|key| text(&stats[key])));
            rows.push(row);
        }
        out.push_str(&columns(&rows));
    }
    if out.is_empty() {
        out.push_str("no precise prefix producer is configured\n");
    }
    out
}

fn items(value: Option<&Value>) -> impl Iterator<Item = &Value> {
    value.and_then(Value::as_array).into_iter().flatten()
}

fn entries(value: Option<&Value>) -> impl Iterator<Item = (&String, &Value)> {
    value.and_then(Value::as_object).into_iter().flatten()
}

fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// `12s ago`
fn age(seconds: &Value) -> String {
    match seconds.as_u64() {
        None => "-".to_owned(),
        Some(s @ 0..=119) => format!("{s}s ago"),
        Some(s @ 120..=7199) => format!("{}min ago", s / 60),
        Some(s) => format!("{}h ago", s / 3600),
    }
}

/// Rows under each other, each cell as wide as the widest of its column.
fn columns(rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let mut out = String::new();
    for row in rows {
        let cells = row.iter().enumerate();
        let line: Vec<_> = cells
            .map(|(column, cell)| format!("{cell:width$}", width = width(column)))
            .collect();
        let _ = writeln!(out, "  {}", line.join("  ").trim_end());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: IndexArgs,
    }

    fn asked(line: &[&str]) -> Result<(String, Option<Value>), String> {
        let parsed = <Line as clap::Parser>::try_parse_from([&["index"], line].concat());
        let args = parsed.map_err(|error| error.to_string())?.args;
        let question = question(&args).map_err(|error| error.to_string())?;
        let body = question.body.map(|b| serde_json::from_slice(&b).unwrap());
        Ok((question.path, body))
    }

    #[test]
    fn a_question_is_a_request_under_the_index_path() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("chat.json");
        std::fs::write(&file, r#"{"messages": []}"#).unwrap();
        let file = file.to_str().unwrap();
        assert_eq!(
            asked(&["--totals"]),
            Ok(("/debug/kv-index".to_owned(), None))
        );
        assert_eq!(
            asked(&["--prompt", "hello", "--model", "m"]),
            Ok((
                "/debug/kv-index/v1/completions".to_owned(),
                Some(json!({"model": "m", "prompt": "hello"}))
            ))
        );
        let path = |line: &[&str]| asked(line).unwrap().0;
        assert_eq!(
            path(&["--body", file]),
            "/debug/kv-index/v1/chat/completions"
        );
        assert_eq!(
            path(&["--body", file, "--path", "/v1/messages"]),
            "/debug/kv-index/v1/messages"
        );
        assert!(asked(&["--prompt", "hello"]).is_err(), "without a model");
        assert!(asked(&["--totals", "--body", file]).is_err());
        assert!(asked(&[]).is_err());
    }

    #[test]
    fn totals_show_models_and_what_they_lack() {
        let answer = json!({"producers": {"token-producer": {"models": [
            {"model": "m", "loaded": true, "commit": "abc", "error": null},
            {"model": "n", "loaded": false, "commit": null, "error": "hub: h: status 503"},
        ]}}});
        assert_eq!(
            totals_table(&answer),
            "token-producer\n  model  tokenizer  commit  error\n  m      loaded     abc     -\n  \
             n      missing    -       hub: h: status 503\n"
        );
    }

    /// A picker in a cluster: it answers whoever shows the token.
    async fn guarded(listener: tokio::net::TcpListener) {
        let service =
            hyper::service::service_fn(|request: Request<hyper::body::Incoming>| async move {
                let shown = request.headers().get(header::AUTHORIZATION);
                let (status, body) = match shown.map(http::HeaderValue::as_bytes) {
                    Some(b"Bearer secret") => (200, r#"{"ok": true}"#),
                    _ => (401, "Unauthorized"),
                };
                http::Response::builder()
                    .status(status)
                    .body(Full::new(bytes::Bytes::from_static(body.as_bytes())))
            });
        while let Ok((stream, _)) = listener.accept().await {
            let stream = hyper_util::rt::TokioIo::new(stream);
            let http = hyper::server::conn::http1::Builder::new();
            let _ = http.serve_connection(stream, service).await;
        }
    }

    #[tokio::test]
    async fn a_port_that_asks_for_a_token_gets_it() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = listener.local_addr().unwrap().to_string();
        let task = tokio::spawn(guarded(listener));
        let directory = tempfile::tempdir().unwrap();
        let token = directory.path().join("token");
        std::fs::write(&token, "secret\n").unwrap();
        let given = |more: &[&str]| {
            let line = [&["index", "--totals", "--server", &server], more].concat();
            <Line as clap::Parser>::try_parse_from(line).unwrap().args
        };
        let totals = |args: &IndexArgs| question(args).unwrap();
        let args = given(&["--token-file", token.to_str().unwrap()]);
        let answer = ask(&args, totals(&args)).await.unwrap();
        assert_eq!(answer, json!({"ok": true}));
        let args = given(&[]);
        let error = ask(&args, totals(&args)).await.unwrap_err().to_string();
        assert_eq!(error, "401: Unauthorized");
        task.abort();
    }

    #[test]
    fn the_command_asks_by_itself() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0"));
        let listener = listener.unwrap();
        let server = listener.local_addr().unwrap().to_string();
        runtime.spawn(guarded(listener));
        let line = ["index", "--totals", "--server", &server];
        let args = <Line as clap::Parser>::try_parse_from(line).unwrap().args;
        let error = answer(&args).unwrap_err().to_string();
        assert_eq!(error, "401: Unauthorized");
    }

    #[test]
    fn a_match_is_a_line() {
        let answer = json!({"producers": {"precise": {"adapter": null, "salted": true, "prompts": [
            {"tokens": 14, "endpoints": [
                {"endpoint": "10.0.0.1:8000", "trust": "exact", "matchedBlocks": 3, "totalBlocks": 3,
                 "tiers": {"gpu": 3, "cpu": 1}, "sinceSecondsAgo": 130, "newestSecondsAgo": 2},
                {"endpoint": "10.0.0.2:8000", "trust": "unknown"},
            ]},
        ]}}});
        assert_eq!(
            prompt_table(&answer),
            "precise, prompt 1: 14 tokens, adapter -, salted true\n  \
             endpoint       state    blocks  of  tiers         since     newest\n  \
             10.0.0.1:8000  exact    3       3   cpu 1, gpu 3  2min ago  2s ago\n  \
             10.0.0.2:8000  unknown  -       -   -             -         -\n"
        );
    }
}
