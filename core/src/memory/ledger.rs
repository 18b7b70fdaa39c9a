//! The books: budgets, promises, residencies and their pins, for every tier. Shared by all actors and outliving them;
//! its one lock is held for arithmetic alone.
//!
//! Every byte that hotset may touch is a [`Charge`] against a tier's budget, and returns when the charge is dropped:
//! a reservation holds it first, then the flight, then the memory itself ([`Held`]). So the books never say "free" while
//! the memory still exists, and no path, not even a killed actor, can lose bytes.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use smallvec::SmallVec;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::flight::{Flight, FlightTicket};
use super::lease::Lease;
use super::slab::Slab;
use crate::breaks::{self, Break};
use crate::catalog::Component;
use crate::device::Allocation;
use crate::ids::{ContentId, LeaseId, SessionId, Tier};
use crate::io::Urgency;
use crate::plan::KeepAlive;
use crate::policy::Candidate;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Mutex, MutexGuard};
use crate::tensor::TensorTable;
use crate::units::Bytes;

/// The memory behind a residency.
#[derive(Debug)]
pub enum Memory {
    /// Host memory.
    Host(Arc<Slab>),
    /// Device memory.
    Device(Allocation),
}

/// Memory together with the bytes that it is charged for: when the last holder lets go, first the memory is freed, then
/// the bytes come back.
#[derive(Debug)]
pub struct Held {
    // The order of the fields is the order of their drops.
    memory: Memory,
    charge: Arc<Charge>,
}

impl Held {
    pub(super) fn new(memory: Memory, mut charge: Charge) -> Self {
        if breaks::is(Break::FreedTooEarly) && matches!(memory, Memory::Device(_)) {
            drop(charge.split());
        }
        let charge = Arc::new(charge);
        // A device frees later than it is told to; the bytes come back when it has.
        if let Memory::Device(allocation) = &memory {
            allocation.keep_until_freed(Box::new(charge.clone()));
        }
        Self { memory, charge }
    }

    /// The memory.
    #[must_use]
    pub const fn memory(&self) -> &Memory {
        &self.memory
    }
}

/// Bytes of a tier's budget, given back when this is dropped.
#[derive(Debug)]
pub struct Charge {
    ledger: Arc<Ledger>,
    tier: Tier,
    bytes: Bytes,
    /// Its memory was evicted and is about to be freed.
    evicting: AtomicBool,
}

impl Charge {
    /// How many.
    #[must_use]
    pub const fn bytes(&self) -> Bytes {
        self.bytes
    }
}

impl Charge {
    /// All its bytes as another charge, so that nothing is left here.
    fn split(&mut self) -> Self {
        Self {
            ledger: self.ledger.clone(),
            tier: self.tier,
            bytes: std::mem::take(&mut self.bytes),
            evicting: AtomicBool::new(false),
        }
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        let mut books = self.ledger.lock();
        if let Some(tier) = books.tiers.get_mut(&self.tier) {
            debug_assert!(tier.committed >= self.bytes, "more returned than charged");
            tier.committed = tier.committed.saturating_sub(self.bytes);
            if self.evicting.load(Ordering::Relaxed) {
                tier.evicting = tier.evicting.saturating_sub(self.bytes);
            }
            tier.wake_if_wanted();
        }
    }
}

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
    loading_since: Duration,
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

/// What a reservation asks for.
#[derive(Debug, Clone)]
pub enum Want {
    /// This component, which takes this many bytes of the tier.
    Component(Arc<Component>, Bytes),
    /// Memory that belongs to no component, such as the ring through which a large one is streamed.
    Scratch(Bytes),
}

impl Want {
    /// What it takes.
    #[must_use]
    pub const fn bytes(&self) -> Bytes {
        match self {
            Self::Component(_, bytes) | Self::Scratch(bytes) => *bytes,
        }
    }

    /// Which bytes it is about, where it is about a component.
    #[must_use]
    pub fn content(&self) -> Option<ContentId> {
        match self {
            Self::Component(component, _) => Some(component.content_id),
            Self::Scratch(_) => None,
        }
    }
}

/// Bytes that are missing now, but could come back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shortfall {
    /// What the set needs beyond what is resident or promised already.
    pub needed: Bytes,
    /// What is free.
    pub free: Bytes,
    /// What is evicted already and about to be freed.
    pub evicting: Bytes,
    /// What could be freed at once, since nobody holds it; without the components that the set itself wants.
    pub evictable: Bytes,
}

impl Shortfall {
    /// What has to be evicted beyond what is about to be freed anyhow.
    #[must_use]
    pub const fn missing(&self) -> Bytes {
        self.needed
            .saturating_sub(self.free)
            .saturating_sub(self.evicting)
    }
}

/// Why a reservation can never be granted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Never {
    /// The set is larger than the budget.
    #[error("{tier} has a budget of {budget}, and the set needs {needed}")]
    TooLarge {
        /// The tier.
        tier: Tier,
        /// What the whole set takes there.
        needed: Bytes,
        /// What hotset may use there.
        budget: Bytes,
    },
    /// The tier does not exist or no longer works.
    #[error("{tier} is out of service: {reason}")]
    OutOfService {
        /// The tier.
        tier: Tier,
        /// Why.
        reason: Arc<str>,
    },
}

/// What [`Ledger::reserve`] found.
#[derive(Debug)]
pub enum Reserved {
    /// Granted.
    Granted(Reservation),
    /// Not now.
    Short(Shortfall),
}

/// Bytes promised in one tier for one set: a claim on each component, and scratch memory where it was asked for.
/// Dropping it gives everything back that nobody else claims.
#[derive(Debug)]
pub struct Reservation {
    /// One claim for each component, in the order of the wants.
    pub claims: Vec<Claim>,
    /// The scratch memory.
    pub scratch: Option<Charge>,
}

/// A pin on one component in one tier: while it lives, the component's bytes there are not evicted, or, where they are
/// still to come, their promise stands.
#[derive(Debug)]
pub struct Claim {
    ledger: Arc<Ledger>,
    key: EntryKey,
    component: Arc<Component>,
}

/// A component that was evicted, and whose memory is freed when this is dropped.
#[derive(Debug)]
pub struct Evicted {
    /// The component.
    pub component: Arc<Component>,
    /// Its bytes in the tier.
    pub bytes: Bytes,
    entry: Entry,
}

impl Evicted {
    /// Whether it was loaded on a guess and never used.
    #[must_use]
    pub const fn prefetched(&self) -> bool {
        self.entry.prefetched
    }
}

/// How a claimed component is there.
#[derive(Debug)]
pub enum ResidencyState {
    /// It is not: the load failed, and the promise is gone.
    Absent,
    /// On its way, or about to be.
    Loading(Arc<Flight>),
    /// There.
    Resident {
        /// The memory.
        held: Arc<Held>,
        /// The tensors in it.
        table: Arc<TensorTable>,
    },
}

impl Claim {
    /// The component.
    #[must_use]
    pub const fn component(&self) -> &Arc<Component> {
        &self.component
    }

    /// The tier.
    #[must_use]
    pub const fn tier(&self) -> Tier {
        self.key.tier
    }

    /// The ledger that keeps it.
    #[must_use]
    pub const fn ledger(&self) -> &Arc<Ledger> {
        &self.ledger
    }

    /// How the component is there now.
    #[must_use]
    pub fn state(&self) -> ResidencyState {
        let books = self.ledger.lock();
        match books.entry(&self.key).map(|entry| &entry.state) {
            None => ResidencyState::Absent,
            Some(State::Reserved { flight, .. } | State::Loading { flight }) => {
                ResidencyState::Loading(flight.clone())
            }
            Some(State::Resident { held, table }) => ResidencyState::Resident {
                held: held.clone(),
                table: table.clone(),
            },
        }
    }

    pub(super) fn lease_opened(&self, owner: SessionId) -> LeaseId {
        let mut books = self.ledger.lock();
        let id = LeaseId(books.next_lease);
        books.next_lease += 1;
        // It was forgotten after the claim was looked at: its tier is lost.
        let gone = books.entry(&self.key).is_none();
        let revoked = gone.then(|| "its memory is lost".into());
        books.leases.insert(
            id,
            LeaseRow {
                owner,
                key: self.key,
                bytes: self.component.bytes,
                revoked,
            },
        );
        if let Some(entry) = books.entry_mut(&self.key) {
            entry.leases += 1;
        }
        id
    }

    pub(super) fn lease_closed(&self, id: LeaseId) {
        let mut books = self.ledger.lock();
        books.leases.remove(&id);
        if let Some(entry) = books.entry_mut(&self.key) {
            entry.leases -= 1;
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if breaks::is(Break::LostRelease) {
            return;
        }
        let gone = {
            let mut books = self.ledger.lock();
            let Some(tier) = books.tiers.get_mut(&self.key.tier) else {
                return;
            };
            let Some(entry) = tier.entries.get_mut(&self.key.number) else {
                return;
            };
            entry.pins -= 1;
            let mut gone = None;
            if entry.pins == 0 {
                match &entry.state {
                    // Nobody has begun, nobody waits: the promise ends.
                    State::Reserved { .. } => gone = tier.remove(self.key.number),
                    State::Loading { flight } => flight.cancel(),
                    State::Resident { .. } => {
                        if entry.keep_alive == KeepAlive::Unlimited {
                            tier.wake_if_wanted();
                        } else {
                            entry.released = self.ledger.now();
                            tier.wake.notify_one();
                        }
                    }
                }
            }
            gone
        };
        // The charge inside gives its bytes back under the lock, so it is dropped outside of it.
        drop(gone);
    }
}

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
    /// How long its load took.
    pub load_time: Option<Duration>,
    /// Loaded on a guess, and never asked for since.
    pub prefetched: bool,
}

impl ResidencyView {
    /// The residency as a candidate for eviction, as if no other tier had it. Restoring it is taken to last as long as its load did.
    #[must_use]
    pub fn candidate(&self) -> Candidate {
        Candidate {
            content: self.component.content_id,
            bytes: self.bytes,
            admitted: self.admitted,
            last_used: self.last_used,
            uses: self.uses,
            restore_s: self.load_time.unwrap_or_default().as_secs_f64(),
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

impl TierView {
    /// Bytes that are not promised.
    #[must_use]
    pub const fn free(&self) -> Bytes {
        self.budget.saturating_sub(self.committed)
    }
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
                        loading_since: now,
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

    /// What these wants need in this tier beyond what is there or promised.
    #[must_use]
    pub fn needed(&self, tier: Tier, wants: &[Want]) -> Bytes {
        let books = self.lock();
        books
            .tiers
            .get(&tier)
            .map_or(Bytes(u64::MAX), |open| open.need(wants).new)
    }

    /// Claims on all these components, if each of them is resident in this tier: the fast path, without a promise. `None` too
    /// where they are for a session that [must wait](Self::must_wait).
    #[must_use]
    pub fn claim_resident(
        self: &Arc<Self>,
        tier: Tier,
        components: &[Arc<Component>],
        session: Option<SessionId>,
    ) -> Option<Vec<Claim>> {
        let now = self.now();
        let mut books = self.lock();
        if session.is_some_and(|session| books.must_wait(tier, session)) {
            return None;
        }
        let open = books.tiers.get_mut(&tier)?;
        if open.out_of_service.is_some() {
            return None;
        }
        let resident = |component: &Arc<Component>| {
            open.entry(&component.content_id)
                .is_some_and(|entry| matches!(entry.state, State::Resident { .. }))
        };
        if !components.iter().all(resident) {
            return None;
        }
        components
            .iter()
            .map(|component| {
                let entry = open.entry_mut(&component.content_id)?;
                entry.pins += 1;
                entry.uses += 1;
                entry.last_used = now;
                entry.prefetched = false;
                Some(Claim {
                    ledger: self.clone(),
                    key: EntryKey {
                        tier,
                        number: entry.number,
                    },
                    component: component.clone(),
                })
            })
            .collect()
    }

    /// Leases on all these components, if each of them is resident in this tier: the whole way at once, for a set that costs
    /// nobody anything.
    #[must_use]
    pub fn lease_resident(
        self: &Arc<Self>,
        tier: Tier,
        components: &[Arc<Component>],
        session: SessionId,
        keep_alive: KeepAlive,
    ) -> Option<Vec<Lease>> {
        let now = self.now();
        let mut guard = self.lock();
        let books = &mut *guard;
        if books.must_wait(tier, session) {
            return None;
        }
        let open = books.tiers.get_mut(&tier)?;
        if open.out_of_service.is_some() {
            return None;
        }
        let mut found: SmallVec<[Found; 8]> = SmallVec::new();
        for component in components {
            let entry = open.entry(&component.content_id)?;
            let State::Resident { held, table } = &entry.state else {
                return None;
            };
            found.push((entry.number, held.clone(), table.clone()));
        }
        let mut leases = Vec::with_capacity(components.len());
        for ((number, held, table), component) in found.into_iter().zip(components) {
            if let Some(entry) = open.entries.get_mut(&number) {
                entry.pins += 1;
                entry.leases += 1;
                entry.uses += 1;
                entry.last_used = now;
                entry.prefetched = false;
                entry.keep_alive = keep_alive;
            }
            let id = LeaseId(books.next_lease);
            books.next_lease += 1;
            let row = LeaseRow {
                owner: session,
                key: EntryKey { tier, number },
                bytes: component.bytes,
                revoked: None,
            };
            books.leases.insert(id, row);
            let claim = Claim {
                ledger: self.clone(),
                key: EntryKey { tier, number },
                component: component.clone(),
            };
            leases.push(Lease::opened(id, session, claim, held, table));
        }
        Some(leases)
    }

    /// The budget of a tier.
    #[must_use]
    pub fn budget(&self, tier: Tier) -> Option<Bytes> {
        Some(self.lock().tiers.get(&tier)?.budget)
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
        entry.loading_since = now;
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
                loading_since: now,
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
            entry.load_time = Some(now.saturating_sub(entry.loading_since));
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

    /// The place in the queue of the first set that waits for memory in a tier, for those that could give way to it.
    pub fn set_first_waiting(&self, tier: Tier, place: Option<Duration>) {
        if let Some(books) = self.lock().tiers.get_mut(&tier) {
            books.first_waiting = place;
        }
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

#[cfg(all(test, feature = "models"))]
mod models;
#[cfg(test)]
mod tests;
