//! The books as others see them: nothing here changes them.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use super::{Entry, EntryKey, Ledger, State, TierBooks, Want};
use crate::catalog::Component;
use crate::ids::{ContentId, LeaseId, SessionId, Tier};
use crate::policy::Candidate;
use crate::units::Bytes;

/// One residency, as status and policies see it.
#[derive(Clone, Debug)]
pub struct ResidencyView {
    /// The component.
    pub component: Arc<Component>,
    /// Its bytes in this tier.
    pub bytes: Bytes,
    /// Still on its way, or promised.
    pub loading: bool,
    /// Reservations and leases that hold it.
    pub pins: u32,
    /// Leases alone.
    pub leases: u32,
    /// How often it was asked for since it came.
    pub uses: u64,
    /// When it was admitted, since the start of the system.
    pub admitted: Duration,
    /// When it was last asked for, since the start of the system.
    pub last_used: Duration,
    /// How long its load took; `None` until it is there, and where its bytes were there already.
    pub load_time: Option<Duration>,
    /// Loaded on a guess, and never asked for since.
    pub prefetched: bool,
}

impl ResidencyView {
    /// Whether a set that needs the memory may have it: nobody holds it, or it is still loaded on a guess, which is called off.
    #[must_use]
    pub const fn may_go(&self) -> bool {
        if self.loading {
            self.prefetched
        } else {
            self.pins == 0
        }
    }

    /// The residency as a candidate for eviction, as if no other tier had it and loading it took so many seconds.
    #[must_use]
    pub fn candidate(&self, whole_s: f64) -> Candidate {
        Candidate {
            content: self.component.content_id,
            bytes: self.bytes,
            admitted: self.admitted,
            last_used: self.last_used,
            uses: self.uses,
            restore_s: whole_s,
            whole_s,
            prefetched: self.prefetched,
            above: false,
        }
    }
}

/// One tier, as status and policies see it.
#[derive(Clone, Debug)]
pub struct TierView {
    /// The tier.
    pub tier: Tier,
    /// The most that hotset may use.
    pub budget: Bytes,
    /// What is promised or occupied.
    pub committed: Bytes,
    /// The part of it that is evicted and about to be freed.
    pub evicting: Bytes,
    /// Why it is out of service, where it is.
    pub out_of_service: Option<Arc<str>>,
    /// What is there or on its way, largest first.
    pub residencies: Vec<ResidencyView>,
}

/// What a tier's books come to, without what is in it: reading a view copies all of that.
#[derive(Clone, Copy, Debug)]
pub struct TierSums {
    /// The most that hotset may use.
    pub budget: Bytes,
    /// What is promised or occupied.
    pub committed: Bytes,
    /// The part of it that is evicted and about to be freed.
    pub evicting: Bytes,
    /// Whether it takes anything.
    pub in_service: bool,
}

impl TierSums {
    /// Bytes that are not promised.
    #[must_use]
    pub const fn free(&self) -> Bytes {
        self.budget.saturating_sub(self.committed)
    }

    /// What is taken and stays so.
    #[must_use]
    pub const fn used(&self) -> Bytes {
        self.committed.saturating_sub(self.evicting)
    }
}

impl TierView {
    /// Bytes that are not promised.
    #[must_use]
    pub const fn free(&self) -> Bytes {
        self.budget.saturating_sub(self.committed)
    }
}

impl Ledger {
    /// The budget of a tier.
    #[must_use]
    pub fn budget(&self, tier: Tier) -> Option<Bytes> {
        Some(self.lock().tiers.get(&tier)?.budget)
    }

    /// What a tier's books come to.
    #[must_use]
    pub fn sums(&self, tier: Tier) -> Option<TierSums> {
        let books = self.lock();
        let open = books.tiers.get(&tier)?;
        Some(TierSums {
            budget: open.budget,
            committed: open.committed,
            evicting: open.evicting,
            in_service: open.out_of_service.is_none(),
        })
    }

    /// What these wants need in this tier beyond what is there or promised.
    #[must_use]
    pub fn needed(&self, tier: Tier, wants: &[Want]) -> Bytes {
        let books = self.lock();
        books
            .tiers
            .get(&tier)
            .map_or(Bytes(u64::MAX), |open| open.need(wants).new)
    }

    /// The components in this tier that could be evicted now.
    #[must_use]
    pub fn evictable(&self, tier: Tier) -> Vec<ResidencyView> {
        let books = self.lock();
        books.tiers.get(&tier).map_or_else(Vec::new, |open| {
            open.entries
                .values()
                .filter(|entry| entry.is_evictable())
                .map(Entry::view)
                .collect()
        })
    }

    /// Somebody uses these, wherever: in RAM they are no guesses any more, although what a GPU has as well is not asked for there.
    pub fn used_elsewhere<'a>(&self, contents: impl Iterator<Item = &'a ContentId>) {
        let mut books = self.lock();
        let Some(ram) = books.tiers.get_mut(&Tier::Ram) else {
            return;
        };
        for content in contents {
            if let Some(entry) = ram.entry_mut(content) {
                entry.prefetched = false;
            }
        }
    }

    /// Whether any GPU has this component.
    #[must_use]
    pub fn is_on_a_gpu(&self, content: &ContentId) -> bool {
        let books = self.lock();
        let mut gpus = books.tiers.iter().filter(|(tier, _)| **tier != Tier::Ram);
        gpus.any(|(_, open)| {
            let entry = open.entry(content);
            entry.is_some_and(|entry| matches!(entry.state, State::Resident { .. }))
        })
    }

    /// How long a component's load into a tier took: see [`ResidencyView::load_time`].
    #[must_use]
    pub fn load_time(&self, tier: Tier, content: &ContentId) -> Option<Duration> {
        self.lock().tiers.get(&tier)?.entry(content)?.load_time
    }

    /// What is resident in any of these tiers.
    #[must_use]
    pub fn resident(&self, tiers: impl Fn(Tier) -> bool) -> HashSet<ContentId> {
        let books = self.lock();
        let open = books.tiers.iter().filter(|(tier, _)| tiers(**tier));
        open.flat_map(|(_, open)| open.entries.values())
            .filter(|entry| matches!(entry.state, State::Resident { .. }))
            .map(|entry| entry.component.content_id)
            .collect()
    }

    /// One tier's books.
    #[must_use]
    pub fn view(&self, tier: Tier) -> Option<TierView> {
        let books = self.lock();
        books.tiers.get(&tier).map(|open| open.view(tier))
    }

    /// All tiers' books, in the global order, taken at one instant.
    #[must_use]
    pub fn views(&self) -> Vec<TierView> {
        let books = self.lock();
        books
            .tiers
            .iter()
            .map(|(tier, open)| open.view(*tier))
            .collect()
    }

    /// How many leases each session holds.
    #[must_use]
    pub fn leases(&self) -> BTreeMap<SessionId, usize> {
        let books = self.lock();
        let mut counts = BTreeMap::new();
        for lease in books.leases.values() {
            *counts.entry(lease.owner).or_insert(0) += 1;
        }
        counts
    }

    /// What these sessions have leased, in bytes of tensors: what several of them share counts once. `more` are components that
    /// they want beside that.
    #[must_use]
    pub fn leased_by(
        &self,
        sessions: &HashSet<SessionId>,
        more: &[(Tier, Arc<Component>)],
    ) -> Bytes {
        let books = self.lock();
        let mut seen: HashSet<EntryKey> = HashSet::new();
        let mut bytes = Bytes::ZERO;
        for lease in books.leases.values() {
            if sessions.contains(&lease.owner) && seen.insert(lease.key) {
                bytes = bytes.saturating_add(lease.bytes);
            }
        }
        for (tier, component) in more {
            let known = books
                .tiers
                .get(tier)
                .and_then(|open| open.entry(&component.content_id));
            let key = known.map(|entry| EntryKey {
                tier: *tier,
                number: entry.number,
            });
            if key.is_none_or(|key| seen.insert(key)) {
                bytes = bytes.saturating_add(component.bytes);
            }
        }
        bytes
    }

    /// What nobody has held for longer than it was to be kept, with the time since then; and when the next of its kind has
    /// been idle for that long, since the start of the system.
    #[must_use]
    pub fn outlived(&self, tier: Tier) -> (Vec<(ContentId, Duration)>, Option<Duration>) {
        let now = self.now();
        let books = self.lock();
        let (mut gone, mut next) = (Vec::new(), None::<Duration>);
        let entries = books
            .tiers
            .get(&tier)
            .into_iter()
            .flat_map(|open| open.entries.values());
        for entry in entries.filter(|entry| entry.is_evictable()) {
            match entry.keep_alive.until(entry.released) {
                None => {}
                Some(until) if until <= now => {
                    let idle = now.saturating_sub(entry.released);
                    gone.push((entry.component.content_id, idle));
                }
                Some(until) => next = Some(next.map_or(until, |next| next.min(until))),
            }
        }
        (gone, next)
    }

    /// Whether a set that comes before this place waits for memory in one of these tiers.
    #[must_use]
    pub fn somebody_waits_before(&self, tiers: &[Tier], place: Duration) -> bool {
        let books = self.lock();
        let first = |tier| books.tiers.get(tier).and_then(|open| open.first_waiting);
        tiers.iter().filter_map(first).any(|first| first < place)
    }

    /// The live leases in a tier, with their owners.
    #[must_use]
    pub fn leases_in(&self, tier: Tier) -> Vec<(LeaseId, SessionId)> {
        let books = self.lock();
        let mut leases: Vec<_> = books
            .leases
            .iter()
            .filter(|(_, lease)| lease.key.tier == tier && lease.revoked.is_none())
            .map(|(id, lease)| (*id, lease.owner))
            .collect();
        leases.sort_unstable();
        leases
    }
}

impl Entry {
    fn view(&self) -> ResidencyView {
        ResidencyView {
            component: self.component.clone(),
            bytes: self.bytes,
            loading: !matches!(self.state, State::Resident { .. }),
            pins: self.pins,
            leases: self.leases,
            uses: self.uses,
            admitted: self.admitted,
            last_used: self.last_used,
            load_time: self.load_time,
            prefetched: self.prefetched,
        }
    }
}

impl TierBooks {
    fn view(&self, tier: Tier) -> TierView {
        let mut residencies: Vec<_> = self.entries.values().map(Entry::view).collect();
        residencies.sort_by(|a, b| (b.bytes, &a.component.id).cmp(&(a.bytes, &b.component.id)));
        TierView {
            tier,
            budget: self.budget,
            committed: self.committed,
            evicting: self.evicting,
            out_of_service: self.out_of_service.clone(),
            residencies,
        }
    }
}
