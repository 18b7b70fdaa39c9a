//! Whether one way of predicting is better than another, judged label by label.

use serde::{Deserialize, Serialize};

/// Share of a difference between the losses that is remembered from one label to the next.
const MEMORY: f64 = 0.999;
/// It must be ahead by so many standard deviations of the differences, were these of random sign.
const AHEAD: f64 = 2.0;

/// By how much a challenger lost less than who it challenges, of late.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(super) struct Record {
    ahead: f64,
    squares: f64,
    leads: bool,
}

impl Record {
    pub(super) fn is_sound(&self) -> bool {
        self.ahead.is_finite() && self.squares.is_finite() && self.squares >= 0.0
    }

    /// Whether the challenger is to be used.
    pub(super) const fn leads(&self) -> bool {
        self.leads
    }

    /// A label came, for which the challenger lost so much less.
    pub(super) fn note(&mut self, less: f64) {
        if !less.is_finite() {
            return;
        }
        self.ahead = self.ahead * MEMORY + less;
        self.squares = self.squares * MEMORY * MEMORY + less * less;
        // Once it leads, it does so until it is behind.
        let needed = if self.leads { 0.0 } else { AHEAD };
        self.leads = self.ahead > needed * self.squares.sqrt();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_leads_only_while_it_is_plainly_better() {
        let mut record = Record::default();
        for i in 0..5_000 {
            record.note(if i % 2 == 0 { 0.5 } else { -0.49 });
            assert!(!record.leads(), "luck is not enough");
        }
        (0..1_000).for_each(|_| record.note(0.1));
        assert!(record.leads());
        (0..5_000).for_each(|_| record.note(-0.1));
        assert!(!record.leads());
        record.note(f64::NAN);
        assert!(record.is_sound());
    }
}
