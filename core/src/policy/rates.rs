//! Rates of use as last predicted. A prediction costs about a microsecond; a thousand of them for each eviction would cost
//! a millisecond, and hardly any has changed since the eviction before.

use std::time::Duration;

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

#[derive(Debug, Clone, Copy, Default)]
struct Kept {
    rate: f64,
    /// The request before which it stands.
    fresh_until: u64,
    /// Whether it was ever found since the component was used last.
    known: bool,
}

impl Kept {
    fn renew(
        &mut self,
        predictor: &mut Predictor,
        now: Duration,
        content: &ContentId,
        horizon: f64,
    ) -> f64 {
        let rate = predictor.rate(now, content, horizon);
        *self = Self {
            rate: rate.filter(|rate| rate.is_finite()).unwrap_or(0.0),
            fresh_until: predictor.observed() + predictor.requests_since(content) / STANDS + 1,
            known: true,
        };
        self.rate
    }
}

/// The latest rates.
#[derive(Debug, Clone, Default)]
pub(super) struct Rates {
    kept: Slots<Kept>,
    /// How many more may be found anew in this decision.
    left: usize,
}

impl Rates {
    /// A decision begins.
    pub(super) fn grant(&mut self) {
        self.left = RENEWED;
        self.kept.rewind();
    }

    /// The component was used.
    pub(super) fn forget(&mut self, content: &ContentId) {
        if let Some(kept) = self.kept.get_mut(content) {
            (kept.known, kept.fresh_until) = (false, 0);
        }
    }

    /// The rate as it is now, and whether it is another than what was kept.
    pub(super) fn now(
        &mut self,
        predictor: &mut Predictor,
        now: Duration,
        content: &ContentId,
        horizon: f64,
    ) -> (f64, bool) {
        let kept = self.kept(content);
        if kept.known && kept.fresh_until > predictor.observed() {
            return (kept.rate, false);
        }
        (kept.renew(predictor, now, content, horizon), true)
    }

    /// The rate as it was not long ago.
    #[inline]
    pub(super) fn lately(
        &mut self,
        predictor: &mut Predictor,
        now: Duration,
        content: &ContentId,
        horizon: f64,
    ) -> f64 {
        let Some(kept) = self.kept.walk(content) else {
            let kept = self.kept(content);
            return kept.renew(predictor, now, content, horizon);
        };
        if kept.known {
            if kept.fresh_until > predictor.observed() || self.left == 0 {
                return kept.rate;
            }
            self.left -= 1;
        }
        kept.renew(predictor, now, content, horizon)
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
        let all: Vec<u64> = (0..13).collect();
        for round in 0..40_u64 {
            rates.grant();
            // In order, with some gone, and turned around.
            let mut order: Vec<u64> = all.iter().copied().filter(|n| n % 5 != round % 5).collect();
            if round % 4 == 3 {
                order.reverse();
            }
            let now = Duration::from_secs(3_000);
            for n in order {
                let rate = rates.lately(&mut predictor, now, &content(n), 64.0);
                assert_eq!(Some(rate), predictor.rate(now, &content(n), 64.0), "{n}");
                assert_eq!(
                    rates.now(&mut predictor, now, &content(n), 64.0),
                    (rate, false)
                );
            }
        }
        rates.forget(&content(3));
        assert!(
            rates
                .now(
                    &mut predictor,
                    Duration::from_secs(3_000),
                    &content(3),
                    64.0
                )
                .1
        );
        for n in 0..2 * MAX_KEPT as u64 {
            rates.now(&mut predictor, Duration::ZERO, &content(n), 64.0);
        }
        assert!(rates.kept.len() <= MAX_KEPT);
    }
}
