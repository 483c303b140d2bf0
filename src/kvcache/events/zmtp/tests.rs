use super::super::testing::{message, read_short_frame, shake};
use super::*;
use tokio::net::TcpListener;

/// A SUB connection and its peer, hands shaken.
async fn pair() -> (Connection, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let peer = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        shake(&mut stream, b"PUB").await.unwrap();
        stream
    };
    let (connection, peer) = tokio::join!(Connection::connect(address, Role::Sub), peer);
    (connection.unwrap(), peer)
}

/// What a connection makes of a peer that starts with these bytes and then closes.
async fn refused(bytes: Vec<u8>, role: Role) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let peer = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(&bytes).await.unwrap();
        stream
    };
    let (connection, _peer) = tokio::join!(Connection::connect(address, role), peer);
    connection.unwrap_err().to_string()
}

fn hello(mechanism: &[u8], major: u8, ready: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 64];
    bytes[0] = 0xff;
    bytes[9] = 0x7f;
    bytes[10] = major;
    bytes[12..12 + mechanism.len()].copy_from_slice(mechanism);
    bytes.extend_from_slice(ready);
    bytes
}

const READY_PUB: &[u8] = b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x03PUB";

#[tokio::test]
async fn peers_of_another_kind_are_refused() {
    let sub = Role::Sub;
    assert!(
        refused(b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(), sub)
            .await
            .contains("signature")
    );
    assert!(
        refused(hello(b"NULL", 2, READY_PUB), sub)
            .await
            .contains("version")
    );
    assert!(
        refused(hello(b"PLAIN", 3, READY_PUB), sub)
            .await
            .contains("mechanism")
    );
    assert!(
        refused(hello(b"NULL", 3, READY_PUB), Role::Dealer)
            .await
            .contains("socket type")
    );
    assert!(
        refused(hello(b"NULL", 3, &[0, 1, 1]), sub)
            .await
            .contains("handshake")
    );
    let long = [&[COMMAND | LONG][..], &u64::MAX.to_be_bytes()].concat();
    assert!(
        refused(hello(b"NULL", 3, &long), sub)
            .await
            .contains("beyond")
    );
}

#[tokio::test]
async fn a_message_may_come_byte_by_byte_and_the_wait_be_dropped() {
    let (mut connection, mut peer) = pair().await;
    let long = vec![7_u8; 300];
    let bytes = message(&[b"topic", b"", &long]);
    for (i, byte) in bytes.iter().enumerate() {
        peer.write_all(&[*byte]).await.unwrap();
        if i + 1 < bytes.len() {
            let wait = timeout_zero(connection.recv()).await;
            assert!(wait.is_none(), "after {} of {} bytes", i + 1, bytes.len());
        }
    }
    let frames = connection.recv().await.unwrap();
    assert_eq!(
        frames,
        [
            Bytes::from_static(b"topic"),
            Bytes::new(),
            Bytes::from(long)
        ]
    );
}

/// Polls a future for a moment, then drops it.
async fn timeout_zero<T>(future: impl Future<Output = T>) -> Option<T> {
    tokio::time::timeout(Duration::from_millis(1), future)
        .await
        .ok()
}

#[tokio::test]
async fn a_message_at_the_limit_passes_and_one_byte_more_does_not() {
    let (mut connection, mut peer) = pair().await;
    let frame = vec![0; MAX_MESSAGE_BYTES - 10];
    let fits = message(&[&[1; 10], &frame]);
    let sending = tokio::spawn(async move {
        peer.write_all(&fits).await.unwrap();
        // 10 bytes, then a frame that claims what is left and one byte.
        let mut header = vec![MORE, 10];
        header.extend([1; 10]);
        header.push(LONG);
        header.extend((MAX_MESSAGE_BYTES as u64 - 9).to_be_bytes());
        peer.write_all(&header).await.unwrap();
        peer
    });
    let frames = connection.recv().await.unwrap();
    assert_eq!(
        frames.iter().map(Bytes::len).sum::<usize>(),
        MAX_MESSAGE_BYTES
    );
    assert!(matches!(connection.recv().await, Err(ZmtpError::Oversize)));
    drop(sending.await.unwrap());
}

#[tokio::test]
async fn a_claimed_size_takes_no_memory() {
    let (mut connection, mut peer) = pair().await;
    let mut header = vec![LONG];
    header.extend((MAX_MESSAGE_BYTES as u64).to_be_bytes());
    peer.write_all(&header).await.unwrap();
    while connection.input.len() < header.len() {
        timeout_zero(connection.recv()).await;
    }
    assert!(connection.input.capacity() <= 2 * READ_CHUNK);
}

#[tokio::test]
async fn frames_are_limited() {
    let (mut connection, mut peer) = pair().await;
    let most: [&[u8]; MAX_FRAMES] = [b"x"; MAX_FRAMES];
    peer.write_all(&message(&most)).await.unwrap();
    assert_eq!(connection.recv().await.unwrap().len(), MAX_FRAMES);
    let more: [&[u8]; MAX_FRAMES + 1] = [b"x"; MAX_FRAMES + 1];
    peer.write_all(&message(&more)).await.unwrap();
    assert!(matches!(connection.recv().await, Err(ZmtpError::Oversize)));
}

#[tokio::test]
async fn a_ping_is_answered_with_its_context() {
    let (mut connection, mut peer) = pair().await;
    peer.write_all(b"\x04\x0a\x04PING\0\x0actx").await.unwrap();
    peer.write_all(&message(&[b"m"])).await.unwrap();
    connection.recv().await.unwrap();
    // The answer leaves with the next wait.
    timeout_zero(connection.recv()).await;
    let pong = read_short_frame(&mut peer).await.unwrap();
    assert_eq!(pong, (COMMAND, b"\x04PONGctx".to_vec()));
}

#[tokio::test]
async fn a_peer_that_only_sends_commands_is_cut_off() {
    let (mut connection, mut peer) = pair().await;
    let commands = b"\x04\x05\x04NOOP".repeat(MAX_COMMANDS_IN_A_ROW + 1);
    peer.write_all(&commands).await.unwrap();
    assert!(matches!(
        connection.recv().await,
        Err(ZmtpError::Protocol(_))
    ));
}

#[tokio::test]
async fn a_closed_peer_ends_the_wait() {
    let (mut connection, peer) = pair().await;
    drop(peer);
    assert!(matches!(connection.recv().await, Err(ZmtpError::Closed)));
}
