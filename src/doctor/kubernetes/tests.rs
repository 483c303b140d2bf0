//! Against the scripted API server.

use serde_json::{Value, json};

use super::{Installation, Target, check, encoded};
use crate::datalayer::EndpointSpec;
use crate::doctor::finding::{Finding, Report, Severity};
use crate::kubernetes::testing::{ApiServer, eventually, pod, pool};
use k8s_openapi::jiff::{SignedDuration, Timestamp};

/// A pool with two ready pods, a picker behind a Service, and every right.
async fn healthy() -> ApiServer {
    let server = ApiServer::start().await;
    let mut pool = pool(&[8000]);
    pool["spec"]["endpointPickerRef"] = json!({"name": "epp", "port": {"number": 9002}});
    pool["status"] = json!({"parents": [{
        "parentRef": {"kind": "Gateway", "name": "inference"},
        "conditions": [{"type": "Accepted", "status": "True"}, {"type": "ResolvedRefs", "status": "True"}],
    }]});
    server.apply(pool);
    server.apply(pod("a", 1));
    server.apply(pod("b", 2));
    server.apply(json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "epp", "namespace": "default"},
        "spec": {"selector": {"app": "epp"}, "ports": [{"port": 9002}]},
    }));
    server.apply(picker("epp-0", true, &[]));
    allow(&server, |_| true);
    server
}

fn picker(name: &str, ready: bool, arguments: &[&str]) -> Value {
    let mut picker = pod(name, 9);
    picker["metadata"]["labels"] = json!({"app": "epp"});
    picker["spec"] = json!({"serviceAccountName": "epp-sa", "containers": [{"args": arguments}]});
    picker["status"]["conditions"][0]["status"] = json!(if ready { "True" } else { "False" });
    picker
}

/// Answers reviews of access by resource.
fn allow(server: &ApiServer, may: impl Fn(&str) -> bool + Send + 'static) {
    server.review(
        "authorization.k8s.io/v1/subjectaccessreviews",
        move |review| {
            let spec = &review["spec"];
            assert_eq!(spec["user"], "system:serviceaccount:default:epp-sa");
            let resource = spec["resourceAttributes"]["resource"].as_str().unwrap();
            json!({"status": {"allowed": may(resource)}})
        },
    );
}

async fn look(server: &ApiServer, target: Target) -> (Vec<Finding>, Vec<String>) {
    let installation = Installation {
        client: server.client(),
        namespace: "default".to_owned(),
        target,
        service_account: None,
    };
    let mut report = Report::default();
    let endpoints = check(&installation, &mut report).await;
    let mut bad = report.findings;
    bad.retain(|finding| finding.severity != Severity::Ok);
    let shown = |e: &EndpointSpec| format!("{}#{}", e.address, e.rank);
    (bad, endpoints.iter().map(shown).collect())
}

async fn pool_findings(server: &ApiServer) -> Vec<(Severity, &'static str, String)> {
    let (found, _) = look(server, Target::Pool("pool".to_owned())).await;
    assert!(found.iter().all(|f| f.fix.is_some()));
    found
        .into_iter()
        .map(|f| (f.severity, f.check, f.message))
        .collect()
}

#[tokio::test]
async fn a_healthy_installation_has_no_findings_and_its_endpoints_are_told() {
    let server = healthy().await;
    let (bad, endpoints) = look(&server, Target::Pool("pool".to_owned())).await;
    assert_eq!(bad, []);
    assert_eq!(endpoints, ["10.0.0.1:8000#0", "10.0.0.2:8000#0"]);
}

#[tokio::test]
async fn a_pool_that_is_missing_is_told_from_a_kind_that_is() {
    let server = healthy().await;
    let (found, endpoints) = look(&server, Target::Pool("other".to_owned())).await;
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].check, "pool");
    assert!(found[0].message.contains("[\"pool\"]"), "{:?}", found[0]);
    assert!(endpoints.is_empty());
    server.refuse("inference.networking.k8s.io/v1/inferencepools", 404);
    let found = pool_findings(&server).await;
    assert!(found[0].2.contains("no InferencePool v1 in this cluster"));
}

#[tokio::test]
async fn pods_that_do_not_serve_are_named() {
    let server = healthy().await;
    let mut waiting = pod("b", 2);
    waiting["status"]["conditions"][0]["status"] = json!("False");
    server.apply(waiting);
    let mut strange = pod("a", 1);
    strange["spec"]["containers"] = json!([{"ports": [{"containerPort": 8080}]}]);
    server.apply(strange);
    let found = pool_findings(&server).await;
    let messages: Vec<_> = found.iter().map(|f| f.2.as_str()).collect();
    assert_eq!(
        messages,
        [
            "1 ready, not ready: [\"b\"]",
            "target ports [8000] are not among the declared [8080] of [\"a\"]"
        ]
    );
    server.delete("pods", "a");
    server.delete("pods", "b");
    let found = pool_findings(&server).await;
    assert_eq!(found[0].1, "pods");
    assert_eq!(found[0].2, "the selector matches no pod");
}

#[tokio::test]
async fn what_gateways_complain_of_is_passed_on() {
    let server = healthy().await;
    let mut pool = pool(&[8000]);
    pool["spec"]["endpointPickerRef"] = json!({"name": "gone", "port": {"number": 9002}});
    pool["status"] = json!({"parents": [{
        "parentRef": {"kind": "Gateway", "name": "inference"},
        "conditions": [{"type": "ResolvedRefs", "status": "False", "reason": "InvalidExtensionRef", "message": "no service gone"}],
    }]});
    server.apply(pool);
    let found = pool_findings(&server).await;
    let kinds: Vec<_> = found.iter().map(|f| (f.0, f.1)).collect();
    assert_eq!(
        kinds,
        [
            (Severity::Error, "gateway"),
            (Severity::Error, "picker-service"),
            (Severity::Warning, "rbac")
        ]
    );
    assert_eq!(
        found[0].2,
        "not ResolvedRefs: InvalidExtensionRef no service gone"
    );
}

#[tokio::test]
async fn replicas_must_elect_or_share_nothing() {
    let server = healthy().await;
    server.apply(picker("epp-1", true, &[]));
    let found = pool_findings(&server).await;
    assert_eq!(
        (found[0].0, found[0].1),
        (Severity::Warning, "picker-replicas")
    );
    let elect = ["--ha-enable-leader-election"];
    server.apply(picker("epp-0", true, &elect));
    server.apply(picker("epp-1", false, &elect));
    server.apply(lease("epp-0_1", 0));
    assert_eq!(pool_findings(&server).await, []);
    server.apply(picker("epp-1", true, &elect));
    let found = pool_findings(&server).await;
    assert_eq!(
        (found[0].0, found[0].1),
        (Severity::Error, "picker-replicas")
    );
    for name in ["epp-0", "epp-1"] {
        server.apply(picker(name, false, &elect));
    }
    assert_eq!(pool_findings(&server).await[0].1, "picker-pods");
}

/// The pool's lease, renewed so many seconds ago.
fn lease(holder: &str, age: i64) -> Value {
    let renewed = Timestamp::now() - SignedDuration::from_secs(age);
    json!({
        "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
        "metadata": {"name": "epp-default-pool.llm-d.ai", "namespace": "default"},
        "spec": {"holderIdentity": holder, "leaseDurationSeconds": 15, "renewTime": renewed.to_string()},
    })
}

async fn electing() -> ApiServer {
    let server = healthy().await;
    let elect = ["--ha-enable-leader-election=true"];
    server.apply(picker("epp-0", true, &elect));
    server.apply(picker("epp-1", false, &elect));
    server
}

#[tokio::test(start_paused = true)]
async fn a_lease_must_be_kept_by_a_ready_picker() {
    let server = electing().await;
    let look = async || {
        let found = pool_findings(&server).await;
        assert!(found.len() < 2, "{found:?}");
        found.into_iter().next().map(|(severity, check, message)| {
            assert_eq!(check, "lease");
            (severity, message)
        })
    };
    let says = |found: Option<(Severity, String)>, severity, part: &str| {
        let (seen, message) = found.expect("a finding");
        assert!(
            seen == severity && message.contains(part),
            "{seen:?} {message}"
        );
    };
    says(look().await, Severity::Error, "there is no such lease");
    server.apply(lease("epp-0_abc", 3));
    assert_eq!(look().await, None);
    server.apply(lease("epp-0_abc", 40));
    says(look().await, Severity::Error, "has not renewed it for 40 s");
    server.apply(lease("", 0));
    says(look().await, Severity::Error, "nobody holds it");
    server.apply(lease("epp-1_abc", 3));
    says(look().await, Severity::Warning, "is not ready");
    server.apply(lease("stranger_abc", 3));
    says(look().await, Severity::Warning, "none of the pickers");
    server.refuse("coordination.k8s.io/v1/leases", 403);
    let found = pool_findings(&server).await;
    assert_eq!(
        (found[0].1, found[0].2.as_str()),
        ("kubernetes", "you may not read it")
    );
}

#[tokio::test]
async fn a_leader_whose_clock_is_off_is_a_leader() {
    let server = electing().await;
    server.apply(lease("epp-0_abc", 100));
    // It renews while doctor looks a second time.
    let renew = async {
        eventually("a first look", || {
            let requests = server.requests();
            requests
                .iter()
                .any(|r| r.contains("/leases/epp-default-pool"))
        })
        .await;
        server.apply(lease("epp-0_abc", 98));
    };
    let (found, ()) = tokio::join!(pool_findings(&server), renew);
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!((found[0].0, found[0].1), (Severity::Warning, "lease"));
    assert!(found[0].2.contains("s behind this one"), "{found:?}");
}

#[tokio::test]
async fn every_rank_of_every_pod_of_a_large_pool_is_looked_at() {
    let server = ApiServer::start().await;
    allow(&server, |_| true);
    for n in 0..1201 {
        server.apply(pod(&format!("p{n:04}"), 1));
    }
    let mut waiting = pod("p0700", 1);
    waiting["status"]["conditions"][0]["status"] = json!("False");
    server.apply(waiting);
    // One rank of this pod serves, of that one none, and the last declares other ports.
    let mut half = pod("p0800", 1);
    half["metadata"]["annotations"] = json!({"llm-d.ai/active-ports": "8001"});
    server.apply(half);
    let mut closed = pod("p0900", 1);
    closed["metadata"]["annotations"] = json!({"llm-d.ai/active-ports": "9"});
    server.apply(closed);
    let mut strange = pod("p1200", 7);
    strange["spec"]["containers"] = json!([{"ports": [{"containerPort": 8000}]}]);
    server.apply(strange);
    let target = Target::Selector("app=llm".to_owned(), vec![8000, 8001]);
    let (found, endpoints) = look(&server, target).await;
    // 1201 pods less one that waits and one that is closed, two ranks each, less one.
    assert_eq!(endpoints.len(), 1199 * 2 - 1);
    assert!(endpoints.ends_with(&["10.0.0.7:8000#0".to_owned(), "10.0.0.7:8001#1".to_owned()]));
    let messages: Vec<_> = found.iter().map(|f| f.message.as_str()).collect();
    assert_eq!(
        messages,
        [
            "1200 ready, not ready: [\"p0700\"]",
            "ready, but without an endpoint: [\"p0900\"]",
            "target ports [8001] are not among the declared [8000] of [\"p1200\"]",
            "the picker's service account is not known",
        ]
    );
    let pages = server.requests();
    assert_eq!(pages.iter().filter(|r| r.contains("limit=500")).count(), 3);
}

#[tokio::test]
async fn each_missing_right_has_its_weight_and_command() {
    let server = healthy().await;
    allow(&server, |resource| {
        !matches!(resource, "pods" | "tokenreviews")
    });
    let (found, _) = look(&server, Target::Pool("pool".to_owned())).await;
    let told: Vec<_> = found
        .iter()
        .map(|f| (f.severity, f.message.as_str(), f.fix.as_deref().unwrap()))
        .collect();
    assert_eq!(
        told,
        [
            (
                Severity::Error,
                "may not get,list,watch pods: it has no endpoints",
                "kubectl create role epp-sa-pods -n default --verb=get,list,watch --resource=pods\nkubectl create rolebinding epp-sa-pods -n default --role=epp-sa-pods --serviceaccount=default:epp-sa"
            ),
            (
                Severity::Warning,
                "may not create tokenreviews.authentication.k8s.io: scrapes with a token are refused",
                "kubectl create clusterrole epp-sa-tokenreviews --verb=create --resource=tokenreviews.authentication.k8s.io\nkubectl create clusterrolebinding epp-sa-tokenreviews --clusterrole=epp-sa-tokenreviews --serviceaccount=default:epp-sa"
            ),
        ]
    );
    server.refuse("authorization.k8s.io/v1/subjectaccessreviews", 403);
    let found = pool_findings(&server).await;
    assert_eq!(found.len(), 1);
    assert!(found[0].2.contains("you may not ask"));
}

#[tokio::test]
async fn a_selector_needs_no_pool_and_objects_of_the_old_group_are_told() {
    let server = healthy().await;
    server.apply(json!({
        "apiVersion": "inference.networking.x-k8s.io/v1alpha2", "kind": "InferenceObjective",
        "metadata": {"name": "batch", "namespace": "default"}, "spec": {"priority": -1},
    }));
    let target = Target::Selector("app=llm".to_owned(), vec![8000, 8001]);
    let (found, endpoints) = look(&server, target).await;
    assert_eq!(endpoints.len(), 4);
    let checks: Vec<_> = found.iter().map(|f| f.check).collect();
    assert_eq!(checks, ["objectives", "rbac"]);
    assert!(found[0].message.starts_with("[\"batch\"] are passed over"));
    // Nobody at the other end.
    server.go_down();
    let found = pool_findings(&server).await;
    assert_eq!((found.len(), found[0].1), (1, "kubernetes"));
}

#[test]
fn selectors_travel_in_queries() {
    assert_eq!(encoded("a=b,c in (d)"), "a%3Db%2Cc%20in%20%28d%29");
}
