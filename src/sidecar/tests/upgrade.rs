//! Protocols beyond HTTP through the sidecar.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

const WANTED: &str = "GET /v1/realtime?model=m HTTP/1.1\r\nhost: client\r\nconnection: keep-alive, Upgrade\r\nupgrade: websocket\r\nsec-websocket-key: k\r\nx-prefiller-host-port: 10.0.0.1:1\r\n\r\n";
const AGREED: &str = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: WebSocket\r\nsec-websocket-accept: a\r\n\r\n";

/// An engine that answers `head` to its only connection and then says everything twice. What it was asked,
/// and that its connection ended, comes over the channel.
async fn echo(head: &'static str) -> (u16, mpsc::Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (says, told) = mpsc::channel(4);
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let asked = head_of(&mut stream).await;
        says.send(asked).await.unwrap();
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut buffer = [0; 1024];
        while let Ok(read @ 1..) = stream.read(&mut buffer).await {
            let twice = [&buffer[..read], &buffer[..read]].concat();
            stream.write_all(&twice).await.unwrap();
        }
        says.send("ended".to_owned()).await.unwrap();
    });
    (port, told)
}

/// Reads up to the empty line.
async fn head_of(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let byte = tokio::time::timeout(PATIENCE, stream.read_u8()).await;
        head.push(byte.unwrap().unwrap());
    }
    String::from_utf8(head).unwrap()
}

async fn ask(sidecar: &Running, text: &str) -> (TcpStream, String) {
    let mut stream = TcpStream::connect(sidecar.address).await.unwrap();
    stream.write_all(text.as_bytes()).await.unwrap();
    let head = head_of(&mut stream).await;
    (stream, head)
}

async fn before(engine: u16) -> Running {
    Running::with_targets(engine, Settings::default(), Targets::anything()).await
}

async fn next(told: &mut mpsc::Receiver<String>) -> String {
    let next = tokio::time::timeout(PATIENCE, told.recv()).await;
    next.unwrap().unwrap()
}

#[tokio::test]
async fn a_websocket_passes_both_ways_until_the_client_leaves() {
    let (port, mut told) = echo(AGREED).await;
    let sidecar = before(port).await;
    let (mut stream, head) = ask(&sidecar, WANTED).await;
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    let head = head.to_ascii_lowercase();
    for line in [
        "connection: upgrade",
        "upgrade: websocket",
        "sec-websocket-accept: a",
    ] {
        assert!(head.contains(line), "{head}");
    }
    let asked = next(&mut told).await.to_ascii_lowercase();
    assert!(
        asked.starts_with("get /v1/realtime?model=m http/1.1\r\n"),
        "{asked}"
    );
    for line in [
        "connection: upgrade\r\n",
        "upgrade: websocket\r\n",
        "sec-websocket-key: k\r\n",
    ] {
        assert!(asked.contains(line), "{asked}");
    }
    assert!(!asked.contains("x-prefiller"), "{asked}");

    for said in ["one", "two"] {
        stream.write_all(said.as_bytes()).await.unwrap();
        let mut twice = [0; 6];
        stream.read_exact(&mut twice).await.unwrap();
        assert_eq!(twice, *format!("{said}{said}").as_bytes());
    }
    assert_eq!(sidecar.legs(), [0, 0, 1]);
    drop(stream);
    assert_eq!(next(&mut told).await, "ended");
    sidecar.nothing_left().await;
}

#[tokio::test]
async fn a_sidecar_that_ends_closes_its_tunnels() {
    let (port, mut told) = echo(AGREED).await;
    let sidecar = before(port).await;
    let (mut stream, _) = ask(&sidecar, WANTED).await;
    next(&mut told).await;
    drop(sidecar);
    assert_eq!(next(&mut told).await, "ended");
    let end = tokio::time::timeout(PATIENCE, stream.read_u8()).await;
    assert!(end.unwrap().is_err());
}

#[tokio::test]
async fn only_what_was_asked_for_is_switched_to() {
    let other = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n";
    let plain = WANTED.replace("connection: keep-alive, Upgrade\r\n", "");
    for (head, asked, status) in [
        (other, WANTED, "502"),
        (AGREED, plain.as_str(), "502"),
        (
            "HTTP/1.1 426 Upgrade Required\r\ncontent-length: 0\r\n\r\n",
            WANTED,
            "426",
        ),
    ] {
        let (port, mut told) = echo(head).await;
        let sidecar = before(port).await;
        let (stream, head) = ask(&sidecar, asked).await;
        assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{head}");
        let seen = next(&mut told).await.to_ascii_lowercase();
        assert_eq!(
            seen.contains("upgrade: websocket"),
            asked == WANTED,
            "{seen}"
        );
        drop((stream, sidecar));
        assert_eq!(next(&mut told).await, "ended");
    }
    // Inference requests are not upgraded.
    let decode = Engine::start([Act::json("{}")]).await;
    let sidecar = Running::start(&decode, Settings::default()).await;
    let post = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: c\r\nconnection: Upgrade\r\nupgrade: websocket\r\ncontent-length: 2\r\n\r\n{{}}"
    );
    let (_stream, head) = ask(&sidecar, &post).await;
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    assert!(!decode.only().headers.contains_key("upgrade"));
}
