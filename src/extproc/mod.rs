//! extproc (stub).
