//! What llama.cpp's router does: least recently used first, with a bound on the number of models instead of bytes.
//!
//! `--models-max`, four by default: past it, the model that was used least recently is unloaded. Replays
//! honour the bound through [`EvictionPolicy::max_residents`], beside the budget that every policy has.

use std::time::Duration;

use super::lru::Lru;
use super::{Candidate, EvictionPolicy, Victim};

/// The router's default bound.
const MODELS_MAX: usize = 4;

/// Least recently used, with a bound on the count.
#[derive(Debug, Default, Clone, Copy)]
pub struct LlamaCpp;

impl EvictionPolicy for LlamaCpp {
    fn name(&self) -> &'static str {
        "llama-cpp"
    }

    fn rank(&mut self, now: Duration, candidates: &[Candidate]) -> Vec<Victim> {
        Lru.rank(now, candidates)
    }

    fn max_residents(&self) -> Option<usize> {
        Some(MODELS_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::test_utils::{candidate, check_policy, order_of};

    #[test]
    fn worked_by_hand() {
        let candidates = [
            candidate(1, 30, 2),
            candidate(2, 10, 9),
            candidate(3, 20, 5),
        ];
        let ranked = LlamaCpp.rank(Duration::from_secs(10), &candidates);
        assert_eq!(order_of(&ranked), [1, 3, 2]);
        assert_eq!(LlamaCpp.max_residents(), Some(4));
    }

    #[test]
    fn it_is_a_policy() {
        check_policy(|| Box::new(LlamaCpp));
    }
}
