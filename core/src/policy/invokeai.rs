//! What InvokeAI does with VRAM: the smallest goes first.
//!
//! `_offload_unlocked_models` in its `model_cache.py` walks the cached models sorted by their bytes, smallest first.

use std::time::Duration;

use super::{Candidate, EvictionPolicy, Victim, by_key};

/// Smallest first.
#[derive(Debug, Default, Clone, Copy)]
pub struct InvokeAi;

impl EvictionPolicy for InvokeAi {
    fn name(&self) -> &'static str {
        "invokeai"
    }

    fn rank(&mut self, _now: Duration, candidates: &[Candidate]) -> Vec<Victim> {
        by_key(candidates, |c| {
            (c.bytes, c.bytes.as_f64(), format!("smallest: {}", c.bytes))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::test_utils::{candidate, check_policy, order_of};

    #[test]
    fn worked_by_hand() {
        let candidates = [
            candidate(1, 30, 0),
            candidate(2, 10, 9),
            candidate(3, 20, 5),
        ];
        let ranked = InvokeAi.rank(Duration::from_secs(10), &candidates);
        assert_eq!(order_of(&ranked), [2, 3, 1]);
    }

    #[test]
    fn it_is_a_policy() {
        check_policy(|| Box::new(InvokeAi));
    }
}
