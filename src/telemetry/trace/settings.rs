//! What the environment asks for, in the variables of OpenTelemetry.
//!
//! Spans are exported only when an exporter is asked for: by `OTEL_TRACES_EXPORTER` (`otlp` or
//! `console`), or by naming a collector. The reference writes every span to stdout otherwise, where logs
//! of others are.

use std::path::PathBuf;
use std::time::Duration;

use http::Uri;
use tonic::metadata::{Ascii, MetadataKey, MetadataValue};

use super::otlp::endpoint;
use super::sampler::{DEFAULT_RATIO, Sampler};

/// Port of OTLP over gRPC.
pub(super) const DEFAULT_PORT: u16 = 4317;
/// Attributes of the resource that are taken from the environment; further ones are left out.
const MAX_RESOURCE_ATTRIBUTES: usize = 64;
/// Headers that are taken from the environment; further ones are left out.
const MAX_HEADERS: usize = 32;

/// How spans are exported.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Where to.
    pub exporter: ExporterSettings,
    /// Which requests are recorded.
    pub sampler: Sampler,
    /// Who we are: names and values.
    pub resource: Vec<(String, String)>,
    /// How spans are gathered.
    pub batch: BatchLimits,
}

/// Where spans go.
#[derive(Debug, Clone, PartialEq)]
pub enum ExporterSettings {
    /// To a collector.
    Otlp(OtlpSettings),
    /// To stdout.
    Console,
}

/// A collector that speaks OTLP over gRPC.
#[derive(Debug, Clone, PartialEq)]
pub struct OtlpSettings {
    /// `http` or `https`, with a host.
    pub endpoint: Uri,
    /// Files of a TLS connection.
    pub tls: TlsFiles,
    /// Sent with every batch.
    pub headers: Vec<Header>,
    /// Time for one attempt.
    pub timeout: Duration,
}

impl OtlpSettings {
    /// True when the connection is TLS.
    pub fn is_secure(&self) -> bool {
        self.endpoint.scheme_str() == Some("https")
    }
}

/// Name and value of a header.
pub type Header = (MetadataKey<Ascii>, MetadataValue<Ascii>);

/// Files of a TLS connection, in PEM.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TlsFiles {
    /// Whose certificates are believed; `None` for those the system trusts.
    pub ca: Option<PathBuf>,
    /// Our certificate and its key.
    pub client_pair: Option<(PathBuf, PathBuf)>,
}

/// How spans are gathered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchLimits {
    /// Spans that may wait; further ones are dropped.
    pub max_queue: usize,
    /// Spans of a batch.
    pub max_batch: usize,
    /// How long a span waits for others.
    pub delay: Duration,
    /// Time for a batch, repeated attempts included.
    pub timeout: Duration,
}

impl Default for BatchLimits {
    /// As the OpenTelemetry specification has them.
    fn default() -> Self {
        Self {
            max_queue: 2048,
            max_batch: 512,
            delay: Duration::from_secs(5),
            timeout: Duration::from_secs(30),
        }
    }
}

/// The environment asks for something that cannot be done.
#[derive(Debug, thiserror::Error)]
#[error("{variable}: {problem}")]
pub struct SettingsError {
    variable: &'static str,
    problem: String,
}

/// What was found in the environment.
#[derive(Debug)]
pub struct Found {
    /// `None` when no exporter is asked for.
    pub settings: Option<Settings>,
    /// What was not used, and why.
    pub warnings: Vec<String>,
}

/// Reads variables through `get`. `service_name` is what we are called unless they say otherwise.
pub fn read(
    service_name: &str,
    get: impl Fn(&str) -> Option<String>,
) -> Result<Found, SettingsError> {
    let mut reader = Reader {
        get: |name: &str| {
            get(name)
                .map(|v| v.trim().to_owned())
                .filter(|v| !v.is_empty())
        },
        warnings: Vec::new(),
    };
    let exporter = reader.exporter()?;
    let settings = exporter.map(|exporter| Settings {
        exporter,
        sampler: reader.sampler(),
        resource: reader.resource(service_name),
        batch: reader.batch(),
    });
    Ok(Found {
        settings,
        warnings: reader.warnings,
    })
}

struct Reader<G> {
    get: G,
    warnings: Vec<String>,
}

impl<G: Fn(&str) -> Option<String>> Reader<G> {
    /// Of the two names a setting has, the one for traces alone comes first.
    fn otlp(&self, of_traces: &str, of_all: &str) -> Option<String> {
        (self.get)(of_traces).or_else(|| (self.get)(of_all))
    }

    fn exporter(&mut self) -> Result<Option<ExporterSettings>, SettingsError> {
        if (self.get)("OTEL_SDK_DISABLED").is_some_and(|v| v.eq_ignore_ascii_case("true")) {
            return Ok(None);
        }
        let collector = self.otlp(
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
            "OTEL_EXPORTER_OTLP_ENDPOINT",
        );
        match (self.get)("OTEL_TRACES_EXPORTER").as_deref() {
            Some("otlp") => {}
            Some("console") => return Ok(Some(ExporterSettings::Console)),
            Some("none") => return Ok(None),
            Some(other) => {
                self.warnings.push(format!(
                    "OTEL_TRACES_EXPORTER: {other:?} is not otlp, console or none, no spans are exported"
                ));
                return Ok(None);
            }
            None if collector.is_none() => return Ok(None),
            None => {}
        }
        Ok(Some(ExporterSettings::Otlp(
            self.collector(collector.as_deref())?,
        )))
    }

    fn collector(&mut self, named: Option<&str>) -> Result<OtlpSettings, SettingsError> {
        let protocol = self.otlp(
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL",
            "OTEL_EXPORTER_OTLP_PROTOCOL",
        );
        if let Some(protocol) = protocol.filter(|p| p != "grpc") {
            self.warnings.push(format!(
                "OTEL_EXPORTER_OTLP_PROTOCOL: {protocol:?} is not spoken here, spans go out over grpc"
            ));
        }
        let compression = self.otlp(
            "OTEL_EXPORTER_OTLP_TRACES_COMPRESSION",
            "OTEL_EXPORTER_OTLP_COMPRESSION",
        );
        if let Some(compression) = compression.filter(|c| c != "none") {
            self.warnings.push(format!(
                "OTEL_EXPORTER_OTLP_COMPRESSION: {compression:?} is not used, spans go out as they are"
            ));
        }
        let insecure = self.otlp(
            "OTEL_EXPORTER_OTLP_TRACES_INSECURE",
            "OTEL_EXPORTER_OTLP_INSECURE",
        );
        let path = |kind: &str| {
            let of_traces = format!("OTEL_EXPORTER_OTLP_TRACES_{kind}");
            let of_all = format!("OTEL_EXPORTER_OTLP_{kind}");
            self.otlp(&of_traces, &of_all).map(PathBuf::from)
        };
        let tls = TlsFiles {
            ca: path("CERTIFICATE"),
            client_pair: path("CLIENT_CERTIFICATE").zip(path("CLIENT_KEY")),
        };
        // Where nothing is said about the way there, it is the plain port of a collector beside us.
        let nothing_said = named.is_none() && insecure.is_none() && tls == TlsFiles::default();
        let plain = nothing_said || insecure.is_some_and(|v| v.eq_ignore_ascii_case("true"));
        let scheme = if plain { "http" } else { "https" };
        let place = named.unwrap_or("localhost:4317");
        Ok(OtlpSettings {
            endpoint: endpoint(place, scheme).map_err(|problem| SettingsError {
                variable: "OTEL_EXPORTER_OTLP_ENDPOINT",
                problem,
            })?,
            tls,
            headers: self.headers()?,
            timeout: self
                .millis("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT")
                .or_else(|| self.millis("OTEL_EXPORTER_OTLP_TIMEOUT"))
                .unwrap_or(Duration::from_secs(10)),
        })
    }

    fn headers(&mut self) -> Result<Vec<Header>, SettingsError> {
        let list = self.otlp(
            "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
            "OTEL_EXPORTER_OTLP_HEADERS",
        );
        // Values may be credentials, so they are not shown.
        let refuse = |name: &str| SettingsError {
            variable: "OTEL_EXPORTER_OTLP_HEADERS",
            problem: format!("{name:?} or its value cannot be a header"),
        };
        let pairs = list.as_deref().map(pairs).transpose();
        let pairs = pairs.map_err(|_| refuse("an entry"))?.unwrap_or_default();
        let pairs = pairs.into_iter().take(MAX_HEADERS);
        let header = |(name, value): (String, String)| {
            let key = name
                .to_ascii_lowercase()
                .parse()
                .map_err(|_| refuse(&name))?;
            let mut value: MetadataValue<Ascii> = value.parse().map_err(|_| refuse(&name))?;
            value.set_sensitive(true);
            Ok((key, value))
        };
        pairs.map(header).collect()
    }

    fn sampler(&mut self) -> Sampler {
        if let Some(other) = (self.get)("OTEL_TRACES_SAMPLER")
            && other != "parentbased_traceidratio"
        {
            self.warnings.push(format!(
                "OTEL_TRACES_SAMPLER: {other:?} is not used, only parentbased_traceidratio is"
            ));
        }
        let Some(text) = (self.get)("OTEL_TRACES_SAMPLER_ARG") else {
            return Sampler::new(DEFAULT_RATIO);
        };
        match text.parse() {
            Ok(ratio) if (0.0..=1.0).contains(&ratio) => Sampler::new(ratio),
            _ => {
                self.warnings.push(format!(
                    "OTEL_TRACES_SAMPLER_ARG: {text:?} is not within 0 and 1, {DEFAULT_RATIO} is used"
                ));
                Sampler::new(DEFAULT_RATIO)
            }
        }
    }

    fn resource(&mut self, service_name: &str) -> Vec<(String, String)> {
        let text = (self.get)("OTEL_RESOURCE_ATTRIBUTES").unwrap_or_default();
        let mut resource = pairs(&text).unwrap_or_else(|problem| {
            // All or nothing, as the specification asks.
            self.warnings
                .push(format!("OTEL_RESOURCE_ATTRIBUTES: {problem}, none is used"));
            Vec::new()
        });
        resource.truncate(MAX_RESOURCE_ATTRIBUTES);
        let has = |resource: &[(String, String)], key| resource.iter().any(|(name, _)| name == key);
        if let Some(name) = (self.get)("OTEL_SERVICE_NAME") {
            resource.retain(|(key, _)| key != "service.name");
            resource.insert(0, ("service.name".to_owned(), name));
        } else if !has(&resource, "service.name") {
            resource.insert(0, ("service.name".to_owned(), service_name.to_owned()));
        }
        if !has(&resource, "service.version") {
            let version = env!("CARGO_PKG_VERSION").to_owned();
            resource.push(("service.version".to_owned(), version));
        }
        resource
    }

    fn batch(&mut self) -> BatchLimits {
        let defaults = BatchLimits::default();
        let max_queue = self.number("OTEL_BSP_MAX_QUEUE_SIZE");
        let max_queue = max_queue.unwrap_or(defaults.max_queue).min(1 << 20);
        let max_batch = self.number("OTEL_BSP_MAX_EXPORT_BATCH_SIZE");
        BatchLimits {
            max_queue,
            max_batch: max_batch.unwrap_or(defaults.max_batch).min(max_queue),
            delay: self
                .millis("OTEL_BSP_SCHEDULE_DELAY")
                .unwrap_or(defaults.delay),
            timeout: self
                .millis("OTEL_BSP_EXPORT_TIMEOUT")
                .unwrap_or(defaults.timeout),
        }
    }

    fn millis(&mut self, name: &'static str) -> Option<Duration> {
        let millis = self.number(name)?;
        Some(Duration::from_millis(
            u64::try_from(millis).unwrap_or(u64::MAX),
        ))
    }

    /// A number above 0.
    fn number(&mut self, name: &'static str) -> Option<usize> {
        let text = (self.get)(name)?;
        let number = text.parse().ok().filter(|n| *n > 0);
        if number.is_none() {
            self.warnings.push(format!(
                "{name}: {text:?} is not a number above 0, it is not used"
            ));
        }
        number
    }
}

/// `name=value,...`, values percent-encoded, as baggage is written.
fn pairs(text: &str) -> Result<Vec<(String, String)>, String> {
    let entries = text.split(',').map(str::trim).filter(|e| !e.is_empty());
    let pair = |entry: &str| {
        let (name, value) = entry
            .split_once('=')
            .ok_or_else(|| "an entry without =".to_owned())?;
        let name = name.trim();
        if name.is_empty() {
            return Err("an entry without a name".to_owned());
        }
        let value =
            decoded(value.trim()).ok_or_else(|| format!("the value of {name:?} is broken"))?;
        Ok((name.to_owned(), value))
    };
    entries.map(pair).collect()
}

/// Percent-encoded text.
fn decoded(text: &str) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, more)) = rest.split_first() {
        if *first != b'%' {
            out.push(*first);
            rest = more;
            continue;
        }
        let (digits, more) = more.split_at_checked(2)?;
        let digits = std::str::from_utf8(digits).ok()?;
        let plain = digits.bytes().all(|b| b.is_ascii_hexdigit());
        out.push(u8::from_str_radix(digits, 16).ok().filter(|_| plain)?);
        rest = more;
    }
    String::from_utf8(out).ok()
}

#[cfg(test)]
#[path = "settings_tests.rs"]
mod tests;
