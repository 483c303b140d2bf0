//! Routes, limits, headers and health.

use super::*;

#[tokio::test]
async fn other_routes_pass_through() {
    let decode = Engine::start([Act::Reply(418, "text/x", "body".into())]).await;
    let sidecar = Running::start(&decode, Settings::default()).await;
    let answer = sidecar
        .ask(
            "/tokenize?x=1",
            &[
                ("x-prefiller-host-port", "10.0.0.1:1"),
                ("connection", "x-mine"),
                ("x-mine", "1"),
            ],
            "not json",
        )
        .await;
    assert_eq!(
        (answer.status.as_u16(), answer.body.as_str()),
        (418, "body")
    );
    assert_eq!(answer.headers["x-engine"], "kept");
    let seen = decode.only();
    assert_eq!(
        (seen.path.as_str(), seen.body.as_str()),
        ("/tokenize?x=1", "not json")
    );
    assert!(!seen.headers.contains_key("x-prefiller-host-port"));
    assert!(!seen.headers.contains_key("x-mine"), "named by connection");
    sidecar.nothing_left().await;
}

#[tokio::test]
async fn health_is_the_engines() {
    let decode = Engine::start([
        Act::Reply(200, "text/plain", String::new()),
        Act::Reply(503, "text/plain", String::new()),
        Act::Hang,
    ])
    .await;
    let sidecar = Running::start(&decode, Settings::default()).await;
    let health = async || sidecar.ask("/health", &[], "").await.status.as_u16();
    assert_eq!(health().await, 200);
    assert_eq!(health().await, 503);
    assert_eq!(
        health().await,
        503,
        "an engine that does not answer is not healthy"
    );
    assert_eq!(decode.seen()[0].path, "/health");
    drop(decode);
    assert_eq!(health().await, 503);
    sidecar.nothing_left().await;
}

#[tokio::test]
async fn bad_bodies_are_refused() {
    let decode = Engine::start([Act::json("{}")]).await;
    let settings = Settings {
        max_request_body_bytes: 100,
        ..Settings::default()
    };
    let sidecar = Running::start(&decode, settings).await;
    let status = async |body: &str| sidecar.ask(CHAT, &[], body).await;
    let bad = status("{\"a\":").await;
    assert_eq!(bad.status, 400);
    let error: serde_json::Value = serde_json::from_str(&bad.body).unwrap();
    assert_eq!(error["object"], "error");
    assert_eq!(error["type"], "BadRequestError");
    assert_eq!(error["code"], 400);
    assert_eq!(error["param"], "");
    assert_eq!(status("[1]").await.status, 400);
    let fits = format!("{{\"a\":\"{}\"}}", "x".repeat(92));
    assert_eq!(fits.len(), 100);
    assert_eq!(status(&fits).await.status, 200);
    assert_eq!(status(&format!("{fits} ")).await.status, 413);
    assert_eq!(decode.seen().len(), 1);
}

#[tokio::test]
async fn an_engine_that_is_away_is_not_ready() {
    let decode = Engine::start([Act::json("{}")]).await;
    let sidecar = Running::start(&decode, Settings::default()).await;
    drop(decode);
    for path in [CHAT, "/tokenize"] {
        let answer = sidecar.ask(path, &[], "{}").await;
        assert_eq!(answer.status, 503);
        assert!(
            answer.body.contains("\"type\":\"ServiceUnavailable\""),
            "{}",
            answer.body
        );
    }
    sidecar.nothing_left().await;
}

#[tokio::test]
async fn ranks_are_chosen_by_header() {
    let decode = Engine::start([Act::json("{}")]).await;
    let settings = Settings {
        port: 8000,
        data_parallel_size: 2,
        pod_ip: Some("10.0.0.7".to_owned()),
        ..Settings::default()
    };
    // Rank 1's engine is the one that runs: rank 0's port is the one before it.
    let port = decode.address.port() - 1;
    let sidecar = Running::with_targets(port, settings, Targets::anything()).await;
    let ask = async |target: &str| {
        sidecar
            .ask(CHAT, &[("x-data-parallel-host-port", target)], "{}")
            .await
            .status
            .as_u16()
    };
    assert_eq!(ask("10.0.0.7:8001").await, 200);
    assert_eq!(ask("10.0.0.7:8002").await, 400);
    assert_eq!(ask("10.0.0.8:8001").await, 400);
    assert_eq!(ask("10.0.0.7:7999").await, 400);
    assert!(
        !decode
            .only()
            .headers
            .contains_key("x-data-parallel-host-port")
    );
}

#[tokio::test]
async fn http2_without_tls_is_understood() {
    let decode = Engine::start([Act::json("{}")]).await;
    let sidecar = Running::start(&decode, Settings::default()).await;
    let stream = TcpStream::connect(sidecar.address).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http2::handshake(
        hyper_util::rt::TokioExecutor::new(),
        TokioIo::new(stream),
    )
    .await
    .unwrap();
    tokio::spawn(connection);
    let request = Request::post(format!("http://pod{CHAT}"))
        .body(Full::new(Bytes::from_static(b"{}")))
        .unwrap();
    let response = sender.send_request(request).await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(decode.only().path, CHAT);
}
