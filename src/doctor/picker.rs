//! The picker itself: its ports, its certificate, what it says about its pool.

use std::net::SocketAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use super::certificate::validity;
use super::finding::Report;
use super::grpc::{Channel, ProbeError};
use super::http;
use crate::extproc::proto::health::health_check_response::ServingStatus;

/// The service name gateways and proxies ask health for.
pub const EXT_PROC_SERVICE: &str = "envoy.service.ext_proc.v3.ExternalProcessor";

/// A certificate that ends sooner than this is worth a word.
const SOON_SECONDS: i64 = 14 * 86_400;

/// Where the picker's ports are; what is not given is not looked at.
#[derive(Debug, Clone, Copy, Default)]
pub struct Ports {
    /// ext_proc.
    pub extproc: Option<SocketAddr>,
    /// gRPC health.
    pub health: Option<SocketAddr>,
    /// Metrics.
    pub metrics: Option<SocketAddr>,
}

/// Looks at every given port. Returns whether the ext_proc port speaks TLS, if it answered.
pub async fn check(ports: &Ports, report: &mut Report) -> Option<bool> {
    let mut tls = None;
    if let Some(address) = ports.extproc {
        tls = extproc(address, report).await;
    }
    if let Some(address) = ports.health {
        health(address, report).await;
    }
    if let Some(address) = ports.metrics {
        metrics(address, report).await;
    }
    tls
}

async fn extproc(address: SocketAddr, report: &mut Report) -> Option<bool> {
    let subject = format!("ext_proc {address}");
    let (channel, tls) = match Channel::connect(address, true).await {
        Ok(channel) => (channel, true),
        Err(ProbeError::Connect(error)) => {
            report.error(
                "picker-port",
                subject,
                format!("cannot connect: {error}"),
                "start the picker, or check --grpc-port, the Service's targetPort and network policies",
            );
            return None;
        }
        Err(_) => match Channel::connect(address, false).await {
            Ok(channel) => (channel, false),
            Err(error) => {
                report.error(
                    "picker-port",
                    subject,
                    format!("neither TLS nor plaintext HTTP/2: {error}"),
                    "check that this is the picker's --grpc-port and not its metrics port",
                );
                return None;
            }
        },
    };
    match channel.health(EXT_PROC_SERVICE).await {
        Ok(ServingStatus::Serving) => {
            let how = if tls { "TLS" } else { "plaintext" };
            report.ok("picker-port", &subject, format!("serving, {how}"));
        }
        Ok(status) => report.error(
            "picker-ready",
            &subject,
            format!("health is {}", status.as_str_name()),
            "the pool was not seen yet, the picker is draining, or another replica leads: read its log",
        ),
        Err(error) => report.error(
            "picker-health",
            &subject,
            format!("health check fails: {error}"),
            "Envoy's health check of the picker's cluster fails the same way; is this port a picker's?",
        ),
    }
    if let Some(der) = channel.certificates().first() {
        certificate(&subject, der, report);
    }
    Some(tls)
}

fn certificate(subject: &str, der: &[u8], report: &mut Report) {
    let Some(dates) = validity(der) else {
        report.warning(
            "picker-certificate",
            subject,
            "the certificate's dates cannot be read",
            "replace it: gateways that verify certificates will refuse it",
        );
        return;
    };
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or(i64::MAX));
    let days = |seconds: i64| seconds / 86_400;
    let renew = "renew the files in --cert-path (the picker follows them), or leave the flag out: gateways accept its own certificate";
    if now > dates.not_after {
        let ago = days(now - dates.not_after);
        report.error(
            "picker-certificate",
            subject,
            format!("the certificate ended {ago} days ago"),
            renew,
        );
    } else if now < dates.not_before {
        report.error(
            "picker-certificate",
            subject,
            "the certificate is not valid yet",
            "compare the clocks of the node and of the certificate's issuer",
        );
    } else if dates.not_after - now < SOON_SECONDS {
        let left = days(dates.not_after - now);
        report.warning(
            "picker-certificate",
            subject,
            format!("the certificate ends in {left} days"),
            renew,
        );
    } else {
        let left = days(dates.not_after - now);
        let message = format!("valid for {left} more days");
        report.ok("picker-certificate", subject, message);
    }
}

async fn health(address: SocketAddr, report: &mut Report) {
    let subject = format!("health {address}");
    let channel = match Channel::connect(address, false).await {
        Ok(channel) => channel,
        Err(error) => {
            report.error(
                "picker-health",
                subject,
                error.to_string(),
                "probes go to --grpc-health-port, in plaintext: check the port and the pod's containerPort",
            );
            return;
        }
    };
    for (service, fix) in [
        (
            "liveness",
            "the process answers but hangs: restart it and keep its log",
        ),
        (
            "readiness",
            "the pool was not seen yet, the picker is draining, or another replica leads: read its log",
        ),
    ] {
        match channel.health(service).await {
            Ok(ServingStatus::Serving) => report.ok("picker-health", &subject, service),
            Ok(status) => report.error(
                "picker-ready",
                &subject,
                format!("{service} is {}", status.as_str_name()),
                fix,
            ),
            Err(error) => {
                report.error(
                    "picker-health",
                    &subject,
                    format!("{service}: {error}"),
                    fix,
                );
            }
        }
    }
}

async fn metrics(address: SocketAddr, report: &mut Report) {
    let subject = format!("metrics {address}");
    let (status, body) = match http::get(address, false, "/metrics").await {
        Ok(answer) => answer,
        Err(error) => {
            report.error(
                "picker-metrics",
                subject,
                error,
                "check --metrics-port; with --metrics-cert-dir it speaks https",
            );
            return;
        }
    };
    match status {
        200 => {}
        401 | 403 => {
            report.ok(
                "picker-metrics",
                subject,
                format!("asks for a token ({status}), as --metrics-endpoint-auth makes it"),
            );
            return;
        }
        other => {
            report.error(
                "picker-metrics",
                subject,
                format!("answers {other}"),
                "is this the picker's metrics port?",
            );
            return;
        }
    }
    let text = String::from_utf8_lossy(&body);
    let pools: Vec<(&str, f64)> = samples(&text, "llm_d_epp_ready_endpoints").collect();
    if pools.is_empty() {
        report.warning(
            "picker-metrics",
            &subject,
            "llm_d_epp_ready_endpoints is missing",
            "this is no picker's exposition, or one of an older release",
        );
    }
    for (labels, endpoints) in pools {
        if endpoints == 0.0 {
            report.error(
                "pool-empty",
                &subject,
                format!("pool {labels} has no endpoint"),
                "compare the pool's selector with the labels of the model servers, and see whether they are ready",
            );
        } else {
            report.ok("pool", &subject, format!("{endpoints} endpoints {labels}"));
        }
    }
    if samples(&text, "pinpod_config_last_reload_success").any(|(_, value)| value == 0.0) {
        report.error(
            "configuration",
            &subject,
            "the configuration file as it is now cannot be used; the one before is",
            "pinpod check-config FILE names line and field",
        );
    }
}

/// Label block and value of every sample of `name`.
pub(super) fn samples<'a>(
    text: &'a str,
    name: &'a str,
) -> impl Iterator<Item = (&'a str, f64)> + 'a {
    text.lines().filter_map(move |line| {
        let rest = line.strip_prefix(name)?;
        let (labels, value) = if rest.starts_with('{') {
            let end = rest.rfind('}')? + 1;
            rest.split_at_checked(end)?
        } else if rest.starts_with(' ') {
            ("", rest)
        } else {
            return None;
        };
        let number = value.split_whitespace().next()?.parse().ok()?;
        Some((labels, number))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_told_apart_by_whole_names() {
        let text = "# TYPE a gauge\na{x=\"}\"} 2\na_sum 5\na 3 1700000000\na{y=\"1\"} NaN\n";
        let found: Vec<_> = samples(text, "a").collect();
        assert_eq!(found.len(), 3);
        assert_eq!(found[..2], [("{x=\"}\"}", 2.0), ("", 3.0)]);
        assert!(found[2].1.is_nan());
    }
}
