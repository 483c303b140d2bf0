//! `disaggregatedset-rollout-screener`: keeps a request on one revision of a rollout.

use std::collections::BTreeMap;
use std::sync::Arc;

use arc_swap::ArcSwap;
use bytes::Bytes;
use hashbrown::{HashMap, HashSet};
use metrics::{Counter, Gauge};
use parking_lot::Mutex;
use serde::Deserialize;

use crate::datalayer::selector::Selector;
use crate::datalayer::{Endpoint, EndpointListener};
use crate::plugin::{Build, Maturity, ParamDoc, ParamError, Plugin, PluginError};
use crate::response::{ResponseHeaderHook, ResponseView};
use crate::scheduling::{Candidate, Cycle, Screener};
use crate::telemetry::metrics::{Pair, labels};

/// Revisions that get a series of their own; later ones are gated all the same, but not shown.
const MAX_REVISION_SERIES: usize = 100;

/// Serves a request from one revision of a disaggregated deployment while it is rolled out.
///
/// Revision gating drops revisions that lack a ready pod of a required role and then, unless the
/// client asks for something strictly, draws one revision at random, weighted by its ready pods. A
/// strict header keeps the endpoints whose label has its value, possibly none. Every response carries
/// the serving endpoint's labels in the same headers.
///
/// Ready pods are those behind the pool's endpoints that the scope selects: counted over the whole
/// pool, whatever subset a request may use.
#[derive(Debug)]
pub struct DisaggregatedSetRolloutScreener {
    selectors: Vec<HeaderSelector>,
    gate: Option<Gate>,
    /// By position in `selectors`.
    no_match: Vec<Pair<Counter>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    scope: Scope,
    header_selectors: Vec<HeaderSelector>,
    revision_gating: Option<GateSettings>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Scope {
    label_selector: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct HeaderSelector {
    name: String,
    header_name: String,
    label_key: String,
    mode: SelectorMode,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum SelectorMode {
    Strict,
    Prefer,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct GateSettings {
    #[serde(default)]
    revision_label_key: String,
    #[serde(default)]
    role_label_key: String,
    mode: GateMode,
    require_roles: Option<RequireRoles>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum GateMode {
    Sum,
    MaxRole,
    Disabled,
}

impl GateMode {
    fn as_str(self) -> &'static str {
        match self {
            Self::Sum => "sum",
            Self::MaxRole => "max-role",
            Self::Disabled => "disabled",
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RequireRoles {
    values: Vec<String>,
}

fn refuse<T>(text: String) -> Result<T, ParamError> {
    Err(ParamError(text))
}

/// Lower-cases the header names and checks that nothing is empty or used twice.
fn check_selectors(selectors: &mut [HeaderSelector]) -> Result<(), ParamError> {
    let mut names = HashSet::new();
    let mut headers = HashSet::new();
    for (position, selector) in selectors.iter_mut().enumerate() {
        selector.header_name = selector.header_name.trim().to_ascii_lowercase();
        for (field, value) in [
            ("name", &selector.name),
            ("headerName", &selector.header_name),
            ("labelKey", &selector.label_key),
        ] {
            if value.is_empty() {
                return refuse(format!("headerSelectors[{position}].{field}: is required"));
            }
        }
        if !names.insert(selector.name.clone()) {
            return refuse(format!(
                "headerSelectors: name {:?} is used twice",
                selector.name
            ));
        }
        if !headers.insert(selector.header_name.clone()) {
            return refuse(format!(
                "headerSelectors: headerName {:?} is used twice",
                selector.header_name
            ));
        }
    }
    Ok(())
}

impl GateSettings {
    fn roles(&self) -> Result<Vec<String>, ParamError> {
        let Some(RequireRoles { values: roles }) = &self.require_roles else {
            let mode = self.mode.as_str();
            return refuse(format!(
                "revisionGating.requireRoles: is required with mode {mode}"
            ));
        };
        let name = "revisionGating.requireRoles.values";
        if roles.is_empty() {
            return refuse(format!("{name}: at least one role is required"));
        }
        for (position, role) in roles.iter().enumerate() {
            if role.is_empty() {
                return refuse(format!("{name}[{position}]: must not be empty"));
            }
            if roles.iter().take(position).any(|earlier| earlier == role) {
                return refuse(format!("{name}: role {role:?} is listed twice"));
            }
        }
        Ok(roles.clone())
    }

    fn build(self, scope: Selector, instance: &str) -> Result<Option<Gate>, ParamError> {
        if self.mode == GateMode::Disabled {
            return Ok(None);
        }
        let roles = self.roles()?;
        let or = |key: String, default: &str| {
            if key.is_empty() {
                default.to_owned()
            } else {
                key
            }
        };
        Ok(Some(Gate {
            scope,
            revision_label: or(
                self.revision_label_key,
                "disaggregatedset.x-k8s.io/revision",
            ),
            role_label: or(self.role_label_key, "disaggregatedset.x-k8s.io/role"),
            mode: self.mode,
            roles,
            instance: instance.to_owned(),
            pods: Mutex::default(),
            weights: ArcSwap::default(),
        }))
    }
}

impl Plugin for DisaggregatedSetRolloutScreener {
    const TYPE: &'static str = "disaggregatedset-rollout-screener";
    const MATURITY: Maturity = Maturity::Alpha;
    const PARAMETERS: &'static [ParamDoc] = &[
        ParamDoc {
            name: "scope",
            kind: "object",
            default: "",
            help: "{labelSelector}: which endpoints count as ready pods, as a label selector in text form; required.",
        },
        ParamDoc {
            name: "headerSelectors",
            kind: "list",
            default: "[]",
            help: "{name, headerName, labelKey, mode strict|prefer}: a strict header keeps endpoints whose label has its value; both modes put the label into the response header.",
        },
        ParamDoc {
            name: "revisionGating",
            kind: "object",
            default: "",
            help: "{mode sum|max-role|disabled, requireRoles {values}, revisionLabelKey disaggregatedset.x-k8s.io/revision, roleLabelKey disaggregatedset.x-k8s.io/role}; required.",
        },
    ];
    const ABOUT: &'static str = "Keeps a request on one complete revision of a rollout.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<Self, _>()?;
        let scope = settings.scope.label_selector.trim();
        if scope.is_empty() {
            return Err(ParamError("scope.labelSelector: is required".to_owned()).into());
        }
        let scope = Selector::parse(scope)
            .map_err(|reason| ParamError(format!("scope.labelSelector: {reason}")))?;
        let mut selectors = settings.header_selectors;
        check_selectors(&mut selectors)?;
        let Some(gating) = settings.revision_gating else {
            return Err(ParamError("revisionGating: is required".to_owned()).into());
        };
        let no_match = selectors.iter().map(|selector| {
            let list = labels(&[
                ("plugin_type", Self::TYPE),
                ("plugin_name", build.name),
                ("selector", &selector.name),
            ]);
            let name = "llm_d_epp_disaggregatedset_strict_header_no_match_total";
            Pair::counter(name, list, Vec::new())
        });
        Ok(Self {
            no_match: no_match.collect(),
            gate: gating.build(scope, build.name)?,
            selectors,
        })
    }
}

/// Revision gating and the pods it counts.
#[derive(Debug)]
struct Gate {
    scope: Selector,
    revision_label: String,
    role_label: String,
    mode: GateMode,
    roles: Vec<String>,
    instance: String,
    /// Written by discovery, read by nobody else.
    pods: Mutex<Pods>,
    /// Weight by complete revision, as requests read it.
    weights: ArcSwap<BTreeMap<String, u32>>,
}

/// Pods in scope.
#[derive(Default)]
struct Pods {
    /// Endpoints by `(namespace, pod)` and place: the ranks of a pod count once.
    endpoints: HashMap<(String, String, String, usize), u32>,
    /// Pods by revision, in the order of the required roles. Others are not counted.
    counts: BTreeMap<String, Vec<u32>>,
    shares: HashMap<String, Gauge>,
}

impl std::fmt::Debug for Pods {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pods")
            .field("counts", &self.counts)
            .finish_non_exhaustive()
    }
}

impl Gate {
    /// Revision and position of the role of an endpoint in scope.
    fn place<'a>(&self, endpoint: &'a Endpoint) -> Option<(&'a str, usize)> {
        let labels = &endpoint.spec.labels;
        let revision = labels.get(&self.revision_label)?;
        let role = labels.get(&self.role_label)?;
        let position = self.roles.iter().position(|r| r == role)?;
        (self.scope.matches(labels) && !revision.is_empty()).then_some((revision, position))
    }

    fn count(&self, endpoint: &Endpoint, joins: bool) {
        let Some((revision, role)) = self.place(endpoint) else {
            return;
        };
        let mut pods = self.pods.lock();
        let spec = &endpoint.spec;
        let pod = (
            spec.namespace.clone(),
            spec.pod_name().to_owned(),
            revision.to_owned(),
            role,
        );
        let ranks = pods.endpoints.entry(pod.clone()).or_default();
        let changes = if joins {
            *ranks += 1;
            *ranks == 1
        } else {
            *ranks = ranks.saturating_sub(1);
            *ranks == 0
        };
        if !changes {
            return;
        }
        let roles = self.roles.len();
        let counts = pods.counts.entry(revision.to_owned());
        let counts = counts.or_insert_with(|| vec![0; roles]);
        if let Some(count) = counts.get_mut(role) {
            *count = if joins {
                *count + 1
            } else {
                count.saturating_sub(1)
            };
        }
        if counts.iter().all(|n| *n == 0) {
            pods.counts.remove(revision);
        }
        if !joins {
            pods.endpoints.remove(&pod);
        }
        self.publish(&mut pods);
    }

    fn publish(&self, pods: &mut Pods) {
        let weights = weights(&pods.counts, self.mode, self.roles.len());
        let total: u32 = weights.values().sum();
        for revision in pods.counts.keys() {
            if pods.shares.len() < MAX_REVISION_SERIES && !pods.shares.contains_key(revision) {
                let list = labels(&[
                    ("plugin_type", DisaggregatedSetRolloutScreener::TYPE),
                    ("plugin_name", &self.instance),
                    ("mode", self.mode.as_str()),
                    ("revision", revision),
                ]);
                let name = "llm_d_epp_disaggregatedset_revision_gating_share";
                pods.shares
                    .insert(revision.clone(), metrics::gauge!(name, list));
            }
        }
        for (revision, share) in &pods.shares {
            let weight = weights.get(revision).copied().unwrap_or(0);
            share.set(f64::from(weight) / f64::from(total.max(1)));
        }
        self.weights.store(Arc::new(weights));
    }

    /// Writes the positions of the candidates whose revision may serve.
    fn screen(
        &self,
        cycle: &Cycle<'_>,
        candidates: &[Candidate],
        draws: bool,
        keep: &mut Vec<u32>,
    ) {
        let weights = self.weights.load();
        let revision = |candidate: &Candidate| {
            let labels = &candidate.endpoint.spec.labels;
            let (name, _) = weights.get_key_value(labels.get(&self.revision_label)?)?;
            Some(name.as_str())
        };
        let mut offered: BTreeMap<&str, u32> = BTreeMap::new();
        for name in candidates.iter().filter_map(revision) {
            offered.insert(name, weights.get(name).copied().unwrap_or(0));
        }
        let drawn = draws.then(|| draw(&offered, cycle)).flatten();
        let wanted = (0..).zip(candidates).filter(|(_, candidate)| {
            let revision = revision(candidate);
            revision.is_some() && (drawn.is_none() || revision == drawn)
        });
        keep.extend(wanted.map(|(position, _)| position));
    }
}

/// Weights of the revisions that have a ready pod of every role.
fn weights(
    counts: &BTreeMap<String, Vec<u32>>,
    mode: GateMode,
    roles: usize,
) -> BTreeMap<String, u32> {
    let complete = || counts.iter().filter(|(_, c)| c.iter().all(|n| *n > 0));
    let of_role = |counts: &[u32], role: usize| counts.get(role).copied().unwrap_or(0);
    let total = |role: usize| complete().map(|(_, c)| of_role(c, role)).sum::<u32>();
    // The first of equal totals: `max_by_key` takes the last.
    let largest = (0..roles)
        .rev()
        .max_by_key(|role| total(*role))
        .unwrap_or(0);
    complete()
        .map(|(revision, counts)| {
            let weight = match mode {
                GateMode::MaxRole => of_role(counts, largest),
                GateMode::Sum | GateMode::Disabled => counts.iter().sum(),
            };
            (revision.clone(), weight)
        })
        .collect()
}

/// One of `offered` at random, by weight.
fn draw<'a>(offered: &BTreeMap<&'a str, u32>, cycle: &Cycle<'_>) -> Option<&'a str> {
    let total: u32 = offered.values().sum();
    if total == 0 {
        return None;
    }
    let mut ticket = cycle.rng.borrow_mut().u32(..total);
    for (revision, weight) in offered {
        if ticket < *weight {
            return Some(revision);
        }
        ticket -= weight;
    }
    None
}

impl DisaggregatedSetRolloutScreener {
    /// Strict selectors whose header the request carries, with their positions.
    fn strict<'a>(
        &'a self,
        cycle: &'a Cycle<'_>,
    ) -> impl Iterator<Item = (usize, &'a HeaderSelector, &'a str)> {
        let strict = self.selectors.iter().enumerate();
        strict
            .filter(|(_, s)| s.mode == SelectorMode::Strict)
            .filter_map(|(position, selector)| {
                let value = cycle.request.headers.get_str(&selector.header_name)?;
                (!value.is_empty()).then_some((position, selector, value))
            })
    }
}

impl Screener for DisaggregatedSetRolloutScreener {
    fn screen(&self, cycle: &Cycle<'_>, candidates: &[Candidate], keep: &mut Vec<u32>) {
        match &self.gate {
            Some(gate) => {
                let draws = self.strict(cycle).next().is_none();
                gate.screen(cycle, candidates, draws, keep);
            }
            None => keep.extend((0..).take(candidates.len())),
        }
        for (position, selector, value) in self.strict(cycle) {
            if keep.is_empty() {
                return;
            }
            keep.retain(|&kept| {
                let candidate = candidates.get(kept as usize);
                let label = candidate.and_then(|c| c.endpoint.spec.labels.get(&selector.label_key));
                label.is_some_and(|label| label == value)
            });
            if let Some(counter) = self.no_match.get(position).filter(|_| keep.is_empty()) {
                counter.increment();
            }
        }
    }
}

impl EndpointListener for DisaggregatedSetRolloutScreener {
    fn added(&self, endpoint: &Arc<Endpoint>) {
        if let Some(gate) = &self.gate {
            gate.count(endpoint, true);
        }
    }

    fn relabelled(&self, former: &Arc<Endpoint>, endpoint: &Arc<Endpoint>) {
        self.removed(former);
        self.added(endpoint);
    }

    fn removed(&self, endpoint: &Arc<Endpoint>) {
        if let Some(gate) = &self.gate {
            gate.count(endpoint, false);
        }
    }
}

impl ResponseHeaderHook for DisaggregatedSetRolloutScreener {
    fn on_response_headers(&self, view: &ResponseView<'_>, set: &mut Vec<(String, Bytes)>) {
        for selector in &self.selectors {
            let label = view.endpoint.spec.labels.get(&selector.label_key);
            if let Some(label) = label.filter(|l| !l.is_empty()) {
                let value = Bytes::copy_from_slice(label.as_bytes());
                set.push((selector.header_name.clone(), value));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::Headers;
    use crate::response::Served;
    use crate::scheduling::test_support::{Pool, TestEndpoint, endpoint, refusal};

    const ROLES: &str = r#""requireRoles": {"values": ["prefill", "decode"]}"#;

    fn parameters(mode: &str) -> String {
        format!(
            r#"{{"scope": {{"labelSelector": "app=llm"}},
                "headerSelectors": [
                    {{"name": "slice", "headerName": "X-Slice", "labelKey": "slice", "mode": "strict"}},
                    {{"name": "rev", "headerName": "x-rev", "labelKey": "rev", "mode": "prefer"}}
                ],
                "revisionGating": {{"mode": "{mode}", {ROLES}, "revisionLabelKey": "rev", "roleLabelKey": "role"}}}}"#
        )
    }

    fn pod(name: &str, revision: &str, role: &str) -> TestEndpoint {
        endpoint(name)
            .label("app", "llm")
            .label("rev", revision)
            .label("role", role)
            .label("slice", &format!("slice-{revision}"))
    }

    /// A: 2 prefill and 4 decode; B: 1 prefill and 1 decode; C: decode only.
    fn pool() -> Pool {
        let pods = [
            ("a1", "A", "prefill"),
            ("a2", "A", "prefill"),
            ("a3", "A", "decode"),
            ("a4", "A", "decode"),
            ("a5", "A", "decode"),
            ("a6", "A", "decode"),
            ("b1", "B", "prefill"),
            ("b2", "B", "decode"),
            ("c1", "C", "decode"),
        ];
        let unlabelled = endpoint("u").label("app", "llm");
        Pool::new(
            pods.map(|(name, revision, role)| pod(name, revision, role))
                .into_iter()
                .chain([unlabelled]),
        )
    }

    fn screener(pool: &mut Pool, mode: &str) -> DisaggregatedSetRolloutScreener {
        let screener: DisaggregatedSetRolloutScreener = pool.plugin(&parameters(mode));
        for candidate in &pool.candidates {
            screener.added(&candidate.endpoint);
        }
        screener
    }

    fn kept(screener: &DisaggregatedSetRolloutScreener, pool: &Pool) -> String {
        let mut keep = Vec::new();
        pool.with_cycle(|cycle, all| screener.screen(cycle, all, &mut keep));
        let names = keep.iter().map(|&i| {
            let spec = &pool.candidates[i as usize].endpoint.spec;
            spec.name.as_str()
        });
        names.collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn one_complete_revision_is_drawn_by_its_pods() {
        for (mode, share_of_a) in [
            // A has 2 + 4 pods, B 1 + 1.
            ("sum", 6.0 / 8.0),
            // decode has 4 + 1 pods, more than prefill's 2 + 1: A 4, B 1.
            ("max-role", 4.0 / 5.0),
        ] {
            let mut pool = pool();
            let screener = screener(&mut pool, mode);
            let mut drawn_a = 0;
            for _ in 0..2000 {
                match kept(&screener, &pool).as_str() {
                    "a1 a2 a3 a4 a5 a6" => drawn_a += 1,
                    "b1 b2" => {}
                    other => panic!("{other}"),
                }
            }
            let share = f64::from(drawn_a) / 2000.0;
            assert!((share - share_of_a).abs() < 0.04, "{mode}: {share}");
        }
    }

    #[test]
    fn the_largest_role_is_the_first_of_equals() {
        let counts = |a: [u32; 2], b: [u32; 2]| {
            BTreeMap::from([("A".to_owned(), a.to_vec()), ("B".to_owned(), b.to_vec())])
        };
        let weigh = |counts, mode| weights(&counts, mode, 2).into_values().collect::<Vec<_>>();
        // prefill 3 + 1, decode 1 + 3: equal totals, prefill is listed first.
        assert_eq!(weigh(counts([3, 1], [1, 3]), GateMode::MaxRole), [3, 1]);
        assert_eq!(weigh(counts([3, 1], [1, 4]), GateMode::MaxRole), [1, 4]);
        assert_eq!(weigh(counts([3, 1], [1, 3]), GateMode::Sum), [4, 4]);
        // An incomplete revision has no weight and does not count for the largest role either.
        assert_eq!(weigh(counts([3, 1], [0, 9]), GateMode::MaxRole), [3]);
    }

    #[test]
    fn a_strict_header_keeps_its_label_in_any_complete_revision() {
        for (slice, wanted) in [("slice-B", "b1 b2"), ("slice-C", ""), ("other", "")] {
            let mut pool = pool();
            let screener = screener(&mut pool, "sum");
            pool.header("x-slice", slice);
            for _ in 0..20 {
                assert_eq!(kept(&screener, &pool), wanted, "{slice}");
            }
        }
    }

    #[test]
    fn without_gating_only_strict_headers_screen() {
        let mut pool = pool();
        let screener = screener(&mut pool, "disabled");
        assert_eq!(kept(&screener, &pool), "a1 a2 a3 a4 a5 a6 b1 b2 c1 u");
        pool.header("x-rev", "B");
        assert_eq!(kept(&screener, &pool), "a1 a2 a3 a4 a5 a6 b1 b2 c1 u");
        pool.header("x-slice", "slice-C");
        assert_eq!(kept(&screener, &pool), "c1");
    }

    #[test]
    fn pods_count_by_scope_as_they_come_and_go() {
        let mut pool = pool();
        let built: DisaggregatedSetRolloutScreener = pool.plugin(&parameters("sum"));
        assert_eq!(kept(&built, &pool), "", "no pod is known yet");
        let screener = screener(&mut pool, "sum");
        let weights = || {
            let gate = screener.gate.as_ref().unwrap();
            let weights = gate.weights.load();
            let text = weights.iter().map(|(r, w)| format!("{r}{w}"));
            text.collect::<Vec<_>>().join(" ")
        };
        assert_eq!(weights(), "A6 B2");
        screener.removed(&pool.candidates[6].endpoint);
        assert_eq!(weights(), "A6", "B lost its only prefill pod");
        screener.added(&pool.candidates[6].endpoint);
        let outside = Pool::new([pod("c9", "C", "prefill").label("app", "other")]);
        screener.added(&outside.candidates[0].endpoint);
        assert_eq!(weights(), "A6 B2", "not in scope");
        let inside = Pool::new([pod("c9", "C", "prefill")]);
        screener.added(&inside.candidates[0].endpoint);
        assert_eq!(weights(), "A6 B2 C2");
        // A second rank of a pod is the same pod.
        let mut spec = inside.candidates[0].endpoint.spec.clone();
        spec.name = "c9-rank-1".to_owned();
        spec.rank = 1;
        let rank = Arc::new(Endpoint::new(spec, crate::datalayer::EndpointIndex(99)));
        screener.added(&rank);
        assert_eq!(weights(), "A6 B2 C2");
        screener.removed(&rank);
        assert_eq!(weights(), "A6 B2 C2");
        screener.removed(&inside.candidates[0].endpoint);
        assert_eq!(weights(), "A6 B2");
    }

    #[test]
    fn responses_carry_the_labels_of_the_endpoint() {
        let mut pool = pool();
        let screener = screener(&mut pool, "sum");
        let stamp = |position: usize| {
            let view = ResponseView {
                request_id: "r",
                endpoint: &pool.candidates[position].endpoint,
                served: Served::NoNamespace,
                headers: &Headers::default(),
            };
            let mut set = Vec::new();
            screener.on_response_headers(&view, &mut set);
            let text = set
                .into_iter()
                .map(|(name, value)| format!("{name}={}", String::from_utf8_lossy(&value)));
            text.collect::<Vec<_>>().join(" ")
        };
        assert_eq!(stamp(6), "x-slice=slice-B x-rev=B");
        assert_eq!(stamp(9), "", "unlabelled");
    }

    #[test]
    fn parameters_are_checked() {
        let scope = r#""scope": {"labelSelector": "a=b"}"#;
        let gate = r#""revisionGating": {"mode": "disabled"}"#;
        let selector = |name: &str, header: &str, label: &str| {
            format!(
                r#"{{"name": "{name}", "headerName": "{header}", "labelKey": "{label}", "mode": "strict"}}"#
            )
        };
        let selectors = |list: &[String]| {
            let list = list.join(",");
            format!(r#"{{{scope}, {gate}, "headerSelectors": [{list}]}}"#)
        };
        let gated =
            |rest: &str| format!(r#"{{{scope}, "revisionGating": {{"mode": "sum"{rest}}}}}"#);
        for (parameters, wanted) in [
            ("{}".to_owned(), "scope.labelSelector: is required"),
            (
                format!(r#"{{"scope": {{"labelSelector": "a in"}}, {gate}}}"#),
                "scope.labelSelector: \"a in\"",
            ),
            (format!("{{{scope}}}"), "revisionGating: is required"),
            (
                selectors(&[selector("", "h", "l")]),
                "headerSelectors[0].name: is required",
            ),
            (
                selectors(&[selector("n", " ", "l")]),
                "headerSelectors[0].headerName: is required",
            ),
            (
                selectors(&[selector("n", "h", "l"), selector("n", "i", "l")]),
                "name \"n\" is used twice",
            ),
            (
                selectors(&[selector("n", "h", "l"), selector("m", "H", "l")]),
                "headerName \"h\" is used twice",
            ),
            (
                gated(""),
                "revisionGating.requireRoles: is required with mode sum",
            ),
            (
                gated(r#", "requireRoles": {"values": []}"#),
                "at least one role",
            ),
            (
                gated(r#", "requireRoles": {"values": ["a", ""]}"#),
                "values[1]: must not be empty",
            ),
            (
                gated(r#", "requireRoles": {"values": ["a", "a"]}"#),
                "role \"a\" is listed twice",
            ),
        ] {
            let text = refusal::<DisaggregatedSetRolloutScreener>(&parameters);
            assert!(text.contains(wanted), "{parameters}: {text}");
        }
    }
}
