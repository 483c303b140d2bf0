//! What ties the calls of one request together: its id and its W3C trace context.

use std::fmt::Write;

use http::{HeaderMap, HeaderName, HeaderValue};

use super::exchange::REQUEST_ID;

/// `traceparent`
pub(super) const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// The client's request id, the first if there are several, or a new one. Taken out of `headers`.
pub(super) fn request_id(headers: &mut HeaderMap) -> HeaderValue {
    let given = headers.remove(REQUEST_ID).filter(|id| !id.is_empty());
    given.unwrap_or_else(|| {
        let id = uuid::Uuid::new_v4().to_string();
        HeaderValue::from_str(&id).unwrap_or(HeaderValue::from_static("0"))
    })
}

/// A trace context passes as it is. Where there is none, `make` one, so that the logs of all engines
/// that serve the request can be joined.
pub(super) fn context(headers: &mut HeaderMap, make: bool) {
    if !make || headers.contains_key(&TRACEPARENT) {
        return;
    }
    let mut text = String::from("00-");
    let _ = write!(
        text,
        "{:032x}-{:016x}-01",
        fastrand::u128(1..),
        fastrand::u64(1..)
    );
    if let Ok(value) = HeaderValue::from_str(&text) {
        headers.insert(TRACEPARENT, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_context_is_kept_or_made() {
        let mut headers = HeaderMap::new();
        context(&mut headers, false);
        assert!(headers.is_empty());
        context(&mut headers, true);
        let made = headers[&TRACEPARENT].clone();
        assert_eq!(made.len(), 2 + 1 + 32 + 1 + 16 + 1 + 2);
        context(&mut headers, true);
        assert_eq!(headers[&TRACEPARENT], made);
    }

    #[test]
    fn an_id_is_kept_or_made() {
        let mut headers = HeaderMap::new();
        headers.append(REQUEST_ID, HeaderValue::from_static("a"));
        headers.append(REQUEST_ID, HeaderValue::from_static("b"));
        assert_eq!(request_id(&mut headers), "a");
        assert_eq!(request_id(&mut headers).len(), 36);
    }
}
