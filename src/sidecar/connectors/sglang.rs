//! `sglang`: both engines get one body and meet in a bootstrap room.

use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;

use super::super::answer::Answer;
use super::super::exchange::{Exchange, Refusal};
use super::super::json::{Field, quoted};
use super::super::metrics::Path;

/// Tries the candidates in turn; a decode engine of SGLang cannot read a prompt itself, so after the
/// last one the failure is the answer.
pub(super) async fn serve(exchange: &Exchange) -> Result<Answer, Refusal> {
    let port = exchange.sidecar.settings.sglang_bootstrap_port;
    let mut attempts = exchange.attempts();
    while let Some(target) = attempts.next() {
        let body = exchange.prompt.with(&[
            (Field::BootstrapHost, Some(quoted(target.host()))),
            (Field::BootstrapPort, Some(port.to_string().into())),
            (Field::BootstrapRoom, Some(room())),
        ]);
        match exchange
            .both(target, (&body, &[]), (body.clone(), &[]))
            .await?
        {
            Ok(answer) => {
                exchange.sidecar.metrics().served(Path::PrefillDecode);
                return Ok(answer);
            }
            Err(failure) => attempts.failed(target, failure)?,
        }
    }
    Err(attempts.or_error())
}

/// A room nobody else is in: nanoseconds of now, and a little chance.
fn room() -> Bytes {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    (now.as_nanos() + u128::from(fastrand::u16(..1000)))
        .to_string()
        .into()
}
