//! Built-in data producers (filled in).
