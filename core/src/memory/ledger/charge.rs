//! Bytes of a budget, and the memory that they stand for.

use std::sync::Arc;

use super::Ledger;
use crate::breaks::{self, Break};
use crate::device::Allocation;
use crate::ids::Tier;
use crate::memory::slab::Slab;
use crate::sync::atomic::{AtomicBool, Ordering};
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
    pub(super) charge: Arc<Charge>,
}

impl Held {
    pub(in crate::memory) fn new(memory: Memory, mut charge: Charge) -> Self {
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
    pub(super) ledger: Arc<Ledger>,
    pub(super) tier: Tier,
    pub(super) bytes: Bytes,
    /// Its memory was evicted and is about to be freed.
    pub(super) evicting: AtomicBool,
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
