//! Names and weights of the places a block can lie in.

use std::sync::Arc;

/// Tiers told apart. Names past these share the last number.
pub const MAX_TIERS: usize = 8;
/// Number of the tier an event without a medium means.
pub const GPU: u8 = 0;
/// Number of the tier of host memory.
pub const CPU: u8 = 1;
/// Number of predictions made from routing, until an event or a deadline replaces them.
pub const SPECULATIVE: u8 = 2;
/// Number of all tiers past [`MAX_TIERS`].
const OTHER: u8 = 7;

/// Tier numbers by lower-case name. Numbers are given in the order names first appear.
#[derive(Debug)]
pub(super) struct Tiers {
    names: Vec<Arc<str>>,
    weights: Vec<(String, f64)>,
    /// Weight by number; an unlisted tier weighs 1.0.
    pub(super) by_number: [f64; MAX_TIERS],
}

impl Tiers {
    pub(super) fn new(weights: &[(String, f64)]) -> Self {
        let weights: Vec<_> = weights
            .iter()
            .map(|(name, weight)| (name.to_ascii_lowercase(), *weight))
            .collect();
        let mut tiers = Self {
            names: Vec::new(),
            weights,
            by_number: [1.0; MAX_TIERS],
        };
        for name in ["gpu", "cpu", "speculative"] {
            tiers.number(name);
        }
        tiers
    }

    /// Number of a medium as an event sends it, if it has one.
    pub(super) fn find(&self, medium: &str) -> Option<u8> {
        let name = if medium.is_empty() { "gpu" } else { medium };
        let mut known = self.names.iter().zip(0_u8..);
        let known = known.find(|(other, _)| other.eq_ignore_ascii_case(name));
        let full = self.names.len() >= usize::from(OTHER);
        known.map(|(_, number)| number).or(full.then_some(OTHER))
    }

    /// Number of a medium, a new one if it has none.
    pub(super) fn number(&mut self, medium: &str) -> u8 {
        if let Some(number) = self.find(medium) {
            return number;
        }
        let number = u8::try_from(self.names.len()).unwrap_or(OTHER);
        let name = medium.to_ascii_lowercase();
        let weight = self.weights.iter().find(|(listed, _)| *listed == name);
        if let (Some((_, weight)), Some(slot)) =
            (weight, self.by_number.get_mut(usize::from(number)))
        {
            *slot = *weight;
        }
        self.names.push(name.into());
        number
    }

    /// Names by number.
    pub(super) fn names(&self) -> Vec<Arc<str>> {
        self.names.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_ignore_case_and_have_a_bound() {
        let mut tiers = Tiers::new(&[("CPU".into(), 0.8), ("storage".into(), 0.25)]);
        assert_eq!([tiers.number(""), tiers.number("GPU")], [GPU; 2]);
        assert_eq!([tiers.number("cpu"), tiers.number("Cpu")], [CPU; 2]);
        assert_eq!(tiers.number("speculative"), SPECULATIVE);
        let named: Vec<_> = ["STORAGE", "fs", "obj", "disk", "tape", "more", "tape"]
            .iter()
            .map(|name| tiers.number(name))
            .collect();
        assert_eq!(named, [3, 4, 5, 6, 7, 7, 7]);
        assert_eq!(tiers.names().len(), 7);
        assert_eq!(tiers.by_number[..4], [1.0, 0.8, 1.0, 0.25]);
    }
}
