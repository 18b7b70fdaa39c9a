//! Those who have to know when host memory goes, and what becomes of its addresses.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::units::Bytes;

/// Tells one mapping from every other one of this process, for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MappingId(pub(super) u64);

/// Somebody who has to know when host memory goes: a device that has it pinned.
pub trait MappingObserver: Send + Sync + std::fmt::Debug {
    /// The pages of the range are about to go, or to become others. Nobody uses its bytes now; who registered the range
    /// must undo that before this returns, or have the addresses withheld. Called once, from the thread that is about to change
    /// them.
    fn unmapping(&self, range: MappedRange) -> Unmapping;

    /// The addresses that were to be withheld, once the pages have gone.
    fn withheld(&self, mapping: MappingId, addresses: Arc<Addresses>);
}

/// What becomes of the addresses of memory that goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Unmapping {
    /// The kernel may give them to others.
    Free,
    /// A device has them registered still and can't undo it: nothing may lie there before it has forgotten them.
    Withhold,
}

/// Addresses of this process without memory, which nobody else gets as long as this lives.
#[derive(Debug)]
pub struct Addresses {
    pub(super) start: NonNull<u8>,
    pub(super) len: usize,
    /// The memory that was there.
    pub(super) held: Bytes,
    pub(super) counted: Option<Withheld>,
}

/// Bytes whose addresses are withheld. A device that has them registered keeps their memory as well, although nobody maps it.
#[derive(Clone, Debug, Default)]
pub(in crate::memory) struct Withheld(pub(super) Arc<AtomicU64>);

impl Withheld {
    pub(in crate::memory) fn bytes(&self) -> Bytes {
        Bytes(self.0.load(Ordering::Relaxed))
    }
}

// SAFETY: nobody reads or writes through the pointer; it is only given back.
unsafe impl Send for Addresses {}
// SAFETY: as above.
unsafe impl Sync for Addresses {}

impl Drop for Addresses {
    fn drop(&mut self) {
        if let Some(Withheld(bytes)) = &self.counted {
            bytes.fetch_sub(self.held.get(), Ordering::Relaxed);
        }
        // SAFETY: made in `Mapping::drop` in the place of the mapping, and without access, so that nobody uses it.
        if let Err(error) = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) } {
            tracing::error!(%error, bytes = self.len, "munmap of withheld addresses failed");
        }
    }
}

/// Where the memory of a mapping lies in this process. It stays there until [`MappingObserver::unmapping`], however many
/// slabs use it one after another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappedRange {
    /// Which mapping.
    pub mapping: MappingId,
    /// The address of its first byte.
    pub address: usize,
    /// How long it is: the slab's bytes in whole pages.
    pub bytes: usize,
}
