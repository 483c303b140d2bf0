//! gRPC health on the ext_proc port and on its own: one state, many names.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tonic::{Request, Response, Status};

use crate::datalayer::EndpointStore;
use crate::extproc::proto::health::health_check_response::ServingStatus;
use crate::extproc::proto::health::health_server::Health;
use crate::extproc::proto::health::{
    HealthCheckRequest, HealthCheckResponse, HealthListRequest, HealthListResponse,
};

/// The service name Envoy's health check asks for.
const EXT_PROC_SERVICE: &str = "envoy.service.ext_proc.v3.ExternalProcessor";

/// Whether this process should get traffic.
#[derive(Debug)]
pub struct HealthState {
    store: Arc<EndpointStore>,
    draining: AtomicBool,
}

impl HealthState {
    /// Not draining; ready once `store` is synced.
    pub fn new(store: Arc<EndpointStore>) -> Self {
        Self {
            store,
            draining: AtomicBool::new(false),
        }
    }

    /// Reports NOT_SERVING from now on.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Release);
    }

    /// True when the pool was seen and no drain has begun.
    pub fn is_ready(&self) -> bool {
        self.store.is_synced() && !self.draining.load(Ordering::Acquire)
    }

    /// `liveness` holds as long as the process answers: a drain or a pool that is not there yet must
    /// not get the process killed. Every other name, known or not, follows readiness.
    fn status(&self, service: &str) -> ServingStatus {
        if service == "liveness" || self.is_ready() {
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
}
