//! `nixlv2`: prefill first, and its answer tells the decode engine where to fetch the blocks.

use bytes::Bytes;
use http::{StatusCode, header};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::super::answer::{Answer, decode_failed};
use super::super::body::AnswerBody;
use super::super::exchange::{Exchange, LegFailure, Refusal};
use super::super::json::Field;
use super::super::metrics::Path;
use super::super::prompt::Limits;
use super::super::usage::UsageRewrite;
use super::opening::{self, Opening};
use super::{chunked, offloading};

/// Asks a prefill engine to keep its blocks for somebody.
const KEEP_BLOCKS: &str = r#"{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,"remote_host":null,"remote_port":null}"#;

/// What a prefill leaves behind.
#[derive(Debug)]
pub(super) struct Prefilled {
    /// As the engine wrote it; `null` when it kept nothing.
    params: Bytes,
    cached_tokens: u64,
}

/// Prefill at the first candidate that can, then decode here.
pub(super) async fn serve(exchange: Exchange) -> Result<Answer, Refusal> {
    match prefill(&exchange).await? {
        Some(prefilled) => decode(exchange, prefilled).await,
        None => match chunked::plan(&exchange) {
            Some(plan) => chunked::serve(exchange, plan, Path::LocalPrefill, Vec::new()).await,
            None => offloading::decode_alone(&exchange, Path::LocalPrefill).await,
        },
    }
}

/// What the first candidate that can leaves behind; `None` when the local engine is to read it all.
async fn prefill(exchange: &Exchange) -> Result<Option<Prefilled>, Refusal> {
    let mut attempts = exchange.attempts();
    while let Some(target) = attempts.next() {
        let params = keep_blocks(offloading::source_for(exchange, target));
        let body = exchange
            .prompt
            .single_token(Limits::Exact, &[(Field::KvTransferParams, Some(params))]);
        let answered = exchange.prefill(target, &body, &[]).await;
        match answered.and_then(|answer| read(&answer)) {
            Ok(prefilled) => return Ok(Some(prefilled)),
            Err(failure) => attempts.failed(target, failure)?,
        }
    }
    attempts.or_local()?;
    Ok(None)
}

fn keep_blocks(source: Option<String>) -> Bytes {
    let Some(source) = source else {
        return Bytes::from_static(KEEP_BLOCKS.as_bytes());
    };
    let open = KEEP_BLOCKS.trim_end_matches('}');
    format!("{open},\"remote_kv_source\":{source}}}").into()
}

async fn decode(exchange: Exchange, prefilled: Prefilled) -> Result<Answer, Refusal> {
    let change = (Field::KvTransferParams, Some(prefilled.params));
    if let Some(plan) = chunked::plan(&exchange) {
        return chunked::serve(exchange, plan, Path::PrefillDecode, vec![change]).await;
    }
    let fetches = change.1.as_deref() != Some(b"null");
    let response = exchange
        .decode(exchange.prompt.with(&[change]), &[])
        .await?;
    let (mut head, mut leg) = response.into_parts();
    let mut read = Bytes::new();
    if fetches && exchange.may_prefill_here() {
        let mut failed = head.status == StatusCode::INTERNAL_SERVER_ERROR;
        if head.status.is_success() && opening::is_stream(&head.headers) {
            let begun = opening::read(&mut leg).await;
            let (opening, begun) = begun.map_err(|error| Box::new(decode_failed(&error)))?;
            (failed, read) = (opening == Opening::Failed, begun);
        }
        if failed {
            // vLLM says so when the prefill engine is gone before its blocks were fetched. Nothing of
            // the answer has reached the client yet.
            tracing::warn!(decode_target = %exchange.decode, "decode failed: once more, with the prompt read here");
            drop(leg);
            return offloading::decode_alone(&exchange, Path::LocalPrefill).await;
        }
    }
    exchange.sidecar.metrics().served(Path::PrefillDecode);
    if !head.status.is_success() {
        return Ok(Answer::from_parts(head, AnswerBody::leg(leg)));
    }
    head.headers.remove(header::CONTENT_LENGTH);
    let body = AnswerBody::usage(UsageRewrite::new(read, leg, prefilled.cached_tokens));
    Ok(Answer::from_parts(head, body))
}

#[derive(Deserialize)]
struct PrefillAnswer<'a> {
    #[serde(borrow)]
    kv_transfer_params: Option<&'a RawValue>,
    usage: Option<Usage>,
}

#[derive(Deserialize)]
struct Usage {
    prompt_tokens_details: Option<PromptTokensDetails>,
}

#[derive(Deserialize)]
struct PromptTokensDetails {
    cached_tokens: Option<u64>,
}

/// The fields without which a decode engine cannot fetch; others pass unread.
#[derive(Deserialize)]
struct Params<'a> {
    do_remote_prefill: Option<bool>,
    #[serde(borrow)]
    remote_block_ids: Option<&'a RawValue>,
    #[serde(borrow)]
    remote_engine_id: Option<&'a RawValue>,
    #[serde(borrow)]
    remote_host: Option<&'a RawValue>,
    #[serde(borrow)]
    remote_port: Option<&'a RawValue>,
}

fn read(answer: &[u8]) -> Result<Prefilled, LegFailure> {
    let answer: PrefillAnswer<'_> = serde_json::from_slice(answer)
        .map_err(|_| LegFailure::Garbage("the prefill answer is not JSON"))?;
    let cached = answer
        .usage
        .and_then(|usage| usage.prompt_tokens_details)
        .and_then(|details| details.cached_tokens);
    let params = if let Some(params) = answer.kv_transfer_params {
        check(params)?;
        Bytes::copy_from_slice(params.get().as_bytes())
    } else {
        tracing::warn!("a prefill answer without kv_transfer_params: the prompt is read here");
        Bytes::from_static(b"null")
    };
    Ok(Prefilled {
        params,
        cached_tokens: cached.unwrap_or(0),
    })
}

/// A decode engine that is told to fetch, but not what from whom, ends its process.
fn check(params: &RawValue) -> Result<(), LegFailure> {
    let garbage = |_| LegFailure::Garbage("kv_transfer_params is not an object");
    let params: Params<'_> = serde_json::from_str(params.get()).map_err(garbage)?;
    let whole = params.remote_block_ids.is_some()
        && params.remote_engine_id.is_some()
        && params.remote_host.is_some()
        && params.remote_port.is_some();
    if params.do_remote_prefill == Some(true) && !whole {
        return Err(LegFailure::Garbage("incomplete kv_transfer_params"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_pass_as_they_are_written() {
        let params = r#"{ "do_remote_prefill":true,"remote_block_ids":[[1]],"remote_engine_id":"e","remote_host":"h","remote_port":5600,"new":9007199254740993}"#;
        let answer = format!(
            r#"{{"choices":[],"usage":{{"prompt_tokens_details":{{"cached_tokens":7}}}},"kv_transfer_params":{params}}}"#
        );
        let prefilled = read(answer.as_bytes()).unwrap();
        assert_eq!(prefilled.params, params.as_bytes());
        assert_eq!(prefilled.cached_tokens, 7);
    }

    #[test]
    fn without_parameters_the_decode_engine_is_told_so() {
        for answer in [
            "{}",
            r#"{"kv_transfer_params":null,"usage":{"prompt_tokens_details":null}}"#,
        ] {
            let prefilled = read(answer.as_bytes()).unwrap();
            assert_eq!(prefilled.params, &b"null"[..]);
            assert_eq!(prefilled.cached_tokens, 0);
        }
    }

    #[test]
    fn parameters_that_would_end_an_engine_are_refused() {
        for params in [
            r#"{"do_remote_prefill":true}"#,
            r#"{"do_remote_prefill":true,"remote_block_ids":null,"remote_engine_id":"e","remote_host":"h","remote_port":1}"#,
            "[1]",
            "7",
        ] {
            let answer = format!(r#"{{"kv_transfer_params":{params}}}"#);
            assert!(read(answer.as_bytes()).is_err(), "{params}");
        }
        assert!(read(b"<html>").is_err());
    }
}
