//! What Lemonade does: the largest idle time for its load time goes first.
//!
//! A model that loads slowly must be idle for proportionally longer to go; size and frequency do not count.

use std::time::Duration;

use super::{Candidate, EvictionPolicy, Victim, by_score};

/// Load times are taken to be at least this long, in seconds, so that nothing is divided by zero.
const MIN_LOAD_S: f64 = 1e-3;

/// Largest `idle / load time` first.
#[derive(Debug, Default, Clone, Copy)]
pub struct Lemonade;

impl EvictionPolicy for Lemonade {
    fn name(&self) -> &'static str {
        "lemonade"
    }

    fn rank(&mut self, now: Duration, candidates: &[Candidate]) -> Vec<Victim> {
        by_score(candidates, |c| {
            let idle = now.saturating_sub(c.last_used).as_secs_f64();
            let score = idle / c.restore_s.max(MIN_LOAD_S);
            (-score, format!("idle for {score:.1} times its load time"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::test_utils::{candidate, check_policy, order_of};

    #[test]
    fn worked_by_hand() {
        let mut slow = candidate(1, 1, 0);
        slow.restore_s = 20.0;
        // Idle over load time: 100/20, 10/1, 3/1.
        let candidates = [slow, candidate(2, 1, 90), candidate(3, 1, 97)];
        let ranked = Lemonade.rank(Duration::from_secs(100), &candidates);
        assert_eq!(order_of(&ranked), [2, 1, 3]);
    }

    #[test]
    fn it_is_a_policy() {
        check_policy(|| Box::new(Lemonade));
    }
}
