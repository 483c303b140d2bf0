//! Looks at an installation from outside and says what is wrong with it and how to mend it.
//!
//! It only reads: probes, scrapes, the proxy's admin interface, the Kubernetes API.

pub mod grpc;
