//! Structured logs on stderr, JSON or text.

use std::fmt;
use std::io::IsTerminal;

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// Shape of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// One JSON object a line: `level`, `ts` (epoch seconds), `logger`, `msg`, fields.
    Json,
    /// For people.
    Text,
}

/// Level of a verbosity number: up to 3 info, 4 debug, 5 and more trace.
pub fn level(verbosity: i32) -> Level {
    match verbosity {
        i32::MIN..=3 => Level::INFO,
        4 => Level::DEBUG,
        _ => Level::TRACE,
    }
}

/// Installs the process-wide subscriber. A second call does nothing.
pub fn install(format: Format, level: Level) {
    // Our own lines at the wanted level; libraries only when something is wrong.
    let filter = EnvFilter::default().add_directive(Level::WARN.into());
    let filter = match format!("pinpod={level}").parse() {
        Ok(ours) => filter.add_directive(ours),
        Err(_) => filter,
    };
    let builder = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_env_filter(filter);
    // An earlier subscriber (of a test or an embedding program) stays in charge.
    let _ = match format {
        Format::Json => builder.event_format(JsonLine).try_init(),
        Format::Text => builder.try_init(),
    };
}

/// The JSON form of the contract.
#[derive(Debug)]
struct JsonLine;

impl<S, N> FormatEvent<S, N> for JsonLine
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut line = serde_json::Map::new();
        let meta = event.metadata();
        line.insert(
            "level".into(),
            meta.level().as_str().to_ascii_lowercase().into(),
        );
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default();
        line.insert("ts".into(), now.as_secs_f64().into());
        line.insert("logger".into(), meta.target().into());
        event.record(&mut Fields(&mut line));
        let text = serde_json::to_string(&line).map_err(|_| fmt::Error)?;
        writeln!(writer, "{text}")
    }
}

struct Fields<'a>(&'a mut serde_json::Map<String, serde_json::Value>);

impl Fields<'_> {
    fn put(&mut self, field: &tracing::field::Field, value: serde_json::Value) {
        let name = if field.name() == "message" {
            "msg"
        } else {
            field.name()
        };
        self.0.insert(name.to_owned(), value);
    }
}

impl tracing::field::Visit for Fields<'_> {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn fmt::Debug) {
        self.put(field, format!("{value:?}").into());
    }

    fn record_str(&mut self, field: &tracing::field::Field, value: &str) {
        self.put(field, value.into());
    }

    fn record_i64(&mut self, field: &tracing::field::Field, value: i64) {
        self.put(field, value.into());
    }

    fn record_u64(&mut self, field: &tracing::field::Field, value: u64) {
        self.put(field, value.into());
    }

    fn record_f64(&mut self, field: &tracing::field::Field, value: f64) {
        self.put(field, value.into());
    }

    fn record_bool(&mut self, field: &tracing::field::Field, value: bool) {
        self.put(field, value.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verbosity_maps_to_levels() {
        assert_eq!(
            [-1, 2, 3, 4, 5, 9].map(level),
            [
                Level::INFO,
                Level::INFO,
                Level::INFO,
                Level::DEBUG,
                Level::TRACE,
                Level::TRACE
            ]
        );
    }

    #[test]
    fn a_json_line_carries_message_and_fields() {
        let buffer = std::sync::Arc::new(parking_lot::Mutex::new(Vec::new()));
        let sink = std::sync::Arc::clone(&buffer);
        let writer = move || Sink(std::sync::Arc::clone(&sink));
        let subscriber = tracing_subscriber::fmt()
            .event_format(JsonLine)
            .with_writer(writer)
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            tracing::warn!(endpoint = "a:1", n = 3, "odd");
        });
        let line: serde_json::Value = serde_json::from_slice(&buffer.lock()).unwrap();
        assert_eq!(line["level"], "warn");
        assert_eq!(line["msg"], "odd");
        assert_eq!(line["endpoint"], "a:1");
        assert_eq!(line["n"], 3);
        assert!(line["ts"].as_f64().unwrap() > 1e9);
    }

    struct Sink(std::sync::Arc<parking_lot::Mutex<Vec<u8>>>);

    impl std::io::Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
}
