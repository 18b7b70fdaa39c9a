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

mod calibration;
mod challenger;
mod features;
mod guesses;
mod ladder;
mod learned;
mod learner;
mod record;
mod scoreboard;
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
use crate::random::scramble;
use crate::units::Bytes;
use features::{Moment, Row, Tracked, Users};
pub use guesses::{Grounds, GuessResults, Guesses};
use ladder::Ladder;
pub use ladder::{Studied, Study};
pub use learned::Learned;
pub use scoreboard::{Position, PrefetchScore, Scoreboard};
use sessions::Sessions;
use state::State;
pub use state::UnsoundStateError;

/// Examples taken at one request: one of its own components, one that was used lately, two of all that is remembered.
/// What is in question when memory is short was mostly used lately; the rest keeps the model honest on what was not.
const SAMPLES: u64 = 4;
/// How many uses back "lately" reaches.
const LATELY: usize = 64;
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
    index: HashMap<ContentId, usize, foldhash::fast::RandomState>,
}

impl Predictor {
    /// A predictor that knows nothing.
    #[must_use]
    pub fn new(config: &PredictConfig) -> Self {
        Self {
            state: State {
                ladder: Ladder::new(config.seed),
                config: config.clone(),
                tracked: Vec::new(),
                sessions: Sessions::default(),
                lately: VecDeque::new(),
                pace: Pace::default(),
                observed: 0,
                clock_s: 0.0,
                offset_s: 0.0,
            },
            index: HashMap::default(),
        }
    }

    /// What it has learned, for [`Self::restored`]; `None` where that can't be written.
    #[must_use]
    pub fn learned(&self) -> Option<Vec<u8>> {
        let mut kept = self.clone();
        // What they wait for comes while nobody looks.
        kept.forget_pending();
        serde_json::to_vec(&kept).ok()
    }

    /// One that goes on with what [`Self::learned`] has written `away` ago, in a process whose clock says `now`.
    ///
    /// # Errors
    /// [`UnsoundStateError`] where that is of no use.
    pub fn restored(
        config: &PredictConfig,
        now: Duration,
        away: Duration,
        learned: &[u8],
    ) -> Result<Self, UnsoundStateError> {
        let what = "it is not what this version writes";
        let mut restored: Self =
            serde_json::from_slice(learned).map_err(|_| UnsoundStateError { what })?;
        if restored.state.tracked.len() > config.max_tracked.max(1) {
            let what = "it remembers more components than the configuration allows";
            return Err(UnsoundStateError { what });
        }
        restored.state.config = config.clone();
        restored.resume(now, away);
        Ok(restored)
    }

    /// Goes on with a restored state in a process whose clock says `now`, `away` after the state was saved.
    ///
    /// Examples that wait for their label are dropped: what was asked for meanwhile is not known.
    pub fn resume(&mut self, now: Duration, away: Duration) {
        let state = &mut self.state;
        state.clock_s += away.as_secs_f64();
        state.offset_s = state.clock_s - now.as_secs_f64();
        if !away.is_zero() {
            state.ladder.forget_pending();
        }
    }

    /// Drops the examples that wait for their label.
    pub fn forget_pending(&mut self) {
        self.state.ladder.forget_pending();
    }

    /// How it was set up.
    #[must_use]
    pub fn config(&self) -> &PredictConfig {
        &self.state.config
    }

    /// Learns from a request.
    pub fn observe(&mut self, now: Duration, request: &Observed<'_>) {
        let now_s = self.advance(now);
        self.learn_due();
        let state = &mut self.state;
        state.pace.note(now_s, state.observed);
        state.observed += 1;

        let components = &request.components[..request.components.len().min(MAX_COMPONENTS)];
        for seen in components {
            self.place(seen, now_s);
        }
        // Making room for the last may have dropped the first, so places are looked up only now.
        let base = components
            .iter()
            .filter(|seen| !seen.kind.is_adapter())
            .max_by_key(|seen| seen.bytes)
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
            tracked.used_by(request.session);
            if let Some(base) = base.filter(|_| seen.kind.is_adapter()) {
                tracked.used_with(base);
            }
            if self.state.lately.len() == LATELY {
                self.state.lately.pop_front();
            }
            self.state.lately.push_back(seen.content);
        }
        self.note_session(request.session, components);
        self.take_examples(now_s, components);
    }

    /// The probability that the component is requested within the horizon. Zero for one that was never seen; from
    /// its decayed counts alone as long as the model has not learned enough.
    #[must_use]
    pub fn probability(&mut self, now: Duration, content: &ContentId) -> f64 {
        let now_s = self.advance(now);
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
        contents
            .into_iter()
            .map(|content| self.probability_at(now_s, content))
            .collect()
    }

    /// Labels that a model is to be fitted to, for [`Self::studied`]: to be done elsewhere, and not at once.
    #[must_use]
    pub fn study(&mut self) -> Option<Study> {
        self.state.ladder.study()
    }

    /// Takes what came of a study; it is used while it does better than what learns online.
    pub fn studied(&mut self, studied: Studied) {
        self.state.ladder.studied(studied);
    }

    /// Whether it has learned enough to be believed.
    #[must_use]
    pub fn is_trained(&self) -> bool {
        self.state.ladder.is_trained()
    }

    /// Expected uses of the component in each request, as seen over this many requests ahead. Tiny for one that was
    /// never seen; `None` as long as no model can be believed.
    #[must_use]
    pub fn rate(&mut self, now: Duration, content: &ContentId, horizon: f64) -> Option<f64> {
        let now_s = self.advance(now);
        if !self.is_trained() {
            return None;
        }
        let Some(tracked) = self.tracked(content) else {
            return Some(f64::MIN_POSITIVE);
        };
        let row = self.row(tracked, &self.moment(now_s));
        self.state.ladder.rate(&row, horizon)
    }

    /// Requests since the component was asked for; as many as there were where it is not remembered.
    #[must_use]
    pub fn requests_since(&self, content: &ContentId) -> u64 {
        let last = self
            .tracked(content)
            .map_or(0, |tracked| tracked.last_request);
        self.state.observed.saturating_sub(last)
    }

    /// The bytes of the component, where it is remembered.
    #[must_use]
    pub fn bytes_of(&self, content: &ContentId) -> Option<Bytes> {
        self.tracked(content).map(|tracked| tracked.bytes)
    }

    /// Requests seen so far.
    #[must_use]
    pub fn observed(&self) -> u64 {
        self.state.observed
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
            ladder,
            tracked,
            sessions,
            observed,
            ..
        } = &self.state;
        let learner = &ladder.learners[self.judged()];
        PredictorStats {
            observed: *observed,
            labelled: learner.labelled,
            positive: learner.positive,
            tracked: tracked.len(),
            sessions: sessions.len(),
            pending: ladder.pending.len(),
            trained: ladder.is_trained(),
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
            request: self.state.observed,
            calm: self.state.pace.calm(),
        }
    }

    fn row(&self, tracked: &Tracked, moment: &Moment) -> Row {
        let base = tracked.usual_base().and_then(|base| self.tracked(&base));
        features::row(tracked, base, &self.users(tracked, moment.request), moment)
    }

    fn users(&self, tracked: &Tracked, now: u64) -> Users {
        let mut users = Users::default();
        for user in &tracked.users {
            let Some(last) = self.state.sessions.last(user.what) else {
                continue;
            };
            let since = now.saturating_sub(last.at);
            users.since = Some(users.since.map_or(since, |least| least.min(since)));
            let share = (user.times / last.activity.max(1.0)).min(1.0);
            users.interest += share * features::faded(now, last.at);
        }
        users
    }

    fn probability_at(&self, now_s: f64, content: &ContentId) -> f64 {
        let Some(tracked) = self.tracked(content) else {
            return 0.0;
        };
        let moment = self.moment(now_s);
        let horizon = self.horizon();
        let row = self.row(tracked, &moment);
        match self.state.ladder.rate(&row, horizon) {
            Some(rate) => -(-rate * horizon).exp_m1(),
            None => features::chance_from_counts(tracked, &moment, horizon),
        }
    }

    /// The configured horizon in requests, by their pace of late.
    #[must_use]
    pub fn horizon(&self) -> f64 {
        let gap_s = self.state.pace.slow_s.max(1e-3);
        (self.state.config.horizon.as_secs_f64() / gap_s).clamp(1.0, 4_096.0)
    }

    /// The model whose horizon is nearest to the configured one: the one that the statistics are about.
    fn judged(&self) -> usize {
        let horizon = self.horizon();
        let off = |rung: &usize| (ladder::HORIZONS[*rung] as f64 / horizon).ln().abs();
        (0..ladder::HORIZONS.len())
            .min_by(|a, b| off(a).total_cmp(&off(b)))
            .unwrap_or(0)
    }

    /// Learns from the examples whose horizon has passed. As this runs before each request is counted, whatever has used
    /// an example's component since did so in time.
    fn learn_due(&mut self) {
        let (tracked, index) = (&self.state.tracked, &self.index);
        self.state
            .ladder
            .learn_due(self.state.observed, |content, request| {
                let place = index.get(content).and_then(|place| tracked.get(*place));
                place.is_some_and(|tracked| tracked.last_request > request)
            });
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
    fn note_session(&mut self, session: SessionId, components: &[Seen]) {
        let now = self.state.observed;
        let (activity, left) = self.state.sessions.note(now, session, components);
        for last in left {
            let weight = features::faded(now, last.at);
            for content in &last.components {
                if let Some(tracked) = self.tracked_mut(content) {
                    tracked.hold(now, -weight, -weight * last.activity);
                }
            }
        }
        for content in sessions::distinct(components) {
            if let Some(tracked) = self.tracked_mut(&content) {
                tracked.hold(now, 1.0, activity);
            }
        }
    }

    /// Takes examples at random.
    fn take_examples(&mut self, now_s: f64, own: &[Seen]) {
        if self.state.tracked.is_empty() {
            return;
        }
        let moment = self.moment(now_s);
        for draw in 0..SAMPLES {
            if !self.state.ladder.has_room() {
                return;
            }
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
            let content = tracked.content;
            self.state.ladder.take(content, moment.request, &row);
        }
    }
}

/// How fast requests come.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
struct Pace {
    last_s: f64,
    /// Mean gap over about the last 16 requests.
    fast_s: f64,
    /// Mean gap over about the last 512.
    slow_s: f64,
}

impl Pace {
    fn note(&mut self, now_s: f64, before: u64) {
        if before > 0 {
            let gap = (now_s - self.last_s).max(0.0);
            // Means at first, moving averages later.
            let step = |of: f64| (1.0 / of).max(1.0 / before as f64);
            self.fast_s += step(16.0) * (gap - self.fast_s);
            self.slow_s += step(512.0) * (gap - self.slow_s);
        }
        self.last_s = now_s;
    }

    fn calm(&self) -> f64 {
        (self.fast_s + 1e-3) / (self.slow_s + 1e-3)
    }
}
