//! The lowest of many, one after the other, without sorting them all: mostly a handful are asked for.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// So many are sorted at a time.
const CHUNK: usize = 32;

/// Keys that are taken from the lowest up.
#[derive(Debug)]
pub(super) struct Lowest<K> {
    /// None of these is below `bar`.
    rest: Vec<K>,
    near: BinaryHeap<Reverse<K>>,
    bar: Option<K>,
}

impl<K: Ord + Copy> Lowest<K> {
    pub(super) fn new(all: Vec<K>) -> Self {
        Self {
            rest: all,
            near: BinaryHeap::with_capacity(CHUNK + 1),
            bar: None,
        }
    }

    /// Puts one back, with another key perhaps.
    pub(super) fn push(&mut self, key: K) {
        self.near.push(Reverse(key));
    }

    /// Takes the lowest.
    pub(super) fn pop(&mut self) -> Option<K> {
        while !self.rest.is_empty() {
            let bar = self.bar;
            if self
                .near
                .peek()
                .is_some_and(|Reverse(key)| bar.is_some_and(|bar| *key <= bar))
            {
                break;
            }
            self.come_near();
        }
        self.near.pop().map(|Reverse(key)| key)
    }

    fn come_near(&mut self) {
        let from = self.rest.len().saturating_sub(CHUNK);
        if from > 0 {
            // The lowest at the end, where they are cheap to take off.
            self.rest.select_nth_unstable_by(from, |a, b| b.cmp(a));
        }
        for key in self.rest.drain(from..) {
            self.bar = self.bar.max(Some(key));
            self.near.push(Reverse(key));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn they_come_in_order_also_where_some_are_put_back(
            keys in prop::collection::vec(0_u32..500, 0..300),
            raised in prop::collection::vec(0_u32..200, 0..300),
        ) {
            let mut lowest = Lowest::new(keys.clone());
            let mut model: BinaryHeap<_> = keys.into_iter().map(Reverse).collect();
            let mut raised = raised.into_iter();
            while let Some(Reverse(expected)) = model.pop() {
                prop_assert_eq!(lowest.pop(), Some(expected));
                if let Some(by) = raised.next() {
                    model.push(Reverse(expected + by));
                    lowest.push(expected + by);
                }
            }
            prop_assert_eq!(lowest.pop(), None);
        }
    }
}
