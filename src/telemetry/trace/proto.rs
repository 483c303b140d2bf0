//! Generated messages and service of the collector (see `proto/otlp_trace.proto`).
#![allow(
    missing_docs,
    unreachable_pub,
    rust_2018_idioms,
    clippy::pedantic,
    clippy::allow_attributes_without_reason,
    reason = "generated code"
)]

tonic::include_proto!("opentelemetry.proto.collector.trace.v1");
