//! hotset's own retention: the least predicted use times restore time for its bytes goes first, unless a simpler policy does
//! better here and now.
//!
//! The value of keeping a component is the rate of its next uses, times the seconds that a load would take; it costs its
//! bytes. The rate comes from [`Predictor`], which looks as far ahead as LRU would keep things in this tier: what
//! comes later than that could be loaded again meanwhile. Victims are those of the least density, with a bounded search over
//! the lowest few (`cheapest.rs`); taking what is worth least in sum over all candidates measured worse.
//!
//! A predictor can be wrong: the world changes, or there is nothing to learn. So tiers run beside the real one as
//! metadata alone, under LRU, under GDSF and under the predictor, on the same requests; the real tier follows
//! whichever plainly pays less. Until the predictor has learned enough it is out of the race, and LRU is what is
//! followed at the start; who led before a restart leads after it.

mod prefetch;
mod race;

use std::collections::VecDeque;
use std::iter;
use std::time::Duration;

pub use self::race::Leader;
use self::race::{Place, Race};
use super::cheapest::{self, Item};
use super::gdsf::Gdsf;
use super::lowest::{Lowest, Scores};
use super::memory::Memory;
use super::rates::{Outlook, Rates};
use super::shadow::Asked;
use super::{Candidate, EvictionPolicy, Guess, Prefetch, Victim};
use crate::config::PredictConfig;
use crate::ids::ContentId;
use crate::plan::DISK_PER_S;
use crate::predict::{
    Observed, Predictor, PredictorStats, PrefetchScore, Scoreboard, Studied, Study,
    UnsoundStateError,
};
use crate::units::Bytes;

/// Candidates beyond those that would do which are weighed against them.
const BEYOND: usize = 3;
/// What a component is worth that a tier above has as well, as a share of what it is worth else. Measured: from 0.2 to 0.5 within a
/// percent or two.
const ABOVE: f64 = 0.2;
/// What went last and could be loaded again on a guess: mostly what a load that had to be made drove out.
const MAX_GHOSTS: usize = 64;
/// Requests in a second that are learned from: a twentieth of a core. Services whose loads take seconds see far fewer.
const APPETITE: u32 = 1_000;
/// Candidates that are looked at in one choice for where the tier stands.
const LOOKED_AT: usize = 16;

/// A third of the time that `as_secs_f64` takes, which divides: a decision asks for each candidate. No processor of old turns an unsigned
/// number into a float at once, and no time here is longer than a signed one holds.
fn seconds(time: Duration) -> f64 {
    time.as_secs() as i64 as f64 + f64::from(time.subsec_nanos()) * 1e-9
}

/// Retention by predicted use, or by what does better.
#[derive(Debug, Clone)]
pub struct HotsetRetention {
    predictor: Predictor,
    rates: Rates,
    capacity: Bytes,
    /// What loading takes where no tier has it. Not what it takes just now: the race is run as if no other tier had anything, since what others
    /// will have when a shadow would load is not known.
    whole_s: Memory<f64>,

    race: Race,
    /// Up to which score the last choice had to put candidates in order, and whose scores: much the same will do for the next.
    bar: Option<(Leader, f64)>,
    /// GDSF's books of the real tier, while it leads where a tier below changes what a restore costs: on a GPU, over RAM. By present costs it
    /// keeps other things than its shadow, which knows whole costs alone; in the order of the shadow's scores a GPU paid up to a fifth more.
    gdsf: Option<Gdsf>,

    // Prefetch, where it is wanted.
    prefetch: Option<Scoreboard>,
    /// What went last, oldest first, with what loading it again takes.
    ghosts: VecDeque<Asked>,
}

impl HotsetRetention {
    /// One that knows nothing yet.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let predictor = Predictor::new(&PredictConfig {
            seed,
            ..PredictConfig::default()
        });
        Self {
            predictor,
            rates: Rates::default(),
            capacity: Bytes::ZERO,
            whole_s: Memory::default(),
            race: Race::default(),
            bar: None,
            gdsf: None,
            prefetch: None,
            ghosts: VecDeque::new(),
        }
    }

    /// One that also names what is worth loading on an idle link.
    #[must_use]
    pub fn with_prefetch(seed: u64) -> Self {
        Self {
            prefetch: Some(Scoreboard::default()),
            ..Self::new(seed)
        }
    }

    /// What its predictor knows of itself.
    #[must_use]
    pub fn stats(&self) -> PredictorStats {
        self.predictor.stats()
    }

    /// Whose choices it follows.
    #[must_use]
    pub fn leader(&self) -> Leader {
        match self.race.leader() {
            Leader::Predictor if !self.predictor.is_trained() => Leader::Lru,
            leader => leader,
        }
    }

    fn asked(&self, content: ContentId, bytes: Bytes) -> Asked {
        let told = self.whole_s.get(&content).copied();
        Asked {
            content,
            bytes,
            restore_s: told.unwrap_or(bytes.as_f64() / DISK_PER_S),
        }
    }

    /// Runs the race on a request.
    fn race(&mut self, now: Duration, request: &Observed<'_>) {
        let mut set: Vec<Asked> = Vec::with_capacity(request.components.len());
        for seen in request.components {
            if set.iter().all(|asked| asked.content != seen.content) {
                set.push(self.asked(seen.content, seen.bytes));
            }
        }
        let (predictor, rates) = (&mut self.predictor, &mut self.rates);
        self.race.run(now, self.capacity, &set, predictor, rates);
        if self.leader() != Leader::Gdsf {
            self.gdsf = None;
        }
    }

    /// Learns where the tier stands, where these tell.
    fn look_around(&mut self, candidates: &[Candidate]) {
        if let Some(place) = Place::of(candidates) {
            self.race.place = place;
        }
    }

    /// What other tiers leave of its worth.
    fn left(candidate: &Candidate) -> f64 {
        candidate.discount() * Self::share(candidate)
    }

    fn share(candidate: &Candidate) -> f64 {
        if candidate.above { ABOVE } else { 1.0 }
    }

    /// LRU's score: idle seconds, of which those of what another tier has count for more.
    fn lru_score(now_s: f64, candidate: &Candidate) -> f64 {
        let idle_s = (now_s - seconds(candidate.last_used)).max(0.0);
        -idle_s / Self::left(candidate)
    }

    fn lru_reason(now: Duration, candidate: &Candidate) -> String {
        let idle = now.saturating_sub(candidate.last_used).as_secs_f64();
        let times = 1.0 / Self::left(candidate);
        // Not where it would read as once.
        if times >= 1.05 {
            return format!(
                "least recently used: idle for {idle:.1} s, counted {times:.1} times since another tier has it"
            );
        }
        format!("least recently used: idle for {idle:.1} s")
    }

    fn worth(rate: f64, candidate: &Candidate) -> f64 {
        let seconds = Self::share(candidate) * rate * candidate.restore_s;
        seconds * 1e9 / candidate.size()
    }

    /// The rates, and what they are found by.
    fn outlook(&mut self, now: Duration) -> (&mut Rates, Outlook<'_>) {
        let outlook = Outlook {
            predictor: &mut self.predictor,
            now,
            horizon: self.race.horizon(),
        };
        (&mut self.rates, outlook)
    }

    fn predicted_reason(&mut self, now: Duration, candidate: &Candidate) -> String {
        let (rates, mut outlook) = self.outlook(now);
        let (rate, _) = rates.now(&mut outlook, &candidate.content);
        let horizon = outlook.horizon;
        format!(
            "wanted within {} requests with {:.1} %, {:.2} s to restore",
            // Whole: a float that is short in decimals takes long to write.
            horizon.round() as u64,
            -(-rate * horizon).exp_m1() * 100.0,
            candidate.restore_s
        )
    }

    /// All candidates by what the leader gives each.
    fn lowest<'a>(
        &mut self,
        leader: Leader,
        now: Duration,
        candidates: &'a [Candidate],
    ) -> Lowest<'a> {
        let bar = match self.bar {
            Some((of, bar)) if of == leader => bar,
            _ => f64::NEG_INFINITY,
        };
        let mut scores = Scores::of(candidates, bar);
        match leader {
            Leader::Lru => {
                let now_s = seconds(now);
                scores.extend(iter::repeat(()), |c, ()| Some(Self::lru_score(now_s, c)));
            }
            Leader::Gdsf => {
                if self.gdsf.is_none() {
                    let mut discounted = false;
                    // In RAM the clock counts for less with the rest, so that once it has risen what a GPU has goes first.
                    self.race.score_as_gdsf(&mut scores, |candidate| {
                        discounted |= candidate.restore_s < candidate.whole_s;
                        Self::share(candidate)
                    });
                    if !discounted {
                        return scores.lowest();
                    }
                    scores = Scores::of(candidates, bar);
                }
                // Not before somebody asks what is to go: what was asked for until now is in the shadow's books.
                let gdsf = self.gdsf.get_or_insert_with(|| self.race.gdsf());
                gdsf.score(&mut scores);
            }
            Leader::Predictor => {
                let (rates, mut outlook) = self.outlook(now);
                rates.score(&mut outlook, &mut scores, Self::worth);
            }
        }
        scores.lowest()
    }

    /// As the default, but with a bound on how many rates are found anew: what has changed little is looked at again only
    /// where it stands lowest. Reasons are written for victims alone.
    fn choose_as(
        &mut self,
        leader: Leader,
        now: Duration,
        candidates: &[Candidate],
        needed: Bytes,
    ) -> Vec<Victim> {
        let mut all = self.lowest(leader, now, candidates);
        let (rates, mut outlook) = self.outlook(now);
        let mut freed = Bytes::ZERO;
        let mut enough = None;
        let mut lowest: Vec<(&Candidate, f64)> = Vec::new();
        while let Some((place, score)) = all.pop() {
            let candidate = &candidates[place as usize];
            if leader == Leader::Predictor {
                let (rate, changed) = rates.now(&mut outlook, &candidate.content);
                if changed {
                    all.push(place, Self::worth(rate, candidate));
                    continue;
                }
            }
            lowest.push((candidate, score));
            freed = freed.saturating_add(candidate.bytes);
            if freed >= needed {
                let greedy = *enough.get_or_insert(lowest.len());
                let beyond = if leader == Leader::Predictor {
                    BEYOND
                } else {
                    0
                };
                if lowest.len() >= greedy + beyond {
                    break;
                }
            }
        }
        self.bar = Some((leader, all.bar()));
        if let (Leader::Predictor, Some(greedy)) = (leader, enough) {
            // Guesses that nobody used stand first and go whatever they seem to be worth.
            let items: Vec<Item> = lowest
                .iter()
                .map(|(candidate, score)| {
                    let gb = candidate.bytes.as_f64() / 1e9;
                    Item {
                        worth: if candidate.prefetched {
                            0.0
                        } else {
                            score * gb
                        },
                        bytes: candidate.bytes.as_f64(),
                    }
                })
                .collect();
            let chosen = cheapest::choose(&items, greedy, needed.as_f64());
            lowest = chosen.into_iter().map(|at| lowest[at]).collect();
        }
        let victim = |(candidate, score)| self.victim(leader, now, candidate, score);
        lowest.into_iter().map(victim).collect()
    }

    fn victim(
        &mut self,
        leader: Leader,
        now: Duration,
        candidate: &Candidate,
        score: f64,
    ) -> Victim {
        let reason = match leader {
            Leader::Lru => Self::lru_reason(now, candidate),
            Leader::Gdsf => format!("least worth its bytes by GDSF: priority {score:.3}"),
            Leader::Predictor => self.predicted_reason(now, candidate),
        };
        Victim {
            content: candidate.content,
            score,
            reason,
        }
    }
}

impl EvictionPolicy for HotsetRetention {
    fn name(&self) -> &'static str {
        match self.prefetch {
            None => "hotset",
            Some(_) => "hotset-prefetch",
        }
    }

    fn on_capacity(&mut self, capacity: Bytes) {
        self.capacity = capacity;
    }

    fn on_cost(&mut self, content: &ContentId, whole_s: f64) {
        let sound = whole_s.is_finite() && whole_s >= 0.0;
        if sound && self.whole_s.get(content) != Some(&whole_s) {
            self.whole_s.put(*content, whole_s);
        }
    }

    fn observe(&mut self, now: Duration, request: &Observed<'_>) {
        self.predictor.observe(now, request);
        for seen in request.components {
            self.rates.forget(&seen.content);
        }
        if !self.capacity.is_zero() {
            self.race(now, request);
        }
        if let Some(board) = &mut self.prefetch {
            let contents = request.components.iter().map(|seen| &seen.content);
            board.asked(self.predictor.observed(), contents.clone());
            self.ghosts
                .retain(|ghost| contents.clone().all(|content| *content != ghost.content));
        }
    }

    fn on_request(&mut self, now: Duration, content: &ContentId, bytes: Bytes, hit: bool) {
        if let Some(gdsf) = &mut self.gdsf {
            gdsf.on_request(now, content, bytes, hit);
        }
    }

    fn on_evict(&mut self, now: Duration, content: &ContentId) {
        if let Some(gdsf) = &mut self.gdsf {
            gdsf.on_evict(now, content);
        }
        let Some(board) = &mut self.prefetch else {
            return;
        };
        board.gone(content);
        let Some(bytes) = self.predictor.bytes_of(content) else {
            return;
        };
        if self.ghosts.len() == MAX_GHOSTS {
            self.ghosts.pop_front();
        }
        let ghost = self.asked(*content, bytes);
        self.ghosts.push_back(ghost);
    }

    fn prefetch(
        &mut self,
        now: Duration,
        residents: &[Candidate],
        free: Bytes,
    ) -> Option<Prefetch> {
        self.worth_loading(now, residents, free)
    }

    fn room_for_guess(
        &mut self,
        now: Duration,
        guess: &Guess,
        residents: &[Candidate],
        needed: Bytes,
    ) -> Option<Vec<Victim>> {
        if !self.predictor.is_trained() || !self.race.believes_predictor() {
            return None;
        }
        self.look_around(residents);
        let (rates, mut outlook) = self.outlook(now);
        let uses = if guess.certain {
            1.0 / outlook.horizon
        } else {
            rates.now(&mut outlook, &guess.content).0
        };
        self.worth_less(now, uses * guess.restore_s, residents, needed)
    }

    fn on_prefetch_cancelled(&mut self, content: &ContentId, delay_s: f64) {
        if let Some(board) = &mut self.prefetch {
            board.delayed(delay_s);
            board.gone(content);
        }
    }

    fn appetite(&self) -> Option<u32> {
        Some(APPETITE)
    }

    fn study(&mut self) -> Option<Study> {
        self.predictor.study()
    }

    fn studied(&mut self, studied: Studied) {
        self.predictor.studied(studied);
    }

    fn learned(&self) -> Option<Vec<u8>> {
        // A line with how the race stands, then the predictor: LRU would have to be beaten anew at each start else.
        let mut learned = serde_json::to_vec(&self.race.standing()).ok()?;
        learned.push(b'\n');
        learned.extend(self.predictor.learned()?);
        Some(learned)
    }

    fn resume(
        &mut self,
        now: Duration,
        away: Duration,
        learned: &[u8],
    ) -> Result<(), UnsoundStateError> {
        let what = "it does not say how the race stands";
        let end = learned.iter().position(|byte| *byte == b'\n');
        let (standing, predictor) = match end {
            Some(end) => (&learned[..end], &learned[end + 1..]),
            None => return Err(UnsoundStateError { what }),
        };
        let standing = serde_json::from_slice(standing).map_err(|_| UnsoundStateError { what })?;
        self.predictor = Predictor::restored(self.predictor.config(), now, away, predictor)?;
        self.race.resume(standing);
        self.rates = Rates::default();
        Ok(())
    }

    fn prefetch_score(&self) -> Option<PrefetchScore> {
        self.prefetch.as_ref().map(Scoreboard::score)
    }

    fn rank(&mut self, now: Duration, candidates: &[Candidate]) -> Vec<Victim> {
        self.look_around(candidates);
        let leader = self.leader();
        let mut all = match leader {
            Leader::Lru | Leader::Gdsf => self.lowest(leader, now, candidates),
            Leader::Predictor => {
                let (rates, mut outlook) = self.outlook(now);
                let mut scores = Scores::of(candidates, f64::NEG_INFINITY);
                scores.extend(iter::repeat(()), |candidate, ()| {
                    let (rate, _) = rates.now(&mut outlook, &candidate.content);
                    Some(Self::worth(rate, candidate))
                });
                scores.lowest()
            }
        };
        iter::from_fn(|| all.pop())
            .map(|(place, score)| {
                let candidate = &candidates[place as usize];
                self.victim(leader, now, candidate, score)
            })
            .collect()
    }

    fn choose(&mut self, now: Duration, candidates: &[Candidate], needed: Bytes) -> Vec<Victim> {
        // Some at a time: while something is chosen a load waits, and each has its turn.
        let start = self.predictor.observed() as usize * LOOKED_AT % candidates.len().max(1);
        let end = (start + LOOKED_AT).min(candidates.len());
        self.look_around(&candidates[start..end]);
        let leader = self.leader();
        let victims = self.choose_as(leader, now, candidates, needed);
        if let Some(gdsf) = &mut self.gdsf {
            gdsf.chose(&victims);
        }
        victims
    }
}

#[cfg(test)]
mod tests;
