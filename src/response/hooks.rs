//! Hooks of the response phase. A configuration without such plugins pays nothing for them.

use std::fmt::Debug;
use std::sync::Arc;

use bytes::Bytes;

use super::usage::Usage;
use crate::datalayer::Endpoint;
use crate::plugin::Hook;
use crate::request::Headers;

/// Looks at the response headers and may add to them.
pub trait ResponseHeaderHook: Send + Sync + Debug {
    /// Adds headers to `set`; one with the name of an existing header replaces it.
    fn on_response_headers(&self, view: &ResponseView<'_>, set: &mut Vec<(String, Bytes)>);
}

/// Runs once the response ended naturally.
pub trait ResponseCompleteHook: Send + Sync + Debug {
    /// Adds to the dynamic metadata of the last reply. `usage` is what the engine reported, if it
    /// could be read.
    fn on_complete(&self, usage: Option<&Usage>, metadata: &mut Vec<MetadataNumber>);
}

/// What hooks may read of a response.
#[derive(Debug)]
pub struct ResponseView<'a> {
    /// Request id.
    pub request_id: &'a str,
    /// The endpoint that answers: the reported one when it is among the picks, else the first pick.
    pub endpoint: &'a Arc<Endpoint>,
    /// What the proxy says about it.
    pub served: Served<'a>,
    /// Response headers, as received.
    pub headers: &'a Headers,
}

/// The proxy's report of the endpoint that answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served<'a> {
    /// The metadata namespace is missing.
    NoNamespace,
    /// The namespace is there, the key is not.
    NoKey,
    /// `ip:port`.
    By(&'a str),
}

/// A number for the dynamic metadata of a response.
#[derive(Debug, Clone, PartialEq)]
pub struct MetadataNumber {
    /// Metadata namespace.
    pub namespace: String,
    /// Key in it.
    pub name: String,
    /// Value.
    pub value: f64,
}

/// The response hooks of one configuration, in document order.
#[derive(Debug, Default)]
pub struct ResponseHooks {
    /// Run on response headers.
    pub headers: Vec<Hook<dyn ResponseHeaderHook>>,
    /// Run at the natural end.
    pub complete: Vec<Hook<dyn ResponseCompleteHook>>,
}

impl ResponseHooks {
    /// True when there is nothing to run.
    pub fn is_empty(&self) -> bool {
        self.headers.is_empty() && self.complete.is_empty()
    }
}
