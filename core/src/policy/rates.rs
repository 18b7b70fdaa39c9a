//! Rates of use as last predicted. A prediction costs under a microsecond; a thousand of them for each eviction would cost
//! a millisecond, and hardly any has changed since the eviction before.

use std::collections::HashMap;
use std::time::Duration;

use crate::ids::ContentId;
use crate::predict::Predictor;

/// A rate stands for one in so many of the requests since the component was used: it falls with the logarithm of that.
const STANDS: u64 = 8;
/// Rates that are found anew in one decision only because they no longer stand.
const RENEWED: usize = 16;
/// Rates kept; past it they are all found anew.
const MAX_KEPT: usize = 16_384;

#[derive(Debug, Clone, Copy)]
struct Kept {
    rate: f64,
    /// The request before which it stands.
    fresh_until: u64,
}

/// The latest rates.
#[derive(Debug, Clone, Default)]
pub(super) struct Rates {
    kept: HashMap<ContentId, Kept, foldhash::fast::RandomState>,
    /// How many more may be found anew in this decision.
    left: usize,
}

impl Rates {
    /// A decision begins.
    pub(super) fn grant(&mut self) {
        self.left = RENEWED;
    }

    /// The component was used.
    pub(super) fn forget(&mut self, content: &ContentId) {
        self.kept.remove(content);
    }

    /// The rate as it is now, and whether it is another than what was kept.
    pub(super) fn now(
        &mut self,
        predictor: &mut Predictor,
        now: Duration,
        content: &ContentId,
        horizon: f64,
    ) -> (f64, bool) {
        match self.kept.get(content) {
            Some(kept) if kept.fresh_until > predictor.observed() => (kept.rate, false),
            _ => (self.renew(predictor, now, content, horizon), true),
        }
    }

    /// The rate as it was not long ago.
    pub(super) fn lately(
        &mut self,
        predictor: &mut Predictor,
        now: Duration,
        content: &ContentId,
        horizon: f64,
    ) -> f64 {
        match self.kept.get(content) {
            Some(kept) if kept.fresh_until > predictor.observed() => kept.rate,
            Some(kept) if self.left == 0 => kept.rate,
            Some(_) => {
                self.left -= 1;
                self.renew(predictor, now, content, horizon)
            }
            None => self.renew(predictor, now, content, horizon),
        }
    }

    /// The request before which the kept rate stands.
    pub(super) fn fresh_until(&self, content: &ContentId) -> u64 {
        self.kept.get(content).map_or(0, |kept| kept.fresh_until)
    }

    fn renew(
        &mut self,
        predictor: &mut Predictor,
        now: Duration,
        content: &ContentId,
        horizon: f64,
    ) -> f64 {
        if self.kept.len() >= MAX_KEPT {
            self.kept.clear();
        }
        let rate = predictor.rate(now, content, horizon);
        let rate = rate.filter(|rate| rate.is_finite()).unwrap_or(0.0);
        let fresh_until = predictor.observed() + predictor.requests_since(content) / STANDS + 1;
        self.kept.insert(*content, Kept { rate, fresh_until });
        rate
    }
}
