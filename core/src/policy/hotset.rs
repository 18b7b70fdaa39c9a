//! hotset's own retention: the least predicted use times restore time for its bytes goes first.
//!
//! The value of keeping a component for a while is the rate of its next uses, times the seconds that a load would take;
//! it costs its bytes. The rate comes from [`Predictor`] with a horizon of an hour: `-ln(1 - p) / horizon`, the rate of a
//! Poisson process with that chance of a use. Victims by density, since a knapsack over the candidates measured worse.
//! Until the predictor has learned enough, least recently used; it learns from [`EvictionPolicy::observe`], so where that is
//! not called it stays so.

use std::collections::HashMap;
use std::time::Duration;

use super::lru::Lru;
use super::{Candidate, EvictionPolicy, Victim, by_score};
use crate::config::PredictConfig;
use crate::ids::ContentId;
use crate::predict::{Observed, Predictor, PredictorStats};

/// How far ahead a use counts. Measured: from half an hour to two hours within 1 to 4 %.
const HORIZON: Duration = Duration::from_secs(3_600);
/// The largest probability, so that rates stay finite.
const MAX_PROBABILITY: f64 = 0.999_9;

/// Retention by predicted use.
#[derive(Debug, Clone)]
pub struct HotsetRetention {
    predictor: Predictor,
}

impl HotsetRetention {
    /// One that knows nothing yet.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self::with_horizon(seed, HORIZON)
    }

    /// One that looks this far ahead.
    #[must_use]
    pub fn with_horizon(seed: u64, horizon: Duration) -> Self {
        Self {
            predictor: Predictor::new(&PredictConfig {
                horizon,
                seed,
                ..PredictConfig::default()
            }),
        }
    }

    /// What its predictor knows of itself.
    #[must_use]
    pub fn stats(&self) -> PredictorStats {
        self.predictor.stats()
    }
}

impl EvictionPolicy for HotsetRetention {
    fn name(&self) -> &'static str {
        "hotset"
    }

    fn observe(&mut self, now: Duration, request: &Observed<'_>) {
        self.predictor.observe(now, request);
    }

    fn rank(&mut self, now: Duration, candidates: &[Candidate]) -> Vec<Victim> {
        if !self.predictor.is_trained() {
            return Lru.rank(now, candidates);
        }
        let wanted = self
            .predictor
            .probabilities(now, candidates.iter().map(|c| &c.content));
        let wanted: HashMap<ContentId, f64> =
            candidates.iter().map(|c| c.content).zip(wanted).collect();
        by_score(candidates, |c| {
            let p = wanted.get(&c.content).copied().unwrap_or(0.0);
            let rate = -(-p.min(MAX_PROBABILITY)).ln_1p();
            let score = rate * c.restore_s / (c.bytes.as_f64().max(1.0) / 1e9);
            (
                score,
                format!(
                    "wanted within the hour with {:.1} %, {:.2} s to restore",
                    p * 100.0,
                    c.restore_s
                ),
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::Kind;
    use crate::ids::SessionId;
    use crate::policy::test_utils::{candidate, check_policy, content, order_of};
    use crate::predict::Seen;
    use crate::units::Bytes;

    #[test]
    fn keeps_what_comes_again() {
        let mut policy = HotsetRetention::new(1);
        let gb = 1_000_000_000;
        let ask = |policy: &mut HotsetRetention, at: u64, n: u8| {
            let components = [Seen {
                content: content(n),
                kind: Kind::Checkpoint,
                bytes: Bytes(gb),
            }];
            let session = SessionId(u64::from(n));
            policy.observe(
                Duration::from_secs(at),
                &Observed {
                    session,
                    components: &components,
                },
            );
        };
        for i in 0..1000 {
            ask(&mut policy, i * 1200, 1);
            ask(&mut policy, i * 1200 + 500, 10 + (i % 40) as u8);
        }
        let at = 999 * 1200 + 600;
        let last = 10 + 39;
        // The regular one is idle for longer than the one that comes each half day.
        let regular = candidate(1, gb, at - 600);
        let rare = candidate(last, gb, at - 100);
        let ranked = policy.rank(Duration::from_secs(at), &[regular.clone(), rare.clone()]);
        assert_eq!(order_of(&ranked), [last, 1]);
        // A thousand times the bytes for the same seconds are not worth it.
        let large = Candidate {
            bytes: Bytes(1000 * gb),
            ..regular
        };
        let ranked = policy.rank(Duration::from_secs(at), &[large, rare]);
        assert_eq!(order_of(&ranked), [1, last]);
    }

    #[test]
    fn it_is_a_policy() {
        check_policy(|| Box::new(HotsetRetention::new(0)));
    }
}
