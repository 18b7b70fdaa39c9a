//! What is asked of the books and what they grant: wants, promises, and pins on what is there.

use std::sync::Arc;

use super::{Charge, Entry, EntryKey, Held, LeaseRow, Ledger, State};
use crate::breaks::{self, Break};
use crate::catalog::Component;
use crate::ids::{ContentId, LeaseId, SessionId, Tier};
use crate::memory::flight::Flight;
use crate::plan::KeepAlive;
use crate::tensor::TensorTable;
use crate::units::Bytes;

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
    pub(super) ledger: Arc<Ledger>,
    pub(super) key: EntryKey,
    pub(super) component: Arc<Component>,
}

/// A component that was evicted, and whose memory is freed when this is dropped.
#[derive(Debug)]
pub struct Evicted {
    /// The component.
    pub component: Arc<Component>,
    /// Its bytes in the tier.
    pub bytes: Bytes,
    pub(super) entry: Entry,
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

    pub(in crate::memory) fn lease_opened(&self, owner: SessionId) -> LeaseId {
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

    pub(in crate::memory) fn lease_closed(&self, id: LeaseId) {
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
