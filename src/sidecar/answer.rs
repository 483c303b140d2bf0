//! Answers of our own, in the words that clients of the reference know.

use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use serde_json::json;

use super::body::AnswerBody;
use super::engines::CallError;

/// A response to the client.
pub(super) type Answer = Response<AnswerBody>;

/// `{"object":"error","message":…,"type":…,"param":"","code":N}`
pub(super) fn error(status: StatusCode, kind: &str, message: &str) -> Answer {
    let body = json!({
        "object": "error",
        "message": message,
        "type": kind,
        "param": "",
        "code": status.as_u16(),
    });
    with_type(status, "application/json", body.to_string())
}

/// The body cannot be used.
pub(super) fn bad_request(message: &str) -> Answer {
    error(StatusCode::BAD_REQUEST, "BadRequestError", message)
}

/// A plain text, as the reference answers refusals.
pub(super) fn text(status: StatusCode, message: &'static str) -> Answer {
    with_type(status, "text/plain; charset=utf-8", message.to_owned())
}

/// Why the local engine has no answer.
pub(super) fn decode_failed(cause: &CallError) -> Answer {
    match cause {
        CallError::Connect(_) => error(
            StatusCode::SERVICE_UNAVAILABLE,
            "ServiceUnavailable",
            "The decode node is not ready. Please check that the vLLM service is running and try again.",
        ),
        CallError::Timeout(_) => error(
            StatusCode::GATEWAY_TIMEOUT,
            "GatewayTimeout",
            "The decode node did not answer in time.",
        ),
        CallError::Broken(_) | CallError::Switched | CallError::TooLong => {
            bad_gateway("The decode node failed.")
        }
    }
}

/// An engine failed.
pub(super) fn bad_gateway(message: &str) -> Answer {
    error(StatusCode::BAD_GATEWAY, "BadGateway", message)
}

/// A JSON or text body with its type.
pub(super) fn with_type(status: StatusCode, content_type: &'static str, body: String) -> Answer {
    let mut answer = Response::new(AnswerBody::whole(body));
    *answer.status_mut() = status;
    answer
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    answer
}

/// Headers that belong to one connection.
const HOP_BY_HOP: [header::HeaderName; 6] = [
    header::CONNECTION,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// Removes what must not be passed on.
pub(super) fn strip_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<header::HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
    headers.remove("keep-alive");
    headers.remove("proxy-connection");
}
