//! A batch model beside an online one.
//!
//! The online model weighs all that it has seen, and so changes slowly once it has seen much. Every so many labels a logistic
//! regression (L-BFGS, linfa-logistic) is fitted to the latest alone, away from whoever asks for predictions. It is scored on each
//! label that comes after its fit, as the online model is, and is used only while its log loss is lower by more than chance. The
//! record goes on from one fit to the next, as the online model's does from one step to the next: it is the way of learning that is
//! judged.

use std::collections::VecDeque;

use linfa::dataset::DatasetBase;
use linfa::traits::Fit;
use linfa_logistic::LogisticRegression;
use ndarray::{Array1, Array2};
use serde::{Deserialize, Serialize};

use super::features::{FEATURES, Row};
use super::record::Record;

/// Labels that a fit is made on.
const KEPT: usize = 2_048;
/// Labels from one fit to the next.
const EVERY: u64 = 4_096;
/// Labels of the rarer class that a fit needs.
const MIN_OF_EACH: usize = 20;
/// Weight of the squares of the weights, as scikit-learn's default.
const L2: f64 = 1.0;
const MAX_ITERATIONS: u64 = 50;
const TOLERANCE: f64 = 1e-2;

/// The latest labels, and what a fit to earlier ones is worth.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Challenger {
    /// Those of before a restart are not needed: the next fit is made on those after it.
    #[serde(skip)]
    recent: VecDeque<(Box<[f32]>, bool)>,
    since_fit: u64,
    weights: Option<Vec<f64>>,
    /// Fits so far.
    #[serde(default)]
    fits: u64,
    #[serde(flatten)]
    record: Record,
}

/// Labels to fit a model to.
#[derive(Debug)]
pub(super) struct Labels {
    rows: Array2<f64>,
    outcomes: Array1<bool>,
    /// Where the search begins.
    from: Array1<f64>,
}

impl Labels {
    /// Fits a model; `None` where that does not come to an end.
    pub(super) fn fit(self) -> Option<Vec<f64>> {
        // linfa takes the more frequent class as the positive one; of two as frequent, the one that it sees first.
        let first = *self.outcomes.first()?;
        let as_first = self.outcomes.iter().filter(|came| **came == first).count();
        let positive = first == (as_first * 2 >= self.outcomes.len());
        let dataset = DatasetBase::new(self.rows, self.outcomes);
        let fitted = LogisticRegression::default()
            .alpha(L2)
            .with_intercept(false)
            .max_iterations(MAX_ITERATIONS)
            .gradient_tolerance(TOLERANCE)
            .initial_params(if positive { self.from } else { -self.from })
            .fit(&dataset);
        let weights = fitted.ok().map(|model| {
            let sign = if model.labels().pos.class { 1.0 } else { -1.0 };
            model.params().iter().map(|w| sign * w).collect::<Vec<_>>()
        });
        weights.filter(|weights| weights.iter().all(|w| w.is_finite()))
    }
}

impl Challenger {
    pub(super) fn is_sound(&self) -> bool {
        let sound =
            |weights: &Vec<f64>| weights.len() == FEATURES && weights.iter().all(|w| w.is_finite());
        self.weights.as_ref().is_none_or(sound) && self.record.is_sound()
    }

    /// Its weights.
    pub(super) fn weights(&self) -> Option<&[f64]> {
        self.weights.as_deref()
    }

    /// Its weights, where they are to be used, and which fit they are of.
    pub(super) fn leading(&self) -> Option<(u64, &[f64])> {
        let weights = self.weights().filter(|_| self.record.leads())?;
        Some((self.fits, weights))
    }

    /// A label came, for which it would have lost so much less than the online model.
    pub(super) fn note(&mut self, row: &Row, outcome: bool, less: Option<f64>) {
        if self.recent.len() == KEPT {
            self.recent.pop_front();
        }
        self.recent
            .push_back((row.iter().map(|x| *x as f32).collect(), outcome));
        self.since_fit += 1;
        if let Some(less) = less {
            self.record.note(less);
        }
    }

    /// What to fit next, where it is time, beginning with these weights.
    pub(super) fn study(&mut self, from: &[f64]) -> Option<Labels> {
        if self.since_fit < EVERY || self.recent.len() < KEPT {
            return None;
        }
        self.since_fit = 0;
        let positive = self.recent.iter().filter(|(_, outcome)| *outcome).count();
        if positive.min(KEPT - positive) < MIN_OF_EACH {
            return None;
        }
        let value = |(row, column): (usize, usize)| f64::from(self.recent[row].0[column]);
        Some(Labels {
            rows: Array2::from_shape_fn((KEPT, FEATURES), value),
            outcomes: self.recent.iter().map(|(_, outcome)| *outcome).collect(),
            from: Array1::from_vec(from.to_vec()),
        })
    }

    pub(super) fn take(&mut self, weights: Option<Vec<f64>>) {
        if weights.is_some() {
            self.weights = weights;
            self.fits += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(on: bool) -> Row {
        let mut row = [0.0; FEATURES];
        row[0] = 1.0;
        row[1] = f64::from(u8::from(on));
        row
    }

    fn probability(weights: &[f64], row: &Row) -> f64 {
        let margin: f64 = weights.iter().zip(row).map(|(w, x)| w * x).sum();
        1.0 / (1.0 + (-margin).exp())
    }

    #[test]
    fn it_fits_the_latest_labels_whichever_class_is_rarer() {
        for rare in [true, false] {
            let mut challenger = Challenger::default();
            // What was right at first is wrong by now.
            for i in 0..EVERY {
                let on = i % 8 == 0;
                let right = i >= EVERY - KEPT as u64;
                // One in 32 goes the other way.
                let outcome = (on == right) == rare && i % 32 != 5;
                challenger.note(&row(on), outcome, None);
                assert!(challenger.leading().is_none());
            }
            let from = [0.1; FEATURES];
            let fitted = challenger.study(&from).unwrap().fit();
            assert!(challenger.study(&from).is_none(), "once is enough");
            challenger.take(fitted);
            let weights = challenger.weights().unwrap();
            let (on, off) = (
                probability(weights, &row(true)),
                probability(weights, &row(false)),
            );
            assert!(
                (on > 0.9) == rare && (off < 0.1) == rare,
                "{rare}: {on} {off}"
            );
            assert!(challenger.is_sound());
        }
    }

    #[test]
    fn what_earlier_versions_kept_is_read() {
        let kept = r#"{"since_fit":7,"weights":[0.5],"ahead":1.5,"squares":0.25,"leads":true}"#;
        let challenger: Challenger = serde_json::from_str(kept).unwrap();
        assert_eq!(challenger.leading(), Some((0, &[0.5][..])));
        assert_eq!(challenger.since_fit, 7);
    }

    #[test]
    fn one_class_alone_is_nothing_to_fit() {
        let mut challenger = Challenger::default();
        (0..EVERY).for_each(|_| challenger.note(&row(true), true, None));
        assert!(challenger.study(&[0.0; FEATURES]).is_none());
    }
}
