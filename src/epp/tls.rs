//! The certificate of the ext_proc port: given and reloaded, or self-signed.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use arc_swap::ArcSwap;
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::server::danger::ClientCertVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig, SupportedProtocolVersion, version};
use tokio_util::sync::CancellationToken;

/// How often a certificate directory is looked at. Polling follows the symlink swap by which
/// Kubernetes replaces a mounted secret.
const RELOAD_INTERVAL: Duration = Duration::from_secs(1);

/// What the TLS flags say.
#[derive(Debug, Clone)]
pub struct TlsOptions {
    /// Directory with `tls.crt` and `tls.key`; `None` makes a self-signed certificate.
    pub cert_path: Option<PathBuf>,
    /// `VersionTLS10` … `VersionTLS13`, or empty. Versions below 1.2 are raised to it: rustls has none.
    pub min_version: String,
    /// Go names of TLS 1.2 suites; empty for all.
    pub cipher_suites: Vec<String>,
    /// CA file; clients must show a certificate of it. `None` asks for none.
    pub client_ca: Option<PathBuf>,
    /// Protocols offered, best first.
    pub alpn: &'static [&'static [u8]],
}

impl Default for TlsOptions {
    /// gRPC's: HTTP/2 alone.
    fn default() -> Self {
        Self {
            cert_path: None,
            min_version: String::new(),
            cipher_suites: Vec::new(),
            client_ca: None,
            alpn: &[b"h2"],
        }
    }
}

/// The current server configuration; replaced by [`watch`].
pub type SharedTls = Arc<ArcSwap<ServerConfig>>;

/// Loads or makes the certificate.
pub fn load(options: &TlsOptions) -> anyhow::Result<ServerConfig> {
    let (chain, key) = match &options.cert_path {
        Some(directory) => read_pair(directory)?,
        None => self_signed()?,
    };
    let provider = Arc::new(provider(&options.cipher_suites)?);
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(versions(&options.min_version)?)
        .context("TLS versions and cipher suites do not fit together")?;
    let builder = match &options.client_ca {
        Some(path) => builder.with_client_cert_verifier(client_verifier(path, provider)?),
        None => builder.with_no_client_auth(),
    };
    let mut config = builder
        .with_single_cert(chain, key)
        .context("the certificate and its key do not fit together")?;
    config.alpn_protocols = options.alpn.iter().map(|name| name.to_vec()).collect();
    Ok(config)
}

fn client_verifier(
    path: &Path,
    provider: Arc<CryptoProvider>,
) -> anyhow::Result<Arc<dyn ClientCertVerifier>> {
    let refuse = || format!("client CA {}", path.display());
    let pem = std::fs::read(path).with_context(refuse)?;
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        roots
            .add(certificate.with_context(refuse)?)
            .with_context(refuse)?;
    }
    WebPkiClientVerifier::builder_with_provider(roots.into(), provider)
        .build()
        .with_context(refuse)
}

/// Reloads the pair when one of its files changes; a pair that cannot be used keeps the old one.
/// Runs until `shutdown`.
pub async fn watch(options: TlsOptions, tls: SharedTls, shutdown: CancellationToken) {
    let Some(directory) = options.cert_path.clone() else {
        return;
    };
    let read = || {
        let ca = options.client_ca.as_ref().map(std::fs::read).transpose();
        Some((read_files(&directory).ok()?, ca.ok()?))
    };
    let mut seen = read();
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(RELOAD_INTERVAL) => {}
        }
        let now = read();
        if now.is_none() || now == seen {
            continue;
        }
        match load(&options) {
            Ok(config) => {
                tls.store(Arc::new(config));
                tracing::info!(directory = %directory.display(), "certificate reloaded");
            }
            // The two files of a pair are written one after the other: try again when either changes.
            Err(error) => tracing::warn!(
                error = format!("{error:#}"),
                "certificate not reloaded, the old one stays"
            ),
        }
        seen = now;
    }
}

fn read_files(directory: &Path) -> std::io::Result<(Vec<u8>, Vec<u8>)> {
    Ok((
        std::fs::read(directory.join("tls.crt"))?,
        std::fs::read(directory.join("tls.key"))?,
    ))
}

type Pair = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn read_pair(directory: &Path) -> anyhow::Result<Pair> {
    let (crt, key) = read_files(directory)
        .with_context(|| format!("reading tls.crt and tls.key in {}", directory.display()))?;
    let chain: Vec<_> = CertificateDer::pem_slice_iter(&crt)
        .collect::<Result<_, _>>()
        .context("tls.crt is not a PEM certificate")?;
    if chain.is_empty() {
        bail!("tls.crt in {} holds no certificate", directory.display());
    }
    let key = PrivateKeyDer::from_pem_slice(&key).context("tls.key is not a PEM private key")?;
    Ok((chain, key))
}

/// No subject alternative name: gateways take the picker's certificate unverified.
fn self_signed() -> anyhow::Result<Pair> {
    let key = rcgen::KeyPair::generate().context("making a key")?;
    let mut params = rcgen::CertificateParams::default();
    params
        .distinguished_name
        .push(rcgen::DnType::OrganizationName, "Inference Ext");
    params
        .extended_key_usages
        .push(rcgen::ExtendedKeyUsagePurpose::ServerAuth);
    let certificate = params.self_signed(&key).context("signing a certificate")?;
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    Ok((vec![certificate.der().clone()], key))
}

fn versions(min: &str) -> anyhow::Result<&'static [&'static SupportedProtocolVersion]> {
    static BOTH: [&SupportedProtocolVersion; 2] = [&version::TLS13, &version::TLS12];
    static NEWEST: [&SupportedProtocolVersion; 1] = [&version::TLS13];
    match min {
        "" | "VersionTLS10" | "VersionTLS11" | "VersionTLS12" => Ok(&BOTH),
        "VersionTLS13" => Ok(&NEWEST),
        other => bail!("--tls-min-version: {other:?} is not one of VersionTLS10 … VersionTLS13"),
    }
}

/// The ring provider, its TLS 1.2 suites narrowed to the named ones. TLS 1.3 suites are not
/// configurable, as in Go.
fn provider(names: &[String]) -> anyhow::Result<CryptoProvider> {
    let mut provider = ring::default_provider();
    if names.is_empty() {
        return Ok(provider);
    }
    let known = |suite: &tokio_rustls::rustls::SupportedCipherSuite| {
        // Go says TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305 and the same with _SHA256.
        let name = format!("{:?}", suite.suite());
        names
            .iter()
            .any(|wanted| name == *wanted || name == format!("{wanted}_SHA256"))
    };
    provider
        .cipher_suites
        .retain(|suite| suite.tls13().is_some() || known(suite));
    if !provider
        .cipher_suites
        .iter()
        .any(|suite| suite.tls13().is_none())
    {
        bail!("--tls-cipher-suites: none of {names:?} is supported");
    }
    Ok(provider)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_path_a_certificate_is_made_and_h2_is_offered() {
        let config = load(&TlsOptions::default()).unwrap();
        assert_eq!(config.alpn_protocols, [b"h2".to_vec()]);
    }

    #[test]
    fn go_names_narrow_the_suites() {
        let suites =
            |names: &[&str]| provider(&names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>());
        let narrowed = suites(&["TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305"]).unwrap();
        assert_eq!(
            narrowed
                .cipher_suites
                .iter()
                .filter(|s| s.tls13().is_none())
                .count(),
            1
        );
        assert!(suites(&["TLS_RSA_WITH_RC4_128_SHA"]).is_err());
    }

    #[test]
    fn an_unknown_version_is_refused() {
        assert!(versions("VersionTLS12").is_ok());
        assert!(versions("TLS1.2").is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_changed_pair_is_picked_up_and_a_broken_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let write = || {
            let (chain, key) = self_signed().unwrap();
            let pem = |label: &str, der: &[u8]| {
                let text = pem_text(label, der);
                std::fs::write(
                    directory.path().join(if label == "CERTIFICATE" {
                        "tls.crt"
                    } else {
                        "tls.key"
                    }),
                    text,
                )
                .unwrap();
            };
            pem("CERTIFICATE", &chain[0]);
            pem("PRIVATE KEY", key.secret_der());
        };
        write();
        let options = TlsOptions {
            cert_path: Some(directory.path().to_owned()),
            ..TlsOptions::default()
        };
        let tls: SharedTls = Arc::new(ArcSwap::from_pointee(load(&options).unwrap()));
        let shutdown = CancellationToken::new();
        let first = tls.load_full();
        let task = tokio::spawn(watch(options, Arc::clone(&tls), shutdown.clone()));
        tokio::time::sleep(RELOAD_INTERVAL * 2).await;
        assert!(
            Arc::ptr_eq(&first, &tls.load_full()),
            "unchanged files are not reloaded"
        );
        write();
        tokio::time::sleep(RELOAD_INTERVAL * 2).await;
        let second = tls.load_full();
        assert!(!Arc::ptr_eq(&first, &second));
        std::fs::write(directory.path().join("tls.key"), "garbage").unwrap();
        tokio::time::sleep(RELOAD_INTERVAL * 2).await;
        assert!(Arc::ptr_eq(&second, &tls.load_full()));
        shutdown.cancel();
        task.await.unwrap();
    }

    /// PEM by hand: rcgen's own writer needs the certificate object.
    fn pem_text(label: &str, der: &[u8]) -> String {
        const ALPHABET: &[u8; 64] =
            b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let mut body = String::new();
        for chunk in der.chunks(3) {
            let n =
                chunk.iter().fold(0u32, |n, b| n << 8 | u32::from(*b)) << (8 * (3 - chunk.len()));
            for i in 0..4 {
                let digit = ALPHABET[(n >> (18 - 6 * i) & 63) as usize] as char;
                body.push(if i <= chunk.len() { digit } else { '=' });
            }
        }
        let lines: Vec<&str> = body
            .as_bytes()
            .chunks(64)
            .map(|l| std::str::from_utf8(l).unwrap())
            .collect();
        format!(
            "-----BEGIN {label}-----\n{}\n-----END {label}-----\n",
            lines.join("\n")
        )
    }

    #[test]
    fn clients_may_have_to_show_a_certificate() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ca.crt");
        let options = TlsOptions {
            client_ca: Some(path.clone()),
            alpn: &[b"http/1.1"],
            ..TlsOptions::default()
        };
        assert!(load(&options).is_err(), "no file");
        std::fs::write(&path, "nothing").unwrap();
        assert!(load(&options).is_err(), "no certificate");
        let key = rcgen::KeyPair::generate().unwrap();
        let ca = rcgen::CertificateParams::default()
            .self_signed(&key)
            .unwrap();
        let pem = rcgen_pem(ca.der());
        std::fs::write(&path, pem).unwrap();
        let config = load(&options).unwrap();
        assert_eq!(config.alpn_protocols, [b"http/1.1".to_vec()]);
    }

    fn rcgen_pem(der: &[u8]) -> String {
        use base64::Engine;
        let text = base64::engine::general_purpose::STANDARD.encode(der);
        format!("-----BEGIN CERTIFICATE-----\n{text}\n-----END CERTIFICATE-----\n")
    }
}
