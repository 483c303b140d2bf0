//! Every span of the picker and every name of an attribute that several places write, once, as the
//! reference publishes them.
//!
//! Its spans of single index operations (`index_add`, `index_evict`, `index_lookup`, `score_tokens`,
//! `compute_scores`) have no counterpart: events are applied in batches apart from any request, and the
//! look-up of a request is `produce_precise_prefix_cache` itself.

use super::span::Site;

const HANDLERS: &str = "llm-d-router/pkg/epp/handlers";
const REQUEST_CONTROL: &str = "llm-d-router/pkg/epp/requestcontrol";
const SCHEDULING: &str = "llm-d-router/pkg/epp/scheduling";
const CONTROL_PLUGINS: &str = "llm-d-router/pkg/epp/framework/plugins/requestcontrol";
const SCHEDULING_PLUGINS: &str = "llm-d-router/pkg/epp/framework/plugins/scheduling";

/// From the request's headers to the end of its stream.
pub const GATEWAY_REQUEST: Site = Site::server(HANDLERS, "gateway.request");
/// The decision; published as a server's too.
pub const ORCHESTRATION: Site = Site::server(REQUEST_CONTROL, "gateway.request_orchestration");
/// A scheduling profile.
pub const PROFILE: Site = Site::internal(SCHEDULING, "run_scheduler_profile");
/// Its filters.
pub const FILTERS: Site = Site::internal(SCHEDULING, "filter_endpoints");
/// Its scorers.
pub const SCORING: Site = Site::internal(SCHEDULING, "llm_d.epp.scoring");
/// Its picker.
pub const PICKER: Site = Site::internal(SCHEDULING, "pick_endpoints");
/// A scorer of prefix matches, inside of [`scorer`].
pub const SCORE_PREFIX_CACHE: Site = Site::internal(SCHEDULING_PLUGINS, "score_prefix_cache");
/// The exact prefix match.
pub const PRODUCE_PRECISE_PREFIX_CACHE: Site =
    Site::internal(CONTROL_PLUGINS, "produce_precise_prefix_cache");
/// One step of the handler that splits requests into stages.
pub const PICK_DISAGG_PROFILE: Site = Site::internal(SCHEDULING_PLUGINS, "pick_disagg_profile");
/// The same of its deprecated form.
pub const PICK_PD_PROFILE: Site = Site::internal(SCHEDULING_PLUGINS, "pick_pd_profile");
/// Headers for the sidecar.
pub const PREPARE_DISAGGREGATION: Site =
    Site::internal(SCHEDULING_PLUGINS, "prepare_disaggregation");

/// A scorer of this type.
pub fn scorer(type_name: &str) -> Site {
    Site {
        name: format!("llm_d.epp.scorer.{type_name}").into(),
        ..SCORING
    }
}

/// Model that is forwarded.
pub const MODEL: &str = "gen_ai.request.model";
/// `x-request-id`.
pub const REQUEST_ID: &str = "gen_ai.request.id";
/// Kinds of media in a prompt, in order of the alphabet and joined by commas, or `none`.
pub const MODALITY: &str = "mm.modality";
/// Media items of the request.
pub const MEDIA_COUNT: &str = "mm.hash_count";
/// True when an endpoint holds some of them.
pub const MEDIA_HIT: &str = "mm.hit";
