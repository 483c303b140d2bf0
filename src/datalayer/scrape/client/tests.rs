use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::net::TcpListener;

use super::*;

/// What a connection does after each request.
#[derive(Clone)]
enum Script {
    /// Sends these pieces one by one and waits for the next request.
    Answer(Vec<Vec<u8>>),
    /// Sends this and hangs up.
    AnswerAndClose(Vec<u8>),
}

/// A server that plays `script`; counts connections.
async fn server(script: Script) -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let connections = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&connections);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            count.fetch_add(1, Ordering::SeqCst);
            tokio::spawn(play(stream, script.clone()));
        }
    });
    (address, connections)
}

async fn play(mut stream: TcpStream, script: Script) {
    stream.set_nodelay(true).unwrap();
    let mut seen = Vec::new();
    let mut buffer = [0; 1024];
    while let Ok(n @ 1..) = stream.read(&mut buffer).await {
        seen.extend_from_slice(&buffer[..n]);
        if !seen.ends_with(b"\r\n\r\n") {
            continue;
        }
        seen.clear();
        match &script {
            Script::Answer(pieces) => {
                for piece in pieces {
                    if stream.write_all(piece).await.is_err() {
                        return;
                    }
                    tokio::task::yield_now().await;
                }
            }
            Script::AnswerAndClose(reply) => {
                let _ = stream.write_all(reply).await;
                return;
            }
        }
    }
}

fn connection(address: SocketAddr) -> Connection {
    Connection::new(
        "127.0.0.1".to_owned(),
        address.port(),
        "/metrics",
        "text/plain",
        None,
    )
}

async fn fetch_script(script: Script) -> Result<Vec<u8>, FetchError> {
    let (address, _) = server(script).await;
    let mut buffer = Vec::new();
    let fetched = connection(address).fetch(&mut buffer).await;
    fetched.map(<[u8]>::to_vec)
}

async fn fetch(reply: &[u8]) -> Result<Vec<u8>, FetchError> {
    fetch_script(Script::AnswerAndClose(reply.to_vec())).await
}

fn ok(headers: &str, body: &[u8]) -> Vec<u8> {
    let mut reply = format!("HTTP/1.1 200 OK\r\n{headers}\r\n").into_bytes();
    reply.extend_from_slice(body);
    reply
}

#[tokio::test]
async fn one_connection_serves_many_scrapes() {
    for reply in [
        ok("Content-Length: 3\r\n", b"a 1"),
        ok("transfer-encoding: chunked\r\n", b"3\r\na 1\r\n0\r\n\r\n"),
    ] {
        let (address, connections) = server(Script::Answer(vec![reply])).await;
        let mut connection = connection(address);
        let mut buffer = Vec::new();
        for _ in 0..5 {
            assert_eq!(connection.fetch(&mut buffer).await.unwrap(), b"a 1");
        }
        assert_eq!(connections.load(Ordering::SeqCst), 1);
    }
}

#[tokio::test]
async fn a_connection_closed_while_idle_is_opened_again() {
    // Kept alive by its head, closed by its server.
    let reply = ok("content-length: 3\r\n", b"a 1");
    let (address, connections) = server(Script::AnswerAndClose(reply)).await;
    let mut connection = connection(address);
    let mut buffer = Vec::new();
    for _ in 0..3 {
        assert_eq!(connection.fetch(&mut buffer).await.unwrap(), b"a 1");
        // The hang-up must have arrived for the next round to meet it.
        if let Some(Stream::Plain(stream)) = &connection.stream {
            stream.readable().await.unwrap();
        }
    }
    assert_eq!(connections.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn a_connection_that_may_not_be_kept_is_not() {
    for reply in [
        ok("content-length: 3\r\nconnection: x, Close\r\n", b"a 1"),
        ok("content-length: 3\r\n", b"a 1 and more"),
        b"HTTP/1.0 200 OK\r\ncontent-length: 3\r\n\r\na 1".to_vec(),
    ] {
        let (address, connections) = server(Script::Answer(vec![reply])).await;
        let mut connection = connection(address);
        let mut buffer = Vec::new();
        for _ in 0..2 {
            assert_eq!(connection.fetch(&mut buffer).await.unwrap(), b"a 1");
        }
        assert_eq!(connections.load(Ordering::SeqCst), 2);
    }
}

#[tokio::test]
async fn chunked_bodies_are_put_together_wherever_they_are_cut() {
    let reply = ok(
        "transfer-encoding: Chunked\r\n",
        b"2\r\na \r\n4;ext=\"x\"\r\n1\nb \r\n1\r\n2\r\n0\r\ntrailer: x\r\n\r\n",
    );
    for cut in 1..reply.len() {
        let (head, tail) = reply.split_at(cut);
        let pieces = vec![head.to_vec(), tail.to_vec()];
        let body = fetch_script(Script::Answer(pieces)).await;
        assert_eq!(body.unwrap(), b"a 1\nb 2", "cut at {cut}");
    }
    let bytewise = reply.iter().map(|b| vec![*b]).collect();
    assert_eq!(
        fetch_script(Script::Answer(bytewise)).await.unwrap(),
        b"a 1\nb 2"
    );
}

#[tokio::test]
async fn long_bodies_are_read_whole() {
    let body: Vec<u8> = (0..300_000_u32).map(|n| b'a' + (n % 26) as u8).collect();
    let length = format!("content-length: {}\r\n", body.len());
    assert!(fetch(&ok(&length, &body)).await.unwrap() == body);
    let mut chunks = Vec::new();
    for chunk in body.chunks(777) {
        chunks.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
        chunks.extend_from_slice(chunk);
        chunks.extend_from_slice(b"\r\n");
    }
    chunks.extend_from_slice(b"0\r\n\r\n");
    assert!(
        fetch(&ok("transfer-encoding: chunked\r\n", &chunks))
            .await
            .unwrap()
            == body
    );
    assert!(fetch(&ok("", &body)).await.unwrap() == body, "until close");
    assert_eq!(fetch(&ok("content-length: 0\r\n", b"")).await.unwrap(), b"");
}

#[tokio::test]
async fn what_is_no_usable_answer_is_refused() {
    for status in [
        "500 Oops",
        "302 Found",
        "404 No",
        "100 Continue",
        "204 None",
    ] {
        let reply = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n");
        let code: u16 = status[..3].parse().unwrap();
        assert!(
            matches!(fetch(reply.as_bytes()).await, Err(FetchError::Status(c)) if c == code),
            "{status}"
        );
    }
    for (headers, body) in [
        ("content-length: x\r\n", ""),
        ("content-length: -1\r\n", ""),
        ("content-length: 1\r\ncontent-length: 2\r\n", "ab"),
        (
            "content-length: 3\r\ntransfer-encoding: chunked\r\n",
            "0\r\n\r\n",
        ),
        ("transfer-encoding: gzip\r\n", ""),
        (
            "transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n",
            "0\r\n\r\n",
        ),
        ("content-encoding: gzip\r\ncontent-length: 1\r\n", "x"),
        ("transfer-encoding: chunked\r\n", "x\r\n"),
        ("transfer-encoding: chunked\r\n", "1\r\nabc"),
        ("no colon\r\n", ""),
    ] {
        assert!(
            matches!(
                fetch(&ok(headers, body.as_bytes())).await,
                Err(FetchError::Protocol(_))
            ),
            "{headers}{body}"
        );
    }
    assert!(matches!(
        fetch(b"hello\r\n\r\n").await,
        Err(FetchError::Protocol(_))
    ));
    for cut in [
        "HTTP/1.1 200 OK\r\nconte",
        "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\na",
    ] {
        assert!(matches!(
            fetch(cut.as_bytes()).await,
            Err(FetchError::Closed)
        ));
    }
}

#[tokio::test]
async fn floods_are_cut_off() {
    let long = vec![b'x'; MAX_BODY_BYTES + 1];
    let length = format!("content-length: {}\r\n", long.len());
    assert!(matches!(
        fetch(&ok(&length, &long)).await,
        Err(FetchError::TooLong)
    ));
    assert!(matches!(
        fetch(&ok("", &long)).await,
        Err(FetchError::TooLong)
    ));
    let exact = format!("content-length: {MAX_BODY_BYTES}\r\n");
    let exact = fetch(&ok(&exact, &long[..MAX_BODY_BYTES])).await.unwrap();
    assert_eq!(exact.len(), MAX_BODY_BYTES);
    for chunks in ["ffffffffffffffff\r\n", "800001\r\n", "800000\r\n"] {
        let mut body = chunks.as_bytes().to_vec();
        body.extend_from_slice(&long[..MAX_BODY_BYTES]);
        body.extend_from_slice(b"\r\n1\r\nx\r\n0\r\n\r\n");
        let reply = ok("transfer-encoding: chunked\r\n", &body);
        assert!(
            matches!(fetch(&reply).await, Err(FetchError::TooLong)),
            "{chunks}"
        );
    }
    let header = format!("x: {}\r\n", "y".repeat(MAX_HEAD_BYTES));
    assert!(matches!(
        fetch(&ok(&header, b"")[..MAX_HEAD_BYTES + 10]).await,
        Err(FetchError::Protocol(_))
    ));
    let trailers = format!("0\r\nt: {}", "y".repeat(MAX_HEAD_BYTES + 1));
    let reply = ok("transfer-encoding: chunked\r\n", trailers.as_bytes());
    assert!(matches!(fetch(&reply).await, Err(FetchError::Protocol(_))));
}

#[tokio::test]
async fn a_dropped_fetch_leaves_no_connection_behind() {
    let half = ok("content-length: 9\r\n", b"half");
    let (address, connections) = server(Script::Answer(vec![half])).await;
    let mut connection = connection(address);
    let mut buffer = Vec::new();
    for _ in 0..2 {
        let wait = Duration::from_millis(50);
        let fetched = tokio::time::timeout(wait, connection.fetch(&mut buffer)).await;
        assert!(fetched.is_err());
    }
    let two = async {
        while connections.load(Ordering::SeqCst) < 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), two)
        .await
        .unwrap();
}

#[tokio::test]
async fn a_dead_endpoint_is_an_error() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    assert!(matches!(
        connection(address).fetch(&mut Vec::new()).await,
        Err(FetchError::Io(_))
    ));
}

#[tokio::test]
async fn names_are_resolved_and_sent() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut request = vec![0; 1024];
        let n = stream.read(&mut request).await.unwrap();
        stream
            .write_all(&ok("content-length: 0\r\n", b""))
            .await
            .unwrap();
        String::from_utf8(request[..n].to_vec()).unwrap()
    });
    let mut connection = Connection::new(
        "localhost".to_owned(),
        port,
        "/v1/models",
        "application/json",
        None,
    );
    assert_eq!(connection.fetch(&mut Vec::new()).await.unwrap(), b"");
    assert_eq!(
        server.await.unwrap(),
        format!(
            "GET /v1/models HTTP/1.1\r\nhost: localhost:{port}\r\naccept: application/json\r\nuser-agent: pinpod\r\n\r\n"
        )
    );
    let v6 = Connection::new("fd00::1".to_owned(), 8000, "/", "text/plain", None);
    assert!(
        v6.request
            .starts_with(b"GET / HTTP/1.1\r\nhost: [fd00::1]:8000\r\n")
    );
}

/// A TLS server that answers every request of every connection, and its certificate as PEM.
async fn tls_server(name: &str) -> (u16, String) {
    use tokio_rustls::rustls::ServerConfig;
    use tokio_rustls::rustls::crypto::ring;
    use tokio_rustls::rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
    let key = rcgen::KeyPair::generate().unwrap();
    let params = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
    let certificate = params.self_signed(&key).unwrap();
    let secret = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], secret)
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let Ok(mut stream) = acceptor.accept(stream).await else {
                    return;
                };
                let mut buffer = [0; 1024];
                while let Ok(1..) = stream.read(&mut buffer).await {
                    let reply = ok("content-length: 3\r\n", b"a 1");
                    stream.write_all(&reply).await.unwrap();
                    stream.flush().await.unwrap();
                }
            });
        }
    });
    (port, certificate.pem())
}

#[tokio::test]
async fn certificates_are_checked_against_the_name_unless_told_otherwise() {
    let (port, own) = tls_server("localhost").await;
    let (_, other) = tls_server("localhost").await;
    let directory = tempfile::tempdir().unwrap();
    let bundle = |name: &str, pem: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, pem).unwrap();
        Some(path)
    };
    let fetch = async |host: &str, ca_cert_path, insecure_skip_verify| {
        let source = crate::datalayer::sources::HttpSource {
            tls: true,
            path: "/metrics".to_owned(),
            port: None,
            use_node_address: false,
            insecure_skip_verify,
            ca_cert_path,
            client_pair: None,
            interval: None,
        };
        let tls = crate::datalayer::scrape::tls::client_config(&source).unwrap();
        let mut connection =
            Connection::new(host.to_owned(), port, &source.path, "text/plain", tls);
        let mut buffer = Vec::new();
        for _ in 0..2 {
            match connection.fetch(&mut buffer).await {
                Ok(b"a 1") => {}
                _ => return false,
            }
        }
        true
    };
    assert!(fetch("127.0.0.1", None, true).await, "any certificate");
    assert!(fetch("localhost", bundle("own", &own), false).await);
    assert!(
        !fetch("127.0.0.1", bundle("own", &own), false).await,
        "another name"
    );
    assert!(
        !fetch("localhost", bundle("other", &other), false).await,
        "another issuer"
    );
    assert!(
        !fetch("localhost", bundle("other", &other), true).await,
        "a given bundle is believed, and nothing else"
    );
}
