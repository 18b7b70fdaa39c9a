//! The online model: FTRL-proximal logistic regression (McMahan et al., "Ad Click Prediction: a View from the
//! Trenches", KDD 2013, algorithm 1), as linfa-ftrl implements it.
//!
//! What linfa-ftrl 0.8.1 needs from its user: the start of `z` is random in 0..1, so an `l1_ratio` of 1.0 makes each first
//! weight zero; the gradients of a batch are summed before they are squared, so each update is one row; weights are
//! computed anew at each prediction, so they are kept here; `Pr` panics on NaN, so inputs are made finite first; there is
//! no intercept, so the first feature is constant.

use linfa::dataset::{DatasetBase, Pr};
use linfa::prelude::ParamGuard;
use linfa_ftrl::Ftrl;
use ndarray::{Array1, Array2};
use rand_xoshiro::Xoshiro256Plus;
use rand_xoshiro::rand_core::SeedableRng;
use serde::{Deserialize, Serialize};

use super::calibration::{Calibration, Map, Model};
use super::challenger::{Challenger, Labels};
use super::features::{FEATURES, Row};

/// Learning rate; linfa's own default of 0.005 learns twenty times slower.
const ALPHA: f64 = 0.1;
/// Smoothing of the learning rate, as the paper recommends.
const BETA: f64 = 1.0;
/// The largest that linfa takes; it must reach the random start of `z`.
const L1: f64 = 1.0;
/// A little shrinkage for features that go together.
const L2: f64 = 0.01;
/// Share of one label in the moving averages.
const SMOOTHING: f64 = 0.002;
/// Labels before the model is believed.
const MIN_LABELS: u64 = 200;
/// Labels of the rarer class before the model is believed.
const MIN_OF_EACH: u64 = 20;
/// Probabilities are kept this far from 0 and 1, so that one label's loss is bounded.
const CLAMP: f64 = 1e-6;

/// The model with its own measure of itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Learner {
    model: Ftrl<f64>,
    weights: Vec<f64>,
    pub(super) labelled: u64,
    pub(super) positive: u64,
    pub(super) log_loss: f64,
    pub(super) base_log_loss: f64,
    base_rate: f64,
    predicted_mean: f64,
    #[serde(default)]
    challenger: Challenger,
    #[serde(default)]
    calibration: Calibration,
}

/// What one of the models beside an online one is to be fitted to.
#[derive(Debug)]
pub(super) enum Lesson {
    Weights(Labels),
    Calibration(Vec<(f32, bool)>),
}

/// What came of it.
#[derive(Debug, Clone)]
pub(super) enum Taught {
    Weights(Option<Vec<f64>>),
    Calibration(Option<Map>),
}

impl Lesson {
    pub(super) fn run(self) -> Taught {
        match self {
            Self::Weights(labels) => Taught::Weights(labels.fit()),
            Self::Calibration(recent) => Taught::Calibration(Map::fit(recent)),
        }
    }
}

impl Learner {
    pub(super) fn new(seed: u64) -> Self {
        let params = Ftrl::params_with_rng(Xoshiro256Plus::seed_from_u64(seed))
            .alpha(ALPHA)
            .beta(BETA)
            .l1_ratio(L1)
            .l2_ratio(L2)
            .check()
            .expect("the constants above are within linfa's limits");
        let model = Ftrl::new(params, FEATURES);
        Self {
            weights: model.get_weights().to_vec(),
            model,
            labelled: 0,
            positive: 0,
            log_loss: std::f64::consts::LN_2,
            base_log_loss: std::f64::consts::LN_2,
            base_rate: 0.5,
            predicted_mean: 0.5,
            challenger: Challenger::default(),
            calibration: Calibration::default(),
        }
    }

    /// Whether a saved model has the shape and the values that this code can go on with.
    pub(super) fn is_sound(&self) -> bool {
        let numbers = [
            self.log_loss,
            self.base_log_loss,
            self.base_rate,
            self.predicted_mean,
        ];
        self.weights.len() == FEATURES
            && self.model.z().len() == FEATURES
            && self.model.n().len() == FEATURES
            && self.weights.iter().all(|w| w.is_finite())
            && self.model.z().iter().all(|z| z.is_finite())
            && self.model.n().iter().all(|n| n.is_finite() && *n >= 0.0)
            && numbers.iter().all(|x| x.is_finite())
            && self.positive <= self.labelled
            && self.challenger.is_sound()
            && self.calibration.is_sound()
    }

    /// Whether it has seen enough of both classes to be believed, and does no worse than the mean rate would.
    pub(super) fn is_trained(&self) -> bool {
        let rarer = self.positive.min(self.labelled - self.positive);
        self.labelled >= MIN_LABELS
            && rarer >= MIN_OF_EACH
            && self.log_loss <= self.base_log_loss * 1.05
    }

    /// By how much the mean prediction is off the mean outcome, lately.
    pub(super) fn calibration_error(&self) -> f64 {
        (self.predicted_mean - self.base_rate).abs()
    }

    pub(super) fn probability(&self, row: &Row) -> f64 {
        let (of, plain) = self.plain(row);
        self.calibration.told(of, plain)
    }

    /// The model's own probability: its order is finer than what is told.
    pub(super) fn uncalibrated(&self, row: &Row) -> f64 {
        self.plain(row).1
    }

    /// Before it is calibrated, and whose it is.
    fn plain(&self, row: &Row) -> (Model, f64) {
        match self.challenger.leading() {
            Some((fit, weights)) => (Model::Batch(fit), probability(weights, row)),
            None => (Model::Online, probability(&self.weights, row)),
        }
    }

    /// What a model beside it is to be fitted to, where it is time.
    pub(super) fn lesson(&mut self) -> Option<Lesson> {
        let labels = self.challenger.study(&self.weights).map(Lesson::Weights);
        labels.or_else(|| self.calibration.study().map(Lesson::Calibration))
    }

    pub(super) fn take(&mut self, taught: Taught) {
        match taught {
            Taught::Weights(weights) => self.challenger.take(weights),
            Taught::Calibration(map) => self.calibration.take(map),
        }
    }

    /// Learns one outcome. `predicted` is what was said when the row was taken, which is what the losses judge.
    pub(super) fn learn(&mut self, row: &Row, predicted: f64, outcome: bool) {
        let truth = f64::from(u8::from(outcome));
        // Means at first, moving averages later.
        let step = SMOOTHING.max(1.0 / (self.labelled as f64 + 1.0));
        self.log_loss += step * (log_loss(predicted, outcome) - self.log_loss);
        self.base_log_loss += step * (log_loss(self.base_rate, outcome) - self.base_log_loss);
        self.base_rate += step * (truth - self.base_rate);
        self.predicted_mean += step * (predicted - self.predicted_mean);
        self.labelled += 1;
        self.positive += u64::from(outcome);

        // The gradient at the weights of now, not of then: the label is late, the step need not be.
        let online = probability(&self.weights, row);
        let batch = self.challenger.weights().map(|w| probability(w, row));
        let less = batch.map(|batch| log_loss(online, outcome) - log_loss(batch, outcome));
        let (of, plain) = self.plain(row);
        self.calibration
            .note(of, plain, outcome, |p| log_loss(p, outcome));
        self.challenger.note(row, outcome, less);
        let current = online.clamp(0.0, 1.0) as f32;
        let records = Array2::from_shape_fn((1, FEATURES), |(_, i)| row[i]);
        let dataset = DatasetBase::new(records, Array1::from_elem(1, outcome));
        let probabilities = Array1::from_elem(1, Pr::new(current));
        self.model.update(&dataset, probabilities.view());
        self.weights.clear();
        self.weights.extend(self.model.get_weights().iter());
    }
}

fn probability(weights: &[f64], row: &Row) -> f64 {
    let margin: f64 = weights.iter().zip(row).map(|(w, x)| w * x).sum();
    let p = 1.0 / (1.0 + (-margin.clamp(-35.0, 35.0)).exp());
    if p.is_finite() { p } else { 0.0 }
}

fn log_loss(p: f64, outcome: bool) -> f64 {
    let p = p.clamp(CLAMP, 1.0 - CLAMP);
    if outcome { -p.ln() } else { -(1.0 - p).ln() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_weights_are_zero_for_every_seed() {
        for seed in 0..50 {
            assert!(Learner::new(seed).weights.iter().all(|w| *w == 0.0));
        }
    }

    #[test]
    fn it_learns_which_feature_counts() {
        let mut learner = Learner::new(1);
        for i in 0..10_000_u32 {
            let on = i % 2 == 0;
            let mut row = [0.0; FEATURES];
            row[0] = 1.0;
            row[1] = f64::from(u8::from(on));
            row[2] = f64::from(i % 7) / 7.0;
            let p = learner.probability(&row);
            // One in ten goes the other way.
            learner.learn(&row, p, on != (i % 20 < 2));
        }
        let mut row = [0.0; FEATURES];
        row[0] = 1.0;
        assert!(learner.probability(&row) < 0.3);
        row[1] = 1.0;
        assert!(learner.probability(&row) > 0.7);
        assert!(learner.is_trained() && learner.is_sound());
        assert!(learner.log_loss < 0.8 * learner.base_log_loss);
    }
}
