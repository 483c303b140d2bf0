//! Envoy, by its admin interface: is the picker called the way it has to be, and is its choice followed?
//!
//! Reads `/config_dump`, `/clusters` and `/stats`; values are those of protobuf's JSON form, where what
//! has its default is left out.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::Value;

use super::finding::Report;
use super::http;

/// Header and metadata key of the picker's choice.
const DESTINATION: &str = "x-gateway-destination-endpoint";
/// Header that an ORIGINAL_DST cluster reads unless told otherwise.
const DEFAULT_DESTINATION: &str = "x-envoy-original-dst-host";
const EXT_PROC: &str = "envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor";
const OVERRIDE_HOST: &str = "override_host.v3.OverrideHost";
const DUPLEX: &str = "FULL_DUPLEX_STREAMED";
const MODE: &str = "envoy-processing-mode";
/// Envoy's limit on requests of a cluster, unless told otherwise; a stream to the picker is one.
const DEFAULT_MAX_REQUESTS: u64 = 1024;
/// Shorter answers than this are cut by a route that says nothing.
const DEFAULT_ROUTE_TIMEOUT: &str = "15 s";

/// Looks at one Envoy. `picker_tls`: whether the picker's port speaks TLS, if that was found out.
pub async fn check(admin: SocketAddr, picker_tls: Option<bool>, report: &mut Report) {
    let subject = format!("envoy {admin}");
    let dump = match fetch(admin, "/config_dump").await {
        Ok(text) => text,
        Err(error) => {
            report.error(
                "envoy-admin",
                subject,
                error,
                "give the admin address (`admin:` in the bootstrap); in a pod: kubectl port-forward POD 19000",
            );
            return;
        }
    };
    let Ok(dump) = serde_json::from_str::<Value>(&dump) else {
        report.error(
            "envoy-admin",
            subject,
            "/config_dump is not JSON",
            "is this Envoy's admin interface?",
        );
        return;
    };
    configuration(&dump, picker_tls, report);
    if let Ok(text) = fetch(admin, "/clusters").await {
        hosts(&dump, &text, report);
    }
    if let Ok(text) = fetch(admin, "/stats?filter=ext_proc").await {
        counters(&text, report);
    }
}

async fn fetch(admin: SocketAddr, path: &str) -> Result<String, String> {
    match http::get(admin, false, path).await? {
        (200, body) => Ok(String::from_utf8_lossy(&body).into_owned()),
        (status, _) => Err(format!("{path} answers {status}")),
    }
}

/// The checks that need nothing but the dump.
pub fn configuration(dump: &Value, picker_tls: Option<bool>, report: &mut Report) {
    let clusters = Clusters::of(dump);
    let mut managers = Vec::new();
    collect(dump, &|v| v.get("http_filters").is_some(), &mut managers);
    let mut any = false;
    for manager in managers {
        let mut filters = Vec::new();
        collect(&manager["http_filters"], &is_ext_proc, &mut filters);
        if filters.is_empty() {
            continue;
        }
        any = true;
        let name = manager["stat_prefix"].as_str().unwrap_or("listener");
        for filter in filters {
            let subject = format!("envoy ext_proc in {name}");
            processing_mode(filter, &subject, report);
            failure_mode(filter, &clusters, &subject, report);
            metadata(filter, &clusters, &subject, report);
            picker_cluster(filter, &clusters, picker_tls, report);
        }
        spoofing(manager, &clusters, name, report);
    }
    if !any {
        report.error(
            "envoy-ext-proc",
            "envoy",
            "no ext_proc filter in any listener",
            "put envoy.filters.http.ext_proc before the router; deploy/envoy/original-dst.yaml is a whole example",
        );
        return;
    }
    destination(&clusters, report);
    routes(dump, &clusters, report);
}

fn is_ext_proc(value: &Value) -> bool {
    value["@type"]
        .as_str()
        .is_some_and(|t| t.ends_with(EXT_PROC))
}

/// Every object below `value` for which `wanted` holds, without looking inside those.
fn collect<'a>(value: &'a Value, wanted: &dyn Fn(&Value) -> bool, found: &mut Vec<&'a Value>) {
    match value {
        Value::Object(_) if wanted(value) => found.push(value),
        Value::Object(fields) => fields.values().for_each(|v| collect(v, wanted, found)),
        Value::Array(items) => items.iter().for_each(|v| collect(v, wanted, found)),
        _ => {}
    }
}

/// True when some string below `value` is `text`.
fn mentions(value: &Value, text: &str) -> bool {
    match value {
        Value::String(own) => own == text,
        Value::Object(fields) => fields.values().any(|v| mentions(v, text)),
        Value::Array(items) => items.iter().any(|v| mentions(v, text)),
        _ => false,
    }
}

/// How a cluster follows the picker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Follows {
    /// ORIGINAL_DST by the request header.
    Header,
    /// ORIGINAL_DST by dynamic metadata.
    Metadata,
    /// override_host; `metadata` is among its sources.
    OverrideHost { metadata: bool },
}

/// Clusters of the dump and what they are for.
struct Clusters<'a> {
    all: Vec<&'a Value>,
    followers: Vec<(&'a str, Follows)>,
}

impl<'a> Clusters<'a> {
    fn of(dump: &'a Value) -> Self {
        let is_cluster = |v: &Value| {
            let kind = v["@type"].as_str().unwrap_or_default();
            kind.ends_with("envoy.config.cluster.v3.Cluster")
        };
        let mut all = Vec::new();
        collect(dump, &is_cluster, &mut all);
        let follower = |cluster: &&'a Value| {
            let name = cluster["name"].as_str()?;
            follows(cluster).map(|how| (name, how))
        };
        let followers = all.iter().filter_map(follower).collect();
        Self { all, followers }
    }

    fn named(&self, name: &str) -> Option<&'a Value> {
        self.all.iter().copied().find(|c| c["name"] == name)
    }

    fn follow_how(&self, name: &str) -> Option<Follows> {
        let found = self.followers.iter().find(|(n, _)| *n == name);
        found.map(|(_, how)| *how)
    }
}

fn follows(cluster: &Value) -> Option<Follows> {
    if cluster["type"] == "ORIGINAL_DST" {
        let settings = &cluster["original_dst_lb_config"];
        if mentions(&settings["metadata_key"], DESTINATION) {
            return Some(Follows::Metadata);
        }
        let header = settings["http_header_name"].as_str();
        let reads = header.unwrap_or(DEFAULT_DESTINATION) == DESTINATION;
        return (settings["use_http_header"] == true && reads).then_some(Follows::Header);
    }
    let is_override = |v: &Value| {
        let kind = v["@type"].as_str().unwrap_or_default();
        kind.ends_with(OVERRIDE_HOST)
    };
    let mut policies = Vec::new();
    collect(
        &cluster["load_balancing_policy"],
        &is_override,
        &mut policies,
    );
    let sources = &policies.first()?["override_host_sources"];
    let metadata = sources
        .as_array()
        .into_iter()
        .flatten()
        .any(|s| mentions(&s["metadata"], DESTINATION));
    mentions(sources, DESTINATION).then_some(Follows::OverrideHost { metadata })
}

fn processing_mode(filter: &Value, subject: &str, report: &mut Report) {
    let mode = &filter["processing_mode"];
    let text = |key: String| mode[key].as_str().unwrap_or("default").to_owned();
    let (request, response) = (
        text("request_body_mode".to_owned()),
        text("response_body_mode".to_owned()),
    );
    let before = report.findings.len();
    for (part, body) in [("request", &request), ("response", &response)] {
        if text(format!("{part}_header_mode")) == "SKIP" {
            let message = format!("{part} headers are not sent to the picker");
            report.error(MODE, subject, message, duplex(part));
        }
        if body == DUPLEX && text(format!("{part}_trailer_mode")) != "SEND" {
            let message = format!("{DUPLEX} {part} bodies need {part}_trailer_mode SEND");
            report.error(MODE, subject, message, duplex(part));
        }
    }
    request_body(&request, filter, subject, report);
    response_body(&response, subject, report);
    if report.findings.len() == before {
        let message = format!("bodies: request {request}, response {response}");
        report.ok(MODE, subject, message);
    }
}

fn duplex(part: &str) -> String {
    format!(
        "set processing_mode: {{{part}_body_mode: {DUPLEX}, {part}_trailer_mode: SEND}} and both header modes to SEND"
    )
}

fn request_body(mode: &str, filter: &Value, subject: &str, report: &mut Report) {
    let message = match mode {
        DUPLEX => return,
        "BUFFERED" | "BUFFERED_PARTIAL" => return timeout(filter, subject, report),
        "STREAMED" => {
            "request_body_mode STREAMED: the picker has to answer before it knows the whole prompt"
        }
        _ => "request bodies are not sent to the picker: it knows neither model nor prompt",
    };
    report.error(MODE, subject, message, duplex("request"));
}

fn response_body(mode: &str, subject: &str, report: &mut Report) {
    match mode {
        DUPLEX | "STREAMED" => {}
        "BUFFERED" | "BUFFERED_PARTIAL" => {
            let message =
                format!("response_body_mode {mode}: clients get a stream at its end, all at once");
            report.error(MODE, subject, message, duplex("response"));
        }
        _ => report.warning(
            MODE,
            subject,
            "response bodies are not sent to the picker: no token usage, and load counts end with the headers",
            duplex("response"),
        ),
    }
}

/// Without full duplex Envoy gives up on the picker after `message_timeout`.
fn timeout(filter: &Value, subject: &str, report: &mut Report) {
    let given = filter["message_timeout"].as_str();
    let seconds = given.map_or(Some(0.2), |t| t.strip_suffix('s')?.parse::<f64>().ok());
    if seconds.is_none_or(|s| s < 1.0) {
        report.warning(
            "envoy-timeout",
            subject,
            format!(
                "message_timeout is {} with a buffered request body: a request that waits fails with 504",
                given.unwrap_or("0.2s")
            ),
            "set message_timeout: 300s",
        );
    }
}

fn failure_mode(filter: &Value, clusters: &Clusters<'_>, subject: &str, report: &mut Report) {
    let open = filter["failure_mode_allow"] == true;
    let original = clusters
        .followers
        .iter()
        .find(|(_, how)| matches!(how, Follows::Header | Follows::Metadata));
    match (open, original) {
        (true, Some((name, _))) => report.warning(
            "envoy-failure-mode",
            subject,
            format!("failure_mode_allow with ORIGINAL_DST cluster {name}: without a picker there is no destination, requests fail with 503 all the same"),
            "set failure_mode_allow: false, or use override_host with a fallback policy (deploy/envoy/override-host.yaml)",
        ),
        (true, None) => report.ok("envoy-failure-mode", subject, "fails open to the fallback policy"),
        (false, _) => report.ok("envoy-failure-mode", subject, "fails closed"),
    }
}

fn metadata(filter: &Value, clusters: &Clusters<'_>, subject: &str, report: &mut Report) {
    let receives = mentions(
        &filter["metadata_options"]["receiving_namespaces"]["untyped"],
        "envoy.lb",
    );
    let reader = clusters.followers.iter().find(|(_, how)| {
        matches!(
            how,
            Follows::Metadata | Follows::OverrideHost { metadata: true }
        )
    });
    if let Some((name, _)) = reader
        && !receives
    {
        report.error(
            "envoy-metadata",
            subject,
            format!("cluster {name} reads the picker's metadata, and the filter drops it"),
            "set metadata_options: {receiving_namespaces: {untyped: [envoy.lb]}}",
        );
    }
}

fn picker_cluster(
    filter: &Value,
    clusters: &Clusters<'_>,
    picker_tls: Option<bool>,
    report: &mut Report,
) {
    let Some(name) = filter["grpc_service"]["envoy_grpc"]["cluster_name"].as_str() else {
        return;
    };
    let subject = format!("envoy cluster {name}");
    let Some(cluster) = clusters.named(name) else {
        report.error(
            "envoy-picker-cluster",
            subject,
            "the filter's cluster does not exist",
            "define it, or name an existing one in grpc_service.envoy_grpc.cluster_name",
        );
        return;
    };
    if !has_key(cluster, "http2_protocol_options") {
        report.error(
            "envoy-picker-cluster",
            &subject,
            "does not speak HTTP/2, which gRPC needs",
            "set typed_extension_protocol_options ... explicit_http_config: {http2_protocol_options: {}}",
        );
    }
    let tls = cluster.get("transport_socket").is_some();
    match picker_tls {
        Some(picker) if picker != tls => report.error(
            "envoy-picker-tls",
            &subject,
            if picker {
                "speaks plaintext to a picker that expects TLS"
            } else {
                "speaks TLS to a picker in plaintext"
            },
            if picker {
                "add a transport_socket with an UpstreamTlsContext (alpn h2, no trusted_ca), or start the picker with --secure-serving=false"
            } else {
                "remove the transport_socket, or start the picker without --secure-serving=false"
            },
        ),
        _ => report.ok(
            "envoy-picker-tls",
            &subject,
            if tls { "TLS" } else { "plaintext" },
        ),
    }
    availability(cluster, &subject, report);
}

fn availability(cluster: &Value, subject: &str, report: &mut Report) {
    let checks = cluster["health_checks"].as_array();
    if checks.is_none_or(Vec::is_empty) {
        report.warning(
            "envoy-picker-health",
            subject,
            "no health check: requests go to a picker that is draining or gone",
            "add health_checks with grpc_health_check: {service_name: envoy.service.ext_proc.v3.ExternalProcessor}, interval 2s",
        );
    } else {
        if checks
            .into_iter()
            .flatten()
            .any(|c| c.get("no_traffic_interval").is_none())
        {
            report.warning(
                "envoy-picker-health",
                subject,
                "an idle cluster is checked once a minute only",
                "set no_traffic_interval: 2s in the health check",
            );
        }
        let panic = &cluster["common_lb_config"]["healthy_panic_threshold"];
        if !panic.is_object() || panic["value"].as_f64().unwrap_or(0.0) > 0.0 {
            report.warning(
                "envoy-picker-health",
                subject,
                "panic routing is on: an unhealthy picker is called all the same",
                "set common_lb_config: {healthy_panic_threshold: {value: 0}}",
            );
        }
    }
    let thresholds = cluster["circuit_breakers"]["thresholds"].as_array();
    let highest = thresholds
        .into_iter()
        .flatten()
        .filter_map(|t| t["max_requests"].as_u64())
        .max()
        .unwrap_or(DEFAULT_MAX_REQUESTS);
    if highest <= DEFAULT_MAX_REQUESTS {
        report.warning(
            "envoy-picker-limits",
            subject,
            format!("at most {highest} requests at once: every open request holds a stream to the picker"),
            "set circuit_breakers: {thresholds: [{max_connections: 40000, max_pending_requests: 40000, max_requests: 40000}]}",
        );
    }
}

fn has_key(value: &Value, key: &str) -> bool {
    match value {
        Value::Object(fields) => {
            fields.contains_key(key) || fields.values().any(|v| has_key(v, key))
        }
        Value::Array(items) => items.iter().any(|v| has_key(v, key)),
        _ => false,
    }
}

/// A client must not be able to name the destination itself.
fn spoofing(manager: &Value, clusters: &Clusters<'_>, name: &str, report: &mut Report) {
    let by_header = clusters
        .followers
        .iter()
        .any(|(_, how)| matches!(how, Follows::Header | Follows::OverrideHost { .. }));
    let stripped = mentions(&manager["early_header_mutation_extensions"], DESTINATION);
    if by_header && !stripped {
        report.error(
            "envoy-spoofing",
            format!("envoy listener {name}"),
            format!("clients may send {DESTINATION} themselves and reach any address while the picker is out"),
            format!("early_header_mutation_extensions:\n- name: envoy.http.early_header_mutation.header_mutation\n  typed_config:\n    \"@type\": type.googleapis.com/envoy.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation\n    mutations: [{{remove: {DESTINATION}}}]"),
        );
    }
}

fn destination(clusters: &Clusters<'_>, report: &mut Report) {
    for (name, how) in &clusters.followers {
        let message = match how {
            Follows::Header => "follows the picker's header (ORIGINAL_DST)",
            Follows::Metadata => "follows the picker's metadata (ORIGINAL_DST)",
            Follows::OverrideHost { .. } => "follows the picker's list (override_host)",
        };
        let subject = format!("envoy cluster {name}");
        report.ok("envoy-destination", &subject, message);
        let cluster = clusters.named(name).unwrap_or(&Value::Null);
        if has_key(cluster, "use_downstream_protocol_config") {
            report.error(
                "envoy-upstream-protocol",
                subject,
                "speaks whatever the client speaks: HTTP/2 clients get 502 from engines that have HTTP/1.1 only",
                "set explicit_http_config: {http_protocol_options: {}}, or http2_protocol_options for gRPC engines",
            );
        }
    }
    if clusters.followers.is_empty() {
        report.error(
            "envoy-destination",
            "envoy",
            "no cluster follows the picker: its choice has no effect",
            format!("make the pool's cluster ORIGINAL_DST with original_dst_lb_config: {{use_http_header: true, http_header_name: {DESTINATION}}}, or give it the override_host policy"),
        );
    }
}

/// A route that says nothing cuts answers off.
fn routes(dump: &Value, clusters: &Clusters<'_>, report: &mut Report) {
    let mut actions = Vec::new();
    let is_action = |v: &Value| v["cluster"].is_string() && v.get("grpc_service").is_none();
    collect(dump, &is_action, &mut actions);
    for action in actions {
        let name = action["cluster"].as_str().unwrap_or_default();
        if clusters.follow_how(name).is_none() {
            continue;
        }
        let subject = format!("envoy route to {name}");
        let Some(timeout) = action["timeout"].as_str() else {
            report.error(
                "envoy-route-timeout",
                subject,
                format!("no timeout given: answers are cut after {DEFAULT_ROUTE_TIMEOUT}"),
                "set timeout: 0s and idle_timeout: 3600s on the route",
            );
            continue;
        };
        let seconds = timeout.strip_suffix('s').and_then(|t| t.parse().ok());
        let limit = seconds.and_then(|s| Duration::try_from_secs_f64(s).ok());
        match limit {
            Some(Duration::ZERO) => report.ok("envoy-route-timeout", subject, "no limit"),
            Some(limit) if limit < Duration::from_mins(5) => report.warning(
                "envoy-route-timeout",
                subject,
                format!("answers are cut after {timeout}"),
                "set timeout: 0s: long generations take minutes",
            ),
            _ => report.ok("envoy-route-timeout", subject, timeout),
        }
    }
}

/// Health of the picker's hosts as Envoy sees it.
fn hosts(dump: &Value, text: &str, report: &mut Report) {
    let mut filters = Vec::new();
    collect(dump, &is_ext_proc, &mut filters);
    let mut names: Vec<&str> = filters
        .iter()
        .filter_map(|f| f["grpc_service"]["envoy_grpc"]["cluster_name"].as_str())
        .collect();
    names.sort_unstable();
    names.dedup();
    for name in names {
        let flags: Vec<(&str, &str)> = text
            .lines()
            .filter_map(|line| {
                let rest = line.strip_prefix(name)?.strip_prefix("::")?;
                let (host, flags) = rest.split_once("::health_flags::")?;
                Some((host, flags))
            })
            .collect();
        let subject = format!("envoy cluster {name}");
        if flags.is_empty() {
            report.error(
                "envoy-picker-host",
                &subject,
                "has no host",
                "the picker's name does not resolve: check the cluster's address",
            );
        }
        for (host, flags) in flags {
            if flags == "healthy" {
                report.ok("envoy-picker-host", &subject, format!("{host} is healthy"));
            } else {
                report.error(
                    "envoy-picker-host",
                    &subject,
                    format!("{host} is not healthy: {flags}"),
                    "the picker is not ready, or TLS and plaintext do not meet: see the findings on it",
                );
            }
        }
    }
}

/// Counters that stay at 0 while all is well.
fn counters(text: &str, report: &mut Report) {
    for (suffix, meaning, fix) in [
        (
            "streams_failed",
            "calls of the picker failed",
            "compare with the picker's restarts and its log",
        ),
        (
            "failure_mode_allowed",
            "requests went on without the picker",
            "each of them took the fallback: see why calls failed",
        ),
        (
            "rejected_header_mutations",
            "header changes of the picker were refused",
            "a header processor sets host, :method or x-envoy-*: Envoy does not allow it",
        ),
        (
            "spurious_msgs_received",
            "answers came out of order",
            "picker and Envoy disagree on the body mode: update both",
        ),
    ] {
        for line in text.lines() {
            let Some((name, value)) = line.split_once(": ") else {
                continue;
            };
            let count = value.trim().parse::<u64>().unwrap_or(0);
            if count > 0 && name.ends_with(&format!(".{suffix}")) {
                report.warning("envoy-counters", name, format!("{count} {meaning}"), fix);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::finding::Severity;

    fn dump(template: &str) -> Value {
        let shipped: Value = serde_saphyr::from_str(template).unwrap();
        let mut dump = serde_json::json!({"configs": [shipped["static_resources"].clone()]});
        // In a dump every resource carries its type.
        let kind = "type.googleapis.com/envoy.config.cluster.v3.Cluster";
        for cluster in dump["configs"][0]["clusters"].as_array_mut().unwrap() {
            cluster["@type"] = kind.into();
        }
        dump
    }

    const SHIPPED: [&str; 2] = [
        include_str!("../../deploy/envoy/original-dst.yaml"),
        include_str!("../../deploy/envoy/override-host.yaml"),
    ];

    fn problems(template: &str, tls: Option<bool>) -> Vec<(Severity, &'static str)> {
        let mut report = Report::default();
        configuration(&dump(template), tls, &mut report);
        let bad = report
            .findings
            .iter()
            .filter(|f| f.severity != Severity::Ok);
        bad.map(|f| (f.severity, f.check)).collect()
    }

    #[test]
    fn the_shipped_files_are_healthy() {
        assert_eq!(problems(SHIPPED[0], Some(true)), []);
        assert_eq!(problems(SHIPPED[1], Some(false)), []);
    }

    #[test]
    #[expect(clippy::too_many_lines, clippy::type_complexity, reason = "a table")]
    fn each_mistake_is_named() {
        use Severity::{Error, Warning};
        let table: &[(usize, &str, &str, &[(Severity, &str)])] = &[
            (
                0,
                "request_body_mode: FULL_DUPLEX_STREAMED",
                "request_body_mode: NONE",
                &[(Error, "envoy-processing-mode")],
            ),
            (
                0,
                "request_body_mode: FULL_DUPLEX_STREAMED",
                "request_body_mode: STREAMED",
                &[(Error, "envoy-processing-mode")],
            ),
            // 10 s are given, enough while buffered.
            (
                0,
                "request_body_mode: FULL_DUPLEX_STREAMED",
                "request_body_mode: BUFFERED",
                &[],
            ),
            (
                0,
                "message_timeout: 10s\n                      processing_mode:\n                        request_header_mode: SEND\n                        request_body_mode: FULL_DUPLEX_STREAMED",
                "processing_mode:\n                        request_header_mode: SEND\n                        request_body_mode: BUFFERED",
                &[(Warning, "envoy-timeout")],
            ),
            (
                0,
                "response_body_mode: FULL_DUPLEX_STREAMED",
                "response_body_mode: BUFFERED",
                &[(Error, "envoy-processing-mode")],
            ),
            (
                0,
                "response_body_mode: FULL_DUPLEX_STREAMED",
                "response_body_mode: NONE",
                &[(Warning, "envoy-processing-mode")],
            ),
            (
                0,
                "request_trailer_mode: SEND",
                "request_trailer_mode: SKIP",
                &[(Error, "envoy-processing-mode")],
            ),
            (
                0,
                "request_header_mode: SEND",
                "request_header_mode: SKIP",
                &[(Error, "envoy-processing-mode")],
            ),
            (
                0,
                "failure_mode_allow: false",
                "failure_mode_allow: true",
                &[(Warning, "envoy-failure-mode")],
            ),
            (
                0,
                "- remove: x-gateway-destination-endpoint",
                "- remove: x-other",
                &[(Error, "envoy-spoofing")],
            ),
            (
                0,
                "http_header_name: x-gateway-destination-endpoint",
                "http_header_name: x-other",
                &[(Error, "envoy-destination")],
            ),
            (
                0,
                "cluster_name: epp\n",
                "cluster_name: gone\n",
                &[(Error, "envoy-picker-cluster")],
            ),
            (
                0,
                "timeout: 0s\n                            idle_timeout",
                "idle_timeout",
                &[(Error, "envoy-route-timeout")],
            ),
            (
                0,
                "timeout: 0s\n                            idle_timeout",
                "timeout: 60s\n                            idle_timeout",
                &[(Warning, "envoy-route-timeout")],
            ),
            (
                0,
                "no_traffic_interval: 2s",
                "interval_jitter: 0.1s",
                &[(Warning, "envoy-picker-health")],
            ),
            (
                0,
                "healthy_panic_threshold: { value: 0 }",
                "healthy_panic_threshold: { value: 50 }",
                &[(Warning, "envoy-picker-health")],
            ),
            (
                0,
                "http2_protocol_options:",
                "http_protocol_options:",
                &[(Error, "envoy-picker-cluster")],
            ),
            (
                1,
                "receiving_namespaces",
                "forwarding_namespaces_2",
                &[(Error, "envoy-metadata")],
            ),
        ];
        for (file, from, to, wanted) in table {
            let shipped = SHIPPED[*file];
            assert!(shipped.contains(from), "{from}");
            let tls = *file == 0;
            assert_eq!(
                problems(&shipped.replacen(from, to, 1), Some(tls)),
                *wanted,
                "{to}"
            );
        }
        assert_eq!(
            problems(SHIPPED[0], Some(false)),
            [(Error, "envoy-picker-tls")]
        );
        assert_eq!(
            problems(SHIPPED[1], Some(true)),
            [(Error, "envoy-picker-tls")]
        );
        let empty = "static_resources: {listeners: [], clusters: []}";
        assert_eq!(problems(empty, None), [(Error, "envoy-ext-proc")]);
        let limits = SHIPPED[0].replace("max_requests: 40000", "max_requests: 100");
        assert_eq!(problems(&limits, None), [(Warning, "envoy-picker-limits")]);
    }

    #[test]
    fn hosts_and_counters_that_are_wrong_are_told() {
        let dump = dump(SHIPPED[0]);
        let mut report = Report::default();
        let text = "epp::127.0.0.1:9002::health_flags::/failed_active_hc\nepp::127.0.0.1:9003::health_flags::healthy\n";
        hosts(&dump, text, &mut report);
        hosts(&dump, "other::h::health_flags::healthy\n", &mut report);
        counters(
            "http.inference.ext_proc.streams_failed: 3\nhttp.inference.ext_proc.streams_started: 9\nhttp.inference.ext_proc.failure_mode_allowed: 0\n",
            &mut report,
        );
        let seen: Vec<_> = report
            .findings
            .iter()
            .map(|f| (f.severity, f.message.as_str()))
            .collect();
        assert_eq!(
            seen,
            [
                (
                    Severity::Error,
                    "127.0.0.1:9002 is not healthy: /failed_active_hc"
                ),
                (Severity::Ok, "127.0.0.1:9003 is healthy"),
                (Severity::Error, "has no host"),
                (Severity::Warning, "3 calls of the picker failed"),
            ]
        );
    }
}
