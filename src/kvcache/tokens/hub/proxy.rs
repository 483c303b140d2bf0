//! The proxy between us and the hub, where the environment names one.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use http::{HeaderValue, Method, Request, Uri, header};
use http_body_util::Empty;
use hyper::client::conn::http1::handshake;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use super::HubError;
use super::http::exchange;

/// A proxy that opens tunnels (`CONNECT`). Only servers of https are reached through it: others are
/// mirrors nearby.
#[derive(Clone)]
pub struct Proxy {
    url: Uri,
    authorization: Option<HeaderValue>,
    /// Hosts that are reached without it: whole names, ends of names, or `*` for all.
    except: Vec<String>,
}

impl std::fmt::Debug for Proxy {
    /// Without its password.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Proxy")
            .field("host", &self.url.host())
            .field("except", &self.except)
            .finish_non_exhaustive()
    }
}

impl Proxy {
    /// `url` is `http://[user:password@]host:port`, with or without the scheme; `except` a list of hosts
    /// with commas, as `NO_PROXY` has it.
    pub fn new(url: &str, except: &str) -> Result<Self, HubError> {
        let wrong = || HubError::Name("HTTPS_PROXY: not http://host:port".to_owned());
        let with_scheme = if url.contains("://") {
            url.to_owned()
        } else {
            format!("http://{url}")
        };
        let url: Uri = with_scheme.parse().map_err(|_| wrong())?;
        let authority = url.authority().ok_or_else(wrong)?.as_str();
        if url.scheme_str() != Some("http") {
            return Err(wrong());
        }
        let authorization = match authority.rsplit_once('@') {
            None => None,
            Some((user, _)) => {
                let value = format!("Basic {}", BASE64_STANDARD.encode(user));
                let mut value = HeaderValue::try_from(value).map_err(|_| wrong())?;
                value.set_sensitive(true);
                Some(value)
            }
        };
        let except = except.split(',').map(|host| {
            let host = host.trim().trim_start_matches('.');
            host.to_ascii_lowercase()
        });
        Ok(Self {
            except: except.filter(|host| !host.is_empty()).collect(),
            url,
            authorization,
        })
    }

    /// True when `host` is to be reached through it.
    pub(super) fn serves(&self, host: &str) -> bool {
        let host = host.to_ascii_lowercase();
        let excepted = |known: &String| {
            let inside = host.strip_suffix(known.as_str());
            known == "*" || inside.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        };
        !self.except.iter().any(excepted)
    }

    /// A connection to `host:port` through the proxy.
    pub(super) async fn tunnel(
        &self,
        host: &str,
        port: u16,
    ) -> Result<TokioIo<Upgraded>, HubError> {
        let failed = |error: &dyn std::fmt::Display| exchange(&self.url, format!("proxy: {error}"));
        let own = self.url.host().unwrap_or_default().trim_matches(['[', ']']);
        let own_port = self.url.port_u16().unwrap_or(80);
        let stream = TcpStream::connect((own, own_port))
            .await
            .map_err(|e| failed(&e))?;
        let (mut sender, connection) = handshake(TokioIo::new(stream))
            .await
            .map_err(|e| failed(&e))?;
        // Ends with the tunnel. Its errors show up there.
        tokio::spawn(async move {
            let _ = connection.with_upgrades().await;
        });
        let bracketed = if host.contains(':') {
            format!("[{host}]")
        } else {
            host.to_owned()
        };
        let target = format!("{bracketed}:{port}");
        let mut request = Request::builder()
            .method(Method::CONNECT)
            .uri(&target)
            .header(header::HOST, &target)
            .body(Empty::<Bytes>::new())
            .map_err(|e| failed(&e))?;
        if let Some(value) = &self.authorization {
            let headers = request.headers_mut();
            headers.insert(header::PROXY_AUTHORIZATION, value.clone());
        }
        let response = sender.send_request(request).await.map_err(|e| failed(&e))?;
        if !response.status().is_success() {
            return Err(failed(&format!("{target}: status {}", response.status())));
        }
        let upgraded = hyper::upgrade::on(response).await;
        upgraded.map(TokioIo::new).map_err(|e| failed(&e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_excepted_by_name_and_by_domain() {
        let proxy = Proxy::new("proxy:3128", "localhost, .corp.example,hub.internal").unwrap();
        for (host, serves) in [
            ("huggingface.co", true),
            ("localhost", false),
            ("hub.internal", false),
            ("cdn.HUB.internal", false),
            ("thub.internal", true),
            ("a.corp.example", false),
            ("corp.example", false),
        ] {
            assert_eq!(proxy.serves(host), serves, "{host}");
        }
        assert!(
            !Proxy::new("proxy:3128", "*")
                .unwrap()
                .serves("huggingface.co")
        );
    }

    #[test]
    fn a_password_is_sent_to_the_proxy_and_shown_to_nobody() {
        let proxy = Proxy::new("http://user:secret@proxy:3128", "").unwrap();
        // base64 of "user:secret"
        let sent = proxy.authorization.as_ref().unwrap();
        assert_eq!(sent, "Basic dXNlcjpzZWNyZXQ=");
        assert!(!format!("{proxy:?}").contains("secret"));
        for wrong in ["https://proxy:1", "socks5://proxy:1", "http://", "a b"] {
            let error = Proxy::new(wrong, "").unwrap_err().to_string();
            assert!(error.contains("HTTPS_PROXY"), "{error}");
        }
    }
}
