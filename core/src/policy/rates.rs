//! Rates of use as last predicted. A prediction costs about a microsecond; a thousand of them for each eviction would cost
//! a millisecond, and hardly any has changed since the eviction before.

use std::collections::HashMap;
use std::time::Duration;

use crate::ids::ContentId;
use crate::predict::Predictor;

/// A rate stands for one in so many of the requests since the component was used: it falls with the logarithm of that.
const STANDS: u64 = 8;
/// Rates that are found anew in one decision only because they no longer stand. The shadow that runs on the same rates finds
/// more of them anew, between decisions.
const RENEWED: usize = 8;
/// Rates kept; past it they are all found anew.
const MAX_KEPT: usize = 16_384;

#[derive(Debug, Clone, Copy)]
struct Kept {
    content: ContentId,
    rate: f64,
    /// The request before which it stands.
    fresh_until: u64,
    /// Whether it was ever found since the component was used last.
    known: bool,
}

/// The latest rates.
#[derive(Debug, Clone, Default)]
pub(super) struct Rates {
    kept: Vec<Kept>,
    places: HashMap<ContentId, u32, foldhash::fast::RandomState>,
    /// Places in the order in which the last decision asked for them. The next one mostly asks in the same order, and
    /// then nothing need be looked up.
    order: Vec<u32>,
    /// The same for this decision, as far as it got.
    asked: Vec<u32>,
    next: usize,
    /// How many more may be found anew in this decision.
    left: usize,
}

impl Rates {
    /// A decision begins.
    pub(super) fn grant(&mut self) {
        self.left = RENEWED;
        self.next = 0;
        std::mem::swap(&mut self.order, &mut self.asked);
        self.asked.clear();
    }

    /// The component was used.
    pub(super) fn forget(&mut self, content: &ContentId) {
        if let Some(place) = self.places.get(content) {
            let kept = &mut self.kept[*place as usize];
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
        let place = self.place(content);
        let kept = &self.kept[place];
        if kept.known && kept.fresh_until > predictor.observed() {
            return (kept.rate, false);
        }
        (self.renew(predictor, now, place, horizon), true)
    }

    /// The rate as it was not long ago.
    pub(super) fn lately(
        &mut self,
        predictor: &mut Predictor,
        now: Duration,
        content: &ContentId,
        horizon: f64,
    ) -> f64 {
        let place = self.place_in_order(content);
        self.asked.push(place as u32);
        let kept = &self.kept[place];
        if kept.known {
            if kept.fresh_until > predictor.observed() || self.left == 0 {
                return kept.rate;
            }
            self.left -= 1;
        }
        self.renew(predictor, now, place, horizon)
    }

    /// The request before which the kept rate stands.
    pub(super) fn fresh_until(&self, content: &ContentId) -> u64 {
        let place = self.places.get(content);
        place.map_or(0, |place| self.kept[*place as usize].fresh_until)
    }

    /// As [`Self::place`], first looking where the last decision found it: next in order, or after one that is gone.
    fn place_in_order(&mut self, content: &ContentId) -> usize {
        for at in [self.next, self.next + 1] {
            if let Some(place) = self.order.get(at).map(|place| *place as usize)
                && self
                    .kept
                    .get(place)
                    .is_some_and(|kept| kept.content == *content)
            {
                self.next = at + 1;
                return place;
            }
        }
        self.place(content)
    }

    fn place(&mut self, content: &ContentId) -> usize {
        if let Some(place) = self.places.get(content) {
            return *place as usize;
        }
        if self.kept.len() >= MAX_KEPT {
            *self = Self {
                left: self.left,
                ..Self::default()
            };
        }
        let place = self.kept.len();
        self.places.insert(*content, place as u32);
        self.kept.push(Kept {
            content: *content,
            rate: 0.0,
            fresh_until: 0,
            known: false,
        });
        place
    }

    fn renew(
        &mut self,
        predictor: &mut Predictor,
        now: Duration,
        place: usize,
        horizon: f64,
    ) -> f64 {
        let kept = &mut self.kept[place];
        let rate = predictor.rate(now, &kept.content, horizon);
        kept.rate = rate.filter(|rate| rate.is_finite()).unwrap_or(0.0);
        kept.fresh_until =
            predictor.observed() + predictor.requests_since(&kept.content) / STANDS + 1;
        kept.known = true;
        kept.rate
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
