//! What of a predictor is saved, and what a saved one must be like to go on with.

use std::collections::{HashMap, VecDeque};

use serde::{Deserialize, Serialize};

use super::features::Tracked;
use super::ladder::Ladder;
use super::sessions::Sessions;
use super::{LATELY, Pace, Predictor};
use crate::config::PredictConfig;
use crate::ids::ContentId;

/// A saved predictor that can't be gone on with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the saved predictor is of no use: {what}; delete it, and the predictor learns anew")]
pub struct UnsoundStateError {
    /// What is wrong with it.
    pub what: &'static str,
}

/// Everything that is saved.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct State {
    pub(super) config: PredictConfig,
    pub(super) ladder: Ladder,
    pub(super) tracked: Vec<Tracked>,
    pub(super) sessions: Sessions,
    /// The latest uses, oldest first.
    pub(super) lately: VecDeque<ContentId>,
    pub(super) pace: Pace,
    pub(super) observed: u64,
    /// The latest time seen, on the predictor's own clock, which never goes back.
    pub(super) clock_s: f64,
    /// What is added to a caller's `now`.
    pub(super) offset_s: f64,
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
        if !state.ladder.is_sound() {
            return unsound("a model or an example has another shape or is not finite");
        }
        let index: HashMap<_, _, _> = state
            .tracked
            .iter()
            .enumerate()
            .map(|(place, tracked)| (tracked.content, place))
            .collect();
        if index.len() != state.tracked.len() || state.tracked.iter().any(|t| !t.is_sound()) {
            return unsound("a component is there twice or has impossible figures");
        }
        if index.len() > state.config.max_tracked.max(1)
            || state.lately.len() > LATELY
            || !state.sessions.is_sound()
        {
            return unsound("it holds more than it may");
        }
        let pace = &state.pace;
        let times = [
            state.clock_s,
            state.offset_s,
            pace.last_s,
            pace.fast_s,
            pace.slow_s,
        ];
        if !times.iter().all(|t| t.is_finite()) {
            return unsound("a figure is not finite");
        }
        Ok(Self { state, index })
    }
}
