//! `file-discovery`: endpoints from a file that may change while we run.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use tokio_util::sync::CancellationToken;

use crate::datalayer::{EndpointDetails, EndpointSpec, EndpointStore};
use crate::plugin::{Build, Maturity, ParamDoc, ParamError, Plugin, PluginError};

/// Longest file that is read.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// How often the file is looked at. Reading it again finds any kind of change: a write, a rename over
/// it, or the symlink swap of a Kubernetes ConfigMap.
const WATCH_INTERVAL: Duration = Duration::from_millis(250);

/// Endpoints from a YAML or JSON file.
#[derive(Debug)]
pub struct FileDiscovery {
    path: PathBuf,
    watch: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    path: String,
    watch_file: bool,
}

impl Plugin for FileDiscovery {
    const TYPE: &'static str = "file-discovery";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[
        ParamDoc {
            name: "path",
            kind: "string",
            default: "required",
            help: "YAML or JSON file of at most 1 MiB.",
        },
        ParamDoc {
            name: "watchFile",
            kind: "bool",
            default: "false",
            help: "Follow changes of the file.",
        },
    ];
    const ABOUT: &'static str = "Reads endpoints from a file.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<Self, _>()?;
        if settings.path.is_empty() {
            return Err(ParamError("path: is required".to_owned()).into());
        }
        Ok(Self {
            path: settings.path.into(),
            watch: settings.watch_file,
        })
    }
}

/// The file; unknown keys are ignored, as in the reference.
#[derive(Debug, Deserialize)]
struct File {
    endpoints: Option<Vec<Entry>>,
}

#[derive(Debug, Deserialize)]
struct Entry {
    #[serde(default)]
    name: String,
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    address: String,
    #[serde(default)]
    port: String,
    #[serde(default)]
    labels: BTreeMap<String, String>,
}

impl FileDiscovery {
    /// Loads the file for the first time; any problem is an error.
    pub fn load(&self, store: &EndpointStore) -> Result<(), String> {
        let text = self.read()?;
        let (endpoints, problems) = parse(&text)?;
        if !problems.is_empty() {
            return Err(format!("{}: {}", self.path.display(), problems.join("; ")));
        }
        store.replace(endpoints);
        Ok(())
    }

    /// Follows the file until `shutdown`; returns at once when it is not to be watched. A file that
    /// cannot be read or decoded keeps the last good set; of one with bad entries the good ones count.
    pub async fn watch(&self, store: &EndpointStore, shutdown: CancellationToken) {
        if !self.watch {
            return;
        }
        let mut seen = self.read();
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(WATCH_INTERVAL) => {}
            }
            let now = self.read();
            if now == seen {
                continue;
            }
            let problem = match now.as_deref().map_err(Clone::clone).and_then(parse) {
                Ok((endpoints, problems)) => {
                    tracing::info!(endpoints = endpoints.len(), "endpoint file reloaded");
                    store.replace(endpoints);
                    problems.join("; ")
                }
                Err(problem) => problem,
            };
            if !problem.is_empty() {
                metrics::counter!("pinpod_discovery_reload_failures_total").increment(1);
                tracing::warn!(path = %self.path.display(), problem, "endpoint file has problems");
            }
            seen = now;
        }
    }

    fn read(&self) -> Result<String, String> {
        let fail = |error: std::io::Error| format!("{}: {error}", self.path.display());
        let length = std::fs::metadata(&self.path).map_err(fail)?.len();
        if length > MAX_FILE_BYTES {
            return Err(format!(
                "{}: {length} bytes, at most {MAX_FILE_BYTES}",
                self.path.display()
            ));
        }
        std::fs::read_to_string(&self.path).map_err(fail)
    }
}

/// Valid endpoints and what is wrong with the others. A file without an `endpoints` list is an error,
/// so that one caught half written does not empty the pool.
fn parse(text: &str) -> Result<(Vec<EndpointSpec>, Vec<String>), String> {
    let file: File = serde_saphyr::from_str(text).map_err(|error| error.to_string())?;
    let entries = file.endpoints.ok_or("there is no endpoints list")?;
    let mut endpoints = Vec::new();
    let mut problems = Vec::new();
    for (position, entry) in entries.into_iter().enumerate() {
        match entry.endpoint() {
            Ok(endpoint) => endpoints.push(endpoint),
            Err(problem) => problems.push(format!("endpoints[{position}]: {problem}")),
        }
    }
    Ok((endpoints, problems))
}

impl Entry {
    fn endpoint(self) -> Result<EndpointSpec, String> {
        if self.name.is_empty() {
            return Err("name is required".to_owned());
        }
        let ip: IpAddr = self
            .address
            .parse()
            .map_err(|_| format!("address {:?} is not an IP address", self.address))?;
        let port: u16 = self
            .port
            .parse()
            .ok()
            .filter(|p| *p > 0)
            .ok_or_else(|| format!("port {:?} is not within 1 and 65535", self.port))?;
        Ok(EndpointSpec {
            name: self.name,
            namespace: if self.namespace.is_empty() {
                "default".to_owned()
            } else {
                self.namespace
            },
            address: SocketAddr::new(ip, port),
            labels: self.labels,
            rank: 0,
            details: EndpointDetails::default(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    const ONE: &str =
        "endpoints:\n- {name: a, address: 10.0.0.1, port: \"8000\", labels: {x: y}, extra: 1}\n";
    const TWO: &str = r#"{"endpoints": [{"name": "a", "address": "10.0.0.1", "port": "8000"}, {"name": "b", "namespace": "n", "address": "fd00::2", "port": "8001"}]}"#;

    fn names(store: &EndpointStore) -> Vec<String> {
        store
            .snapshot()
            .iter()
            .map(|e| format!("{}/{}@{}", e.spec.namespace, e.spec.name, e.spec.address))
            .collect()
    }

    #[test]
    fn yaml_and_json_are_read() {
        assert_eq!(parse(ONE).unwrap().0[0].labels["x"], "y");
        let (endpoints, problems) = parse(TWO).unwrap();
        assert_eq!((endpoints.len(), problems.len()), (2, 0));
        assert_eq!(endpoints[1].address, "[fd00::2]:8001".parse().unwrap());
    }

    #[test]
    fn bad_entries_are_named_and_good_ones_kept() {
        let text = "endpoints:\n- {name: a, address: 10.0.0.1, port: \"8000\"}\n- {address: 10.0.0.1, port: \"1\"}\n- {name: c, address: host, port: \"1\"}\n- {name: d, address: 10.0.0.1, port: \"70000\"}\n";
        let (endpoints, problems) = parse(text).unwrap();
        assert_eq!(endpoints.len(), 1);
        assert_eq!(
            problems,
            [
                "endpoints[1]: name is required",
                "endpoints[2]: address \"host\" is not an IP address",
                "endpoints[3]: port \"70000\" is not within 1 and 65535",
            ]
        );
        assert!(parse("").is_err() && parse("{}").is_err() && parse("endpoints: [").is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn changes_are_followed_and_a_broken_file_keeps_the_last_set() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("endpoints.yaml");
        std::fs::write(&path, ONE).unwrap();
        let discovery = Arc::new(FileDiscovery {
            path: path.clone(),
            watch: true,
        });
        let store = Arc::new(EndpointStore::default());
        discovery.load(&store).unwrap();
        let first = store.snapshot();
        let shutdown = CancellationToken::new();
        let task = {
            let (discovery, store, shutdown) =
                (Arc::clone(&discovery), Arc::clone(&store), shutdown.clone());
            tokio::spawn(async move { discovery.watch(&store, shutdown).await })
        };
        let settle = || tokio::time::sleep(WATCH_INTERVAL * 3);
        settle().await;
        assert!(Arc::ptr_eq(&first, &store.snapshot()), "unchanged");
        // Replaced by rename, as editors and config management do.
        let next = directory.path().join("next");
        std::fs::write(&next, TWO).unwrap();
        std::fs::rename(&next, &path).unwrap();
        settle().await;
        assert_eq!(
            names(&store),
            ["default/a@10.0.0.1:8000", "n/b@[fd00::2]:8001"]
        );
        for broken in ["", "endpoints: [", "{}"] {
            std::fs::write(&path, broken).unwrap();
            settle().await;
            assert_eq!(names(&store).len(), 2, "{broken:?}");
        }
        std::fs::remove_file(&path).unwrap();
        settle().await;
        assert_eq!(names(&store).len(), 2, "removed");
        // Symlink swap, as a mounted ConfigMap does.
        let target = directory.path().join("data");
        std::fs::write(&target, ONE).unwrap();
        std::os::unix::fs::symlink(&target, &path).unwrap();
        settle().await;
        assert_eq!(names(&store), ["default/a@10.0.0.1:8000"]);
        shutdown.cancel();
        task.await.unwrap();
    }

    #[test]
    fn the_first_load_is_strict() {
        let discovery = FileDiscovery {
            path: "/nonexistent/endpoints".into(),
            watch: false,
        };
        assert!(discovery.load(&EndpointStore::default()).is_err());
    }
}
