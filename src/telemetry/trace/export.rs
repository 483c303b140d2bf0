//! Where batches of spans go.

use std::io::Write;

use serde_json::{Value as Json, json};

use super::otlp::{Otlp, OtlpError};
use super::span::{Finished, Kind, Value};

/// An exporter.
#[derive(Debug)]
pub(super) enum Exporter {
    /// To a collector.
    Otlp(Box<Otlp>),
    /// To stdout, a line of JSON for each span.
    Console(Vec<(String, String)>),
}

/// Why a batch was not taken.
#[derive(Debug, thiserror::Error)]
pub(super) enum ExportError {
    #[error("{0}")]
    Otlp(#[from] OtlpError),
    #[error("stdout: {0}")]
    Console(#[from] std::io::Error),
}

impl ExportError {
    /// The same batch may be taken in a moment.
    pub(super) fn is_passing(&self) -> bool {
        match self {
            Self::Otlp(error) => error.is_passing(),
            Self::Console(_) => false,
        }
    }
}

impl Exporter {
    /// Returns how many spans the other side refused.
    pub(super) async fn export(&mut self, batch: &[Finished]) -> Result<u64, ExportError> {
        match self {
            Self::Otlp(otlp) => Ok(otlp.export(batch).await?),
            Self::Console(resource) => {
                let mut lines = Vec::new();
                for span in batch {
                    lines.extend_from_slice(line(resource, span).to_string().as_bytes());
                    lines.push(b'\n');
                }
                // A pipe that nobody reads may hold this thread up, but no request.
                let write = move || {
                    let mut out = std::io::stdout().lock();
                    out.write_all(&lines).and_then(|()| out.flush())
                };
                let written = tokio::task::spawn_blocking(write).await;
                written.unwrap_or_else(|error| Err(std::io::Error::other(error)))?;
                Ok(0)
            }
        }
    }
}

fn line(resource: &[(String, String)], span: &Finished) -> Json {
    let resource: serde_json::Map<_, _> = resource
        .iter()
        .map(|(name, value)| (name.clone(), Json::from(value.as_str())))
        .collect();
    let attributes: serde_json::Map<_, _> = span
        .attributes
        .iter()
        .map(|(name, value)| ((*name).to_owned(), json_value(value)))
        .collect();
    json!({
        "resource": resource,
        "scope": span.site.scope,
        "name": span.site.name,
        "kind": match span.site.kind {
            Kind::Internal => "INTERNAL",
            Kind::Server => "SERVER",
        },
        "trace_id": span.trace.to_string(),
        "span_id": span.id.to_string(),
        "parent_span_id": span.parent.map(|id| id.to_string()),
        "start_unix_nanos": span.start_unix_nanos,
        "end_unix_nanos": span.end_unix_nanos,
        "attributes": attributes,
        "error": span.error,
    })
}

fn json_value(value: &Value) -> Json {
    match value {
        Value::Text(text) => text.as_ref().into(),
        Value::Int(number) => (*number).into(),
        Value::Float(number) => (*number).into(),
        Value::Bool(value) => (*value).into(),
        Value::Texts(texts) => texts.as_slice().into(),
        Value::Floats(numbers) => numbers.as_slice().into(),
    }
}
