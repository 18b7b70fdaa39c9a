//! Which components will be asked for soon, learned from the stream of requests.
//!
//! [`Predictor`] answers one question: is this component requested within the horizon? At each request it takes a few
//! remembered components as examples; when the horizon has passed, what came of each is its label, and the model
//! ([FTRL-proximal](https://research.google/pubs/pub41159/) from linfa-ftrl) learns from it. So it is judged and trained
//! prequentially: each prediction is scored before its label is learned. Components go into the features as what is known
//! of their use, never by name, so what is new profits from what was learned on others.
//!
//! Everything is bounded: components, sessions, and examples that wait for their label. The same seed and stream give the
//! same model.

mod features;
mod learner;
mod sessions;
mod state;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::catalog::Kind;
use crate::config::PredictConfig;
use crate::ids::{ContentId, SessionId};
use crate::units::Bytes;
use features::{Counts, Moment, Row, Tracked};
use learner::Learner;
use sessions::Sessions;
pub use state::UnsoundStateError;
use state::{Pending, State};

/// Examples taken at one request: one of its own components, one that was used lately, two of all that is remembered.
/// What is in question when memory is short was mostly used lately; the rest keeps the model honest on what was not.
const SAMPLES: u64 = 4;
/// How many uses back "lately" reaches.
const LATELY: usize = 64;
/// Examples that may wait for their label. Where requests come too fast for it, fewer of them give examples.
const MAX_PENDING: usize = 4_096;
/// Components of one request that are looked at; a component set is far smaller.
const MAX_COMPONENTS: usize = 64;

/// A component as a request names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Which bytes.
    pub content: ContentId,
    /// What they are for.
    pub kind: Kind,
    /// How many.
    pub bytes: Bytes,
}

/// A request.
#[derive(Debug, Clone, Copy)]
pub struct Observed<'a> {
    /// Who asked.
    pub session: SessionId,
    /// What for.
    pub components: &'a [Seen],
}

/// A component that could be prefetched.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    /// Which bytes.
    pub content: ContentId,
    /// How many.
    pub bytes: Bytes,
    /// How long loading it takes, in seconds.
    pub load_s: f64,
}

/// A prefetch that is worth a thought.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Proposal {
    /// What to load.
    pub content: ContentId,
    /// The probability that it is requested within the horizon.
    pub probability: f64,
    /// The probability times the seconds that its load takes.
    pub expected_seconds_saved: f64,
}

/// What the predictor knows of itself.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct PredictorStats {
    /// Requests seen.
    pub observed: u64,
    /// Examples learned from.
    pub labelled: u64,
    /// Examples of these that were requested in time.
    pub positive: u64,
    /// Components remembered.
    pub tracked: usize,
    /// Sessions remembered.
    pub sessions: usize,
    /// Examples that wait for their label.
    pub pending: usize,
    /// Whether it has learned enough to be believed.
    pub trained: bool,
    /// Log loss of its predictions, moving average.
    pub log_loss_ewma: f64,
    /// Log loss of always saying the mean rate, moving average: the mark to beat.
    pub base_log_loss_ewma: f64,
    /// Mean prediction against mean outcome, moving averages.
    pub calibration_error: f64,
}

/// Learns from requests which components come next.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(into = "State", try_from = "State")]
pub struct Predictor {
    state: State,
    /// Places in `state.tracked`.
    index: HashMap<ContentId, usize>,
}

impl Predictor {
    /// A predictor that knows nothing.
    #[must_use]
    pub fn new(config: &PredictConfig) -> Self {
        Self {
            state: State {
                // Less than a second could not be told from "at once".
                horizon_s: config.horizon.as_secs_f64().max(1.0),
                learner: Learner::new(config.seed),
                config: config.clone(),
                tracked: Vec::new(),
                sessions: Sessions::default(),
                pending: VecDeque::new(),
                lately: VecDeque::new(),
                load: Counts::default(),
                observed: 0,
                start_s: None,
                clock_s: 0.0,
                offset_s: 0.0,
                next_sample_s: 0.0,
            },
            index: HashMap::new(),
        }
    }

    /// Goes on with a restored state in a process whose clock says `now`, `away` after the state was saved.
    ///
    /// Examples that wait for their label are dropped: what was asked for meanwhile is not known.
    pub fn resume(&mut self, now: Duration, away: Duration) {
        let state = &mut self.state;
        state.clock_s += away.as_secs_f64();
        state.offset_s = state.clock_s - now.as_secs_f64();
        if !away.is_zero() {
            state.pending.clear();
        }
    }

    /// Learns from a request.
    pub fn observe(&mut self, now: Duration, request: &Observed<'_>) {
        let now_s = self.advance(now);
        self.learn_due(now_s);
        let state = &mut self.state;
        state.start_s.get_or_insert(now_s);
        state.observed += 1;
        state.load.add(now_s);

        let components = &request.components[..request.components.len().min(MAX_COMPONENTS)];
        for seen in components {
            self.place(seen, now_s);
        }
        // Making room for the last may have dropped the first, so places are looked up only now.
        let base = components
            .iter()
            .filter(|seen| !seen.kind.is_adapter())
            .max_by_key(|seen| (seen.bytes, seen.content))
            .map(|seen| seen.content);
        let number = self.state.observed;
        for seen in components {
            let Some(tracked) = self.tracked_mut(&seen.content) else {
                continue;
            };
            // A request that names a component twice uses it once.
            if tracked.uses > 0 && tracked.last_request == number {
                continue;
            }
            tracked.used(now_s, number);
            if let Some(base) = base.filter(|_| seen.kind.is_adapter()) {
                tracked.used_with(base);
            }
            if self.state.lately.len() == LATELY {
                self.state.lately.pop_front();
            }
            self.state.lately.push_back(seen.content);
        }
        self.note_session(now_s, request.session, components);
        self.take_examples(now_s, components);
    }

    /// The probability that the component is requested within the horizon. Zero for one that was never seen; from
    /// its decayed counts alone as long as the model has not learned enough.
    #[must_use]
    pub fn probability(&mut self, now: Duration, content: &ContentId) -> f64 {
        let now_s = self.advance(now);
        self.learn_due(now_s);
        self.probability_at(now_s, content)
    }

    /// The probabilities of several components, in their order. Cheaper than asking for each.
    #[must_use]
    pub fn probabilities<'a>(
        &mut self,
        now: Duration,
        contents: impl IntoIterator<Item = &'a ContentId>,
    ) -> Vec<f64> {
        let now_s = self.advance(now);
        self.learn_due(now_s);
        contents
            .into_iter()
            .map(|content| self.probability_at(now_s, content))
            .collect()
    }

    /// Whether it has learned enough to be believed.
    #[must_use]
    pub fn is_trained(&self) -> bool {
        self.state.learner.is_trained()
    }

    /// The candidates that are worth a prefetch, the most seconds saved first; none before the model is believed.
    #[must_use]
    pub fn proposals(
        &mut self,
        now: Duration,
        candidates: &[Candidate],
        limit: usize,
    ) -> Vec<Proposal> {
        let now_s = self.advance(now);
        self.learn_due(now_s);
        if !self.is_trained() {
            return Vec::new();
        }
        let threshold = self.state.config.threshold;
        let mut proposals: Vec<Proposal> = candidates
            .iter()
            .filter_map(|candidate| {
                let probability = self.probability_at(now_s, &candidate.content);
                let expected = probability * candidate.load_s;
                (probability > 0.0 && probability >= threshold && expected.is_finite()).then_some(
                    Proposal {
                        content: candidate.content,
                        probability,
                        expected_seconds_saved: expected.max(0.0),
                    },
                )
            })
            .collect();
        proposals.sort_by(|a, b| {
            f64::total_cmp(&b.expected_seconds_saved, &a.expected_seconds_saved)
                .then(f64::total_cmp(&b.probability, &a.probability))
                .then(a.content.cmp(&b.content))
        });
        proposals.dedup_by_key(|proposal| proposal.content);
        proposals.truncate(limit);
        proposals
    }

    /// What it knows of itself.
    #[must_use]
    pub fn stats(&self) -> PredictorStats {
        let State {
            learner,
            tracked,
            sessions,
            pending,
            observed,
            ..
        } = &self.state;
        PredictorStats {
            observed: *observed,
            labelled: learner.labelled,
            positive: learner.positive,
            tracked: tracked.len(),
            sessions: sessions.len(),
            pending: pending.len(),
            trained: learner.is_trained(),
            log_loss_ewma: learner.log_loss,
            base_log_loss_ewma: learner.base_log_loss,
            calibration_error: learner.calibration_error(),
        }
    }

    /// The caller's time on the own clock, which never goes back.
    fn advance(&mut self, now: Duration) -> f64 {
        let state = &mut self.state;
        state.clock_s = state.clock_s.max(now.as_secs_f64() + state.offset_s);
        state.clock_s
    }

    fn tracked(&self, content: &ContentId) -> Option<&Tracked> {
        self.state.tracked.get(*self.index.get(content)?)
    }

    fn tracked_mut(&mut self, content: &ContentId) -> Option<&mut Tracked> {
        self.state.tracked.get_mut(*self.index.get(content)?)
    }

    fn moment(&self, now_s: f64) -> Moment {
        Moment {
            now_s,
            horizon_s: self.state.horizon_s,
            start_s: self.state.start_s.unwrap_or(now_s),
            request: self.state.observed,
            load: self.state.load.at(now_s),
        }
    }

    fn row(&self, tracked: &Tracked, moment: &Moment) -> Row {
        let base = tracked.usual_base().and_then(|base| self.tracked(&base));
        features::row(tracked, base, moment)
    }

    fn probability_at(&self, now_s: f64, content: &ContentId) -> f64 {
        let Some(tracked) = self.tracked(content) else {
            return 0.0;
        };
        let moment = self.moment(now_s);
        if self.is_trained() {
            self.state.learner.probability(&self.row(tracked, &moment))
        } else {
            features::chance_from_counts(tracked, &moment)
        }
    }

    /// Learns from the examples whose horizon has passed. As this runs before each request is counted, whatever has used
    /// an example's component since did so in time.
    fn learn_due(&mut self, now_s: f64) {
        while let Some(first) = self.state.pending.front() {
            if first.taken_s + self.state.horizon_s >= now_s {
                return;
            }
            let Some(due) = self.state.pending.pop_front() else {
                return;
            };
            let outcome = self
                .tracked(&due.content)
                .is_some_and(|tracked| tracked.last_request > due.request);
            if let Ok(row) = Row::try_from(due.row.as_slice()) {
                self.state.learner.learn(&row, due.predicted, outcome);
            }
        }
    }

    /// Remembers the component, at the cost of the one unused for longest where there are too many.
    fn place(&mut self, seen: &Seen, now_s: f64) {
        if let Some(tracked) = self.tracked_mut(&seen.content) {
            tracked.kind = seen.kind;
            tracked.bytes = seen.bytes;
            return;
        }
        if self.state.tracked.len() >= self.state.config.max_tracked.max(1) {
            let oldest = (0..self.state.tracked.len())
                .min_by_key(|place| self.state.tracked[*place].last_request);
            if let Some(oldest) = oldest {
                let gone = self.state.tracked.swap_remove(oldest);
                self.index.remove(&gone.content);
                if let Some(moved) = self.state.tracked.get(oldest) {
                    self.index.insert(moved.content, oldest);
                }
            }
        }
        self.index.insert(seen.content, self.state.tracked.len());
        let mut tracked = Tracked::new(seen.content, seen.kind, seen.bytes, now_s);
        // Not the oldest while its own request is being counted.
        tracked.last_request = self.state.observed;
        self.state.tracked.push(tracked);
    }

    /// Moves the session's weight from what it used before to what it uses now.
    fn note_session(&mut self, now_s: f64, session: SessionId, components: &[Seen]) {
        let horizon_s = self.state.horizon_s;
        for left in self.state.sessions.note(now_s, session, components) {
            let weight = (-(now_s - left.at_s).max(0.0) / horizon_s).exp2();
            for content in &left.components {
                if let Some(tracked) = self.tracked_mut(content) {
                    let holders = tracked.holders_at(now_s, horizon_s);
                    tracked.holders = (holders - weight).max(0.0);
                    tracked.holders_at_s = now_s;
                }
            }
        }
        for content in sessions::distinct(components) {
            if let Some(tracked) = self.tracked_mut(&content) {
                tracked.holders = tracked.holders_at(now_s, horizon_s) + 1.0;
                tracked.holders_at_s = now_s;
            }
        }
    }

    /// Takes examples at random, spaced so that one horizon's examples fit in the queue.
    fn take_examples(&mut self, now_s: f64, own: &[Seen]) {
        if now_s < self.state.next_sample_s
            || self.state.tracked.is_empty()
            || self.state.pending.len() + SAMPLES as usize > MAX_PENDING
        {
            return;
        }
        let moment = self.moment(now_s);
        for draw in 0..SAMPLES {
            let number = scramble(self.state.config.seed, self.state.observed * SAMPLES + draw);
            let any_of = |len: usize| (number % len.max(1) as u64) as usize;
            let lately = &self.state.lately;
            let place = match draw {
                0 if !own.is_empty() => self.index.get(&own[any_of(own.len())].content),
                1 => lately
                    .get(any_of(lately.len()))
                    .and_then(|content| self.index.get(content)),
                _ => None,
            };
            let place = place.map_or(any_of(self.state.tracked.len()), |place| *place);
            let tracked = &self.state.tracked[place];
            let row = self.row(tracked, &moment);
            let example = Pending {
                content: tracked.content,
                taken_s: now_s,
                request: self.state.observed,
                predicted: self.state.learner.probability(&row),
                row: row.to_vec(),
            };
            self.state.pending.push_back(example);
        }
        let spacing = self.state.horizon_s * SAMPLES as f64 / MAX_PENDING as f64;
        self.state.next_sample_s = now_s + spacing;
    }
}

/// The n-th number of a stream of random ones (SplitMix64, Steele et al. 2014): no state to save.
fn scramble(seed: u64, n: u64) -> u64 {
    let mut z = seed.wrapping_add(n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
