//! What a process in Kubernetes has beside the request path, and the rules of one that is not there.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use kube::Client;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::health::ProtocolCheck;
use super::options::{KubernetesOptions, ServeOptions};
use crate::config::{self, ResolvedConfig};
use crate::control::Director;
use crate::control::rules::{self, SharedRules};
use crate::datalayer::discovery;
use crate::kubernetes::leading::{LeaderDiscovery, Leadership};
use crate::kubernetes::lease::{self, Election};
use crate::kubernetes::review::Reviewer;
use crate::kubernetes::rules::RulesOf;
use crate::kubernetes::watch::ApiContact;
use crate::kubernetes::{self, KubernetesDiscovery, PoolSource};
use crate::request::AppProtocol;
use crate::telemetry::server::Gate;

/// How often `--rules-file` is read.
const RULES_INTERVAL: Duration = Duration::from_millis(500);

/// The process's connection to Kubernetes and what follows from it.
pub(super) struct ControlPlane {
    client: Client,
    options: KubernetesOptions,
    metrics_endpoint_auth: bool,
    discovery: Arc<KubernetesDiscovery>,
    contact: ApiContact,
    election: Option<Candidate>,
    /// Set where only the leader fills its pool and reads rules.
    only_leading: Option<Leadership>,
}

/// What this process brings to an election that has not begun.
struct Candidate {
    election: Election,
    leads: watch::Receiver<bool>,
}

impl ControlPlane {
    /// Makes the client that the flags ask for; `None` when endpoints come from elsewhere. The API
    /// server is not asked yet: it may be away while we start.
    pub(super) async fn connect(
        options: &ServeOptions,
        config: &ResolvedConfig,
        candidacy: &CancellationToken,
    ) -> anyhow::Result<Option<Self>> {
        let elsewhere = options.endpoints.is_some() || config.discovery.is_some();
        let Some(pool) = options.kubernetes.as_ref().filter(|_| !elsewhere) else {
            if options
                .kubernetes
                .as_ref()
                .is_some_and(|k| k.leader_election)
            {
                tracing::warn!("no leader election: the endpoints do not come from Kubernetes");
            }
            return Ok(None);
        };
        let client = kubernetes::client(&pool.client)
            .await
            .context("--pool-name and --endpoint-selector need Kubernetes")?;
        let contact = ApiContact::default();
        let discovery = KubernetesDiscovery::new(
            client.clone(),
            pool.namespace.clone(),
            pool.source.clone(),
            contact.clone(),
        );
        let election = pool.leader_election.then(|| {
            let identity = lease::identity(&pool.pod_name);
            let name = &options.pool_name;
            let election = Election::new(client.clone(), &pool.namespace, name, identity);
            let leads = election.leads();
            Candidate { election, leads }
        });
        let only_leading = election.as_ref().filter(|_| !config.populate_standbys);
        let only_leading =
            only_leading.map(|own| Leadership::new(own.leads.clone(), candidacy.clone()));
        Ok(Some(Self {
            client,
            options: pool.clone(),
            metrics_endpoint_auth: options.metrics_endpoint_auth,
            discovery: Arc::new(discovery),
            contact,
            election,
            only_leading,
        }))
    }

    /// Where endpoints come from.
    pub(super) fn discovery(&self) -> Arc<dyn discovery::Discovery> {
        let all = Arc::clone(&self.discovery) as Arc<dyn discovery::Discovery>;
        match &self.only_leading {
            Some(leadership) => Arc::new(LeaderDiscovery::new(all, leadership.clone())),
            None => all,
        }
    }

    /// Whether the API server is heard.
    pub(super) fn contact(&self) -> ApiContact {
        self.contact.clone()
    }

    /// Keeps `rules` as the objects of the pool say. A selector has no pool, and no custom resources.
    pub(super) fn follow_rules(
        &self,
        rules: &SharedRules,
        tasks: &TaskTracker,
        shutdown: &CancellationToken,
    ) {
        let PoolSource::Pool { name, .. } = &self.options.source else {
            return;
        };
        let of = RulesOf {
            namespace: self.options.namespace.clone(),
            pool_group: self.options.pool_group.clone(),
            pool: name.clone(),
        };
        let (client, contact) = (self.client.clone(), self.contact());
        let (rules, shutdown) = (Arc::clone(rules), shutdown.clone());
        let only_leading = self.only_leading.clone();
        tasks.spawn(async move {
            let follow = || {
                let (client, of, contact) = (client.clone(), of.clone(), contact.clone());
                kubernetes::rules::follow(client, of, contact, Arc::clone(&rules))
            };
            let forget = || rules.store(Arc::default());
            let followed = async {
                match only_leading {
                    Some(leadership) => leadership.run(follow, forget).await,
                    None => follow().await,
                }
            };
            shutdown.run_until_cancelled(followed).await;
        });
    }

    /// Stands for election if the flags say so, until the candidacy ends; tells whether this process
    /// leads.
    pub(super) fn take_part_in_election(
        &mut self,
        tasks: &TaskTracker,
        candidacy: &CancellationToken,
    ) -> Option<watch::Receiver<bool>> {
        let Candidate { election, leads } = self.election.take()?;
        tasks.spawn(election.run(candidacy.clone()));
        Some(leads)
    }

    /// True while every parser reads what the pool's ports speak, or the pool does not say.
    pub(super) fn protocol_check(&self, director: &Arc<Director>) -> ProtocolCheck {
        let (pool, director) = (self.discovery.pool(), Arc::clone(director));
        Box::new(move || {
            let pool = pool.borrow();
            let protocol = pool.as_ref().and_then(|pool| pool.app_protocol.as_deref());
            match protocol {
                None | Some("") => true,
                Some("http") => director.accepts(AppProtocol::Http),
                Some("kubernetes.io/h2c") => director.accepts(AppProtocol::H2c),
                // Of a protocol that nobody declares nothing is known to be read.
                Some(_) => false,
            }
        })
    }

    /// Stands before the metrics port, unless the flags say otherwise.
    pub(super) fn metrics_gate(&self) -> Option<Arc<dyn Gate>> {
        let reviewer = || Arc::new(Reviewer::new(self.client.clone())) as Arc<dyn Gate>;
        self.metrics_endpoint_auth.then(reviewer)
    }
}

/// Loads `--rules-file` and follows it; a file that cannot be read later changes nothing.
pub(super) fn follow_rules(
    path: &Path,
    rules: &SharedRules,
    tasks: &TaskTracker,
    shutdown: &CancellationToken,
) -> anyhow::Result<()> {
    let context = || format!("--rules-file {}", path.display());
    let text = config::read_file(path).with_context(context)?;
    let first = rules::parse_file(&text).map_err(anyhow::Error::msg);
    rules.store(first.with_context(context)?.into());
    if !path.is_file() {
        // A pipe is read once.
        return Ok(());
    }
    let (path, rules, shutdown) = (path.to_owned(), Arc::clone(rules), shutdown.clone());
    tasks.spawn(async move {
        let mut used = text;
        let mut last = used.clone();
        let follow = async {
            loop {
                tokio::time::sleep(RULES_INTERVAL).await;
                let Ok(now) = config::read_file(&path) else {
                    continue;
                };
                // Two reads must agree, so that a file is not taken half written.
                let settled = now == last;
                last.clone_from(&now);
                if !settled || now == used {
                    continue;
                }
                match rules::parse_file(&now) {
                    Ok(next) => {
                        rules.store(next.into());
                        tracing::info!(file = %path.display(), "rules reloaded");
                    }
                    Err(problem) => {
                        tracing::error!(file = %path.display(), problem, "rules not reloaded, the old ones stay");
                    }
                }
                used = now;
            }
        };
        shutdown.run_until_cancelled(follow).await;
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_rules_file_is_followed_and_a_broken_one_changes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("rules.yaml");
        let (tasks, shutdown) = (TaskTracker::new(), CancellationToken::new());
        let rules = SharedRules::default();
        let priority = |n: i32| {
            format!("kind: InferenceObjective\nmetadata: {{name: a}}\nspec: {{priority: {n}}}\n")
        };
        assert!(
            follow_rules(&path, &rules, &tasks, &shutdown).is_err(),
            "no file"
        );
        std::fs::write(&path, "kind: Pod").unwrap();
        assert!(follow_rules(&path, &rules, &tasks, &shutdown).is_err());
        std::fs::write(&path, priority(1)).unwrap();
        follow_rules(&path, &rules, &tasks, &shutdown).unwrap();
        assert_eq!(rules.load().priority("a"), 1);
        for (text, expected) in [
            (priority(2), 2),
            ("kind: Pod".to_owned(), 2),
            (priority(3), 3),
        ] {
            std::fs::write(&path, text).unwrap();
            tokio::time::sleep(RULES_INTERVAL * 3).await;
            assert_eq!(rules.load().priority("a"), expected);
        }
        shutdown.cancel();
        tasks.close();
        tasks.wait().await;
    }
}
