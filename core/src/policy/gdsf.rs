//! Greedy-Dual-Size-Frequency: what gives least for its bytes goes first.
//!
//! Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy", HP Labs 1998; the
//! same as FaasCache's keep-alive priority (Fuerst and Sharma, ASPLOS 2021, section 4.1). Each component has the priority
//! `clock + uses * cost / size` as of its last use; the clock rises to the priority of what is evicted, so that what is
//! not used falls behind. Uses count from admission, as in both papers.

use std::time::Duration;

use super::lowest::Scores;
use super::memory::Memory;
use super::shadow::Held;
use super::{Candidate, EvictionPolicy, Victim, by_score};
use crate::ids::ContentId;
use crate::units::Bytes;

#[derive(Debug, Clone, Copy)]
struct Entry {
    /// The clock at the last use.
    clock: f64,
    uses: f64,
}

/// Greedy-Dual-Size-Frequency with the restore time as cost, per GB.
#[derive(Debug, Default, Clone)]
pub struct Gdsf {
    clock: f64,
    entries: Memory<Entry>,
    /// Priorities of the latest ranking, from which the clock is set when one of them goes.
    ranked: Vec<(ContentId, f64)>,
}

impl Gdsf {
    /// One that goes on from the books of a shadow under GDSF.
    pub(super) fn after<'a>(clock: f64, held: impl Iterator<Item = &'a Held>) -> Self {
        let mut entries = Memory::default();
        for held in held {
            let uses = held.uses as f64;
            let entry = Entry {
                clock: held.score - uses * held.asked.seconds_per_gb(),
                uses,
            };
            entries.put(held.asked.content, entry);
        }
        Self {
            clock,
            entries,
            ranked: Vec::new(),
        }
    }

    /// Scores all candidates by what restoring them costs now.
    pub(super) fn score(&mut self, scores: &mut Scores<'_>) {
        let clock = self.clock;
        let mut unknown = Vec::new();
        self.entries.score(scores, |candidate, known| {
            let entry = known.copied().unwrap_or_else(|| {
                // Of what was used before these books began nothing is known but its uses; it ages from here on.
                let uses = candidate.uses as f64;
                let entry = Entry { clock, uses };
                unknown.push((candidate.content, entry));
                entry
            });
            entry.clock + entry.uses * candidate.restore_s * 1e9 / candidate.size()
        });
        for (content, entry) in unknown {
            self.entries.put(content, entry);
        }
    }

    /// These were chosen: the clock rises as they go.
    pub(super) fn chose(&mut self, victims: &[Victim]) {
        self.ranked = victims.iter().map(|v| (v.content, v.score)).collect();
    }
}

impl EvictionPolicy for Gdsf {
    fn name(&self) -> &'static str {
        "gdsf"
    }

    fn on_request(&mut self, _now: Duration, content: &ContentId, _bytes: Bytes, hit: bool) {
        let before = self.entries.get(content).filter(|_| hit);
        let entry = Entry {
            clock: self.clock,
            uses: before.map_or(0.0, |entry| entry.uses) + 1.0,
        };
        self.entries.put(*content, entry);
    }

    fn on_evict(&mut self, _now: Duration, content: &ContentId) {
        if let Some((_, priority)) = self.ranked.iter().find(|(ranked, _)| ranked == content) {
            self.clock = self.clock.max(*priority);
        }
        self.entries.remove(content);
    }

    fn rank(&mut self, _now: Duration, candidates: &[Candidate]) -> Vec<Victim> {
        let mut scores = Scores::of(candidates, f64::NEG_INFINITY);
        self.score(&mut scores);
        // One for each, in their order.
        let mut scores = scores.iter();
        let ranked = by_score(candidates, |c| {
            let priority = scores.next().unwrap_or_default();
            let uses = self.entries.get(&c.content).map_or(0.0, |entry| entry.uses);
            (
                priority,
                format!("least worth its bytes: {uses} uses, priority {priority:.3}"),
            )
        });
        self.chose(&ranked);
        ranked
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::test_utils::{candidate, check_policy, order_of};

    #[test]
    fn worked_by_hand() {
        let gb = 1_000_000_000;
        let mut gdsf = Gdsf::default();
        // Restore takes one second each: 1/1, 1/2, 2/4 uses for each GB.
        let candidates = [
            candidate(1, gb, 0),
            candidate(2, 2 * gb, 0),
            candidate(3, 5 * gb, 0),
        ];
        let now = Duration::ZERO;
        for (i, times) in [(0, 1), (1, 1), (2, 2)] {
            for time in 0..times {
                gdsf.on_request(now, &candidates[i].content, candidates[i].bytes, time > 0);
            }
        }
        let ranked = gdsf.rank(now, &candidates);
        assert_eq!(order_of(&ranked), [3, 2, 1]);
        assert!((ranked[0].score - 0.4).abs() < 1e-9);
        // The clock rises to 0.4: used once now, 3 stands at 0.4 + 0.2, ahead of 2 at 0.5.
        gdsf.on_evict(now, &candidates[2].content);
        gdsf.on_request(now, &candidates[2].content, candidates[2].bytes, false);
        let ranked = gdsf.rank(now, &candidates);
        assert_eq!(order_of(&ranked), [2, 3, 1]);
        assert!((ranked[1].score - 0.6).abs() < 1e-9);
    }

    #[test]
    fn what_was_there_before_its_books_ages_from_the_first_decision_on() {
        let gb = 1_000_000_000;
        let [old, large, new] = [
            candidate(1, gb, 0),
            candidate(2, 2 * gb, 0),
            candidate(3, gb, 0),
        ];
        let (mut gdsf, now) = (Gdsf::default(), Duration::ZERO);
        gdsf.on_request(now, &large.content, large.bytes, false);
        assert_eq!(
            order_of(&gdsf.rank(now, &[old.clone(), large.clone()])),
            [2, 1]
        );
        gdsf.on_evict(now, &large.content);
        gdsf.on_request(now, &new.content, new.bytes, false);
        let ranked = gdsf.rank(now, &[old, new]);
        assert_eq!(order_of(&ranked), [1, 3]);
        assert!((ranked[0].score - 1.0).abs() < 1e-9, "{ranked:?}");
    }

    #[test]
    fn it_is_a_policy() {
        check_policy(|| Box::new(Gdsf::default()));
    }
}
