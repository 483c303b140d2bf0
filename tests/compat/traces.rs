//! Traces: a picker and a sidecar as processes, and a collector that sees what they export.

#[path = "traces/collector.rs"]
mod collector;
#[path = "traces/picker.rs"]
mod picker;
#[path = "traces/sidecar.rs"]
mod sidecar;
