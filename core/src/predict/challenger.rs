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

/// Labels that a fit is made on.
const KEPT: usize = 2_048;
/// Labels from one fit to the next.
const EVERY: u64 = 4_096;
/// Labels of the rarer class that a fit needs.
const MIN_OF_EACH: usize = 20;
/// Share of a difference between the losses that is remembered from one label to the next.
const MEMORY: f64 = 0.999;
/// It must be ahead by so many standard deviations of the differences, were these of random sign.
const AHEAD: f64 = 2.0;
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
    /// By how much less it lost than the online model of late.
    ahead: f64,
    squares: f64,
    leads: bool,
}

/// Labels to fit a model to: [`Study::run`] takes some ten milliseconds, wherever that may be.
#[derive(Debug)]
pub struct Study {
    pub(super) rung: usize,
    rows: Array2<f64>,
    outcomes: Array1<bool>,
}

/// A fitted model.
#[derive(Debug, Clone)]
pub struct Studied {
    pub(super) rung: usize,
    weights: Option<Vec<f64>>,
}

impl Study {
    /// Fits a model.
    #[must_use]
    pub fn run(self) -> Studied {
        let rung = self.rung;
        let dataset = DatasetBase::new(self.rows, self.outcomes);
        let fitted = LogisticRegression::default()
            .alpha(L2)
            .with_intercept(false)
            .max_iterations(MAX_ITERATIONS)
            .gradient_tolerance(TOLERANCE)
            .fit(&dataset);
        let weights = fitted.ok().map(|model| {
            // linfa takes the more frequent class as the positive one.
            let sign = if model.labels().pos.class { 1.0 } else { -1.0 };
            model.params().iter().map(|w| sign * w).collect::<Vec<_>>()
        });
        Studied {
            rung,
            weights: weights.filter(|weights| weights.iter().all(|w| w.is_finite())),
        }
    }
}

impl Challenger {
    pub(super) fn is_sound(&self) -> bool {
        let sound =
            |weights: &Vec<f64>| weights.len() == FEATURES && weights.iter().all(|w| w.is_finite());
        self.weights.as_ref().is_none_or(sound)
            && self.ahead.is_finite()
            && self.squares.is_finite()
            && self.squares >= 0.0
    }

    /// Its weights.
    pub(super) fn weights(&self) -> Option<&[f64]> {
        self.weights.as_deref()
    }

    /// Its weights, where they are to be used.
    pub(super) fn leading(&self) -> Option<&[f64]> {
        self.weights().filter(|_| self.leads)
    }

    /// A label came, for which it would have lost so much less than the online model.
    pub(super) fn note(&mut self, row: &Row, outcome: bool, less: Option<f64>) {
        if self.recent.len() == KEPT {
            self.recent.pop_front();
        }
        self.recent
            .push_back((row.iter().map(|x| *x as f32).collect(), outcome));
        self.since_fit += 1;
        let Some(less) = less.filter(|less| less.is_finite()) else {
            return;
        };
        self.ahead = self.ahead * MEMORY + less;
        self.squares = self.squares * MEMORY * MEMORY + less * less;
        // Once it leads, it does so until it is behind.
        let needed = if self.leads { 0.0 } else { AHEAD };
        self.leads = self.ahead > needed * self.squares.sqrt();
    }

    /// What to fit next, where it is time.
    pub(super) fn study(&mut self, rung: usize) -> Option<Study> {
        if self.since_fit < EVERY || self.recent.len() < KEPT {
            return None;
        }
        self.since_fit = 0;
        let positive = self.recent.iter().filter(|(_, outcome)| *outcome).count();
        if positive.min(KEPT - positive) < MIN_OF_EACH {
            return None;
        }
        let value = |(row, column): (usize, usize)| f64::from(self.recent[row].0[column]);
        Some(Study {
            rung,
            rows: Array2::from_shape_fn((KEPT, FEATURES), value),
            outcomes: self.recent.iter().map(|(_, outcome)| *outcome).collect(),
        })
    }

    pub(super) fn take(&mut self, studied: Studied) {
        if studied.weights.is_some() {
            self.weights = studied.weights;
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
            let studied = challenger.study(3).unwrap().run();
            assert_eq!(studied.rung, 3);
            assert!(challenger.study(3).is_none(), "once is enough");
            challenger.take(studied);
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
    fn it_leads_only_while_it_is_plainly_better() {
        let mut challenger = Challenger {
            weights: Some(vec![0.0; FEATURES]),
            ..Challenger::default()
        };
        let note = |challenger: &mut Challenger, less: f64| {
            challenger.note(&row(true), true, Some(less));
        };
        for i in 0..5_000 {
            note(&mut challenger, if i % 2 == 0 { 0.5 } else { -0.49 });
            assert!(challenger.leading().is_none(), "luck is not enough");
        }
        (0..1_000).for_each(|_| note(&mut challenger, 0.1));
        assert!(challenger.leading().is_some());
        (0..5_000).for_each(|_| note(&mut challenger, -0.1));
        assert!(challenger.leading().is_none());
        note(&mut challenger, f64::NAN);
        assert!(challenger.is_sound());
    }

    #[test]
    fn one_class_alone_is_nothing_to_fit() {
        let mut challenger = Challenger::default();
        (0..EVERY).for_each(|_| challenger.note(&row(true), true, None));
        assert!(challenger.study(0).is_none());
    }
}
