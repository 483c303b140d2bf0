//! Pods that fail, die, restart or are told to end: the outcome for the client, and for everybody else.

use std::io::Read;
use std::net::TcpStream;
use std::time::Duration;

use serde_json::Value;

use super::super::begin;
use super::super::support::Answer;
use super::pods::{Ask, Layout, Said, Split, grown, text, until, until_count};
use super::{seen, slow_pair, stream_of, sum};

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
            chat,
            streamed,
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
    let unready = |answer: &Answer| {
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
