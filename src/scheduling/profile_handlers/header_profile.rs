//! `header-profile-handler`

use serde::Deserialize;
use smallvec::SmallVec;

use crate::plugin::{Build, Maturity, ParamDoc, Plugin, PluginError};
use crate::scheduling::{
    ProfileHandler, ProfileRun, Round, ScheduleError, SchedulingResult, Survivors,
};

/// Runs the one profile that a request header names.
///
/// A request without the header, or with an empty one, gets `defaultProfile`. A configuration with one
/// profile always runs it. A name that no profile has is the client's mistake and refused as such.
#[derive(Debug)]
pub struct HeaderProfileHandler {
    header: String,
    default_profile: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    header_name: String,
    default_profile: String,
}

impl Plugin for HeaderProfileHandler {
    const TYPE: &'static str = "header-profile-handler";
    const MATURITY: Maturity = Maturity::Alpha;
    const PARAMETERS: &'static [ParamDoc] = &[
        ParamDoc {
            name: "headerName",
            kind: "string",
            default: "EPP-Profile",
            help: "Request header that names the profile.",
        },
        ParamDoc {
            name: "defaultProfile",
            kind: "string",
            default: "decode",
            help: "Profile of requests without the header.",
        },
    ];
    const ABOUT: &'static str = "Runs the scheduling profile that a request header names.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<Self, _>()?;
        let or = |value: &str, default: &str| {
            let value = value.trim();
            if value.is_empty() { default } else { value }.to_owned()
        };
        Ok(Self {
            header: or(&settings.header_name, "epp-profile").to_ascii_lowercase(),
            default_profile: or(&settings.default_profile, "decode"),
        })
    }
}

impl HeaderProfileHandler {
    /// Position of the profile this request wants.
    fn wanted(&self, round: &Round<'_>) -> Option<usize> {
        let names = round.names;
        if names.len() == 1 {
            return Some(0);
        }
        let named = round.cycle.request.headers.get_str(&self.header);
        let name = named.map(str::trim).filter(|n| !n.is_empty());
        let name = name.unwrap_or(&self.default_profile);
        names.iter().position(|n| **n == *name)
    }
}

impl ProfileHandler for HeaderProfileHandler {
    fn next_profiles(&self, round: &Round<'_>, runs: &[ProfileRun], run: &mut Vec<usize>) {
        if runs.iter().all(|r| *r == ProfileRun::NotRun) {
            run.extend(self.wanted(round));
        }
    }

    fn combine(
        &self,
        _: &Round<'_>,
        _: Survivors<'_>,
        runs: &mut [ProfileRun],
    ) -> Result<SchedulingResult, ScheduleError> {
        let ran = runs.iter_mut().find(|r| **r != ProfileRun::NotRun);
        match ran.map(std::mem::take) {
            Some(ProfileRun::Picked(primary)) => Ok(SchedulingResult {
                primary,
                others: SmallVec::new(),
            }),
            Some(ProfileRun::Failed) => Err(ScheduleError::FiltersLeftNothing),
            Some(ProfileRun::NotRun) | None => Err(ScheduleError::UnknownProfile),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::scheduling::ProfilePicks;
    use crate::scheduling::test_support::Pool;

    /// Which of `profiles` runs, or why none does.
    fn ran(
        parameters: &str,
        header: Option<&str>,
        profiles: &[&str],
    ) -> Result<String, ScheduleError> {
        let mut pool = Pool::new([]);
        let handler: HeaderProfileHandler = pool.plugin(parameters);
        if let Some(value) = header {
            pool.header("epp-profile", value);
        }
        let names: Vec<Arc<str>> = profiles.iter().map(|n| Arc::from(*n)).collect();
        let mut runs = vec![ProfileRun::NotRun; names.len()];
        pool.with_round(&names, |round| {
            let mut run = Vec::new();
            handler.next_profiles(round, &runs, &mut run);
            for position in run {
                runs[position] = ProfileRun::Picked(ProfilePicks {
                    profile: Arc::clone(&names[position]),
                    picks: [0].into_iter().collect(),
                });
                let mut more = Vec::new();
                handler.next_profiles(round, &runs, &mut more);
                assert!(more.is_empty(), "one profile a request");
            }
            let result = handler.combine(round, Survivors::new(&[]), &mut runs)?;
            Ok(result.primary.profile.to_string())
        })
    }

    #[test]
    fn the_header_or_the_default_names_the_profile() {
        let both = ["prefill", "decode"];
        let ok = |name: &str| Ok(name.to_owned());
        assert_eq!(ran("{}", Some(" prefill "), &both), ok("prefill"));
        assert_eq!(ran("{}", Some(""), &both), ok("decode"));
        assert_eq!(ran("{}", None, &both), ok("decode"));
        let unknown = Err(ScheduleError::UnknownProfile);
        assert_eq!(ran("{}", Some("Prefill"), &both), unknown);
        assert_eq!(ran(r#"{"defaultProfile": "x"}"#, None, &both), unknown);
        assert_eq!(
            ran(r#"{"headerName": "X-Stage"}"#, Some("prefill"), &both),
            ok("decode"),
            "another header"
        );
        assert_eq!(ran("{}", Some("prefill"), &["only"]), ok("only"));
    }

    #[test]
    fn a_profile_whose_filters_left_nothing_fails() {
        let mut pool = Pool::new([]);
        let handler: HeaderProfileHandler = pool.plugin("{}");
        let names: [Arc<str>; 2] = ["a".into(), "decode".into()];
        let mut runs = [ProfileRun::NotRun, ProfileRun::Failed];
        let result = pool.with_round(&names, |round| {
            handler.combine(round, Survivors::new(&[]), &mut runs)
        });
        assert_eq!(result.unwrap_err(), ScheduleError::FiltersLeftNothing);
    }
}
