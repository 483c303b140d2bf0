//! The source tree keeps its own rules: who may use whom.

use std::path::{Path, PathBuf};

/// Rooms and the rooms they may use; `telemetry` is open to all but `sim` needs nothing.
const MAY_USE: &[(&str, &[&str])] = &[
    ("telemetry", &[]),
    ("plugin", &["telemetry"]),
    ("request", &["plugin", "telemetry"]),
    ("datalayer", &["plugin", "telemetry"]),
    ("kvcache", &["request", "datalayer", "plugin", "telemetry"]),
    ("response", &["plugin", "request", "datalayer", "telemetry"]),
    (
        "scheduling",
        &["plugin", "request", "datalayer", "telemetry"],
    ),
    (
        "control",
        &[
            "scheduling",
            "response",
            "kvcache",
            "request",
            "datalayer",
            "plugin",
            "telemetry",
        ],
    ),
    (
        "kubernetes",
        &["control", "datalayer", "plugin", "request", "telemetry"],
    ),
    ("extproc", &["control", "request", "response", "telemetry"]),
    (
        "config",
        &[
            "control",
            "kvcache",
            "response",
            "scheduling",
            "request",
            "datalayer",
            "plugin",
            "telemetry",
        ],
    ),
    (
        "epp",
        &[
            "config",
            "kubernetes",
            "extproc",
            "control",
            "request",
            "datalayer",
            "plugin",
            "telemetry",
        ],
    ),
    (
        "doctor",
        &["extproc", "kvcache", "kubernetes", "datalayer", "telemetry"],
    ),
    (
        "sidecar",
        &["epp", "request", "datalayer", "plugin", "telemetry"],
    ),
    ("sim", &["telemetry"]),
    ("demo", &["telemetry"]),
];

fn sources(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(sources(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
    files
}

#[test]
fn rooms_use_only_what_they_may() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut violations = Vec::new();
    for (room, allowed) in MAY_USE {
        let files = sources(&src.join(room));
        assert!(!files.is_empty(), "{room} is gone");
        for file in files {
            let text = std::fs::read_to_string(&file).unwrap();
            // Tests may reach further.
            let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
            for used in code.split("crate::").skip(1) {
                let name: String = used
                    .chars()
                    .take_while(|c| c.is_ascii_alphanumeric() || *c == '_')
                    .collect();
                let is_room = MAY_USE.iter().any(|(r, _)| *r == name) || name == "cli";
                if is_room && name != *room && !allowed.contains(&name.as_str()) {
                    violations.push(format!("{} uses {name}", file.display()));
                }
            }
        }
    }
    assert!(violations.is_empty(), "{violations:#?}");
}
