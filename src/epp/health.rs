//! gRPC health on the ext_proc port and on its own: one state, many names.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::watch;
use tonic::{Request, Response, Status};

use crate::datalayer::EndpointStore;
use crate::extproc::proto::health::health_check_response::ServingStatus;
use crate::extproc::proto::health::health_server::Health;
use crate::extproc::proto::health::{
    HealthCheckRequest, HealthCheckResponse, HealthListRequest, HealthListResponse,
};
use crate::kubernetes::watch::ApiContact;

/// The service name Envoy's health check asks for.
const EXT_PROC_SERVICE: &str = "envoy.service.ext_proc.v3.ExternalProcessor";

/// Name under which it is told whether what is known from the Kubernetes API is up to date. A server
/// that is away does not make the process unready: its last known state is better than none.
const KUBERNETES: &str = "kubernetes";

/// Whether the parsers fit what the pool's ports speak.
pub type ProtocolCheck = Box<dyn Fn() -> bool + Send + Sync>;

/// Whether this process should get traffic.
pub struct HealthState {
    store: Arc<EndpointStore>,
    draining: AtomicBool,
    leads: Option<watch::Receiver<bool>>,
    protocol: Option<ProtocolCheck>,
    contact: Option<ApiContact>,
}

impl std::fmt::Debug for HealthState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HealthState")
            .field("draining", &self.draining)
            .field("leads", &self.leads)
            .finish_non_exhaustive()
    }
}

impl HealthState {
    /// Not draining; ready once `store` is synced.
    pub fn new(store: Arc<EndpointStore>) -> Self {
        Self {
            store,
            draining: AtomicBool::new(false),
            leads: None,
            protocol: None,
            contact: None,
        }
    }

    /// Ready only while `leads` says so; without an election always.
    #[must_use]
    pub fn elected(mut self, leads: Option<watch::Receiver<bool>>) -> Self {
        self.leads = leads;
        self
    }

    /// Ready only while `protocol` holds, and telling of `contact`.
    #[must_use]
    pub fn in_kubernetes(mut self, protocol: ProtocolCheck, contact: ApiContact) -> Self {
        self.protocol = Some(protocol);
        self.contact = Some(contact);
        self
    }

    /// Reports NOT_SERVING from now on.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Release);
    }

    /// True when the pool was seen and fits the parsers, nobody else leads and no drain has begun.
    pub fn is_ready(&self) -> bool {
        self.store.is_synced()
            && !self.draining.load(Ordering::Acquire)
            && self.leads.as_ref().is_none_or(|leads| *leads.borrow())
            && self.protocol.as_ref().is_none_or(|fits| fits())
    }

    /// `liveness` holds as long as the process answers: a drain or a pool that is not there yet must
    /// not get the process killed. Other names follow readiness, except that with an election those
    /// nobody knows are unknown, as the reference has it.
    fn status(&self, service: &str) -> ServingStatus {
        let serving = match (service, &self.contact) {
            ("liveness", _) => true,
            (KUBERNETES, Some(contact)) => contact.is_complete(),
            ("" | "readiness" | EXT_PROC_SERVICE, _) => self.is_ready(),
            _ if self.leads.is_some() => return ServingStatus::ServiceUnknown,
            _ => self.is_ready(),
        };
        if serving {
            ServingStatus::Serving
        } else {
            ServingStatus::NotServing
        }
    }
}

/// The `grpc.health.v1.Health` service.
#[derive(Debug, Clone)]
pub struct HealthService(pub Arc<HealthState>);

#[tonic::async_trait]
impl Health for HealthService {
    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        let status = self.0.status(&request.get_ref().service).into();
        Ok(Response::new(HealthCheckResponse { status }))
    }

    type WatchStream = futures_util::stream::Empty<Result<HealthCheckResponse, Status>>;

    async fn watch(
        &self,
        _: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        Err(Status::unimplemented("poll Check instead"))
    }

    async fn list(
        &self,
        _: Request<HealthListRequest>,
    ) -> Result<Response<HealthListResponse>, Status> {
        let statuses: HashMap<_, _> = ["", "liveness", "readiness", EXT_PROC_SERVICE]
            .into_iter()
            .map(|name| {
                (
                    name.to_owned(),
                    HealthCheckResponse {
                        status: self.0.status(name).into(),
                    },
                )
            })
            .collect();
        Ok(Response::new(HealthListResponse { statuses }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readiness_needs_a_synced_pool_and_no_drain() {
        let store = Arc::new(EndpointStore::default());
        let state = HealthState::new(Arc::clone(&store));
        let names = [
            "",
            "readiness",
            EXT_PROC_SERVICE,
            "inference-extension",
            "anything",
        ];
        let all = |wanted| names.iter().all(|name| state.status(name) == wanted);
        assert!(all(ServingStatus::NotServing));
        store.replace(Vec::new());
        assert!(all(ServingStatus::Serving));
        state.drain();
        assert!(all(ServingStatus::NotServing));
        assert_eq!(state.status("liveness"), ServingStatus::Serving);
    }

    #[test]
    fn with_an_election_only_the_leader_is_ready_and_everybody_lives() {
        let store = Arc::new(EndpointStore::default());
        store.replace(Vec::new());
        let leads = watch::Sender::new(false);
        let state = HealthState::new(store).elected(Some(leads.subscribe()));
        for (leading, ready) in [
            (false, ServingStatus::NotServing),
            (true, ServingStatus::Serving),
            (false, ServingStatus::NotServing),
        ] {
            leads.send_replace(leading);
            for name in ["", "readiness", EXT_PROC_SERVICE] {
                assert_eq!(state.status(name), ready, "{name}");
            }
            assert_eq!(state.status("liveness"), ServingStatus::Serving);
            assert_eq!(
                state.status("inference-extension"),
                ServingStatus::ServiceUnknown
            );
        }
    }

    #[test]
    fn a_protocol_the_parsers_do_not_read_is_not_served() {
        let store = Arc::new(EndpointStore::default());
        store.replace(Vec::new());
        let fits = Arc::new(AtomicBool::new(true));
        let own = Arc::clone(&fits);
        let check = Box::new(move || own.load(Ordering::Relaxed));
        let state = HealthState::new(store).in_kubernetes(check, ApiContact::default());
        assert!(state.is_ready());
        assert_eq!(state.status(KUBERNETES), ServingStatus::Serving);
        fits.store(false, Ordering::Relaxed);
        assert!(!state.is_ready());
        assert_eq!(state.status("liveness"), ServingStatus::Serving);
    }
}
