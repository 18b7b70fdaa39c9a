//! What of a predictor is saved, and what a saved one must be like to go on with.

use std::collections::{HashMap, VecDeque};

use serde::{Deserialize, Serialize};

use super::features::{Counts, FEATURES, Tracked};
use super::learner::Learner;
use super::sessions::Sessions;
use super::{LATELY, MAX_PENDING, Predictor};
use crate::config::PredictConfig;
use crate::ids::ContentId;

/// A saved predictor that can't be gone on with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the saved predictor is of no use: {what}; delete it, and the predictor learns anew")]
pub struct UnsoundStateError {
    /// What is wrong with it.
    pub what: &'static str,
}

/// An example that waits for its label.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Pending {
    pub(super) content: ContentId,
    pub(super) taken_s: f64,
    pub(super) request: u64,
    pub(super) predicted: f64,
    pub(super) row: Vec<f64>,
}

/// Everything that is saved.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct State {
    pub(super) config: PredictConfig,
    pub(super) horizon_s: f64,
    pub(super) learner: Learner,
    pub(super) tracked: Vec<Tracked>,
    pub(super) sessions: Sessions,
    pub(super) pending: VecDeque<Pending>,
    /// The latest uses, oldest first.
    pub(super) lately: VecDeque<ContentId>,
    pub(super) load: Counts,
    pub(super) observed: u64,
    pub(super) start_s: Option<f64>,
    /// The latest time seen, on the predictor's own clock, which never goes back.
    pub(super) clock_s: f64,
    /// What is added to a caller's `now`.
    pub(super) offset_s: f64,
    pub(super) next_sample_s: f64,
}

impl From<Predictor> for State {
    fn from(predictor: Predictor) -> Self {
        predictor.state
    }
}

impl TryFrom<State> for Predictor {
    type Error = UnsoundStateError;

    fn try_from(state: State) -> Result<Self, UnsoundStateError> {
        let unsound = |what| Err(UnsoundStateError { what });
        if !state.learner.is_sound() {
            return unsound("its model has another shape or is not finite");
        }
        let index: HashMap<_, _> = state
            .tracked
            .iter()
            .enumerate()
            .map(|(place, tracked)| (tracked.content, place))
            .collect();
        if index.len() != state.tracked.len() || state.tracked.iter().any(|t| !t.is_sound()) {
            return unsound("a component is there twice or has impossible figures");
        }
        if index.len() > state.config.max_tracked.max(1)
            || state.pending.len() > MAX_PENDING
            || state.lately.len() > LATELY
            || !state.sessions.is_sound()
        {
            return unsound("it holds more than it may");
        }
        let pending_is_sound = |p: &Pending| {
            p.row.len() == FEATURES
                && p.row.iter().all(|x| x.is_finite())
                && p.predicted.is_finite()
                && p.taken_s.is_finite()
        };
        let times = [
            state.horizon_s,
            state.clock_s,
            state.offset_s,
            state.next_sample_s,
            state.start_s.unwrap_or(0.0),
        ];
        if !state.pending.iter().all(pending_is_sound)
            || !times.iter().all(|t| t.is_finite())
            || state.horizon_s <= 0.0
            || !state.load.is_sound()
        {
            return unsound("a figure is not finite");
        }
        Ok(Self { state, index })
    }
}
