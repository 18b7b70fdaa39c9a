//! What it costs to lose a residency, in seconds: for comparing what different GPUs would have to give up.

use std::time::Duration;

use super::Candidate;

/// Uses further ahead than this count for nothing, in seconds: by then it would be somebody else's turn to decide.
const HORIZON_S: f64 = 15.0 * 60.0;
/// Time over which a rate is believed before there is any, in seconds: one use in the first second is no use each second.
const PRIOR_S: f64 = 60.0;

/// Expected seconds that its next user waits: what restoring it takes, times the chance that it is used again soon. Uses are
/// taken to come at random at the rate that they had; who has been idle for longer than that explains is on the way out.
#[must_use]
pub fn expected_loss_s(candidate: &Candidate, now: Duration) -> f64 {
    let age = now.saturating_sub(candidate.admitted).as_secs_f64();
    let idle = now.saturating_sub(candidate.last_used).as_secs_f64();
    let rate = candidate.uses as f64 / (age + PRIOR_S);
    let fading = (1.0 - rate * idle).min(0.0).exp();
    candidate.restore_s * (1.0 - (-rate * HORIZON_S).exp()) * fading
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::test_utils::candidate;

    #[test]
    fn what_is_used_more_and_loads_slower_is_worth_more() {
        let now = Duration::from_secs(1000);
        let base = Candidate {
            restore_s: 10.0,
            uses: 10,
            ..candidate(1, 10, 990)
        };
        let worth = |change: fn(&mut Candidate)| {
            let mut changed = base.clone();
            change(&mut changed);
            expected_loss_s(&changed, now)
        };
        let as_is = worth(|_| {});
        assert!(as_is > 9.0 && as_is <= 10.0, "{as_is}");
        assert!(worth(|c| c.restore_s = 20.0) > as_is);
        assert!(worth(|c| c.uses = 1) < as_is);
        assert!(worth(|c| c.last_used = Duration::from_secs(100)) < as_is / 2.0);
        assert_eq!(worth(|c| c.uses = 0), 0.0);
        assert_eq!(worth(|c| c.restore_s = 0.0), 0.0);
    }
}
