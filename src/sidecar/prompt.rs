//! The client's body, and bodies made from it.

use bytes::Bytes;

use super::api::{Api, one};
use super::json::{Change, Field, JsonError, Object, Splice, splice};

/// What only the sidecar may say to an engine. An engine believes these fields: a client that made
/// them could have it fetch from any host, or end its process.
const OURS: [Field; 5] = [
    Field::KvTransferParams,
    Field::EcTransferParams,
    Field::BootstrapHost,
    Field::BootstrapPort,
    Field::BootstrapRoom,
];

/// Which limits a single token is asked for with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Limits {
    /// Least and most, whether the client gave any or not.
    Exact,
    /// Most, whether the client gave any or not.
    Most,
    /// `max_tokens`, and `max_completion_tokens` only where there is one.
    Present,
}

/// A parsed inference request body.
#[derive(Debug)]
pub(super) struct Prompt {
    api: Api,
    text: Bytes,
    object: Object,
    /// Changes that every body has.
    always: Vec<Change>,
}

impl Prompt {
    pub(super) fn parse(api: Api, text: Bytes) -> Result<Self, JsonError> {
        let object = Object::parse(&text)?;
        Ok(Self {
            api,
            text,
            object,
            always: Vec::new(),
        })
    }

    pub(super) fn api(&self) -> Api {
        self.api
    }

    /// The body as the client wrote it.
    pub(super) fn text(&self) -> &Bytes {
        &self.text
    }

    /// The value of a member of the body, as written.
    pub(super) fn value(&self, field: Field) -> Option<&[u8]> {
        self.text.get(self.object.value(field)?)
    }

    /// Where the value of a member lies.
    pub(super) fn place(&self, field: Field) -> Option<std::ops::Range<usize>> {
        self.object.value(field)
    }

    /// Makes `change` in every body from now on.
    pub(super) fn always(&mut self, change: Change) {
        self.always.push(change);
    }

    /// Whether a member is `true`.
    pub(super) fn is_true(&self, field: Field) -> bool {
        self.value(field) == Some(b"true")
    }

    /// The body with `changes` made, and without what only we may say.
    pub(super) fn with(&self, changes: &[Change]) -> Vec<Bytes> {
        self.edited(changes, &[], Vec::new())
    }

    /// The same with further splices, which must not touch a changed member.
    pub(super) fn with_splices(&self, changes: &[Change], splices: Vec<Splice>) -> Vec<Bytes> {
        self.edited(changes, &[], splices)
    }

    /// For an engine that reads the prompt and makes one token: not streamed, `limits` at one, and
    /// `changes`.
    pub(super) fn single_token(&self, limits: Limits, changes: &[Change]) -> Vec<Bytes> {
        let mut all = vec![
            (Field::Stream, Some(Bytes::from_static(b"false"))),
            (Field::StreamOptions, None),
        ];
        all.extend_from_slice(changes);
        let limited = |field: &&Field| match field {
            Field::MinTokens => limits == Limits::Exact,
            Field::MaxCompletionTokens => {
                limits != Limits::Present || self.value(**field).is_some()
            }
            _ => true,
        };
        let limits: Vec<Change> = self
            .api
            .limits()
            .iter()
            .filter(limited)
            .map(|field| (*field, Some(one())))
            .collect();
        self.edited(&all, &limits, Vec::new())
    }

    fn edited(
        &self,
        changes: &[Change],
        limits: &[Change],
        mut splices: Vec<Splice>,
    ) -> Vec<Bytes> {
        let mut all = changes.to_vec();
        for change in &self.always {
            if !all.iter().any(|(changed, _)| *changed == change.0) {
                all.push(change.clone());
            }
        }
        match self.api.limits_in() {
            None => all.extend_from_slice(limits),
            Some(holder) if !limits.is_empty() => {
                all.extend(self.limits_inside(holder, limits, &mut splices));
            }
            Some(_) => {}
        }
        for field in OURS {
            if !all.iter().any(|(changed, _)| *changed == field) {
                all.push((field, None));
            }
        }
        for holder in [Field::SamplingParams, Field::VllmXargs] {
            self.remove_inside(holder, &mut splices);
        }
        self.object.change(&all, &mut splices);
        if splices.is_empty() {
            return vec![self.text.clone()];
        }
        splice(&self.text, splices)
    }

    /// Limits in a member that is an object; the member itself where there is none.
    fn limits_inside(
        &self,
        holder: Field,
        limits: &[Change],
        splices: &mut Vec<Splice>,
    ) -> Option<Change> {
        let mut found = false;
        for value in self.object.values(holder) {
            if let Some(object) = Object::at(&self.text, &value) {
                object.change(limits, splices);
                found = true;
            }
        }
        let absent = self.value(holder).is_none_or(|value| value == b"null");
        (!found && absent).then(|| {
            let empty = Bytes::from_static(b"{}");
            let mut splices = Vec::new();
            if let Ok(object) = Object::parse(&empty) {
                object.change(limits, &mut splices);
            }
            (holder, Some(splice(&empty, splices).concat().into()))
        })
    }

    /// Engines merge extra arguments into the same place as the body's own members.
    fn remove_inside(&self, holder: Field, splices: &mut Vec<Splice>) {
        let removed = OURS.map(|field| (field, None));
        for value in self.object.values(holder) {
            let Some(object) = Object::at(&self.text, &value) else {
                continue;
            };
            if holder == Field::VllmXargs {
                object.change(&removed, splices);
            }
            for arguments in object.values(Field::ExtraArgs) {
                if let Some(object) = Object::at(&self.text, &arguments) {
                    object.change(&removed, splices);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompt(api: Api, text: &'static str) -> Prompt {
        Prompt::parse(api, Bytes::from_static(text.as_bytes())).unwrap()
    }

    fn text(pieces: &[Bytes]) -> String {
        String::from_utf8(pieces.concat()).unwrap()
    }

    #[test]
    fn an_ordinary_body_is_passed_on_as_it_is() {
        let body = r#"{ "model":"m", "seed": 9007199254740993, "stream":true, "model":"m"}"#;
        let prompt = prompt(Api::Chat, body);
        let out = prompt.with(&[]);
        assert_eq!(out.len(), 1);
        assert_eq!(out[0].as_ptr(), prompt.text().as_ptr());
    }

    #[test]
    fn a_clients_transfer_parameters_never_pass() {
        let out = prompt(
            Api::Generate,
            r#"{"kv_transfer_params":{"do_remote_prefill":true},"token_ids":[1],"ec_transfer_params":{},"sampling_params":{"extra_args":{"kv_transfer_params":{},"a":1},"n":1},"vllm_xargs":{"b":2,"kv_transfer\u005fparams":3},"bootstrap_host":"x"}"#,
        );
        assert_eq!(
            text(&out.with(&[])),
            r#"{"token_ids":[1],"sampling_params":{"extra_args":{"a":1},"n":1},"vllm_xargs":{"b":2}}"#
        );
    }

    #[test]
    fn each_api_has_its_own_limits() {
        let single = |api, body| text(&prompt(api, body).single_token(Limits::Exact, &[]));
        assert_eq!(
            single(
                Api::Chat,
                r#"{"max_tokens":9,"stream":true,"stream_options":{"include_usage":true},"x":1}"#
            ),
            r#"{"max_tokens":1,"stream":false,"x":1,"max_completion_tokens":1,"min_tokens":1}"#
        );
        assert_eq!(
            single(Api::Responses, r#"{"max_tokens":9}"#),
            r#"{"max_tokens":9,"stream":false,"max_output_tokens":1}"#
        );
        assert_eq!(
            single(
                Api::Generate,
                r#"{"sampling_params":{"max_tokens":5,"top_k":3}}"#
            ),
            r#"{"sampling_params":{"max_tokens":1,"top_k":3,"min_tokens":1},"stream":false}"#
        );
        for absent in [
            r#"{"token_ids":[1]}"#,
            r#"{"token_ids":[1],"sampling_params":null}"#,
        ] {
            let out: serde_json::Value =
                serde_json::from_str(&single(Api::Generate, absent)).unwrap();
            assert_eq!(
                out["sampling_params"],
                serde_json::json!({"max_tokens": 1, "min_tokens": 1})
            );
        }
    }

    #[test]
    fn the_common_form_adds_no_second_limit() {
        let primed = |body| text(&prompt(Api::Chat, body).single_token(Limits::Present, &[]));
        assert_eq!(
            primed(r#"{"x":1}"#),
            r#"{"x":1,"stream":false,"max_tokens":1}"#
        );
        assert_eq!(
            primed(r#"{"max_completion_tokens":7}"#),
            r#"{"max_completion_tokens":1,"stream":false,"max_tokens":1}"#
        );
    }
}
