//! Looks at an installation from outside and says what is wrong with it and how to mend it.
//!
//! Entry point: [`examine`]. It only reads: probes, scrapes, the proxy's admin interface, the Kubernetes
//! API. What it finds is a [`Report`]: each [`Finding`] has a severity, what it is about, and the fix.
//! Does not know the picker's configuration; whoever calls it says where things are.

pub mod certificate;
pub mod endpoints;
pub mod envoy;
pub mod events;
pub mod finding;
pub mod grpc;
pub mod http;
pub mod kubernetes;
pub mod picker;

use std::net::SocketAddr;

use crate::datalayer::EndpointSpec;
pub use finding::{Finding, Report, Severity};

/// What to look at; everything is optional.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// The picker's ports.
    pub picker: picker::Ports,
    /// The model servers.
    pub endpoints: Vec<EndpointSpec>,
    /// How they are scraped.
    pub scrape: endpoints::Scrape,
    /// Where they publish KV events.
    pub events: Option<events::Events>,
    /// Envoy's admin interface.
    pub envoy_admin: Option<SocketAddr>,
    /// The cluster it runs in.
    pub installation: Option<kubernetes::Installation>,
    /// Ask the cluster's pods too; they answer only inside its network.
    pub probe_pods: bool,
}

impl Default for endpoints::Scrape {
    fn default() -> Self {
        Self {
            tls: false,
            path: "/metrics".to_owned(),
        }
    }
}

/// Looks at all of it, in the order of a request's way: proxy, picker, model servers.
pub async fn examine(plan: &Plan) -> Report {
    let mut report = Report::default();
    // What the picker speaks decides what the proxy has to.
    let mut picker_report = Report::default();
    let picker_tls = picker::check(&plan.picker, &mut picker_report).await;
    if let Some(admin) = plan.envoy_admin {
        envoy::check(admin, picker_tls, &mut report).await;
    }
    report.append(picker_report);
    let mut endpoints = plan.endpoints.clone();
    if let Some(installation) = &plan.installation {
        let pods = kubernetes::check(installation, &mut report).await;
        if plan.probe_pods {
            endpoints.extend(pods);
        }
    }
    endpoints::check(&endpoints, &plan.scrape, &mut report).await;
    if let Some(events) = plan.events {
        events::check(&endpoints, events, &mut report).await;
    }
    report
}
