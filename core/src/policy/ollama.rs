//! What Ollama does: shortest keep-alive first, then the name in alphabetical order.
//!
//! `findRunnerToUnload` in its `server/sched.go` sorts by `ByDurationAndName`: the keep-alive of each runner, which is
//! five minutes for all unless a request says otherwise, then the model's path, which ends in its digest. What has been idle for
//! longer than its keep-alive is unloaded anyway, so here it goes first.

use std::time::Duration;

use super::{Candidate, EvictionPolicy, Victim, by_key};

/// Ollama's default keep-alive.
const KEEP_ALIVE: Duration = Duration::from_secs(300);

/// Keep-alive, then alphabetical.
#[derive(Debug, Default, Clone, Copy)]
pub struct Ollama;

impl EvictionPolicy for Ollama {
    fn name(&self) -> &'static str {
        "ollama"
    }

    fn rank(&mut self, now: Duration, candidates: &[Candidate]) -> Vec<Victim> {
        by_key(candidates, |c| {
            let left = KEEP_ALIVE.saturating_sub(now.saturating_sub(c.last_used));
            let expired = left.is_zero();
            let reason = if expired {
                "keep-alive has passed"
            } else {
                "first by name"
            };
            // The comparison of content ids comes last by itself.
            (
                (!expired, if expired { c.last_used } else { Duration::ZERO }),
                left.as_secs_f64(),
                reason.to_owned(),
            )
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
            candidate(4, 1, 990),
            candidate(2, 1, 999),
            candidate(3, 1, 100),
            candidate(9, 1, 50),
        ];
        let ranked = Ollama.rank(Duration::from_secs(1000), &candidates);
        assert_eq!(order_of(&ranked), [9, 3, 2, 4]);
    }

    #[test]
    fn it_is_a_policy() {
        check_policy(|| Box::new(Ollama));
    }
}
