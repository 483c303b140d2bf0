//! What a process in Kubernetes has beside the request path.

use std::sync::Arc;

use anyhow::Context;

use super::options::ServeOptions;
use crate::config::ResolvedConfig;
use crate::datalayer::discovery;
use crate::kubernetes::watch::ApiContact;
use crate::kubernetes::{self, KubernetesDiscovery};

/// The process's connection to Kubernetes and what follows from it.
#[derive(Debug)]
pub(super) struct ControlPlane {
    discovery: Arc<KubernetesDiscovery>,
    contact: ApiContact,
}

impl ControlPlane {
    /// Makes the client that the flags ask for; `None` when endpoints come from elsewhere. The API
    /// server is not asked yet: it may be away while we start.
    pub(super) async fn connect(
        options: &ServeOptions,
        config: &ResolvedConfig,
    ) -> anyhow::Result<Option<Self>> {
        let elsewhere = options.endpoints.is_some() || config.discovery.is_some();
        let Some(pool) = options.kubernetes.as_ref().filter(|_| !elsewhere) else {
            return Ok(None);
        };
        let client = kubernetes::client(&pool.client)
            .await
            .context("--pool-name and --endpoint-selector need Kubernetes")?;
        let contact = ApiContact::default();
        let discovery = KubernetesDiscovery::new(
            client,
            pool.namespace.clone(),
            pool.source.clone(),
            contact.clone(),
        );
        Ok(Some(Self {
            discovery: Arc::new(discovery),
            contact,
        }))
    }

    /// Where endpoints come from.
    pub(super) fn discovery(&self) -> Arc<dyn discovery::Discovery> {
        Arc::clone(&self.discovery) as Arc<dyn discovery::Discovery>
    }

    /// Whether the API server is heard.
    pub(super) fn contact(&self) -> ApiContact {
        self.contact.clone()
    }
}
