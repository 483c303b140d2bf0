//! What the client gets when a stage fails, and that nothing is left behind.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::super::settings::PrefillFallback;
use super::*;

const BODY: &str = r#"{"max_tokens":5}"#;

fn quick() -> Settings {
    Settings {
        prefill_timeout: Some(Duration::from_millis(200)),
        ..Settings::default()
    }
}

async fn ask(sidecar: &Running, targets: &str) -> Answered {
    let answer = sidecar
        .ask(CHAT, &[("x-prefiller-host-port", targets)], BODY)
        .await;
    sidecar.nothing_left().await;
    answer
}

#[tokio::test]
async fn a_failed_prefill_is_done_by_the_next_or_here() {
    for act in [
        Act::Hang,
        Act::Die,
        Act::Reply(500, "application/json", "{}".into()),
        Act::Reply(503, "application/json", "{}".into()),
        Act::Reply(429, "application/json", "{}".into()),
        Act::Break(vec!["{".into()]),
        Act::json("<html>"),
        Act::json(r#"{"kv_transfer_params":{"do_remote_prefill":true}}"#),
    ] {
        let bad = Engine::start([act.clone()]).await;
        let good = Engine::start([prefilled(1)]).await;
        let decode = Engine::start([Act::json("{}")]).await;
        let sidecar = Running::start(&decode, quick()).await;

        let answer = ask(&sidecar, &format!("{},{}", bad.address, good.address)).await;
        assert_eq!(answer.status, 200, "{act:?}");
        assert_eq!(good.seen().len(), 1, "{act:?}: the next one is asked");
        assert!(decode.only().body.contains(PARAMS), "{act:?}");

        let answer = ask(&sidecar, &bad.address.to_string()).await;
        assert_eq!(answer.status, 200, "{act:?}");
        assert_eq!(decode.seen()[1].body, BODY, "{act:?}: read here");
        until(|| bad.open() == 0).await;
    }
}

#[tokio::test]
async fn a_prefill_endpoint_that_is_gone_is_passed_over() {
    let gone = Engine::start([Act::Hang]).await.address;
    let decode = Engine::start([Act::json("{}")]).await;
    let sidecar = Running::start(&decode, quick()).await;
    assert_eq!(ask(&sidecar, &gone.to_string()).await.status, 200);
    assert_eq!(decode.only().body, BODY);
}

#[tokio::test]
async fn a_refused_request_is_not_tried_elsewhere() {
    let refusal = r#"{"error":{"message":"too long"}}"#;
    let bad = Engine::start([Act::Reply(400, "application/json", refusal.into())]).await;
    let other = Engine::start([prefilled(1)]).await;
    let decode = Engine::start([Act::json("{}")]).await;
    let sidecar = Running::start(&decode, quick()).await;
    let answer = ask(&sidecar, &format!("{},{}", bad.address, other.address)).await;
    assert_eq!(
        (answer.status.as_u16(), answer.body.as_str()),
        (400, refusal)
    );
    assert_eq!(answer.headers["x-engine"], "kept");
    assert!(other.seen().is_empty() && decode.seen().is_empty());
}

#[tokio::test]
async fn the_failure_itself_when_that_is_wanted() {
    for (act, status) in [
        (Act::Hang, 504),
        (Act::Die, 502),
        (Act::json("<html>"), 502),
        (Act::Reply(500, "application/json", "{}".into()), 500),
    ] {
        let bad = Engine::start([act]).await;
        let decode = Engine::start([Act::json("{}")]).await;
        let settings = Settings {
            prefill_fallback: PrefillFallback::Error,
            ..quick()
        };
        let sidecar = Running::start(&decode, settings).await;
        let answer = ask(&sidecar, &bad.address.to_string()).await;
        assert_eq!(answer.status.as_u16(), status);
        assert!(decode.seen().is_empty());
    }
}

#[tokio::test]
async fn blocks_that_cannot_be_fetched_are_computed_here() {
    let lost = Act::Reply(500, "application/json", r#"{"error":{}}"#.into());
    let role = "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"finish_reason\":null}]}\n\n";
    let error = "data: {\"error\": {\"code\": 500}}\n\n";
    let word = "data: {\"choices\":[{\"delta\":{\"content\":\"x\"},\"finish_reason\":null}]}\n\n";
    let stream = |pieces: &[&str]| Act::Stream(pieces.iter().map(|p| (*p).to_owned()).collect());
    // A stream has begun by then: it is its first event, or the one behind the role.
    for (first, whole, calls) in [
        (stream(&[error, "data: [DONE]\n\n"]), "{}".to_owned(), 2),
        (stream(&[role, error]), "{}".to_owned(), 2),
        (
            stream(&[role, word, error]),
            [role, word, error].concat(),
            1,
        ),
        (stream(&[role, word]), [role, word].concat(), 1),
    ] {
        let prefill = Engine::start([prefilled(1)]).await;
        let decode = Engine::start([first, Act::json("{}")]).await;
        let sidecar = Running::start(&decode, quick()).await;
        let answer = ask(&sidecar, &prefill.address.to_string()).await;
        assert_eq!((answer.body, decode.seen().len()), (whole, calls));
    }
    for (prefill_act, fallback, second, status, calls) in [
        (
            prefilled(1),
            PrefillFallback::Local,
            Act::json("{}"),
            200,
            2,
        ),
        (prefilled(1), PrefillFallback::Local, lost.clone(), 500, 2),
        (
            prefilled(1),
            PrefillFallback::Error,
            Act::json("{}"),
            500,
            1,
        ),
        // Nothing was to be fetched: the failure is the engine's own.
        (
            Act::json("{}"),
            PrefillFallback::Local,
            Act::json("{}"),
            500,
            1,
        ),
    ] {
        let prefill = Engine::start([prefill_act]).await;
        let decode = Engine::start([lost.clone(), second]).await;
        let settings = Settings {
            prefill_fallback: fallback,
            ..quick()
        };
        let sidecar = Running::start(&decode, settings).await;
        let answer = ask(&sidecar, &prefill.address.to_string()).await;
        let seen = decode.seen();
        assert_eq!((answer.status.as_u16(), seen.len()), (status, calls));
        assert!(seen.get(1).is_none_or(|second| second.body == BODY));
        assert_eq!(prefill.seen().len(), 1);
    }
}

#[tokio::test]
async fn a_brief_failure_is_retried_at_the_same_endpoint() {
    let busy = Act::Reply(503, "application/json", "{}".into());
    let prefill = Engine::start([busy.clone(), busy, prefilled(1)]).await;
    let decode = Engine::start([Act::json("{}")]).await;
    let settings = Settings {
        prefill_max_retries: 2,
        prefill_retry_backoff: Duration::from_millis(5),
        ..quick()
    };
    let sidecar = Running::start(&decode, settings).await;
    ask(&sidecar, &prefill.address.to_string()).await;
    assert_eq!(prefill.seen().len(), 3);
    assert!(decode.only().body.contains(PARAMS));
}

#[tokio::test]
async fn an_endpoint_that_is_not_allowed_is_not_called() {
    let evil = Engine::start([prefilled(1)]).await;
    let good = Engine::start([prefilled(1)]).await;
    let decode = Engine::start([Act::json("{}")]).await;
    let allowed = Targets::listed([good.address.to_string().as_str()]).unwrap();
    let sidecar = Running::with_targets(decode.address.port(), quick(), allowed).await;

    let answer = ask(&sidecar, &evil.address.to_string()).await;
    assert_eq!(answer.status, 403);
    assert_eq!(
        answer.body,
        "Forbidden: prefill target not allowed by SSRF protection\n"
    );
    assert!(decode.seen().is_empty());

    // A body that takes a while is read to its end, or a client that reads only then would meet a closed
    // connection.
    let mut stream = TcpStream::connect(sidecar.address).await.unwrap();
    let text = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: x\r\nx-prefiller-host-port: {}\r\ncontent-length: {}\r\n\r\n{}",
        evil.address,
        8 << 20,
        " ".repeat(8 << 20),
    );
    stream.write_all(text.as_bytes()).await.unwrap();
    let mut status = [0; 12];
    stream.read_exact(&mut status).await.unwrap();
    assert_eq!(&status, b"HTTP/1.1 403");

    let answer = ask(&sidecar, &format!("{},{}", evil.address, good.address)).await;
    assert_eq!(answer.status, 200);
    assert_eq!(good.seen().len(), 1);
    assert!(evil.seen().is_empty());
}

#[tokio::test]
async fn a_client_that_leaves_ends_the_prefill() {
    let prefill = Engine::start([Act::Hang]).await;
    let decode = Engine::start([Act::json("{}")]).await;
    let sidecar = Arc::new(Running::start(&decode, Settings::default()).await);
    let target = prefill.address.to_string();
    let asking = {
        let sidecar = Arc::clone(&sidecar);
        tokio::spawn(async move {
            let mut stream = TcpStream::connect(sidecar.address).await.unwrap();
            let text = format!(
                "POST {CHAT} HTTP/1.1\r\nhost: x\r\nx-prefiller-host-port: {target}\r\ncontent-length: {}\r\n\r\n{BODY}",
                BODY.len()
            );
            stream.write_all(text.as_bytes()).await.unwrap();
            stream
        })
    };
    let stream = asking.await.unwrap();
    prefill.saw(1).await;
    assert_eq!(sidecar.legs(), [0, 1, 0]);
    drop(stream);
    sidecar.nothing_left().await;
    until(|| prefill.open() == 0).await;
    assert!(decode.seen().is_empty(), "nobody wants the decode any more");
}

#[tokio::test]
async fn a_client_that_leaves_ends_the_decode() {
    let prefill = Engine::start([prefilled(1)]).await;
    let decode = Engine::start([Act::Stream(vec!["data: 1\n\n".into(), "...".into()])]).await;
    let sidecar = Running::start(&decode, Settings::default()).await;
    for targets in ["", &prefill.address.to_string()] {
        let mut answer = sidecar
            .send(CHAT, &[("x-prefiller-host-port", targets)], BODY)
            .await;
        assert_eq!(answer.piece().await.unwrap().unwrap(), "data: 1\n\n");
        assert_eq!(sidecar.legs(), [0, 0, 1]);
        answer.abort();
        sidecar.nothing_left().await;
        until(|| decode.open() == 0).await;
    }
}

#[tokio::test]
async fn a_decode_engine_that_dies_cuts_the_stream_off() {
    let prefill = Engine::start([prefilled(1)]).await;
    let decode = Engine::start([Act::Break(vec!["data: 1\n\n".into()])]).await;
    let sidecar = Running::start(&decode, Settings::default()).await;
    let target = prefill.address.to_string();
    let mut answer = sidecar
        .send(CHAT, &[("x-prefiller-host-port", &target)], BODY)
        .await;
    let mut text = String::new();
    let broken = loop {
        match answer.piece().await {
            Some(Ok(piece)) => text.push_str(&piece),
            Some(Err(_)) => break true,
            None => break false,
        }
    };
    assert!(broken, "the client can tell that something is missing");
    assert!("data: 1\n\n".starts_with(&text));
    sidecar.nothing_left().await;
}

#[tokio::test]
async fn a_stream_that_breaks_before_it_says_anything_is_a_bad_gateway() {
    let role = "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"finish_reason\":null}]}\n\n";
    let prefill = Engine::start([prefilled(1)]).await;
    let decode = Engine::start([Act::Break(vec![role.into()])]).await;
    let sidecar = Running::start(&decode, quick()).await;
    let answer = ask(&sidecar, &prefill.address.to_string()).await;
    assert_eq!(answer.status, 502, "{}", answer.body);
}

#[tokio::test]
async fn a_decode_engine_that_restarts_is_called_again() {
    let prefill = Engine::start([prefilled(1)]).await;
    let decode = Engine::start([Act::json("{}")]).await;
    let sidecar = Running::start(&decode, Settings::default()).await;
    let (address, target) = (decode.address, prefill.address.to_string());
    assert_eq!(ask(&sidecar, &target).await.status, 200);
    drop(decode);
    assert_eq!(ask(&sidecar, &target).await.status, 503);
    let decode = Engine::listen(address, [Act::json("{}")]).await;
    assert_eq!(
        ask(&sidecar, &target).await.status,
        200,
        "no stale connection is used"
    );
    assert_eq!(decode.seen().len(), 1);
}
