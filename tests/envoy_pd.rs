//! Prefill and decode on pods of their own: the real Envoy, the picker with the shipped configuration,
//! sidecars and simulated engines. What a client gets, what the engines did, and that nothing is left.

#[path = "envoy_pd/aborts.rs"]
mod aborts;
#[path = "envoy_pd/failures.rs"]
mod failures;
#[path = "envoy_pd/pods.rs"]
mod pods;
#[path = "envoy_pd/ranks.rs"]
mod ranks;

use std::io::Read;
use std::net::TcpStream;
use std::time::Duration;

use serde_json::Value;

use super::begin;
use pods::{Ask, EPD, Layout, Split, grown, text};

/// Real time, and blocks that take three seconds from pod to pod: 2,048 tokens of 128 KiB.
const SLOW_ENGINES: &[&str] = &["--time-scale=1", "--kv-lease-seconds=5"];
const SLOW_TRANSFER: &[&str] = &["--kv-bytes-per-second=9e7"];

fn sum(counts: &[i64]) -> i64 {
    counts.iter().sum()
}

/// Requests that prefill and decode engines received, and tokens of prompts that were handed over.
async fn seen(split: &Split) -> [i64; 3] {
    [
        sum(&split.prefill("received").await),
        sum(&split.decode("received").await),
        sum(&split.decode("pulled_prompt_tokens").await),
    ]
}

#[tokio::test]
async fn long_cold_prompts_are_prefilled_elsewhere_and_no_others() {
    let split = Layout::default().start().await;
    let rivers = |tokens| Ask::new(text("rivers", tokens));
    let streamed = |ask: Ask| Ask {
        streamed: true,
        ..ask
    };
    let chat = |ask: Ask| Ask { chat: true, ..ask };
    let forged = |ask: Ask| Ask {
        headers: &[
            ("x-prefiller-host-port", "192.0.2.1:1"),
            ("x-kv-cache-source-host-port", "192.0.2.1:1"),
            ("x-data-parallel-host-port", "192.0.2.1:1"),
        ],
        ..ask
    };
    // The document splits from 512 tokens that are missing.
    let table = [
        ("short", Ask::new("hello"), false),
        ("short and streamed", streamed(Ask::new("hello")), false),
        ("just short enough", Ask::new(text("lamps", 500)), false),
        ("long", rivers(1000), true),
        ("the same again", rivers(1000), false),
        ("a little longer", rivers(1300), false),
        ("much longer", rivers(3000), true),
        ("streamed", streamed(Ask::new(text("boats", 1000))), true),
        ("a chat", chat(Ask::new(text("birds", 1000))), true),
        (
            "a chat, again",
            streamed(chat(Ask::new(text("birds", 1000)))),
            false,
        ),
        (
            "a streamed chat",
            streamed(chat(Ask::new(text("roads", 1000)))),
            true,
        ),
        ("forged, short", forged(Ask::new("hello")), false),
        ("forged, long", forged(Ask::new(text("towns", 1000))), true),
    ];
    for (what, ask, split_up) in table {
        let before = seen(&split).await;
        let (cached, prompts) = (
            split.decode("cached_prompt_tokens").await,
            split.prefill("prompt_tokens").await,
        );
        let said = split.ask_well(&ask).await;
        split.nothing_left().await;
        let [prefills, decodes, pulled] = {
            let after = seen(&split).await;
            let grown = grown(&before, &after);
            [grown[0], grown[1], grown[2]]
        };
        assert_eq!((prefills, decodes), (i64::from(split_up), 1), "{what}");
        let prompt = i64::try_from(said.prompt_tokens).unwrap();
        let prefilled = sum(&grown(&prompts, &split.prefill("prompt_tokens").await));
        let cached = sum(&grown(&cached, &split.decode("cached_prompt_tokens").await));
        if split_up {
            assert_eq!(prefilled, prompt, "{what}");
            // All but the last token, which every request computes for itself.
            assert_eq!(pulled + cached, prompt - 1, "{what}");
            assert!(pulled >= 512 - 16, "{what}: {pulled}");
        } else {
            assert_eq!((prefilled, pulled), (0, 0), "{what}");
        }
    }
    assert_eq!(split.served("prefill_decode").await, 6.0);
    assert_eq!(split.served("decode_only").await, 7.0);
    assert_eq!(split.served("error").await, 0.0);
    let failed = split.sidecar_metric("pinpod_sidecar_denied_targets_total");
    assert_eq!(failed.await, 0.0, "no forged header came through");
    assert_eq!(split.prefill("expired").await, [0, 0], "all was fetched");
}

#[tokio::test]
async fn an_endpoint_that_is_not_allowed_is_never_called() {
    let layout = Layout {
        decode: 1,
        allowed: &[1],
        ..Layout::default()
    };
    let split = layout.start().await;
    for topic in ["rivers", "lamps", "boats", "birds"] {
        split.ask_well(&Ask::new(text(topic, 1000))).await;
    }
    assert_eq!(
        split.prefill("received").await,
        [0, 4],
        "the other one did it"
    );
    // Nobody is left who may be asked.
    split.keep_prefill(0..1);
    let refusal = "Forbidden: prefill target not allowed by SSRF protection\n";
    let mut number = 0;
    let refused = loop {
        number += 1;
        let answer = split
            .ask(&Ask::new(text(&format!("towns {number}"), 1000)))
            .await;
        if answer.status != 200 {
            break answer;
        }
        assert!(number < 1000, "the picker reads its file");
    };
    assert_eq!(
        (refused.status.as_u16(), refused.text().as_str()),
        (403, refusal)
    );
    split.ask_well(&Ask::new("hello")).await;
    split.nothing_left().await;
    assert_eq!(split.prefill("received").await[0], 0);
    // Everybody else was served by the allowed one, then one was refused.
    let decoded = sum(&split.decode("received").await);
    assert_eq!(decoded, 4 + (number - 1) + 1);
    assert_eq!(split.served("error").await, 1.0);
    assert!(
        split
            .sidecar_metric("pinpod_sidecar_denied_targets_total")
            .await
            >= 5.0
    );
}

/// Reads what there is of an answer, at least its head and something of its body.
fn read_some(stream: &mut TcpStream) -> String {
    stream
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    let mut text = String::new();
    let mut buffer = [0; 4096];
    while !text.contains("data: ") {
        let read = stream.read(&mut buffer).unwrap();
        assert!(read > 0, "{text}");
        text += &String::from_utf8_lossy(&buffer[..read]);
    }
    text
}

/// Sends the request and waits for the first event of its stream.
async fn stream_of(split: &Split, body: &str) -> (TcpStream, String) {
    let mut stream = begin(&split.gateway, body, body.len());
    let reading = tokio::task::spawn_blocking(move || {
        let text = read_some(&mut stream);
        (stream, text)
    });
    let (stream, text) = reading.await.unwrap();
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
    (stream, text)
}

/// One prefill and one decode pod, with a sidecar, in real time.
async fn slow_pair() -> Split {
    let layout = Layout {
        prefill: 1,
        decode: 1,
        engine_flags: SLOW_ENGINES,
        decode_flags: SLOW_TRANSFER,
        allowed: &[0],
        ..Layout::default()
    };
    layout.start().await
}

#[tokio::test]
async fn images_are_encoded_elsewhere_and_by_another_one_if_need_be() {
    let layout = Layout {
        document: EPD,
        encode: 2,
        decode: 1,
        sidecar_flags: &["--ec-connector=ec-example", "--encode-timeout=3s"],
        ..Layout::default()
    };
    let mut split = layout.start().await;
    split.ask_well(&Ask::new("hello")).await;
    split.nothing_left().await;
    let held = split.held().await;
    assert_eq!(split.encode("received").await, [0, 0]);
    let ask = |topic: &str, streamed| Ask {
        chat: true,
        streamed,
        images: &["https://pictures.test/a.png", "https://pictures.test/b.png"],
        ..Ask::new(text(topic, 1000))
    };
    let before = seen(&split).await;
    split.ask_well(&ask("rivers", false)).await;
    assert_eq!(split.encode("received").await, [1, 1], "an image each");
    let after = seen(&split).await;
    assert_eq!((after[0] - before[0], after[1] - before[1]), (1, 1));
    assert!(after[2] - before[2] > 900, "and the prompt was handed over");

    for (number, fault) in ["error500", "drop", "garbage-is-not-read", "hang", "killed"]
        .iter()
        .enumerate()
    {
        let before = split.encode("received").await[1];
        match *fault {
            // What an encode engine answers is not looked at by this connector.
            "garbage-is-not-read" => split.encode[0].fault("garbage").await,
            "killed" => split.encode[0].kill(),
            mode => split.encode[0].fault(mode).await,
        }
        let ask = ask(&format!("lamps {number}"), number % 2 == 0);
        split.ask_well(&ask).await;
        let by_the_other = split.encode("received").await[1] - before;
        let wanted = if *fault == "garbage-is-not-read" {
            1
        } else {
            2
        };
        assert_eq!(by_the_other, wanted, "{fault}");
    }
    // Nobody is left: the client hears it, no prompt is computed, nothing stays behind.
    let before = seen(&split).await;
    split.encode[1].fault("error503").await;
    let failed = split.ask(&ask("boats", true)).await;
    let error: Value = serde_json::from_slice(&failed.body).unwrap();
    assert_eq!(
        (failed.status.as_u16(), &error["type"]),
        (502, &"BadGateway".into())
    );
    assert_eq!(seen(&split).await, before);
    split.encode[0].again().await;
    split.ask_well(&ask("birds", false)).await;
    split.back_to(&held).await;
}
