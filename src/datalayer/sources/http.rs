//! What all polling sources have in common: URL parts, TLS, interval.

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use crate::datalayer::EndpointSpec;
use crate::plugin::duration::GoDuration;
use crate::plugin::{Build, ParamDoc, ParamError, Plugin, PluginError};

/// Where and how often one path of every endpoint is fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpSource {
    /// `https` instead of `http`.
    pub tls: bool,
    /// Path with leading slash.
    pub path: String,
    /// Instead of the endpoint's port.
    pub port: Option<u16>,
    /// The endpoint's node instead of the endpoint.
    pub use_node_address: bool,
    /// Accept any certificate.
    pub insecure_skip_verify: bool,
    /// PEM bundle that certificates are checked against; the system's when absent.
    pub ca_cert_path: Option<PathBuf>,
    /// Client certificate and key, PEM.
    pub client_pair: Option<(PathBuf, PathBuf)>,
    /// Instead of the base tick.
    pub interval: Option<Duration>,
}

/// Parameters of all polling sources; each type documents those it accepts.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    scheme: Option<String>,
    path: Option<String>,
    port: Option<u16>,
    insecure_skip_verify: Option<bool>,
    ca_cert_path: String,
    client_cert_path: String,
    client_key_path: String,
    use_node_address: bool,
    interval: Option<GoDuration>,
}

/// What a source type assumes when a parameter is absent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Defaults {
    pub(super) scheme: &'static str,
    pub(super) path: &'static str,
    pub(super) port: Option<u16>,
    pub(super) insecure_skip_verify: bool,
}

pub(super) const SCHEME: ParamDoc = ParamDoc {
    name: "scheme",
    kind: "string",
    default: "http",
    help: "http or https.",
};
pub(super) const PATH: ParamDoc = ParamDoc {
    name: "path",
    kind: "string",
    default: "/metrics",
    help: "Path of the exposition.",
};
pub(super) const SKIP_VERIFY: ParamDoc = ParamDoc {
    name: "insecureSkipVerify",
    kind: "bool",
    default: "true",
    help: "Accept any certificate.",
};
pub(super) const CA: ParamDoc = ParamDoc {
    name: "caCertPath",
    kind: "string",
    default: "the system's bundle",
    help: "PEM bundle that certificates are checked against.",
};
pub(super) const CLIENT_CERT: ParamDoc = ParamDoc {
    name: "clientCertPath",
    kind: "string",
    default: "",
    help: "Client certificate, PEM.",
};
pub(super) const CLIENT_KEY: ParamDoc = ParamDoc {
    name: "clientKeyPath",
    kind: "string",
    default: "",
    help: "Key of the client certificate, PEM.",
};
pub(super) const INTERVAL: ParamDoc = ParamDoc {
    name: "interval",
    kind: "duration",
    default: "--refresh-metrics-interval",
    help: "Time between fetches from one endpoint.",
};

impl HttpSource {
    /// Reads the parameters that `P` documents.
    pub(super) fn read<P: Plugin>(
        build: &Build<'_>,
        defaults: Defaults,
    ) -> Result<Self, PluginError> {
        let refuse = |text: String| Err(PluginError::Parameter(ParamError(text)));
        if let Some(name) = unknown_to::<P>(build) {
            return refuse(format!("parameters: unknown field `{name}`"));
        }
        let settings: Settings = build.read::<P, _>()?;
        let tls = match settings.scheme.as_deref().unwrap_or(defaults.scheme) {
            "http" => false,
            "https" => true,
            other => return refuse(format!("scheme: {other:?} is not http or https")),
        };
        if settings.port == Some(0) {
            return refuse("port: 0 is not within 1 and 65535".to_owned());
        }
        if settings.client_cert_path.is_empty() != settings.client_key_path.is_empty() {
            return refuse("clientCertPath and clientKeyPath go together".to_owned());
        }
        let file = |text: &str| (!text.is_empty()).then(|| PathBuf::from(text));
        Ok(Self {
            tls,
            path: request_path(settings.path.as_deref().unwrap_or(defaults.path))?,
            port: settings.port.or(defaults.port),
            use_node_address: settings.use_node_address,
            insecure_skip_verify: settings
                .insecure_skip_verify
                .unwrap_or(defaults.insecure_skip_verify),
            ca_cert_path: file(&settings.ca_cert_path),
            client_pair: file(&settings.client_cert_path).zip(file(&settings.client_key_path)),
            interval: settings.interval.map(|d| d.0),
        })
    }

    /// Replaces the path, adding a leading slash.
    pub fn set_path(&mut self, path: &str) -> Result<(), ParamError> {
        self.path = request_path(path)?;
        Ok(())
    }

    /// Host (address or name) and port that serve this source for `endpoint`; `None` when it is on a
    /// node whose address is not known. Discovery may have redirected metrics to another host; a port
    /// of the source's own goes before a redirected one.
    pub fn target(&self, endpoint: &EndpointSpec) -> Option<(String, u16)> {
        let details = &endpoint.details;
        let host = if self.use_node_address {
            details.node_address?.to_string()
        } else {
            let name = details.metrics_host.as_ref().or(details.dns_name.as_ref());
            name.cloned()
                .unwrap_or_else(|| endpoint.address.ip().to_string())
        };
        let port = self.port.or(details.metrics_port);
        Some((host, port.unwrap_or(endpoint.address.port())))
    }
}

/// The first parameter that `P` does not document; the shared settings know more than each type.
fn unknown_to<P: Plugin>(build: &Build<'_>) -> Option<String> {
    let given = build.parameters.0.as_ref()?.as_object()?;
    let known = |name: &&String| {
        P::PARAMETERS
            .iter()
            .any(|p| p.name.eq_ignore_ascii_case(name))
    };
    given.keys().find(|name| !known(name)).cloned()
}

/// `path` with a leading slash, fit for a request line.
fn request_path(path: &str) -> Result<String, ParamError> {
    if !path.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(ParamError(format!(
            "path: {path:?} has characters that must be escaped"
        )));
    }
    let slash = if path.starts_with('/') { "" } else { "/" };
    Ok(format!("{slash}{path}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datalayer::EndpointDetails;
    use crate::datalayer::sources::{
        DataSource, DcgmDataSource, MetricsDataSource, ModelsDataSource,
        MulticlusterMetricsDataSource,
    };
    use crate::plugin::{DataKeys, Parameters};

    fn source<P: Plugin + DataSource>(parameters: &str) -> Result<HttpSource, String> {
        let built = P::build(&mut Build {
            name: P::TYPE,
            parameters: &Parameters(Some(serde_json::from_str(parameters).unwrap())),
            keys: &mut DataKeys::default(),
        });
        let source = built.map_err(|e| e.to_string())?;
        Ok(source.http().unwrap().clone())
    }

    fn endpoint(details: EndpointDetails) -> EndpointSpec {
        EndpointSpec {
            name: "e".to_owned(),
            namespace: "default".to_owned(),
            address: ([10, 0, 0, 1], 8000).into(),
            labels: std::collections::BTreeMap::new(),
            rank: 0,
            details,
        }
    }

    #[test]
    fn each_type_has_its_defaults() {
        let url = |s: HttpSource| (s.tls, s.path, s.port, s.insecure_skip_verify);
        let plain = |path: &str, port| (false, path.to_owned(), port, true);
        assert_eq!(
            url(source::<MetricsDataSource>("{}").unwrap()),
            plain("/metrics", None)
        );
        assert_eq!(
            url(source::<ModelsDataSource>("{}").unwrap()),
            plain("/v1/models", None)
        );
        assert_eq!(
            url(source::<DcgmDataSource>("{}").unwrap()),
            plain("/metrics", Some(9400))
        );
        assert_eq!(
            url(source::<MulticlusterMetricsDataSource>("{}").unwrap()),
            (true, "/metrics".to_owned(), None, false)
        );
    }

    #[test]
    fn parameters_are_checked_per_type() {
        let given = source::<MetricsDataSource>(
            r#"{"Scheme": "https", "path": "m", "port": 9, "interval": "1s", "clientCertPath": "c", "clientKeyPath": "k"}"#,
        );
        let given = given.unwrap();
        assert_eq!(
            (given.tls, given.path.as_str(), given.port),
            (true, "/m", Some(9))
        );
        assert_eq!(given.interval, Some(Duration::from_secs(1)));
        assert_eq!(given.client_pair, Some(("c".into(), "k".into())));
        for bad in [
            r#"{"scheme": "ftp"}"#,
            r#"{"port": 0}"#,
            r#"{"port": 65536}"#,
            r#"{"clientCertPath": "c"}"#,
            r#"{"path": "a b"}"#,
            r#"{"useNodeAddress": true}"#,
            r#"{"interval": "soon"}"#,
        ] {
            assert!(source::<MetricsDataSource>(bad).is_err(), "{bad}");
        }
        assert!(source::<ModelsDataSource>(r#"{"port": 1}"#).is_err());
        assert!(source::<DcgmDataSource>(r#"{"caCertPath": "x"}"#).is_err());
        assert!(source::<MulticlusterMetricsDataSource>(r#"{"caCertPath": "x"}"#).is_ok());
    }

    #[test]
    fn the_target_follows_discovery_and_the_source() {
        let metrics = source::<MetricsDataSource>("{}").unwrap();
        let fixed = source::<MetricsDataSource>(r#"{"port": 9}"#).unwrap();
        let node = source::<DcgmDataSource>(r#"{"useNodeAddress": true}"#).unwrap();
        let target = |source: &HttpSource, details| source.target(&endpoint(details));
        let at = |host: &str, port| Some((host.to_owned(), port));
        let plain = EndpointDetails::default();
        assert_eq!(target(&metrics, plain.clone()), at("10.0.0.1", 8000));
        assert_eq!(target(&fixed, plain.clone()), at("10.0.0.1", 9));
        assert_eq!(target(&node, plain.clone()), None);
        let on_node = EndpointDetails {
            node_address: Some([192, 0, 2, 1].into()),
            ..plain.clone()
        };
        assert_eq!(target(&node, on_node), at("192.0.2.1", 9400));
        let named = EndpointDetails {
            dns_name: Some("gateway.test".to_owned()),
            ..plain
        };
        assert_eq!(target(&metrics, named.clone()), at("gateway.test", 8000));
        let redirected = EndpointDetails {
            metrics_host: Some("epp.test".to_owned()),
            metrics_port: Some(9090),
            ..named
        };
        assert_eq!(target(&metrics, redirected.clone()), at("epp.test", 9090));
        assert_eq!(target(&fixed, redirected), at("epp.test", 9));
    }
}
