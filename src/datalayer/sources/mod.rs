//! Data sources: what is fetched from endpoints, or told about them.
//!
//! A polling source says where an endpoint's answer is fetched ([`HttpSource`]) and what kind of
//! answer it is ([`Payload`]); [`super::scrape`] does the fetching. A notification source only names
//! what its extractors follow.

mod dcgm;
mod endpoint_notification;
mod http;
mod k8s_notification;
mod metrics;
mod models;
mod multicluster_metrics;

use std::fmt::Debug;

pub use dcgm::DcgmDataSource;
pub use endpoint_notification::EndpointNotificationSource;
pub use http::HttpSource;
pub use k8s_notification::K8sNotificationSource;
pub use metrics::MetricsDataSource;
pub use models::ModelsDataSource;
pub use multicluster_metrics::MulticlusterMetricsDataSource;

/// What a source delivers. An extractor fits a source when it reads the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Payload {
    /// Prometheus text, of an engine, a GPU exporter or another picker.
    Exposition,
    /// An OpenAI model list.
    Models,
    /// Endpoints joining and leaving the pool.
    Endpoints,
    /// Kubernetes objects of one kind.
    Objects(ObjectKind),
}

/// Group, version and kind of a Kubernetes object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectKind {
    /// Empty for the core group.
    pub group: String,
    /// For example `v1`.
    pub version: String,
    /// For example `Pod`.
    pub kind: String,
}

impl ObjectKind {
    /// True for the core `v1` pods.
    pub fn is_pod(&self) -> bool {
        self.group.is_empty() && self.version == "v1" && self.kind == "Pod"
    }
}

impl std::fmt::Display for Payload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exposition => f.write_str("Prometheus text"),
            Self::Models => f.write_str("model lists"),
            Self::Endpoints => f.write_str("endpoint events"),
            Self::Objects(of) => write!(f, "{}/{} {} objects", of.group, of.version, of.kind),
        }
    }
}

/// A source of the data layer.
pub trait DataSource: Send + Sync + Debug {
    /// What it delivers.
    fn payload(&self) -> Payload;

    /// Where to fetch; `None` for a source that is told.
    fn http(&self) -> Option<&HttpSource> {
        None
    }
}
