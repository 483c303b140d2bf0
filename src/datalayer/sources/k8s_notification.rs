//! `k8s-notification-source`

use serde::Deserialize;

use super::{DataSource, ObjectKind, Payload};
use crate::plugin::{Build, Maturity, ParamDoc, ParamError, Plugin, PluginError};

/// Follows Kubernetes objects of one kind. Without Kubernetes it delivers nothing.
#[derive(Debug)]
pub struct K8sNotificationSource(ObjectKind);

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    group: String,
    version: String,
    kind: String,
}

impl Plugin for K8sNotificationSource {
    const TYPE: &'static str = "k8s-notification-source";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[
        ParamDoc {
            name: "group",
            kind: "string",
            default: "the core group",
            help: "API group of the objects.",
        },
        ParamDoc {
            name: "version",
            kind: "string",
            default: "required",
            help: "API version of the objects, for example v1.",
        },
        ParamDoc {
            name: "kind",
            kind: "string",
            default: "required",
            help: "Kind of the objects, for example Pod.",
        },
    ];
    const ABOUT: &'static str = "Follows Kubernetes objects; delivers nothing without Kubernetes.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<Self, _>()?;
        for (name, value) in [("version", &settings.version), ("kind", &settings.kind)] {
            if value.is_empty() {
                return Err(ParamError(format!("{name}: is required")).into());
            }
        }
        Ok(Self(ObjectKind {
            group: settings.group,
            version: settings.version,
            kind: settings.kind,
        }))
    }
}

impl DataSource for K8sNotificationSource {
    fn payload(&self) -> Payload {
        Payload::Objects(self.0.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugin::{DataKeys, Parameters};

    #[test]
    fn version_and_kind_are_required() {
        let build = |parameters: &str| {
            K8sNotificationSource::build(&mut Build {
                name: "pods",
                parameters: &Parameters(Some(serde_json::from_str(parameters).unwrap())),
                keys: &mut DataKeys::default(),
            })
            .map_err(|e| e.to_string())
        };
        let pods = build(r#"{"version": "v1", "kind": "Pod"}"#).unwrap();
        assert_eq!(pods.payload().to_string(), "/v1 Pod objects");
        assert_eq!(build("{}").unwrap_err(), "version: is required");
        assert_eq!(
            build(r#"{"version": "v1"}"#).unwrap_err(),
            "kind: is required"
        );
    }
}
