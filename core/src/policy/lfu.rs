//! Least frequently used first, with counts that halve each hour.
//!
//! Plain LFU never forgets; aging by halving is as old as LFU-Aging (Robinson and Devarakonda, SIGMETRICS 1990). Here
//! the halving is continuous, so that it does not depend on when somebody looks.

use std::time::Duration;

use super::memory::Memory;
use super::{Candidate, EvictionPolicy, Victim, by_score};
use crate::ids::ContentId;
use crate::units::Bytes;

/// A use counts half as much after this time, in seconds.
const HALF_LIFE_S: f64 = 3_600.0;

#[derive(Debug, Clone, Copy)]
struct Uses {
    count: f64,
    at: Duration,
}

impl Uses {
    fn at(self, now: Duration) -> f64 {
        let passed = now.saturating_sub(self.at).as_secs_f64();
        self.count * (-passed / HALF_LIFE_S).exp2()
    }
}

/// Least frequently used first. Counts outlive evictions.
#[derive(Debug, Default, Clone)]
pub struct Lfu {
    uses: Memory<Uses>,
}

impl EvictionPolicy for Lfu {
    fn name(&self) -> &'static str {
        "lfu"
    }

    fn on_request(&mut self, now: Duration, content: &ContentId, _bytes: Bytes, _hit: bool) {
        let before = self.uses.get(content).map_or(0.0, |uses| uses.at(now));
        let uses = Uses {
            count: before + 1.0,
            at: now,
        };
        self.uses.put(*content, uses);
    }

    fn rank(&mut self, now: Duration, candidates: &[Candidate]) -> Vec<Victim> {
        by_score(candidates, |c| {
            let known = self.uses.get(&c.content).copied().unwrap_or(Uses {
                count: c.uses as f64,
                at: c.last_used,
            });
            let count = known.at(now);
            (
                count,
                format!("least frequently used: {count:.2} uses, halved hourly"),
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::test_utils::{candidate, check_policy, order_of};

    #[test]
    fn uses_fade() {
        let candidates = [candidate(1, 1, 0), candidate(2, 1, 7200)];
        let mut lfu = Lfu::default();
        // Three uses two hours ago are 0.75 of one now.
        for _ in 0..3 {
            lfu.on_request(Duration::ZERO, &candidates[0].content, Bytes(1), true);
        }
        let now = Duration::from_secs(7200);
        lfu.on_request(now, &candidates[1].content, Bytes(1), true);
        assert_eq!(order_of(&lfu.rank(now, &candidates)), [1, 2]);
        assert!((lfu.rank(now, &candidates)[0].score - 0.75).abs() < 1e-9);
    }

    #[test]
    fn it_is_a_policy() {
        check_policy(|| Box::new(Lfu::default()));
    }
}
