//! Least recently used first.
//!
//! The recency order of Belady's time and of nearly every cache since: what was asked for longest ago goes. It knows
//! neither sizes nor costs, which is why it is the yardstick and not the goal.

use std::time::Duration;

use super::{Candidate, EvictionPolicy, Victim};

/// Least recently used first; ties go to the larger, then to the content id, so that the order is always the same.
#[derive(Debug, Default, Clone, Copy)]
pub struct Lru;

impl EvictionPolicy for Lru {
    fn name(&self) -> &'static str {
        "lru"
    }

    fn rank(&mut self, now: Duration, candidates: &[Candidate]) -> Vec<Victim> {
        let mut order: Vec<&Candidate> = candidates.iter().collect();
        order.sort_by_key(|c| (c.last_used, std::cmp::Reverse(c.bytes), c.content));
        order
            .into_iter()
            .map(|c| {
                let idle = now.saturating_sub(c.last_used).as_secs_f64();
                Victim {
                    content: c.content,
                    score: -idle,
                    reason: format!("least recently used: idle for {idle:.1} s"),
                }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::test_utils::{candidate, check_policy};

    #[test]
    fn the_longest_idle_goes_first() {
        let candidates = [
            candidate(1, 5, 30),
            candidate(2, 50, 10),
            candidate(3, 5, 20),
        ];
        let ranked = Lru.rank(Duration::from_secs(40), &candidates);
        let order: Vec<_> = ranked.iter().map(|v| v.content).collect();
        assert_eq!(
            order,
            [
                candidates[1].content,
                candidates[2].content,
                candidates[0].content
            ]
        );
        assert!((ranked[0].score + 30.0).abs() < 1e-9);
    }

    #[test]
    fn it_is_a_policy() {
        check_policy(|| Box::new(Lru));
    }
}
