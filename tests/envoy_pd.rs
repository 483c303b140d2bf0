//! Prefill and decode on pods of their own: the real Envoy, the picker with the shipped configuration,
//! sidecars and simulated engines. What a client gets, what the engines did, and that nothing is left.

#[path = "envoy_pd/pods.rs"]
mod pods;
#[path = "envoy_pd/ranks.rs"]
mod ranks;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

use super::begin;
use super::support::post_with;
use pods::{Ask, EPD, Layout, Pod, Said, Split, grown, text, until, until_count};

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

/// What the engine of the first choice does instead of its work.
async fn prefill_fails(split: &mut Split, fault: &str, both: bool) {
    let topic = format!("{fault} {both}");
    let ask = Ask {
        streamed: both,
        ..Ask::new(text(&topic, 1000))
    };
    let before = split.prefill("received").await;
    split.ask_well(&ask).await;
    split.nothing_left().await;
    // Who has half of the prompt is asked first for all of it.
    let grown_by = grown(&before, &split.prefill("received").await);
    let first = grown_by.iter().position(|n| *n == 1).unwrap();
    let bad: Vec<usize> = if both { vec![0, 1] } else { vec![first] };
    for number in &bad {
        match fault {
            "killed" => split.prefill[*number].kill(),
            mode => split.prefill[*number].fault(mode).await,
        }
    }

    let before = seen(split).await;
    let local = split.served("local_prefill").await;
    let failures = "pinpod_sidecar_leg_failures_total{stage=\"prefill\"}";
    let failed = split.sidecar_metric(failures).await;
    let whole = Ask {
        prompt: text(&topic, 3000),
        ..ask
    };
    split.ask_well(&whole).await;
    split.nothing_left().await;

    let after = seen(split).await;
    let [prefills, decodes, pulled] = [0, 1, 2].map(|n| after[n] - before[n]);
    let local = split.served("local_prefill").await - local;
    assert_eq!(decodes, 1, "{topic}");
    // The next one did it, or the decode engine itself.
    assert_eq!(pulled > 0, !both, "{topic}");
    assert_eq!(local, f64::from(u8::from(both)), "{topic}");
    if fault != "killed" {
        assert_eq!(prefills, 2, "{topic}: each was asked once");
    }
    let failed = split.sidecar_metric(failures).await - failed;
    assert_eq!(failed, bad.len() as f64, "{topic}");
    for number in bad {
        match fault {
            "killed" => split.prefill[number].again().await,
            _ => split.prefill[number].fault("none").await,
        }
    }
}

#[tokio::test]
async fn a_failed_prefill_is_done_by_the_next_or_by_the_decode_engine() {
    let flags = [
        "--time-scale=50",
        "--kv-lease-seconds=3",
        "--max-model-len=20000",
    ];
    let layout = Layout {
        decode: 1,
        engine_flags: &flags,
        ..Layout::default()
    };
    let mut split = layout.start().await;
    split.ask_well(&Ask::new("hello")).await;
    split.nothing_left().await;
    let held = split.held().await;
    for fault in [
        "killed",
        "error500",
        "error503",
        "drop",
        "garbage",
        "drop-mid-response",
    ] {
        for both in [false, true] {
            prefill_fails(&mut split, fault, both).await;
        }
    }

    // What no engine would do is refused by the first, in its words.
    let before = seen(&split).await;
    let ask = Ask::new(text("endless", 20_001));
    let refused = split.ask(&ask).await;
    assert_eq!(refused.status, 400);
    assert!(refused.text().contains("maximum context length is 20000"));
    let after = seen(&split).await;
    assert_eq!((after[0] - before[0], after[1] - before[1]), (1, 0));

    split.back_to(&held).await;
    // Of answers that were cut off the blocks were kept, by one and by both.
    assert_eq!(sum(&split.prefill("expired").await), 3);
}

#[tokio::test]
async fn a_prefill_that_hangs_is_given_up() {
    let layout = Layout {
        decode: 1,
        sidecar_flags: &["--prefill-timeout=3s"],
        ..Layout::default()
    };
    let mut split = layout.start().await;
    split.ask_well(&Ask::new("hello")).await;
    split.nothing_left().await;
    let held = split.held().await;
    for both in [false, true] {
        prefill_fails(&mut split, "hang", both).await;
    }
    split.back_to(&held).await;
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

#[tokio::test]
async fn a_client_that_leaves_at_any_stage_leaves_nothing_behind() {
    let layout = Layout {
        prefill: 1,
        decode: 1,
        engine_flags: SLOW_ENGINES,
        decode_flags: SLOW_TRANSFER,
        allowed: &[0],
        ..Layout::default()
    };
    let split = layout.start().await;
    split.ask_well(&Ask::new("hello")).await;
    split.nothing_left().await;
    let held = split.held().await;
    let aborted = async || {
        [
            split.prefill("aborted").await[0],
            split.decode("aborted").await[0],
        ]
    };

    // While the body uploads: nobody behind Envoy hears of it, and of a sidecar only that.
    let before = seen(&split).await;
    let body = Ask::new(text("upload", 2000)).body();
    let stream = begin(&split.gateway, &body, body.len() / 2);
    until("Envoy has the request", async || {
        let admin = SocketAddr::from(([127, 0, 0, 1], split.gateway.envoy.admin));
        let stats = super::support::get(admin, "/stats?filter=http.inference.downstream_rq_active");
        let stats = stats.await.unwrap().text();
        stats
            .contains("downstream_rq_active: 1\n")
            .then_some(())
            .ok_or(stats)
    })
    .await;
    stream.shutdown(Shutdown::Both).unwrap();
    split.nothing_left().await;
    let connections = async || {
        split.sidecars[0].state().await["connections"]
            .as_u64()
            .unwrap()
    };
    let idle = connections().await;
    let mut stream = TcpStream::connect(split.sidecars[0].address()).unwrap();
    let head = format!(
        "POST {} HTTP/1.1\r\nhost: t\r\nx-prefiller-host-port: {}\r\ncontent-length: {}\r\n\r\n",
        super::COMPLETIONS,
        split.prefill[0].address(),
        body.len(),
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream
        .write_all(&body.as_bytes()[..body.len() / 2])
        .unwrap();
    let at_least = async |wanted: u64| {
        let now = connections().await;
        (now >= wanted).then_some(()).ok_or(format!("{now}"))
    };
    until("the sidecar has the connection", async || {
        at_least(idle + 1).await
    })
    .await;
    drop(stream);
    split.nothing_left().await;
    assert_eq!(seen(&split).await, before);

    // While the prompt is computed: 120,000 tokens of 32 us.
    let before = (seen(&split).await, aborted().await);
    let body = Ask::new(text("prefill", 120_000)).body();
    let stream = begin(&split.gateway, &body, body.len());
    until_count(&split.prefill, "running", 1).await;
    stream.shutdown(Shutdown::Both).unwrap();
    split.nothing_left().await;
    let after = (seen(&split).await, aborted().await);
    assert_eq!(grown(&before.0, &after.0), [1, 0, 0], "no decode was begun");
    assert_eq!(grown(&before.1, &after.1), [1, 0]);
    assert_eq!(split.prefill("expired").await, [0], "nothing was kept");

    // While blocks go from pod to pod: the decode engine never began, and the lease ends.
    let before = (split.decode("finished").await, aborted().await);
    let body = Ask::new(text("transfer", 2048)).body();
    let stream = begin(&split.gateway, &body, body.len());
    until_count(&split.decode, "unanswered", 1).await;
    assert_eq!(split.prefill("kept").await, [1]);
    stream.shutdown(Shutdown::Both).unwrap();
    split.nothing_left().await;
    assert_eq!((split.decode("finished").await, aborted().await), before);
    assert_eq!(split.prefill("expired").await, [1]);

    // While the answer streams, and while a whole one is made. 1,000 tokens take 7 seconds.
    let ask = |topic, streamed| Ask {
        streamed,
        max_tokens: 1000,
        ..Ask::new(text(topic, 600))
    };
    let before = aborted().await;
    let (stream, _) = stream_of(&split, &ask("stream", true).body()).await;
    stream.shutdown(Shutdown::Both).unwrap();
    split.nothing_left().await;
    assert_eq!(grown(&before, &aborted().await), [0, 1]);
    let body = ask("whole", false).body();
    let stream = begin(&split.gateway, &body, body.len());
    until_count(&split.decode, "running", 1).await;
    stream.shutdown(Shutdown::Both).unwrap();
    split.nothing_left().await;
    assert_eq!(grown(&before, &aborted().await), [0, 2]);
    assert_eq!(split.prefill("expired").await, [1], "blocks were fetched");

    split.back_to(&held).await;
    assert!(split.gateway.metric("pinpod_aborted_requests_total").await >= 4.0);
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

/// Reads the rest of an answer; a chunked one that is whole ends with an empty chunk.
async fn rest_of(mut stream: TcpStream) -> String {
    let reading = tokio::task::spawn_blocking(move || {
        let mut rest = Vec::new();
        // Cut off, it may end with a reset.
        let _ = stream.read_to_end(&mut rest);
        String::from_utf8_lossy(&rest).into_owned()
    });
    reading.await.unwrap()
}

#[tokio::test]
async fn a_decode_pod_that_restarts_fails_its_requests_and_no_later_ones() {
    let mut split = slow_pair().await;
    split.ask_well(&Ask::new("hello")).await;
    split.nothing_left().await;
    let held = split.held().await;
    let streamed = Ask {
        streamed: true,
        max_tokens: 1000,
        ..Ask::new(text("rivers", 600))
    };

    // The engine dies while it streams: the stream is cut off, which the client can tell.
    let (stream, _) = stream_of(&split, &streamed.body()).await;
    split.decode[0].kill();
    let rest = rest_of(stream).await;
    assert!(
        !rest.contains("[DONE]") && !rest.ends_with("0\r\n\r\n"),
        "{rest}"
    );
    split.nothing_left().await;
    assert_eq!(
        split.prefill("expired").await,
        [0],
        "its blocks were fetched before"
    );
    // Away, it is not ready; back, it computes what the picker believes to be cached.
    let unready = |answer: &super::support::Answer| {
        let body: Value = serde_json::from_slice(&answer.body).unwrap();
        assert_eq!(
            (answer.status.as_u16(), &body["object"]),
            (503, &"error".into())
        );
        assert_eq!(body["type"], "ServiceUnavailable");
        assert_eq!((&body["code"], &body["param"]), (&503.into(), &"".into()));
    };
    let short = Ask::new(text("rivers", 600));
    unready(&split.ask(&short).await);
    split.decode[0].again().await;
    split.ask_well(&short).await;

    // It dies while the prompt is computed elsewhere: nobody fetches the blocks, the lease ends.
    let before = split.prefill("finished").await;
    let long = Ask::new(text("lamps", 60_000));
    let body = long.body();
    let asking = begin(&split.gateway, &body, body.len());
    until_count(&split.prefill, "running", 1).await;
    split.decode[0].kill();
    let reading = tokio::task::spawn_blocking(move || {
        let mut asking = asking;
        asking
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        let mut head = [0; 12];
        asking.read_exact(&mut head).unwrap();
        String::from_utf8_lossy(&head).into_owned()
    });
    assert_eq!(reading.await.unwrap(), "HTTP/1.1 503");
    split.nothing_left().await;
    assert_eq!(grown(&before, &split.prefill("finished").await), [1]);
    assert_eq!(split.prefill("expired").await, [1]);
    split.decode[0].again().await;

    // The whole pod dies while it streams, and Envoy has nobody to ask until it is back.
    let other = Ask {
        prompt: text("boats", 600),
        ..streamed
    };
    let (stream, _) = stream_of(&split, &other.body()).await;
    split.sidecars[0].kill();
    split.decode[0].kill();
    let rest = rest_of(stream).await;
    assert!(
        !rest.contains("[DONE]") && !rest.ends_with("0\r\n\r\n"),
        "{rest}"
    );
    assert_eq!(split.ask(&short).await.status, 503);
    split.nothing_left().await;
    split.decode[0].again().await;
    split.sidecars[0].again().await;
    split.ask_well(&short).await;
    split.ask_well(&Ask::new(text("birds", 1000))).await;
    assert_eq!(split.decode("pulled_prompt_tokens").await, [999]);
    split.back_to(&held).await;
}

#[tokio::test]
async fn a_prefill_pod_that_dies_costs_time_and_nothing_else() {
    let mut split = slow_pair().await;
    split.ask_well(&Ask::new("hello")).await;
    split.nothing_left().await;
    let held = split.held().await;

    // While it computes.
    let ask = Ask::new(text("rivers", 60_000));
    let (answer, ()) = tokio::join!(split.ask(&ask), async {
        until_count(&split.prefill, "running", 1).await;
        split.prefill[0].signal("KILL");
    });
    assert_eq!(Said::of(&answer, &ask), split.alone(&ask).await);
    split.prefill[0].kill();
    split.prefill[0].again().await;
    assert_eq!(split.served("local_prefill").await, 1.0);
    assert_eq!(split.decode("pulled_prompt_tokens").await, [0]);

    // After its answer and before its blocks were fetched: the decode engine fails, and is asked again
    // without them.
    for (streamed, chat) in [(false, false), (true, false), (true, true)] {
        let ask = Ask {
            streamed,
            chat,
            ..Ask::new(text(&format!("lamps {streamed} {chat}"), 2048))
        };
        let before = split.decode("received").await;
        let (answer, ()) = tokio::join!(split.ask(&ask), async {
            until_count(&split.decode, "unanswered", 1).await;
            split.prefill[0].signal("KILL");
        });
        assert_eq!(Said::of(&answer, &ask), split.alone(&ask).await);
        assert_eq!(grown(&before, &split.decode("received").await), [2]);
        split.prefill[0].kill();
        split.prefill[0].again().await;
    }
    assert_eq!(split.decode("failed_pulls").await, [3]);
    assert_eq!(split.decode("pulled_prompt_tokens").await, [0]);
    assert_eq!(split.served("local_prefill").await, 4.0);

    // Back, it is asked again.
    split.ask_well(&Ask::new(text("boats", 1000))).await;
    assert_eq!(split.decode("pulled_prompt_tokens").await, [999]);
    split.back_to(&held).await;
}

#[tokio::test]
async fn a_pod_that_is_told_to_end_finishes_what_it_has() {
    let mut split = slow_pair().await;
    let streamed = Ask {
        streamed: true,
        max_tokens: 200,
        ..Ask::new(text("rivers", 600))
    };
    let (stream, begun) = stream_of(&split, &streamed.body()).await;
    let sidecar = &split.sidecars[0];
    sidecar.signal("TERM");
    until("it listens no more", async || {
        let connected = TcpStream::connect(sidecar.address());
        connected.err().map(drop).ok_or("it does".to_owned())
    })
    .await;
    stream
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    let reading = tokio::task::spawn_blocking(move || {
        let (mut stream, mut answer) = (stream, begun);
        let mut buffer = [0; 4096];
        while !answer.ends_with("0\r\n\r\n") {
            let read = stream.read(&mut buffer).unwrap();
            assert!(read > 0, "{answer}");
            answer += &String::from_utf8_lossy(&buffer[..read]);
        }
        answer
    });
    let answer = reading.await.unwrap();
    // 200 tokens one by one, usage, and the end mark.
    assert_eq!(answer.matches("data: ").count(), 202, "{answer}");
    assert!(answer.contains("data: [DONE]"), "{answer}");
    split.sidecars[0].ended().await;
    split.nothing_left().await;
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

#[tokio::test]
async fn engines_that_share_a_store_or_work_at_once_are_left_by_their_clients_too() {
    let layout = Layout {
        prefill: 1,
        decode: 1,
        engine_flags: SLOW_ENGINES,
        allowed: &[0],
        ..Layout::default()
    };
    let mut split = layout.start().await;
    let target = split.prefill[0].address().to_string();
    for (number, (connector, at_once)) in [
        ("shared-storage", false),
        ("offloading", false),
        ("sglang", true),
    ]
    .into_iter()
    .enumerate()
    {
        let flags = [format!("--kv-connector={connector}")];
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        let directory = split.gateway.directory.path().to_owned();
        let engine = split.decode[0].port;
        // In place of the one that the picker knows.
        let sidecar = Pod::sidecar(number + 1, engine, &target, &flags, &directory).await;
        split.sidecars[0] = sidecar;
        let address = split.sidecars[0].address();
        let headers = [("x-prefiller-host-port", target.as_str())];
        let before = seen(&split).await;
        for streamed in [false, true] {
            let ask = Ask {
                streamed,
                ..Ask::new(text(connector, 600))
            };
            let answer = post_with(address, ask.path(), ask.body(), &headers).await;
            assert_eq!(
                Said::of(&answer, &ask),
                split.alone(&ask).await,
                "{connector}"
            );
        }
        assert_eq!(
            grown(&before, &seen(&split).await)[..2],
            [2, 2],
            "{connector}"
        );

        // The client leaves while the prompt is computed: 100,000 tokens of 32 us.
        let before = [
            split.prefill("aborted").await[0],
            split.decode("aborted").await[0],
        ];
        let body = Ask::new(text(connector, 100_000)).body();
        let mut stream = TcpStream::connect(address).unwrap();
        let head = format!(
            "POST {} HTTP/1.1\r\nhost: t\r\nx-prefiller-host-port: {target}\r\ncontent-length: {}\r\n\r\n",
            super::COMPLETIONS,
            body.len(),
        );
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(body.as_bytes()).unwrap();
        until_count(&split.prefill, "running", 1).await;
        until_count(&split.decode, "running", i64::from(at_once)).await;
        drop(stream);
        split.nothing_left().await;
        let after = [
            split.prefill("aborted").await[0],
            split.decode("aborted").await[0],
        ];
        assert_eq!(
            grown(&before, &after),
            [1, i64::from(at_once)],
            "{connector}"
        );
    }
}

/// One of many requests at once, some of whose clients leave.
async fn some_request(split: &Split, number: usize) {
    let mut rng = fastrand::Rng::with_seed(number as u64);
    let tokens = rng.usize(1..2000);
    let ask = Ask {
        chat: rng.bool(),
        streamed: rng.bool(),
        max_tokens: rng.usize(1..60),
        // Some know each other.
        ..Ask::new(text(&format!("topic {}", rng.u8(..40)), tokens))
    };
    if rng.u8(..3) > 0 {
        let answer = split.ask(&ask).await;
        assert_eq!(Said::of(&answer, &ask), split.alone(&ask).await, "{number}");
        return;
    }
    let body = ask.body();
    let sent = if rng.bool() {
        body.len()
    } else {
        rng.usize(..body.len())
    };
    let stream = begin(&split.gateway, &body, sent);
    tokio::time::sleep(Duration::from_millis(rng.u64(..60))).await;
    // Where it was by then does not matter.
    let _ = stream.shutdown(Shutdown::Both);
}

#[tokio::test]
async fn a_storm_of_failures_and_aborts_leaves_nothing_behind() {
    const WAVE: usize = 24;
    let layout = Layout {
        engine_flags: &["--time-scale=20", "--kv-lease-seconds=5"],
        ..Layout::default()
    };
    let split = std::sync::Arc::new(layout.start().await);
    split.ask_well(&Ask::new("hello")).await;
    split.nothing_left().await;
    let held = split.held().await;
    let faults = [
        "none",
        "error500",
        "drop",
        "garbage",
        "drop-mid-response",
        "error503",
    ];
    for (wave, fault) in faults.iter().cycle().take(12).enumerate() {
        split.prefill[wave % 2].fault(fault).await;
        let requests = (0..WAVE).map(|n| {
            let split = std::sync::Arc::clone(&split);
            tokio::spawn(async move { some_request(&split, wave * WAVE + n).await })
        });
        let requests: Vec<_> = requests.collect();
        for request in requests {
            request.await.unwrap();
        }
        split.prefill[wave % 2].fault("none").await;
    }
    assert!(
        split.served("prefill_decode").await > 20.0,
        "prompts were split"
    );
    let failures = "pinpod_sidecar_leg_failures_total{stage=\"prefill\"}";
    assert!(
        split.sidecar_metric(failures).await > 5.0,
        "prefills failed"
    );
    // Each of a wave may leave a connection of its own to be used again.
    split.back_to_within(&held, 2 * WAVE).await;
    assert!(split.gateway.metric("pinpod_aborted_requests_total").await > 5.0);
}
