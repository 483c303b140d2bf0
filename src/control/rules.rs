//! Objectives and model rewrites: what operators say about requests by name, in the terms of the
//! custom resources `InferenceObjective` and `InferenceModelRewrite`.

use std::sync::Arc;

use arc_swap::ArcSwap;
use hashbrown::HashMap;
use serde::Deserialize;

/// Highest weight of a rewrite target.
const MAX_WEIGHT: u32 = 1_000_000;
/// Group that a reference to a pool means when it names none.
const POOL_GROUP: &str = "inference.networking.k8s.io";

/// Which pool an object is about.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct PoolRef {
    /// API group; absent means that of InferencePool v1.
    pub group: Option<String>,
    /// Name.
    pub name: String,
}

impl PoolRef {
    /// True when it means the pool `name` of `group`.
    pub fn is(&self, group: &str, name: &str) -> bool {
        let own = self.group.as_deref().filter(|g| !g.is_empty());
        self.name == name && own.unwrap_or(POOL_GROUP) == group
    }
}

/// `spec` of an InferenceObjective.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ObjectiveSpec {
    /// Higher is served first, below zero may be shed; absent is 0.
    pub priority: Option<i32>,
    /// The pool it is for.
    pub pool_ref: Option<PoolRef>,
}

/// `spec` of an InferenceModelRewrite.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct RewriteSpec {
    /// The pool it is for.
    pub pool_ref: Option<PoolRef>,
    /// In order.
    pub rules: Vec<RewriteRule>,
}

/// One rule of a rewrite.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct RewriteRule {
    /// Any of them; none means every request.
    pub matches: Vec<RewriteMatch>,
    /// One is drawn by weight.
    pub targets: Vec<RewriteTarget>,
}

/// What a rule applies to.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct RewriteMatch {
    /// The incoming model.
    pub model: ModelMatch,
}

/// A model by name.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ModelMatch {
    /// How names compare.
    #[serde(rename = "type", default)]
    pub kind: MatchKind,
    /// The name.
    pub value: String,
}

/// How names compare.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub enum MatchKind {
    /// They are equal.
    #[default]
    Exact,
}

/// Where a rule sends a request.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct RewriteTarget {
    /// Its share, 1 to 1,000,000. All or none of a rule's targets have one.
    pub weight: Option<u32>,
    /// The model to ask for.
    pub model_rewrite: String,
}

/// A rewrite and what decides which one comes first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NamedRewrite {
    /// Name of the object.
    pub name: String,
    /// RFC 3339 in UTC and whole seconds, so that texts compare as times. Without one it is the newest.
    pub created: Option<String>,
    /// What it says.
    pub spec: RewriteSpec,
}

/// The rules in use; requests take a snapshot.
pub type SharedRules = Arc<ArcSwap<TrafficRules>>;

/// All objectives and rewrites of a pool, ready to be asked.
#[derive(Debug, Default)]
pub struct TrafficRules {
    priorities: HashMap<String, i32>,
    exact: HashMap<String, Arc<Draw>>,
    generic: Option<Arc<Draw>>,
}

/// What a rule chose.
#[derive(Debug, PartialEq, Eq)]
pub struct Rewrite<'a> {
    /// The object that decided.
    pub rule: &'a str,
    /// The model to ask for.
    pub target: &'a str,
    /// False for a rule that matches every model.
    pub exact: bool,
}

/// The targets of one rule.
#[derive(Debug)]
struct Draw {
    rule: String,
    /// Upper bound of each target's part of `0..total`.
    targets: Vec<(u64, String)>,
    total: u64,
}

impl TrafficRules {
    /// Builds the tables. Of rules for one model the first counts: that of the oldest object, there the
    /// first in order. A rule that cannot be used is left out; the second value says which and why.
    pub fn new(
        objectives: impl IntoIterator<Item = (String, ObjectiveSpec)>,
        mut rewrites: Vec<NamedRewrite>,
    ) -> (Self, Vec<String>) {
        let priorities = objectives
            .into_iter()
            .map(|(name, spec)| (name, spec.priority.unwrap_or(0)));
        let mut rules = Self {
            priorities: priorities.collect(),
            ..Self::default()
        };
        let mut problems = Vec::new();
        // No creation time sorts last; the sort is stable, so a file keeps its order.
        rewrites.sort_by(|a, b| {
            let age = |rewrite: &NamedRewrite| (rewrite.created.is_none(), rewrite.created.clone());
            age(a).cmp(&age(b))
        });
        for rewrite in rewrites {
            for (position, rule) in rewrite.spec.rules.into_iter().enumerate() {
                let at = format!("{}: rules[{position}]", rewrite.name);
                match Draw::new(&rewrite.name, rule.targets, &at, &mut problems) {
                    Ok(draw) => rules.add(rule.matches, &Arc::new(draw)),
                    Err(problem) => problems.push(format!("{at}: {problem}")),
                }
            }
        }
        (rules, problems)
    }

    fn add(&mut self, matches: Vec<RewriteMatch>, draw: &Arc<Draw>) {
        if matches.is_empty() {
            self.generic.get_or_insert_with(|| Arc::clone(draw));
        }
        for RewriteMatch { model } in matches {
            self.exact
                .entry(model.value)
                .or_insert_with(|| Arc::clone(draw));
        }
    }

    /// Priority of an objective; 0 for one that nobody defined.
    pub fn priority(&self, objective: &str) -> i32 {
        self.priorities.get(objective).copied().unwrap_or(0)
    }

    /// Every priority that an objective has.
    pub fn priorities(&self) -> impl Iterator<Item = i32> {
        self.priorities.values().copied()
    }

    /// What the rule for `model` draws, if there is one.
    pub fn rewrite(&self, model: &str, rng: &mut fastrand::Rng) -> Option<Rewrite<'_>> {
        let exact = self.exact.get(model);
        let draw = exact.or(self.generic.as_ref())?;
        Some(Rewrite {
            rule: &draw.rule,
            target: draw.target(rng)?,
            exact: exact.is_some(),
        })
    }
}

impl Draw {
    fn new(
        rule: &str,
        targets: Vec<RewriteTarget>,
        at: &str,
        warnings: &mut Vec<String>,
    ) -> Result<Self, String> {
        if targets.is_empty() {
            return Err("has no targets".to_owned());
        }
        if targets.iter().any(|target| target.model_rewrite.is_empty()) {
            return Err("a target has no modelRewrite".to_owned());
        }
        let weighted = targets.iter().filter(|t| t.weight.is_some()).count();
        if weighted > 0 && weighted < targets.len() {
            warnings.push(format!("{at}: targets without a weight are never chosen"));
        }
        let mut total = 0;
        let mut bounds = Vec::with_capacity(targets.len());
        for target in targets {
            let weight = match target.weight {
                Some(weight) if (1..=MAX_WEIGHT).contains(&weight) => weight,
                Some(weight) => return Err(format!("weight {weight} is not 1 to {MAX_WEIGHT}")),
                None if weighted == 0 => 1,
                None => continue,
            };
            total += u64::from(weight);
            bounds.push((total, target.model_rewrite));
        }
        Ok(Self {
            rule: rule.to_owned(),
            targets: bounds,
            total,
        })
    }

    fn target(&self, rng: &mut fastrand::Rng) -> Option<&str> {
        let drawn = rng.u64(..self.total.max(1));
        let at = self.targets.partition_point(|(bound, _)| *bound <= drawn);
        self.targets.get(at).map(|(_, model)| model.as_str())
    }
}

/// Objects of a file: the ones that are applied to a cluster, as YAML documents, or a `List` of them.
/// References to pools and all other metadata may stay and count for nothing.
pub fn parse_file(text: &str) -> Result<TrafficRules, String> {
    let documents: Vec<Document> =
        serde_saphyr::from_multiple(text).map_err(|error| error.to_string())?;
    let mut objectives = Vec::new();
    let mut rewrites = Vec::new();
    for document in documents {
        document.collect(&mut objectives, &mut rewrites)?;
    }
    let (rules, problems) = TrafficRules::new(objectives, rewrites);
    match problems.first() {
        None => Ok(rules),
        Some(_) => Err(problems.join("; ")),
    }
}

#[derive(Debug, Deserialize)]
#[serde(tag = "kind")]
enum Document {
    InferenceObjective {
        metadata: DocumentMeta,
        #[serde(default)]
        spec: ObjectiveSpec,
    },
    InferenceModelRewrite {
        metadata: DocumentMeta,
        spec: RewriteSpec,
    },
    List {
        items: Vec<Document>,
    },
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct DocumentMeta {
    name: String,
    creation_timestamp: Option<String>,
}

impl Document {
    fn collect(
        self,
        objectives: &mut Vec<(String, ObjectiveSpec)>,
        rewrites: &mut Vec<NamedRewrite>,
    ) -> Result<(), String> {
        match self {
            Self::InferenceObjective { metadata, spec } => {
                if objectives.iter().any(|(name, _)| *name == metadata.name) {
                    return Err(format!(
                        "InferenceObjective {:?} is there twice",
                        metadata.name
                    ));
                }
                objectives.push((metadata.name, spec));
            }
            Self::InferenceModelRewrite { metadata, spec } => rewrites.push(NamedRewrite {
                name: metadata.name,
                created: metadata.creation_timestamp,
                spec,
            }),
            Self::List { items } => {
                for item in items {
                    item.collect(objectives, rewrites)?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[expect(clippy::needless_pass_by_value, reason = "calls read better")]
    fn rewrite(name: &str, created: &str, rules: Value) -> NamedRewrite {
        NamedRewrite {
            name: name.to_owned(),
            created: Some(created.to_owned()).filter(|c| !c.is_empty()),
            spec: serde_json::from_value(json!({"rules": rules})).unwrap(),
        }
    }

    fn exact(model: &str, target: &str) -> Value {
        json!({"matches": [{"model": {"type": "Exact", "value": model}}], "targets": [{"modelRewrite": target}]})
    }

    fn generic(target: &str) -> Value {
        json!({"targets": [{"modelRewrite": target}]})
    }

    fn built(rewrites: Vec<NamedRewrite>) -> TrafficRules {
        let (rules, problems) = TrafficRules::new(Vec::new(), rewrites);
        assert_eq!(problems, Vec::<String>::new());
        rules
    }

    fn ask(rules: &TrafficRules, model: &str) -> Option<String> {
        let mut rng = fastrand::Rng::with_seed(1);
        rules
            .rewrite(model, &mut rng)
            .map(|r| format!("{} by {}", r.target, r.rule))
    }

    #[test]
    fn exact_comes_before_generic_then_age_then_position() {
        let rules = built(vec![
            rewrite(
                "new",
                "2026-02-01T00:00:00Z",
                json!([exact("a", "new-a"), exact("b", "new-b")]),
            ),
            rewrite("ageless", "", json!([generic("x"), exact("b", "x")])),
            rewrite(
                "old",
                "2026-01-01T00:00:00Z",
                json!([
                    generic("old-any"),
                    exact("a", "old-a"),
                    exact("a", "second")
                ]),
            ),
        ]);
        assert_eq!(ask(&rules, "a").unwrap(), "old-a by old");
        assert_eq!(ask(&rules, "b").unwrap(), "new-b by new");
        assert_eq!(ask(&rules, "c").unwrap(), "old-any by old");
        assert_eq!(ask(&rules, "").unwrap(), "old-any by old");
        assert_eq!(ask(&TrafficRules::default(), "a"), None);
    }

    #[test]
    fn targets_are_drawn_by_weight() {
        let shares = |targets: Value| {
            let rules = built(vec![rewrite("r", "", json!([{"targets": targets}]))]);
            let mut rng = fastrand::Rng::with_seed(7);
            let mut counts = [0u32; 3];
            for _ in 0..10_000 {
                let target = rules.rewrite("m", &mut rng).unwrap().target;
                counts[["a", "b", "c"].iter().position(|t| *t == target).unwrap()] += 1;
            }
            counts.map(|count| (f64::from(count) / 1000.0).round())
        };
        let target = |name: &str, weight: u32| json!({"modelRewrite": name, "weight": weight});
        // 70 : 20 : 10 of 10,000; the standard deviation of the largest is 46.
        assert_eq!(
            shares(json!([target("a", 70), target("b", 20), target("c", 10)])),
            [7.0, 2.0, 1.0]
        );
        // No weights: equal shares.
        let plain = |name: &str| json!({"modelRewrite": name});
        assert_eq!(shares(json!([plain("a"), plain("b")])), [5.0, 5.0, 0.0]);
        // Some without: never chosen, and said so.
        let some = vec![rewrite(
            "r",
            "",
            json!([{"targets": [target("a", 1), plain("b")]}]),
        )];
        let (rules, problems) = TrafficRules::new(Vec::new(), some);
        assert_eq!(
            problems,
            ["r: rules[0]: targets without a weight are never chosen"]
        );
        let mut rng = fastrand::Rng::with_seed(7);
        assert!((0..100).all(|_| rules.rewrite("m", &mut rng).unwrap().target == "a"));
    }

    #[test]
    fn a_rule_that_cannot_be_used_is_named_and_the_others_count() {
        let (rules, problems) = TrafficRules::new(
            Vec::new(),
            vec![rewrite(
                "r",
                "",
                json!([
                    {"targets": []},
                    {"targets": [{"modelRewrite": "m", "weight": 0}]},
                    {"targets": [{"modelRewrite": "m", "weight": 1_000_001}]},
                    {"targets": [{"weight": 1}]},
                    generic("good"),
                ]),
            )],
        );
        assert_eq!(
            problems,
            [
                "r: rules[0]: has no targets",
                "r: rules[1]: weight 0 is not 1 to 1000000",
                "r: rules[2]: weight 1000001 is not 1 to 1000000",
                "r: rules[3]: a target has no modelRewrite",
            ]
        );
        assert_eq!(ask(&rules, "m").unwrap(), "good by r");
    }

    #[test]
    fn a_file_holds_the_objects_as_they_are_applied() {
        let text = "\
apiVersion: llm-d.ai/v1alpha2
kind: InferenceObjective
metadata: {name: batch, labels: {a: b}}
spec: {priority: -1, poolRef: {name: p}}
---
apiVersion: v1
kind: List
items:
- apiVersion: llm-d.ai/v1alpha2
  kind: InferenceObjective
  metadata: {name: unset}
  spec: {}
- apiVersion: llm-d.ai/v1alpha2
  kind: InferenceModelRewrite
  metadata: {name: canary}
  spec:
    rules:
    - matches: [{model: {value: food}}]
      targets: [{modelRewrite: food-v2}]
";
        let rules = parse_file(text).unwrap();
        assert_eq!(
            (
                rules.priority("batch"),
                rules.priority("unset"),
                rules.priority("none")
            ),
            (-1, 0, 0)
        );
        assert_eq!(ask(&rules, "food").unwrap(), "food-v2 by canary");
        let twice = "kind: InferenceObjective\nmetadata: {name: a}\n---\nkind: InferenceObjective\nmetadata: {name: a}\n";
        assert!(parse_file(twice).unwrap_err().contains("is there twice"));
        let empty =
            "kind: InferenceModelRewrite\nmetadata: {name: a}\nspec: {rules: [{targets: []}]}\n";
        assert_eq!(
            parse_file(empty).unwrap_err(),
            "a: rules[0]: has no targets"
        );
        for bad in ["kind: Pod\nmetadata: {name: a}\n", "kind: ["] {
            assert!(parse_file(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_reference_without_group_means_v1() {
        let pool = |group: Option<&str>| PoolRef {
            group: group.map(str::to_owned),
            name: "p".to_owned(),
        };
        assert!(pool(None).is(POOL_GROUP, "p") && pool(Some("")).is(POOL_GROUP, "p"));
        assert!(pool(Some("g")).is("g", "p"));
        assert!(!pool(Some("g")).is(POOL_GROUP, "p") && !pool(None).is(POOL_GROUP, "q"));
    }
}
