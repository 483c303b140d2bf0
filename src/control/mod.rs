//! control (stub).
