use super::*;
use crate::kubernetes::testing::{ApiServer, eventually, pod, pool};
use serde_json::{Value, json};
use std::sync::Arc;
use tokio_util::task::AbortOnDropHandle;

struct Running {
    server: ApiServer,
    store: Arc<EndpointStore>,
    discovery: Arc<KubernetesDiscovery>,
    contact: ApiContact,
    _task: AbortOnDropHandle<()>,
}

fn start(server: ApiServer, source: PoolSource) -> Running {
    let contact = ApiContact::default();
    let discovery = KubernetesDiscovery::new(
        server.client(),
        "default".to_owned(),
        source,
        contact.clone(),
    );
    let (discovery, store) = (Arc::new(discovery), Arc::new(EndpointStore::default()));
    let (followed, own) = (Arc::clone(&store), Arc::clone(&discovery));
    let task = tokio::spawn(async move {
        own.load(&followed).await.unwrap();
        own.watch(&followed, CancellationToken::new()).await;
    });
    Running {
        server,
        store,
        discovery,
        contact,
        _task: AbortOnDropHandle::new(task),
    }
}

fn named() -> PoolSource {
    PoolSource::Pool {
        name: "pool".to_owned(),
        legacy: false,
    }
}

async fn with_pods(pods: &[(&str, u8)]) -> Running {
    let server = ApiServer::start().await;
    server.apply(pool(&[8000]));
    for (name, last) in pods {
        server.apply(pod(name, *last));
    }
    let running = start(server, named());
    running.has(pods.len()).await;
    running
}

impl Running {
    fn endpoints(&self) -> Vec<String> {
        let pool = self.store.snapshot();
        let mut shown: Vec<_> = pool
            .iter()
            .map(|e| format!("{}@{}#{}", e.spec.name, e.spec.address, e.index.0))
            .collect();
        shown.sort();
        shown
    }

    async fn has(&self, count: usize) {
        eventually(&format!("{count} endpoints"), || {
            self.store.is_synced() && self.store.snapshot().len() == count
        })
        .await;
    }
}

fn not_ready(name: &str, last: u8) -> Value {
    let mut pod = pod(name, last);
    pod["status"]["conditions"][0]["status"] = json!("False");
    pod
}

#[tokio::test]
async fn ready_pods_of_the_pool_are_endpoints() {
    let running = with_pods(&[("a", 1), ("b", 2)]).await;
    assert_eq!(
        running.endpoints(),
        ["a-rank-0@10.0.0.1:8000#0", "b-rank-0@10.0.0.2:8000#1"]
    );
    running.server.apply(pod("c", 3));
    running.has(3).await;
    running.server.apply(not_ready("a", 1));
    running.has(2).await;
    running.server.delete("pods", "b");
    running.has(1).await;
    // A pod that is asked to go takes no more requests, though it is still ready.
    let mut leaving = pod("c", 3);
    leaving["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    running.server.apply(leaving);
    running.has(0).await;
    assert!(running.contact.is_complete());
    let requests = running.server.requests();
    let allowed = [
        "/namespaces/default/pods?",
        "/namespaces/default/inferencepools?",
    ];
    for request in &requests {
        assert!(
            request.starts_with("GET ") && allowed.iter().any(|a| request.contains(a)),
            "{request}"
        );
    }
}

#[tokio::test]
async fn labels_come_and_go() {
    let running = with_pods(&[("a", 1)]).await;
    let former = Arc::clone(&running.store.snapshot()[0]);
    let mut labelled = pod("a", 1);
    labelled["metadata"]["labels"]["llm-d.ai/role"] = json!("decode");
    running.server.apply(labelled);
    let role = || {
        running.store.snapshot()[0]
            .spec
            .labels
            .contains_key("llm-d.ai/role")
    };
    eventually("the role", role).await;
    assert!(!former.is_removed(), "its caches are what they were");
    let mut other = pod("a", 1);
    other["metadata"]["labels"] = json!({"app": "other"});
    running.server.apply(other);
    running.has(0).await;
    running.server.apply(pod("a", 1));
    running.has(1).await;
}

#[tokio::test]
async fn a_pod_started_again_under_its_name_is_another_endpoint() {
    let running = with_pods(&[("a", 1), ("b", 2)]).await;
    let before = running.store.snapshot();
    // The same address even, and no event in between: only the uid tells.
    let mut again = pod("a", 1);
    again["metadata"]["uid"] = json!("second");
    running.server.apply(again);
    let index = || running.endpoints()[0].clone();
    eventually("a new index", || index() != "a-rank-0@10.0.0.1:8000#0").await;
    assert!(before[0].is_removed() && !before[1].is_removed());
}

#[tokio::test]
async fn a_pool_that_changes_or_goes_takes_its_endpoints_along() {
    let running = with_pods(&[("a", 1), ("b", 2)]).await;
    let mut ports = pool(&[8000, 8001]);
    ports["spec"]["appProtocol"] = json!("kubernetes.io/h2c");
    running.server.apply(ports);
    running.has(4).await;
    let spec = running.discovery.pool().borrow().clone().unwrap();
    assert_eq!(spec.app_protocol.as_deref(), Some("kubernetes.io/h2c"));
    let mut selector = pool(&[8000]);
    selector["spec"]["selector"] = json!({"matchLabels": {"app": "other"}});
    running.server.apply(selector);
    running.has(0).await;
    running.server.apply(pool(&[8000]));
    running.has(2).await;
    running
        .server
        .delete("inference.networking.k8s.io/v1/inferencepools", "pool");
    eventually("not synced", || !running.store.is_synced()).await;
    assert!(running.store.snapshot().is_empty());
    assert_eq!(*running.discovery.pool().borrow(), None);
    running.server.apply(pool(&[8000]));
    running.has(2).await;
}

#[tokio::test]
async fn a_pool_of_the_older_group_counts_while_there_is_none_of_v1() {
    let server = ApiServer::start().await;
    let older = json!({
        "apiVersion": "inference.networking.x-k8s.io/v1alpha2", "kind": "InferencePool",
        "metadata": {"name": "pool", "namespace": "default", "uid": "older"},
        "spec": {"selector": {"app": "llm"}, "targetPortNumber": 9000},
    });
    server.apply(older);
    server.apply(pod("a", 1));
    let running = start(server, named());
    running.has(1).await;
    assert_eq!(running.endpoints(), ["a-rank-0@10.0.0.1:9000#0"]);
    running.server.apply(pool(&[8000]));
    let v1 = || running.endpoints() == ["a-rank-0@10.0.0.1:8000#1"];
    eventually("v1 before v1alpha2", v1).await;
}

#[tokio::test]
async fn the_older_group_may_be_forbidden() {
    let server = ApiServer::start().await;
    server.refuse("inference.networking.x-k8s.io/v1alpha2/inferencepools", 403);
    server.apply(pool(&[8000]));
    server.apply(pod("a", 1));
    let running = start(server, named());
    running.has(1).await;
    eventually("nothing is missing", || running.contact.is_complete()).await;
}

#[tokio::test]
async fn a_selector_needs_no_custom_resource() {
    let server = ApiServer::start().await;
    let mut gold = pod("a", 1);
    gold["metadata"]["labels"]["tier"] = json!("gold");
    server.apply(gold);
    server.apply(pod("b", 2));
    let source = PoolSource::Selector {
        selector: "app=llm,tier in (gold,silver)".to_owned(),
        ports: vec![8000, 8001],
    };
    let running = start(server, source);
    running.has(2).await;
    assert!(running.endpoints()[0].starts_with("a-rank-0"));
    let requests = running.server.requests();
    assert!(
        requests.iter().all(|r| r.contains("/pods?")),
        "{requests:?}"
    );
}

#[tokio::test]
async fn a_cut_connection_and_repeated_events_change_nothing() {
    let running = with_pods(&[("a", 1), ("b", 2)]).await;
    let before = running.store.snapshot();
    let old = running.server.get("pods", "a").unwrap();
    running.server.delete("pods", "b");
    running.has(1).await;
    eventually("a watch", || running.server.watches("pods") == 1).await;
    // What is not newer than what is known: a second time, and from before the deletion.
    let event = |kind: &str, object: &Value| json!({"type": kind, "object": object}).to_string();
    running.server.send("pods", &event("DELETED", &old));
    running.server.send(
        "pods",
        &event(
            "ADDED",
            &json!({
                "metadata": {"name": "b", "uid": "uid-b", "resourceVersion": "101"},
            }),
        ),
    );
    running.server.cut();
    running.server.apply(pod("c", 3));
    running.has(2).await;
    assert_eq!(running.endpoints()[0], "a-rank-0@10.0.0.1:8000#0");
    assert!(!before[0].is_removed());
    assert_eq!(running.server.lists("pods"), 1, "taken up where it was");
}

#[tokio::test]
async fn a_forgotten_version_is_listed_again_and_only_differences_count() {
    let running = with_pods(&[("a", 1), ("b", 2), ("c", 3)]).await;
    eventually("a watch", || running.server.watches("pods") == 1).await;
    let before = running.store.snapshot();
    running.server.go_down();
    running.server.delete("pods", "b");
    running.server.apply(pod("d", 4));
    running.server.compact();
    running.server.come_back().await;
    let shown = || running.endpoints().join(" ");
    eventually("d for b", || {
        shown().contains("d-rank-0") && !shown().contains("b-rank-0")
    })
    .await;
    assert!(!before[0].is_removed() && before[1].is_removed() && !before[2].is_removed());
    assert_eq!(running.server.lists("pods"), 2);
}

#[tokio::test(start_paused = true)]
async fn thirty_seconds_without_an_api_server_change_nothing() {
    let running = with_pods(&[("a", 1), ("b", 2)]).await;
    eventually("in touch", || running.contact.is_complete()).await;
    let before = running.store.snapshot();
    running.server.go_down();
    eventually("out of touch", || !running.contact.is_complete()).await;
    running.server.delete("pods", "b");
    let asked = running.server.requests().len();
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert!(
        Arc::ptr_eq(&before, &running.store.snapshot()),
        "the last state stands"
    );
    assert!(running.store.is_synced());
    assert_eq!(running.server.requests().len(), asked);
    running.server.come_back().await;
    // At most one pause of fifteen seconds later.
    tokio::time::sleep(Duration::from_secs(16)).await;
    running.has(1).await;
    assert!(running.contact.is_complete());
    assert!(!before[0].is_removed());
    assert_eq!(
        running.server.lists("pods"),
        1,
        "the watch was taken up, not listed anew"
    );
}

#[tokio::test]
async fn a_server_that_is_away_at_the_start_is_waited_for() {
    let server = ApiServer::start().await;
    server.apply(pool(&[8000]));
    server.apply(pod("a", 1));
    server.go_down();
    let running = start(server, named());
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!running.store.is_synced() && !running.contact.is_complete());
    running.server.come_back().await;
    running.has(1).await;
}
