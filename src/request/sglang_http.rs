//! `sglanghttp-parser`: SGLang's token-in endpoint `/generate`.

use super::fields::{Common, Text, text_of, token_id, whole_number};
use super::keys::Key;
use super::scan::{Event, Step, Visitor, scan};
use super::{ApiKind, AppProtocol, Body, ParseError, Parser, Payload, Prompt};
use crate::plugin::{Build, Maturity, ParamDoc, Plugin, PluginError};

/// Reads pre-tokenized SGLang bodies. No parameters. A batch (`[[ids]]`) is accepted.
#[derive(Debug, Default)]
pub struct SglangHttpParser;

impl Plugin for SglangHttpParser {
    const TYPE: &'static str = "sglanghttp-parser";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[];
    const LENIENT: bool = true;
    const ABOUT: &'static str = "Reads pre-tokenized SGLang generate bodies.";

    fn build(_: &mut Build<'_>) -> Result<Self, PluginError> {
        Ok(Self)
    }
}

impl Parser for SglangHttpParser {
    fn type_name(&self) -> &'static str {
        Self::TYPE
    }

    fn path_suffixes(&self) -> &'static [&'static str] {
        &["generate"]
    }

    fn app_protocols(&self) -> &'static [AppProtocol] {
        &[AppProtocol::Http, AppProtocol::H2c]
    }

    fn parse(&self, path: &str, body: &Body) -> Result<Payload, ParseError> {
        if path != "/generate" {
            return Err(ParseError::new(format!("unsupported path: {path}")));
        }
        let mut reader = Reader::default();
        scan(body, &mut reader)
            .map_err(|e| ParseError::new(format!("error unmarshaling request bodyMap: {e}")))?;
        let refuse = |text: &str| {
            Err(ParseError::new(format!(
                "invalid generate request: input_ids {text}"
            )))
        };
        if !reader.seen {
            return refuse("must be provided");
        }
        if reader.invalid {
            return refuse("must be an array of uint32 integers");
        }
        if reader.ids.is_empty() || reader.ids.iter().any(Vec::is_empty) {
            return refuse("cannot be empty");
        }
        if reader.bad_salt {
            return Err(ParseError::new(
                "unsupported generate request: extra_key must be a string",
            ));
        }
        let prompts = reader
            .ids
            .into_iter()
            .map(|ids| Prompt::Tokens {
                ids,
                media: Vec::new(),
            })
            .collect();
        let mut payload = reader
            .common
            .payload(ApiKind::SglangGenerate, body, prompts);
        payload.model = None;
        payload.rewritable = false;
        payload.max_output_tokens = reader.max_tokens;
        payload.cache_salt = reader.salt.and_then(|text| text.read(body));
        Ok(payload)
    }
}

#[derive(Default)]
struct Reader {
    common: Common,
    seen: bool,
    invalid: bool,
    ids: Vec<Vec<u32>>,
    salt: Option<Text>,
    bad_salt: bool,
    max_tokens: Option<u64>,
}

impl Reader {
    fn push(&mut self, event: &Event<'_>) {
        match token_id(event) {
            Some(id) => {
                if self.ids.is_empty() {
                    self.ids.push(Vec::new());
                }
                if let Some(ids) = self.ids.last_mut() {
                    ids.push(id);
                }
            }
            None => self.invalid = true,
        }
    }
}

impl Visitor for Reader {
    fn visit(&mut self, path: &[Step], event: Event<'_>) {
        match path {
            [Step::Key(Key::InputIds)] => match event {
                Event::ArrayStart => {
                    self.seen = true;
                    self.invalid = false;
                    self.ids.clear();
                }
                Event::End(_) => {}
                Event::Scalar(b"null") => self.seen = false,
                _ => {
                    self.seen = true;
                    self.invalid = true;
                }
            },
            [Step::Key(Key::InputIds), Step::Index(0)] if event == Event::ArrayStart => {
                self.ids.push(Vec::new());
            }
            [Step::Key(Key::InputIds), Step::Index(_)]
                if event == Event::ArrayStart && !self.ids.is_empty() =>
            {
                self.ids.push(Vec::new());
            }
            [Step::Key(Key::InputIds), Step::Index(_)] if matches!(event, Event::End(_)) => {}
            [Step::Key(Key::InputIds), Step::Index(_)]
            | [Step::Key(Key::InputIds), Step::Index(_), Step::Index(_)] => {
                self.push(&event);
            }
            [Step::Key(Key::ExtraKey)] => {
                self.salt = text_of(&event);
                self.bad_salt = self.salt.is_none() && event != Event::Scalar(b"null");
            }
            [Step::Key(Key::SamplingParams), Step::Key(Key::MaxNewTokens)] => {
                self.max_tokens = whole_number(&event);
            }
            _ => {
                self.common.visit(path, &event);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(body: &str) -> Result<Payload, String> {
        SglangHttpParser
            .parse("/generate", &Body::from(body))
            .map_err(|e| e.to_string())
    }

    #[test]
    fn ids_salt_and_limit_are_read() {
        let body = r#"{"input_ids":[5,6],"extra_key":"k","stream":true,"sampling_params":{"max_new_tokens":8},"model":"x"}"#;
        let payload = parse(body).unwrap();
        assert_eq!(
            payload.prompts,
            [Prompt::Tokens {
                ids: vec![5, 6],
                media: Vec::new()
            }]
        );
        assert_eq!(
            (payload.cache_salt.as_deref(), payload.max_output_tokens),
            (Some("k"), Some(8))
        );
        assert!(payload.model.is_none() && !payload.rewritable && payload.stream);
        assert_eq!(
            parse(r#"{"input_ids":[[5],[6,7]]}"#).unwrap().prompts.len(),
            2
        );
    }

    #[test]
    fn errors_have_the_contracts_texts() {
        for (body, text) in [
            ("{}", "invalid generate request: input_ids must be provided"),
            (
                r#"{"input_ids":"x"}"#,
                "invalid generate request: input_ids must be an array of uint32 integers",
            ),
            (
                r#"{"input_ids":[1.5]}"#,
                "invalid generate request: input_ids must be an array of uint32 integers",
            ),
            (
                r#"{"input_ids":[]}"#,
                "invalid generate request: input_ids cannot be empty",
            ),
            (
                r#"{"input_ids":[1],"extra_key":3}"#,
                "unsupported generate request: extra_key must be a string",
            ),
        ] {
            assert_eq!(parse(body).unwrap_err(), text, "{body}");
        }
        let error = SglangHttpParser
            .parse("/inference/v1/generate", &Body::default())
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "unsupported path: /inference/v1/generate"
        );
    }
}
