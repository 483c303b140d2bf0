//! Engine metrics over HTTP (filled by the data layer).
