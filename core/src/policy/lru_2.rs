//! LRU-2: the component whose last use but one is longest ago goes first.
//!
//! O'Neil, O'Neil and Weikum, "The LRU-K Page Replacement Algorithm For Database Disk Buffering", SIGMOD 1993, with K = 2
//! and no correlated reference period. What was used once has an infinite backward 2-distance and goes first, least
//! recently used first among its like; the history outlives evictions.

use std::time::Duration;

use super::memory::Memory;
use super::{Candidate, EvictionPolicy, Victim, by_key};
use crate::ids::ContentId;
use crate::units::Bytes;

/// LRU-2.
#[derive(Debug, Default, Clone)]
pub struct Lru2 {
    /// The last use, and the one before.
    uses: Memory<(Duration, Option<Duration>)>,
}

impl EvictionPolicy for Lru2 {
    fn name(&self) -> &'static str {
        "lru-2"
    }

    fn on_request(&mut self, now: Duration, content: &ContentId, _bytes: Bytes, _hit: bool) {
        let before = self.uses.get(content).map(|(last, _)| *last);
        self.uses.put(*content, (now, before));
    }

    fn rank(&mut self, now: Duration, candidates: &[Candidate]) -> Vec<Victim> {
        by_key(candidates, |c| {
            let known = self.uses.get(&c.content).copied();
            let (last, before) = known.unwrap_or((c.last_used, None));
            let ago = now.saturating_sub(before.unwrap_or(last)).as_secs_f64();
            let what = if before.is_some() {
                "last use but one"
            } else {
                "only use"
            };
            ((before, last), -ago, format!("{what} was {ago:.1} s ago"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::test_utils::{candidate, check_policy, content, order_of};

    #[test]
    fn worked_by_hand() {
        let mut policy = Lru2::default();
        for (at, n) in [(0, 1), (1, 2), (2, 2), (3, 3), (4, 4), (9, 1)] {
            policy.on_request(Duration::from_secs(at), &content(n), Bytes(1), true);
        }
        let all: Vec<_> = (1..=4).map(|n| candidate(n, 1, 0)).collect();
        // Used once: 3, 4. Last but one: 1 at 0 s, 2 at 1 s, though 1 was used last of all.
        let ranked = policy.rank(Duration::from_secs(10), &all);
        assert_eq!(order_of(&ranked), [3, 4, 1, 2]);
    }

    #[test]
    fn it_is_a_policy() {
        check_policy(|| Box::new(Lru2::default()));
    }
}
