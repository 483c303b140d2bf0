//! Every metric name once, with type, help, buckets and legacy twin.

/// What a series counts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Distribution over the given upper bounds.
    Histogram(&'static [f64]),
}

/// One series of the contract.
#[derive(Debug, Clone, Copy)]
pub struct Series {
    /// Exposed name.
    pub name: &'static str,
    /// Name under which dashboards of earlier releases know it; written beside the current one.
    pub twin: Option<&'static str>,
    /// Type.
    pub kind: Kind,
    /// Help text without the stability mark.
    pub help: &'static str,
}

impl Series {
    /// Its help text under `name`, which is its own or its twin's.
    pub fn help_of(&self, name: &str) -> String {
        if self.twin == Some(name) {
            format!("[ALPHA] [Deprecated: Use {}] {}", self.name, self.help)
        } else {
            format!("[ALPHA] {}", self.help)
        }
    }
}

/// Seconds: end-to-end latency.
pub const LAT: &[f64] = &[
    0.005, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0,
    10.0, 15.0, 20.0, 30.0, 45.0, 60.0, 120.0, 180.0, 240.0, 300.0, 360.0, 480.0, 600.0, 900.0,
    1200.0, 1800.0, 2700.0, 3600.0,
];
/// Seconds: time to first token, `LAT` up to two minutes.
pub const TTFT: &[f64] = &[
    0.005, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0,
    10.0, 15.0, 20.0, 30.0, 45.0, 60.0, 120.0,
];
/// Bytes of a request: powers of two.
pub const REQ: &[f64] = &[
    64.0,
    128.0,
    256.0,
    512.0,
    1024.0,
    2048.0,
    4096.0,
    8192.0,
    16384.0,
    32768.0,
    65536.0,
    131_072.0,
    262_144.0,
    524_288.0,
    1_048_576.0,
    2_097_152.0,
    4_194_304.0,
    8_388_608.0,
    16_777_216.0,
    33_554_432.0,
    67_108_864.0,
    134_217_728.0,
    268_435_456.0,
    536_870_912.0,
    1_073_741_824.0,
];
/// Bytes of a response; 32778 is the published bound.
pub const RESP: &[f64] = &[
    1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0,
    32778.0, 65536.0,
];
/// Input tokens: `RESP` and four more.
pub const IN: &[f64] = &[
    1.0,
    8.0,
    16.0,
    32.0,
    64.0,
    128.0,
    256.0,
    512.0,
    1024.0,
    2048.0,
    4096.0,
    8192.0,
    16384.0,
    32778.0,
    65536.0,
    131_072.0,
    262_144.0,
    524_288.0,
    1_048_576.0,
];
/// Output tokens.
pub const OUT: &[f64] = &[
    1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0,
];
/// Seconds per output token over the whole request.
pub const NTPOT: &[f64] = &[
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0,
];
/// Seconds per output token after the first.
pub const TPOT: &[f64] = &[
    0.0005, 0.00205, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.125, 0.15, 0.2, 0.3, 0.4, 0.5,
    0.6, 0.8, 1.0, 2.0,
];
/// Seconds between streamed pieces.
pub const ITL: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0,
];
/// Seconds of scheduling, as the reference publishes them.
pub const SCHED: &[f64] = &[
    0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1,
];
/// Seconds from the request's arrival to its decision.
pub const REQP: &[f64] = &[
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.015, 0.025, 0.04, 0.06, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0,
    10.0,
];
/// Seconds of the response phase.
pub const RESPP: &[f64] = &[
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0,
];
/// Seconds an ext_proc stream was open.
pub const STREAM: &[f64] = &[
    0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0,
];
/// Shares.
pub const RATIO: &[f64] = &[0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0];
/// Matched bytes.
pub const HIT: &[f64] = &[
    0.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0,
    65536.0,
];
/// Seconds: the buckets a Prometheus client library has unless told otherwise.
pub const DEFAULT: &[f64] = &[
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];
/// Seconds of a decision of ours; the published scheduling buckets start where we end.
pub const DECISION: &[f64] = &[
    0.000_005, 0.000_01, 0.000_02, 0.000_03, 0.000_04, 0.000_06, 0.000_1, 0.000_2, 0.000_3,
    0.000_5, 0.001, 0.002, 0.005, 0.01, 0.1,
];

macro_rules! series {
    ($($name:literal $(= $twin:literal)?, $kind:expr, $help:literal;)*) => {
        /// The contract, and a few series of our own (`pinpod_`).
        pub const TABLE: &[Series] = &[$(
            Series { name: $name, twin: series!(@twin $($twin)?), kind: $kind, help: $help },
        )*];
    };
    (@twin $twin:literal) => { Some($twin) };
    (@twin) => { None };
}

use Kind::{Counter, Gauge, Histogram};

series! {
    "llm_d_epp_request_total" = "inference_objective_request_total", Counter, "Requests routed.";
    "llm_d_epp_request_error_total" = "inference_objective_request_error_total", Counter, "Requests that ended with an error.";
    "llm_d_epp_request_duration_seconds" = "inference_objective_request_duration_seconds", Histogram(LAT), "End-to-end response latency in seconds.";
    "llm_d_epp_request_size_bytes" = "inference_objective_request_sizes", Histogram(REQ), "Size of forwarded request bodies in bytes.";
    "llm_d_epp_response_size_bytes" = "inference_objective_response_sizes", Histogram(RESP), "Size of response bodies in bytes.";
    "llm_d_epp_request_input_tokens" = "inference_objective_input_tokens", Histogram(IN), "Prompt tokens reported by the engine.";
    "llm_d_epp_request_output_tokens" = "inference_objective_output_tokens", Histogram(OUT), "Output tokens reported by the engine.";
    "llm_d_epp_request_cached_tokens" = "inference_objective_prompt_cached_tokens", Histogram(IN), "Prompt tokens the engine found in its cache.";
    "llm_d_epp_request_running" = "inference_objective_running_requests", Gauge, "Requests routed and not finished.";
    "llm_d_epp_request_ntpot_seconds" = "inference_objective_normalized_time_per_output_token_seconds", Histogram(NTPOT), "Whole duration by output tokens, in seconds.";
    "llm_d_epp_request_ttft_seconds", Histogram(TTFT), "Time to the first response byte in seconds.";
    "llm_d_epp_request_streaming_tpot_seconds", Histogram(TPOT), "Time per output token after the first, in seconds.";
    "llm_d_epp_request_streaming_itl_seconds", Histogram(ITL), "Gap between streamed pieces in seconds.";
    "llm_d_epp_average_kv_cache_utilization" = "inference_pool_average_kv_cache_utilization", Gauge, "Mean KV cache use of fresh endpoints, 0 to 1.";
    "llm_d_epp_average_queue_size" = "inference_pool_average_queue_size", Gauge, "Mean waiting requests of fresh endpoints.";
    "llm_d_epp_average_running_requests" = "inference_pool_average_running_requests", Gauge, "Mean running requests of fresh endpoints.";
    "llm_d_epp_std_dev_kv_cache_utilization", Gauge, "Sample standard deviation of KV cache use.";
    "llm_d_epp_std_dev_queue_size", Gauge, "Sample standard deviation of waiting requests.";
    "llm_d_epp_std_dev_running_requests", Gauge, "Sample standard deviation of running requests.";
    "llm_d_epp_ready_endpoints" = "inference_pool_ready_pods", Gauge, "Endpoints in the pool.";
    "llm_d_epp_per_endpoint_queue_size" = "inference_pool_per_pod_queue_size", Gauge, "Waiting requests of one endpoint.";
    "llm_d_epp_scheduler_e2e_duration_seconds" = "inference_extension_scheduler_e2e_duration_seconds", Histogram(SCHED), "Time of the scheduling cycle in seconds.";
    "llm_d_epp_scheduler_attempts_total" = "inference_extension_scheduler_attempts_total", Counter, "Scheduling attempts by outcome and chosen endpoint.";
    "llm_d_epp_plugin_duration_seconds" = "inference_extension_plugin_duration_seconds", Histogram(SCHED), "Time spent in one plugin in seconds.";
    "llm_d_epp_request_processing_duration_seconds", Histogram(REQP), "Time from a request's arrival to its answer in seconds.";
    "llm_d_epp_response_processing_duration_seconds", Histogram(RESPP), "Time from the response headers to the end of the response in seconds.";
    "llm_d_epp_info" = "inference_extension_info", Gauge, "Build of this process.";
    "llm_d_epp_datalayer_poll_errors_total" = "llm_d_inference_scheduler_datalayer_poll_errors_total", Counter, "Failed scrapes.";
    "llm_d_epp_datalayer_extract_errors_total" = "llm_d_inference_scheduler_datalayer_extract_errors_total", Counter, "Scrapes with a missing or unusable family.";
    "llm_d_epp_extproc_streams_inflight", Gauge, "Open ext_proc streams.";
    "llm_d_epp_extproc_stream_duration_seconds", Histogram(STREAM), "Lifetime of ext_proc streams in seconds.";
    "llm_d_epp_extproc_streams_total", Counter, "Finished ext_proc streams by gRPC code.";
    "llm_d_epp_prefix_indexer_size" = "inference_extension_prefix_indexer_size", Gauge, "Entries of the prefix index.";
    "llm_d_epp_prefix_indexer_hit_ratio" = "inference_extension_prefix_indexer_hit_ratio", Histogram(RATIO), "Share of the prompt's blocks found on the best endpoint.";
    "llm_d_epp_prefix_indexer_hit_bytes" = "inference_extension_prefix_indexer_hit_bytes", Histogram(HIT), "Prompt bytes found on the best endpoint.";
    "llm_d_epp_inflight_requests", Gauge, "Requests booked on an endpoint.";
    "llm_d_epp_inflight_tokens", Gauge, "Uncached prompt tokens booked on an endpoint.";
    "llm_d_epp_disagg_decision_total" = "llm_d_inference_scheduler_disagg_decision_total", Counter, "Requests by the stages that ran on endpoints of their own.";
    "llm_d_epp_pd_decision_total" = "llm_d_inference_scheduler_pd_decision_total", Counter, "Requests of the deprecated handler by the stages that ran on endpoints of their own.";
    "llm_d_epp_disaggregatedset_strict_header_no_match_total", Counter, "Requests whose strict header no endpoint matched.";
    "llm_d_epp_disaggregatedset_revision_gating_share", Gauge, "Share of requests that a revision gets, 0 to 1; 0 while a role is missing.";
    "llm_d_epp_encoder_cache_queries_total", Counter, "Media items looked up, by modality.";
    "llm_d_epp_encoder_cache_hits_total", Counter, "Media items that an endpoint was sent before, by endpoint and modality.";
    "llm_d_epp_encoder_cache_hit_ratio", Histogram(RATIO), "Share of a request's media items that a candidate was sent before.";
    "llm_d_epp_kv_cache_index_admissions_total" = "kvcache_index_admissions_total", Counter, "Blocks that KV events added to the index.";
    "llm_d_epp_kv_cache_index_evictions_total" = "kvcache_index_evictions_total", Counter, "Blocks that KV events or the memory bound took out of the index.";
    "llm_d_epp_kv_cache_index_lookup_requests_total" = "kvcache_index_lookup_requests_total", Counter, "Look-ups in the block index, one for each prompt.";
    "llm_d_epp_kv_cache_index_lookup_hits_total" = "kvcache_index_lookup_hits_total", Counter, "Blocks of the longest match of each look-up.";
    "llm_d_epp_kv_cache_index_max_pod_hit_count_total" = "kvcache_index_max_pod_hit_count_total", Counter, "Blocks of the best endpoint of each look-up.";
    "llm_d_epp_kv_cache_index_lookup_latency_seconds" = "kvcache_index_lookup_latency_seconds", Histogram(DEFAULT), "Time of a look-up in the block index in seconds.";
    "llm_d_epp_kv_cache_events_dedup_removed_hashes_suppressed_total" = "kvcache_kvevents_dedup_removed_hashes_suppressed_total", Counter, "Removed copies of blocks of which another copy stays.";
    "llm_d_epp_kv_cache_events_dedup_removed_hashes_forwarded_total" = "kvcache_kvevents_dedup_removed_hashes_forwarded_total", Counter, "Removed last copies of blocks.";
    "llm_d_epp_kv_cache_events_stores_skipped_total", Counter, "Stores that say nothing about prefixes, by kind of cache and reason.";
    "llm_d_epp_kv_cache_events_removals_skipped_total", Counter, "Removals that say nothing about prefixes, by kind of cache and reason.";
    "llm_d_epp_kv_cache_events_active_subscribers", Gauge, "KV event subscribers that run.";
    "llm_d_epp_kv_cache_events_subscriber_reconnections_total", Counter, "Connections to a KV event publisher after the first.";
    "llm_d_epp_kv_cache_events_messages_received_total", Counter, "Live KV event messages received.";
    "llm_d_epp_kv_cache_events_zmq_errors_total", Counter, "Failures of the KV event transport, by operation.";
    "llm_d_epp_kv_cache_events_pool_queue_depth", Gauge, "KV event messages that wait to be applied.";
    "llm_d_epp_kv_cache_events_pool_capacity", Gauge, "KV event messages that may wait.";
    "pinpod_kv_subscribers", Gauge, "KV event subscribers by state: down, joining, live, gap.";
    "pinpod_kv_subscriber_live", Gauge, "1 while every event of the publisher up to now was applied; NaN once its endpoint left the pool.";
    "pinpod_kv_event_lag_seconds", Gauge, "Arrival of a publisher's newest live message minus its time stamp.";
    "pinpod_kv_events_total", Counter, "KV events applied.";
    "pinpod_kv_event_gaps_total", Counter, "Times sequence numbers of a publisher were skipped.";
    "pinpod_kv_event_losses_total", Counter, "Gaps that no replay could fill: what was known of the endpoint is forgotten.";
    "pinpod_kv_event_restarts_total", Counter, "Engine restarts that the event stream showed.";
    "pinpod_kv_event_replays_total", Counter, "Replays asked for.";
    "pinpod_kv_event_replayed_messages_total", Counter, "Messages that came by replay.";
    "pinpod_kv_event_dropped_total", Counter, "KV event messages dropped, by reason: duplicate, buffer_full, oversize, bad_frames, unattributed.";
    "pinpod_kv_event_decode_errors_total", Counter, "What could not be decoded, by reason: payload, malformed_event, unknown_event.";
    "pinpod_kv_index_endpoints", Gauge, "Publishers with a part in the block index: ranks of endpoints.";
    "pinpod_kv_index_blocks", Gauge, "Distinct blocks in the index.";
    "pinpod_kv_index_runs", Gauge, "Runs the blocks lie in.";
    "pinpod_kv_index_bytes", Gauge, "Estimated memory of the index.";
    "pinpod_kv_index_max_bytes", Gauge, "Memory the index may use.";
    "pinpod_kv_index_speculative_entries", Gauge, "Predictions that wait for events or their deadline.";
    "pinpod_kv_index_evicted_runs_total", Counter, "Runs dropped because the index was full.";
    "pinpod_kv_index_refused_blocks_total", Counter, "Blocks and predictions not taken in because the index was full, by what.";
    "pinpod_kv_index_malformed_stores_total", Counter, "Stores dropped because their extra keys have not one entry for each block.";
    "pinpod_kv_index_parked_stores_total", Counter, "Stores whose parent block was unknown, by what became of them: parked, dropped.";
    "pinpod_kv_shared_index_up", Gauge, "1 while the shared index can be reached.";
    "pinpod_kv_shared_index_connections_total", Counter, "Connections made to the shared index.";
    "pinpod_kv_shared_index_lookups_total", Counter, "Look-ups in the shared index by result: found, down, late, failed.";
    "pinpod_kv_shared_index_events_total", Counter, "Events for the shared index by what became of them: written, overflowed, lost, without_model, without_parent, malformed.";
    "pinpod_kv_hit_parity", Gauge, "What index and engine agree on of what either says is cached, over an endpoint's last 32 answers, 0 to 1.";
    "pinpod_kv_hit_parity_broken", Gauge, "1 after 5 answers in a row whose cached tokens contradict the index, by endpoint, model, kind of prompt and salt; 0 again after 3 that agree.";
    "pinpod_kv_hit_predicted_tokens_total", Counter, "Prompt tokens that should be in the picked endpoint's cache, over compared answers.";
    "pinpod_kv_hit_reported_tokens_total", Counter, "Prompt tokens that the engine found in its cache, over compared answers.";
    "pinpod_kv_hit_compared_total", Counter, "Answers held against the index, by result: agree, engine_misses, engine_hits_more, neutral, unreported.";
    "pinpod_decision_duration_seconds", Histogram(DECISION), "Time from the complete request to its decision in seconds.";
    "pinpod_precise_prefix_requests_total", Counter, "Requests by how their prefix was matched: exact, partial (exactly up to the first medium), mixed (some endpoints publish no KV events), no_tokens, no_events, shared_failed (the shared index gave no answer).";
    "pinpod_tokenizer_queue_depth", Gauge, "Prompts that wait for a tokenizer worker.";
    "pinpod_tokenizer_busy_workers", Gauge, "Tokenizer workers at work.";
    "pinpod_tokenizer_stale_models", Gauge, "Models whose newest files are not in use.";
    "pinpod_tokenizer_missing_models", Gauge, "Models without a tokenizer.";
    "pinpod_tokenizer_jobs_total", Counter, "Prompts given to the workers, by result: done, refused (the queue was full), abandoned, panicked.";
    "pinpod_tokenizer_reloads_total", Counter, "Changed model files, by result.";
    "pinpod_tokenizer_hub_fetches_total", Counter, "Attempts to bring a model's files from the hub, by result.";
    "pinpod_tokenizer_fallbacks_total", Counter, "Requests that went on without ids, by reason.";
    "pinpod_tokenizer_job_duration_seconds_bucket", Counter, "Prompts by the time they waited for a worker and kept it, cumulative by upper bound in seconds.";
    "pinpod_token_producer_requests_total", Counter, "Requests by how their prompt became tokens: ready, waited, failed.";
    "pinpod_trace_spans_total", Counter, "Spans of recorded requests by what became of them: exported, dropped (the queue was full), failed (no collector took them), rejected (the collector refused them).";
    "pinpod_aborted_requests_total", Counter, "Requests the proxy gave up, by phase.";
    "pinpod_config_reloads_total", Counter, "Changes of the configuration file, by result.";
    "pinpod_config_last_reload_success", Gauge, "1 when the configuration file in its present state is in use.";
    "llm_d_epp_model_rewrite_decisions_total" = "inference_extension_model_rewrite_decisions_total", Counter, "Requests that a rewrite sent to another model name.";
    "pinpod_leader", Gauge, "1 while this process holds the lease of its pool.";
    "pinpod_lease_tries_total", Counter, "Tries for the lease: held, taken (by another), error.";
    "pinpod_kubernetes_watch_connected", Gauge, "1 while a collection of the Kubernetes API is followed, 0 while its last known state stands.";
    "pinpod_kubernetes_last_contact_timestamp_seconds", Gauge, "When the API server last said something about a collection, in Unix time.";
    "pinpod_kubernetes_lists_total", Counter, "Complete lists of a collection.";
    "pinpod_kubernetes_events_total", Counter, "Events of a collection: applied, deleted, stale (repeated or out of order, dropped).";
    "pinpod_kubernetes_failures_total", Counter, "Requests, events and objects of a collection that failed, by reason.";
    "pinpod_discovery_reload_failures_total", Counter, "Endpoint files that could not be read.";
    "pinpod_sidecar_requests_total", Counter, "Requests of the sidecar, by how they were served: plain, decode_only, prefill_decode, local_prefill, error.";
    "pinpod_sidecar_active_legs", Gauge, "Engine calls in progress, by stage: encode, prefill, decode.";
    "pinpod_sidecar_legs_total", Counter, "Engine calls begun, by stage.";
    "pinpod_sidecar_leg_failures_total", Counter, "Engine calls that ended without a usable answer, by stage.";
    "pinpod_sidecar_leg_duration_seconds", Histogram(LAT), "Time from the beginning of an engine call to the last byte of its answer in seconds.";
    "pinpod_sidecar_denied_targets_total", Counter, "Targets in routing headers that are not on the allow-list.";
    "moriio_dns_reresolve_total", Counter, "Look-ups of a host whose address had grown stale.";
    "moriio_dns_ip_changed_total", Counter, "Look-ups that found another address.";
    "moriio_dns_lookup_failures_total", Counter, "Look-ups that found none.";
    "pinpod_sidecar_decode_chunks_total", Counter, "Calls of chunked decode.";
}

/// The legacy name of `name`, if it has one.
pub fn twin_of(name: &str) -> Option<&'static str> {
    TABLE.iter().find(|s| s.name == name).and_then(|s| s.twin)
}
