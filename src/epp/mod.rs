//! epp (stub).
