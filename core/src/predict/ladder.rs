//! One model for each of several horizons, and the examples that wait for their labels.
//!
//! Horizons are counted in requests, not in seconds: memory runs short as requests come, so at night nothing ages, and a
//! service with ten times the load needs no other settings. Which of them matters depends on how long a tier
//! keeps what it has; between two of them, rates are interpolated.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::features::{FEATURES, Row};
use super::learner::{Learner, Lesson, Taught};
use crate::ids::ContentId;

/// Requests ahead: powers of four, from what the next clients want to what a large tier keeps for half a day.
pub(super) const HORIZONS: [u64; 5] = [4, 16, 64, 256, 1_024];
/// Examples that may wait: four for each request within the longest horizon.
pub(super) const MAX_PENDING: usize = 4 * 1_024 + 8;

/// An example that waits for its labels.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Pending {
    pub(super) content: ContentId,
    /// Requests so far when it was taken.
    pub(super) request: u64,
    /// What each model said then.
    pub(super) predicted: [f64; HORIZONS.len()],
    pub(super) row: Vec<f64>,
}

/// What a model is to be fitted to: [`Study::run`] takes some milliseconds, wherever that may be.
#[derive(Debug)]
pub struct Study {
    rung: usize,
    lesson: Lesson,
}

/// What came of it.
#[derive(Debug, Clone)]
pub struct Studied {
    rung: usize,
    taught: Taught,
}

impl Study {
    /// Fits the model.
    #[must_use]
    pub fn run(self) -> Studied {
        Studied {
            rung: self.rung,
            taught: self.lesson.run(),
        }
    }
}

/// The models, from the shortest horizon to the longest.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Ladder {
    pub(super) learners: Vec<Learner>,
    pub(super) pending: VecDeque<Pending>,
    /// How many of the pending examples each model has learned from.
    pub(super) learned: [usize; HORIZONS.len()],
}

impl Ladder {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            learners: vec![Learner::new(seed); HORIZONS.len()],
            pending: VecDeque::new(),
            learned: [0; HORIZONS.len()],
        }
    }

    pub(super) fn is_sound(&self) -> bool {
        let sound = |p: &Pending| {
            p.row.len() == FEATURES && p.row.iter().chain(&p.predicted).all(|x| x.is_finite())
        };
        self.learners.len() == HORIZONS.len()
            && self.learners.iter().all(Learner::is_sound)
            && self.pending.len() <= MAX_PENDING
            && self
                .learned
                .iter()
                .all(|count| *count <= self.pending.len())
            && self.pending.iter().all(sound)
    }

    /// Drops the examples that wait.
    pub(super) fn forget_pending(&mut self) {
        self.pending.clear();
        self.learned = [0; HORIZONS.len()];
    }

    /// Whether there is room for another example.
    pub(super) fn has_room(&self) -> bool {
        self.pending.len() < MAX_PENDING
    }

    pub(super) fn take(&mut self, content: ContentId, request: u64, row: &Row) {
        let mut predicted = [0.0; HORIZONS.len()];
        for (said, learner) in predicted.iter_mut().zip(&self.learners) {
            *said = learner.probability(row);
        }
        self.pending.push_back(Pending {
            content,
            request,
            predicted,
            row: row.to_vec(),
        });
    }

    /// Learns from the examples whose horizons have just passed. `used_since` says whether a component was asked for after
    /// a request.
    pub(super) fn learn_due(&mut self, request: u64, used_since: impl Fn(&ContentId, u64) -> bool) {
        for (rung, horizon) in HORIZONS.iter().enumerate() {
            while let Some(due) = self.pending.get(self.learned[rung])
                && due.request + horizon <= request
            {
                self.learned[rung] += 1;
                let outcome = used_since(&due.content, due.request);
                if let Ok(row) = Row::try_from(due.row.as_slice()) {
                    self.learners[rung].learn(&row, due.predicted[rung], outcome);
                }
            }
        }
        let through = self.learned.iter().copied().min().unwrap_or(0);
        self.pending.drain(..through);
        for count in &mut self.learned {
            *count -= through;
        }
    }

    /// What a model beside one of these is to be fitted to, where it is time.
    pub(super) fn study(&mut self) -> Option<Study> {
        let mut rungs = self.learners.iter_mut().enumerate();
        rungs.find_map(|(rung, learner)| learner.lesson().map(|lesson| Study { rung, lesson }))
    }

    pub(super) fn studied(&mut self, studied: Studied) {
        if let Some(learner) = self.learners.get_mut(studied.rung) {
            learner.take(studied.taught);
        }
    }

    /// Whether any of the models has learned enough to be believed.
    pub(super) fn is_trained(&self) -> bool {
        self.learners.iter().any(Learner::is_trained)
    }

    /// Expected uses in each request, as seen over this many requests ahead: between the two horizons next to it,
    /// or from the nearest that can be believed. `None` where none can.
    pub(super) fn rate(&self, row: &Row, horizon: f64) -> Option<f64> {
        let rate_of = |rung: usize| {
            // Retention goes by the order, which a calibrated model's blocks blur.
            let p = self.learners[rung].uncalibrated(row);
            uses_of(p) / HORIZONS[rung] as f64
        };
        let above = HORIZONS.partition_point(|h| (*h as f64) < horizon);
        let trained = |rung: &usize| self.learners[*rung].is_trained();
        let below = (0..above).rev().find(trained);
        let above = (above..HORIZONS.len()).find(trained);
        match (below, above) {
            (Some(below), Some(above)) => {
                let (from, to) = (HORIZONS[below] as f64, HORIZONS[above] as f64);
                let share = (horizon / from).ln() / (to / from).ln();
                let (near, far) = (rate_of(below).ln(), rate_of(above).ln());
                Some((near + share * (far - near)).exp())
            }
            (Some(rung), None) | (None, Some(rung)) => Some(rate_of(rung)),
            (None, None) => None,
        }
    }
}

/// The expected number of uses where at least one has this probability: a Poisson process.
fn uses_of(p: f64) -> f64 {
    // Rates stay finite, and above zero, so that what will hardly be used still has an order.
    -(-p.clamp(1e-9, 0.999_9)).ln_1p()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_model_learns_when_its_horizon_has_passed() {
        let mut ladder = Ladder::new(1);
        let (often, never) = (ContentId::File([1; 32]), ContentId::File([2; 32]));
        let mut row = [0.0; FEATURES];
        row[0] = 1.0;
        let mut hot = row;
        hot[1] = 1.0;
        for request in 0..3_000 {
            ladder.learn_due(request, |content, _| *content == often);
            ladder.take(often, request, &hot);
            ladder.take(never, request, &row);
            assert!(ladder.pending.len() <= 2 * 1_025);
            assert!(ladder.has_room() && ladder.is_sound());
        }
        let labelled: Vec<u64> = ladder.learners.iter().map(|l| l.labelled).collect();
        let expected: Vec<u64> = HORIZONS.iter().map(|h| 2 * (3_000 - h)).collect();
        assert_eq!(labelled, expected);
        for horizon in [1.0, 4.0, 10.0, 300.0, 5_000.0] {
            let (hot, cold) = (ladder.rate(&hot, horizon), ladder.rate(&row, horizon));
            assert!(hot.unwrap() > 10.0 * cold.unwrap(), "{hot:?} {cold:?}");
        }
        // In between, what one expects for a share of the way.
        let rates = [16.0, 32.0, 64.0].map(|h| ladder.rate(&hot, h).unwrap());
        assert!((rates[0].ln() + rates[2].ln() - 2.0 * rates[1].ln()).abs() < 1e-9);
    }

    #[test]
    fn nobody_is_believed_at_first() {
        let ladder = Ladder::new(1);
        assert!(!ladder.is_trained());
        assert_eq!(ladder.rate(&[1.0; FEATURES], 64.0), None);
    }
}
