//! Clients that leave, at every stage, and a crowd of them among failing pods.

use std::io::Write;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use super::super::support::{get, post_with};
use super::super::{COMPLETIONS, begin};
use super::pods::{Ask, Layout, Pod, Said, Split, grown, text, until, until_count};
use super::{SLOW_ENGINES, seen, slow_pair, stream_of};

#[tokio::test]
async fn a_client_that_leaves_at_any_stage_leaves_nothing_behind() {
    let split = slow_pair().await;
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
        let stats = get(admin, "/stats?filter=http.inference.downstream_rq_active");
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
        COMPLETIONS,
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
            COMPLETIONS,
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
    let split = Arc::new(layout.start().await);
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
            let split = Arc::clone(&split);
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
