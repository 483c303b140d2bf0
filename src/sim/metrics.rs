//! `/metrics` as vLLM 0.32 writes it: every `vllm:` family, in its order, with its help and labels.
//!
//! What the simulator does not have (external caches, images, sleep) stays at the value it has in an
//! engine that does not use it. Durations are those of the simulated engine, whatever its time scale.
//! The families of the Python process and of the web framework are left out.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use super::engine::{EngineConfig, Stats};
use super::totals::Histogram;
use super::transfer::Role;

/// Content type vLLM answers with.
pub const CONTENT_TYPE: &str = "text/plain; version=1.0.0; charset=utf-8";

/// The exposition of one engine; `loras` says whether it serves adapters.
pub fn render(
    stats: &Stats,
    config: &EngineConfig,
    model: &str,
    loras: bool,
    started: SystemTime,
) -> String {
    let mut page = Page {
        text: String::with_capacity(32 << 10),
        model,
        created: seconds(started),
    };
    if config.kv_role.is_some() {
        page.transfers(stats);
    }
    page.estimates();
    // vLLM leaves these out where nothing is ever pulled.
    let pulls = matches!(config.kv_role, Some(Role::Decode | Role::Both));
    page.load(stats, pulls);
    page.caches(stats);
    page.tokens(stats);
    page.requests(stats);
    page.histograms(stats);
    if loras {
        page.loras(stats, config.max_loras);
    }
    page.cache_config(config);
    page.text
}

fn seconds(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs_f64()
}

/// A number as the Python client writes it: always with a point, exponents from a million on.
fn number(value: f64) -> String {
    let plain = format!("{value:?}");
    let point = plain.find('.').filter(|point| *point > 6);
    match point.and_then(|point| plain.split_at_checked(point)) {
        Some((whole, fraction)) if value > 0.0 => {
            let digits = format!("{whole}{}", fraction.trim_start_matches('.'));
            let (first, rest) = digits.split_at(1);
            let mantissa = format!("{first}.{rest}");
            let mantissa = mantissa.trim_end_matches('0').trim_end_matches('.');
            format!("{mantissa}e+{:02}", whole.len() - 1)
        }
        _ => plain,
    }
}

struct Page<'a> {
    text: String,
    model: &'a str,
    created: f64,
}

impl Page<'_> {
    fn transfers(&mut self, stats: &Stats) {
        let (totals, o) = (&stats.totals, &stats.totals.observed);
        let of = "NIXL KV Cache transfers.";
        let text = format!("Histogram of transfer duration for {of}");
        self.histogram("nixl_xfer_time_seconds", &text, &o.transfer);
        let text = format!("Histogram of transfer post time for {of}");
        self.histogram("nixl_post_time_seconds", &text, &o.transfer_post);
        let text = format!("Histogram of bytes transferred per {of}");
        self.histogram("nixl_bytes_transferred", &text, &o.transfer_bytes);
        // With vLLM's two blanks.
        let text = "Histogram of number of descriptors per NIXL  KV Cache transfers.";
        self.histogram("nixl_num_descriptors", text, &o.transfer_descriptors);
        let text = "Number of failed NIXL KV Cache transfers, including handshake and notification failures. \
                    NOTE: KV expiry is tracked separately in vllm:nixl_num_kv_expired_reqs.";
        self.counter("nixl_num_failed_transfers", text, totals.failed_pulls);
        // Here the notification is the end of the transfer and fails with it.
        let text = "Number of failed NIXL KV Cache notifications. Retained for compatibility; these failures are \
                    also included in vllm:nixl_num_failed_transfers.";
        self.counter("nixl_num_failed_notifications", text, 0);
        let text = "Number of requests that had their KV expire. NOTE: This metric is tracked on the P instance.";
        self.counter("nixl_num_kv_expired_reqs", text, totals.expired);
        let text = "Number of completion notifications for requests that were no longer tracked, usually because \
                    their KV lease expired. The KV blocks may have been reused before the transfer finished. \
                    Counted per notification (one per remote rank), not per request.";
        let late = totals.late_notifications;
        self.counter("nixl_num_notifications_after_expiry", text, late);
    }

    fn estimates(&mut self) {
        let of = "(for Model Flops Utilization calculations).";
        let text = format!("Estimated number of floating point operations per GPU {of}");
        self.counter("estimated_flops_per_gpu", &text, 0);
        let text = format!("Estimated number of bytes read from memory per GPU {of}");
        self.counter("estimated_read_bytes_per_gpu", &text, 0);
        let text = format!("Estimated number of bytes written to memory per GPU {of}");
        self.counter("estimated_write_bytes_per_gpu", &text, 0);
    }

    fn load(&mut self, stats: &Stats, pulls: bool) {
        let text = "Number of requests in model execution batches.";
        self.gauge("num_requests_running", text, stats.running as f64);
        let text = "Number of requests waiting to be processed.";
        self.gauge("num_requests_waiting", text, stats.waiting as f64);
        let text = "Number of waiting requests by reason. Reason labels: 'capacity' = waiting for scheduling \
                    capacity; 'deferred' = deferred by transient constraints (LoRA budget, KV transfer, blocked \
                    status). Sum of all reasons equals vllm:num_requests_waiting.";
        let name = "num_requests_waiting_by_reason";
        self.head(name, text, "gauge");
        let capacity = stats.waiting.saturating_sub(stats.deferred);
        for (reason, count) in [("capacity", capacity), ("deferred", stats.deferred)] {
            self.sample(name, "", &format!(",reason=\"{reason}\""), count as f64);
        }
        if pulls {
            self.fetches(stats);
        }
        let text = "Engine sleep state; awake = 0 means engine is sleeping; awake = 1 means engine is awake; \
                    weights_offloaded = 1 means sleep level 1; discard_all = 1 means sleep level 2.";
        self.head("engine_sleep_state", text, "gauge");
        for (state, value) in [
            ("awake", 1.0),
            ("weights_offloaded", 0.0),
            ("discard_all", 0.0),
        ] {
            let label = format!(",sleep_state=\"{state}\"");
            self.sample("engine_sleep_state", "", &label, value);
        }
        let text = "KV-cache usage. 1 means 100 percent usage.";
        self.gauge("kv_cache_usage_perc", text, stats.kv_usage);
    }

    /// A pull begins with its request, so none waits to start.
    fn fetches(&mut self, stats: &Stats) {
        let text = "Number of waiting requests by async KV load stage. Stage labels: 'waiting_to_start' = needs \
                    an async KV load that has not started; 'in_progress' = load started and not yet reported \
                    finished; 'completed_waiting' = load finished, request not running yet.";
        let name = "num_requests_kv_fetch_by_stage";
        self.head(name, text, "gauge");
        for (stage, count) in [
            ("waiting_to_start", 0),
            ("in_progress", stats.pulling),
            ("completed_waiting", stats.pulled),
        ] {
            self.sample(name, "", &format!(",stage=\"{stage}\""), count as f64);
        }
    }

    fn caches(&mut self, stats: &Stats) {
        let totals = &stats.totals;
        let text = "Prefix cache queries, in terms of number of queried tokens.";
        self.counter("prefix_cache_queries", text, totals.queried_tokens);
        let text = "Prefix cache hits, in terms of number of cached tokens.";
        self.counter("prefix_cache_hits", text, totals.hit_tokens);
        let from = "from KV connector cross-instance cache sharing, in terms of number of";
        let text = format!("External prefix cache queries {from} queried tokens.");
        self.counter(
            "external_prefix_cache_queries",
            &text,
            totals.external_queried_tokens,
        );
        let text = format!("External prefix cache hits {from} cached tokens.");
        self.counter(
            "external_prefix_cache_hits",
            &text,
            totals.external_hit_tokens,
        );
        let text = "Multi-modal cache queries, in terms of number of queried items.";
        self.counter("mm_cache_queries", text, 0);
        let text = "Multi-modal cache hits, in terms of number of cached items.";
        self.counter("mm_cache_hits", text, 0);
        let text = "Cumulative number of preemption from the engine.";
        self.counter("num_preemptions", text, totals.preemptions);
    }

    fn tokens(&mut self, stats: &Stats) {
        let totals = &stats.totals;
        let text = "Number of prefill tokens processed.";
        self.counter("prompt_tokens", text, totals.prompt_tokens);
        let (local, pulled) = (totals.cached_prompt_tokens, totals.pulled_prompt_tokens);
        let cached = local + pulled;
        let sources = [
            ("local_compute", totals.prompt_tokens.saturating_sub(cached)),
            ("local_cache_hit", local),
            ("external_kv_transfer", pulled),
        ];
        let text = "Number of prompt tokens by source.";
        self.counters("prompt_tokens_by_source", text, "source", &sources);
        let text = "Number of cached prompt tokens (local + external).";
        self.counter("prompt_tokens_cached", text, cached);
        let tiers = [
            ("device", totals.hit_tokens),
            ("host", 0),
            ("p2p", totals.external_hit_tokens),
            ("disk", 0),
            ("external_unspecified", 0),
        ];
        let text = "Prefix-cache hit tokens by the cache tier that supplied them: device (local HBM), host \
                    (offloaded to DRAM), disk, p2p (transferred from another vLLM instance) or \
                    external_unspecified. Counted at admission; sums to vllm:prefix_cache_hits + \
                    vllm:external_prefix_cache_hits.";
        self.counters("prompt_tokens_cached_by_source", text, "source", &tiers);
        let text = "Number of generation tokens processed.";
        self.counter("generation_tokens", text, totals.generation_tokens);
    }

    fn requests(&mut self, stats: &Stats) {
        let reasons = [
            ("stop", 0),
            ("length", stats.totals.finished),
            ("abort", stats.totals.aborted),
            ("error", 0),
            ("repetition", 0),
        ];
        let text = "Count of successfully processed requests.";
        self.counters("request_success", text, "finished_reason", &reasons);
        let text = "Number of admission attempts rejected by a queue limit, by reason.";
        let (name, model, created) = ("admission_rejections", self.model, number(self.created));
        for (kind, suffix, value) in [("counter", "total", "0.0"), ("gauge", "created", &created)] {
            self.head(&format!("{name}_{suffix}"), text, kind);
            for reason in ["max_num_queued_reqs", "max_num_queued_tokens"] {
                let _ = writeln!(
                    self.text,
                    "vllm:{name}_{suffix}{{model_name=\"{model}\",reason=\"{reason}\"}} {value}"
                );
            }
        }
    }

    fn histograms(&mut self, stats: &Stats) {
        let o = &stats.totals.observed;
        let of = "Histogram of time spent in";
        let phase = |phase: &str| format!("{of} {phase} phase for request.");
        let all: [(&str, &str, &Histogram); 15] = [
            (
                "request_prompt_tokens",
                "Number of prefill tokens processed.",
                &o.prompt_tokens,
            ),
            (
                "request_generation_tokens",
                "Number of generation tokens processed.",
                &o.generation_tokens,
            ),
            (
                "iteration_tokens_total",
                "Histogram of number of tokens per engine_step.",
                &o.step_tokens,
            ),
            (
                "request_max_num_generation_tokens",
                "Histogram of maximum number of requested generation tokens.",
                &o.max_tokens,
            ),
            (
                "request_params_n",
                "Histogram of the n request parameter.",
                &o.completions,
            ),
            (
                "request_params_max_tokens",
                "Histogram of the max_tokens request parameter.",
                &o.max_tokens,
            ),
            (
                "time_to_first_token_seconds",
                "Histogram of time to first token in seconds.",
                &o.ttft,
            ),
            (
                "inter_token_latency_seconds",
                "Histogram of inter-token latency in seconds.",
                &o.between_tokens,
            ),
            (
                "request_time_per_output_token_seconds",
                "Histogram of time_per_output_token_seconds per request.",
                &o.per_output_token,
            ),
            (
                "e2e_request_latency_seconds",
                "Histogram of e2e request latency in seconds.",
                &o.end_to_end,
            ),
            ("request_queue_time_seconds", &phase("WAITING"), &o.queue),
            (
                "request_inference_time_seconds",
                &phase("RUNNING"),
                &o.inference,
            ),
            (
                "request_prefill_time_seconds",
                &phase("PREFILL"),
                &o.prefill,
            ),
            ("request_decode_time_seconds", &phase("DECODE"), &o.decode),
            (
                "request_num_preemptions",
                "Histogram of the number of times a request was preempted.",
                &o.preemptions,
            ),
        ];
        for (name, text, histogram) in all {
            self.histogram(name, text, histogram);
        }
        let text = "Histogram of new KV tokens computed during prefill (excluding cached tokens).";
        let histogram = &o.computed_prompt_tokens;
        self.histogram("request_prefill_kv_computed_tokens", text, histogram);
    }

    fn head(&mut self, name: &str, help: &str, kind: &str) {
        let _ = write!(
            self.text,
            "# HELP vllm:{name} {help}\n# TYPE vllm:{name} {kind}\n"
        );
    }

    /// A sample with labels that sort before `model_name`, and behind it.
    fn sample(&mut self, name: &str, before: &str, behind: &str, value: f64) {
        let _ = writeln!(
            self.text,
            "vllm:{name}{{engine=\"0\"{before},model_name=\"{}\"{behind}}} {}",
            self.model,
            number(value)
        );
    }

    fn gauge(&mut self, name: &str, help: &str, value: f64) {
        self.head(name, help, "gauge");
        self.sample(name, "", "", value);
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) {
        let (total, created) = (format!("{name}_total"), format!("{name}_created"));
        self.head(&total, help, "counter");
        self.sample(&total, "", "", value as f64);
        self.head(&created, help, "gauge");
        self.sample(&created, "", "", self.created);
    }

    /// A counter with one more label.
    fn counters(&mut self, name: &str, help: &str, label: &str, values: &[(&str, u64)]) {
        for (kind, suffix) in [("counter", "total"), ("gauge", "created")] {
            let series = format!("{name}_{suffix}");
            self.head(&series, help, kind);
            for (value, count) in values {
                let pair = format!(",{label}=\"{value}\"");
                // Labels are in alphabetical order.
                let (before, behind) = if label < "model_name" {
                    (pair.as_str(), "")
                } else {
                    ("", pair.as_str())
                };
                let count = if kind == "counter" {
                    *count as f64
                } else {
                    self.created
                };
                self.sample(&series, before, behind, count);
            }
        }
    }

    fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) {
        self.head(name, help, "histogram");
        let bucket = format!("{name}_bucket");
        for (bound, count) in histogram.cumulative() {
            let bound = if bound.is_finite() {
                number(bound)
            } else {
                "+Inf".to_owned()
            };
            self.sample(&bucket, &format!(",le=\"{bound}\""), "", count as f64);
        }
        self.sample(&format!("{name}_count"), "", "", histogram.count() as f64);
        self.sample(&format!("{name}_sum"), "", "", histogram.sum());
        let created = format!("{name}_created");
        self.head(&created, help, "gauge");
        self.sample(&created, "", "", self.created);
    }

    /// vLLM leaves a series for each combination there ever was, with the time it was last current:
    /// the one with the largest value is the valid one. Here the idle state of the start stays.
    fn loras(&mut self, stats: &Stats, max: usize) {
        let join = |names: &BTreeSet<String>| {
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            names.join(",")
        };
        let current = (join(&stats.running_loras), join(&stats.waiting_loras));
        let idle = (String::new(), String::new());
        let text = "Running stats on lora requests.";
        self.head("lora_requests_info", text, "gauge");
        let mut series = vec![(current.clone(), seconds(SystemTime::now()))];
        if current != idle {
            series.insert(0, (idle, self.created));
        }
        for ((running, waiting), time) in series {
            let _ = writeln!(
                self.text,
                "vllm:lora_requests_info{{max_lora=\"{max}\",running_lora_adapters=\"{running}\",waiting_lora_adapters=\"{waiting}\"}} {}",
                number(time)
            );
        }
    }

    fn cache_config(&mut self, config: &EngineConfig) {
        let text = "Information of the LLMEngine CacheConfig";
        self.head("cache_config_info", text, "gauge");
        let block = config.block_tokens;
        let tokens = config.blocks * block;
        let concurrency = tokens as f64 / config.max_model_len.max(1) as f64;
        let _ = writeln!(
            self.text,
            "vllm:cache_config_info{{_block_size_resolved=\"True\",block_size=\"{block}\",cache_dtype=\"auto\",cache_hit_alignment_tokens=\"None\",effective_attention_block_size=\"{block}\",enable_mamba_shared_prefix_checkpoint=\"False\",enable_prefix_caching=\"True\",engine=\"0\",gpu_memory_utilization=\"0.92\",hash_block_size=\"None\",is_attention_free=\"False\",kv_cache_dtype_skip_layers=\"[]\",kv_cache_layout=\"None\",kv_cache_max_concurrency=\"{concurrency:?}\",kv_cache_memory_bytes=\"None\",kv_cache_size_tokens=\"{tokens}\",kv_offloading_backend=\"native\",kv_offloading_size=\"None\",kv_sharing_fast_prefill=\"False\",mamba_block_size=\"None\",mamba_cache_dtype=\"auto\",mamba_cache_mode=\"none\",mamba_page_size_padded=\"None\",mamba_ssm_cache_dtype=\"auto\",num_cpu_blocks=\"None\",num_gpu_blocks=\"{}\",num_gpu_blocks_override=\"None\",prefix_cache_retention_interval=\"0\",prefix_caching_hash_algo=\"sha256\",prefix_match_unit=\"None\",replayssm_buffer_len=\"16\",skip_page_size_padded=\"None\",sliding_window=\"None\",swa_bounded_replay=\"True\",use_kda_recoverssm=\"False\",use_replayssm=\"False\",user_specified_block_size=\"True\"}} 1.0",
            config.blocks
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::Profile;
    use crate::sim::totals::Totals;

    const RECORDED: &str = include_str!("../../tests/data/vllm-0.32/metrics/3-under-load-1.txt");
    const RECORDED_DECODE: &str = include_str!("../../tests/data/vllm-0.32/pd/metrics-decode.txt");
    const RECORDED_PREFILL: &str =
        include_str!("../../tests/data/vllm-0.32/pd/metrics-prefill.txt");

    /// The recorded engine: 1,024 blocks of 16, context 8,192, two adapters in use and waited for.
    fn page() -> String {
        let mut totals = Totals::new(8192);
        totals.generation_tokens = 1_234_567;
        page_of(
            totals,
            ["lora-0".to_owned(), "lora-1".to_owned()].into(),
            None,
        )
    }

    fn page_of(totals: Totals, loras: BTreeSet<String>, kv_role: Option<Role>) -> String {
        let config = EngineConfig {
            profile: Profile::H100_8B,
            time_scale: 1.0,
            blocks: 1024,
            block_tokens: 16,
            max_num_seqs: 1,
            max_num_batched_tokens: 1,
            steps_per_tick: 1,
            max_loras: 2,
            max_model_len: 8192,
            kv_role,
        };
        let stats = Stats {
            running: 16,
            waiting: 24,
            deferred: 3,
            pulling: 2,
            pulled: 1,
            kv_usage: 0.25,
            held_blocks: 0,
            kept: 0,
            totals,
            running_loras: loras.clone(),
            waiting_loras: loras,
        };
        render(&stats, &config, "tiny", true, UNIX_EPOCH)
    }

    /// Families and series without their values, `vllm:` ones only.
    fn shape(page: &str) -> Vec<&str> {
        let mut shape = Vec::new();
        for line in page.lines().filter(|line| line.contains("vllm:")) {
            let series = line.rsplit_once(' ').map_or(line, |(series, _)| series);
            shape.push(if line.starts_with('#') { line } else { series });
        }
        shape
    }

    #[test]
    fn families_series_labels_and_bounds_are_the_recorded_ones_in_their_order() {
        assert_same_shape(&page(), RECORDED);
        for (role, recorded) in [
            (Role::Prefill, RECORDED_PREFILL),
            (Role::Decode, RECORDED_DECODE),
        ] {
            let page = page_of(Totals::new(8192), BTreeSet::new(), Some(role));
            assert_same_shape(&page, recorded);
        }
    }

    fn assert_same_shape(page: &str, recorded: &str) {
        let info = |line: &&str| line.starts_with("vllm:cache_config_info");
        let (ours, theirs) = (shape(page), shape(recorded));
        for (our, their) in ours.iter().zip(&theirs) {
            if !info(our) {
                assert_eq!(our, their);
            }
        }
        assert_eq!(ours.len(), theirs.len());
        // The configuration differs in values only.
        let names = |lines: &[&str]| -> Vec<String> {
            let line = lines.iter().find(|line| info(line)).unwrap();
            line.split("\",")
                .map(|pair| pair.split('=').next().unwrap().to_owned())
                .collect()
        };
        assert_eq!(names(&ours), names(&theirs));
    }

    #[test]
    fn transfers_are_counted_where_vllm_counts_them() {
        let mut totals = Totals::new(8192);
        totals.failed_pulls = 3;
        totals.expired = 4;
        totals.late_notifications = 5;
        // Recorded sums: 61 blocks of 8 KiB in eight transfers, two of them of one block.
        let observed = &mut totals.observed;
        observed.transfer_bytes.observe(8192.0, 2);
        observed.transfer_bytes.observe(10.0 * 8192.0, 5);
        observed.transfer_bytes.observe(9.0 * 8192.0, 1);
        observed.transfer.observe(0.02, 8);
        observed.transfer_descriptors.observe(11.0, 8);
        let page = page_of(totals, BTreeSet::new(), Some(Role::Decode));
        let bytes: Vec<&str> = RECORDED_DECODE
            .lines()
            .filter(|l| l.starts_with("vllm:nixl_bytes_transferred_") && !l.contains("created"))
            .collect();
        assert_eq!(bytes.len(), 15);
        for line in bytes {
            assert!(page.contains(line), "{line}");
        }
        for line in [
            "vllm:nixl_xfer_time_seconds_bucket{engine=\"0\",le=\"0.025\",model_name=\"tiny\"} 8.0\n",
            "vllm:nixl_xfer_time_seconds_sum{engine=\"0\",model_name=\"tiny\"} 0.16\n",
            "vllm:nixl_num_descriptors_sum{engine=\"0\",model_name=\"tiny\"} 88.0\n",
            "vllm:nixl_num_failed_transfers_total{engine=\"0\",model_name=\"tiny\"} 3.0\n",
            "vllm:nixl_num_kv_expired_reqs_total{engine=\"0\",model_name=\"tiny\"} 4.0\n",
            "vllm:nixl_num_notifications_after_expiry_total{engine=\"0\",model_name=\"tiny\"} 5.0\n",
            "vllm:num_requests_kv_fetch_by_stage{engine=\"0\",model_name=\"tiny\",stage=\"in_progress\"} 2.0\n",
            "vllm:num_requests_kv_fetch_by_stage{engine=\"0\",model_name=\"tiny\",stage=\"completed_waiting\"} 1.0\n",
        ] {
            assert!(page.contains(line), "{line}");
        }
    }

    #[test]
    fn values_are_written_as_vllm_writes_them() {
        let page = page();
        for line in [
            "vllm:num_requests_running{engine=\"0\",model_name=\"tiny\"} 16.0\n",
            "vllm:num_requests_waiting_by_reason{engine=\"0\",model_name=\"tiny\",reason=\"capacity\"} 21.0\n",
            "vllm:generation_tokens_total{engine=\"0\",model_name=\"tiny\"} 1.234567e+06\n",
            "block_size=\"16\"",
            "num_gpu_blocks=\"1024\"",
            "kv_cache_size_tokens=\"16384\"",
        ] {
            assert!(page.contains(line), "{line}");
        }
        // Recorded: 976 MB resident, a start time, a usage.
        assert_eq!(number(975_986_688.0), "9.75986688e+08");
        assert_eq!(number(1_795_345_971.010_857_8), "1.7953459710108578e+09");
        assert_eq!(number(0.248_289_345_063_538_6), "0.2482893450635386");
        assert_eq!(
            (number(999_999.0), number(1e6)),
            ("999999.0".to_owned(), "1e+06".to_owned())
        );
    }
}
