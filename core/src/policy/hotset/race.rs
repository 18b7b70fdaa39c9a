//! The race: three tiers beside the real one, as metadata alone, each under a policy of its own, on the same requests. Whoever plainly pays
//! less is followed.
//!
//! Which of LRU and GDSF a stream suits seldom depends on the tier's size (docs/policy.md), and a smaller tier loads more often and has to
//! evict sooner. So two more run with a share of the capacity, under those two, and what they pay counts between those two as well, the less
//! the more the whole tier has told. So it is known which of them to follow where a large tier runs short for the first time. The predictor
//! has none: how far it is ahead does depend on the size.

use std::time::Duration;

use crate::policy::Candidate;
use crate::policy::gdsf::Gdsf;
use crate::policy::lowest::Scores;
use crate::policy::memory::Memory;
use crate::policy::rates::{Outlook, Rates};
use crate::policy::shadow::{Asked, Held, Scoring, Shadow};
use crate::predict::Predictor;
use crate::units::Bytes;

/// How long LRU keeps things before its shadow has told, in requests.
const FIRST_AGE: f64 = 64.0;
/// The horizon as a share of the requests for which LRU keeps what it evicts. Measured: from 0.5 to 2 within a percent; the
/// shorter, the sooner a change is seen.
const HORIZON_SHARE: f64 = 0.7;
/// The least and the most requests that are looked ahead. Further than that a large tier would do better by a percent while
/// nothing changes, and by three worse when what is popular does.
const HORIZONS: (f64, f64) = (4.0, 96.0);
/// Share of the latest eviction in the mean time that LRU keeps things.
const AGE_STEP: f64 = 1.0 / 64.0;
/// Share of the differences between two shadows that is remembered from one request that any of them loads for to the next: half
/// is forgotten after about 1,400. Counted in loads and not in requests, since in a large tier few loads say anything, and what they
/// say is not to be forgotten before the next. With half after 350, as before, no small lead could ever become plain, and in loops of
/// which a tier held most the tier went to and fro between two that each won for hundreds of requests in turn: worse than either.
const MEMORY: f64 = 0.9995;
/// Share of the squares of their differences that is remembered when two stand level again. With all of them, a few large loads of long ago,
/// most of them in the smaller tier, were what small losses had to be plain beside: LRU led on in large tiers that GDSF suits.
const SQUARES_WHEN_LEVEL: f64 = 0.5;
/// LRU must be ahead of the predictor by so many standard deviations of their differences, were these of random sign: few loads decide
/// much, and following luck costs more than waiting. Of less, down to the second, the less far the predictor looks ahead of the time for
/// which LRU keeps things: in a large tier few loads happen, and it takes long until they tell that it is wrong.
const LRU_AHEAD_OF_PREDICTOR: (f64, f64) = (2.0, 1.0);
/// GDSF by so many, by the same measure.
const GDSF_AHEAD_OF_PREDICTOR: (f64, f64) = (1.5, 0.5);
/// The predictor of LRU by so many, which one load may be: it does better nearly everywhere in the end. Of more, up to the second, by the
/// same measure: in a large tier there is little to win over LRU, and much to lose once what is popular changes.
const PREDICTOR_AHEAD_OF_LRU: (f64, f64) = (0.5, 1.5);

/// Where a tier stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Place {
    /// No other has had any of what is here.
    #[default]
    Alone,
    /// Over one that has had some of it, as a GPU is over RAM.
    OverAnother,
    /// Under one that has had some of it.
    UnderAnother,
}

impl Place {
    /// Where the tier with these stands; `None` where they do not tell.
    pub(super) fn of(candidates: &[Candidate]) -> Option<Self> {
        if candidates.iter().any(|c| c.above) {
            return Some(Self::UnderAnother);
        }
        let over = candidates.iter().any(|c| c.restore_s < c.whole_s);
        over.then_some(Self::OverAnother)
    }

    /// GDSF must be ahead of LRU by so many. Under another tier few requests arrive, and LRU, which leads at first, leads for long if it is let.
    /// It is no better there but where the world changes, and then hotset is far ahead of both.
    const fn gdsf_ahead_of_lru(self) -> f64 {
        match self {
            Self::Alone => 1.0,
            Self::OverAnother | Self::UnderAnother => 0.2,
        }
    }

    /// LRU of GDSF by so many, and by the same measure up to the second.
    const fn lru_ahead_of_gdsf(self) -> (f64, f64) {
        match self {
            Self::Alone => (0.5, 0.8),
            Self::OverAnother | Self::UnderAnother => (1.0, 2.0),
        }
    }

    /// The predictor of GDSF by so many, and by the same measure up to the second: in a large tier the two are mostly as good, and luck soon
    /// takes one of them ahead by a deviation or two. By more where there are two tiers, and most over another, where whole costs,
    /// by which the race is run, tell less.
    const fn predictor_ahead_of_gdsf(self) -> (f64, f64) {
        match self {
            Self::Alone => (0.75, 2.0),
            Self::UnderAnother => (1.0, 3.0),
            Self::OverAnother => (2.0, 3.0),
        }
    }
}

/// The smaller tier's share of the capacity. Measured with a half, a third and a quarter: all within a percent.
const SMALLER: f64 = 0.5;
/// Once so many requests have cost the whole tier's LRU and GDSF unlike, what the smaller one's pay counts half: where it misleads, it is
/// outlived. Measured with 30, 100 and for ever: within half a percent.
const TOLD: f64 = 30.0;
/// Makes the number of a request a score below all that come from rates.
const UNKNOWN: f64 = 1e-30;

/// Whose shadow is followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Leader {
    /// Least recently used.
    Lru,
    /// Greedy-Dual-Size-Frequency.
    Gdsf,
    /// Predicted use.
    Predictor,
}

impl Leader {
    const ALL: [Self; 3] = [Self::Lru, Self::Gdsf, Self::Predictor];
}

/// By how much one shadow paid more than another of the same size of late, or since they last stood level: see [`with_lru`].
#[derive(Debug, Clone, Copy, Default)]
struct Lag {
    seconds: f64,
    squares: f64,
}

impl Lag {
    fn note(&mut self, more_s: f64) {
        self.seconds = self.seconds * MEMORY + more_s;
        self.squares = self.squares * MEMORY * MEMORY + more_s * more_s;
    }

    /// Counts only from when they last stood level, as Page's test for a change does (Biometrika 1954).
    fn forget_gains(&mut self) {
        self.seconds = self.seconds.max(0.0);
    }

    /// They stand level from here on, and what they differ by from here on counts for more.
    fn stand_level(&mut self) {
        self.seconds = 0.0;
        self.squares *= SQUARES_WHEN_LEVEL;
    }

    /// Whether it is more than so many standard deviations.
    fn is_plain(&self, deviations: f64) -> bool {
        self.seconds > deviations * self.squares.sqrt()
    }
}

/// Whether LRU is one of these: then only what was lost since they last stood level counts. LRU is right at once when the world
/// changes, and what others won in the old one is no excuse. The others both go by what was: in a stream that comes round, each
/// has its stretches, and only the whole of them tells.
fn with_lru(one: Leader, other: Leader) -> bool {
    one == Leader::Lru || other == Leader::Lru
}

/// A tier under LRU and one under GDSF.
#[derive(Debug, Clone)]
struct Simple {
    lru: Shadow,
    /// Requests for which LRU keeps what it evicts.
    lru_age: f64,
    /// Whether LRU has had to evict.
    was_short: bool,
    gdsf: Shadow,
    gdsf_clock: f64,
}

impl Default for Simple {
    fn default() -> Self {
        Self {
            lru: Shadow::default(),
            lru_age: FIRST_AGE,
            was_short: false,
            gdsf: Shadow::default(),
            gdsf_clock: 0.0,
        }
    }
}

impl Simple {
    /// Seconds that each pays for a request; GDSF's scores are written down where somebody asks for them.
    fn request(
        &mut self,
        number: u64,
        capacity: Bytes,
        set: &[Asked],
        scores: Option<&mut Memory<f64>>,
    ) -> Paid {
        let mut by_age = ByAge {
            number,
            age: &mut self.lru_age,
            was_short: &mut self.was_short,
        };
        let mut by_worth = ByWorth {
            clock: &mut self.gdsf_clock,
            scores,
        };
        Paid {
            lru_s: self.lru.request(number, capacity, set, &mut by_age),
            gdsf_s: self.gdsf.request(number, capacity, set, &mut by_worth),
        }
    }
}

/// What LRU and GDSF paid for a request in tiers of the same size.
#[derive(Debug, Clone, Copy, Default)]
struct Paid {
    lru_s: f64,
    gdsf_s: f64,
}

/// The shadows, and who is followed.
#[derive(Debug, Clone, Default)]
pub(super) struct Race {
    whole: Simple,
    /// What GDSF gives each there, zero where it went: apart from the rest, since a decision asks for all of them.
    gdsf_scores: Memory<f64>,
    smaller: Simple,
    predicted: Shadow,
    /// By how much each paid more than each; between LRU and GDSF in both tiers.
    lags: [[Lag; 3]; 3],
    /// Requests that cost the whole tier's LRU and GDSF unlike.
    told: f64,
    pub(super) place: Place,
    standing: Standing,
}

/// How the race stands. It outlives the process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct Standing {
    /// Who was elected last. Nobody yet: LRU is followed.
    elected: Option<Leader>,
    /// Whether the predictor was plainly behind when another took the lead.
    predictor_lost: bool,
}

impl Race {
    /// Whose choices pay least; LRU's while nothing tells.
    pub(super) fn leader(&self) -> Leader {
        self.standing.elected.unwrap_or(Leader::Lru)
    }

    pub(super) const fn standing(&self) -> Standing {
        self.standing
    }

    /// Goes on from where the race stood in another process.
    pub(super) fn resume(&mut self, standing: Standing) {
        self.standing = standing;
    }

    /// Whether the predictor's word counts: where it leads, and where it has neither lost nor is plainly behind whoever leads. In a
    /// tier from which little was evicted it has not had to prove anything.
    pub(super) fn believes_predictor(&self) -> bool {
        !self.standing.predictor_lost && !self.is_behind(self.leader())
    }

    /// Whether the predictor is plainly behind another.
    fn is_behind(&self, other: Leader) -> bool {
        self.lags[Leader::Predictor as usize][other as usize].is_plain(LRU_AHEAD_OF_PREDICTOR.1)
    }

    /// Scores all candidates by what GDSF's shadow gives each, and by this share of it; what it would not have kept goes first.
    pub(super) fn score_as_gdsf(
        &mut self,
        scores: &mut Scores<'_>,
        mut share: impl FnMut(&Candidate) -> f64,
    ) {
        let shadow = &self.whole.gdsf;
        self.gdsf_scores.score(scores, |candidate, known| {
            let score = known.copied().unwrap_or_else(|| {
                // Among very many components the score of one that is held may have been forgotten.
                let held = shadow.get(&candidate.content);
                held.map_or(0.0, |held| held.score)
            });
            score * share(candidate)
        });
    }

    /// GDSF as its shadow stands, to go on with.
    pub(super) fn gdsf(&self) -> Gdsf {
        Gdsf::after(self.whole.gdsf_clock, self.whole.gdsf.held())
    }

    /// How many requests the predictor looks ahead.
    pub(super) fn horizon(&self) -> f64 {
        (HORIZON_SHARE * self.whole.lru_age).clamp(HORIZONS.0, HORIZONS.1)
    }

    /// Runs the shadows on a request that the predictor has observed.
    pub(super) fn run(
        &mut self,
        now: Duration,
        capacity: Bytes,
        set: &[Asked],
        predictor: &mut Predictor,
        rates: &mut Rates,
    ) {
        let number = predictor.observed();
        let scores = Some(&mut self.gdsf_scores);
        let whole = self.whole.request(number, capacity, set, scores);
        let share = capacity.share(SMALLER);
        let smaller = self.smaller.request(number, share, set, None);
        let outlook = Outlook {
            predictor,
            now,
            horizon: self.horizon(),
        };
        let mut predicted = ByRate { outlook, rates };
        let predicted_s = self
            .predicted
            .request(number, capacity, set, &mut predicted);
        let noted = self.note(whole, predicted_s, smaller);
        // Before it was short, nobody has had to choose anything.
        if noted && self.whole.was_short {
            self.elect();
        }
    }

    /// How far it looks ahead, as a share of how far it would to see all that LRU keeps.
    fn foresight(&self) -> f64 {
        self.horizon() / (HORIZON_SHARE * self.whole.lru_age).max(HORIZONS.0)
    }

    /// By how many standard deviations another must be ahead of the leader.
    fn needed_ahead(&self, other: Leader) -> f64 {
        let more = |(least, most): (f64, f64)| (least / self.foresight()).clamp(least, most);
        let less = |(most, least): (f64, f64)| (most * self.foresight()).clamp(least, most);
        match (self.leader(), other) {
            (Leader::Predictor, Leader::Gdsf) => less(GDSF_AHEAD_OF_PREDICTOR),
            (Leader::Predictor, _) => less(LRU_AHEAD_OF_PREDICTOR),
            (Leader::Lru, Leader::Predictor) => more(PREDICTOR_AHEAD_OF_LRU),
            (Leader::Lru, _) => self.place.gdsf_ahead_of_lru(),
            (Leader::Gdsf, Leader::Predictor) => more(self.place.predictor_ahead_of_gdsf()),
            (Leader::Gdsf, _) => more(self.place.lru_ahead_of_gdsf()),
        }
    }

    /// Notes what each has paid for a request; gives whether that was anything.
    fn note(&mut self, whole: Paid, predicted_s: f64, smaller: Paid) -> bool {
        let paid_s = [whole.lru_s, whole.gdsf_s, predicted_s];
        let loads = paid_s.iter().any(|paid| *paid > 0.0);
        if whole.lru_s != whole.gdsf_s {
            self.told += 1.0;
        }
        let weight = 1.0 / (1.0 + self.told / TOLD);
        let in_smaller_s = weight * (smaller.lru_s - smaller.gdsf_s);
        for (one, lags) in Leader::ALL.into_iter().zip(&mut self.lags) {
            for (other, lag) in Leader::ALL.into_iter().zip(lags) {
                let more_s = paid_s[one as usize] - paid_s[other as usize];
                let in_smaller_s = match (one, other) {
                    (Leader::Lru, Leader::Gdsf) => in_smaller_s,
                    (Leader::Gdsf, Leader::Lru) => -in_smaller_s,
                    _ => 0.0,
                };
                if loads || in_smaller_s != 0.0 {
                    lag.note(more_s + in_smaller_s);
                }
                if with_lru(one, other) {
                    lag.forget_gains();
                }
            }
        }
        loads || smaller.lru_s > 0.0 || smaller.gdsf_s > 0.0
    }

    /// Changes the leader where another is plainly ahead of it.
    fn elect(&mut self) {
        let leader = self.leader();
        let lags = &self.lags[leader as usize];
        let ahead = Leader::ALL
            .into_iter()
            .filter(|other| lags[*other as usize].is_plain(self.needed_ahead(*other)))
            // Where two are, LRU has the advantage that its losses of long ago do not count.
            .max_by(|a, b| {
                let [a, b] = [a, b].map(|other| lags[*other as usize].seconds);
                a.total_cmp(&b)
            });
        let Some(next) = ahead else {
            return;
        };
        self.standing = Standing {
            elected: Some(next),
            // In a large tier it loses the lead to GDSF by less, and guesses are not to be given up for that.
            predictor_lost: next != Leader::Predictor
                && (self.is_behind(next) || !self.believes_predictor()),
        };
        if with_lru(leader, next) {
            // All stand level again: else what a third won before would undo it at once.
            for other in [Leader::Gdsf, Leader::Predictor] {
                self.lags[Leader::Lru as usize][other as usize].stand_level();
                self.lags[other as usize][Leader::Lru as usize].stand_level();
            }
        }
    }
}

/// LRU: the number of the request that used it last.
struct ByAge<'a> {
    number: u64,
    age: &'a mut f64,
    was_short: &'a mut bool,
}

impl Scoring for ByAge<'_> {
    fn on_use(&mut self, _held: &Held) -> (f64, u64) {
        (self.number as f64, u64::MAX)
    }

    fn on_evict(&mut self, held: &Held) {
        *self.was_short = true;
        *self.age += AGE_STEP * (self.number as f64 - held.score - *self.age);
    }
}

/// GDSF: see [`crate::policy::gdsf`].
struct ByWorth<'a> {
    clock: &'a mut f64,
    scores: Option<&'a mut Memory<f64>>,
}

impl ByWorth<'_> {
    fn note(&mut self, held: &Held, score: f64) {
        if let Some(scores) = &mut self.scores {
            scores.put(held.asked.content, score);
        }
    }
}

impl Scoring for ByWorth<'_> {
    fn on_use(&mut self, held: &Held) -> (f64, u64) {
        let worth = held.uses as f64 * held.asked.seconds_per_gb();
        let score = *self.clock + worth;
        self.note(held, score);
        (score, u64::MAX)
    }

    fn on_evict(&mut self, held: &Held) {
        *self.clock = self.clock.max(held.score);
        self.note(held, 0.0);
    }
}

/// The predictor: expected seconds saved by each GB in each request.
struct ByRate<'a> {
    outlook: Outlook<'a>,
    rates: &'a mut Rates,
}

impl ByRate<'_> {
    fn score(&mut self, asked: &Asked) -> (f64, u64) {
        let predictor = &mut self.outlook.predictor;
        if !predictor.is_trained() {
            // Least recently used first, and before anything that is known.
            let now = predictor.observed();
            let last = now - predictor.requests_since(&asked.content).min(now);
            return (last as f64 * UNKNOWN, now + 1);
        }
        let (rate, _) = self.rates.now(&mut self.outlook, &asked.content);
        let fresh_until = self.rates.fresh_until(&asked.content);
        (rate * asked.seconds_per_gb(), fresh_until)
    }
}

impl Scoring for ByRate<'_> {
    fn on_use(&mut self, held: &Held) -> (f64, u64) {
        self.score(&held.asked)
    }

    fn again(&mut self, held: &Held) -> (f64, u64) {
        self.score(&held.asked)
    }
}

#[cfg(test)]
mod tests;
