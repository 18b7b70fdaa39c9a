//! The books: budgets, promises, residencies and their pins, for every tier. Shared by all actors and outliving them;
//! its one lock is held for arithmetic alone.
//!
//! Every byte that hotset may touch is a [`Charge`] against a tier's budget, and returns when the charge is dropped:
//! a reservation holds it first, then the flight, then the memory itself ([`Held`]). So the books never say "free" while
//! the memory still exists, and no path, not even a killed actor, can lose bytes.

mod charge;
mod claim;
#[cfg(all(test, feature = "models"))]
mod models;
mod resident;
#[cfg(test)]
mod tests;
mod views;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

pub use self::charge::{Charge, Held, Memory};
pub use self::claim::{
    Claim, Evicted, Never, Reservation, Reserved, ResidencyState, Shortfall, Want,
};
pub use self::views::{ResidencyView, TierSums, TierView};
use super::flight::{Flight, FlightTicket};
use crate::breaks::{self, Break};
use crate::catalog::Component;
use crate::ids::{ContentId, LeaseId, SessionId, Tier};
use crate::io::Urgency;
use crate::plan::KeepAlive;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Mutex, MutexGuard};
use crate::tensor::TensorTable;
use crate::units::Bytes;

/// Which entry of which tier: an entry that failed and came again has another number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct EntryKey {
    tier: Tier,
    number: u64,
}

#[derive(Debug)]
enum State {
    /// Promised; nobody moves the bytes yet.
    Reserved { flight: Arc<Flight>, charge: Charge },
    /// A ticket is out.
    Loading { flight: Arc<Flight> },
    Resident {
        held: Arc<Held>,
        table: Arc<TensorTable>,
    },
}

#[derive(Debug)]
struct Entry {
    number: u64,
    component: Arc<Component>,
    bytes: Bytes,
    state: State,
    pins: u32,
    leases: u32,
    uses: u64,
    admitted: Duration,
    last_used: Duration,
    /// `None` where its bytes were there already.
    loading_since: Option<Duration>,
    load_time: Option<Duration>,
    prefetched: bool,
    /// How long it stays once nobody holds it.
    keep_alive: KeepAlive,
    /// When the last who held it let go.
    released: Duration,
}

/// A resident entry: its number, and what a lease on it holds.
type Found = (u64, Arc<Held>, Arc<TensorTable>);

/// What a set needs in a tier.
#[derive(Debug, Default)]
struct Need {
    /// All of it.
    whole: Bytes,
    /// What is neither there nor promised.
    new: Bytes,
    /// What is there and held by nobody: it must not be evicted for the set that wants it.
    own: Bytes,
}

#[derive(Debug)]
struct TierBooks {
    budget: Bytes,
    committed: Bytes,
    /// The part of `committed` that is evicted and about to be freed.
    evicting: Bytes,
    out_of_service: Option<Arc<str>>,
    entries: BTreeMap<u64, Entry>,
    /// The entry of each content; one entry may have several, once digests have shown that they are the same bytes.
    by_content: HashMap<ContentId, u64>,
    wake: Arc<Notify>,
    wake_when: WakeWhen,
    /// Sessions that hold nothing get nothing without the keeper, which lets them wait.
    newcomers_wait: bool,
    /// The place of the first set that waits.
    first_waiting: Option<Duration>,
}

/// When the keeper of a tier wants to hear that bytes came back or a pin was lifted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WakeWhen {
    /// Somebody waits for memory: always.
    pub waiting: bool,
    /// Otherwise only while more than this is committed: there is something to evict.
    pub above: Bytes,
}

impl TierBooks {
    fn entry(&self, content: &ContentId) -> Option<&Entry> {
        self.entries.get(self.by_content.get(content)?)
    }

    fn entry_mut(&mut self, content: &ContentId) -> Option<&mut Entry> {
        self.entries.get_mut(self.by_content.get(content)?)
    }

    fn remove(&mut self, number: u64) -> Option<Entry> {
        let entry = self.entries.remove(&number)?;
        self.by_content.retain(|_, of| *of != number);
        Some(entry)
    }

    fn wake_if_wanted(&self) {
        if self.wake_when.waiting || self.committed > self.wake_when.above {
            self.wake.notify_one();
        }
    }

    fn free(&self) -> Bytes {
        self.budget.saturating_sub(self.committed)
    }

    /// What a set needs here. The same content may be named twice; it is counted once.
    fn need(&self, wants: &[Want]) -> Need {
        let mut seen = HashSet::new();
        let mut need = Need::default();
        for want in wants {
            match want {
                Want::Scratch(bytes) => {
                    need.whole = need.whole.saturating_add(*bytes);
                    need.new = need.new.saturating_add(*bytes);
                }
                Want::Component(component, bytes) => {
                    if !seen.insert(component.content_id) {
                        continue;
                    }
                    need.whole = need.whole.saturating_add(*bytes);
                    match self.entry(&component.content_id) {
                        None => need.new = need.new.saturating_add(*bytes),
                        Some(entry) if entry.is_evictable() => {
                            need.own = need.own.saturating_add(entry.bytes);
                        }
                        Some(_) => {}
                    }
                }
            }
        }
        need
    }

    fn evictable(&self) -> Bytes {
        self.entries
            .values()
            .filter(|entry| entry.is_evictable())
            .map(|entry| entry.bytes)
            .sum()
    }
}

#[derive(Debug, Default)]
struct Books {
    tiers: BTreeMap<Tier, TierBooks>,
    next_entry: u64,
    next_lease: u64,
    /// Live leases, for status; a lease's own drop removes it.
    leases: HashMap<LeaseId, LeaseRow>,
}

impl Books {
    fn must_wait(&self, tier: Tier, session: SessionId) -> bool {
        self.tiers
            .get(&tier)
            .is_some_and(|books| books.newcomers_wait)
            && !self.leases.values().any(|lease| lease.owner == session)
    }
}

/// A live lease.
#[derive(Debug)]
struct LeaseRow {
    owner: SessionId,
    key: EntryKey,
    /// Bytes of the component's tensors.
    bytes: Bytes,
    revoked: Option<Arc<str>>,
}

/// The ledger. See the module's page.
#[derive(Debug)]
pub struct Ledger {
    books: Mutex<Books>,
    started: Instant,
}

impl Books {
    fn entry(&self, key: &EntryKey) -> Option<&Entry> {
        self.tiers.get(&key.tier)?.entries.get(&key.number)
    }

    fn entry_mut(&mut self, key: &EntryKey) -> Option<&mut Entry> {
        self.tiers.get_mut(&key.tier)?.entries.get_mut(&key.number)
    }
}

impl Ledger {
    /// Empty books; time counts from now.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            books: Mutex::default(),
            started: Instant::now(),
        })
    }

    /// Time since the system started.
    #[must_use]
    pub fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn lock(&self) -> MutexGuard<'_, Books> {
        // Nothing under the lock can panic half-way through a change but a failed debug assertion.
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a tier, or gives an open one another budget.
    pub fn open_tier(&self, tier: Tier, budget: Bytes) {
        let mut books = self.lock();
        let tier = books.tiers.entry(tier).or_insert_with(|| TierBooks {
            budget,
            committed: Bytes::ZERO,
            evicting: Bytes::ZERO,
            out_of_service: None,
            entries: BTreeMap::new(),
            by_content: HashMap::new(),
            wake: Arc::new(Notify::new()),
            wake_when: WakeWhen {
                waiting: false,
                above: Bytes(u64::MAX),
            },
            newcomers_wait: false,
            first_waiting: None,
        });
        tier.budget = budget;
        tier.wake_if_wanted();
    }

    /// Takes a tier out of service, with the reason, or back into service.
    pub fn set_service(&self, tier: Tier, out_of_service: Option<Arc<str>>) {
        if let Some(books) = self.lock().tiers.get_mut(&tier) {
            books.out_of_service = out_of_service;
            books.wake.notify_one();
        }
    }

    /// What wakes the keeper of this tier. `None` where there is no such tier.
    #[must_use]
    pub fn wake(&self, tier: Tier) -> Option<Arc<Notify>> {
        self.lock().tiers.get(&tier).map(|books| books.wake.clone())
    }

    /// Sets when the keeper of this tier is woken.
    pub fn set_wake_when(&self, tier: Tier, when: WakeWhen) {
        if let Some(books) = self.lock().tiers.get_mut(&tier) {
            books.wake_when = when;
        }
    }

    /// From now on sessions that hold no lease get none in this tier without its keeper, or get them again.
    pub fn set_newcomers_wait(&self, tier: Tier, wait: bool) {
        if let Some(books) = self.lock().tiers.get_mut(&tier) {
            books.newcomers_wait = wait;
        }
    }

    /// Whether this session has to wait in this tier, even for what costs nothing. Who holds leases has begun something, and
    /// is let through, since it would otherwise keep what others wait for.
    #[must_use]
    pub fn must_wait(&self, tier: Tier, session: SessionId) -> bool {
        self.lock().must_wait(tier, session)
    }

    /// Promises these wants in this tier, all or none. Components that are there or on their way are pinned and cost
    /// nothing.
    ///
    /// # Errors
    /// [`Never`] where waiting would not help.
    pub fn reserve(
        self: &Arc<Self>,
        tier: Tier,
        wants: &[Want],
        prefetch: bool,
    ) -> Result<Reserved, Never> {
        let now = self.now();
        let mut books = self.lock();
        let Books {
            tiers, next_entry, ..
        } = &mut *books;
        let Some(open) = tiers.get_mut(&tier) else {
            return Err(Never::OutOfService {
                tier,
                reason: "there is no such tier".into(),
            });
        };
        if let Some(reason) = &open.out_of_service {
            return Err(Never::OutOfService {
                tier,
                reason: reason.clone(),
            });
        }
        let need = open.need(wants);
        if need.whole > open.budget {
            return Err(Never::TooLarge {
                tier,
                needed: need.whole,
                budget: open.budget,
            });
        }
        if need.new > open.free() && !breaks::is(Break::OverCommit) {
            return Ok(Reserved::Short(Shortfall {
                needed: need.new,
                free: open.free(),
                evicting: open.evicting,
                evictable: open.evictable().saturating_sub(need.own),
            }));
        }
        open.committed += need.new;
        let mut reservation = Reservation {
            claims: Vec::with_capacity(wants.len()),
            scratch: None,
        };
        let charge = |bytes| Charge {
            ledger: self.clone(),
            tier,
            bytes,
            evicting: AtomicBool::new(false),
        };
        let urgency = || {
            if prefetch {
                Urgency::prefetch()
            } else {
                Urgency::default()
            }
        };
        let mut scratch = Bytes::ZERO;
        for want in wants {
            match want {
                Want::Scratch(bytes) => scratch += *bytes,
                Want::Component(component, bytes) => {
                    let content = component.content_id;
                    let number = *open.by_content.entry(content).or_insert_with(|| {
                        *next_entry += 1;
                        *next_entry
                    });
                    let entry = open.entries.entry(number).or_insert_with(|| Entry {
                        number,
                        component: component.clone(),
                        bytes: *bytes,
                        state: State::Reserved {
                            flight: Flight::new(urgency()),
                            charge: charge(*bytes),
                        },
                        pins: 0,
                        leases: 0,
                        uses: 0,
                        admitted: now,
                        last_used: now,
                        loading_since: Some(now),
                        load_time: None,
                        prefetched: prefetch,
                        keep_alive: KeepAlive::Unlimited,
                        released: now,
                    });
                    entry.pins += 1;
                    if !prefetch {
                        entry.uses += 1;
                        entry.last_used = now;
                        entry.prefetched = false;
                        if let State::Reserved { flight, .. } | State::Loading { flight } =
                            &entry.state
                        {
                            flight.urgency().raise(None);
                        }
                    }
                    reservation.claims.push(Claim {
                        ledger: self.clone(),
                        key: EntryKey { tier, number },
                        component: component.clone(),
                    });
                }
            }
        }
        if !scratch.is_zero() {
            reservation.scratch = Some(charge(scratch));
        }
        Ok(Reserved::Granted(reservation))
    }

    /// Begins the flight of a component that is promised in this tier. `None` where it is under way, there, or not
    /// promised: so each flight begins once.
    #[must_use]
    pub fn start(self: &Arc<Self>, tier: Tier, content: &ContentId) -> Option<FlightTicket> {
        let now = self.now();
        let mut books = self.lock();
        let entry = books.tiers.get_mut(&tier)?.entry_mut(content)?;
        let State::Reserved { flight, .. } = &entry.state else {
            return None;
        };
        let flight = flight.clone();
        let before = std::mem::replace(
            &mut entry.state,
            State::Loading {
                flight: flight.clone(),
            },
        );
        entry.loading_since = Some(now);
        let State::Reserved { charge, .. } = before else {
            return None;
        };
        // From now on nobody needs to ask for it again.
        flight.begin();
        let key = EntryKey {
            tier,
            number: entry.number,
        };
        Some(FlightTicket::new(self.clone(), key, flight, charge))
    }

    /// Charges memory that is taken already, whether there is room or not: the books say what is. Where that is more than the
    /// budget, nothing is granted until so much has come back. `None` where there is no such tier.
    #[must_use]
    pub fn charge(self: &Arc<Self>, tier: Tier, bytes: Bytes) -> Option<Charge> {
        let mut books = self.lock();
        let open = books.tiers.get_mut(&tier)?;
        open.committed = open.committed.saturating_add(bytes);
        open.wake_if_wanted();
        Some(Charge {
            ledger: self.clone(),
            tier,
            bytes,
            evicting: AtomicBool::new(false),
        })
    }

    /// Takes bytes that are charged already for a component that turns up in memory of its own: others who want it wait for
    /// this flight, and need not move anything. Gives the charge back where the component is there, or on its way, or its
    /// tier takes nothing.
    ///
    /// # Errors
    /// The charge, unchanged.
    pub fn adopt(
        self: &Arc<Self>,
        component: &Arc<Component>,
        charge: Charge,
    ) -> Result<(FlightTicket, Claim), Charge> {
        let now = self.now();
        let tier = charge.tier;
        let mut books = self.lock();
        let Books {
            tiers, next_entry, ..
        } = &mut *books;
        let Some(open) = tiers.get_mut(&tier) else {
            return Err(charge);
        };
        if open.out_of_service.is_some() || open.by_content.contains_key(&component.content_id) {
            return Err(charge);
        }
        *next_entry += 1;
        let number = *next_entry;
        open.by_content.insert(component.content_id, number);
        let flight = Flight::new(Urgency::default());
        flight.begin();
        open.entries.insert(
            number,
            Entry {
                number,
                component: component.clone(),
                bytes: charge.bytes,
                state: State::Loading {
                    flight: flight.clone(),
                },
                pins: 1,
                leases: 0,
                uses: 0,
                admitted: now,
                last_used: now,
                loading_since: None,
                load_time: None,
                prefetched: false,
                keep_alive: KeepAlive::Unlimited,
                released: now,
            },
        );
        let key = EntryKey { tier, number };
        let claim = Claim {
            ledger: self.clone(),
            key,
            component: component.clone(),
        };
        Ok((FlightTicket::new(self.clone(), key, flight, charge), claim))
    }

    pub(super) fn landed(&self, key: &EntryKey, held: Arc<Held>, table: Arc<TensorTable>) {
        let now = self.now();
        let mut books = self.lock();
        if let Some(entry) = books.entry_mut(key) {
            entry.state = State::Resident { held, table };
            entry.load_time = entry.loading_since.map(|since| now.saturating_sub(since));
        }
        if let Some(tier) = books.tiers.get(&key.tier) {
            tier.wake_if_wanted();
        }
    }

    /// Charges `bytes` in the place of what was charged, free or not: it says what is, not what may be.
    pub(super) fn resize(&self, key: &EntryKey, charge: &mut Charge, bytes: Bytes) {
        let mut books = self.lock();
        if let Some(tier) = books.tiers.get_mut(&charge.tier) {
            tier.committed = tier
                .committed
                .saturating_sub(charge.bytes)
                .saturating_add(bytes);
            if let Some(entry) = tier.entries.get_mut(&key.number) {
                entry.bytes = bytes;
            }
            charge.bytes = bytes;
            tier.wake_if_wanted();
        }
    }

    pub(super) fn forget(&self, key: &EntryKey) {
        let gone = {
            let mut books = self.lock();
            if books.entry(key).is_none() {
                return;
            }
            books
                .tiers
                .get_mut(&key.tier)
                .and_then(|tier| tier.remove(key.number))
        };
        drop(gone);
    }

    /// Forgets a component that is resident in this tier and that nobody holds. Its memory is freed and its bytes come
    /// back when the value is dropped, which may take long for host memory: drop it where blocking is allowed. `None`
    /// where it may not go.
    #[must_use]
    pub fn evict(&self, tier: Tier, content: &ContentId) -> Option<Evicted> {
        let mut books = self.lock();
        let open = books.tiers.get_mut(&tier)?;
        let entry = open.entry(content)?;
        let State::Resident { held, .. } = &entry.state else {
            return None;
        };
        if !entry.is_evictable() {
            return None;
        }
        held.charge.evicting.store(true, Ordering::Relaxed);
        let (number, bytes) = (entry.number, held.charge.bytes);
        open.evicting += bytes;
        let entry = open.remove(number)?;
        Some(Evicted {
            component: entry.component.clone(),
            bytes: entry.bytes,
            entry,
        })
    }

    /// A component turned out to hold the content by which `component` names it now: what is resident or on its way under
    /// the content `before` is from now on found under both.
    pub fn identified(&self, before: &ContentId, component: &Arc<Component>) {
        let mut books = self.lock();
        for tier in books.tiers.values_mut() {
            let Some(number) = tier.by_content.get(before).copied() else {
                continue;
            };
            // Where both are there already, they stay two; the one that nobody asks for any more is evicted in time.
            if tier.by_content.contains_key(&component.content_id) {
                continue;
            }
            tier.by_content.insert(component.content_id, number);
            if let Some(entry) = tier.entries.get_mut(&number) {
                entry.component = component.clone();
            }
        }
    }

    /// Forgets everything in a tier whose memory is lost, leased or not. Leases keep what they hold, as far as it still
    /// exists.
    pub fn forget_tier(&self, tier: Tier) {
        let gone: Vec<Entry> = {
            let mut books = self.lock();
            match books.tiers.get_mut(&tier) {
                None => return,
                Some(open) => {
                    open.by_content.clear();
                    std::mem::take(&mut open.entries).into_values().collect()
                }
            }
        };
        for entry in &gone {
            if let State::Loading { flight } = &entry.state {
                flight.cancel();
            }
        }
    }

    /// Sets how long components stay in a tier once nobody holds them. What is not there is passed over.
    pub fn set_keep_alive(&self, tier: Tier, components: &[Arc<Component>], keep: KeepAlive) {
        let mut books = self.lock();
        let Some(open) = books.tiers.get_mut(&tier) else {
            return;
        };
        for component in components {
            if let Some(entry) = open.entry_mut(&component.content_id) {
                entry.keep_alive = keep;
            }
        }
    }

    /// The place in the queue of the first set that waits for memory in a tier, for those that could give way to it.
    pub fn set_first_waiting(&self, tier: Tier, place: Option<Duration>) {
        if let Some(books) = self.lock().tiers.get_mut(&tier) {
            books.first_waiting = place;
        }
    }

    /// Revokes all leases in a tier whose memory is lost, and forgets what was there. Gives the leases, with their owners.
    pub fn revoke_tier(&self, tier: Tier, reason: &Arc<str>) -> Vec<(LeaseId, SessionId)> {
        // First what was there goes, so that no lease on it can begin any more.
        self.forget_tier(tier);
        let leases = self.leases_in(tier);
        let mut books = self.lock();
        for (id, _) in &leases {
            if let Some(lease) = books.leases.get_mut(id) {
                lease.revoked = Some(reason.clone());
            }
        }
        leases
    }

    pub(super) fn revoked(&self, id: LeaseId) -> Option<Arc<str>> {
        self.lock().leases.get(&id)?.revoked.clone()
    }
}

impl Entry {
    fn is_evictable(&self) -> bool {
        (self.pins == 0 || breaks::is(Break::LeasesIgnored))
            && matches!(self.state, State::Resident { .. })
    }
}
