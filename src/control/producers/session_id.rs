//! `session-id-producer`: which session a request belongs to.

use serde::Deserialize;

use crate::plugin::{
    Attributes, Build, Column, Maturity, ParamDoc, ParamError, Plugin, PluginError,
};
use crate::request::{Headers, InferenceRequest};
use crate::scheduling::attributes::SESSION_ID;
use crate::scheduling::{Candidate, DataProducer, ProducerError};

/// Publishes the value of a header or of a cookie as the request's session id.
///
/// Publishes nothing when it is absent or empty. Of cookies with the same name the first counts.
#[derive(Debug)]
pub struct SessionIdProducer {
    source: Source,
    session: Column<String>,
}

#[derive(Debug)]
enum Source {
    Header(String),
    Cookie(String),
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    header_name: String,
    cookie_name: String,
}

impl Plugin for SessionIdProducer {
    const TYPE: &'static str = "session-id-producer";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[
        ParamDoc {
            name: "headerName",
            kind: "string",
            default: "",
            help: "Request header with the session id; this or cookieName is required.",
        },
        ParamDoc {
            name: "cookieName",
            kind: "string",
            default: "",
            help: "Cookie with the session id; this or headerName is required.",
        },
    ];
    const ABOUT: &'static str = "Publishes a header or cookie as the request's session id.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<Self, _>()?;
        let header = settings.header_name.trim().to_ascii_lowercase();
        let cookie = settings.cookie_name.trim();
        let source = match (header.is_empty(), cookie.is_empty()) {
            (false, true) => Source::Header(header),
            (true, false) => Source::Cookie(cookie.to_owned()),
            (both_empty, _) => {
                let given = if both_empty { "none" } else { "both" };
                let text = format!("headerName, cookieName: exactly one is required, got {given}");
                return Err(ParamError(text).into());
            }
        };
        Ok(Self {
            source,
            session: build.keys.produce(SESSION_ID),
        })
    }
}

impl Source {
    fn read<'a>(&self, headers: &'a Headers) -> Option<&'a str> {
        let found = match self {
            Self::Header(name) => headers.get_str(name),
            Self::Cookie(name) => cookie(headers, name),
        };
        found.map(str::trim).filter(|id| !id.is_empty())
    }
}

/// The cookie called `name`. HTTP/2 clients may send one `cookie` line for each pair.
fn cookie<'a>(headers: &'a Headers, name: &str) -> Option<&'a str> {
    headers
        .iter()
        .filter(|line| line.name == "cookie")
        .filter_map(|line| std::str::from_utf8(&line.value).ok())
        .flat_map(|line| line.split(';'))
        .filter_map(|pair| pair.trim().split_once('='))
        .find(|(key, _)| *key == name)
        .map(|(_, value)| value)
}

impl DataProducer for SessionIdProducer {
    fn produce(
        &self,
        request: &InferenceRequest,
        _: &[Candidate],
        attributes: &mut Attributes,
    ) -> Result<(), ProducerError> {
        if let Some(id) = self.source.read(&request.headers) {
            attributes.write(self.session).push(id.to_owned());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduling::test_support::{Pool, refusal};

    fn session(parameters: &str, lines: &[(&str, &str)]) -> Option<String> {
        let mut pool = Pool::new([]);
        let producer: SessionIdProducer = pool.plugin(parameters);
        for (name, value) in lines {
            pool.header(name, value);
        }
        let mut attributes = pool.keys.new_attributes();
        producer
            .produce(&pool.request, &[], &mut attributes)
            .unwrap();
        attributes.get(producer.session)?.first().cloned()
    }

    #[test]
    fn the_header_or_the_cookie_is_published() {
        let header = r#"{"headerName": " X-Session "}"#;
        let cookie = r#"{"cookieName": "sid"}"#;
        for (parameters, lines, wanted) in [
            (header, &[("x-session", " s1 ")][..], Some("s1")),
            (header, &[("x-session", " ")], None),
            (header, &[], None),
            (
                cookie,
                &[("cookie", "a=b; sid=s2=x; sid=other")],
                Some("s2=x"),
            ),
            (
                cookie,
                &[("cookie", "a=b"), ("cookie", "sid=s3")],
                Some("s3"),
            ),
            (cookie, &[("cookie", "SID=s2; sidx=1; sid")], None),
            (cookie, &[("cookie", "sid=")], None),
        ] {
            let got = session(parameters, lines);
            assert_eq!(got.as_deref(), wanted, "{parameters} {lines:?}");
        }
    }

    #[test]
    fn exactly_one_source_is_required() {
        for (parameters, wanted) in [
            ("{}", "got none"),
            (r#"{"headerName": "a", "cookieName": "b"}"#, "got both"),
        ] {
            let text = refusal::<SessionIdProducer>(parameters);
            assert!(text.starts_with("headerName, cookieName") && text.ends_with(wanted));
        }
    }
}
