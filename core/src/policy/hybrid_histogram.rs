//! The hybrid histogram policy of serverless platforms: keep what its own history of idle times says will be wanted.
//!
//! Shahrad et al., "Serverless in the Wild", USENIX ATC 2020, section 4.2: per function a histogram of idle times in bins
//! of one minute up to four hours; a window that opens at the 5th percentile (less 10 %) and closes at the 99th (more 10
//! %); where the histogram says little (fewer than two bins' worth of spread in its counts, or half of the idle times
//! beyond its end), a fixed keep-alive of its whole range. The paper forecasts the last case with ARIMA, which pays
//! for a few percent of functions only; here it has the fixed window. The paper unloads by itself; under a
//! budget, what is outside of its window goes first, and then what will be outside soonest.

use std::time::Duration;

use super::memory::Memory;
use super::{Candidate, EvictionPolicy, Victim, by_key};
use crate::ids::ContentId;
use crate::units::Bytes;

/// Bins of one minute.
const BINS: usize = 240;
/// Width of a bin in seconds.
const BIN_S: f64 = 60.0;
/// Idle times needed before a histogram is read.
const MIN_SEEN: u32 = 5;
/// The coefficient of variation of the bins' counts below which a histogram says little.
const MIN_VARIATION: f64 = 2.0;

#[derive(Debug, Clone)]
struct Idle {
    last: Duration,
    /// Counts of idle times, `BINS` of them once there is one.
    bins: Vec<u16>,
    seen: u32,
    beyond: u32,
}

impl Idle {
    /// From when to when after a use the component should be there, in seconds.
    fn window(&self) -> (f64, f64) {
        let whole = (0.0, BINS as f64 * BIN_S);
        let within = self.seen - self.beyond;
        if self.seen < MIN_SEEN || 2 * self.beyond > self.seen || self.variation() < MIN_VARIATION {
            return whole;
        }
        let at = |share: f64| {
            let rank = (share * f64::from(within)).ceil().max(1.0);
            let mut sum = 0.0;
            self.bins
                .iter()
                .position(|count| {
                    sum += f64::from(*count);
                    sum >= rank
                })
                .unwrap_or(BINS - 1)
        };
        let from = at(0.05) as f64 * BIN_S * 0.9;
        let to = (at(0.99) + 1) as f64 * BIN_S * 1.1;
        (from, to)
    }

    fn variation(&self) -> f64 {
        let n = BINS as f64;
        let mean = f64::from(self.seen - self.beyond) / n;
        let squares: f64 = self
            .bins
            .iter()
            .map(|c| (f64::from(*c) - mean).powi(2))
            .sum();
        if mean > 0.0 {
            (squares / n).sqrt() / mean
        } else {
            0.0
        }
    }
}

/// The hybrid histogram policy.
#[derive(Debug, Default, Clone)]
pub struct HybridHistogram {
    idle: Memory<Idle>,
}

impl EvictionPolicy for HybridHistogram {
    fn name(&self) -> &'static str {
        "hybrid-histogram"
    }

    fn on_request(&mut self, now: Duration, content: &ContentId, _bytes: Bytes, _hit: bool) {
        let mut idle = self.idle.remove(content).unwrap_or_else(|| Idle {
            last: now,
            bins: Vec::new(),
            seen: 0,
            beyond: 0,
        });
        let gap = now.saturating_sub(idle.last).as_secs_f64();
        if gap > 0.0 {
            idle.seen = idle.seen.saturating_add(1);
            idle.bins.resize(BINS, 0);
            match idle.bins.get_mut((gap / BIN_S) as usize) {
                Some(bin) if *bin < u16::MAX => *bin += 1,
                Some(_) => idle.seen -= 1,
                None => idle.beyond += 1,
            }
        }
        idle.last = now;
        self.idle.put(*content, idle);
    }

    fn rank(&mut self, now: Duration, candidates: &[Candidate]) -> Vec<Victim> {
        by_key(candidates, |c| {
            let known = self.idle.get(&c.content);
            let last = known.map_or(c.last_used, |idle| idle.last);
            let (from, to) = known.map_or((0.0, BINS as f64 * BIN_S), Idle::window);
            let passed = now.saturating_sub(last).as_secs_f64();
            let left = to - passed;
            let inside = passed >= from && left > 0.0;
            // Outside: the one that was so for longest first. Inside: the one that is out soonest.
            let urgency = if inside { left } else { -passed };
            let key = (inside, Duration::from_secs_f64(urgency.max(0.0)), last);
            let score = if inside { left } else { left.min(0.0) };
            (
                key,
                score,
                format!("idle for {passed:.0} s, wanted {from:.0} s to {to:.0} s after a use"),
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::test_utils::{candidate, check_policy, content, order_of};

    #[test]
    fn worked_by_hand() {
        let mut policy = HybridHistogram::default();
        // 1 comes every ten minutes: kept from 9 to 12.1 minutes after a use. 2 came once: kept for four hours.
        for i in 0..20 {
            policy.on_request(Duration::from_secs(i * 600), &content(1), Bytes(1), true);
        }
        let last = 19 * 600;
        policy.on_request(Duration::from_secs(last), &content(2), Bytes(1), false);
        let window = policy.idle.get(&content(1)).unwrap().window();
        assert!((window.0 - 540.0).abs() < 1e-9 && (window.1 - 726.0).abs() < 1e-9);
        let both = [candidate(1, 1, 0), candidate(2, 1, 0)];
        for (after, order) in [(60, [1, 2]), (600, [1, 2]), (800, [1, 2]), (20_000, [1, 2])] {
            let ranked = policy.rank(Duration::from_secs(last + after), &both);
            assert_eq!(order_of(&ranked), order, "after {after}");
        }
        // Due within its window, 1 stays and what is past its own goes.
        let mut third = candidate(3, 1, 0);
        third.last_used = Duration::ZERO;
        let now = Duration::from_secs(last + 600 + 4 * 3600);
        policy.on_request(
            Duration::from_secs(last + 4 * 3600),
            &content(1),
            Bytes(1),
            true,
        );
        assert_eq!(
            order_of(&policy.rank(now, &[both[0].clone(), third])),
            [3, 1]
        );
    }

    #[test]
    fn it_is_a_policy() {
        check_policy(|| Box::new(HybridHistogram::default()));
    }
}
