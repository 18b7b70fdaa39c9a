//! The fast path: what is asked for is there.

use std::sync::Arc;

use smallvec::SmallVec;

use super::{Claim, EntryKey, Found, LeaseRow, Ledger, State};
use crate::catalog::Component;
use crate::ids::{LeaseId, SessionId, Tier};
use crate::memory::lease::Lease;
use crate::plan::KeepAlive;

impl Ledger {
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
}
