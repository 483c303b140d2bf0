//! `single-profile-handler`

use smallvec::SmallVec;

use crate::plugin::{Build, Maturity, ParamDoc, Plugin, PluginError};
use crate::scheduling::{
    ProfileHandler, ProfileRun, Round, ScheduleError, SchedulingResult, Survivors,
};

/// Runs the only profile; its picks are the result. Ignores parameters.
#[derive(Debug, Default)]
pub struct SingleProfileHandler;

impl Plugin for SingleProfileHandler {
    const TYPE: &'static str = "single-profile-handler";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[];
    const LENIENT: bool = true;
    const ABOUT: &'static str = "Runs the only scheduling profile.";

    fn build(_: &mut Build<'_>) -> Result<Self, PluginError> {
        Ok(Self)
    }
}

impl ProfileHandler for SingleProfileHandler {
    fn next_profiles(&self, _: &Round<'_>, runs: &[ProfileRun], run: &mut Vec<usize>) {
        if runs.first() == Some(&ProfileRun::NotRun) {
            run.push(0);
        }
    }

    fn combine(
        &self,
        _: &Round<'_>,
        _: Survivors<'_>,
        runs: &mut [ProfileRun],
    ) -> Result<SchedulingResult, ScheduleError> {
        match runs.first_mut().map(std::mem::take) {
            Some(ProfileRun::Picked(primary)) => Ok(SchedulingResult {
                primary,
                others: SmallVec::new(),
            }),
            _ => Err(ScheduleError::FiltersLeftNothing),
        }
    }
}
