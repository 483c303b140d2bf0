//! `agent-identity`: which agent session a request belongs to.

use serde::Deserialize;

use crate::plugin::{Attributes, Build, Column, Maturity, ParamDoc, Plugin, PluginError};
use crate::request::InferenceRequest;
use crate::scheduling::RequestHeaderProcessor;
use crate::scheduling::attributes::AGENT_IDENTITY;

/// Headers in which coding agents name their session: Claude Code, OpenCode, Codex and its
/// releases before 0.131.
const KNOWN_HEADERS: [&str; 4] = [
    "x-claude-code-session-id",
    "x-session-affinity",
    "session-id",
    "session_id",
];
/// Longest identity; a longer one counts as absent, because it becomes a label and a flow.
const MAX_IDENTITY_BYTES: usize = 1024;

/// Publishes the first non-empty of the configured and then the known session headers. Requests that
/// name no fairness id are queued under it.
#[derive(Debug)]
pub struct AgentIdentity {
    headers: Vec<String>,
    identity: Column<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    additional_session_headers: Vec<String>,
}

impl Plugin for AgentIdentity {
    const TYPE: &'static str = "agent-identity";
    const MATURITY: Maturity = Maturity::Alpha;
    const PARAMETERS: &'static [ParamDoc] = &[ParamDoc {
        name: "additionalSessionHeaders",
        kind: "list",
        default: "[]",
        help: "Headers to look at before the known ones, in order.",
    }];
    const ABOUT: &'static str = "Takes an agent's session header as fairness id.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<Self, _>()?;
        let additional = settings.additional_session_headers.iter();
        let headers = additional
            .map(|name| name.trim().to_ascii_lowercase())
            .chain(KNOWN_HEADERS.map(str::to_owned));
        Ok(Self {
            headers: headers.collect(),
            // Any plugin may name the agent, so the key has no producer.
            identity: build.keys.produce_as(AGENT_IDENTITY, ""),
        })
    }
}

impl RequestHeaderProcessor for AgentIdentity {
    fn process(&self, request: &InferenceRequest, attributes: &mut Attributes) {
        let named = |header: &String| {
            let value = request.headers.get_str(header)?;
            (!value.is_empty() && value.len() <= MAX_IDENTITY_BYTES).then_some(value)
        };
        if let Some(identity) = self.headers.iter().find_map(named) {
            attributes.write(self.identity).push(identity.to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduling::test_support::Pool;

    fn identity(parameters: &str, lines: &[(&str, &str)]) -> Option<String> {
        let mut pool = Pool::new([]);
        let plugin: AgentIdentity = pool.plugin(parameters);
        for (name, value) in lines {
            pool.header(name, value);
        }
        let mut attributes = pool.keys.new_attributes();
        plugin.process(&pool.request, &mut attributes);
        attributes.get(plugin.identity)?.first().cloned()
    }

    #[test]
    fn the_first_header_that_says_something_counts() {
        let own = r#"{"additionalSessionHeaders": ["X-Agent"]}"#;
        let long = "x".repeat(MAX_IDENTITY_BYTES + 1);
        for (parameters, lines, wanted) in [
            ("{}", &[][..], None),
            ("{}", &[("session_id", "old")], Some("old")),
            (
                "{}",
                &[("session_id", "old"), ("session-id", "codex")],
                Some("codex"),
            ),
            (
                "{}",
                &[
                    ("x-claude-code-session-id", ""),
                    ("x-session-affinity", "o"),
                ],
                Some("o"),
            ),
            ("{}", &[("x-agent", "mine")], None),
            (
                own,
                &[("x-claude-code-session-id", "c"), ("x-agent", "mine")],
                Some("mine"),
            ),
            (
                "{}",
                &[("session-id", &long[..]), ("session_id", "s")],
                Some("s"),
            ),
            ("{}", &[("session-id", &long[1..])], Some(&long[1..])),
        ] {
            assert_eq!(identity(parameters, lines).as_deref(), wanted, "{lines:?}");
        }
    }
}
