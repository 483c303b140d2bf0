//! Session affinity: requests of a session go where its earlier ones went.
//!
//! Two ways to remember: the client carries a token that names the endpoint, or this process keeps a
//! map from session id to endpoint. [`SessionAffinityFilter`] and [`SessionAffinityScorer`] share all of
//! it; they live here because they also write response headers.

mod filter;
mod scorer;
mod sessions;

pub use filter::SessionAffinityFilter;
pub use scorer::SessionAffinityScorer;

use std::cell::Cell;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use serde::Deserialize;

use crate::datalayer::{Endpoint, EndpointSpec};
use crate::plugin::{Attributes, Build, Column, Lease, ParamDoc, ParamError, Plugin, PluginError};
use crate::response::ResponseView;
use crate::scheduling::{Candidate, Candidates, Cycle, Outcome, SchedulingResult};
use sessions::{SessionKey, Sessions, full_name, is_named};

/// Request and response header with the token.
const DEFAULT_TOKEN_HEADER: &str = "x-session-token";
/// Request header with the session id.
const DEFAULT_SESSION_HEADER: &str = "x-session-id";
/// Longest token that is looked at; Kubernetes names end well below it.
const MAX_TOKEN_BYTES: usize = 1024;
/// Internal column: what a request saw of its session's endpoint.
const SIGHT: &str = "session-affinity-sight";

/// Remembers endpoints for sessions.
#[derive(Debug)]
struct SessionAffinity {
    strategy: Strategy,
    /// Whose pick is remembered; the primary profile's when `None`.
    profile: Option<String>,
}

#[derive(Debug)]
enum Strategy {
    /// The client sends back the token it was given: base64 of `namespace/name`.
    Token { header: String },
    /// This process remembers. `sight` tells a pick elsewhere because the endpoint was not on offer,
    /// which moves the session, from one for other reasons, which does not.
    Session {
        sources: Vec<Source>,
        sessions: Sessions,
        sight: Column<Sight>,
    },
}

/// Where a session id is read.
#[derive(Debug)]
enum Source {
    Header(String),
    Attribute(Column<String>),
}

/// What the plugin saw while one request was scheduled.
#[derive(Debug, Default)]
struct Sight {
    looked: Cell<bool>,
    found: Cell<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    strategy: StrategyName,
    encoded_endpoint_header_config: TokenSettings,
    session_id_config: SessionSettings,
    profile_name: String,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum StrategyName {
    #[default]
    EncodedEndpointHeader,
    SessionId,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct TokenSettings {
    header: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct SessionSettings {
    sources: Vec<SourceSettings>,
    eviction_ttl_seconds: f64,
    eviction_sweep_seconds: f64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct SourceSettings {
    header: String,
    attribute: String,
    producer: String,
}

/// Parameters of the filter and the scorer.
const PARAMETERS: &[ParamDoc] = &[
    ParamDoc {
        name: "strategy",
        kind: "string",
        default: "encoded_endpoint_header",
        help: "Who remembers: encoded_endpoint_header lets the client carry the endpoint's name, session_id keeps a map here.",
    },
    ParamDoc {
        name: "encodedEndpointHeaderConfig",
        kind: "object",
        default: "{}",
        help: "{header x-session-token}: header that carries the name, in requests and responses.",
    },
    ParamDoc {
        name: "sessionIdConfig",
        kind: "object",
        default: "{}",
        help: "{sources [{header} or {attribute, producer}], evictionTtlSeconds 300, evictionSweepSeconds 10}: the first source with a value is the session id; by default the header x-session-id.",
    },
    ParamDoc {
        name: "profileName",
        kind: "string",
        default: "the primary profile",
        help: "Profile whose pick is remembered.",
    },
];

fn normalized(header: &str, default: &str) -> String {
    let header = header.trim();
    if header.is_empty() { default } else { header }.to_ascii_lowercase()
}

/// `seconds` as a duration; 0 means `default`.
fn seconds(name: &str, seconds: f64, default: Duration) -> Result<Duration, ParamError> {
    if seconds == 0.0 {
        return Ok(default);
    }
    Duration::try_from_secs_f64(seconds)
        .map_err(|_| ParamError(format!("sessionIdConfig.{name}: {seconds} is not above 0")))
}

impl SourceSettings {
    fn build(&self, position: usize, build: &mut Build<'_>) -> Result<Source, ParamError> {
        match (self.header.trim(), self.attribute.as_str()) {
            (header, "") if !header.is_empty() => Ok(Source::Header(normalized(header, ""))),
            ("", attribute) if !attribute.is_empty() => Ok(Source::Attribute(
                build.keys.optional(attribute.to_owned(), &self.producer),
            )),
            _ => Err(ParamError(format!(
                "sessionIdConfig.sources[{position}]: takes exactly one of header and attribute"
            ))),
        }
    }
}

impl SessionSettings {
    fn build(&self, build: &mut Build<'_>) -> Result<Strategy, PluginError> {
        let ttl = seconds(
            "evictionTtlSeconds",
            self.eviction_ttl_seconds,
            Duration::from_mins(5),
        )?;
        let sweep = seconds(
            "evictionSweepSeconds",
            self.eviction_sweep_seconds,
            Duration::from_secs(10),
        )?;
        let mut sources = Vec::with_capacity(self.sources.len().max(1));
        for (position, source) in self.sources.iter().enumerate() {
            sources.push(source.build(position, build)?);
        }
        if sources.is_empty() {
            sources.push(Source::Header(DEFAULT_SESSION_HEADER.to_owned()));
        }
        Ok(Strategy::Session {
            sources,
            sessions: Sessions::new(ttl, sweep),
            sight: build.keys.produce(SIGHT),
        })
    }
}

impl SessionAffinity {
    fn build<P: Plugin>(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<P, _>()?;
        let strategy = match settings.strategy {
            StrategyName::EncodedEndpointHeader => {
                let header = &settings.encoded_endpoint_header_config.header;
                Strategy::Token {
                    header: normalized(header, DEFAULT_TOKEN_HEADER),
                }
            }
            StrategyName::SessionId => settings.session_id_config.build(build)?,
        };
        Ok(Self {
            strategy,
            profile: Some(settings.profile_name).filter(|name| !name.is_empty()),
        })
    }

    /// Makes room for what the request will see.
    fn begin(&self, attributes: &mut Attributes) {
        if let Strategy::Session { sight, .. } = &self.strategy {
            attributes.write(*sight).push(Sight::default());
        }
    }

    /// Place, in `candidates`, of the endpoint the request's session is bound to.
    fn bound(&self, cycle: &Cycle<'_>, candidates: Candidates<'_>) -> Option<usize> {
        let place = |name: &str| {
            candidates
                .iter()
                .position(|(_, c)| is_named(&c.endpoint.spec, name))
        };
        match &self.strategy {
            Strategy::Token { header } => {
                let token = cycle.request.headers.get(header)?;
                place(&decode(token)?)
            }
            Strategy::Session {
                sources,
                sessions,
                sight,
            } => {
                let endpoint = sessions.bound(session(sources, cycle)?, cycle.now)?;
                let place = place(&endpoint);
                if let Some(sight) = cycle.attributes.get(*sight).and_then(<[_]>::first) {
                    sight.looked.set(true);
                    // Several profiles may look; the endpoint need only be on offer in one.
                    sight.found.set(sight.found.get() || place.is_some());
                }
                place
            }
        }
    }

    /// Remembers the pick.
    fn learn(
        &self,
        cycle: &Cycle<'_>,
        candidates: &[Candidate],
        result: &SchedulingResult,
        outcome: &mut Outcome,
    ) {
        let Some(pick) = self.pick(candidates, result) else {
            return;
        };
        match &self.strategy {
            Strategy::Token { header } => {
                // The primary profile's endpoint is known once it answers, see `stamp`.
                if self.profile.is_some() {
                    outcome.leases.push(Box::new(Stamp {
                        header: header.clone(),
                        token: encode(&pick.spec),
                    }));
                }
            }
            Strategy::Session {
                sources,
                sessions,
                sight,
            } => {
                let Some(session) = session(sources, cycle) else {
                    return;
                };
                let sight = cycle.attributes.get(*sight).and_then(<[_]>::first);
                let absent = sight.is_some_and(|s| s.looked.get() && !s.found.get());
                sessions.bind(session, &pick.spec, absent, cycle.now);
            }
        }
    }

    fn pick<'a>(
        &self,
        candidates: &'a [Candidate],
        result: &SchedulingResult,
    ) -> Option<&'a Arc<Endpoint>> {
        let picks = match &self.profile {
            None => &result.primary,
            Some(name) => result.profiles().find(|p| *p.profile == **name)?,
        };
        let position = *picks.picks.first()?;
        Some(&candidates.get(position as usize)?.endpoint)
    }

    /// Tells the client whom it is bound to.
    fn stamp(&self, view: &ResponseView<'_>, set: &mut Vec<(String, Bytes)>) {
        if let (Strategy::Token { header }, None) = (&self.strategy, &self.profile) {
            set.push((header.clone(), encode(&view.endpoint.spec)));
        }
    }
}

/// The first source that has a value.
fn session(sources: &[Source], cycle: &Cycle<'_>) -> Option<SessionKey> {
    let read = |source: &Source| {
        let value = match source {
            Source::Header(name) => cycle.request.headers.get_str(name)?,
            Source::Attribute(column) => cycle.attributes.get(*column)?.first()?.as_str(),
        };
        Some(value.trim()).filter(|id| !id.is_empty())
    };
    sources.iter().find_map(read).map(SessionKey::of)
}

fn encode(endpoint: &EndpointSpec) -> Bytes {
    BASE64.encode(full_name(endpoint)).into()
}

fn decode(token: &[u8]) -> Option<String> {
    if token.len() > MAX_TOKEN_BYTES {
        return None;
    }
    String::from_utf8(BASE64.decode(token).ok()?).ok()
}

/// Writes the token of another profile's pick into the response.
#[derive(Debug)]
struct Stamp {
    header: String,
    token: Bytes,
}

impl Lease for Stamp {
    fn on_response_headers(&mut self, set: &mut Vec<(String, Bytes)>) {
        set.push((self.header.clone(), self.token.clone()));
    }
}

#[cfg(test)]
mod tests;
