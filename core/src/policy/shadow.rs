//! A tier as one policy would have it, as metadata alone: what would be resident, and what loading would have cost.
//!
//! Some of them run on the requests that a tier sees, so that [`super::hotset`] knows which policy would have paid least.

use std::collections::{BTreeSet, HashMap};

use super::Score;
use crate::ids::ContentId;
use crate::units::Bytes;

/// A component as a shadow sees it in a request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked {
    pub(super) content: ContentId,
    pub(super) bytes: Bytes,
    pub(super) restore_s: f64,
}

impl Asked {
    /// What keeping one GB of it is worth for each use.
    pub(super) fn seconds_per_gb(&self) -> f64 {
        self.restore_s / (self.bytes.as_f64().max(1.0) / 1e9)
    }
}

/// What a shadow holds.
#[derive(Debug, Clone, Copy)]
pub(super) struct Held {
    pub(super) asked: Asked,
    pub(super) uses: u64,
    pub(super) score: f64,
    /// The request before which the score need not be found anew.
    pub(super) fresh_until: u64,
    /// Decides between equal scores: not the content id, which is another for the same model on another machine.
    number: u64,
}

/// How a policy scores; the least goes first.
pub(super) trait Scoring {
    /// The score of what was just used, and the request until which it stands.
    fn on_use(&mut self, held: &Held) -> (f64, u64);

    /// The score of what was held for a while, where it falls without being used.
    fn again(&mut self, held: &Held) -> (f64, u64) {
        (held.score, u64::MAX)
    }

    /// Something went.
    fn on_evict(&mut self, _held: &Held) {}
}

/// Scores found anew before an eviction, those longest overdue first: a bound on the work, not on what may go, since
/// what stands lowest is always looked at anew.
const REFRESHED: usize = 16;

/// One policy's tier.
#[derive(Debug, Clone, Default)]
pub(super) struct Shadow {
    used: Bytes,
    held: HashMap<ContentId, Held, foldhash::fast::RandomState>,
    order: BTreeSet<(Score, u64, ContentId)>,
    /// By the request until which the score stands.
    overdue: BTreeSet<(u64, u64, ContentId)>,
    admitted: u64,
}

impl Shadow {
    pub(super) fn get(&self, content: &ContentId) -> Option<&Held> {
        self.held.get(content)
    }

    pub(super) fn held(&self) -> impl Iterator<Item = &Held> {
        self.order
            .iter()
            .filter_map(|(.., content)| self.get(content))
    }

    /// Serves a request, evicting what scores least where there is too little room. Returns the seconds of loading.
    pub(super) fn request(
        &mut self,
        number: u64,
        capacity: Bytes,
        set: &[Asked],
        scoring: &mut impl Scoring,
    ) -> f64 {
        let mut paid_s = 0.0;
        // All hits first: what is asked for together stays together.
        for asked in set {
            if let Some(mut held) = self.take(&asked.content) {
                held.uses += 1;
                held.asked = *asked;
                self.put(held, scoring);
            }
        }
        for asked in set {
            if self.held.contains_key(&asked.content) {
                continue;
            }
            paid_s += asked.restore_s;
            if !self.make_room(number, capacity, asked.bytes, set, scoring) {
                continue;
            }
            let held = Held {
                asked: *asked,
                uses: 1,
                score: 0.0,
                fresh_until: 0,
                number: self.admitted,
            };
            self.admitted += 1;
            self.put(held, scoring);
        }
        // The budget may have shrunk.
        self.make_room(number, capacity, Bytes::ZERO, set, scoring);
        paid_s
    }

    fn take(&mut self, content: &ContentId) -> Option<Held> {
        let held = self.held.remove(content)?;
        self.order
            .remove(&(Score(held.score), held.number, *content));
        self.overdue
            .remove(&(held.fresh_until, held.number, *content));
        self.used = self.used.saturating_sub(held.asked.bytes);
        Some(held)
    }

    fn put(&mut self, mut held: Held, scoring: &mut impl Scoring) {
        (held.score, held.fresh_until) = scoring.on_use(&held);
        self.insert(held);
    }

    fn insert(&mut self, mut held: Held) {
        if !held.score.is_finite() {
            held.score = 0.0;
        }
        let content = held.asked.content;
        self.order.insert((Score(held.score), held.number, content));
        self.overdue
            .insert((held.fresh_until, held.number, content));
        self.used = self.used.saturating_add(held.asked.bytes);
        self.held.insert(content, held);
    }

    fn refresh(&mut self, content: &ContentId, scoring: &mut impl Scoring) {
        if let Some(mut held) = self.take(content) {
            (held.score, held.fresh_until) = scoring.again(&held);
            self.insert(held);
        }
    }

    fn make_room(
        &mut self,
        number: u64,
        capacity: Bytes,
        bytes: Bytes,
        pinned: &[Asked],
        scoring: &mut impl Scoring,
    ) -> bool {
        if self.used.saturating_add(bytes) <= capacity {
            return true;
        }
        let is_pinned = |content: &ContentId| pinned.iter().any(|p| p.content == *content);
        let fixed: Bytes = pinned
            .iter()
            .filter_map(|p| self.held.get(&p.content))
            .map(|held| held.asked.bytes)
            .sum();
        if fixed.saturating_add(bytes) > capacity {
            return false;
        }
        for _ in 0..REFRESHED {
            match self.overdue.first().copied() {
                Some((due, _, content)) if due <= number => self.refresh(&content, scoring),
                _ => break,
            }
        }
        while self.used.saturating_add(bytes) > capacity {
            let lowest = self.order.iter().find(|(.., content)| !is_pinned(content));
            let Some((.., content)) = lowest.copied() else {
                return false;
            };
            if self
                .held
                .get(&content)
                .is_some_and(|held| held.fresh_until <= number)
            {
                self.refresh(&content, scoring);
                continue;
            }
            if let Some(gone) = self.take(&content) {
                scoring.on_evict(&gone);
            }
        }
        true
    }
}
