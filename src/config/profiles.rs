//! Scheduling profiles and the handler that runs them (sections 6.2 and 11 of the contract).

use std::sync::Arc;

use super::raw::ProfileEntry;
use super::resolve::{Loader, invalid};
use super::resolved::ResolvedProfile;
use super::{ConfigError, Problem};
use crate::plugin::TypedName;
use crate::scheduling::{Picker, ProfileHandler};

impl Loader<'_> {
    /// Section 6.2: a profile over everything listed, a picker for each profile.
    pub(super) fn default_profiles(
        &mut self,
        profiles: &mut Vec<ProfileEntry>,
    ) -> Result<(), ConfigError> {
        if profiles.is_empty() {
            let usable = self.instances.iter().filter(|i| {
                i.roles.filter.is_some() || i.roles.scorer.is_some() || i.roles.picker.is_some()
            });
            let plugins = usable.map(|i| super::raw::ProfilePlugin {
                plugin_ref: i.name.name.clone(),
                weight: None,
            });
            profiles.push(ProfileEntry {
                name: "default".into(),
                plugins: plugins.collect(),
            });
        }
        for (position, profile) in profiles.iter().enumerate() {
            if profile.name.is_empty() {
                let text = format!("schedulingProfiles[{position}] is missing a name");
                return Err(Problem::Invalid(text).at(format!("schedulingProfiles[{position}]")));
            }
            if profiles
                .iter()
                .take(position)
                .any(|p| p.name == profile.name)
            {
                return Err(Problem::Invalid(format!(
                    "schedulingProfiles[{position}] has duplicate name '{}'",
                    profile.name
                ))
                .at(format!("schedulingProfiles[{position}].name")));
            }
        }
        if !self.instances.iter().any(|i| i.roles.picker.is_some()) {
            self.ensure("max-score-picker", "there is no picker")?;
        }
        if profiles.len() == 1
            && !self
                .instances
                .iter()
                .any(|i| i.roles.profile_handler.is_some())
        {
            self.ensure(
                "single-profile-handler",
                "there is one profile and no profile handler",
            )?;
        }
        Ok(())
    }

    pub(super) fn profile_handler(
        &self,
        profiles: &[ProfileEntry],
    ) -> Result<(TypedName, Arc<dyn ProfileHandler>), ConfigError> {
        let mut handlers = self
            .instances
            .iter()
            .filter_map(|i| Some((i.name.clone(), i.roles.profile_handler.clone()?)));
        let Some(first) = handlers.next() else {
            let text = "no profile handler configured".to_owned();
            return Err(Problem::Invalid(text).at("schedulingProfiles"));
        };
        if let Some(second) = handlers.next() {
            let (a, b) = (first.0.name, second.0.name);
            return invalid(format!(
                "multiple profile handlers found ('{a}', '{b}'); only one is allowed"
            ));
        }
        if first.0.type_name == "single-profile-handler" && profiles.len() > 1 {
            return invalid(
                "SingleProfileHandler cannot support multiple scheduling profiles".into(),
            );
        }
        let names: Vec<&str> = profiles.iter().map(|p| p.name.as_str()).collect();
        if let Err(text) = first.1.check_profiles(&names) {
            return Err(Problem::Invalid(text).at(self.field_of(&first.0.name)));
        }
        Ok(first)
    }

    pub(super) fn profile(
        &self,
        index: usize,
        entry: &ProfileEntry,
    ) -> Result<ResolvedProfile, ConfigError> {
        let mut filters = Vec::new();
        let mut scorers = Vec::new();
        let mut picker: Option<(TypedName, Arc<dyn Picker>)> = None;
        for (position, plugin) in entry.plugins.iter().enumerate() {
            let fail = |text: String| {
                let field = format!("schedulingProfiles[{index}].plugins[{position}]");
                Err(Problem::Invalid(text).at(field))
            };
            if plugin.plugin_ref.is_empty() {
                return fail(format!(
                    "schedulingProfiles[{}].plugins[{position}] is missing a 'pluginRef'",
                    entry.name
                ));
            }
            let Some(instance) = self.find(&plugin.plugin_ref) else {
                return fail(format!(
                    "schedulingProfiles[{}] references undefined plugin '{}'",
                    entry.name, plugin.plugin_ref
                ));
            };
            let name = || instance.name.clone();
            if let Some(filter) = &instance.roles.filter {
                filters.push((name(), Arc::clone(filter)));
            }
            if let Some(scorer) = &instance.roles.scorer {
                scorers.push((name(), Arc::clone(scorer), plugin.weight.unwrap_or(1.0)));
            }
            if let Some(own) = &instance.roles.picker {
                if let Some((before, _)) = &picker {
                    return fail(format!(
                        "failed to set '{}' as picker, already have a registered picker plugin '{}'",
                        instance.name.name, before.name
                    ));
                }
                picker = Some((name(), Arc::clone(own)));
            }
        }
        // Any picker will do for a profile that names none.
        let any = || {
            self.instances
                .iter()
                .find_map(|i| Some((i.name.clone(), i.roles.picker.clone()?)))
        };
        let Some(picker) = picker.or_else(any) else {
            return invalid(format!("schedulingProfiles[{}] has no picker", entry.name));
        };
        Ok(ResolvedProfile {
            name: entry.name.clone(),
            filters,
            scorers,
            picker,
        })
    }
}
