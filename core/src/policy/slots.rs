//! A map by content for decisions, which ask for many components in much the same order each time. The values lie in that order, so that
//! most are found where the one before was, without hashing and without waiting for memory: of a thousand, that was half of a decision.

use std::collections::HashMap;

use super::Candidate;
use crate::ids::ContentId;

/// One is looked for among so many that follow the last, before it is looked for by hashing: those between were evicted or are pinned.
const SKIPPED: usize = 8;
/// One in so many may stand elsewhere than next before the values are put in order again.
const ASTRAY: usize = 8;

/// How far a walk has come. Its owner has it at hand: kept with the values, each step would wait until the one before is written.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Cursor {
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

    /// A walk over these begins. Where too many did not come next in the one before, the values are put in this order first.
    pub(super) fn rewind(&mut self, candidates: &[Candidate]) -> Cursor {
        if self.astray > candidates.len() / ASTRAY {
            self.put_in_order(candidates);
        }
        self.astray = 0;
        Cursor::default()
    }

    /// As [`Self::get_mut`], the sooner the more the order is that of walks before.
    #[inline]
    pub(super) fn walk(&mut self, at: &mut Cursor, content: &ContentId) -> Option<&mut T> {
        let mut place = at.next;
        if self.is_at(place, content) {
            at.next += 1;
        } else {
            (place, *at) = self.aside(*at, content)?;
        }
        self.entries.get_mut(place).map(|(_, value)| value)
    }

    #[inline]
    fn is_at(&self, place: usize, content: &ContentId) -> bool {
        let entry = self.entries.get(place);
        entry.is_some_and(|(there, _)| there == content)
    }

    /// Where one is that does not come next, and how far the walk has come then.
    #[cold]
    fn aside(&mut self, at: Cursor, content: &ContentId) -> Option<(usize, Cursor)> {
        self.astray += 1;
        let mut ahead = at.next + 1..=at.next + SKIPPED;
        if let Some(place) = ahead.find(|place| self.is_at(*place, content)) {
            let next = place + 1;
            return Some((place, Cursor { next, ..at }));
        }
        if self.is_at(at.aside, content) {
            // The second in a row there: after a gap that is too wide to look over, the walk goes on behind it.
            let (next, aside) = (at.aside + 1, at.next);
            return Some((at.aside, Cursor { next, aside }));
        }
        let place = *self.places.get(content)? as usize;
        let aside = place + 1;
        Some((place, Cursor { aside, ..at }))
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
                self.entries.swap(to, place);
                self.places.insert(self.entries[place].0, place as u32);
                self.places.insert(*content, to as u32);
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

    #[test]
    fn the_order_of_walks_is_learned() {
        let mut slots = Slots::default();
        (0..100).for_each(|n| assert_eq!(slots.insert(content(n), n), None));
        let order: Vec<Candidate> = (0..100).rev().map(|n| candidate(n, 1, 0)).collect();
        let walk = |slots: &mut Slots<u8>| {
            let mut at = slots.rewind(&order);
            for (there, n) in order.iter().zip((0..100).rev()) {
                assert_eq!(slots.walk(&mut at, &there.content).copied(), Some(n));
            }
            slots.astray
        };
        assert!(walk(&mut slots) > 90);
        assert_eq!(walk(&mut slots), 0);
        // After a wide gap the walk goes on as before.
        let rest = &order[50..];
        let mut at = slots.rewind(rest);
        for there in rest {
            assert!(slots.walk(&mut at, &there.content).is_some());
        }
        assert_eq!((slots.astray, at.next), (2, 100));
        // A newcomer is one step aside, and so is what it took the place of.
        slots.remove(&content(50));
        slots.insert(content(50), 50);
        assert!(walk(&mut slots) <= 3);
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
                        let walked = || (0..40).filter(|n| skip == 0 || n % (skip + 1) != 0);
                        let order: Vec<Candidate> = walked().map(|n| candidate(n, 1, 0)).collect();
                        let mut at = slots.rewind(&order);
                        for (there, n) in order.iter().zip(walked()) {
                            prop_assert_eq!(slots.walk(&mut at, &there.content).copied(), model.get(&n).copied());
                        }
                    }
                }
                prop_assert_eq!(slots.get(&content(n)), model.get(&n));
                prop_assert_eq!(slots.get_mut(&content(n)).copied(), model.get(&n).copied());
                prop_assert_eq!(slots.len(), model.len());
            }
        }
    }
}
