//! Model rewrite by splicing: every other byte of the body stays what and where it was.

use bytes::Bytes;

use super::{Body, Payload};

/// `body` with its `model` replaced by `model`, or with one inserted when it has none. Pieces are
/// shared, not copied. A payload that is no object comes back unchanged.
pub fn rewrite_model(body: &Body, payload: &Payload, model: &str) -> Body {
    let quoted = serde_json::Value::from(model).to_string();
    match (&payload.model, payload.object_end) {
        (Some(field), _) => splice(body, field.range.start, field.range.end, quoted),
        // Of duplicate keys the last counts: a `model` that is no name may stand before it.
        (None, Some(at)) => splice(body, at, at, format!(",\"model\":{quoted}")),
        (None, None) => body.clone(),
    }
}

fn splice(body: &Body, from: usize, to: usize, insert: String) -> Body {
    let mut out = Body::default();
    copy(body, 0, from, &mut out);
    out.push(Bytes::from(insert));
    copy(body, to, body.len(), &mut out);
    out
}

fn copy(body: &Body, from: usize, to: usize, out: &mut Body) {
    let mut start = 0;
    for piece in body.pieces() {
        let end = start + piece.len();
        let (cut_from, cut_to) = (from.max(start), to.min(end));
        if cut_from < cut_to {
            out.push(piece.slice(cut_from - start..cut_to - start));
        }
        start = end;
    }
}

#[cfg(test)]
mod tests {
    use super::super::Parser;
    use super::super::openai::OpenAiParser;
    use super::*;

    fn rewrite(pieces: &[&'static str], model: &str) -> String {
        let body: Body = pieces
            .iter()
            .map(|p| Bytes::from_static(p.as_bytes()))
            .collect();
        let payload = OpenAiParser.parse("/v1/completions", &body).unwrap();
        let out = rewrite_model(&body, &payload, model);
        String::from_utf8(out.copy_range(0..out.len())).unwrap()
    }

    #[test]
    fn only_the_model_string_changes() {
        // 2^53 + 1, key order, duplicates and spacing survive.
        let out = rewrite(
            &[
                r#"{ "seed": 9007199254740993, "a":1,"a":2, "mod"#,
                r#"el" : "old\"#,
                r#""x", "prompt":"p"}"#,
            ],
            "n\"w",
        );
        assert_eq!(
            out,
            r#"{ "seed": 9007199254740993, "a":1,"a":2, "model" : "n\"w", "prompt":"p"}"#
        );
    }

    #[test]
    fn a_missing_model_is_inserted_behind_whatever_else_is_called_so() {
        for (body, wanted) in [
            (r#" {"prompt":"}" } "#, r#" {"prompt":"}" ,"model":"m"} "#),
            (
                r#"{"model":5,"prompt":"p"}"#,
                r#"{"model":5,"prompt":"p","model":"m"}"#,
            ),
            (
                r#"{"model":"a","prompt":"p","model":null}"#,
                r#"{"model":"a","prompt":"p","model":null,"model":"m"}"#,
            ),
            (
                r#"{"model":{"model":"a"},"prompt":"p"}"#,
                r#"{"model":{"model":"a"},"prompt":"p","model":"m"}"#,
            ),
        ] {
            assert_eq!(rewrite(&[body], "m"), wanted);
            let read: serde_json::Value = serde_json::from_str(wanted).unwrap();
            assert_eq!(read["model"], "m", "as an engine reads it");
        }
    }
}
