//! scheduling (stub).
