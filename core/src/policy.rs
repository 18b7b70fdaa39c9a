//! What to keep and what to drop. Pure: state and `now` in, choices out.
//!
//! One algorithm, one file, all behind [`EvictionPolicy`]. A policy may remember what it sees through the `on_` methods,
//! but must do with the candidates alone after a restart: they come from the ledger.

pub mod lru;
pub mod pressure;
#[cfg(test)]
pub(crate) mod test_utils;

use std::time::Duration;

use crate::config::EvictionPolicyName;
use crate::ids::ContentId;
use crate::units::Bytes;

/// A resident component that nobody holds.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// Which bytes.
    pub content: ContentId,
    /// How many.
    pub bytes: Bytes,
    /// When it was admitted, since the start of the system.
    pub admitted: Duration,
    /// When it was last asked for.
    pub last_used: Duration,
    /// How often it was asked for since it was admitted.
    pub uses: u64,
    /// What loading it again from the next tier would take, in seconds.
    pub restore_s: f64,
    /// Loaded on a guess and never asked for since.
    pub prefetched: bool,
}

/// A component that is to go, and why.
#[derive(Debug, Clone, PartialEq)]
pub struct Victim {
    /// Which bytes.
    pub content: ContentId,
    /// The policy's figure for it: the lower, the sooner it goes.
    pub score: f64,
    /// The figure in words.
    pub reason: String,
}

/// Chooses what to evict.
pub trait EvictionPolicy: Send + 'static {
    /// Its name in the configuration, in decisions and in replays.
    fn name(&self) -> &'static str;

    /// A component was asked for; `hit` where it was resident or on its way.
    fn on_request(&mut self, _now: Duration, _content: &ContentId, _bytes: Bytes, _hit: bool) {}

    /// A component was evicted.
    fn on_evict(&mut self, _now: Duration, _content: &ContentId) {}

    /// Orders the candidates: who goes first stands first.
    fn rank(&mut self, now: Duration, candidates: &[Candidate]) -> Vec<Victim>;
}

/// The policy of this name.
#[must_use]
pub fn by_name(name: EvictionPolicyName) -> Box<dyn EvictionPolicy> {
    match name {
        EvictionPolicyName::Lru => Box::new(lru::Lru),
    }
}

/// The first of the ranked candidates whose bytes together reach `needed`; none where all of them would not do, since an
/// eviction that does not help anybody only costs. What was prefetched and never used goes before everything else.
#[must_use]
pub fn select(
    policy: &mut dyn EvictionPolicy,
    now: Duration,
    candidates: &[Candidate],
    needed: Bytes,
) -> Vec<Victim> {
    let total: Bytes = candidates.iter().map(|c| c.bytes).sum();
    if total < needed || needed.is_zero() {
        return Vec::new();
    }
    let find = |victim: &Victim| candidates.iter().find(|c| c.content == victim.content);
    let mut ranked = policy.rank(now, candidates);
    // Stable, so that within each half the policy's order stands.
    ranked.sort_by_key(|victim| !find(victim).is_some_and(|c| c.prefetched));
    let mut freed = Bytes::ZERO;
    ranked
        .into_iter()
        .take_while(|victim| {
            let wanted = freed < needed;
            freed = freed.saturating_add(find(victim).map_or(Bytes::ZERO, |c| c.bytes));
            wanted
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::test_utils::candidate;
    use super::*;

    #[test]
    fn nothing_is_evicted_in_vain() {
        let candidates = [candidate(1, 10, 1), candidate(2, 10, 2)];
        assert!(select(&mut lru::Lru, Duration::ZERO, &candidates, Bytes(21)).is_empty());
        assert!(select(&mut lru::Lru, Duration::ZERO, &candidates, Bytes(0)).is_empty());
        assert_eq!(
            select(&mut lru::Lru, Duration::ZERO, &candidates, Bytes(10)).len(),
            1
        );
        assert_eq!(
            select(&mut lru::Lru, Duration::ZERO, &candidates, Bytes(11)).len(),
            2
        );
    }

    #[test]
    fn guesses_go_first() {
        let mut guessed = candidate(3, 10, 99);
        guessed.prefetched = true;
        let candidates = [candidate(1, 10, 1), guessed.clone()];
        let victims = select(&mut lru::Lru, Duration::ZERO, &candidates, Bytes(5));
        assert_eq!(victims[0].content, guessed.content);
    }
}
