//! `data-parallel-profile-handler`

use serde::Deserialize;

use super::SingleProfileHandler;
use crate::plugin::{Build, Maturity, ParamDoc, ParamError, Plugin, PluginError};
use crate::scheduling::stages::RANK_HEADER;
use crate::scheduling::{
    Candidate, Cycle, Outcome, PreRequest, ProfileHandler, ProfileRun, Round, ScheduleError,
    SchedulingResult, Survivors,
};

/// Runs the only profile over data-parallel ranks that share a port.
///
/// For gateways that cannot address the ranks of an endpoint: the request goes to `primaryPort` of the
/// picked rank's address, where a sidecar reads the rank from `x-data-parallel-host-port`. Only the first
/// pick is a destination, because the header names a rank of that address. No scores are emitted.
#[derive(Debug)]
pub struct DataParallelProfileHandler {
    primary_port: u16,
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    primary_port: i64,
}

impl Default for Settings {
    fn default() -> Self {
        Self { primary_port: 8000 }
    }
}

/// Reads the parameter `primaryPort`.
pub(super) fn port(value: i64) -> Result<u16, ParamError> {
    match u16::try_from(value) {
        Ok(port) if port > 0 => Ok(port),
        _ => Err(ParamError(format!("primaryPort: {value} is no port"))),
    }
}

/// Says which rank was picked and where to find its sidecar.
pub(super) fn name_rank(
    candidates: &[Candidate],
    result: &SchedulingResult,
    primary_port: u16,
    outcome: &mut Outcome,
) {
    let first = result.primary.picks.first();
    if let Some(candidate) = first.and_then(|&p| candidates.get(p as usize)) {
        outcome.set_header(RANK_HEADER, candidate.endpoint.host_port.clone());
        outcome.primary_port = Some(primary_port);
    }
}

impl Plugin for DataParallelProfileHandler {
    const TYPE: &'static str = "data-parallel-profile-handler";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[ParamDoc {
        name: "primaryPort",
        kind: "int",
        default: "8000",
        help: "Port of the sidecar that knows the ranks, 1 to 65535.",
    }];
    const ABOUT: &'static str =
        "Runs the only scheduling profile over data-parallel ranks behind one port.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<Self, _>()?;
        Ok(Self {
            primary_port: port(settings.primary_port)?,
        })
    }
}

impl ProfileHandler for DataParallelProfileHandler {
    fn next_profiles(&self, round: &Round<'_>, runs: &[ProfileRun], run: &mut Vec<usize>) {
        SingleProfileHandler.next_profiles(round, runs, run);
    }

    fn combine(
        &self,
        round: &Round<'_>,
        survivors: Survivors<'_>,
        runs: &mut [ProfileRun],
    ) -> Result<SchedulingResult, ScheduleError> {
        SingleProfileHandler.combine(round, survivors, runs)
    }

    fn check_profiles(&self, names: &[&str]) -> Result<(), String> {
        match names {
            [_] => Ok(()),
            _ => Err(format!(
                "{} works with one scheduling profile, not with {}",
                Self::TYPE,
                names.len()
            )),
        }
    }
}

impl PreRequest for DataParallelProfileHandler {
    fn on_pick(
        &self,
        _: &Cycle<'_>,
        candidates: &[Candidate],
        result: &SchedulingResult,
        outcome: &mut Outcome,
    ) {
        name_rank(candidates, result, self.primary_port, outcome);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduling::ProfilePicks;
    use crate::scheduling::test_support::{Pool, endpoint, refusal};

    #[test]
    fn the_rank_is_named_and_the_port_is_the_sidecars() {
        let mut pool = Pool::new([endpoint("rank-0"), endpoint("rank-1")]);
        let handler: DataParallelProfileHandler = pool.plugin(r#"{"primaryPort": 9000}"#);
        let result = SchedulingResult {
            primary: ProfilePicks {
                profile: "default".into(),
                picks: [1, 0].into_iter().collect(),
            },
            others: smallvec::SmallVec::new(),
        };
        let mut outcome = Outcome::default();
        pool.with_cycle(|cycle, all| handler.on_pick(cycle, all, &result, &mut outcome));
        // Test endpoints are 10.0.0.1 with ports from 8000 on.
        assert_eq!(outcome.set_headers, [(RANK_HEADER, "10.0.0.1:8001".into())]);
        assert_eq!(outcome.primary_port, Some(9000));
    }

    #[test]
    fn ports_and_profiles_are_checked() {
        for value in ["0", "65536", "-1"] {
            let text =
                refusal::<DataParallelProfileHandler>(&format!(r#"{{"primaryPort": {value}}}"#));
            assert_eq!(text, format!("primaryPort: {value} is no port"));
        }
        let handler = DataParallelProfileHandler { primary_port: 1 };
        assert!(handler.check_profiles(&["any"]).is_ok());
        assert!(handler.check_profiles(&["a", "b"]).is_err());
    }
}
