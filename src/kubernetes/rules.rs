//! Objectives and model rewrites from the API server.
//!
//! Both kinds exist in two groups. Where the cluster has a kind in `llm-d.ai`, objects of the older
//! group do not count; a group that appears later takes over without a restart.

use std::time::Duration;

use hashbrown::HashMap;
use kube::Client;
use serde::Deserialize;
use tokio::sync::mpsc;

use super::objects::{LEGACY_GROUP, LLM_D_GROUP, Meta, Object};
use super::watch::{ApiContact, Collection, UPDATE_QUEUE, Update, Watcher};
use crate::control::rules::{
    NamedRewrite, ObjectiveSpec, PoolRef, RewriteSpec, SharedRules, TrafficRules,
};

/// Objects of one kind and group that are kept; further ones are left out, with a warning.
const MAX_OBJECTS: usize = 10_000;
/// Least time between two changes of the rules.
const LEAST_INTERVAL: Duration = Duration::from_millis(50);

/// An InferenceObjective.
#[derive(Debug, Clone, Deserialize)]
struct Objective {
    metadata: Meta,
    #[serde(default)]
    spec: ObjectiveSpec,
}

/// An InferenceModelRewrite.
#[derive(Debug, Clone, Deserialize)]
struct ModelRewrite {
    metadata: Meta,
    #[serde(default)]
    spec: RewriteSpec,
}

impl Object for Objective {
    fn meta(&self) -> &Meta {
        &self.metadata
    }
}

impl Object for ModelRewrite {
    fn meta(&self) -> &Meta {
        &self.metadata
    }
}

/// Which pool the rules must be for.
#[derive(Debug, Clone)]
pub struct RulesOf {
    /// Namespace of the pool and its objects.
    pub namespace: String,
    /// Group that references to the pool name.
    pub pool_group: String,
    /// Name of the pool.
    pub pool: String,
}

/// Keeps `rules` equal to what the objects of the namespace say, until dropped.
pub async fn follow(client: Client, of: RulesOf, contact: ApiContact, rules: SharedRules) {
    let start = Start {
        client,
        namespace: of.namespace.clone(),
        contact,
    };
    let mut objectives: Both<Objective> = start.both("inferenceobjectives");
    let mut rewrites: Both<ModelRewrite> = start.both("inferencemodelrewrites");
    loop {
        let more = tokio::select! {
            more = objectives.next() => more,
            more = rewrites.next() => more,
        };
        if !more {
            return;
        }
        publish(&of, &objectives, &rewrites, &rules);
        // What arrives meanwhile waits in the queues and is published together.
        tokio::time::sleep(LEAST_INTERVAL).await;
    }
}

fn publish(
    of: &RulesOf,
    objectives: &Both<Objective>,
    rewrites: &Both<ModelRewrite>,
    rules: &SharedRules,
) {
    let ours = |pool: &Option<PoolRef>| {
        let pool = pool.as_ref();
        pool.is_some_and(|pool| pool.is(&of.pool_group, &of.pool))
    };
    let objectives = objectives.current().filter(|o| ours(&o.spec.pool_ref));
    let objectives = objectives.map(|o| (o.metadata.name.clone(), o.spec.clone()));
    let rewrites = rewrites.current().filter(|r| ours(&r.spec.pool_ref));
    let mut rewrites: Vec<_> = rewrites
        .map(|rewrite| NamedRewrite {
            name: rewrite.metadata.name.clone(),
            created: rewrite.metadata.creation_timestamp.clone(),
            spec: rewrite.spec.clone(),
        })
        .collect();
    // Of the same age the name decides, so that all replicas agree.
    rewrites.sort_by(|a, b| a.name.cmp(&b.name));
    let (next, problems) = TrafficRules::new(objectives, rewrites);
    for problem in problems {
        tracing::warn!(problem, "InferenceModelRewrite");
    }
    rules.store(next.into());
}

struct Start {
    client: Client,
    namespace: String,
    contact: ApiContact,
}

impl Start {
    fn both<K: Object>(&self, resource: &'static str) -> Both<K> {
        Both {
            resource,
            current: self.one(resource, LLM_D_GROUP),
            legacy: self.one(resource, LEGACY_GROUP),
            warned: false,
        }
    }

    fn one<K: Object>(&self, resource: &'static str, group: &'static str) -> Collected<K> {
        let collection = Collection {
            resource,
            group,
            version: "v1alpha2",
            namespace: self.namespace.clone(),
            labels: None,
            fields: None,
            optional: true,
        };
        let (updates, receiver) = mpsc::channel(UPDATE_QUEUE);
        let watcher = Watcher::new(self.client.clone(), collection, &self.contact);
        tokio::spawn(watcher.run(updates));
        Collected {
            updates: receiver,
            objects: HashMap::new(),
            listed: false,
        }
    }
}

/// One kind in both groups.
struct Both<K> {
    resource: &'static str,
    current: Collected<K>,
    legacy: Collected<K>,
    warned: bool,
}

impl<K: Object> Both<K> {
    /// Takes what arrived; false when nothing will any more. Cancel-safe.
    async fn next(&mut self) -> bool {
        let more = tokio::select! {
            more = self.current.next() => more,
            more = self.legacy.next() => more,
        };
        if self.current.listed && !self.legacy.objects.is_empty() && !self.warned {
            self.warned = true;
            tracing::warn!(
                resource = self.resource,
                "objects of {LEGACY_GROUP} are ignored beside those of {LLM_D_GROUP}"
            );
        }
        more
    }

    fn current(&self) -> impl Iterator<Item = &K> {
        let counts = if self.current.listed {
            &self.current
        } else {
            &self.legacy
        };
        counts.objects.values()
    }
}

/// One kind in one group.
struct Collected<K> {
    updates: mpsc::Receiver<Update<K>>,
    objects: HashMap<String, K>,
    /// The cluster has it.
    listed: bool,
}

impl<K: Object> Collected<K> {
    async fn next(&mut self) -> bool {
        let Some(mut update) = self.updates.recv().await else {
            return false;
        };
        loop {
            self.take(update);
            match self.updates.try_recv() {
                Ok(another) => update = another,
                Err(_) => return true,
            }
        }
    }

    fn take(&mut self, update: Update<K>) {
        match update {
            Update::Listed(objects) => {
                self.listed = true;
                self.objects.clear();
                for object in objects {
                    self.keep(object);
                }
            }
            Update::Applied(object) => self.keep(object),
            Update::Deleted(object) => {
                self.objects.remove(&object.meta().name);
            }
            Update::Absent => {}
        }
    }

    fn keep(&mut self, object: K) {
        let name = object.meta().name.clone();
        if self.objects.len() >= MAX_OBJECTS && !self.objects.contains_key(&name) {
            tracing::warn!(name, "left out: more than {MAX_OBJECTS} objects");
            return;
        }
        self.objects.insert(name, object);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubernetes::testing::{ApiServer, eventually};
    use serde_json::{Value, json};
    use tokio_util::task::AbortOnDropHandle;

    #[expect(clippy::needless_pass_by_value, reason = "calls read better")]
    fn object(group: &str, kind: &str, name: &str, spec: Value) -> Value {
        json!({
            "apiVersion": format!("{group}/v1alpha2"), "kind": kind,
            "metadata": {"name": name, "uid": name, "creationTimestamp": "2026-01-01T00:00:00Z"},
            "spec": spec,
        })
    }

    fn objective(group: &str, name: &str, priority: i32, pool: &str) -> Value {
        let spec = json!({"priority": priority, "poolRef": {"name": pool}});
        object(group, "InferenceObjective", name, spec)
    }

    fn rewrite(name: &str, model: &str, target: &str) -> Value {
        let spec = json!({
            "poolRef": {"group": "inference.networking.k8s.io", "kind": "InferencePool", "name": "pool"},
            "rules": [{"matches": [{"model": {"type": "Exact", "value": model}}],
                       "targets": [{"modelRewrite": target}]}],
        });
        object(LLM_D_GROUP, "InferenceModelRewrite", name, spec)
    }

    fn start(server: &ApiServer) -> (SharedRules, AbortOnDropHandle<()>) {
        let rules = SharedRules::default();
        let of = RulesOf {
            namespace: "default".to_owned(),
            pool_group: "inference.networking.k8s.io".to_owned(),
            pool: "pool".to_owned(),
        };
        let task = follow(server.client(), of, ApiContact::default(), rules.clone());
        (rules, AbortOnDropHandle::new(tokio::spawn(task)))
    }

    #[tokio::test]
    async fn objects_of_the_pool_count_and_are_followed() {
        let server = ApiServer::start().await;
        server.apply(objective(LLM_D_GROUP, "batch", -5, "pool"));
        server.apply(objective(LLM_D_GROUP, "foreign", 9, "other"));
        server.apply(rewrite("canary", "food", "food-v2"));
        let (rules, _task) = start(&server);
        let target = |model: &str| {
            let rules = rules.load();
            let rewrite = rules.rewrite(model, &mut fastrand::Rng::new());
            rewrite.map(|r| r.target.to_owned())
        };
        eventually("both", || {
            rules.load().priority("batch") == -5 && target("food").is_some()
        })
        .await;
        assert_eq!(rules.load().priority("foreign"), 0);
        assert_eq!(target("food").as_deref(), Some("food-v2"));
        server.apply(objective(LLM_D_GROUP, "batch", 3, "pool"));
        server.delete("llm-d.ai/v1alpha2/inferencemodelrewrites", "canary");
        eventually("the change", || {
            rules.load().priority("batch") == 3 && target("food").is_none()
        })
        .await;
    }

    #[tokio::test]
    async fn the_older_group_counts_only_without_the_newer() {
        let server = ApiServer::start().await;
        server.refuse("llm-d.ai/v1alpha2/inferenceobjectives", 404);
        server.apply(objective(LEGACY_GROUP, "batch", -1, "pool"));
        let (rules, _task) = start(&server);
        eventually("the older one", || rules.load().priority("batch") == -1).await;
        let server = ApiServer::start().await;
        server.apply(objective(LEGACY_GROUP, "batch", -1, "pool"));
        server.apply(objective(LLM_D_GROUP, "online", 1, "pool"));
        let (rules, _task) = start(&server);
        eventually("the newer one", || rules.load().priority("online") == 1).await;
        let listed =
            || server.watches("inference.networking.x-k8s.io/v1alpha2/inferenceobjectives") == 1;
        eventually("the older one is seen too", listed).await;
        tokio::time::sleep(LEAST_INTERVAL * 3).await;
        assert_eq!(rules.load().priority("batch"), 0);
    }
}
