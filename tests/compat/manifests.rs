//! What `deploy/` ships: every manifest fits the published schemas, every command line and document in it
//! is understood without a warning, every series that is queried exists.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::Hasher;
use std::path::{Path, PathBuf};

use pinpod::config::{LoadOptions, builtin, load};
use pinpod::epp::options;
use pinpod::telemetry::metrics::table::{Kind, TABLE};
use pinpod::telemetry::trace::settings;
use serde_json::Value;

use super::schema::Schemas;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn documents(text: &str) -> Vec<Value> {
    let all: Vec<Value> = serde_saphyr::from_multiple(text).unwrap();
    all.into_iter().filter(|d| !d.is_null()).collect()
}

/// YAML files below `directory`, in order.
fn yaml_files(directory: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut open = vec![root().join(directory)];
    while let Some(directory) = open.pop() {
        for entry in std::fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|e| e == "yaml") {
                files.push(path);
            }
        }
    }
    files.sort();
    assert!(!files.is_empty(), "{directory} is empty");
    files
}

/// Every manifest there is, with the file it is from.
fn manifests() -> Vec<(String, Value)> {
    ["deploy/kubernetes", "deploy/kserve", "tests/data/chart"]
        .iter()
        .flat_map(|directory| yaml_files(directory))
        .flat_map(|path| {
            let name = path.strip_prefix(root()).unwrap().display().to_string();
            documents(&read(&path))
                .into_iter()
                .map(move |document| (name.clone(), document))
        })
        .collect()
}

#[test]
fn every_manifest_fits_its_published_schema() {
    let schemas = Schemas::load();
    let mut kinds = BTreeSet::new();
    let mut errors = Vec::new();
    for (file, manifest) in manifests() {
        kinds.insert(manifest["kind"].as_str().unwrap_or_default().to_owned());
        let found = schemas.check(&manifest);
        errors.extend(found.into_iter().map(|error| format!("{file}: {error}")));
    }
    assert!(errors.is_empty(), "{errors:#?}");
    for kind in [
        "Deployment",
        "Service",
        "Role",
        "ClusterRole",
        "PodDisruptionBudget",
        "HorizontalPodAutoscaler",
        "ScaledObject",
        "ServiceMonitor",
        "PrometheusRule",
        "InferencePool",
        "InferenceObjective",
        "HTTPRoute",
        "AIGatewayRoute",
        "DestinationRule",
        "LLMInferenceService",
        "LLMInferenceServiceConfig",
        "CustomResourceDefinition",
    ] {
        assert!(kinds.contains(kind), "nothing ships a {kind}");
    }
}

#[test]
fn the_crds_say_what_is_published() {
    let schemas = Schemas::load();
    for path in yaml_files("deploy/kubernetes/crds") {
        for crd in documents(&read(&path)) {
            let spec = &crd["spec"];
            let text = |value: &Value| value.as_str().unwrap().to_owned();
            let (group, plural) = (text(&spec["group"]), text(&spec["names"]["plural"]));
            assert_eq!(text(&crd["metadata"]["name"]), format!("{plural}.{group}"));
            for version in spec["versions"].as_array().unwrap() {
                let name = format!(
                    "{group}/{}/{}",
                    text(&version["name"]),
                    text(&spec["names"]["kind"])
                );
                let published = schemas.kind(&name).unwrap();
                let ours = &version["schema"]["openAPIV3Schema"];
                assert_eq!(
                    shape(&ours["properties"]["spec"]),
                    shape(&published["properties"]["spec"]),
                    "{name}"
                );
            }
        }
    }
}

/// Path of every field with its type and whether it is required.
fn shape(schema: &Value) -> BTreeMap<String, String> {
    fn walk(schema: &Value, path: &str, out: &mut BTreeMap<String, String>) {
        let required = &schema["required"];
        out.insert(path.to_owned(), format!("{} {required}", schema["type"]));
        for (name, inner) in schema["properties"].as_object().into_iter().flatten() {
            walk(inner, &format!("{path}.{name}"), out);
        }
        for key in ["items", "additionalProperties"] {
            if schema[key].is_object() {
                walk(&schema[key], &format!("{path}.{key}"), out);
            }
        }
    }
    let mut out = BTreeMap::new();
    walk(schema, "", &mut out);
    out
}

/// Containers that run our image, with the manifest's file.
fn our_containers() -> Vec<(String, Value, Value)> {
    let mut found = Vec::new();
    for (file, manifest) in manifests() {
        let pod = &manifest["spec"]["template"]["spec"];
        for container in pod["containers"].as_array().into_iter().flatten() {
            let image = container["image"].as_str().unwrap_or_default();
            if manifest["kind"] == "Deployment" && image.contains("pinpod") {
                found.push((file.clone(), pod.clone(), container.clone()));
            }
        }
    }
    assert!(found.len() > 5, "{}", found.len());
    found
}

fn strings(list: &Value) -> Vec<String> {
    let list = list.as_array().into_iter().flatten();
    list.map(|a| a.as_str().unwrap().to_owned()).collect()
}

#[test]
fn every_command_line_is_understood_and_every_pod_is_locked_down() {
    for (file, pod, container) in our_containers() {
        let context = &container["securityContext"];
        assert_eq!(context["readOnlyRootFilesystem"], true, "{file}");
        assert_eq!(context["allowPrivilegeEscalation"], false, "{file}");
        assert_eq!(context["capabilities"]["drop"][0], "ALL", "{file}");
        assert_eq!(pod["securityContext"]["runAsNonRoot"], true, "{file}");
        if container["command"].is_array() {
            continue;
        }
        let arguments = strings(&container["args"]);
        let mut options =
            options::parse(arguments).unwrap_or_else(|error| panic!("{file}: {error}"));
        // The pod's name is not here, but the pod is told it.
        let environment = container["env"].as_array().into_iter().flatten();
        let told = environment.filter(|e| {
            e["name"] == "POD_NAME" && e["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.name"
        });
        assert_eq!(told.count(), 1, "{file}");
        options.warnings.retain(|w| !w.starts_with("POD_NAME"));
        assert!(
            options.warnings.is_empty(),
            "{file}: {:?}",
            options.warnings
        );
        // Traces go where the environment says, which is understood whole.
        let variable = |name: &str| {
            let mut all = container["env"].as_array().into_iter().flatten();
            let found = all.find(|e| e["name"] == name)?;
            Some(found["value"].as_str().unwrap().to_owned())
        };
        let traces = settings::read("epp", variable).unwrap();
        assert_eq!(traces.warnings, Vec::<String>::new(), "{file}");
        let wanted = variable("OTEL_TRACES_EXPORTER").is_some() && options.tracing;
        assert_eq!(traces.settings.is_some(), wanted, "{file}");
        let ports: BTreeMap<_, _> = container["ports"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|p| {
                (
                    p["name"].as_str().unwrap(),
                    p["containerPort"].as_u64().unwrap(),
                )
            })
            .collect();
        assert_eq!(ports["grpc"], u64::from(options.grpc_port), "{file}");
        assert_eq!(ports["grpc-health"], u64::from(options.grpc_health_port));
        assert_eq!(ports["metrics"], u64::from(options.metrics_port));
        for (probe, service) in [
            ("livenessProbe", "liveness"),
            ("readinessProbe", "readiness"),
        ] {
            let grpc = &container[probe]["grpc"];
            assert_eq!(grpc["port"], 9003, "{file}");
            assert_eq!(grpc["service"], service, "{file}");
        }
        let grace = pod["terminationGracePeriodSeconds"].as_u64().unwrap();
        assert!(grace > options.drain_timeout.as_secs(), "{file}");
        for volume in pod["volumes"].as_array().into_iter().flatten() {
            let mounted = pod["containers"].as_array().into_iter().flatten().any(|c| {
                let mounts = c["volumeMounts"].as_array().into_iter().flatten();
                mounts.into_iter().any(|m| m["name"] == volume["name"])
            });
            assert!(mounted, "{file}: {} is mounted nowhere", volume["name"]);
        }
    }
}

#[test]
fn every_configuration_that_is_shipped_loads_without_warnings() {
    let mut texts = Vec::new();
    for (file, manifest) in manifests() {
        if let Some(text) = manifest["data"]["config.yaml"].as_str() {
            texts.push((file.clone(), text.to_owned()));
        }
        let inline = &manifest["spec"]["router"]["scheduler"]["config"]["inline"];
        if inline.is_object() {
            texts.push((file, inline.to_string()));
        }
    }
    let compose = root().join("deploy/compose/pinpod/config.yaml");
    texts.push(("compose".to_owned(), read(&compose)));
    assert!(texts.len() > 4, "{}", texts.len());
    for (file, text) in texts {
        let config = load(Some(&text), &LoadOptions::default(), &builtin::registry())
            .unwrap_or_else(|error| panic!("{file}: {error}"));
        assert!(config.warnings.is_empty(), "{file}: {:?}", config.warnings);
    }
}

#[test]
fn references_between_manifests_lead_somewhere() {
    let all = manifests();
    let files: BTreeSet<_> = all.iter().map(|(file, _)| file.clone()).collect();
    for file in files {
        let here: Vec<_> = all
            .iter()
            .filter(|(f, _)| *f == file)
            .map(|(_, m)| m)
            .collect();
        let named = |kind: &str| -> BTreeSet<_> {
            let of_kind = here.iter().filter(|m| m["kind"] == kind);
            of_kind
                .map(|m| m["metadata"]["name"].as_str().unwrap().to_owned())
                .collect()
        };
        let (services, accounts, maps) = (
            named("Service"),
            named("ServiceAccount"),
            named("ConfigMap"),
        );
        for manifest in &here {
            let spec = &manifest["spec"];
            if let Some(picker) = spec["endpointPickerRef"]["name"].as_str() {
                assert!(services.contains(picker), "{file}: {picker}");
            }
            let pod = &spec["template"]["spec"];
            if let Some(account) = pod["serviceAccountName"].as_str() {
                assert!(accounts.contains(account), "{file}: {account}");
            }
            for volume in pod["volumes"].as_array().into_iter().flatten() {
                if let Some(map) = volume["configMap"]["name"].as_str() {
                    assert!(maps.contains(map), "{file}: {map}");
                }
            }
            // A Service selects its pods.
            let selector = spec["selector"].as_object();
            if manifest["kind"] == "Service" {
                let hit = here.iter().filter(|m| m["kind"] == "Deployment").any(|m| {
                    let labels = &m["spec"]["template"]["metadata"]["labels"];
                    selector.unwrap().iter().all(|(k, v)| labels[k] == *v)
                });
                assert!(hit, "{file}: a service selects nothing");
            }
        }
    }
}

/// Names of series in a query: what stands before a label list or a range and is not a function.
fn series_in(query: &str) -> Vec<String> {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    query
        .split(|c: char| !word(c))
        .filter(|name| name.starts_with("llm_d_") || name.starts_with("pinpod_"))
        .map(str::to_owned)
        .collect()
}

fn exported(series: &str) -> bool {
    TABLE.iter().any(|row| match row.kind {
        Kind::Histogram(_) => series
            .strip_prefix(row.name)
            .is_some_and(|rest| ["_bucket", "_sum", "_count"].contains(&rest)),
        Kind::Counter | Kind::Gauge => series == row.name,
    })
}

#[test]
fn dashboard_alerts_and_autoscalers_ask_for_series_that_exist() {
    let dashboard: Value =
        serde_json::from_str(&read(&root().join("deploy/monitoring/dashboard.json"))).unwrap();
    let mut queries = Vec::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().into_iter().flatten() {
            queries.push(target["expr"].as_str().unwrap().to_owned());
        }
    }
    assert!(queries.len() > 20);
    let alerts: Value =
        serde_saphyr::from_str(&read(&root().join("deploy/monitoring/alerts.yaml"))).unwrap();
    for group in alerts["groups"].as_array().unwrap() {
        for rule in group["rules"].as_array().unwrap() {
            queries.push(rule["expr"].as_str().unwrap().to_owned());
        }
    }
    for (_, manifest) in manifests() {
        for trigger in manifest["spec"]["triggers"]
            .as_array()
            .into_iter()
            .flatten()
        {
            queries.push(trigger["metadata"]["query"].as_str().unwrap().to_owned());
        }
    }
    for query in queries {
        let names = series_in(&query);
        assert!(!names.is_empty(), "{query}");
        for name in names {
            assert!(exported(&name), "{name} in {query}");
        }
    }
}

#[test]
fn the_rendered_chart_is_the_charts() {
    let mut files = Vec::new();
    let chart = root().join("deploy/helm/pinpod");
    for directory in ["", "templates", "files"] {
        for entry in std::fs::read_dir(chart.join(directory)).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                files.push(path);
            }
        }
    }
    files.extend(yaml_files("tests/chart"));
    files.sort_by_key(|path| path.strip_prefix(root()).unwrap().to_owned());
    let mut hasher = Fnv(0xcbf2_9ce4_8422_2325);
    for path in files {
        hasher.write(
            path.strip_prefix(root())
                .unwrap()
                .to_str()
                .unwrap()
                .as_bytes(),
        );
        hasher.write(read(&path).as_bytes());
    }
    let recorded = read(&root().join("tests/data/chart/SOURCES"));
    assert_eq!(
        recorded.trim(),
        format!("{:016x}", hasher.finish()),
        "the chart changed: run `make chart`"
    );
}

/// FNV-1a, which tests/render_chart.py computes as well.
struct Fnv(u64);

impl Hasher for Fnv {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[test]
fn compose_mounts_what_exists_and_lists_its_own_pods() {
    let directory = root().join("deploy/compose");
    let compose: Value =
        serde_saphyr::from_str(&read(&directory.join("docker-compose.yaml"))).unwrap();
    let services = compose["services"].as_object().unwrap();
    let mut addresses = BTreeSet::new();
    for (name, service) in services {
        for volume in strings(&service["volumes"]) {
            let source = volume.split(':').next().unwrap();
            assert!(directory.join(source).exists(), "{name}: {source}");
        }
        if name.starts_with("pod-") {
            let address = service["networks"]["pool"]["ipv4_address"]
                .as_str()
                .unwrap();
            addresses.insert(address.to_owned());
        }
    }
    let endpoints: Value =
        serde_saphyr::from_str(&read(&directory.join("pinpod/endpoints.yaml"))).unwrap();
    let listed: BTreeSet<_> = endpoints["endpoints"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| e["address"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(addresses.len(), 4);
    assert_eq!(listed, addresses);
    let flags = options::parse(strings(&services["pinpod"]["command"])).unwrap();
    assert!(flags.warnings.is_empty(), "{:?}", flags.warnings);
}

#[test]
fn the_image_is_what_consumers_expect() {
    let text = read(&root().join("deploy/Dockerfile"));
    for line in [
        "WORKDIR /",
        "USER 65532:65532",
        "EXPOSE 9002 9003 9090 5557",
        "ENTRYPOINT [\"/app/epp\"]",
    ] {
        assert!(text.lines().any(|l| l == line), "{line}");
    }
    assert!(text.contains("/out/bin/sleep") && text.contains("ln -s pinpod /out/app/epp"));
    // What the build copies is what the crate needs to compile.
    let ignore = read(&root().join("deploy/Dockerfile.dockerignore"));
    for line in text
        .lines()
        .filter(|l| l.starts_with("COPY ") && !l.contains("--from"))
    {
        for source in line.split_whitespace().skip(1) {
            if source != "./" {
                assert!(
                    ignore.lines().any(|l| l == format!("!{source}")),
                    "{source}"
                );
                assert!(root().join(source).exists(), "{source}");
            }
        }
    }
}
