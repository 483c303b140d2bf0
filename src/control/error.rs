//! Why a request was refused, and the answer that belongs to each reason.

use crate::request::ParseError;
use crate::scheduling::{Denial, ScheduleError};

/// Why a request was refused. Every variant is an answer a client can tell apart; texts are fixed
/// and safe to send. Envoy turns a gRPC error of ours into its failure mode, so each variant is an
/// `ImmediateResponse` instead: the client learns the reason whatever the gateway's setting.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum RequestError {
    /// The body or path cannot be understood.
    #[error(transparent)]
    BadRequest(#[from] ParseError),
    /// No model in the body, the rewrite header or a rewrite rule.
    #[error("model not found in request body")]
    NoModel,
    /// The body is longer than `--max-request-body-bytes`.
    #[error("request body exceeds the limit of {limit} bytes")]
    BodyTooLarge {
        /// The limit in bytes.
        limit: usize,
    },
    /// The pool is empty, or the subset hint names none of its endpoints.
    #[error("failed to find endpoint candidates for serving the request")]
    NoCandidates,
    /// The screeners left nothing.
    #[error("screeners eliminated all endpoint candidates")]
    Screened,
    /// An admitter refused.
    #[error(transparent)]
    Denied(#[from] Denial),
    /// `Prefer: if-available`, and the pick holds nothing of the prompt.
    #[error("no decode worker has the requested KV cache")]
    NoCachedPrefix,
    /// A request without a body found an empty pool.
    #[error("no pods available in datastore")]
    NoEndpoints,
    /// Priority below zero while the pool is saturated.
    #[error("system saturated, sheddable request dropped")]
    Shed,
    /// Scheduling found no endpoint, or no profile to find one with.
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
    /// The decision was not made within `--decision-timeout`.
    #[error("no decision within {seconds} s")]
    DecisionTimeout {
        /// The limit.
        seconds: u64,
    },
}

impl RequestError {
    /// Status of the `ImmediateResponse`.
    pub fn http_status(&self) -> u16 {
        match self {
            Self::BadRequest(_) | Self::NoModel | Self::Schedule(ScheduleError::UnknownProfile) => {
                400
            }
            Self::BodyTooLarge { .. } => 413,
            Self::NoCachedPrefix => 412,
            Self::Shed | Self::Schedule(_) => 429,
            Self::Denied(denial) => {
                if denial.saturated {
                    429
                } else {
                    500
                }
            }
            Self::NoCandidates
            | Self::Screened
            | Self::NoEndpoints
            | Self::DecisionTimeout { .. } => 503,
        }
    }

    /// Code in the reply's text and in the `error_code` label.
    pub fn code(&self) -> &'static str {
        match self {
            Self::BadRequest(_) | Self::NoModel | Self::Schedule(ScheduleError::UnknownProfile) => {
                "BadRequest"
            }
            Self::BodyTooLarge { .. } => "RequestEntityTooLarge",
            Self::NoCachedPrefix => "PreconditionFailed",
            Self::Shed | Self::Schedule(_) => "ResourceExhausted",
            Self::Denied(denial) => {
                if denial.saturated {
                    "ResourceExhausted"
                } else {
                    "Internal"
                }
            }
            Self::NoCandidates
            | Self::Screened
            | Self::NoEndpoints
            | Self::DecisionTimeout { .. } => "ServiceUnavailable",
        }
    }

    /// Value of `x-llm-d-request-dropped-reason`, where the contract names one.
    pub fn dropped_reason(&self) -> Option<&'static str> {
        match self {
            Self::Schedule(ScheduleError::FiltersLeftNothing | ScheduleError::NoDecodeEndpoint) => {
                Some("rejected-saturated")
            }
            Self::NoCandidates | Self::Screened | Self::NoEndpoints => {
                Some("rejected-no-endpoints")
            }
            Self::DecisionTimeout { .. } => Some("rejected-ttl-expired"),
            Self::BadRequest(_)
            | Self::NoModel
            | Self::BodyTooLarge { .. }
            | Self::Denied(_)
            | Self::NoCachedPrefix
            | Self::Shed
            | Self::Schedule(ScheduleError::Handler(_) | ScheduleError::UnknownProfile) => None,
        }
    }
}
