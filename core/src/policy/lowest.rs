//! Candidates from the lowest score up, without sorting them all: mostly a handful are asked for.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use super::{Candidate, Score};

/// So many of the scores, evenly spread, are looked at to tell which are low. What is not above the second lowest of them is put in order:
/// about a thirtieth of all.
const SAMPLE: usize = 64;
/// With more than so many up to it a bar of the last time is too high by now.
const MAX_NEAR: usize = 128;
/// So many scores are compared with the bar at once.
const AT_ONCE: usize = 8;

/// What was prefetched and never used goes first, then by score, and of equals what was used least recently.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    kept: bool,
    score: Score,
    last_used: Duration,
    place: u32,
}

impl Key {
    fn of(candidate: &Candidate, score: f64, place: u32) -> Self {
        Self {
            kept: !candidate.prefetched,
            score: Score(score),
            last_used: candidate.last_used,
            place,
        }
    }
}

/// Zero where it is no number.
fn sound(score: f64) -> f64 {
    if score.is_finite() { score } else { 0.0 }
}

/// The scores of candidates, one after the other.
#[derive(Debug)]
pub(super) struct Scores<'a> {
    candidates: &'a [Candidate],
    scores: Vec<f64>,
    /// How many are there.
    done: usize,
    bar: f64,
    /// The places of those up to the bar, of those prefetched, and of those that are no number.
    odd: Vec<u32>,
}

impl<'a> Scores<'a> {
    /// None yet. A few should be up to this bar: best is that of the last time, see [`Lowest::bar`].
    pub(super) fn of(candidates: &'a [Candidate], bar: f64) -> Self {
        Self {
            candidates,
            scores: vec![0.0; candidates.len()],
            done: 0,
            bar,
            odd: Vec::new(),
        }
    }

    /// All candidates.
    pub(super) const fn candidates(&self) -> &'a [Candidate] {
        self.candidates
    }

    /// Those without a score yet.
    pub(super) fn rest(&self) -> &'a [Candidate] {
        &self.candidates[self.done..]
    }

    /// Scores those that follow, each by one of these values, until there is no score; gives how many. A score that is no number counts as zero.
    /// All in one pass: a thousand candidates are more than a processor has at hand. And without a branch that would be hard to foresee, or
    /// anything kept in memory from one to the next: both would be most of a decision.
    #[inline(always)]
    pub(super) fn extend<V>(
        &mut self,
        values: impl IntoIterator<Item = V>,
        mut score: impl FnMut(&Candidate, V) -> Option<f64>,
    ) -> usize {
        let (from, bar) = (self.done, self.bar);
        let ahead = self.candidates[from..].iter().zip(&mut self.scores[from..]);
        let mut place = from;
        for ((candidate, kept), value) in ahead.zip(values) {
            let Some(score) = score(candidate, value) else {
                break;
            };
            *kept = score;
            if !((score > bar) & (score < f64::INFINITY) & !candidate.prefetched) {
                Self::set_apart(&mut self.odd, place);
            }
            place += 1;
        }
        self.done = place;
        place - from
    }

    #[cold]
    fn set_apart(odd: &mut Vec<u32>, place: usize) {
        odd.push(place as u32);
    }

    /// Each in turn.
    pub(super) fn iter(&self) -> impl Iterator<Item = f64> {
        self.scores.iter().copied()
    }

    /// All candidates by them.
    pub(super) fn lowest(mut self) -> Lowest<'a> {
        debug_assert!(self.rest().is_empty(), "a candidate without a score");
        let mut places = Vec::with_capacity(self.odd.len());
        let mut near = BinaryHeap::with_capacity(self.candidates.len() / SAMPLE * 4);
        for place in self.odd {
            let candidate = &self.candidates[place as usize];
            let score = &mut self.scores[place as usize];
            *score = sound(*score);
            if candidate.prefetched {
                near.push(Reverse(Key::of(candidate, *score, place)));
                *score = f64::NAN;
            } else if *score <= self.bar {
                places.push(place);
            }
        }
        let mut lowest = Lowest {
            candidates: self.candidates,
            far: self.scores.len() - near.len(),
            scores: self.scores,
            near,
            bar: self.bar,
        };
        if places.len() > MAX_NEAR {
            lowest.bar = f64::NEG_INFINITY;
        } else {
            lowest.draw_near(places);
        }
        lowest
    }
}

/// Candidates that are taken from the lowest up.
#[derive(Debug)]
pub(super) struct Lowest<'a> {
    candidates: &'a [Candidate],
    /// By place; no number where it was near from the start.
    scores: Vec<f64>,
    /// Those with a score up to the bar, those prefetched, and what was put back.
    near: BinaryHeap<Reverse<Key>>,
    bar: f64,
    /// How many are not yet near.
    far: usize,
}

impl Lowest<'_> {
    /// Up to which score candidates have been put in order.
    pub(super) const fn bar(&self) -> f64 {
        self.bar
    }

    /// Puts one back with another score.
    pub(super) fn push(&mut self, place: u32, score: f64) {
        if let Some(candidate) = self.candidates.get(place as usize) {
            self.near
                .push(Reverse(Key::of(candidate, sound(score), place)));
        }
    }

    /// Takes the lowest: its place and score.
    pub(super) fn pop(&mut self) -> Option<(u32, f64)> {
        while self.far > 0 {
            let lowest = self.near.peek();
            if lowest.is_some_and(|Reverse(key)| !key.kept || key.score.0 <= self.bar) {
                break;
            }
            self.raise_bar();
        }
        let Reverse(key) = self.near.pop()?;
        Some((key.place, key.score.0))
    }

    fn raise_bar(&mut self) {
        let before = self.bar;
        let every = self.scores.len().div_ceil(SAMPLE).max(1);
        let sample = self.scores.iter().step_by(every);
        // No number compares with none.
        let above = sample.filter(|score| **score > before);
        let [_, second] = above.fold([f64::INFINITY; 2], |[lowest, next], score| {
            if *score < lowest {
                [*score, lowest]
            } else {
                [lowest, next.min(*score)]
            }
        });
        self.bar = second;
        let is_raised = |score: f64| (score > before) & (score <= second);
        let mut places = Vec::with_capacity(self.scores.len() / SAMPLE * 4);
        for (from, some) in (0..).step_by(AT_ONCE).zip(self.scores.chunks(AT_ONCE)) {
            // Without a branch for each.
            if some
                .iter()
                .fold(false, |any, score| any | is_raised(*score))
            {
                let raised = (from..).zip(some).filter(|(_, score)| is_raised(**score));
                places.extend(raised.map(|(place, _): (u32, &f64)| place));
            }
        }
        self.draw_near(places);
    }

    fn draw_near(&mut self, places: Vec<u32>) {
        self.far -= places.len();
        let key = |place: u32| {
            let at = place as usize;
            Reverse(Key::of(&self.candidates[at], self.scores[at], place))
        };
        self.near.extend(places.into_iter().map(key));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::policy::test_utils::candidate;

    proptest! {
        #[test]
        fn they_come_in_order_also_where_some_are_put_back(
            scores in prop::collection::vec((0_usize..500, 0_u64..3, 0_u8..20), 0..200),
            raised in prop::collection::vec(0_u32..200, 0..200),
            bar in prop_oneof![Just(f64::NEG_INFINITY), -250.0..250.0, Just(f64::INFINITY)],
        ) {
            let odd = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -0.0];
            let given: Vec<f64> = scores
                .iter()
                .map(|(n, ..)| odd.get(*n).copied().unwrap_or(*n as f64 - 250.0))
                .collect();
            let candidates: Vec<Candidate> = scores
                .iter()
                .map(|(_, last_used, guessed)| Candidate {
                    prefetched: *guessed == 0,
                    ..candidate(0, 1, *last_used)
                })
                .collect();
            let mut all = Scores::of(&candidates, bar);
            all.extend(&given, |_, score| Some(*score));
            let mut lowest = all.lowest();
            let given = given.iter().copied().map(sound);
            let key = |place: u32, score: f64| Key::of(&candidates[place as usize], score, place);
            let mut model: BinaryHeap<_> =
                (0..).zip(given).map(|(place, score)| Reverse(key(place, score))).collect();
            let mut raised = raised.into_iter();
            while let Some(Reverse(expected)) = model.pop() {
                let (place, score) = lowest.pop().unwrap();
                prop_assert!(key(place, score).cmp(&expected).is_eq());
                if let Some(by) = raised.next() {
                    let higher = score + f64::from(by);
                    model.push(Reverse(key(place, higher)));
                    lowest.push(place, higher);
                }
            }
            prop_assert_eq!(lowest.pop(), None);
        }
    }
}
