//! S3-FIFO: a small queue for what is new, a main queue for what proved itself, a ghost queue of what left the small one.
//!
//! Yang et al., "FIFO Queues are All You Need for Cache Eviction", SOSP 2023, algorithm 1. The small queue has a tenth of
//! the memory; as a policy here is not told the budget, it is a tenth of what is resident, which is the same when
//! memory is full.

use std::collections::{HashSet, VecDeque};
use std::time::Duration;

use super::{Candidate, EvictionPolicy, Victim, in_order, unknown};
use crate::ids::ContentId;
use crate::units::Bytes;

/// Share of the memory that the small queue has.
const SMALL_SHARE: f64 = 0.1;
/// Uses are counted up to this.
const MAX_FREQUENCY: u8 = 3;

#[derive(Debug, Clone, Copy)]
struct Entry {
    content: ContentId,
    bytes: Bytes,
    frequency: u8,
}

/// S3-FIFO. Components that are in use when memory is short are passed over.
#[derive(Debug, Default, Clone)]
pub struct S3Fifo {
    /// Oldest first, as the others.
    small: VecDeque<Entry>,
    main: VecDeque<Entry>,
    ghost: VecDeque<ContentId>,
    /// The candidates of the latest ranking.
    eligible: HashSet<ContentId>,
}

fn bytes_of(queue: &VecDeque<Entry>) -> f64 {
    queue.iter().map(|entry| entry.bytes.as_f64()).sum()
}

impl S3Fifo {
    fn first_eligible(&self, queue: &VecDeque<Entry>) -> Option<usize> {
        queue
            .iter()
            .position(|entry| self.eligible.contains(&entry.content))
    }

    fn evict(&mut self) -> Option<ContentId> {
        loop {
            let small_bytes = bytes_of(&self.small);
            let total = small_bytes + bytes_of(&self.main);
            let (in_small, in_main) = (
                self.first_eligible(&self.small),
                self.first_eligible(&self.main),
            );
            // A queue whose components are all in use gives way to the other.
            if let Some(place) =
                in_small.filter(|_| small_bytes >= SMALL_SHARE * total || in_main.is_none())
            {
                let mut entry = self.small.remove(place)?;
                if entry.frequency > 1 {
                    entry.frequency = 0;
                    self.main.push_back(entry);
                    continue;
                }
                self.ghost.push_back(entry.content);
                self.bound_ghost();
                return Some(entry.content);
            }
            let mut entry = self.main.remove(in_main?)?;
            if entry.frequency == 0 {
                return Some(entry.content);
            }
            entry.frequency -= 1;
            self.main.push_back(entry);
        }
    }

    /// The ghost queue holds as many as the main queue.
    fn bound_ghost(&mut self) {
        while self.ghost.len() > self.main.len().max(1) {
            self.ghost.pop_front();
        }
    }

    fn forget(&mut self, content: &ContentId) {
        self.small.retain(|entry| entry.content != *content);
        self.main.retain(|entry| entry.content != *content);
    }
}

impl EvictionPolicy for S3Fifo {
    fn name(&self) -> &'static str {
        "s3-fifo"
    }

    fn on_request(&mut self, _now: Duration, content: &ContentId, bytes: Bytes, hit: bool) {
        let mut queued = self.small.iter_mut().chain(&mut self.main);
        if hit && let Some(entry) = queued.find(|entry| entry.content == *content) {
            entry.frequency = (entry.frequency + 1).min(MAX_FREQUENCY);
            return;
        }
        self.forget(content);
        let entry = Entry {
            content: *content,
            bytes,
            frequency: 0,
        };
        if let Some(place) = self.ghost.iter().position(|ghost| ghost == content) {
            self.ghost.remove(place);
            self.main.push_back(entry);
        } else {
            self.small.push_back(entry);
        }
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
        let known: HashSet<ContentId> = self
            .small
            .iter()
            .chain(&self.main)
            .map(|entry| entry.content)
            .collect();
        for candidate in unknown(candidates, &known) {
            self.small.push_back(Entry {
                content: candidate.content,
                bytes: candidate.bytes,
                frequency: u8::try_from(candidate.uses.saturating_sub(1))
                    .map_or(MAX_FREQUENCY, |uses| uses.min(MAX_FREQUENCY)),
            });
        }
        self.eligible = candidates.iter().map(|c| c.content).collect();
        let mut ahead = self.clone();
        let order = std::iter::from_fn(|| ahead.evict());
        in_order(order, "first out of its queue without enough uses")
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
        let mut policy = S3Fifo::default();
        let now = Duration::ZERO;
        for n in [1, 2, 3] {
            policy.on_request(now, &content(n), Bytes(1), false);
        }
        // 1 is used twice more, 2 once: only 1 moves to the main queue.
        for n in [1, 1, 2] {
            policy.on_request(now, &content(n), Bytes(1), true);
        }
        let all: Vec<_> = (1..=3).map(|n| candidate(n, 1, 0)).collect();
        assert_eq!(order_of(&policy.rank(now, &all)), [2, 3, 1]);
        policy.on_evict(now, &content(2));
        // 2 is a ghost: it comes back to the main queue, behind 1.
        policy.on_request(now, &content(2), Bytes(1), false);
        assert_eq!(policy.main.len(), 2);
        assert_eq!(order_of(&policy.rank(now, &all)), [3, 1, 2]);
    }

    /// The paper's algorithm as it is printed, on objects of one size.
    fn printed(stream: &[u8], capacity: usize) -> usize {
        let mut small = VecDeque::<(u8, u8)>::new();
        let mut main = VecDeque::<(u8, u8)>::new();
        let mut ghost = VecDeque::<u8>::new();
        let mut misses = 0;
        for x in stream {
            if let Some(hit) = small.iter_mut().chain(&mut main).find(|(q, _)| q == x) {
                hit.1 = (hit.1 + 1).min(3);
                continue;
            }
            misses += 1;
            while small.len() + main.len() >= capacity {
                let evict_small = small.len() as f64 >= 0.1 * (small.len() + main.len()) as f64;
                if evict_small && !small.is_empty() {
                    let (t, frequency) = small.pop_front().unwrap();
                    if frequency > 1 {
                        main.push_back((t, 0));
                    } else {
                        ghost.push_back(t);
                        while ghost.len() > main.len().max(1) {
                            ghost.pop_front();
                        }
                    }
                } else {
                    let (t, frequency) = main.pop_front().unwrap();
                    if frequency > 0 {
                        main.push_back((t, frequency - 1));
                    }
                }
            }
            if let Some(place) = ghost.iter().position(|g| g == x) {
                ghost.remove(place);
                main.push_back((*x, 0));
            } else {
                small.push_back((*x, 0));
            }
        }
        misses
    }

    #[test]
    fn as_the_paper_has_it() {
        for seed in 0..20 {
            let stream = zipf_like(seed, 600);
            for capacity in [1, 3, 8, 20] {
                let ours = misses_of(&mut S3Fifo::default(), &stream, capacity);
                assert_eq!(ours, printed(&stream, capacity), "seed {seed}, {capacity}");
            }
        }
    }

    #[test]
    fn it_is_a_policy() {
        check_policy(|| Box::new(S3Fifo::default()));
    }
}
