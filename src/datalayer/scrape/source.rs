//! `metrics-data-source`: where an endpoint's metrics are fetched.

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use crate::plugin::duration::GoDuration;
use crate::plugin::{Build, Maturity, ParamDoc, ParamError, Plugin, PluginError};

/// URL parts and TLS of the scrape. The host is the endpoint's own.
#[derive(Debug, Clone)]
pub struct MetricsDataSource {
    /// `https` instead of `http`.
    pub tls: bool,
    /// Path with leading slash.
    pub path: String,
    /// Instead of the endpoint's port.
    pub port: Option<u16>,
    /// Accept any certificate.
    pub insecure_skip_verify: bool,
    /// PEM bundle that certificates are checked against.
    pub ca_cert_path: Option<PathBuf>,
    /// Client certificate and key, PEM.
    pub client_pair: Option<(PathBuf, PathBuf)>,
    /// Instead of the base tick.
    pub interval: Option<Duration>,
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    scheme: String,
    path: String,
    port: Option<u16>,
    insecure_skip_verify: bool,
    ca_cert_path: String,
    client_cert_path: String,
    client_key_path: String,
    interval: Option<GoDuration>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            scheme: "http".to_owned(),
            path: "/metrics".to_owned(),
            port: None,
            insecure_skip_verify: true,
            ca_cert_path: String::new(),
            client_cert_path: String::new(),
            client_key_path: String::new(),
            interval: None,
        }
    }
}

impl Plugin for MetricsDataSource {
    const TYPE: &'static str = "metrics-data-source";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[
        ParamDoc {
            name: "scheme",
            kind: "string",
            default: "http",
            help: "http or https.",
        },
        ParamDoc {
            name: "path",
            kind: "string",
            default: "/metrics",
            help: "Path of the exposition.",
        },
        ParamDoc {
            name: "port",
            kind: "int",
            default: "the endpoint's",
            help: "Port of the exposition, 1 to 65535.",
        },
        ParamDoc {
            name: "insecureSkipVerify",
            kind: "bool",
            default: "true",
            help: "Accept any certificate.",
        },
        ParamDoc {
            name: "caCertPath",
            kind: "string",
            default: "",
            help: "PEM bundle that certificates are checked against.",
        },
        ParamDoc {
            name: "clientCertPath",
            kind: "string",
            default: "",
            help: "Client certificate, PEM.",
        },
        ParamDoc {
            name: "clientKeyPath",
            kind: "string",
            default: "",
            help: "Key of the client certificate, PEM.",
        },
        ParamDoc {
            name: "interval",
            kind: "duration",
            default: "--refresh-metrics-interval",
            help: "Time between scrapes of one endpoint.",
        },
    ];
    const ABOUT: &'static str = "Scrapes each endpoint's Prometheus metrics.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<Self, _>()?;
        let refuse = |text: String| Err(PluginError::Parameter(ParamError(text)));
        let tls = match settings.scheme.as_str() {
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
        let path = |text: &str| (!text.is_empty()).then(|| PathBuf::from(text));
        Ok(Self {
            tls,
            path: if settings.path.starts_with('/') {
                settings.path
            } else {
                format!("/{}", settings.path)
            },
            port: settings.port,
            insecure_skip_verify: settings.insecure_skip_verify,
            ca_cert_path: path(&settings.ca_cert_path),
            client_pair: path(&settings.client_cert_path).zip(path(&settings.client_key_path)),
            interval: settings.interval.map(|d| d.0),
        })
    }
}
