//! `decode-filter`, `prefill-filter`, `encode-filter`: candidates by the role label.

use crate::plugin::{Build, Maturity, ParamDoc, Plugin, PluginError};
use crate::scheduling::{Candidates, Cycle, Filter};

/// Label that names an endpoint's role.
const ROLE_LABEL: &str = "llm-d.ai/role";

macro_rules! role_filter {
    ($name:ident, $type:literal, $roles:expr, $unlabelled:literal, $about:literal) => {
        #[doc = $about]
        #[derive(Debug, Default)]
        pub struct $name;

        impl Plugin for $name {
            const TYPE: &'static str = $type;
            const MATURITY: Maturity = Maturity::Beta;
            const PARAMETERS: &'static [ParamDoc] = &[];
            const LENIENT: bool = true;
            const ABOUT: &'static str = $about;

            fn build(_: &mut Build<'_>) -> Result<Self, PluginError> {
                Ok(Self)
            }
        }

        impl Filter for $name {
            fn filter(&self, _: &Cycle<'_>, candidates: Candidates<'_>, keep: &mut Vec<u32>) {
                const ROLES: &[&str] = &$roles;
                super::keep_where(candidates, keep, |_, candidate| {
                    let role = candidate.endpoint.spec.labels.get(ROLE_LABEL);
                    role.map_or($unlabelled, |role| ROLES.contains(&role.as_str()))
                });
            }
        }
    };
}

role_filter!(
    DecodeFilter,
    "decode-filter",
    ["decode", "prefill-decode", "both", "encode-prefill-decode"],
    true,
    "Keeps endpoints that decode; one without a role label does."
);
role_filter!(
    PrefillFilter,
    "prefill-filter",
    [
        "prefill",
        "encode-prefill",
        "prefill-decode",
        "both",
        "encode-prefill-decode"
    ],
    false,
    "Keeps endpoints whose role label includes prefill."
);
role_filter!(
    EncodeFilter,
    "encode-filter",
    ["encode", "encode-prefill", "encode-prefill-decode"],
    false,
    "Keeps endpoints whose role label includes encode."
);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduling::test_support::{Pool, endpoint};

    #[test]
    fn each_role_is_kept_where_the_contract_says() {
        let roles = [
            "decode",
            "prefill",
            "encode",
            "prefill-decode",
            "both",
            "encode-prefill",
            "encode-prefill-decode",
            "x",
        ];
        let labelled = roles
            .iter()
            .map(|role| endpoint(role).label(ROLE_LABEL, role));
        let pool = Pool::new(labelled.chain([endpoint("none")]));
        assert_eq!(
            pool.kept(&DecodeFilter),
            [
                "decode",
                "prefill-decode",
                "both",
                "encode-prefill-decode",
                "none"
            ]
        );
        assert_eq!(
            pool.kept(&PrefillFilter),
            [
                "prefill",
                "prefill-decode",
                "both",
                "encode-prefill",
                "encode-prefill-decode"
            ]
        );
        assert_eq!(
            pool.kept(&EncodeFilter),
            ["encode", "encode-prefill", "encode-prefill-decode"]
        );
    }
}
