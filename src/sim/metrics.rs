//! `/metrics` in vLLM's own words, for the families the simulator knows.

use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use super::engine::{EngineConfig, Stats};

/// Content type vLLM answers with.
pub const CONTENT_TYPE: &str = "text/plain; version=1.0.0; charset=utf-8";

/// The exposition of one engine.
pub fn render(stats: &Stats, config: &EngineConfig, model: &str, started: SystemTime) -> String {
    let mut page = Page {
        text: String::with_capacity(4096),
        model,
        created: seconds(started),
    };
    let totals = &stats.totals;
    page.gauge(
        "num_requests_running",
        "Number of requests in model execution batches.",
        stats.running as f64,
    );
    page.gauge(
        "num_requests_waiting",
        "Number of requests waiting to be processed.",
        stats.waiting as f64,
    );
    page.gauge(
        "kv_cache_usage_perc",
        "KV-cache usage. 1 means 100 percent usage.",
        stats.kv_usage,
    );
    let queries = "Prefix cache queries, in terms of number of queried tokens.";
    page.counter("prefix_cache_queries", queries, totals.queried_tokens);
    let hits = "Prefix cache hits, in terms of number of cached tokens.";
    page.counter("prefix_cache_hits", hits, totals.hit_tokens);
    page.counter(
        "num_preemptions",
        "Cumulative number of preemption from the engine.",
        totals.preemptions,
    );
    page.counter(
        "prompt_tokens",
        "Number of prefill tokens processed.",
        totals.prompt_tokens,
    );
    page.counter(
        "generation_tokens",
        "Number of generation tokens processed.",
        totals.generation_tokens,
    );
    page.finished(totals.finished, totals.aborted);
    if !stats.running_loras.is_empty() || !stats.waiting_loras.is_empty() {
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

struct Page<'a> {
    text: String,
    model: &'a str,
    created: f64,
}

impl Page<'_> {
    fn head(&mut self, name: &str, help: &str, kind: &str) {
        let _ = write!(
            self.text,
            "# HELP vllm:{name} {help}\n# TYPE vllm:{name} {kind}\n"
        );
    }

    fn sample(&mut self, name: &str, value: f64) {
        let _ = writeln!(
            self.text,
            "vllm:{name}{{engine=\"0\",model_name=\"{}\"}} {value:?}",
            self.model
        );
    }

    fn gauge(&mut self, name: &str, help: &str, value: f64) {
        self.head(name, help, "gauge");
        self.sample(name, value);
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) {
        let (total, created) = (format!("{name}_total"), format!("{name}_created"));
        self.head(&total, help, "counter");
        self.sample(&total, value as f64);
        self.head(&created, help, "gauge");
        self.sample(&created, self.created);
    }

    fn finished(&mut self, by_length: u64, aborted: u64) {
        self.head(
            "request_success_total",
            "Count of successfully processed requests.",
            "counter",
        );
        for (reason, count) in [
            ("stop", 0),
            ("length", by_length),
            ("abort", aborted),
            ("error", 0),
        ] {
            let _ = writeln!(
                self.text,
                "vllm:request_success_total{{engine=\"0\",finished_reason=\"{reason}\",model_name=\"{}\"}} {:?}",
                self.model, count as f64
            );
        }
    }

    fn loras(&mut self, stats: &Stats, max: usize) {
        let join = |names: &std::collections::BTreeSet<String>| {
            names
                .iter()
                .map(String::as_str)
                .collect::<Vec<_>>()
                .join(",")
        };
        self.head(
            "lora_requests_info",
            "Running stats on lora requests.",
            "gauge",
        );
        let _ = writeln!(
            self.text,
            "vllm:lora_requests_info{{max_lora=\"{max}\",running_lora_adapters=\"{}\",waiting_lora_adapters=\"{}\"}} {:?}",
            join(&stats.running_loras),
            join(&stats.waiting_loras),
            seconds(SystemTime::now())
        );
    }

    fn cache_config(&mut self, config: &EngineConfig) {
        self.head(
            "cache_config_info",
            "Information of the LLMEngine CacheConfig",
            "gauge",
        );
        let _ = writeln!(
            self.text,
            "vllm:cache_config_info{{block_size=\"{}\",engine=\"0\",num_gpu_blocks=\"{}\"}} 1.0",
            config.block_tokens, config.blocks
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::Profile;

    const RECORDED: &str = include_str!("../../tests/data/vllm-0.32/metrics/3-under-load-1.txt");

    fn page() -> String {
        let config = EngineConfig {
            profile: Profile::H100_8B,
            time_scale: 1.0,
            blocks: 1024,
            block_tokens: 16,
            max_num_seqs: 1,
            max_num_batched_tokens: 1,
            steps_per_tick: 1,
            max_loras: 2,
        };
        let stats = Stats {
            running: 16,
            waiting: 24,
            running_loras: ["lora-0".to_owned()].into(),
            ..Stats::default()
        };
        render(&stats, &config, "tiny", UNIX_EPOCH)
    }

    /// Label names of a sample line.
    fn label_names(line: &str) -> Vec<&str> {
        let labels = line
            .split_once('{')
            .map_or("", |(_, l)| l.split_once('}').map_or("", |(l, _)| l));
        labels
            .split(',')
            .filter_map(|l| l.split_once('=').map(|(name, _)| name))
            .collect()
    }

    #[test]
    fn heads_are_the_recorded_ones_and_labels_a_subset_in_order() {
        for line in page().lines() {
            if line.starts_with('#') {
                assert!(RECORDED.lines().any(|l| l == line), "{line}");
                continue;
            }
            let name = line.split(['{', ' ']).next().unwrap();
            let recorded = RECORDED
                .lines()
                .find(|l| l.starts_with(&format!("{name}{{")))
                .unwrap();
            let (ours, theirs) = (label_names(line), label_names(recorded));
            if name == "vllm:cache_config_info" {
                assert!(ours.iter().all(|l| theirs.contains(l)), "{line}");
            } else if name != "vllm:lora_requests_info" {
                assert_eq!(ours, theirs, "{line}");
            }
        }
    }

    #[test]
    fn values_are_written_as_vllm_writes_them() {
        assert!(
            page().contains("vllm:num_requests_running{engine=\"0\",model_name=\"tiny\"} 16.0\n")
        );
        assert!(page().contains("running_lora_adapters=\"lora-0\""));
    }
}
