//! The metrics port in TLS, with and without certificates of clients, against the running process.

use std::path::Path;
use std::sync::Arc;

use pinpod::demo::processes::Picker;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::{
    CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName,
};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use super::drop_in::local;
use super::process::program;

type Authority = CertifiedIssuer<'static, KeyPair>;
type Identity = (CertificateDer<'static>, PrivateKeyDer<'static>);

fn authority(name: &str) -> Authority {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// A certificate of `authority` for `name`, and its key.
fn issued(authority: &Authority, name: &str) -> (rcgen::Certificate, KeyPair) {
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new([name.to_owned()]).unwrap();
    (params.signed_by(&key, authority).unwrap(), key)
}

fn client_of(authority: &Authority) -> Identity {
    let (certificate, key) = issued(authority, "prometheus");
    let key = PrivatePkcs8KeyDer::from(key.serialize_der());
    (certificate.der().clone(), key.into())
}

/// The volume of a TLS secret, for a server at 127.0.0.1.
fn secret(authority: &Authority, directory: &Path) {
    std::fs::create_dir(directory).unwrap();
    let (certificate, key) = issued(authority, "127.0.0.1");
    std::fs::write(directory.join("tls.crt"), certificate.pem()).unwrap();
    std::fs::write(directory.join("tls.key"), key.serialize_pem()).unwrap();
}

/// First line of the answer to a scrape; an error when there is none.
async fn scrape(
    port: u16,
    trusted: &Authority,
    identity: Option<Identity>,
) -> Result<String, String> {
    let mut roots = RootCertStore::empty();
    roots.add(trusted.der().clone()).unwrap();
    let builder = ClientConfig::builder_with_provider(ring::default_provider().into());
    let builder = builder.with_safe_default_protocol_versions().unwrap();
    let builder = builder.with_root_certificates(roots);
    let config = match identity {
        Some((certificate, key)) => builder
            .with_client_auth_cert(vec![certificate], key)
            .unwrap(),
        None => builder.with_no_client_auth(),
    };
    let stream = tokio::net::TcpStream::connect(local(port)).await.unwrap();
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let exchange = async {
        let connector = TlsConnector::from(Arc::new(config));
        let mut stream = connector.connect(name, stream).await?;
        let request = b"GET /metrics HTTP/1.1\r\nhost: picker\r\nconnection: close\r\n\r\n";
        stream.write_all(request).await?;
        // In TLS 1.3 a server's refusal of our certificate arrives only now.
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        std::io::Result::Ok(answer)
    };
    let answer = exchange.await.map_err(|e| e.to_string())?;
    Ok(answer.lines().next().unwrap_or_default().to_owned())
}

async fn start(directory: &Path, further: &[String]) -> Picker {
    let mut flags = vec![
        "--endpoints=127.0.0.1:9".to_owned(),
        format!("--metrics-cert-dir={}/secret", directory.display()),
    ];
    flags.extend_from_slice(further);
    Picker::start(program(), &flags, directory).await.unwrap()
}

const OK: &str = "HTTP/1.1 200 OK";

#[tokio::test]
async fn the_port_shows_the_given_certificate_and_speaks_nothing_but_tls() {
    let directory = tempfile::tempdir().unwrap();
    let (own, other) = (authority("own"), authority("other"));
    secret(&own, &directory.path().join("secret"));
    let picker = start(directory.path(), &[]).await;
    assert_eq!(scrape(picker.metrics, &own, None).await.unwrap(), OK);
    let refused = scrape(picker.metrics, &other, None).await.unwrap_err();
    assert!(refused.contains("UnknownIssuer"), "{refused}");
    // A scraper that was not told.
    let mut plain = tokio::net::TcpStream::connect(local(picker.metrics))
        .await
        .unwrap();
    plain
        .write_all(b"GET /metrics HTTP/1.1\r\nhost: picker\r\n\r\n")
        .await
        .unwrap();
    let mut answer = Vec::new();
    // Closed, perhaps by a reset, after an alert at most.
    let _ = plain.read_to_end(&mut answer).await;
    assert!(!answer.windows(4).any(|w| w == b"HTTP"), "{answer:?}");
}

#[tokio::test]
async fn clients_need_a_certificate_of_the_given_authority() {
    let directory = tempfile::tempdir().unwrap();
    let [own, clients, strangers] = ["own", "clients", "strangers"].map(authority);
    secret(&own, &directory.path().join("secret"));
    let file = directory.path().join("clients.crt");
    std::fs::write(&file, clients.pem()).unwrap();
    let flags = [
        format!("--metrics-client-ca-file={}", file.display()),
        "--metrics-endpoint-auth=false".to_owned(),
    ];
    let picker = start(directory.path(), &flags).await;
    let port = picker.metrics;
    let known = scrape(port, &own, Some(client_of(&clients))).await;
    assert_eq!(known.unwrap(), OK);
    let nobody = scrape(port, &own, None).await.unwrap_err();
    assert!(nobody.contains("CertificateRequired"), "{nobody}");
    let stranger = scrape(port, &own, Some(client_of(&strangers)))
        .await
        .unwrap_err();
    assert!(stranger.contains("received fatal alert"), "{stranger}");
    // The certificate of the server is none of a client.
    let server = scrape(port, &own, Some(client_of(&own))).await;
    assert!(server.is_err(), "{server:?}");
    assert_eq!(
        scrape(port, &own, Some(client_of(&clients))).await.unwrap(),
        OK
    );
}
