//! datalayer (stub).
