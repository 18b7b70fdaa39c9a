//! One tier as metadata: what is resident, and what goes when room is needed.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::ids::ContentId;
use crate::policy::{Candidate, EvictionPolicy, select};
use crate::predict::{Observed, PrefetchScore};
use crate::units::Bytes;

/// A component that a request needs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    pub(super) content: ContentId,
    pub(super) bytes: Bytes,
    pub(super) restore_s: f64,
}

/// A tier with its policy.
pub(super) struct SimulatedTier {
    capacity: Bytes,
    used: Bytes,
    residents: BTreeMap<ContentId, Candidate>,
    policy: Box<dyn EvictionPolicy>,
}

impl SimulatedTier {
    pub(super) fn new(capacity: Bytes, mut policy: Box<dyn EvictionPolicy>) -> Self {
        policy.on_capacity(capacity);
        Self {
            capacity,
            used: Bytes::ZERO,
            residents: BTreeMap::new(),
            policy,
        }
    }

    pub(super) fn policy_name(&self) -> &'static str {
        self.policy.name()
    }

    pub(super) fn has(&self, content: &ContentId) -> bool {
        self.residents.contains_key(content)
    }

    /// Sets anew what restoring each resident would cost.
    pub(super) fn price(&mut self, cost: impl Fn(&ContentId, Bytes, f64) -> f64) {
        for (content, candidate) in &mut self.residents {
            candidate.restore_s = cost(content, candidate.bytes, candidate.whole_s);
        }
    }

    /// Says of each resident whether it is in the tier above as well.
    pub(super) fn mark_above(&mut self, has: impl Fn(&ContentId) -> bool) {
        for (content, resident) in &mut self.residents {
            resident.above = has(content);
        }
    }

    /// Makes the whole set resident; returns the places of those that were not.
    pub(super) fn request(
        &mut self,
        now: Duration,
        request: &Observed<'_>,
        set: &[Wanted],
    ) -> Vec<usize> {
        let all: Vec<usize> = (0..set.len()).collect();
        self.request_some(now, request, set, &all)
    }

    /// Only `needed` of the set are read through this tier. All that are needed are pinned together; one for which there is no room beside them is passed through.
    pub(super) fn request_some(
        &mut self,
        now: Duration,
        request: &Observed<'_>,
        set: &[Wanted],
        needed: &[usize],
    ) -> Vec<usize> {
        for at in needed {
            self.policy.on_cost(&set[*at].content, set[*at].restore_s);
        }
        self.policy.observe(now, request);
        while let Some(study) = self.policy.study() {
            self.policy.studied(study.run());
        }
        let (hits, misses): (Vec<usize>, Vec<usize>) =
            needed.iter().partition(|at| self.has(&set[**at].content));
        for at in hits {
            let wanted = &set[at];
            if let Some(resident) = self.residents.get_mut(&wanted.content) {
                resident.last_used = now;
                resident.uses += 1;
                resident.prefetched = false;
            }
            self.policy
                .on_request(now, &wanted.content, wanted.bytes, true);
        }
        for at in &misses {
            let wanted = &set[*at];
            if self.make_room(now, wanted.bytes, set) {
                self.policy
                    .on_request(now, &wanted.content, wanted.bytes, false);
                self.admit(now, wanted);
            }
        }
        misses
    }

    /// What the policy would load now that the link is idle; room has been made for it.
    pub(super) fn prefetch(&mut self, now: Duration) -> Option<(ContentId, Bytes)> {
        let free = self.capacity.saturating_sub(self.used);
        let residents: Vec<Candidate> = self.residents.values().cloned().collect();
        let prefetch = self.policy.prefetch(now, &residents, free)?;
        for victim in &prefetch.victims {
            self.evict(now, &victim.content);
        }
        let fits = self.used.saturating_add(prefetch.bytes) <= self.capacity;
        (fits && !self.has(&prefetch.content)).then_some((prefetch.content, prefetch.bytes))
    }

    /// A prefetch has landed.
    pub(super) fn land(&mut self, now: Duration, wanted: &Wanted) {
        self.admit(now, wanted);
        if let Some(resident) = self.residents.get_mut(&wanted.content) {
            resident.prefetched = true;
            resident.uses = 0;
        }
    }

    /// A prefetch was cancelled.
    pub(super) fn cancelled(&mut self, content: &ContentId, delay_s: f64) {
        self.policy.on_prefetch_cancelled(content, delay_s);
    }

    pub(super) fn prefetch_score(&self) -> Option<PrefetchScore> {
        self.policy.prefetch_score()
    }

    fn evict(&mut self, now: Duration, content: &ContentId) {
        if let Some(gone) = self.residents.remove(content) {
            self.used = self.used.saturating_sub(gone.bytes);
            self.policy.on_evict(now, content);
        }
    }

    fn admit(&mut self, now: Duration, wanted: &Wanted) {
        self.used += wanted.bytes;
        let candidate = Candidate {
            content: wanted.content,
            bytes: wanted.bytes,
            admitted: now,
            last_used: now,
            uses: 1,
            restore_s: wanted.restore_s,
            whole_s: wanted.restore_s,
            prefetched: false,
            above: false,
        };
        self.residents.insert(wanted.content, candidate);
    }

    /// Evicts what the policy names until there is room; nothing where that would not do.
    fn make_room(&mut self, now: Duration, bytes: Bytes, pinned: &[Wanted]) -> bool {
        let max_residents = self.policy.max_residents().unwrap_or(usize::MAX);
        let capacity = self.capacity;
        let fits = |used: Bytes, count: usize| {
            used.saturating_add(bytes) <= capacity && count < max_residents
        };
        if fits(self.used, self.residents.len()) {
            return true;
        }
        let candidates: Vec<Candidate> = self
            .residents
            .values()
            .filter(|r| pinned.iter().all(|p| p.content != r.content))
            .cloned()
            .collect();
        let evictable: Bytes = candidates.iter().map(|c| c.bytes).sum();
        if !fits(
            self.used - evictable,
            self.residents.len() - candidates.len(),
        ) {
            return false;
        }
        let needed = self
            .used
            .saturating_add(bytes)
            .saturating_sub(self.capacity);
        let victims = if self.residents.len() >= max_residents {
            self.policy.rank(now, &candidates)
        } else {
            select(self.policy.as_mut(), now, &candidates, needed)
        };
        for victim in victims {
            if fits(self.used, self.residents.len()) {
                break;
            }
            self.evict(now, &victim.content);
        }
        true
    }
}
