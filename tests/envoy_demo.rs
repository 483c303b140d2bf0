//! `pinpod demo`: what it measures, and that it leaves nothing behind.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use super::support::{self, eventually, program, send_signal};

/// Longest that a demonstration may take to end once it was told to.
const END_TIME: Duration = Duration::from_secs(20);
/// Longest that a small one may take as a whole, on a busy machine.
const RUN_TIME: Duration = Duration::from_mins(3);

/// A demonstration under way: `pinpod demo` with a process group and a temporary directory of its own.
struct Demonstration {
    child: Child,
    directory: tempfile::TempDir,
    parts: Vec<u32>,
}

impl Demonstration {
    /// Starts one with JSON for output and further flags.
    fn spawn(flags: &[&str]) -> Self {
        use std::os::unix::process::CommandExt;
        let directory = tempfile::tempdir().unwrap();
        let file = |name| std::fs::File::create(directory.path().join(name)).unwrap();
        let scratch = directory.path().join("scratch");
        std::fs::create_dir(&scratch).unwrap();
        let child = Command::new(program())
            .args(["demo", "--json"])
            .args(flags)
            .env("TMPDIR", &scratch)
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(file("stdout"))
            .stderr(file("stderr"))
            .spawn()
            .unwrap();
        Self {
            child,
            directory,
            parts: Vec::new(),
        }
    }

    /// Starts a long one and waits until requests flow through all of its `parts`.
    async fn start(flags: &[&str], parts: usize) -> Self {
        let mut demonstration = Self::spawn(&[&["--ladder=2x600"], flags].concat());
        eventually("requests flow", || async {
            demonstration.requests().await.unwrap_or(0.0) >= 3.0
        })
        .await;
        demonstration.parts = children(demonstration.child.id());
        assert_eq!(demonstration.parts.len(), parts);
        demonstration
    }

    /// Requests that the picker saw.
    async fn requests(&self) -> Option<f64> {
        let port = self.picker().and_then(|pid| flag(pid, "--metrics-port="))?;
        let address = ([127, 0, 0, 1], port.parse().ok()?).into();
        let text = support::get(address, "/metrics").await.ok()?.text();
        let line = text
            .lines()
            .find(|l| l.starts_with("llm_d_epp_request_total"))?;
        line.rsplit_once(' ')?.1.parse().ok()
    }

    fn picker(&self) -> Option<u32> {
        let own = children(self.child.id());
        own.into_iter()
            .find(|pid| flag(*pid, "--metrics-port=").is_some())
    }

    /// Its exit code, and what it wrote to stderr; by then its parts are gone.
    async fn end(mut self, limit: Duration) -> (Option<i32>, String, tempfile::TempDir) {
        let deadline = tokio::time::Instant::now() + limit;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(
                tokio::time::Instant::now() < deadline,
                "the demonstration does not end"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        for part in &self.parts {
            assert!(
                !std::path::Path::new(&format!("/proc/{part}")).exists(),
                "{part} is left"
            );
        }
        let errors = std::fs::read_to_string(self.directory.path().join("stderr")).unwrap();
        assert!(!errors.contains("panicked"), "{errors}");
        let directory = std::mem::replace(&mut self.directory, tempfile::tempdir().unwrap());
        (status.code(), errors, directory)
    }
}

impl Drop for Demonstration {
    /// A test that failed leaves nothing running either.
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            send_signal("KILL", &format!("-{}", self.child.id()));
            let _ = self.child.wait();
        }
    }
}

/// Processes whose parent is `parent`.
fn children(parent: u32) -> Vec<u32> {
    let is_child = |pid: &u32| {
        // "pid (name) state ppid ..."; the name may hold anything.
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        fields.split_whitespace().nth(1) == Some(&parent.to_string())
    };
    std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(is_child)
        .collect()
}

/// The value of a flag on the command line of `pid`.
fn flag(pid: u32, name: &str) -> Option<String> {
    let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).ok()?;
    line.split('\0')
        .find_map(|argument| argument.strip_prefix(name).map(str::to_owned))
}

#[tokio::test]
async fn an_interrupted_demonstration_leaves_nothing_behind() {
    // Ctrl-C reaches the whole group, parts included; an init system signals one process.
    // Pods, picker, Envoy; or both kinds of pods, two sidecars, picker, Envoy.
    let (plain, pd) = ((&[][..], 3), (&["--pd", "--skip-baseline"][..], 6));
    for (signal, to_group, code, (flags, parts)) in [
        ("INT", true, 130, plain),
        ("TERM", false, 143, plain),
        ("INT", true, 130, pd),
    ] {
        let demonstration = Demonstration::start(flags, parts).await;
        let target = demonstration.child.id().to_string();
        let group = if to_group { "-" } else { "" };
        send_signal(signal, &format!("{group}{target}"));
        let (status, errors, directory) = demonstration.end(END_TIME).await;
        assert_eq!(status, Some(code), "{errors}");
        let left = std::fs::read_dir(directory.path().join("scratch")).unwrap();
        assert_eq!(left.count(), 0, "temporary files are gone");
    }
}

#[tokio::test]
async fn a_demonstration_that_loses_a_part_names_its_log() {
    let demonstration = Demonstration::start(&[], 3).await;
    let picker = demonstration.picker().unwrap();
    send_signal("KILL", &picker.to_string());
    let (status, errors, _directory) = demonstration.end(END_TIME).await;
    assert_eq!(status, Some(1), "{errors}");
    assert!(errors.contains("ended early with signal: 9"), "{errors}");
    let log = errors
        .split("its log is ")
        .nth(1)
        .and_then(|rest| rest.split(',').next())
        .unwrap();
    assert!(std::path::Path::new(log).is_file(), "{errors}");
}

#[tokio::test]
async fn prompts_are_computed_apart_where_pods_are_apart() {
    // Twelve requests of 6,000 tokens in, 300 out, to one prefill pod and three behind sidecars.
    let flags = [
        "--pd",
        "--prefill-pods=1",
        "--ladder=4x2,2x2",
        "--time-scale=4",
        "--patience=400",
    ];
    let demonstration = Demonstration::spawn(&flags);
    let (status, errors, directory) = demonstration.end(RUN_TIME).await;
    assert_eq!(status, Some(0), "{errors}");
    let text = std::fs::read_to_string(directory.path().join("stdout")).unwrap();
    let report: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        (&report["pods"], &report["prefill_pods"]),
        (&4.into(), &1.into())
    );
    let [aggregated, apart] = &report["runs"].as_array().unwrap()[..] else {
        panic!("two runs: {text}");
    };
    for (run, name) in [(aggregated, "aggregated"), (apart, "disaggregated")] {
        assert_eq!(run["name"], name);
        assert_eq!(
            (&run["requests"], &run["failed"]),
            (&12.into(), &0.into()),
            "{text}"
        );
        assert_eq!(run["hit_rate"], 0.0, "every prompt is new");
        let rungs = run["rungs"].as_array().unwrap();
        let requests: Vec<&Value> = rungs.iter().map(|rung| &rung["requests"]).collect();
        assert_eq!(requests, [8, 4]);
        // A step takes 14 ms at least, so nobody gets a token sooner on the average.
        for times in ["between_tokens", "per_output_token"] {
            assert!(
                run["flow"][times]["mean"].as_f64().unwrap() >= 0.014,
                "{name} {times}: {run}"
            );
        }
        let p99 = |times: &str| run["flow"][times]["p99"].as_f64().unwrap();
        assert!(p99("longest_pause") >= p99("between_tokens"), "{run}");
        // 6,000 tokens of 65 us come before the first.
        assert!(run["ttft"]["p50"].as_f64().unwrap() > 0.39, "{name}: {run}");
        assert!(run["output_tokens_per_second"].as_f64().unwrap() > 0.0);
    }
    let handover = |run: &Value| {
        let handover = &run["handover"];
        let count = |name: &str| handover[name].as_u64().unwrap();
        (
            count("apart"),
            count("local"),
            handover["bytes"].as_f64().unwrap(),
        )
    };
    assert_eq!(handover(aggregated), (0, 12, 0.0));
    assert_eq!(aggregated["prefill_spread"], Value::Null);
    // 375 blocks of 16 tokens of 256 KiB each.
    let bytes = 12.0 * 6000.0 * 262_144.0;
    assert_eq!(handover(apart), (12, 0, bytes));
    // 1.57 GB at 25 GB/s.
    assert!(apart["handover"]["seconds"].as_f64().unwrap() >= 0.0629);
    let prefilled = &apart["prefill_spread"];
    assert_eq!(
        (&prefilled["least"], &prefilled["most"]),
        (&12.into(), &12.into())
    );
}

#[test]
fn what_cannot_go_together_is_bad_usage() {
    for flags in [
        &["--pd", "--full"][..],
        &["--pd", "--continuous"],
        &["--prefill-pods=1"],
        &["--pd", "--prefill-pods=4"],
        &["--pd", "--prefill-pods=0"],
    ] {
        let output = Command::new(program())
            .arg("demo")
            .args(flags)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(2), "{flags:?}");
    }
}
