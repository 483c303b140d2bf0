//! The connection to the API server: where it is, who we are, and its patience.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

/// How long connecting to the API server may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Set in every pod; tells that the service account's files are there.
const IN_CLUSTER: &str = "KUBERNETES_SERVICE_HOST";
/// Namespace of a process that was told none.
pub const DEFAULT_NAMESPACE: &str = "default";

/// Where to find the API server, when not where Kubernetes says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClientOptions {
    /// A kubeconfig file, before anything else.
    pub kubeconfig: Option<PathBuf>,
    /// Its context, instead of the current one.
    pub context: Option<String>,
}

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Neither a kubeconfig nor a service account.
    #[error(
        "no Kubernetes API server: not in a pod ({IN_CLUSTER} is not set), KUBECONFIG is not set and there is no ~/.kube/config"
    )]
    NotFound,
    /// A kubeconfig that cannot be used.
    #[error("kubeconfig {path}: {error}")]
    Kubeconfig {
        /// Where it was read from.
        path: String,
        /// What is wrong with it.
        error: kube::config::KubeconfigError,
    },
    /// The files of the service account cannot be used.
    #[error("service account: {0}")]
    InCluster(#[from] kube::config::InClusterError),
    /// The configuration was read, but no client can be made of it.
    #[error("Kubernetes client: {0}")]
    Client(#[from] kube::Error),
}

/// A client of the API server, in the order of the reference's library: the given kubeconfig, the one
/// named by `KUBECONFIG`, the service account of a pod, `~/.kube/config`. Nothing is sent yet. The
/// service account's token and CA are read again as they are rotated.
pub async fn client(options: &ClientOptions) -> Result<Client, ClientError> {
    connect(config(options).await?)
}

/// What [`client`] would use.
pub async fn config(options: &ClientOptions) -> Result<Config, ClientError> {
    if let Some(path) = &options.kubeconfig {
        return from_file(path, options).await;
    }
    if let Some(paths) = variable("KUBECONFIG") {
        let refuse = |error| ClientError::Kubeconfig {
            path: paths.clone(),
            error,
        };
        // May be a list of files, which are merged.
        if let Some(merged) = Kubeconfig::from_env().map_err(refuse)? {
            return chosen(merged, options).await.map_err(refuse);
        }
    }
    if variable(IN_CLUSTER).is_some() {
        return Ok(Config::incluster()?);
    }
    let home = variable("HOME").map(|home| Path::new(&home).join(".kube/config"));
    match home.filter(|path| path.exists()) {
        Some(path) => from_file(&path, options).await,
        None => Err(ClientError::NotFound),
    }
}

/// A client for `config`. It does not retry by itself: whoever asks knows whether and when to ask
/// again, and counts the failures.
pub fn connect(mut config: Config) -> Result<Client, ClientError> {
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    config.default_retry = false;
    Ok(Client::try_from(config)?)
}

async fn from_file(path: &Path, options: &ClientOptions) -> Result<Config, ClientError> {
    let refuse = |error| ClientError::Kubeconfig {
        path: path.display().to_string(),
        error,
    };
    let read = Kubeconfig::read_from(path).map_err(refuse)?;
    chosen(read, options).await.map_err(refuse)
}

async fn chosen(
    read: Kubeconfig,
    options: &ClientOptions,
) -> Result<Config, kube::config::KubeconfigError> {
    let choice = KubeConfigOptions {
        context: options.context.clone(),
        ..KubeConfigOptions::default()
    };
    Config::from_custom_kubeconfig(read, &choice).await
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// True for a name that Kubernetes gives to namespaces and to most objects: an RFC 1123 label, dots
/// between labels allowed when `dotted`.
pub fn is_object_name(text: &str, dotted: bool) -> bool {
    let is_label = |label: &str| {
        let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        !label.is_empty()
            && label.bytes().all(inner)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if dotted {
        text.len() <= 253 && text.split('.').all(is_label)
    } else {
        text.len() <= 63 && is_label(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_given_kubeconfig_is_read_and_a_broken_one_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config");
        let text = "apiVersion: v1\nkind: Config\ncurrent-context: a\ncontexts:\n- {name: a, context: {cluster: c, user: u, namespace: models}}\n- {name: b, context: {cluster: d, user: u}}\nclusters:\n- {name: c, cluster: {server: \"http://127.0.0.1:1\"}}\n- {name: d, cluster: {server: \"http://127.0.0.1:2\"}}\nusers:\n- {name: u, user: {token: t}}\n";
        std::fs::write(&path, text).unwrap();
        let mut options = ClientOptions {
            kubeconfig: Some(path.clone()),
            context: None,
        };
        let current = config(&options).await.unwrap();
        assert_eq!(current.cluster_url, "http://127.0.0.1:1/");
        assert_eq!(current.default_namespace, "models");
        options.context = Some("b".to_owned());
        let other = config(&options).await.unwrap();
        assert_eq!(other.cluster_url, "http://127.0.0.1:2/");
        assert!(client(&options).await.is_ok());
        std::fs::write(&path, "contexts: [").unwrap();
        let error = client(&options).await.err().unwrap().to_string();
        assert!(error.contains(path.to_str().unwrap()), "{error}");
    }

    #[test]
    fn names_follow_the_kubernetes_rules() {
        for good in ["a", "vllm-pool", "0", &"a".repeat(63)] {
            assert!(is_object_name(good, false), "{good}");
        }
        for bad in ["", "A", "a.b", "-a", "a-", "a_b", "a/b", &"a".repeat(64)] {
            assert!(!is_object_name(bad, false), "{bad}");
        }
        assert!(is_object_name("a.b-c", true) && is_object_name(&"a".repeat(64), true));
        for bad in ["a..b", ".a", "a.", &"a.".repeat(127)] {
            assert!(!is_object_name(bad, true), "{bad}");
        }
    }

    /// An API server that shows a certificate and wants a token, as genuine ones do.
    #[tokio::test]
    async fn the_servers_certificate_is_checked_and_the_token_sent() {
        use base64::Engine;
        use http_body_util::Full;
        use hyper::service::service_fn;
        use tokio_rustls::rustls::ServerConfig;
        use tokio_rustls::rustls::crypto::ring;
        use tokio_rustls::rustls::pki_types::PrivatePkcs8KeyDer;

        let key = rcgen::KeyPair::generate().unwrap();
        let names = vec!["127.0.0.1".to_owned()];
        let certificate = rcgen::CertificateParams::new(names).unwrap();
        let certificate = certificate.self_signed(&key).unwrap();
        let config = ServerConfig::builder_with_provider(ring::default_provider().into())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate.der().clone()],
                PrivatePkcs8KeyDer::from(key.serialize_der()).into(),
            )
            .unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(std::sync::Arc::new(config));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let Ok(stream) = acceptor.accept(stream).await else {
                    continue;
                };
                let service =
                    service_fn(|request: http::Request<hyper::body::Incoming>| async move {
                        let token = request.headers()[http::header::AUTHORIZATION].clone();
                        let body = token.as_bytes().to_vec();
                        Ok::<_, std::convert::Infallible>(http::Response::new(Full::new(
                            bytes::Bytes::from(body),
                        )))
                    });
                let io = hyper_util::rt::TokioIo::new(stream);
                tokio::spawn(
                    hyper::server::conn::http1::Builder::new().serve_connection(io, service),
                );
            }
        });
        let encode = |der: &[u8]| {
            let base64 = base64::engine::general_purpose::STANDARD;
            let text = base64.encode(der);
            let pem = format!("-----BEGIN CERTIFICATE-----\n{text}\n-----END CERTIFICATE-----\n");
            base64.encode(pem)
        };
        let stranger = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        let stranger = stranger
            .self_signed(&rcgen::KeyPair::generate().unwrap())
            .unwrap();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config");
        for (ca, trusted) in [
            (encode(certificate.der()), true),
            (encode(stranger.der()), false),
        ] {
            let text = format!(
                "apiVersion: v1\nkind: Config\ncurrent-context: a\ncontexts:\n- {{name: a, context: {{cluster: c, user: u}}}}\nclusters:\n- {{name: c, cluster: {{server: \"https://{address}\", certificate-authority-data: {ca}}}}}\nusers:\n- {{name: u, user: {{token: secret}}}}\n"
            );
            std::fs::write(&path, text).unwrap();
            let options = ClientOptions {
                kubeconfig: Some(path.clone()),
                context: None,
            };
            let client = client(&options).await.unwrap();
            let request = http::Request::get("/version").body(Vec::new()).unwrap();
            let answer = client.request_text(request).await.ok();
            assert_eq!(answer, trusted.then(|| "Bearer secret".to_owned()));
        }
    }
}
