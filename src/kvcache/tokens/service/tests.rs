use bytes::Bytes;
use serde_json::json;

use super::super::model::variables;
use super::super::tokenizer::tests::directory;
use super::*;
use crate::request::MediaItem;
use crate::request::{Body, Payload};
use minijinja::Value;

fn settings() -> Settings {
    Settings {
        models: vec![ModelSettings {
            name: "tiny".to_owned(),
            directory: directory(),
            adapters: vec!["lora-0".to_owned()],
            ..ModelSettings::default()
        }],
        workers: 1,
        ..Settings::default()
    }
}

fn service() -> TokenService {
    TokenService::load(settings()).unwrap()
}

fn request(api: ApiKind, model: &str, body: &impl ToString) -> InferenceRequest {
    let mut payload = Payload::raw(false);
    payload.api = api;
    let body = Body::from(Bytes::from(body.to_string()));
    let mut request = InferenceRequest::new("1", payload, body);
    model.clone_into(&mut request.target_model);
    request
}

async fn ids(
    service: &TokenService,
    api: ApiKind,
    body: impl ToString,
) -> Result<Vec<Vec<u32>>, TokenizeError> {
    let answer = service.tokenize(&request(api, "tiny", &body));
    let tokens = answer.wait().await?;
    Ok(tokens.prompts.iter().map(|p| p.ids.to_vec()).collect())
}

#[derive(serde::Deserialize)]
struct Recorded {
    name: String,
    /// As text: the order of keys inside tools reaches the prompt.
    body: Box<serde_json::value::RawValue>,
    tokens: Option<Vec<Vec<u32>>>,
    prompt_tokens: Option<usize>,
}

/// Requests and what vLLM 0.32 made of them: ids from `/tokenize` and `/render`, the sum of
/// `usage.prompt_tokens` from others.
#[tokio::test]
async fn tokens_are_those_of_the_recorded_engine() {
    let file = std::fs::read(directory().join("recorded.json")).unwrap();
    let list: Vec<Recorded> = serde_json::from_slice(&file).unwrap();
    let service = service();
    let (mut exact, mut counted) = (0, 0);
    for recorded in list {
        let api = if recorded.body.get().contains("\"messages\":") {
            ApiKind::ChatCompletions
        } else {
            ApiKind::Completions
        };
        let got = ids(&service, api, &recorded.body).await;
        let got = got.unwrap_or_else(|e| panic!("{}: {e}", recorded.name));
        if let Some(tokens) = recorded.tokens {
            assert_eq!(got, tokens, "{}", recorded.name);
            exact += 1;
        }
        if let Some(count) = recorded.prompt_tokens {
            let sum: usize = got.iter().map(Vec::len).sum();
            assert_eq!(sum, count, "{}", recorded.name);
            counted += 1;
        }
    }
    assert!(
        exact >= 4 && counted >= 10,
        "{exact} exact, {counted} counted"
    );
}

#[tokio::test]
async fn a_prompt_may_be_text_ids_or_lists_of_them() {
    let service = service();
    let text = ids(
        &service,
        ApiKind::Completions,
        json!({"prompt": "The port"}),
    )
    .await
    .unwrap();
    // `tokenize-prompt` of the recording begins "The port".
    assert_eq!(text, [[591, 3105]]);
    let list = json!({"prompt": ["The port", "The port"]});
    assert_eq!(
        ids(&service, ApiKind::Completions, list).await.unwrap(),
        [[591, 3105], [591, 3105]]
    );
    let one = json!({"prompt": [5, 6, 7]});
    assert_eq!(
        ids(&service, ApiKind::Completions, one).await.unwrap(),
        [[5, 6, 7]]
    );
    let many = json!({"prompt": [[5, 6], [7]]});
    assert_eq!(
        ids(&service, ApiKind::Completions, many).await.unwrap(),
        [vec![5, 6], vec![7]]
    );
    for bad in [
        json!({}),
        json!({"prompt": []}),
        json!({"prompt": 3}),
        json!({"prompt": [-1]}),
    ] {
        let error = ids(&service, ApiKind::Completions, &bad).await.unwrap_err();
        assert!(
            matches!(error, TokenizeError::Malformed(_)),
            "{bad}: {error}"
        );
    }
}

#[tokio::test]
async fn ids_of_the_client_pass_for_every_api_and_model() {
    let mut request = request(ApiKind::VllmGenerate, "other", &json!({}));
    request.payload.prompts = vec![Prompt::Tokens {
        ids: vec![1, 2],
        media: Vec::new(),
    }];
    let tokens = service().tokenize(&request).wait().await.unwrap();
    assert_eq!(*tokens.prompts[0].ids, [1, 2]);
}

#[tokio::test]
async fn adapters_share_the_base_and_its_memory() {
    let service = service();
    let body = json!({"prompt": "The port"});
    let answer = service.tokenize(&request(ApiKind::Completions, "lora-0", &body));
    assert_eq!(*answer.wait().await.unwrap().prompts[0].ids, [591, 3105]);
    assert_eq!(service.memo_stats("tiny"), service.memo_stats("lora-0"));
    let unknown = service
        .tokenize(&request(ApiKind::Completions, "lora-1", &body))
        .wait()
        .await;
    assert_eq!(
        unknown,
        Err(TokenizeError::UnknownModel("lora-1".to_owned()))
    );
}

fn long_chat() -> serde_json::Value {
    // 150 * 52 bytes: more than may be tokenized inline, less than an inline body.
    let text = "At which point should we slow down before the quay? ".repeat(150);
    json!({"messages": [{"role": "user", "content": text}]})
}

#[tokio::test]
async fn what_is_known_is_answered_at_once() {
    let service = service();
    let request = request(ApiKind::ChatCompletions, "tiny", &long_chat());
    let Answer::Pending(work) = service.tokenize(&request) else {
        panic!("new text must go to a worker");
    };
    let first = work.await.unwrap();
    let Answer::Ready(second) = service.tokenize(&request) else {
        panic!("known text must not");
    };
    assert_eq!(second.unwrap(), first);
    assert_eq!(service.pool_stats().done, 1);
}

#[tokio::test]
async fn a_full_queue_is_told() {
    let service = TokenService::load(Settings {
        queue: 0,
        ..settings()
    })
    .unwrap();
    let request = request(ApiKind::ChatCompletions, "tiny", &long_chat());
    let answer = service.tokenize(&request).wait().await;
    assert_eq!(answer, Err(TokenizeError::Pool(PoolError::Full)));
    assert_eq!(service.pool_stats().refused, 1);
}

#[tokio::test]
async fn a_body_in_pieces_is_one_body() {
    let whole = json!({"prompt": "The port"}).to_string();
    let (left, right) = whole.split_at(9);
    let mut body = Body::default();
    body.push(Bytes::from(left.to_owned()));
    body.push(Bytes::from(right.to_owned()));
    let mut request = request(ApiKind::Completions, "tiny", &json!({}));
    request.body = body;
    let tokens = service().tokenize(&request).wait().await.unwrap();
    assert_eq!(*tokens.prompts[0].ids, [591, 3105]);
}

#[tokio::test]
async fn what_engines_differ_in_is_not_guessed() {
    let service = service();
    let message = json!([{"role": "user", "content": "a"}]);
    for body in [
        json!({"messages": message, "chat_template": "x"}),
        json!({"messages": message, "truncate_prompt_tokens": 3}),
    ] {
        let error = ids(&service, ApiKind::ChatCompletions, body)
            .await
            .unwrap_err();
        assert!(matches!(error, TokenizeError::Unsupported(_)), "{error}");
    }
    let file = json!({"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "x"}}]}]});
    assert_eq!(
        ids(&service, ApiKind::ChatCompletions, file).await,
        Err(TokenizeError::Media)
    );
    let both =
        json!({"messages": message, "continue_final_message": true, "add_generation_prompt": true});
    let error = ids(&service, ApiKind::ChatCompletions, both)
        .await
        .unwrap_err();
    assert!(matches!(error, TokenizeError::Malformed(_)), "{error}");
    assert_eq!(
        ids(&service, ApiKind::Embeddings, json!({"input": "a"})).await,
        Err(TokenizeError::Unsupported("this API"))
    );
}

#[test]
fn a_body_above_the_limit_is_not_read() {
    let mut request = request(ApiKind::Completions, "tiny", &json!({}));
    request.body = Body::from(Bytes::from(vec![b' '; MAX_BODY_BYTES + 1]));
    let Answer::Ready(result) = service().tokenize(&request) else {
        panic!("nothing to wait for");
    };
    assert_eq!(result, Err(TokenizeError::TooLarge));
}

#[test]
fn fields_of_a_request_win_over_template_options() {
    let body: Value = serde_json::from_str(
        r#"{"chat_template_kwargs":{"reasoning_effort":"low","thinking":true},"reasoning_effort":"high"}"#,
    )
    .unwrap();
    let special = vec![("eos_token".to_owned(), Value::from("</s>"))];
    let context = Value::from_pairs(variables(&special, &body).unwrap());
    let json = serde_json::to_string(&context).unwrap();
    assert_eq!(
        json,
        r#"{"eos_token":"</s>","reasoning_effort":"high","thinking":true,"enable_thinking":true}"#
    );
    // As vLLM 0.32 does, unless the request says otherwise.
    let body: Value = serde_json::from_str(
        r#"{"chat_template_kwargs":{"enable_thinking":true},"reasoning_effort":"none"}"#,
    )
    .unwrap();
    let context = Value::from_pairs(variables(&[], &body).unwrap());
    let json = serde_json::to_string(&context).unwrap();
    assert_eq!(
        json,
        r#"{"enable_thinking":true,"reasoning_effort":"none"}"#
    );
}

#[tokio::test]
async fn reload_keeps_the_old_models_when_the_new_ones_are_broken() {
    let copy = tempfile::tempdir().unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(directory().join(name), copy.path().join(name)).unwrap();
    }
    let mut settings = settings();
    settings.models[0].directory = copy.path().to_owned();
    let service = TokenService::load(settings).unwrap();
    let body = json!({"prompt": "The port"});
    ids(&service, ApiKind::Completions, &body).await.unwrap();
    service.reload().unwrap();
    assert_eq!(service.memo_stats("tiny"), Some(MemoStats::default()));
    std::fs::remove_file(copy.path().join("tokenizer.json")).unwrap();
    assert!(service.reload().is_err());
    assert_eq!(
        ids(&service, ApiKind::Completions, body).await.unwrap(),
        [[591, 3105]]
    );
}

/// Waits for what a watcher does, at most ten seconds.
fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    for _ in 0..1000 {
        if done() {
            return;
        }
        #[expect(clippy::disallowed_methods, reason = "the watcher has a real clock")]
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("{what} did not happen");
}

#[tokio::test]
async fn changed_files_are_taken_into_use_and_broken_ones_are_not() {
    let copy = tempfile::tempdir().unwrap();
    let path = |name: &str| copy.path().join(name);
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(directory().join(name), path(name)).unwrap();
    }
    let mut settings = settings();
    settings.models[0].directory = copy.path().to_owned();
    settings.poll = Some(Duration::from_millis(5));
    let service = TokenService::load(settings).unwrap();
    let chat = json!({"messages": [{"role": "user", "content": "The port"}]});
    let before = ids(&service, ApiKind::ChatCompletions, &chat)
        .await
        .unwrap();
    let count =
        |counter: &std::sync::atomic::AtomicU64| counter.load(std::sync::atomic::Ordering::Relaxed);
    let stale = || {
        let gauge = &service.stats().stale_models;
        gauge.load(std::sync::atomic::Ordering::Relaxed)
    };

    // A template that appears is a change, replaced whole by a rename as deployments do.
    std::fs::write(path("new"), "{{ messages[0].content }}").unwrap();
    std::fs::rename(path("new"), path("chat_template.jinja")).unwrap();
    wait_for("the reload", || count(&service.stats().reloads) == 1);
    let after = ids(&service, ApiKind::ChatCompletions, &chat)
        .await
        .unwrap();
    assert_eq!(after, [[591, 3105]]);
    assert_ne!(before, after);

    std::fs::write(path("chat_template.jinja"), "{% broken").unwrap();
    wait_for("the failure", || {
        count(&service.stats().reload_failures) == 1
    });
    assert_eq!(stale(), 1);
    let state = &service.models()[0];
    assert!(state.loaded);
    let error = state.error.clone().unwrap();
    assert!(error.starts_with("chat template:"), "{error}");
    let kept = ids(&service, ApiKind::ChatCompletions, &chat)
        .await
        .unwrap();
    assert_eq!(kept, [[591, 3105]]);

    std::fs::remove_file(path("chat_template.jinja")).unwrap();
    wait_for("the return", || count(&service.stats().reloads) == 2);
    assert_eq!(stale(), 0);
    assert_eq!(service.models()[0].error, None);
    let back = ids(&service, ApiKind::ChatCompletions, &chat)
        .await
        .unwrap();
    assert_eq!(back, before);
}

#[test]
fn a_running_service_can_be_found_by_its_name() {
    let service = Arc::new(service());
    service.publish("found by its name");
    let found = || {
        let list = published();
        list.into_iter()
            .find(|(name, _)| name == "found by its name")
    };
    assert!(found().is_some_and(|(_, found)| Arc::ptr_eq(&found, &service)));
    drop(service);
    assert!(found().is_none());
}

#[test]
fn ids_behind_media_without_a_name_have_no_keys() {
    let item = |identifier: Option<&str>, offset| MediaItem {
        modality: "image",
        hash: 1,
        identifier: identifier.map(Into::into),
        token_offset: Some(offset),
        tokens: Some(2),
        extent: crate::request::Extent::Unknown,
    };
    let mut prompt = PromptTokens {
        ids: Arc::new(vec![1, 9, 9, 2, 9, 9, 3]),
        media: vec![item(Some("b"), 4), item(Some("a"), 1)],
    };
    let names = |prompt: &PromptTokens| {
        let named = prompt.named_media();
        named
            .iter()
            .map(|(_, n)| (*n).to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(prompt.keyed_ids().len(), 7);
    assert_eq!(names(&prompt), ["a", "b"]);
    prompt.media[0].identifier = None;
    assert_eq!(prompt.keyed_ids(), [1, 9, 9, 2]);
    assert_eq!(names(&prompt), ["a"]);
    prompt.media[1].identifier = None;
    assert_eq!(prompt.keyed_ids(), [1]);
    assert!(names(&prompt).is_empty());
}

#[test]
fn a_name_given_twice_is_refused() {
    let mut settings = settings();
    settings.models[0].adapters.push("tiny".to_owned());
    let error = TokenService::load(settings).unwrap_err();
    assert!(error.to_string().contains("named twice"), "{error}");
}

/// The recorded engine's tokenizer with three tokens of a vision model and another template.
fn vision(template: &str, config: &serde_json::Value) -> (tempfile::TempDir, TokenService) {
    let copy = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| std::fs::write(copy.path().join(name), bytes).unwrap();
    let tokenizer = std::fs::read(directory().join("tokenizer.json")).unwrap();
    write("tokenizer.json", &tokenizer);
    let added = json!({"added_tokens_decoder": {
        "4096": {"content": "<|vision_start|>", "special": true},
        "4097": {"content": "<|image_pad|>", "special": true},
        "4098": {"content": "<|vision_end|>", "special": true},
    }});
    write("tokenizer_config.json", added.to_string().as_bytes());
    write("chat_template.jinja", template.as_bytes());
    write("config.json", config.to_string().as_bytes());
    let mut settings = settings();
    settings.models[0].directory = copy.path().to_owned();
    settings.poll = None;
    (copy, TokenService::load(settings).unwrap())
}

/// As Qwen2-VL renders images.
const PARTS: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in c %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n";
/// Texts only.
const STRING: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n";

fn picture(system: &str, text: &str) -> serde_json::Value {
    json!({"messages": [
        {"role": "system", "content": system},
        {"role": "user", "content": [
            {"type": "text", "text": text},
            {"type": "image_url", "image_url": {"url": "http://x/quay.png"}},
            {"type": "text", "text": "What is it?"},
            {"type": "image_url", "image_url": {"url": "http://x/tug.png"}},
        ]},
    ]})
}

async fn prompt(service: &TokenService, body: &serde_json::Value) -> PromptTokens {
    let answer = service.tokenize(&request(ApiKind::ChatCompletions, "tiny", body));
    answer.wait().await.unwrap().prompts.remove(0)
}

/// Ids of a text with its control tokens.
async fn ids_of_text(service: &TokenService, text: &str) -> Vec<u32> {
    let body = json!({"prompt": text, "add_special_tokens": false});
    ids(service, ApiKind::Completions, body)
        .await
        .unwrap()
        .remove(0)
}

#[tokio::test]
async fn text_before_the_first_medium_is_exact() {
    let system = "The harbour keeps a ledger of every ship. ".repeat(200);
    let (_files, service) = vision(PARTS, &json!({"image_token_id": 4097}));
    let tokens = prompt(&service, &picture(&system, "Look at")).await;
    let before = format!("<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nLook at");
    let expected = ids_of_text(&service, &before).await;
    assert!(expected.len() > 1000);
    assert_eq!(tokens.keyed_ids(), expected);
    assert!(!tokens.is_whole());
    assert!(tokens.named_media().is_empty());
    // The rest is there to be counted. Jinja drops the line feed at a template's end.
    let rest = "<|vision_start|><|image_pad|><|vision_end|>";
    let rest = format!("{rest}What is it?{rest}<|im_end|>\n<|im_start|>assistant");
    assert_eq!(
        tokens.ids[expected.len()..],
        ids_of_text(&service, &rest).await
    );
}

#[tokio::test]
async fn a_template_of_strings_has_the_media_before_the_text() {
    let (_files, service) = vision(STRING, &json!({}));
    let tokens = prompt(&service, &picture("Be brief.", "Look at")).await;
    let before = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n";
    let mut expected = ids_of_text(&service, before).await;
    // What the placeholder is made of is not known, so the last token may be joined with it.
    expected.pop();
    assert_eq!(tokens.keyed_ids(), expected);
}

#[tokio::test]
async fn a_template_that_turns_on_media_is_exact_as_far_as_it_does_not() {
    // As Llama 3.2 Vision: no system message beside images.
    let template = format!(
        "{{% set ns = namespace(images=false) %}}{{% for m in messages %}}{{% if m.content is not string %}}{{% for c in m.content %}}{{% if c.type == 'image' %}}{{% set ns.images = true %}}{{% endif %}}{{% endfor %}}{{% endif %}}{{% endfor %}}{{% if ns.images %}}{{% set messages = messages[1:] %}}{{% endif %}}{PARTS}"
    );
    let (_files, service) = vision(&template, &json!({}));
    let tokens = prompt(&service, &picture("Be brief.", "Look at")).await;
    let engine = ids_of_text(&service, "<|im_start|>user\nLook at").await;
    let exact = tokens.keyed_ids();
    assert!(engine.starts_with(exact), "{exact:?} of {engine:?}");
    // "<|im_start|>" is what both renderings have, and what follows it is no token of its own.
    assert!(exact.len() <= 1, "{exact:?}");
}

#[tokio::test]
async fn a_placeholder_in_a_clients_text_ends_what_is_exact() {
    let (_files, service) = vision(PARTS, &json!({"image_token_id": 4097}));
    let tokens = prompt(&service, &picture("Say <|image_pad|> twice.", "Look at")).await;
    let before = ids_of_text(&service, "<|im_start|>system\nSay ").await;
    assert_eq!(tokens.keyed_ids(), before);
}

#[tokio::test]
async fn media_of_other_apis_have_their_place_too() {
    let (_files, service) = vision(PARTS, &json!({"image_token_id": 4097}));
    let expected = ids_of_text(&service, "<|im_start|>user\nLook at").await;
    let messages = json!({"max_tokens": 1, "messages": [{"role": "user", "content": [
        {"type": "text", "text": "Look at"},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}},
    ]}]});
    let responses = json!({"input": [{"role": "user", "content": [
        {"type": "input_text", "text": "Look at"},
        {"type": "input_image", "image_url": "http://x/quay.png"},
    ]}]});
    for (api, body) in [
        (ApiKind::Messages, messages),
        (ApiKind::Responses, responses),
    ] {
        let answer = service.tokenize(&request(api, "tiny", &body));
        let tokens = answer.wait().await.unwrap().prompts.remove(0);
        assert_eq!(tokens.keyed_ids(), expected, "{api:?}");
    }
}
