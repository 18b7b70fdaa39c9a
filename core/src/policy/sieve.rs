//! SIEVE: a queue in order of admission and a hand that spares what was used since it came by last.
//!
//! Zhang et al., "SIEVE is Simpler than LRU", NSDI 2024, algorithm 1. The hand goes from the oldest to the newest; a
//! visited component loses its mark and is passed over, an unvisited one goes.

use std::collections::HashSet;
use std::time::Duration;

use super::{Candidate, EvictionPolicy, Victim, in_order, unknown};
use crate::ids::ContentId;
use crate::units::Bytes;

/// SIEVE. Components that are in use when memory is short are passed over and keep their mark.
#[derive(Debug, Default, Clone)]
pub struct Sieve {
    /// Oldest first, with the mark of use.
    queue: Vec<(ContentId, bool)>,
    hand: usize,
    /// The candidates of the latest ranking.
    eligible: HashSet<ContentId>,
}

impl Sieve {
    /// Moves the hand to the next victim, and takes it out.
    fn evict(&mut self) -> Option<ContentId> {
        // In two rounds every mark is gone.
        for _ in 0..2 * self.queue.len() + 1 {
            if self.hand >= self.queue.len() {
                self.hand = 0;
            }
            let (content, visited) = self.queue.get_mut(self.hand)?;
            let content = *content;
            if self.eligible.contains(&content) {
                if !*visited {
                    self.queue.remove(self.hand);
                    return Some(content);
                }
                *visited = false;
            }
            self.hand += 1;
        }
        None
    }

    fn forget(&mut self, content: &ContentId) {
        if let Some(place) = self.queue.iter().position(|(queued, _)| queued == content) {
            self.queue.remove(place);
            if place < self.hand {
                self.hand -= 1;
            }
        }
    }
}

impl EvictionPolicy for Sieve {
    fn name(&self) -> &'static str {
        "sieve"
    }

    fn on_request(&mut self, _now: Duration, content: &ContentId, _bytes: Bytes, hit: bool) {
        if hit && let Some((_, visited)) = self.queue.iter_mut().find(|(q, _)| q == content) {
            *visited = true;
            return;
        }
        self.forget(content);
        self.queue.push((*content, false));
    }

    fn on_evict(&mut self, _now: Duration, content: &ContentId) {
        let mut moved = self.clone();
        if moved.evict() == Some(*content) {
            *self = moved;
        } else {
            self.forget(content);
        }
    }

    fn rank(&mut self, _now: Duration, candidates: &[Candidate]) -> Vec<Victim> {
        let known: HashSet<ContentId> = self.queue.iter().map(|(content, _)| *content).collect();
        for candidate in unknown(candidates, &known) {
            self.queue.push((candidate.content, candidate.uses > 1));
        }
        self.eligible = candidates.iter().map(|c| c.content).collect();
        let mut ahead = self.clone();
        let order = std::iter::from_fn(|| ahead.evict());
        in_order(order, "not used since the hand came by")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::test_utils::{
        candidate, check_policy, content, misses_of, order_of, zipf_like,
    };

    #[test]
    fn worked_by_hand() {
        let mut sieve = Sieve::default();
        let now = Duration::ZERO;
        for n in [1, 2, 3, 4] {
            sieve.on_request(now, &content(n), Bytes(1), false);
        }
        for n in [1, 3] {
            sieve.on_request(now, &content(n), Bytes(1), true);
        }
        let all: Vec<_> = (1..=4).map(|n| candidate(n, 1, 0)).collect();
        // 1 is spared, 2 goes; 3 is spared, 4 goes; then the unmarked 1 and 3.
        assert_eq!(order_of(&sieve.rank(now, &all)), [2, 4, 1, 3]);
        // In use, 2 is no candidate: the hand passes it.
        assert_eq!(
            order_of(&sieve.rank(now, &[all[0].clone(), all[2].clone(), all[3].clone()])),
            [4, 1, 3]
        );
        sieve.rank(now, &all);
        sieve.on_evict(now, &content(2));
        // 1 lost its mark for good, and the hand stands at 3.
        sieve.on_request(now, &content(5), Bytes(1), false);
        let left: Vec<_> = [1, 3, 4, 5].map(|n| candidate(n, 1, 0)).to_vec();
        assert_eq!(order_of(&sieve.rank(now, &left)), [4, 5, 1, 3]);
    }

    /// The paper's algorithm as it is printed, on objects of one size.
    fn printed(stream: &[u8], capacity: usize) -> usize {
        let (mut queue, mut hand, mut misses) = (Vec::<(u8, bool)>::new(), 0, 0);
        for x in stream {
            if let Some((_, visited)) = queue.iter_mut().find(|(q, _)| q == x) {
                *visited = true;
                continue;
            }
            misses += 1;
            if queue.len() == capacity {
                loop {
                    if hand >= queue.len() {
                        hand = 0;
                    }
                    if !queue[hand].1 {
                        break;
                    }
                    queue[hand].1 = false;
                    hand += 1;
                }
                queue.remove(hand);
            }
            queue.push((*x, false));
        }
        misses
    }

    #[test]
    fn as_the_paper_has_it() {
        for seed in 0..20 {
            let stream = zipf_like(seed, 600);
            for capacity in [1, 3, 8, 20] {
                let ours = misses_of(&mut Sieve::default(), &stream, capacity);
                assert_eq!(ours, printed(&stream, capacity), "seed {seed}, {capacity}");
            }
        }
    }

    #[test]
    fn it_is_a_policy() {
        check_policy(|| Box::new(Sieve::default()));
    }
}
