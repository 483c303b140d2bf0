//! The commands, as processes.

use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use pinpod::demo::processes::Picker;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const HEAD: &str = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n";

pub(super) fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_pinpod"))
}

pub(super) fn run(arguments: &[&str]) -> Output {
    Command::new(program()).args(arguments).output().unwrap()
}

pub(super) fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn check_config_prints_the_document_and_warns_beside_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.yaml");
    let file = path.to_str().unwrap();
    let body = "plugins:\n- {type: tokenizer}\n- {type: queue-scorer, parameters: {x: 1}}\n- {type: prefix-cache-scorer}\n";
    std::fs::write(&path, format!("{HEAD}{body}")).unwrap();
    let output = run(&["check-config", file]);
    assert_eq!(output.status.code(), Some(0));
    let (shown, warned) = (text(&output.stdout), text(&output.stderr));
    let plugins = "apiVersion: llm-d.ai/v1alpha1\n\
        kind: EndpointPickerConfig\n\
        plugins:\n\
        - name: tokenizer\n\
        \u{20} type: tokenizer\n\
        - name: queue-scorer\n\
        \u{20} type: queue-scorer\n\
        - name: prefix-cache-scorer\n\
        \u{20} type: prefix-cache-scorer\n\
        \u{20} parameters:\n\
        \u{20}   prefixMatchInfoProducerName: approx-prefix-cache-producer\n\
        \u{20}   matchLengthWeight: 0.0\n\
        \u{20}   matchLengthScaleTokens: 8192.0\n\
        # added: there is no picker\n\
        - name: max-score-picker\n";
    assert!(shown.starts_with(plugins), "{shown}");
    for line in [
        "# added: prefix-cache-scorer needs PrefixCacheMatchInfoDataKey/approx-prefix-cache-producer\n- name: approx-prefix-cache-producer\n",
        "schedulingProfiles:\n- name: default\n  plugins:\n  - pluginRef: queue-scorer\n    weight: 1\n  - pluginRef: prefix-cache-scorer\n    weight: 1\n  - pluginRef: max-score-picker\n",
        "dataLayer:\n  injectDefaults: false\n  sources:\n  - pluginRef: metrics-data-source\n    extractors:\n    - pluginRef: core-metrics-extractor\n",
        "# Producers, in the order they run: tokenizer, token-producer, approx-prefix-cache-producer, inflight-load-producer\n",
        "#   PrefixCacheMatchInfoDataKey/approx-prefix-cache-producer: made by approx-prefix-cache-producer; required by prefix-cache-scorer; read when present by inflight-load-producer\n",
    ] {
        assert!(shown.contains(line), "{line}\n{shown}");
    }
    let warnings = [
        format!(
            "warning: {file}: line 4: plugins[0].type: DEPRECATION warning: plugin is deprecated: type 'tokenizer', use token-producer\n"
        ),
        format!(
            "warning: {file}: line 5: plugins[1].parameters: type queue-scorer ignores its parameters\n"
        ),
        format!("warning: {file}: line 4: plugins[0]: nobody reads what 'tokenizer' produces"),
    ];
    assert!(warnings.iter().all(|w| warned.contains(w)), "{warned}");
}

#[test]
fn check_config_fails_with_file_line_and_field() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.yaml");
    let file = path.to_str().unwrap();
    std::fs::write(&path, format!("{HEAD}plugins:\n- type: nobody\n")).unwrap();
    let output = run(&["check-config", file]);
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty());
    assert_eq!(
        text(&output.stderr),
        format!("error: {file}: line 4: plugins[0].type: plugin type 'nobody' is not registered\n")
    );
    let gone = directory.path().join("gone");
    assert_eq!(
        run(&["check-config", gone.to_str().unwrap()]).status.code(),
        Some(1)
    );
    assert_eq!(run(&["check-config"]).status.code(), Some(2));
    assert_eq!(
        run(&["check-config", "--nonsense", file]).status.code(),
        Some(2)
    );
    // The limit on files.
    std::fs::write(&path, "#".repeat((1 << 20) + 1)).unwrap();
    let output = run(&["check-config", file]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("more than 1048576 bytes"));
    // Alpha plugins need the flag.
    std::fs::write(
        &path,
        format!("{HEAD}plugins: [{{type: dcgm-data-source}}]\n"),
    )
    .unwrap();
    assert_eq!(run(&["check-config", file]).status.code(), Some(1));
    assert_eq!(
        run(&["check-config", "--allow-experimental-plugins", file])
            .status
            .code(),
        Some(0)
    );
}

async fn metrics(port: u16) -> String {
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port))
        .await
        .unwrap();
    let request = "GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

/// Waits until the exposition has all of these lines.
async fn eventually(port: u16, lines: &[&str]) {
    let mut last = String::new();
    for _ in 0..200 {
        last = metrics(port).await;
        if lines.iter().all(|line| last.lines().any(|l| l == *line)) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let config: Vec<&str> = last.lines().filter(|l| l.contains("config")).collect();
    panic!("{lines:?} do not come: {config:#?}");
}

#[tokio::test]
async fn a_running_process_follows_its_file_and_shows_how_that_goes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.yaml");
    let good = |weight: u32| {
        format!(
            "{HEAD}plugins: [{{type: queue-scorer}}]\nschedulingProfiles: [{{name: p, plugins: [{{pluginRef: queue-scorer, weight: {weight}}}]}}]\n"
        )
    };
    std::fs::write(&path, good(1)).unwrap();
    let flags = [
        format!("--config-file={}", path.display()),
        "--endpoints=127.0.0.1:1".to_owned(),
    ];
    let mut picker = Picker::start(program(), &flags, directory.path())
        .await
        .unwrap();
    let ok = |n: u32| format!("pinpod_config_reloads_total{{result=\"ok\"}} {n}");
    let error = |n: u32| format!("pinpod_config_reloads_total{{result=\"error\"}} {n}");
    let last = |n: u32| format!("pinpod_config_last_reload_success {n}");
    eventually(picker.metrics, &[&ok(0), &error(0), &last(1)]).await;
    std::fs::write(&path, good(2)).unwrap();
    eventually(picker.metrics, &[&ok(1), &error(0), &last(1)]).await;
    std::fs::write(&path, "plugins: [").unwrap();
    eventually(picker.metrics, &[&ok(1), &error(1), &last(0)]).await;
    std::fs::write(&path, good(3)).unwrap();
    eventually(picker.metrics, &[&ok(2), &error(1), &last(1)]).await;
    picker.process.kill();
}
