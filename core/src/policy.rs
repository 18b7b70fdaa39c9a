//! What to keep and what to drop. Pure: state and `now` in, choices out.
//!
//! One algorithm, one file, all behind [`EvictionPolicy`]. A policy may remember what it sees through the `on_` methods,
//! but must do with the candidates alone after a restart: they come from the ledger.

pub mod belady_size;
mod cheapest;
pub mod gdsf;
pub mod hotset;
pub mod hybrid_histogram;
pub mod invokeai;
pub mod lemonade;
pub mod lfu;
pub mod llama_cpp;
mod lowest;
pub mod lru;
pub mod lru_2;
mod memory;
pub mod ollama;
pub mod pressure;
mod rates;
pub mod s3_fifo;
mod shadow;
pub mod sieve;
mod slots;
#[cfg(test)]
pub(crate) mod test_utils;
pub mod worth;

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use crate::config::EvictionPolicyName;
use crate::ids::ContentId;
use crate::predict::{Observed, PrefetchScore, Studied, Study, UnsoundStateError};
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
    /// What it would take if no other tier had it, in seconds; the same where none has.
    pub whole_s: f64,
    /// Loaded on a guess and never asked for since.
    pub prefetched: bool,
    /// It is in a tier above as well: nobody asks for it here until it has gone from there.
    pub above: bool,
}

impl Candidate {
    /// How many bytes, one at least.
    fn size(&self) -> f64 {
        // Signed: no processor of old turns an unsigned number into a float at once, and a decision asks for each candidate.
        self.bytes.get().clamp(1, i64::MAX as u64) as i64 as f64
    }

    /// The share of [`whole_s`](Self::whole_s) that restoring it takes: 1 where no other tier has it, else less.
    #[must_use]
    pub fn discount(&self) -> f64 {
        if self.restore_s >= self.whole_s {
            return 1.0;
        }
        let share = self.restore_s / self.whole_s;
        if share.is_finite() {
            share.clamp(1e-3, 1.0)
        } else {
            1.0
        }
    }
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

/// A component that is worth loading on an idle link, and what goes for it.
#[derive(Debug, Clone, PartialEq)]
pub struct Prefetch {
    /// What to load.
    pub content: ContentId,
    /// Its bytes.
    pub bytes: Bytes,
    /// What is to go, if anything.
    pub victims: Vec<Victim>,
}

/// A component that nobody has asked for yet.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Guess {
    /// Which bytes.
    pub content: ContentId,
    /// What loading it takes, in seconds.
    pub restore_s: f64,
    /// Whether it is as good as asked for, whatever a predictor says.
    pub certain: bool,
}

/// Chooses what to evict.
pub trait EvictionPolicy: Send + 'static {
    /// Its name in the configuration, in decisions and in replays.
    fn name(&self) -> &'static str;

    /// The most bytes that the tier may hold, at the start and whenever that changes.
    fn on_capacity(&mut self, _capacity: Bytes) {}

    /// What loading a component takes where no tier has it, in seconds, as far as is known: told of all that is asked for before
    /// [`Self::observe`] is of the request.
    fn on_cost(&mut self, _content: &ContentId, _whole_s: f64) {}

    /// A component set was asked for; told before [`Self::on_request`] is for each of its components.
    fn observe(&mut self, _now: Duration, _request: &Observed<'_>) {}

    /// A component was asked for; `hit` where it was resident or on its way.
    fn on_request(&mut self, _now: Duration, _content: &ContentId, _bytes: Bytes, _hit: bool) {}

    /// A component was evicted.
    fn on_evict(&mut self, _now: Duration, _content: &ContentId) {}

    /// Orders the candidates: who goes first stands first.
    fn rank(&mut self, now: Duration, candidates: &[Candidate]) -> Vec<Victim>;

    /// The candidates that go so that `needed` bytes come back, which all of them together have; who goes first stands
    /// first. What was prefetched and never used goes before everything else.
    fn choose(&mut self, now: Duration, candidates: &[Candidate], needed: Bytes) -> Vec<Victim> {
        first_of_ranked(self, now, candidates, needed)
    }

    /// What to load now that the link is idle: `residents` may go for it, `free` bytes are free. Asked again after each
    /// load. `None`: nothing is worth it.
    fn prefetch(
        &mut self,
        _now: Duration,
        _residents: &[Candidate],
        _free: Bytes,
    ) -> Option<Prefetch> {
        None
    }

    /// What may go for a guess so that `needed` bytes come back. `None`: the guess is not worth what would go, or the policy
    /// can't tell.
    fn room_for_guess(
        &mut self,
        _now: Duration,
        _guess: &Guess,
        _residents: &[Candidate],
        _needed: Bytes,
    ) -> Option<Vec<Victim>> {
        None
    }

    /// A prefetch was cancelled because a demand load wanted the link, which it kept for this long.
    fn on_prefetch_cancelled(&mut self, _content: &ContentId, _delay_s: f64) {}

    /// What came of the prefetches, where the policy makes any.
    fn prefetch_score(&self) -> Option<PrefetchScore> {
        None
    }

    /// The most requests in a second that it can be told of; whoever tells it leaves out others, evenly. `None`: all of them.
    fn appetite(&self) -> Option<u32> {
        None
    }

    /// Work that it would have done elsewhere, some ten milliseconds, for [`Self::studied`].
    fn study(&mut self) -> Option<Study> {
        None
    }

    /// Takes what came of a study.
    fn studied(&mut self, _studied: Studied) {}

    /// What it has learned, for [`Self::resume`] after a restart; `None` where it learns nothing.
    fn learned(&self) -> Option<Vec<u8>> {
        None
    }

    /// Goes on with what an earlier one had learned, `away` after that.
    ///
    /// # Errors
    /// [`UnsoundStateError`] where that is of no use; then it learns anew.
    fn resume(
        &mut self,
        _now: Duration,
        _away: Duration,
        _learned: &[u8],
    ) -> Result<(), UnsoundStateError> {
        Ok(())
    }

    /// The most components that may be resident, for policies that bound the count beside the bytes.
    fn max_residents(&self) -> Option<usize> {
        None
    }
}

/// Orders candidates by a key, then the larger first, then by content id, so that the order is always the same.
fn by_key<K: Ord>(
    candidates: &[Candidate],
    mut key: impl FnMut(&Candidate) -> (K, f64, String),
) -> Vec<Victim> {
    let mut keyed: Vec<_> = candidates.iter().map(|c| (key(c), c)).collect();
    keyed.sort_by(|((a, ..), x), ((b, ..), y)| {
        a.cmp(b)
            .then(y.bytes.cmp(&x.bytes))
            .then(x.content.cmp(&y.content))
    });
    let victim = |((_, score, reason), c): ((K, f64, String), &Candidate)| Victim {
        content: c.content,
        score,
        reason,
    };
    keyed.into_iter().map(victim).collect()
}

/// Orders candidates by a score, then least recently used, then as [`by_key`].
fn by_score(
    candidates: &[Candidate],
    mut score: impl FnMut(&Candidate) -> (f64, String),
) -> Vec<Victim> {
    by_key(candidates, |c| {
        let (score, reason) = score(c);
        let score = if score.is_finite() { score } else { 0.0 };
        ((Score(score), c.last_used), score, reason)
    })
}

/// A finite number that can be sorted by.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Score(f64);

impl Eq for Score {}

impl PartialOrd for Score {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Score {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

/// Victims in an order that a queue gives; their place is the score.
fn in_order(order: impl Iterator<Item = ContentId>, reason: &str) -> Vec<Victim> {
    order
        .enumerate()
        .map(|(place, content)| Victim {
            content,
            score: place as f64,
            reason: reason.to_owned(),
        })
        .collect()
}

/// The candidates that a queue does not know, as after a restart, in the order of their admission.
fn unknown<'a>(candidates: &'a [Candidate], known: &HashSet<ContentId>) -> Vec<&'a Candidate> {
    let mut new: Vec<&Candidate> = candidates
        .iter()
        .filter(|c| !known.contains(&c.content))
        .collect();
    new.sort_by_key(|c| (c.admitted, c.last_used, c.content));
    new
}

/// Whether all candidates together have so many bytes, which are not none. Mostly the first few do.
fn together(candidates: &[Candidate], needed: Bytes) -> bool {
    let mut total = Bytes::ZERO;
    candidates.iter().any(|candidate| {
        total = total.saturating_add(candidate.bytes);
        total >= needed
    })
}

/// The first of the ranked, those that were prefetched and never used before all others.
fn first_of_ranked(
    policy: &mut (impl EvictionPolicy + ?Sized),
    now: Duration,
    candidates: &[Candidate],
    needed: Bytes,
) -> Vec<Victim> {
    let by_content: HashMap<&ContentId, &Candidate> =
        candidates.iter().map(|c| (&c.content, c)).collect();
    let mut ranked = policy.rank(now, candidates);
    // Stable, so that within each half the policy's order stands.
    ranked.sort_by_key(|victim| {
        !by_content
            .get(&victim.content)
            .is_some_and(|c| c.prefetched)
    });
    let mut freed = Bytes::ZERO;
    ranked
        .into_iter()
        .take_while(|victim| {
            let wanted = freed < needed;
            let bytes = by_content
                .get(&victim.content)
                .map_or(Bytes::ZERO, |c| c.bytes);
            freed = freed.saturating_add(bytes);
            wanted
        })
        .collect()
}

/// The policy of this name.
#[must_use]
pub fn by_name(name: EvictionPolicyName) -> Box<dyn EvictionPolicy> {
    match name {
        EvictionPolicyName::Lru => Box::new(lru::Lru),
        EvictionPolicyName::Lfu => Box::new(lfu::Lfu::default()),
        EvictionPolicyName::Gdsf => Box::new(gdsf::Gdsf::default()),
        EvictionPolicyName::Sieve => Box::new(sieve::Sieve::default()),
        EvictionPolicyName::S3Fifo => Box::new(s3_fifo::S3Fifo::default()),
        EvictionPolicyName::Lru2 => Box::new(lru_2::Lru2::default()),
        EvictionPolicyName::HybridHistogram => {
            Box::new(hybrid_histogram::HybridHistogram::default())
        }
        EvictionPolicyName::Ollama => Box::new(ollama::Ollama),
        EvictionPolicyName::InvokeAi => Box::new(invokeai::InvokeAi),
        EvictionPolicyName::LlamaCpp => Box::new(llama_cpp::LlamaCpp),
        EvictionPolicyName::Lemonade => Box::new(lemonade::Lemonade),
        EvictionPolicyName::Hotset => Box::new(hotset::HotsetRetention::new(0)),
    }
}

/// The first of the ranked candidates whose bytes together reach `needed`; none where all of them would not do, since an
/// eviction that does not help anybody only costs.
#[must_use]
pub fn select(
    policy: &mut dyn EvictionPolicy,
    now: Duration,
    candidates: &[Candidate],
    needed: Bytes,
) -> Vec<Victim> {
    if needed.is_zero() || !together(candidates, needed) {
        return Vec::new();
    }
    policy.choose(now, candidates, needed)
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_policy_is_called_as_in_the_configuration() {
        for name in EvictionPolicyName::ALL {
            let written = serde_json::to_value(name).unwrap();
            assert_eq!(written, by_name(name).name());
        }
    }

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
