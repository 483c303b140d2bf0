//! Replicas of one pool as processes, in front of the scripted API server: who leads, what the others
//! have, and in which order a leader leaves.

use std::process::Command;
use std::time::Duration;

use pinpod::demo::processes::Picker;
use pinpod::doctor::grpc::Channel;
use pinpod::extproc::proto::health::health_check_response::ServingStatus;
use serde_json::Value;
use tokio::time::Instant;

use super::api_server::{ApiServer, pod, pool};
use super::drop_in::{destination, get, local};
use super::process::program;

const LEASES: &str = "coordination.k8s.io/v1/leases";
const LEASE: &str = "epp-default-pool.llm-d.ai";
const HEAD: &str = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n";

/// A pool of one pod and what its replicas need to find it.
struct Cluster {
    server: ApiServer,
    directory: tempfile::TempDir,
}

struct Replica {
    picker: Picker,
    channel: Channel,
}

impl Cluster {
    async fn start() -> Self {
        let server = ApiServer::start().await;
        server.apply(pool(&[8000]));
        server.apply(pod("a", 1));
        let directory = tempfile::tempdir().unwrap();
        let kubeconfig = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts:\n- {{name: c, context: {{cluster: c, user: u}}}}\nclusters:\n- {{name: c, cluster: {{server: \"http://{}\"}}}}\nusers:\n- {{name: u, user: {{}}}}\n",
            server.address()
        );
        std::fs::write(directory.path().join("kubeconfig"), kubeconfig).unwrap();
        Self { server, directory }
    }

    async fn replica(&self, config: &str) -> Replica {
        let flags = [
            format!(
                "--kubeconfig={}/kubeconfig",
                self.directory.path().display()
            ),
            "--pool-name=pool".to_owned(),
            "--pool-namespace=default".to_owned(),
            "--ha-enable-leader-election".to_owned(),
            "--metrics-endpoint-auth=false".to_owned(),
            // Ended sooner, by a second signal.
            "--drain-timeout=60s".to_owned(),
            format!("--config-text={config}"),
        ];
        let picker = Picker::start(program(), &flags, self.directory.path()).await;
        let picker = picker.unwrap();
        let channel = Channel::connect(local(picker.grpc), false).await.unwrap();
        Replica { picker, channel }
    }

    fn holder(&self) -> String {
        let lease = self.server.get(LEASES, LEASE).unwrap();
        lease["spec"]["holderIdentity"].as_str().unwrap().to_owned()
    }
}

impl Replica {
    async fn serves(&self, service: &str) -> bool {
        self.channel.health(service).await.unwrap() == ServingStatus::Serving
    }

    /// The endpoints that it knows.
    async fn endpoints(&self) -> Vec<String> {
        let (status, text) = get(self.picker.metrics, "/debug/plugins/state").await;
        assert_eq!(status, 200);
        let state: Value = serde_json::from_str(&text).unwrap();
        let known = state["plugins"]["inflight-load-producer"]["state"].as_object();
        known.unwrap().keys().cloned().collect()
    }

    fn terminate(&self) {
        let pid = self.picker.process.id().to_string();
        let sent = Command::new("kill").args(["-TERM", &pid]).status();
        assert!(sent.unwrap().success());
    }

    /// The status it ended with; `None` while it runs.
    fn ended(&mut self) -> Option<String> {
        self.picker.process.check().err().map(|e| e.to_string())
    }
}

async fn eventually<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition().await {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_gives_the_lease_back_first_and_serves_on_until_it_ends() {
    let cluster = Cluster::start().await;
    let mut first = cluster.replica(HEAD).await;
    eventually("the first leads", || first.serves("readiness")).await;
    let leader = cluster.holder();
    let second = cluster.replica(HEAD).await;
    eventually("the second has the pool", async || {
        second.endpoints().await.len() == 1
    })
    .await;
    assert!(second.serves("liveness").await && !second.serves("readiness").await);
    // Only readiness keeps traffic away from it.
    assert_eq!(destination(&second.channel).await, "10.0.0.1:8000");

    first.terminate();
    eventually("not ready", async || !first.serves("readiness").await).await;
    assert!(first.serves("liveness").await);
    eventually("the lease is given back", async || {
        cluster.holder() != leader
    })
    .await;
    eventually("the second leads", || second.serves("readiness")).await;
    let lease = cluster.server.get(LEASES, LEASE).unwrap();
    assert_eq!(lease["spec"]["leaseTransitions"], 1);
    // The first drains all the while, and goes on following the pool.
    cluster.server.apply(pod("b", 2));
    eventually("both see a new pod", async || {
        first.endpoints().await.len() == 2 && second.endpoints().await.len() == 2
    })
    .await;
    assert!(!destination(&first.channel).await.is_empty());
    assert_eq!(first.ended(), None);
    first.terminate();
    let mut status = None;
    eventually("the first ends", || {
        status = first.ended();
        std::future::ready(status.is_some())
    })
    .await;
    assert!(
        status.as_ref().unwrap().contains("exit status: 0"),
        "{status:?}"
    );
    assert!(second.serves("readiness").await);
}

#[tokio::test(flavor = "multi_thread")]
async fn with_the_gate_off_a_standby_keeps_and_asks_nothing_until_it_leads() {
    let cluster = Cluster::start().await;
    let config = format!("{HEAD}featureGates: [haPopulateNonLeaderDatastore=false]\n");
    let first = cluster.replica(&config).await;
    eventually("the first leads", || first.serves("readiness")).await;
    let second = cluster.replica(&config).await;
    eventually("the second waits for the lease", async || {
        let asked = cluster.server.requests();
        let asked = asked.iter().filter(|r| {
            r.contains(&format!(
                "GET /apis/coordination.k8s.io/v1/namespaces/default/leases/{LEASE}"
            ))
        });
        asked.count() > 4
    })
    .await;
    assert!(second.endpoints().await.is_empty() && second.serves("liveness").await);
    let follows = |resource: &str| cluster.server.watches(resource);
    let objectives = "llm-d.ai/v1alpha2/inferenceobjectives";
    assert_eq!((follows("pods"), follows(objectives)), (1, 1));
    first.terminate();
    eventually("the second leads with the pool", async || {
        second.serves("readiness").await && second.endpoints().await.len() == 1
    })
    .await;
    assert_eq!(destination(&second.channel).await, "10.0.0.1:8000");
    // What still reaches the first is still served.
    assert_eq!(destination(&first.channel).await, "10.0.0.1:8000");
}
