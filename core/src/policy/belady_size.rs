//! The clairvoyant yardstick: Belady's rule by size and cost. It sees the future, so only replays can run it.
//!
//! Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 1966: what is used
//! again latest goes first. With sizes and costs no simple rule is optimal; this one evicts the largest
//! `time to next use * bytes / restore time`, which is strong, and not a bound.

use std::collections::HashMap;
use std::time::Duration;

use super::{Candidate, EvictionPolicy, Victim, by_score};
use crate::ids::ContentId;

/// Belady by size and cost.
#[derive(Debug, Default, Clone)]
pub struct BeladySize {
    /// All uses of each component, in order.
    uses: HashMap<ContentId, Vec<Duration>>,
}

/// Stands for "never again".
const NEVER: f64 = 1e300;

impl BeladySize {
    /// With the uses that are to come, in the order of time.
    #[must_use]
    pub fn new(future: impl IntoIterator<Item = (Duration, ContentId)>) -> Self {
        let mut uses: HashMap<ContentId, Vec<Duration>> = HashMap::new();
        for (at, content) in future {
            uses.entry(content).or_default().push(at);
        }
        Self { uses }
    }

    fn next_use(&self, now: Duration, content: &ContentId) -> Option<Duration> {
        let uses = self.uses.get(content)?;
        uses.get(uses.partition_point(|at| *at <= now)).copied()
    }
}

impl EvictionPolicy for BeladySize {
    fn name(&self) -> &'static str {
        "belady-size"
    }

    fn rank(&mut self, now: Duration, candidates: &[Candidate]) -> Vec<Victim> {
        by_score(candidates, |c| match self.next_use(now, &c.content) {
            None => (-NEVER, "never used again".to_owned()),
            Some(next) => {
                let wait = (next - now).as_secs_f64();
                let score = wait * (c.bytes.as_f64() / 1e9) / c.restore_s.max(1e-9);
                (-score, format!("used again in {wait:.1} s"))
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::test_utils::{candidate, check_policy, content, order_of};

    #[test]
    fn worked_by_hand() {
        let s = Duration::from_secs;
        let future = [
            (s(1), content(1)),
            (s(5), content(1)),
            (s(4), content(2)),
            (s(9), content(3)),
        ];
        let mut policy = BeladySize::new(future);
        let same: Vec<_> = (1..=4).map(|n| candidate(n, 1_000_000_000, 0)).collect();
        assert_eq!(order_of(&policy.rank(s(0), &same)), [4, 3, 2, 1]);
        assert_eq!(order_of(&policy.rank(s(1), &same)), [4, 3, 1, 2]);
        // Ten times the bytes outweigh twice the wait.
        let mut large = candidate(2, 10_000_000_000, 0);
        assert_eq!(
            order_of(&policy.rank(s(0), &[large.clone(), same[2].clone()])),
            [2, 3]
        );
        large.restore_s = 10.0;
        assert_eq!(
            order_of(&policy.rank(s(0), &[large, same[2].clone()])),
            [3, 2]
        );
    }

    #[test]
    fn it_is_a_policy() {
        check_policy(|| Box::new(BeladySize::default()));
    }
}
