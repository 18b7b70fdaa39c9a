//! The configured eviction policy, which panics where a fault says so, and takes every guess for worth what goes for it: what it
//! has learned within a minute would let hardly any be made.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hotset_core::policy::{Candidate, EvictionPolicy, Guess, Prefetch, Victim};
use hotset_core::predict::{Observed, PrefetchScore, Studied, Study, UnsoundStateError};

use crate::{Bytes, ContentId};

/// What the policies of all tiers are told, and tell.
#[derive(Debug, Default)]
pub(super) struct Panics {
    /// Panics to come.
    pub(super) due: AtomicU64,
    /// Panics that have been.
    pub(super) been: AtomicU64,
}

impl Panics {
    /// Takes one that is due.
    fn take(&self) -> bool {
        let taken = self
            .due
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |due| {
                due.checked_sub(1)
            });
        taken.is_ok()
    }
}

/// See the module's page.
pub(super) struct Panicking {
    pub(super) inner: Box<dyn EvictionPolicy>,
    pub(super) panics: Arc<Panics>,
}

impl EvictionPolicy for Panicking {
    fn name(&self) -> &'static str {
        self.inner.name()
    }
    fn on_capacity(&mut self, capacity: Bytes) {
        self.inner.on_capacity(capacity);
    }
    fn observe(&mut self, now: Duration, request: &Observed<'_>) {
        self.inner.observe(now, request);
    }
    fn on_request(&mut self, now: Duration, content: &ContentId, bytes: Bytes, hit: bool) {
        self.inner.on_request(now, content, bytes, hit);
    }
    fn on_evict(&mut self, now: Duration, content: &ContentId) {
        self.inner.on_evict(now, content);
    }
    fn rank(&mut self, now: Duration, candidates: &[Candidate]) -> Vec<Victim> {
        self.inner.rank(now, candidates)
    }
    fn choose(&mut self, now: Duration, candidates: &[Candidate], needed: Bytes) -> Vec<Victim> {
        if self.panics.take() {
            self.panics.been.fetch_add(1, Ordering::Relaxed);
            std::panic::resume_unwind(Box::new("the policy of the simulation panics"));
        }
        self.inner.choose(now, candidates, needed)
    }
    fn prefetch(
        &mut self,
        now: Duration,
        residents: &[Candidate],
        free: Bytes,
    ) -> Option<Prefetch> {
        self.inner.prefetch(now, residents, free)
    }
    fn room_for_guess(
        &mut self,
        now: Duration,
        _guess: &Guess,
        residents: &[Candidate],
        needed: Bytes,
    ) -> Option<Vec<Victim>> {
        let all: Bytes = residents.iter().map(|c| c.bytes).sum();
        (all >= needed).then(|| self.inner.choose(now, residents, needed))
    }
    fn appetite(&self) -> Option<u32> {
        self.inner.appetite()
    }
    fn study(&mut self) -> Option<Study> {
        self.inner.study()
    }
    fn studied(&mut self, studied: Studied) {
        self.inner.studied(studied);
    }
    fn learned(&self) -> Option<Vec<u8>> {
        self.inner.learned()
    }
    fn resume(
        &mut self,
        now: Duration,
        away: Duration,
        learned: &[u8],
    ) -> Result<(), UnsoundStateError> {
        self.inner.resume(now, away, learned)
    }
    fn on_prefetch_cancelled(&mut self, content: &ContentId, delay_s: f64) {
        self.inner.on_prefetch_cancelled(content, delay_s);
    }
    fn prefetch_score(&self) -> Option<PrefetchScore> {
        self.inner.prefetch_score()
    }
    fn max_residents(&self) -> Option<usize> {
        self.inner.max_residents()
    }
}
