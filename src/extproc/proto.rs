//! Generated messages (see `proto/`), and the few readings of them that several files need.
//!
//! The types are our own prost types with `Bytes` bodies instead of the `envoy-types` crate: bodies
//! and header values stay slices of the received frame, fields that are never read are never built.
#![allow(
    missing_docs,
    unreachable_pub,
    rust_2018_idioms,
    clippy::pedantic,
    clippy::allow_attributes_without_reason,
    reason = "generated code"
)]

tonic::include_proto!("envoy.service.ext_proc.v3");

/// gRPC health checking messages and service.
pub mod health {
    tonic::include_proto!("grpc.health.v1");
}
