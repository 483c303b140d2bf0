//! `destination-endpoint-served-verifier`, for conformance tests.

use bytes::Bytes;

use super::{ResponseHeaderHook, ResponseView, Served};
use crate::plugin::{Build, Maturity, ParamDoc, Plugin, PluginError};

/// Response header with the result.
const HEADER: &str = "x-conformance-test-served-endpoint";

/// Tells the client which endpoint the proxy says answered, or why it cannot. Ignores parameters.
#[derive(Debug, Default)]
pub struct DestinationEndpointServedVerifier;

impl Plugin for DestinationEndpointServedVerifier {
    const TYPE: &'static str = "destination-endpoint-served-verifier";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[];
    const LENIENT: bool = true;
    const ABOUT: &'static str = "Reports the endpoint that answered in a response header.";

    fn build(_: &mut Build<'_>) -> Result<Self, PluginError> {
        Ok(Self)
    }
}

impl ResponseHeaderHook for DestinationEndpointServedVerifier {
    fn on_response_headers(&self, view: &ResponseView<'_>, set: &mut Vec<(String, Bytes)>) {
        let text = match view.served {
            Served::By(address) => address,
            Served::NoNamespace => "fail: missing envoy lb metadata",
            Served::NoKey => "fail: missing destination endpoint served metadata",
        };
        set.push((HEADER.to_owned(), Bytes::copy_from_slice(text.as_bytes())));
    }
}
