//! `file-discovery`: endpoints from a file that may change while we run.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use serde::Deserialize;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Discovery;
use crate::datalayer::{EndpointDetails, EndpointSpec, EndpointStore};
use crate::plugin::{Build, Maturity, ParamDoc, ParamError, Plugin, PluginError};

/// Longest file that is read.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// How often the file is looked at. Reading it again finds any kind of change: a write, a rename over
/// it, or the symlink swap of a Kubernetes ConfigMap.
const WATCH_INTERVAL: Duration = Duration::from_millis(250);
/// How often names are resolved again.
const RESOLVE_INTERVAL: Duration = Duration::from_secs(10);
/// Longest a name may take to resolve.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(2);
/// Names that are resolved at once.
const CONCURRENT_LOOKUPS: usize = 16;
/// Longest host name.
const MAX_NAME_BYTES: usize = 253;
/// Longest part of one.
const MAX_LABEL_BYTES: usize = 63;

/// Labels that say where a peer cluster serves its metrics.
const METRICS_ADDRESS_LABEL: &str = "metricsAddress";
const METRICS_PORT_LABEL: &str = "metricsPort";

/// Endpoints from a YAML or JSON file.
#[derive(Debug)]
pub struct FileDiscovery {
    path: PathBuf,
    watch: bool,
    /// Entries are peer clusters: hosts may be names, and labels redirect scrapes.
    clusters: bool,
    /// What was loaded first, for the watch to compare with.
    loaded: Mutex<Option<String>>,
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
        Self::read_settings::<Self>(build, false)
    }
}

/// The file. As in the reference, unknown keys are ignored and known ones may be capitalised.
#[derive(Debug, Deserialize)]
struct File {
    #[serde(alias = "Endpoints")]
    endpoints: Option<Vec<Entry>>,
}

#[derive(Debug, Deserialize)]
struct Entry {
    #[serde(default, alias = "Name")]
    name: String,
    #[serde(default, alias = "Namespace")]
    namespace: String,
    #[serde(default, alias = "Address")]
    address: String,
    #[serde(default, alias = "Port")]
    port: String,
    #[serde(default, alias = "Labels")]
    labels: BTreeMap<String, String>,
    /// Of ours: where exporters of a whole node are found.
    #[serde(default, rename = "nodeAddress")]
    node_address: Option<IpAddr>,
    /// Of ours: stands in for the host label.
    #[serde(default)]
    hostname: Option<String>,
}

/// An entry of the file. While its host is a name, the address is only a port.
#[derive(Debug, Clone)]
struct Listed(EndpointSpec);

impl Discovery for FileDiscovery {
    fn load<'a>(&'a self, store: &'a EndpointStore) -> BoxFuture<'a, Result<(), String>> {
        Box::pin(self.load_first(store))
    }

    fn watch<'a>(
        &'a self,
        store: &'a EndpointStore,
        shutdown: CancellationToken,
    ) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            shutdown.run_until_cancelled(self.follow(store)).await;
        })
    }
}

impl FileDiscovery {
    /// Reads the parameters, which `P` documents.
    pub(super) fn read_settings<P: Plugin>(
        build: &Build<'_>,
        clusters: bool,
    ) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<P, _>()?;
        if settings.path.is_empty() {
            return Err(ParamError("path: is required".to_owned()).into());
        }
        Ok(Self {
            path: settings.path.into(),
            watch: settings.watch_file,
            clusters,
            loaded: Mutex::default(),
        })
    }

    /// Loads the file for the first time. Any problem with it is an error; a name that does not
    /// resolve yet is not, because it may later.
    async fn load_first(&self, store: &EndpointStore) -> Result<(), String> {
        let text = self.read()?;
        let refuse = |problem: String| format!("{}: {problem}", self.path.display());
        let (listed, problems) = parse(&text, self.clusters).map_err(refuse)?;
        if !problems.is_empty() {
            return Err(refuse(problems.join("; ")));
        }
        let (endpoints, problems) = resolve(listed, store).await;
        self.report(&problems);
        store.replace(endpoints);
        *self.loaded.lock() = Some(text);
        Ok(())
    }

    /// Follows the file and the names in it; returns at once when neither can change. A file that
    /// cannot be read or decoded keeps the last good set; of one with bad entries the good ones count.
    async fn follow(&self, store: &EndpointStore) {
        if !self.watch && !self.clusters {
            return;
        }
        let mut seen = self.loaded.lock().take().ok_or_else(String::new);
        let mut resolved_at = Instant::now();
        loop {
            tokio::time::sleep(WATCH_INTERVAL).await;
            let now = if self.watch {
                self.read()
            } else {
                seen.clone()
            };
            let changed = now != seen;
            seen = now;
            let due = self.clusters && resolved_at.elapsed() >= RESOLVE_INTERVAL;
            if changed || due {
                resolved_at = Instant::now();
                self.apply(&seen, store).await;
            }
        }
    }

    async fn apply(&self, text: &Result<String, String>, store: &EndpointStore) {
        let parsed = text.as_deref().map_err(Clone::clone);
        let (listed, mut problems) = match parsed.and_then(|text| parse(text, self.clusters)) {
            Ok(parsed) => parsed,
            Err(problem) => return self.report(&[problem]),
        };
        let (endpoints, unresolved) = resolve(listed, store).await;
        problems.extend(unresolved);
        self.report(&problems);
        let pool = store.snapshot();
        if !pool.iter().map(|e| &e.spec).eq(&endpoints) {
            tracing::info!(endpoints = endpoints.len(), "endpoint file reloaded");
            store.replace(endpoints);
        }
    }

    fn report(&self, problems: &[String]) {
        if !problems.is_empty() {
            let problem = problems.join("; ");
            metrics::counter!("pinpod_discovery_reload_failures_total").increment(1);
            tracing::warn!(path = %self.path.display(), problem, "endpoint file has problems");
        }
    }

    fn read(&self) -> Result<String, String> {
        let fail = |error: std::io::Error| format!("{}: {error}", self.path.display());
        let found = std::fs::metadata(&self.path).map_err(fail)?;
        // Reading a pipe would wait for whoever writes to it.
        if !found.is_file() {
            return Err(format!("{}: not a file", self.path.display()));
        }
        let length = found.len();
        if length > MAX_FILE_BYTES {
            return Err(format!(
                "{}: {length} bytes, at most {MAX_FILE_BYTES}",
                self.path.display()
            ));
        }
        std::fs::read_to_string(&self.path).map_err(fail)
    }
}

/// Valid entries and what is wrong with the others. A file without an `endpoints` list, or without a
/// valid entry in it, is an error, so that a broken one does not empty the pool; an empty list does.
fn parse(text: &str, clusters: bool) -> Result<(Vec<Listed>, Vec<String>), String> {
    let file: File = serde_saphyr::from_str(text).map_err(|error| error.to_string())?;
    let entries = file.endpoints.ok_or("there is no endpoints list")?;
    let mut listed = Vec::new();
    let mut problems = Vec::new();
    for (position, entry) in entries.into_iter().enumerate() {
        match entry.listed(clusters) {
            Ok(entry) => listed.push(entry),
            Err(problem) => problems.push(format!("endpoints[{position}]: {problem}")),
        }
    }
    if listed.is_empty() && !problems.is_empty() {
        return Err(problems.join("; "));
    }
    Ok((listed, problems))
}

impl Entry {
    fn listed(self, clusters: bool) -> Result<Listed, String> {
        if self.name.is_empty() {
            return Err("name is required".to_owned());
        }
        let (ip, dns_name) = match self.address.parse() {
            Ok(ip) => (ip, None),
            Err(_) if clusters && is_host_name(&self.address) => {
                (Ipv4Addr::UNSPECIFIED.into(), Some(self.address))
            }
            Err(_) => {
                let wanted = if clusters {
                    "an IP address or host name"
                } else {
                    "an IP address"
                };
                return Err(format!("address {:?} is not {wanted}", self.address));
            }
        };
        let mut details = EndpointDetails {
            node_address: self.node_address,
            hostname: self.hostname,
            dns_name,
            ..EndpointDetails::default()
        };
        if clusters {
            redirect(&self.labels, &mut details)?;
        }
        Ok(Listed(EndpointSpec {
            name: self.name,
            namespace: if self.namespace.is_empty() {
                "default".to_owned()
            } else {
                self.namespace
            },
            address: SocketAddr::new(ip, port("port", &self.port)?),
            labels: self.labels,
            rank: 0,
            details,
        }))
    }
}

/// Where labels say the metrics are.
fn redirect(
    labels: &BTreeMap<String, String>,
    details: &mut EndpointDetails,
) -> Result<(), String> {
    let label = |name| labels.get(name).filter(|value| !value.is_empty());
    if let Some(host) = label(METRICS_ADDRESS_LABEL) {
        if host.parse::<IpAddr>().is_err() && !is_host_name(host) {
            return Err(format!(
                "label {METRICS_ADDRESS_LABEL} {host:?} is not an IP address or host name"
            ));
        }
        details.metrics_host = Some(host.clone());
    }
    if let Some(text) = label(METRICS_PORT_LABEL) {
        details.metrics_port = Some(port(&format!("label {METRICS_PORT_LABEL}"), text)?);
    }
    Ok(())
}

fn port(what: &str, text: &str) -> Result<u16, String> {
    text.parse()
        .ok()
        .filter(|port| *port > 0)
        .ok_or_else(|| format!("{what} {text:?} is not within 1 and 65535"))
}

/// Letters, digits and hyphens in dotted labels, and a letter somewhere, so that a mistyped address
/// does not pass.
fn is_host_name(text: &str) -> bool {
    let name = text.strip_suffix('.').unwrap_or(text);
    let is_label = |label: &str| {
        (1..=MAX_LABEL_BYTES).contains(&label.len())
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.len() <= MAX_NAME_BYTES
        && name.split('.').all(is_label)
        && name.bytes().any(|b| b.is_ascii_alphabetic())
}

/// Entries with their addresses, in order, and the names that have none. A name that stops resolving
/// keeps the address it had.
async fn resolve(listed: Vec<Listed>, store: &EndpointStore) -> (Vec<EndpointSpec>, Vec<String>) {
    let pool = store.snapshot();
    let known = |spec: &EndpointSpec| -> Option<IpAddr> {
        let same = pool.iter().find(|e| {
            e.spec.namespace == spec.namespace
                && e.spec.name == spec.name
                && e.spec.details.dns_name == spec.details.dns_name
        });
        same.map(|e| e.spec.address.ip())
    };
    let lookups = listed.into_iter().map(|Listed(mut spec)| {
        let known = known(&spec);
        async move {
            let Some(name) = &spec.details.dns_name else {
                return (Some(spec), None);
            };
            let found = look_up(name, known).await;
            let problem = found.as_ref().err().map(|e| format!("{name}: {e}"));
            match found.ok().or(known) {
                Some(ip) => {
                    spec.address.set_ip(ip);
                    (Some(spec), problem)
                }
                None => (None, problem),
            }
        }
    });
    let resolved: Vec<_> = futures_util::stream::iter(lookups)
        .buffered(CONCURRENT_LOOKUPS)
        .collect()
        .await;
    let (endpoints, problems): (Vec<_>, Vec<_>) = resolved.into_iter().unzip();
    (
        endpoints.into_iter().flatten().collect(),
        problems.into_iter().flatten().collect(),
    )
}

/// An address of `name`: the `known` one while it is among the answers, whose order may change with
/// every query.
async fn look_up(name: &str, known: Option<IpAddr>) -> Result<IpAddr, String> {
    let answers = tokio::time::timeout(RESOLVE_TIMEOUT, tokio::net::lookup_host((name, 0)))
        .await
        .map_err(|_| "no answer in time".to_owned())?
        .map_err(|error| error.to_string())?;
    let addresses: Vec<IpAddr> = answers.map(|a| a.ip()).collect();
    known
        .filter(|ip| addresses.contains(ip))
        .or_else(|| addresses.first().copied())
        .ok_or_else(|| "no address".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    const ONE: &str =
        "endpoints:\n- {name: a, address: 10.0.0.1, port: \"8000\", labels: {x: y}, extra: 1}\n";
    const TWO: &str = r#"{"endpoints": [{"name": "a", "address": "10.0.0.1", "port": "8000"}, {"name": "b", "namespace": "n", "address": "fd00::2", "port": "8001"}]}"#;

    fn discovery(path: &std::path::Path, watch: bool, clusters: bool) -> FileDiscovery {
        FileDiscovery {
            path: path.to_owned(),
            watch,
            clusters,
            loaded: Mutex::default(),
        }
    }

    fn names(store: &EndpointStore) -> Vec<String> {
        store
            .snapshot()
            .iter()
            .map(|e| format!("{}/{}@{}", e.spec.namespace, e.spec.name, e.spec.address))
            .collect()
    }

    #[test]
    fn yaml_and_json_are_read() {
        assert_eq!(parse(ONE, false).unwrap().0[0].0.labels["x"], "y");
        let capitalised =
            "Endpoints: [{Name: a, Address: 10.0.0.1, Port: \"8000\", Labels: {x: y}}]";
        let (endpoints, _) = parse(capitalised, false).unwrap();
        assert_eq!(endpoints[0].0, parse(ONE, false).unwrap().0[0].0);
        let (endpoints, problems) = parse(TWO, false).unwrap();
        assert_eq!((endpoints.len(), problems.len()), (2, 0));
        assert_eq!(endpoints[1].0.address, "[fd00::2]:8001".parse().unwrap());
    }

    #[test]
    fn bad_entries_are_named_and_good_ones_kept() {
        let text = "endpoints:\n- {name: a, address: 10.0.0.1, port: \"8000\"}\n- {address: 10.0.0.1, port: \"1\"}\n- {name: c, address: host, port: \"1\"}\n- {name: d, address: 10.0.0.1, port: \"70000\"}\n";
        let (endpoints, problems) = parse(text, false).unwrap();
        assert_eq!(endpoints.len(), 1);
        assert_eq!(
            problems,
            [
                "endpoints[1]: name is required",
                "endpoints[2]: address \"host\" is not an IP address",
                "endpoints[3]: port \"70000\" is not within 1 and 65535",
            ]
        );
        let wholly_bad = "endpoints: [{name: a, address: host, port: \"1\"}]";
        for bad in ["", "{}", "endpoints: [", wholly_bad] {
            assert!(parse(bad, false).is_err(), "{bad:?}");
        }
        let (none, problems) = parse("endpoints: []", false).unwrap();
        assert_eq!((none.len(), problems.len()), (0, 0), "an empty pool");
    }

    #[test]
    fn a_pipe_is_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pipe");
        let made = std::process::Command::new("mkfifo").arg(&path).status();
        assert!(made.unwrap().success());
        let problem = discovery(&path, true, false).read().unwrap_err();
        assert!(problem.ends_with("pipe: not a file"), "{problem}");
    }

    #[tokio::test(start_paused = true)]
    async fn changes_are_followed_and_a_broken_file_keeps_the_last_set() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("endpoints.yaml");
        std::fs::write(&path, ONE).unwrap();
        let discovery = Arc::new(discovery(&path, true, false));
        let store = Arc::new(EndpointStore::default());
        discovery.load(&store).await.unwrap();
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
        let wholly_bad = "endpoints: [{name: a, address: host, port: \"1\"}]";
        for broken in ["", "endpoints: [", "{}", wholly_bad] {
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

    #[tokio::test]
    async fn the_first_load_is_strict() {
        let store = EndpointStore::default();
        let missing = discovery("/nonexistent/endpoints".as_ref(), false, false);
        assert!(missing.load(&store).await.is_err());
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("endpoints.yaml");
        let bad = "- {name: b, address: 10.0.0.2, port: \"0\"}\n";
        std::fs::write(&path, format!("{ONE}{bad}")).unwrap();
        let problem = discovery(&path, false, false).load(&store).await;
        assert!(problem.unwrap_err().contains("endpoints[1]: port"));
        assert!(!store.is_synced());
    }

    #[tokio::test(start_paused = true)]
    async fn a_change_right_after_the_load_is_not_missed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("endpoints.yaml");
        std::fs::write(&path, ONE).unwrap();
        let discovery = discovery(&path, true, false);
        let store = EndpointStore::default();
        discovery.load(&store).await.unwrap();
        std::fs::write(&path, TWO).unwrap();
        let shutdown = CancellationToken::new();
        let stop = async {
            tokio::time::sleep(WATCH_INTERVAL * 2).await;
            shutdown.cancel();
        };
        tokio::join!(discovery.watch(&store, shutdown.clone()), stop);
        assert_eq!(names(&store).len(), 2);
    }

    #[test]
    fn peer_clusters_may_have_names_and_say_where_their_metrics_are() {
        let text = "endpoints:\n- {name: a, address: gateway.a.test, port: \"443\", labels: {metricsAddress: epp.a.test, metricsPort: \"9090\"}}\n- {name: b, address: 10.0.0.2, port: \"443\", nodeAddress: 10.0.0.9, hostname: h}\n- {name: c, address: -x.test, port: \"1\"}\n- {name: d, address: 10.0.0, port: \"1\"}\n- {name: e, address: e.test, port: \"1\", labels: {metricsAddress: \"a b\"}}\n- {name: f, address: f.test, port: \"1\", labels: {metricsPort: \"0\"}}\n";
        let (listed, problems) = parse(text, true).unwrap();
        let details: Vec<_> = listed.iter().map(|l| l.0.details.clone()).collect();
        let own = |text: &str| Some(text.to_owned());
        let expected = [
            EndpointDetails {
                dns_name: own("gateway.a.test"),
                metrics_host: own("epp.a.test"),
                metrics_port: Some(9090),
                ..EndpointDetails::default()
            },
            EndpointDetails {
                node_address: Some([10, 0, 0, 9].into()),
                hostname: own("h"),
                ..EndpointDetails::default()
            },
        ];
        assert_eq!(details, expected);
        assert_eq!(
            problems,
            [
                "endpoints[2]: address \"-x.test\" is not an IP address or host name",
                "endpoints[3]: address \"10.0.0\" is not an IP address or host name",
                "endpoints[4]: label metricsAddress \"a b\" is not an IP address or host name",
                "endpoints[5]: label metricsPort \"0\" is not within 1 and 65535",
            ]
        );
        // Pods never have names or redirects.
        let (listed, problems) = parse(text, false).unwrap();
        assert_eq!((listed.len(), problems.len()), (1, 5));
    }

    #[tokio::test]
    async fn names_are_resolved_and_a_dead_one_does_not_stop_the_others() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("clusters.yaml");
        let text = "endpoints:\n- {name: a, address: localhost, port: \"8443\"}\n- {name: b, address: no-such-host.invalid, port: \"1\"}\n";
        std::fs::write(&path, text).unwrap();
        let store = EndpointStore::default();
        let clusters = discovery(&path, false, true);
        clusters.load(&store).await.unwrap();
        let pool = store.snapshot();
        assert_eq!(pool.len(), 1);
        assert!(pool[0].spec.address.ip().is_loopback());
        assert_eq!(pool[0].spec.address.port(), 8443);
        assert_eq!(pool[0].spec.details.dns_name.as_deref(), Some("localhost"));
        // Resolving again changes nothing, and a name that fails keeps its address.
        clusters.apply(&Ok(text.to_owned()), &store).await;
        assert!(Arc::ptr_eq(&pool, &store.snapshot()));
        let mut gone = pool[0].spec.clone();
        gone.details.dns_name = Some("no-such-host.invalid".to_owned());
        store.replace(vec![gone.clone()]);
        let (kept, problems) = resolve(vec![Listed(gone.clone())], &store).await;
        assert_eq!((kept, problems.len()), (vec![gone], 1));
    }

    #[test]
    fn host_names_are_told_from_mistakes() {
        for good in ["a", "a-b.c1.test", "a.test.", &"a".repeat(63)] {
            assert!(is_host_name(good), "{good}");
        }
        let long = vec!["a".repeat(63); 4].join(".");
        for bad in [
            "",
            ".",
            "a..b",
            "-a",
            "a-",
            "a_b",
            "10.0.0",
            "a b",
            &"a".repeat(64),
            &long,
        ] {
            assert!(!is_host_name(bad), "{bad}");
        }
    }
}
