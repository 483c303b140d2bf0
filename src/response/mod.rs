//! response (stub).
