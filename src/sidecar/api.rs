//! The inference routes, and where each keeps its limits.

use bytes::Bytes;
use http::Method;

use super::json::Field;

/// An API whose requests can be split.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Api {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completions,
    /// `/v1/messages`
    Messages,
    /// `/v1/responses`
    Responses,
    /// `/inference/v1/generate`
    Generate,
}

impl Api {
    /// The API of a request; `None` for what is passed through as it is.
    pub(super) fn of(method: &Method, path: &str) -> Option<Self> {
        if method != Method::POST {
            return None;
        }
        match path {
            "/v1/chat/completions" => Some(Self::Chat),
            "/v1/completions" => Some(Self::Completions),
            "/v1/messages" => Some(Self::Messages),
            "/v1/responses" => Some(Self::Responses),
            "/inference/v1/generate" => Some(Self::Generate),
            _ => None,
        }
    }

    /// The object that holds the limits; `None` for the body itself.
    pub(super) fn limits_in(self) -> Option<Field> {
        (self == Self::Generate).then_some(Field::SamplingParams)
    }

    /// Limits that are set to one for a prefill, with those that are only set where they were present.
    pub(super) fn limits(self) -> &'static [Field] {
        match self {
            Self::Chat | Self::Completions | Self::Messages => &[
                Field::MaxTokens,
                Field::MaxCompletionTokens,
                Field::MinTokens,
            ],
            Self::Responses => &[Field::MaxOutputTokens],
            Self::Generate => &[Field::MaxTokens, Field::MinTokens],
        }
    }
}

/// `1`
pub(super) fn one() -> Bytes {
    Bytes::from_static(b"1")
}
