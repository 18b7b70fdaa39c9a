//! GDSF in a tier whose restore costs another tier changes.
//!
//! What RAM has is soon on a GPU again, and what of that goes differs from one moment to the next. GDSF weighs it by what it costs now, and so
//! keeps other things than its shadow does, which knows whole costs alone: in the order of the shadow's scores a GPU paid up to a fifth more than
//! under GDSF itself. So where GDSF is followed there it goes on from the shadow's books with its own.

use crate::ids::ContentId;
use crate::policy::Candidate;
use crate::policy::memory::Memory;
use crate::policy::shadow::Held;

/// GDSF's books of the real tier: see [`crate::policy::gdsf`].
#[derive(Debug, Clone)]
pub(super) struct Following {
    clock: f64,
    entries: Memory<Entry>,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    /// The clock at the last use.
    clock: f64,
    uses: f64,
}

impl Following {
    /// Goes on from where the shadow stands.
    pub(super) fn from_shadow<'a>(clock: f64, held: impl Iterator<Item = &'a Held>) -> Self {
        let mut entries = Memory::default();
        for held in held {
            let uses = held.uses as f64;
            let entry = Entry {
                clock: held.score - uses * held.asked.seconds_per_gb(),
                uses,
            };
            entries.put(held.asked.content, entry);
        }
        Self { clock, entries }
    }

    /// It was asked for. What the shadow held and the tier did not goes on with the shadow's count: measured better than from one.
    pub(super) fn on_request(&mut self, content: &ContentId) {
        let uses = self.entries.get(content).map_or(0.0, |entry| entry.uses);
        let entry = Entry {
            clock: self.clock,
            uses: uses + 1.0,
        };
        self.entries.put(*content, entry);
    }

    /// It went.
    pub(super) fn on_evict(&mut self, content: &ContentId) {
        self.entries.remove(content);
    }

    /// The clock rises to the priority of what is to go.
    pub(super) fn rise(&mut self, priority: f64) {
        self.clock = self.clock.max(priority);
    }

    /// What keeping it is worth; nothing where the shadow had not kept it before.
    pub(super) fn priority(&self, candidate: &Candidate) -> f64 {
        self.entries.get(&candidate.content).map_or(0.0, |entry| {
            let gb = candidate.bytes.as_f64().max(1.0) / 1e9;
            entry.clock + entry.uses * candidate.restore_s / gb
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::policy::gdsf::Gdsf;
    use crate::policy::test_utils::candidate;
    use crate::policy::{EvictionPolicy, Victim};

    /// From empty books it is GDSF, whatever costs do.
    #[test]
    fn it_is_gdsf() {
        let mut gdsf = Gdsf::default();
        let mut following = Following::from_shadow(0.0, std::iter::empty());
        let mut resident: Vec<Candidate> = Vec::new();
        let mut evicted = 0;
        for number in 0..2_000_u64 {
            let now = Duration::from_secs(number);
            // Some are popular, and each costs less every other time.
            let asked = (number * number % 97 % 23) as u8;
            let at = resident
                .iter()
                .position(|c| c.content == candidate(asked, 1, 0).content);
            if at.is_none() && resident.len() == 8 {
                for (place, held) in resident.iter_mut().enumerate() {
                    let restored = (number + place as u64).is_multiple_of(3);
                    held.restore_s = if restored { 0.05 } else { held.whole_s };
                }
                let ranked = gdsf.rank(now, &resident);
                let Victim { content, score, .. } = &ranked[0];
                let least = |c: &&Candidate| following.priority(c);
                let lowest = resident.iter().map(|c| least(&c)).fold(f64::MAX, f64::min);
                assert!((lowest - score).abs() < 1e-9, "{lowest} {score}");
                following.rise(*score);
                let gone = *content;
                resident.retain(|c| c.content != gone);
                gdsf.on_evict(now, &gone);
                following.on_evict(&gone);
                evicted += 1;
            }
            let content = candidate(asked, 1, 0).content;
            gdsf.on_request(now, &content, crate::units::Bytes(1), at.is_some());
            following.on_request(&content);
            if at.is_none() {
                let bytes = 1_000_000_000 * (u64::from(asked) % 5 + 1);
                resident.push(candidate(asked, bytes, number));
            }
        }
        assert!(evicted > 500, "{evicted}");
    }
}
