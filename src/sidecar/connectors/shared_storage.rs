//! `shared-storage`: both engines use one store of blocks; nothing is said in bodies but whether an
//! engine may give up for lack of cached blocks.

use bytes::Bytes;

use super::super::answer::{Answer, decode_failed};
use super::super::body::AnswerBody;
use super::super::exchange::{Exchange, Refusal};
use super::super::json::Field;
use super::super::metrics::Path;
use super::super::prompt::Limits;
use super::opening::{self, Opening};

/// Decode at once if the client set a threshold and enough is cached; else prefill, then decode.
pub(super) async fn serve(exchange: &Exchange) -> Result<Answer, Refusal> {
    if exchange.prompt.value(Field::CacheHitThreshold).is_some()
        && let Some(answer) = decode_cached(exchange).await?
    {
        exchange.sidecar.metrics().served(Path::DecodeOnly);
        return Ok(answer);
    }
    let any = (Field::CacheHitThreshold, Some(Bytes::from_static(b"0")));
    let body = exchange
        .prompt
        .single_token(Limits::Most, std::slice::from_ref(&any));
    let mut attempts = exchange.attempts();
    let mut path = Path::LocalPrefill;
    while let Some(target) = attempts.next() {
        match exchange.prefill(target, &body, &[]).await {
            Ok(_) => {
                path = Path::PrefillDecode;
                break;
            }
            Err(failure) => attempts.failed(target, failure)?,
        }
    }
    if path == Path::LocalPrefill {
        attempts.or_local()?;
    }
    let response = exchange.decode(exchange.prompt.with(&[any]), &[]).await?;
    exchange.sidecar.metrics().served(path);
    Ok(response.map(AnswerBody::leg))
}

/// The answer of an engine that had enough cached; `None` when it gave up.
async fn decode_cached(exchange: &Exchange) -> Result<Option<Answer>, Refusal> {
    let response = exchange.decode(exchange.prompt.with(&[]), &[]).await?;
    if !response.status().is_success() {
        return Ok(Some(response.map(AnswerBody::leg)));
    }
    let (head, mut leg) = response.into_parts();
    let failed = |error| Box::new(decode_failed(&error));
    if opening::is_stream(&head.headers) {
        let (opening, read) = opening::read(&mut leg).await.map_err(failed)?;
        let answers = opening != Opening::GaveUp;
        return Ok(answers.then(|| Answer::from_parts(head, AnswerBody::after(read, leg))));
    }
    let body = leg.whole().await.map_err(failed)?;
    let gave_up = opening::gave_up(&body);
    Ok((!gave_up).then(|| Answer::from_parts(head, AnswerBody::whole(body))))
}
