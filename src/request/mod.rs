//! request (stub).
