//! Error replies: an `ImmediateResponse` ends the exchange with a status of ours.

use bytes::Bytes;

use super::mutation::set_header;
use super::proto::{
    HeaderMutation, HttpStatus, ImmediateResponse, ProcessingResponse,
    processing_response::Response,
};
use crate::control::RequestError;

/// Response header that names why a request was dropped.
pub const DROPPED_REASON_HEADER: &str = "x-llm-d-request-dropped-reason";

/// The reply for `error`: status, `inference error: <Code> - <text>`, and the dropped reason if any.
pub fn immediate(error: &RequestError) -> ProcessingResponse {
    let headers = error.dropped_reason().map(|reason| HeaderMutation {
        set_headers: vec![set_header(
            DROPPED_REASON_HEADER,
            Bytes::from_static(reason.as_bytes()),
        )],
        remove_headers: Vec::new(),
    });
    ProcessingResponse {
        response: Some(Response::ImmediateResponse(ImmediateResponse {
            status: Some(HttpStatus {
                code: i32::from(error.http_status()),
            }),
            headers,
            body: Bytes::from(format!("inference error: {} - {error}", error.code())),
            details: String::new(),
        })),
        dynamic_metadata: None,
    }
}
