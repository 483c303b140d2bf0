//! Reads metrics of the parts over HTTP.

use std::collections::HashMap;
use std::net::SocketAddr;

use anyhow::Context;
use bytes::Bytes;
use http::{Request, header};
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::net::TcpStream;

/// Samples of an exposition by series name, labels dropped but `le`; equal names are summed.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Samples(HashMap<String, f64>);

impl Samples {
    /// Reads an exposition; lines that are none are left out.
    pub fn parse(text: &str) -> Self {
        let mut values = HashMap::new();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let Some((series, value)) = line.rsplit_once(' ') else {
                continue;
            };
            let name = series.split('{').next().unwrap_or_default();
            let bound = series
                .split_once("le=\"")
                .and_then(|(_, rest)| rest.split('"').next());
            let key = bound.map_or_else(|| name.to_owned(), |bound| format!("{name}:{bound}"));
            *values.entry(key).or_insert(0.0) += value.parse().unwrap_or(0.0);
        }
        Self(values)
    }

    /// The value of `name`, 0 when it is not exposed.
    pub fn get(&self, name: &str) -> f64 {
        self.0.get(name).copied().unwrap_or(0.0)
    }

    /// Mean of the observations of histogram `name`; 0 without any.
    pub fn mean(&self, name: &str) -> f64 {
        self.get(&format!("{name}_sum")) / self.get(&format!("{name}_count")).max(1.0)
    }

    /// Upper bound of the bucket of histogram `name` in which `share` of the observations are
    /// reached; infinite when that is the last bucket or there is none.
    pub fn bucket_percentile(&self, name: &str, share: f64) -> f64 {
        let prefix = format!("{name}_bucket:");
        let mut buckets: Vec<(f64, f64)> = self
            .0
            .iter()
            .filter_map(|(key, count)| Some((key.strip_prefix(&prefix)?.parse().ok()?, *count)))
            .collect();
        buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
        let wanted = share * self.get(&format!("{name}_count"));
        buckets
            .iter()
            .find(|(_, count)| *count >= wanted)
            .map_or(f64::INFINITY, |(bound, _)| *bound)
    }
}

/// `/metrics` of each address, in their order.
pub async fn metrics(addresses: &[SocketAddr]) -> anyhow::Result<Vec<Samples>> {
    let mut all = Vec::with_capacity(addresses.len());
    for address in addresses {
        let body = get(*address, "/metrics").await?;
        all.push(Samples::parse(&String::from_utf8_lossy(&body)));
    }
    Ok(all)
}

/// What a simulated pod says about itself beside its metrics.
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct PodStats {
    /// Requests it finished.
    pub finished: u64,
    /// Virtual seconds by which its engine fell behind.
    pub lag_seconds: f64,
}

/// `/sim/stats` of each pod, in their order.
pub async fn pod_stats(pods: &[SocketAddr]) -> anyhow::Result<Vec<PodStats>> {
    let mut all = Vec::with_capacity(pods.len());
    for pod in pods {
        all.push(serde_json::from_slice(&get(*pod, "/sim/stats").await?)?);
    }
    Ok(all)
}

/// The body of a 200 answer to a GET.
pub async fn get(address: SocketAddr, path: &str) -> anyhow::Result<Bytes> {
    let stream = TcpStream::connect(address)
        .await
        .with_context(|| address.to_string())?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let request = Request::get(path)
        .header(header::HOST, "localhost")
        .body(Empty::<Bytes>::new())?;
    let response = sender.send_request(request).await?;
    Ok(response.into_body().collect().await?.to_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = "# TYPE d histogram\n\
        d_bucket{le=\"0.00001\"} 40\nd_bucket{le=\"0.00002\"} 50\nd_bucket{le=\"0.0001\"} 98\n\
        d_bucket{le=\"+Inf\"} 100\nd_sum 0.004\nd_count 100\nn{a=\"1\"} 2\nn{a=\"2\"} 3\n";

    #[test]
    fn samples_are_summed_over_labels() {
        let samples = Samples::parse(PAGE);
        assert_eq!((samples.get("n"), samples.get("none")), (5.0, 0.0));
        // 4 ms over 100 observations.
        assert!((samples.mean("d") - 4e-5).abs() < 1e-12);
    }

    #[test]
    fn a_percentile_is_the_bound_of_the_bucket_that_reaches_it() {
        let samples = Samples::parse(PAGE);
        // 50 of 100 lie at or below 20 us, 98 at or below 100 us, the 99th is above every bound.
        assert_eq!(samples.bucket_percentile("d", 0.5), 0.000_02);
        assert_eq!(samples.bucket_percentile("d", 0.98), 0.000_1);
        assert_eq!(samples.bucket_percentile("d", 0.99), f64::INFINITY);
        assert_eq!(samples.bucket_percentile("none", 0.5), f64::INFINITY);
    }
}
