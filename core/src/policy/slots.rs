//! A map by content for decisions, which ask for many components in much the same order each time. The values lie in that order, so that
//! most are found where the one before was, without hashing and without waiting for memory: of a thousand, that was half of a decision.

use std::collections::HashMap;

use crate::ids::ContentId;

/// Of so many that follow the last, one found by hashing is taken for the next: those between were evicted or are pinned.
const SKIPPED: usize = 8;
/// One in so many may have been found elsewhere before the values are put in order again.
const ASTRAY: usize = 8;

/// Values by content, without gaps.
#[derive(Debug, Clone)]
pub(super) struct Slots<T> {
    contents: Vec<ContentId>,
    values: Vec<T>,
    places: HashMap<ContentId, u32, foldhash::fast::RandomState>,
    /// Where the next one is looked for first: after the last, and after the last that was astray.
    next: [usize; 2],
    /// What was walked, where the values are to be put in that order.
    walked: Option<Vec<ContentId>>,
    /// Values found in this walk, and how many of them by hashing.
    found: usize,
    astray: usize,
}

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Self {
            contents: Vec::new(),
            values: Vec::new(),
            places: HashMap::default(),
            next: [0; 2],
            walked: None,
            found: 0,
            astray: 0,
        }
    }
}

impl<T> Slots<T> {
    pub(super) fn len(&self) -> usize {
        self.values.len()
    }

    pub(super) fn get(&self, content: &ContentId) -> Option<&T> {
        let place = self.places.get(content)?;
        self.values.get(*place as usize)
    }

    pub(super) fn get_mut(&mut self, content: &ContentId) -> Option<&mut T> {
        let place = self.places.get(content)?;
        self.values.get_mut(*place as usize)
    }

    pub(super) fn get_or_default(&mut self, content: &ContentId) -> &mut T
    where
        T: Default,
    {
        let place = match self.places.get(content) {
            Some(place) => *place as usize,
            None => self.push(*content, T::default()),
        };
        &mut self.values[place]
    }

    fn push(&mut self, content: ContentId, value: T) -> usize {
        let place = self.values.len();
        self.places.insert(content, place as u32);
        self.contents.push(content);
        self.values.push(value);
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
        self.contents.swap_remove(place as usize);
        if let Some(moved) = self.contents.get(place as usize) {
            self.places.insert(*moved, place);
        }
        Some(self.values.swap_remove(place as usize))
    }

    /// A walk begins. Nothing is learned from one in which nothing was found.
    pub(super) fn rewind(&mut self) {
        if self.found == 0 {
            return;
        }
        let strayed = self.astray > self.found / ASTRAY;
        match self.walked.take() {
            Some(walked) if strayed => self.put_in_order(&walked),
            None if strayed => self.walked = Some(Vec::with_capacity(self.found)),
            _ => {}
        }
        (self.found, self.astray) = (0, 0);
        self.next = [0; 2];
    }

    /// As [`Self::get_mut`], the sooner the more the order is that of walks before.
    #[inline]
    pub(super) fn walk(&mut self, content: &ContentId) -> Option<&mut T> {
        let is_there = |place: &usize| self.contents.get(*place) == Some(content);
        let place = match self.next.iter().position(is_there) {
            Some(which) => {
                self.next[which] += 1;
                self.next[which] - 1
            }
            None => self.stray(content)?,
        };
        self.found += 1;
        if let Some(walked) = &mut self.walked {
            walked.push(*content);
        }
        self.values.get_mut(place)
    }

    fn stray(&mut self, content: &ContentId) -> Option<usize> {
        let place = *self.places.get(content)? as usize;
        self.astray += 1;
        // What lies between may have been evicted or be pinned.
        let skips = (self.next[0]..self.next[0] + SKIPPED).contains(&place);
        self.next[usize::from(!skips)] = place + 1;
        Some(place)
    }

    /// Those walked first, in that order.
    fn put_in_order(&mut self, walked: &[ContentId]) {
        let mut to = 0;
        for content in walked {
            let Some(place) = self.places.get(content).map(|place| *place as usize) else {
                continue;
            };
            // Else it was walked twice.
            if place >= to {
                self.contents.swap(to, place);
                self.values.swap(to, place);
                self.places.insert(self.contents[place], place as u32);
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
    use crate::policy::test_utils::content;

    #[test]
    fn the_order_of_walks_is_learned() {
        let mut slots = Slots::default();
        (0..100).for_each(|n| assert_eq!(slots.insert(content(n), n), None));
        let walk = |slots: &mut Slots<u8>| {
            // Nothing is walked between two of these.
            slots.rewind();
            slots.rewind();
            for n in (0..100).rev() {
                assert_eq!(slots.walk(&content(n)).copied(), Some(n));
            }
            slots.astray
        };
        assert!(walk(&mut slots) > 90);
        // The next one is written down, and the one after it finds that order.
        walk(&mut slots);
        assert_eq!(walk(&mut slots), 0);
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
                        slots.rewind();
                        for n in (0..40).filter(|n| skip == 0 || n % (skip + 1) != 0) {
                            prop_assert_eq!(slots.walk(&content(n)).copied(), model.get(&n).copied());
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
