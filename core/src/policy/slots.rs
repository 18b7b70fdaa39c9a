//! A map by content for decisions, which ask for many components in much the same order each time. The values lie in that order, so that
//! most are found where the one before was, without hashing and without waiting for memory: of a thousand, that was half of a decision.

use std::collections::HashMap;

use super::Candidate;
use super::lowest::Scores;
use crate::ids::ContentId;

/// One is looked for among so many that follow the last, before it is looked for by hashing: those between were evicted or are pinned.
const SKIPPED: usize = 8;
/// One in so many may stand elsewhere than next before the values are put in order again.
const ASTRAY: usize = 8;

/// How far a walk has come.
#[derive(Debug, Default)]
struct Cursor {
    /// After the last that was in order.
    next: usize,
    /// After the last that was astray.
    aside: usize,
}

/// Values by content, without gaps.
#[derive(Debug, Clone)]
pub(super) struct Slots<T> {
    entries: Vec<(ContentId, T)>,
    places: HashMap<ContentId, u32, foldhash::fast::RandomState>,
    /// How many did not come next in this walk.
    astray: usize,
}

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Self {
            entries: Vec::new(),
            places: HashMap::default(),
            astray: 0,
        }
    }
}

impl<T> Slots<T> {
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn get(&self, content: &ContentId) -> Option<&T> {
        let place = self.places.get(content)?;
        self.entries.get(*place as usize).map(|(_, value)| value)
    }

    pub(super) fn get_mut(&mut self, content: &ContentId) -> Option<&mut T> {
        let place = self.places.get(content)?;
        self.entries
            .get_mut(*place as usize)
            .map(|(_, value)| value)
    }

    pub(super) fn get_or_default(&mut self, content: &ContentId) -> &mut T
    where
        T: Default,
    {
        let place = match self.places.get(content) {
            Some(place) => *place as usize,
            None => self.push(*content, T::default()),
        };
        &mut self.entries[place].1
    }

    fn push(&mut self, content: ContentId, value: T) -> usize {
        let place = self.entries.len();
        self.places.insert(content, place as u32);
        self.entries.push((content, value));
        place
    }

    /// Gives what was there before.
    pub(super) fn insert(&mut self, content: ContentId, value: T) -> Option<T> {
        if let Some(known) = self.get_mut(&content) {
            return Some(std::mem::replace(known, value));
        }
        self.push(content, value);
        None
    }

    /// The last takes its place.
    pub(super) fn remove(&mut self, content: &ContentId) -> Option<T> {
        let place = self.places.remove(content)?;
        let (_, value) = self.entries.swap_remove(place as usize);
        if let Some((moved, _)) = self.entries.get(place as usize) {
            self.places.insert(*moved, place);
        }
        Some(value)
    }

    /// Scores each candidate by its value, where there is one; the sooner the more the order is that of walks before. Where too many did
    /// not come next in the one before, the values are put in this order first.
    #[inline(always)]
    pub(super) fn score(
        &mut self,
        scores: &mut Scores<'_>,
        mut score: impl FnMut(&Candidate, Option<&mut T>) -> f64,
    ) {
        let candidates = scores.candidates();
        if self.astray > candidates.len() / ASTRAY {
            self.put_in_order(candidates);
        }
        self.astray = 0;
        let mut at = Cursor::default();
        loop {
            let entries = self.entries.get_mut(at.next..).unwrap_or_default();
            at.next += scores.extend(entries, |candidate, (content, value)| {
                (candidate.content == *content).then(|| score(candidate, Some(value)))
            });
            let [candidate, following @ ..] = scores.rest() else {
                return;
            };
            let place = self.aside(
                &mut at,
                &candidate.content,
                candidates.len(),
                following.first(),
            );
            let entry = place.and_then(|place| self.entries.get_mut(place));
            let score = score(candidate, entry.map(|(_, value)| value));
            scores.extend([()], |_, ()| Some(score));
        }
    }

    fn is_at(&self, place: usize, content: &ContentId) -> bool {
        let entry = self.entries.get(place);
        entry.is_some_and(|(there, _)| there == content)
    }

    /// Where one of so many candidates is that does not come next; `following` comes after it.
    #[cold]
    fn aside(
        &mut self,
        at: &mut Cursor,
        content: &ContentId,
        candidates: usize,
        following: Option<&Candidate>,
    ) -> Option<usize> {
        self.astray += 1;
        let mut ahead = at.next + 1..=at.next + SKIPPED;
        if let Some(place) = ahead.find(|place| self.is_at(*place, content)) {
            at.next = place + 1;
            return Some(place);
        }
        if self.is_at(at.aside, content) {
            // The second in a row there: after a gap that is too wide to look over, the walk goes on behind it.
            let place = at.aside;
            (at.next, at.aside) = (place + 1, at.next);
            return Some(place);
        }
        let place = *self.places.get(content)? as usize;
        at.aside = place + 1;
        let next = at.next;
        let is_next = |following: &Candidate| self.is_at(next, &following.content);
        if (candidates..self.entries.len()).contains(&next) && !following.is_some_and(is_next) {
            // Newcomers come last, behind what was in order, and what stands here seems to be gone: one takes its place, and is in order from
            // now on. Not further ahead, where the next in order would have to make room, and the next after it.
            self.astray -= 1;
            self.swap(next, place);
            at.next += 1;
            return Some(next);
        }
        Some(place)
    }

    fn swap(&mut self, to: usize, from: usize) {
        self.entries.swap(to, from);
        for place in [to, from] {
            self.places.insert(self.entries[place].0, place as u32);
        }
    }

    /// These first.
    fn put_in_order(&mut self, candidates: &[Candidate]) {
        let mut to = 0;
        for Candidate { content, .. } in candidates {
            let Some(place) = self.places.get(content).map(|place| *place as usize) else {
                continue;
            };
            // Else it was named twice.
            if place >= to {
                self.swap(to, place);
                to += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::policy::test_utils::{candidate, content};

    fn walked<T: Copy>(slots: &mut Slots<T>, order: &[Candidate]) -> Vec<Option<T>> {
        let mut found = Vec::new();
        slots.score(&mut Scores::of(order, 0.0), |_, value| {
            found.push(value.copied());
            0.0
        });
        found
    }

    #[test]
    fn the_order_of_walks_is_learned() {
        let mut slots = Slots::default();
        (0..100).for_each(|n| assert_eq!(slots.insert(content(n), n), None));
        let order: Vec<Candidate> = (0..100).rev().map(|n| candidate(n, 1, 0)).collect();
        let walk = |slots: &mut Slots<u8>| {
            let walked = walked(slots, &order);
            assert!(walked.into_iter().eq((0..100).rev().map(Some)));
            slots.astray
        };
        assert!(walk(&mut slots) > 90);
        assert_eq!(walk(&mut slots), 0);
        // After a wide gap the walk goes on as before.
        assert!(walked(&mut slots, &order[50..]).iter().all(Option::is_some));
        assert_eq!(slots.astray, 2);
        // A newcomer is one step aside, and so is what it took the place of.
        slots.remove(&content(50));
        slots.insert(content(50), 50);
        assert!(walk(&mut slots) <= 3);
    }

    #[test]
    fn newcomers_that_come_last_take_the_places_of_what_is_gone() {
        let mut slots = Slots::default();
        (0..200).for_each(|n| assert_eq!(slots.insert(content(n), n), None));
        let mut order: Vec<Candidate> = (0..100).map(|n| candidate(n, 1, 0)).collect();
        walked(&mut slots, &order);
        assert_eq!(slots.astray, 0);
        for round in 0..12 {
            order.remove(round * 5);
            order.push(candidate(150 + round as u8, 1, 0));
            let expected: Vec<_> = order
                .iter()
                .map(|there| slots.get(&there.content).copied())
                .collect();
            assert_eq!(walked(&mut slots, &order), expected);
            // The gaps alone, until there are too many of them.
            assert_eq!(slots.astray, round + 1);
        }
        order.remove(80);
        for gaps in [13, 0] {
            walked(&mut slots, &order);
            assert_eq!(slots.astray, gaps);
        }
    }

    proptest! {
        #[test]
        fn it_is_a_map_however_it_is_walked(
            steps in prop::collection::vec((0_u8..4, 0_u8..40, 0_u8..9), 1..300),
        ) {
            let mut slots = Slots::default();
            let mut model = BTreeMap::new();
            for (number, (what, n, skip)) in steps.into_iter().enumerate() {
                match what {
                    0 | 1 => prop_assert_eq!(slots.insert(content(n), number), model.insert(n, number)),
                    2 => prop_assert_eq!(slots.remove(&content(n)), model.remove(&n)),
                    _ => {
                        // In order with gaps, turned round, and mixed.
                        let at = |n: u8| match n {
                            _ if skip % 3 == 0 => n,
                            _ if skip % 3 == 1 => 39 - n,
                            _ => (u16::from(n) * 7 % 40) as u8,
                        };
                        let walked_over = || (0..40).filter(|n| skip == 0 || n % (skip + 1) != 0).map(at);
                        let order: Vec<Candidate> = walked_over().map(|n| candidate(n, 1, 0)).collect();
                        let expected = walked_over().map(|n| model.get(&n).copied());
                        prop_assert!(walked(&mut slots, &order).into_iter().eq(expected));
                    }
                }
                prop_assert_eq!(slots.get(&content(n)), model.get(&n));
                prop_assert_eq!(slots.get_mut(&content(n)).copied(), model.get(&n).copied());
                prop_assert_eq!(slots.len(), model.len());
            }
        }
    }
}
