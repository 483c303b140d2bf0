//! Traces of a process: from its environment to an exporter.

use std::sync::Arc;

use anyhow::Context;
use tokio_rustls::rustls::ClientConfig;

use crate::datalayer::scrape::tls::client_config;
use crate::datalayer::sources::HttpSource;
use crate::telemetry::trace::settings::{self, ExporterSettings, OtlpSettings};
use crate::telemetry::trace::{Export, Tracer};

/// Starts tracing as the `OTEL_*` variables say, for a process that is called `service_name` unless they
/// say otherwise. Off, with no exporter to finish, when it is not `wanted` or no exporter is asked for.
/// Needs the metrics recorder and a tokio runtime.
pub(crate) fn install(
    service_name: &str,
    wanted: bool,
) -> anyhow::Result<(Tracer, Option<Export>)> {
    if !wanted {
        return Ok((Tracer::default(), None));
    }
    let found = settings::read(service_name, |name| std::env::var(name).ok())?;
    for warning in &found.warnings {
        tracing::warn!("{warning}");
    }
    let Some(settings) = found.settings else {
        return Ok((Tracer::default(), None));
    };
    let (exporter, tls) = match &settings.exporter {
        ExporterSettings::Console => ("stdout".to_owned(), None),
        ExporterSettings::Otlp(otlp) => (otlp.endpoint.to_string(), tls(otlp)?),
    };
    tracing::info!(exporter, "recording traces");
    let (tracer, export) = Tracer::install(settings, tls);
    Ok((tracer, Some(export)))
}

/// TLS towards the collector, as towards engines; HTTP/2 is what gRPC needs.
fn tls(otlp: &OtlpSettings) -> anyhow::Result<Option<Arc<ClientConfig>>> {
    let source = HttpSource {
        tls: otlp.is_secure(),
        insecure_skip_verify: false,
        path: String::new(),
        port: None,
        use_node_address: false,
        ca_cert_path: otlp.tls.ca.clone(),
        client_pair: otlp.tls.client_pair.clone(),
        interval: None,
    };
    let config = client_config(&source).context("TLS towards the trace collector")?;
    Ok(config.map(|config| {
        let mut config = Arc::unwrap_or_clone(config);
        config.alpn_protocols = vec![b"h2".to_vec()];
        Arc::new(config)
    }))
}
