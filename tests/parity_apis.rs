//! Hit parity by API: each makes ids of its own, tells its own way what was cached, and may not tell.

use std::path::Path;

use tokenizers::Tokenizer;

use super::*;

const SYSTEM: &str = "You are a patient harbour pilot who explains how large ships enter a narrow port. \
    Answer in short sentences, name the side of the ship by port and starboard, and never guess.";
const QUESTION: &str = "When is high water?";

fn tokenizer() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tokenizer")
}

async fn start(endpoint: &'static str) -> Gateway {
    let directory = tokenizer();
    let tokens = format!(
        "- {{type: token-producer, parameters: {{local: {{models: [{{name: base, directory: {}, adapters: [poet]}}]}}}}}}\n",
        directory.display()
    );
    Gateway::start_with(endpoint, &tokens).await
}

/// The ids of [`QUESTION`] behind `system`, as the engine renders it: the template of the directory, by hand.
fn chat(model: &'static str, system: &str) -> Prompt {
    let text = format!(
        "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n\
         <|im_start|>assistant\n"
    );
    let tokenizer = Tokenizer::from_file(tokenizer().join("tokenizer.json")).unwrap();
    let ids = tokenizer.encode(text, false).unwrap().get_ids().to_vec();
    assert!(ids.len() > 3 * BLOCK);
    Prompt {
        model,
        ids,
        salt: None,
    }
}

/// An API: how it is asked, and what it says of prompt and cached tokens.
#[derive(Clone, Copy)]
struct Api {
    path: &'static str,
    kind: &'static str,
    body: fn(&Prompt, &str) -> Value,
    usage: fn(usize, usize) -> Value,
    /// The same answer where nobody counted.
    silent: fn(usize, usize) -> Value,
}

const CHAT: Api = Api {
    path: "/v1/chat/completions",
    kind: "chat",
    body: |prompt, system| {
        json!({"model": prompt.model, "cache_salt": prompt.salt, "messages": [
            {"role": "system", "content": system}, {"role": "user", "content": QUESTION},
        ]})
    },
    usage: |tokens, cached| {
        json!({"prompt_tokens": tokens, "completion_tokens": 1, "total_tokens": tokens + 1,
            "prompt_tokens_details": {"cached_tokens": cached}})
    },
    silent: |tokens, _| {
        json!({"prompt_tokens": tokens, "completion_tokens": 1, "total_tokens": tokens + 1,
            "prompt_tokens_details": null})
    },
};

const MESSAGES: Api = Api {
    path: "/v1/messages",
    kind: "messages",
    body: |prompt, system| {
        json!({"model": prompt.model, "cache_salt": prompt.salt, "max_tokens": 1, "system": system,
            "messages": [{"role": "user", "content": QUESTION}]})
    },
    usage: |tokens, cached| {
        json!({"input_tokens": tokens - cached, "output_tokens": 1,
            "cache_read_input_tokens": cached})
    },
    silent: |tokens, _| json!({"input_tokens": tokens, "output_tokens": 1}),
};

const RESPONSES: Api = Api {
    path: "/v1/responses",
    kind: "responses",
    body: |prompt, system| {
        json!({"model": prompt.model, "cache_salt": prompt.salt, "instructions": system,
            "input": QUESTION})
    },
    usage: |tokens, cached| {
        json!({"input_tokens": tokens, "output_tokens": 1, "total_tokens": tokens + 1,
            "input_tokens_details": {"cached_tokens": cached}})
    },
    silent: |tokens, _| {
        json!({"input_tokens": tokens, "output_tokens": 1, "total_tokens": tokens + 1,
            "input_tokens_details": {"cached_tokens": null}})
    },
};

const RESULTS: [&str; 5] = [
    "agree",
    "engine_misses",
    "engine_hits_more",
    "neutral",
    "unreported",
];
const APIS: [Api; 3] = [CHAT, MESSAGES, RESPONSES];

impl Gateway {
    async fn ask_api(&mut self, api: Api, prompt: &Prompt, system: &str, tells: bool) -> usize {
        let body = (api.body)(prompt, system);
        let usage = if tells { api.usage } else { api.silent };
        self.exchange(api.path, &body, prompt, usage).await
    }

    fn compared(&self, result: &str) -> u32 {
        let series = format!(
            "pinpod_kv_hit_compared_total{{endpoint_name=\"{}\",result=\"{result}\"}} ",
            self.endpoint
        );
        let text = exposition().render();
        let line = text.lines().find_map(|line| line.strip_prefix(&series));
        line.map_or(0, |count| count.parse().unwrap())
    }
}

#[tokio::test]
async fn all_apis_agree_on_what_is_cached() {
    let mut gateway = start("10.2.0.1:8000").await;
    let prompt = chat("base", SYSTEM);
    for api in APIS {
        for _ in 0..3 {
            gateway.ask_api(api, &prompt, SYSTEM, true).await;
        }
        for reason in [MISSES, MORE] {
            let alarm = gateway.broken_prompts(api.kind, "base", false, reason);
            assert_eq!(alarm.as_deref(), Some("0"), "{}", api.kind);
        }
    }
    // All but the very first.
    assert_eq!(gateway.compared("agree"), 8);
}

/// An engine that tells of some APIs only, as those do whose other server counts nothing.
#[tokio::test]
async fn an_api_that_does_not_tell_raises_no_alarm_whatever_others_tell() {
    let mut gateway = start("10.2.0.2:8000").await;
    let prompt = chat("base", SYSTEM);
    for (telling, silent) in [(CHAT, MESSAGES), (MESSAGES, RESPONSES), (RESPONSES, CHAT)] {
        let unreported = gateway.compared("unreported");
        for _ in 0..8 {
            for (api, tells) in [(telling, true), (silent, false)] {
                gateway.ask_api(api, &prompt, SYSTEM, tells).await;
            }
        }
        assert_eq!(gateway.compared("unreported"), unreported + 8);
    }
    for api in APIS {
        let alarm = gateway.broken_prompts(api.kind, "base", false, MISSES);
        assert_eq!(alarm.as_deref(), Some("0"), "{}", api.kind);
    }
    assert_eq!(gateway.compared("engine_misses"), 0);
}

/// vLLM does not read its cache for log probabilities of the prompt, and of several prompts it tells what
/// it found of the last.
#[tokio::test]
async fn answers_that_tell_nothing_of_the_cache_are_not_compared() {
    let mut gateway = start("10.2.0.3:8000").await;
    let prompt = chat("base", SYSTEM);
    let ids = &prompt.ids;
    gateway.ask(&prompt).await;
    gateway.ask(&prompt).await;
    let compared = |gateway: &Gateway| RESULTS.map(|result| gateway.compared(result));
    let before = compared(&gateway);
    assert_eq!(before, [1, 0, 0, 0, 0]);
    for more in [
        json!({"prompt_logprobs": 1}),
        json!({"prompt_logprobs": 0}),
        json!({"echo": true, "logprobs": 1}),
        json!({"prompt": [ids, ids, ids]}),
    ] {
        let mut body = json!({"model": "base", "prompt": ids});
        let fields = more.as_object().unwrap().clone();
        body.as_object_mut().unwrap().extend(fields);
        let usage = |tokens, _| (CHAT.usage)(tokens, 0);
        for _ in 0..6 {
            let path = "/v1/completions";
            gateway.exchange(path, &body, &prompt, usage).await;
        }
        assert_eq!(compared(&gateway), before, "{more}");
    }
    // What these leave as it is, counts.
    let body = json!({"model": "base", "prompt": ids, "echo": true, "logprobs": null, "prompt_logprobs": null});
    let usage = |tokens, _| (CHAT.usage)(tokens, 0);
    gateway
        .exchange("/v1/completions", &body, &prompt, usage)
        .await;
    assert_eq!(compared(&gateway), [1, 1, 0, 0, 0]);
}

/// Hits of what was computed before the picker came say nothing: no event of it can arrive any more.
#[tokio::test]
async fn what_the_engine_cached_before_the_picker_came_raises_no_alarm() {
    let mut gateway = start("10.2.0.4:8000").await;
    let (old, new) = (prompt(1), prompt(101));
    gateway.engine.seq = 500;
    gateway.engine.cached.extend(Engine::blocks(&old));
    gateway.ask(&new).await;
    for _ in 0..8 {
        assert_eq!(gateway.ask(&old).await, 48);
    }
    assert_eq!(gateway.broken("base", false, MORE).as_deref(), Some("0"));
    // What is missing of what events told is noticed all the same.
    for first in [201, 301, 401, 501, 601] {
        gateway.ask(&prompt(first)).await;
        let blocks = Engine::blocks(&prompt(first));
        for block in blocks {
            gateway.engine.cached.remove(&block);
        }
        gateway.ask(&prompt(first)).await;
    }
    assert_eq!(gateway.broken("base", false, MISSES).as_deref(), Some("1"));
    // A cache that was cleared is known in full, so that more hits are too many again.
    let cleared = b"\x93\xcb\x41\xd0\0\0\0\0\0\0\x91\x91\xb0AllBlocksCleared\0";
    gateway.engine.publish_raw(cleared).await;
    gateway.engine.cached.clear();
    gateway.engine.publishes = |prompt| Prompt {
        salt: Some("unknown to the picker"),
        ..prompt.clone()
    };
    assert_eq!(gateway.ask_until(&prompt(701), MORE, "1").await, 6);
}

/// What an engine does to the prompts of one API, or its events say of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Break {
    Template,
    Adapter,
    Salt,
}

/// Five prompts, each asked over an API where all is well, then over the broken one, then again.
async fn breaks(api: Api, what: Break, endpoint: &'static str) {
    let well = if api.kind == "chat" { MESSAGES } else { CHAT };
    let mut gateway = start(endpoint).await;
    gateway.engine.publishes = |prompt| Prompt {
        model: if prompt.model == "poet" {
            "poet-2"
        } else {
            prompt.model
        },
        salt: None,
        ..prompt.clone()
    };
    let model = if what == Break::Adapter {
        "poet"
    } else {
        "base"
    };
    for case in 0..5 {
        let alarm = gateway.broken_prompts(api.kind, model, false, MISSES);
        assert_ne!(alarm.as_deref(), Some("1"), "{what:?} after {case}");
        let system = format!("Case {case}. {SYSTEM}");
        let prompt = chat("base", &system);
        let mut broken = Prompt {
            model,
            ..prompt.clone()
        };
        match what {
            Break::Template => broken.ids.insert(0, 3),
            Break::Adapter => {}
            Break::Salt => {
                let salted = Prompt {
                    salt: Some("tenant"),
                    ..prompt.clone()
                };
                gateway.ask_api(api, &salted, &system, true).await;
            }
        }
        if what != Break::Salt {
            gateway.ask_api(well, &prompt, &system, true).await;
        }
        assert_eq!(gateway.ask_api(api, &broken, &system, true).await, 0);
        gateway.ask_api(well, &prompt, &system, true).await;
    }
    let alarm = |kind, model| gateway.broken_prompts(kind, model, false, MISSES);
    assert_eq!(alarm(api.kind, model).as_deref(), Some("1"), "{what:?}");
    assert_eq!(alarm(well.kind, "base").as_deref(), Some("0"), "{what:?}");
}

#[tokio::test]
async fn what_breaks_in_chats_is_noticed() {
    breaks(CHAT, Break::Template, "10.2.1.1:8000").await;
    breaks(CHAT, Break::Adapter, "10.2.1.2:8000").await;
    breaks(CHAT, Break::Salt, "10.2.1.3:8000").await;
}

#[tokio::test]
async fn what_breaks_in_anthropic_messages_is_noticed() {
    breaks(MESSAGES, Break::Template, "10.2.2.1:8000").await;
    breaks(MESSAGES, Break::Adapter, "10.2.2.2:8000").await;
    breaks(MESSAGES, Break::Salt, "10.2.2.3:8000").await;
}

#[tokio::test]
async fn what_breaks_in_responses_is_noticed() {
    breaks(RESPONSES, Break::Template, "10.2.3.1:8000").await;
    breaks(RESPONSES, Break::Adapter, "10.2.3.2:8000").await;
    breaks(RESPONSES, Break::Salt, "10.2.3.3:8000").await;
}
