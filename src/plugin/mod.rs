//! plugin (stub).
