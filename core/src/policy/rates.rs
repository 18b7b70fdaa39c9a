//! Rates of use as last predicted. A prediction costs about a microsecond; a thousand of them for each eviction would cost
//! a millisecond, and hardly any has changed since the eviction before.

use std::time::Duration;

use super::Candidate;
use super::lowest::Scores;
use super::slots::Slots;
use crate::ids::ContentId;
use crate::predict::Predictor;

/// A rate stands for one in so many of the requests since the component was used: it falls with the logarithm of that.
const STANDS: u64 = 8;
/// Rates that are found anew in one decision only because they no longer stand. The shadow that runs on the same rates finds
/// more of them anew, between decisions. Measured: from 1 to 8 within half a percent; with none, up to a percent worse.
const RENEWED: usize = 2;
/// Rates kept; past it they are all found anew.
const MAX_KEPT: usize = 16_384;

/// By whom, when and how far ahead a rate is found.
#[derive(Debug)]
pub(super) struct Outlook<'a> {
    pub(super) predictor: &'a mut Predictor,
    pub(super) now: Duration,
    /// How many requests are looked ahead.
    pub(super) horizon: f64,
}

impl Outlook<'_> {
    /// Expected uses in each request.
    pub(super) fn rate(&mut self, content: &ContentId) -> f64 {
        let rate = self.predictor.rate(self.now, content, self.horizon);
        rate.filter(|rate| rate.is_finite()).unwrap_or(0.0)
    }
}

/// What is kept of a component.
#[derive(Debug, Clone, Copy, Default)]
struct Kept {
    rate: f64,
    /// The request before which it stands; zero where it was not found since the component was used last.
    fresh_until: u64,
}

impl Kept {
    #[cold]
    fn renew(&mut self, outlook: &mut Outlook<'_>, content: &ContentId) -> f64 {
        let since = outlook.predictor.requests_since(content);
        *self = Self {
            rate: outlook.rate(content),
            fresh_until: outlook.predictor.observed() + since / STANDS + 1,
        };
        self.rate
    }
}

/// The latest rates.
#[derive(Debug, Clone, Default)]
pub(super) struct Rates {
    kept: Slots<Kept>,
}

impl Rates {
    /// Scores all candidates by their rates as they were not long ago.
    pub(super) fn score(
        &mut self,
        outlook: &mut Outlook<'_>,
        scores: &mut Scores<'_>,
        score: impl Fn(f64, &Candidate) -> f64,
    ) {
        let observed = outlook.predictor.observed();
        let mut left = RENEWED;
        // One comparison for each, which comes out the same nearly always: which of them still stand no processor can foresee.
        let mut enough = observed;
        let mut unknown = Vec::new();
        self.kept.score(scores, |candidate, kept| {
            let rate = match kept {
                Some(kept) if kept.fresh_until > enough => kept.rate,
                Some(kept) => {
                    left -= usize::from(kept.fresh_until > 0);
                    enough = if left == 0 { 0 } else { observed };
                    kept.renew(outlook, &candidate.content)
                }
                None => {
                    let mut kept = Kept::default();
                    kept.renew(outlook, &candidate.content);
                    unknown.push((candidate.content, kept));
                    kept.rate
                }
            };
            score(rate, candidate)
        });
        for (content, kept) in unknown {
            *self.kept(&content) = kept;
        }
    }

    /// The component was used.
    pub(super) fn forget(&mut self, content: &ContentId) {
        if let Some(kept) = self.kept.get_mut(content) {
            kept.fresh_until = 0;
        }
    }

    /// The rate as it is now, and whether it is another than what was kept.
    pub(super) fn now(&mut self, outlook: &mut Outlook<'_>, content: &ContentId) -> (f64, bool) {
        let kept = self.kept(content);
        if kept.fresh_until > outlook.predictor.observed() {
            return (kept.rate, false);
        }
        (kept.renew(outlook, content), true)
    }

    /// The request before which the kept rate stands.
    pub(super) fn fresh_until(&self, content: &ContentId) -> u64 {
        self.kept.get(content).map_or(0, |kept| kept.fresh_until)
    }

    fn kept(&mut self, content: &ContentId) -> &mut Kept {
        if self.kept.len() >= MAX_KEPT && self.kept.get(content).is_none() {
            self.kept = Slots::default();
        }
        self.kept.get_or_default(content)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::Kind;
    use crate::config::PredictConfig;
    use crate::ids::SessionId;
    use crate::policy::test_utils::candidate;
    use crate::predict::{Observed, Seen};
    use crate::units::Bytes;

    fn content(n: u64) -> ContentId {
        let mut digest = [0; 32];
        digest[..8].copy_from_slice(&n.to_le_bytes());
        ContentId::File(digest)
    }

    #[test]
    fn whatever_the_order_the_rate_is_the_components_own() {
        let mut predictor = Predictor::new(&PredictConfig::default());
        let ask = |predictor: &mut Predictor, number: u64| {
            let components = [Seen {
                content: content(number % 7 * (number % 3)),
                kind: Kind::Lora,
                bytes: Bytes(1),
            }];
            let session = SessionId(number % 5);
            let request = Observed {
                session,
                components: &components,
            };
            predictor.observe(Duration::from_secs(number), &request);
        };
        (0..3_000).for_each(|number| ask(&mut predictor, number));
        assert!(predictor.is_trained());
        let mut rates = Rates::default();
        let mut outlook = Outlook {
            predictor: &mut predictor,
            now: Duration::from_secs(3_000),
            horizon: 64.0,
        };
        let all: Vec<u64> = (0..13).collect();
        for round in 0..40_u64 {
            // In order, with some gone, and turned around.
            let mut order: Vec<u64> = all.iter().copied().filter(|n| n % 5 != round % 5).collect();
            if round % 4 == 3 {
                order.reverse();
            }
            let listed = |n: &u64| Candidate {
                content: content(*n),
                ..candidate(0, 1, 0)
            };
            let order: Vec<Candidate> = order.iter().map(listed).collect();
            let mut scores = Scores::of(&order, 0.0);
            rates.score(&mut outlook, &mut scores, |rate, _| rate);
            for (Candidate { content, .. }, rate) in order.iter().zip(scores.iter()) {
                let now = outlook.now;
                let own = outlook.predictor.rate(now, content, outlook.horizon);
                assert_eq!(Some(rate), own, "{content:?}");
                assert_eq!(rates.now(&mut outlook, content), (rate, false));
            }
        }
        rates.forget(&content(3));
        assert!(rates.now(&mut outlook, &content(3)).1);
        for n in 0..2 * MAX_KEPT as u64 {
            rates.now(&mut outlook, &content(n));
        }
        assert!(rates.kept.len() <= MAX_KEPT);
    }
}
