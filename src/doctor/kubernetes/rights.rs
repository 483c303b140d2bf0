//! What the picker's account may do, asked of the API server.

use serde_json::json;

use super::{Cluster, Refusal, Target};
use crate::doctor::finding::Report;
use crate::kubernetes::objects::{LLM_D_GROUP, POOL_GROUP};

impl Cluster<'_> {
    /// Everything the picker needs to be allowed, asked of the API server.
    pub(super) async fn rights(&self, account: &str, report: &mut Report) {
        let namespace = &self.0.namespace;
        let subject = format!("ServiceAccount {namespace}/{account}");
        let pool = matches!(self.0.target, Target::Pool(_));
        let before = report.findings.len();
        for (group, resource, verbs, without) in RIGHTS {
            if *resource == "inferencepools" && !pool {
                continue;
            }
            let mut lacking = Vec::new();
            for verb in *verbs {
                match self.may(account, group, resource, verb).await {
                    Ok(true) => {}
                    Ok(false) => lacking.push(*verb),
                    Err(refusal) => {
                        let why = match refusal {
                            Refusal::Other(error) => error,
                            _ => "you may not ask (subjectaccessreviews)".to_owned(),
                        };
                        report.warning(
                            "rbac",
                            subject,
                            why,
                            format!("kubectl auth can-i list pods -n {namespace} --as system:serviceaccount:{namespace}:{account}"),
                        );
                        return;
                    }
                }
            }
            if lacking.is_empty() {
                continue;
            }
            let verbs = lacking.join(",");
            let of = if group.is_empty() {
                String::new()
            } else {
                format!(".{group}")
            };
            let message = format!("may not {verbs} {resource}{of}: {}", without.consequence());
            let fix = without.fix(namespace, account, &verbs, &format!("{resource}{of}"));
            match without {
                Without::Routing => report.error("rbac", &subject, message, fix),
                _ => report.warning("rbac", &subject, message, fix),
            }
        }
        if report.findings.len() == before {
            report.ok("rbac", subject, "may do all it needs");
        }
    }

    async fn may(
        &self,
        account: &str,
        group: &str,
        resource: &str,
        verb: &str,
    ) -> Result<bool, Refusal> {
        let namespace = &self.0.namespace;
        let mut attributes = json!({"group": group, "resource": resource, "verb": verb});
        if !matches!(resource, "tokenreviews" | "subjectaccessreviews") {
            attributes["namespace"] = json!(namespace);
        }
        let review = json!({
            "apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview",
            "spec": {
                "user": format!("system:serviceaccount:{namespace}:{account}"),
                "groups": ["system:serviceaccounts", format!("system:serviceaccounts:{namespace}"), "system:authenticated"],
                "resourceAttributes": attributes,
            },
        });
        let request = http::Request::post("/apis/authorization.k8s.io/v1/subjectaccessreviews")
            .header("content-type", "application/json")
            .body(review.to_string().into_bytes())
            .map_err(|error| Refusal::Other(error.to_string()))?;
        let answer = self.send(request).await?;
        Ok(answer["status"]["allowed"] == true)
    }
}

/// What does not work without a right.
#[derive(Debug, Clone, Copy)]
enum Without {
    Routing,
    Objectives,
    Election,
    MetricsAuth,
}

impl Without {
    fn consequence(self) -> &'static str {
        match self {
            Self::Routing => "it has no endpoints",
            Self::Objectives => "priorities and rewrites are not read",
            Self::Election => "needed with --ha-enable-leader-election",
            Self::MetricsAuth => "scrapes with a token are refused",
        }
    }

    fn fix(self, namespace: &str, account: &str, verbs: &str, resource: &str) -> String {
        let name = format!(
            "{account}-{}",
            resource.split('.').next().unwrap_or_default()
        );
        let (role, scope) = match self {
            Self::MetricsAuth => ("clusterrole", String::new()),
            _ => ("role", format!(" -n {namespace}")),
        };
        format!(
            "kubectl create {role} {name}{scope} --verb={verbs} --resource={resource}\nkubectl create {role}binding {name}{scope} --{role}={name} --serviceaccount={namespace}:{account}"
        )
    }
}

const WATCH: &[&str] = &["get", "list", "watch"];

/// Group, resource, verbs, and what they are for.
const RIGHTS: &[(&str, &str, &[&str], Without)] = &[
    ("", "pods", WATCH, Without::Routing),
    (POOL_GROUP, "inferencepools", WATCH, Without::Routing),
    (
        LLM_D_GROUP,
        "inferenceobjectives",
        WATCH,
        Without::Objectives,
    ),
    (
        LLM_D_GROUP,
        "inferencemodelrewrites",
        WATCH,
        Without::Objectives,
    ),
    (
        "coordination.k8s.io",
        "leases",
        &["get", "create", "update"],
        Without::Election,
    ),
    (
        "authentication.k8s.io",
        "tokenreviews",
        &["create"],
        Without::MetricsAuth,
    ),
    (
        "authorization.k8s.io",
        "subjectaccessreviews",
        &["create"],
        Without::MetricsAuth,
    ),
];
