//! Device memory by the virtual memory API: physical handles mapped at reserved addresses. Large allocations have a
//! handle of their own; small ones share chunks, since a handle is at least 2 MiB.
//!
//! Used by one thread, which has a context current.

use std::collections::BTreeMap;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;

use super::driver::{Driver, Outcome};
use crate::device::Granules;
use crate::units::{Bytes, KIB, MIB};

/// What small allocations are rounded up to: the tensors in them need 256, and fewer different sizes leave fewer holes.
const PART: Bytes = Bytes::kib(4);
/// The share of a GPU's memory that a chunk may take: what is lost to one that is nearly empty is no more than that.
const CHUNK_SHARE: u64 = 1024;
/// No chunk is larger than this.
const LARGEST_CHUNK: u64 = 32 * MIB;
/// Allocations from this share of a chunk on have a handle of their own: with 2 MiB pages and chunks of 32 MiB they
/// waste an eighth at most.
const LARGE: u64 = 2;

/// How this GPU's allocations are rounded up, and the size of its chunks.
pub(super) fn granules(total: u64, page: u64) -> (Granules, u64) {
    let page = page.max(KIB);
    let chunk = (total / CHUNK_SHARE).clamp(page, LARGEST_CHUNK.max(page)) / page * page;
    let granules = Granules {
        page: Bytes(page),
        shared_below: Bytes((chunk / LARGE).max(page)),
        part: PART,
    };
    (granules, chunk)
}

/// Physical memory and where it is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Physical {
    handle: u64,
    address: u64,
    bytes: u64,
}

/// Where an allocation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// A handle of its own.
    Own(u64),
    /// A part of a chunk.
    Part {
        /// Address of the chunk.
        chunk: u64,
        /// Offset in it.
        offset: u64,
        /// Size.
        bytes: u64,
    },
}

impl Place {
    /// The device pointer of the first byte.
    pub(super) const fn address(self) -> u64 {
        match self {
            Self::Own(address) => address,
            Self::Part { chunk, offset, .. } => chunk + offset,
        }
    }
}

#[derive(Debug)]
struct Chunk {
    physical: Physical,
    free: Extents,
}

/// The heap of one GPU.
#[derive(Debug)]
pub(super) struct Heap {
    driver: Arc<Driver>,
    device: i32,
    granules: Granules,
    chunk: u64,
    /// By address.
    own: BTreeMap<u64, Physical>,
    /// By address.
    chunks: BTreeMap<u64, Chunk>,
    /// Descriptors of memory that was exported, by address: the driver takes 30 us for each, the kernel 1 us for a copy.
    exported: BTreeMap<u64, OwnedFd>,
    /// Address ranges whose memory could not be unmapped; the end of the context does it.
    stranded: Vec<(u64, u64)>,
    allocated: u64,
}

impl Heap {
    pub(super) fn new(driver: Arc<Driver>, device: i32, granules: Granules, chunk: u64) -> Self {
        Self {
            driver,
            device,
            granules,
            chunk,
            own: BTreeMap::new(),
            chunks: BTreeMap::new(),
            exported: BTreeMap::new(),
            stranded: Vec::new(),
            allocated: 0,
        }
    }

    /// Bytes of live allocations.
    pub(super) const fn allocated(&self) -> u64 {
        self.allocated
    }

    /// Bytes of chunks that are in no allocation.
    pub(super) fn slack(&self) -> u64 {
        self.chunks.values().map(|chunk| chunk.free.total()).sum()
    }

    /// New memory of exactly this footprint.
    pub(super) fn allocate(&mut self, footprint: u64) -> Outcome<Place> {
        let place = if footprint < self.granules.shared_below.get() {
            self.part(footprint)?
        } else {
            let physical = self.physical(footprint)?;
            self.own.insert(physical.address, physical);
            Place::Own(physical.address)
        };
        self.allocated += footprint;
        Ok(place)
    }

    fn part(&mut self, bytes: u64) -> Outcome<Place> {
        // The fullest first, so that the others may come free.
        let mut candidates: Vec<_> = self.chunks.iter_mut().collect();
        candidates.sort_by_key(|(_, chunk)| chunk.free.total());
        for (address, chunk) in candidates {
            if let Some(offset) = chunk.free.take(bytes) {
                return Ok(Place::Part {
                    chunk: *address,
                    offset,
                    bytes,
                });
            }
        }
        // Where a whole chunk is not to be had, the pages that it takes may be.
        let page = self.granules.page.get();
        let physical = self
            .physical(self.chunk)
            .or_else(|_| self.physical(bytes.next_multiple_of(page)))?;
        let mut free = Extents::whole(physical.bytes);
        let offset = free.take(bytes).unwrap_or(0);
        let chunk = physical.address;
        self.chunks.insert(chunk, Chunk { physical, free });
        Ok(Place::Part {
            chunk,
            offset,
            bytes,
        })
    }

    /// Physical memory, mapped. Nothing is left behind where a step fails.
    fn physical(&self, bytes: u64) -> Outcome<Physical> {
        let driver = &self.driver;
        let handle = driver.create(self.device, bytes)?;
        let placed = driver.place(self.device, handle, bytes, true, |fault| {
            self.undo(Err(fault));
        });
        match placed {
            Ok(address) => Ok(Physical {
                handle,
                address,
                bytes,
            }),
            Err(fault) => {
                self.undo(driver.release(handle));
                Err(fault)
            }
        }
    }

    /// A step back that fails leaves memory behind, which shows as others' use; there is nothing better to do.
    fn undo(&self, outcome: Outcome<()>) {
        match outcome {
            Ok(()) => {}
            // The device is lost, which others report.
            Err(fault) if fault.is_fatal() => {
                tracing::debug!(device = self.device, ?fault, "device memory is lost");
            }
            Err(fault) => {
                tracing::error!(device = self.device, ?fault, "cannot free device memory");
            }
        }
    }

    fn free_physical(&mut self, physical: Physical) {
        // It holds the memory as well.
        self.exported.remove(&physical.address);
        let unmapped = self.driver.unmap(physical.address, physical.bytes);
        self.undo(self.driver.release(physical.handle));
        if unmapped.is_ok() {
            self.undo(self.driver.unreserve(physical.address, physical.bytes));
        } else {
            self.stranded.push((physical.address, physical.bytes));
        }
        self.undo(unmapped);
    }

    /// Frees an allocation. What is already gone is no error: a device that was lost forgets everything.
    pub(super) fn free(&mut self, place: Place) {
        match place {
            Place::Own(address) => {
                if let Some(physical) = self.own.remove(&address) {
                    self.allocated -= physical.bytes;
                    self.free_physical(physical);
                }
            }
            Place::Part {
                chunk: address,
                offset,
                bytes,
            } => {
                let Some(chunk) = self.chunks.get_mut(&address) else {
                    return;
                };
                chunk.free.give(offset, bytes);
                self.allocated -= bytes;
                if chunk.free.total() == chunk.physical.bytes
                    && let Some(chunk) = self.chunks.remove(&address)
                {
                    self.free_physical(chunk.physical);
                }
            }
        }
    }

    /// Frees everything. Gives the address ranges that could not be unmapped, to be given back after the context's end.
    pub(super) fn clear(&mut self) -> Vec<(u64, u64)> {
        let own = std::mem::take(&mut self.own).into_values();
        let chunks = std::mem::take(&mut self.chunks).into_values();
        for physical in own.chain(chunks.map(|chunk| chunk.physical)) {
            self.free_physical(physical);
        }
        self.allocated = 0;
        std::mem::take(&mut self.stranded)
    }

    /// A descriptor of the memory in which an allocation lies, with that memory's size and the offset in it.
    pub(super) fn export(&mut self, place: Place) -> Outcome<Option<(OwnedFd, u64, u64)>> {
        let (physical, offset) = match place {
            Place::Own(address) => (self.own.get(&address), 0),
            Place::Part { chunk, offset, .. } => {
                let chunk = self.chunks.get(&chunk);
                (chunk.map(|chunk| &chunk.physical), offset)
            }
        };
        let Some(physical) = physical else {
            return Ok(None);
        };
        let made = |descriptor| {
            // SAFETY: the driver has just made this descriptor for us.
            unsafe { OwnedFd::from_raw_fd(descriptor) }
        };
        let kept = self.exported.get(&physical.address);
        let descriptor = match kept.and_then(|kept| kept.try_clone().ok()) {
            Some(copy) => copy,
            None => {
                let first = made(self.driver.export(physical.handle)?);
                if let Ok(copy) = first.try_clone() {
                    self.exported.insert(physical.address, copy);
                }
                first
            }
        };
        Ok(Some((descriptor, physical.bytes, offset)))
    }
}

/// The free parts of a chunk, none empty, none touching another: offset and length.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Extents(BTreeMap<u64, u64>);

impl Extents {
    fn whole(bytes: u64) -> Self {
        Self(BTreeMap::from([(0, bytes)]))
    }

    fn total(&self) -> u64 {
        self.0.values().sum()
    }

    /// Takes this many bytes from the smallest part that has them.
    fn take(&mut self, bytes: u64) -> Option<u64> {
        let (&offset, &length) = self
            .0
            .iter()
            .filter(|(_, length)| **length >= bytes)
            .min_by_key(|(_, length)| **length)?;
        self.0.remove(&offset);
        if length > bytes {
            self.0.insert(offset + bytes, length - bytes);
        }
        Some(offset)
    }

    /// Gives a part back, and joins it with its neighbours.
    fn give(&mut self, mut offset: u64, mut bytes: u64) {
        if let Some(behind) = self.0.remove(&(offset + bytes)) {
            bytes += behind;
        }
        if let Some((&before, &length)) = self.0.range(..offset).next_back()
            && before + length == offset
        {
            offset = before;
            bytes += length;
        }
        self.0.insert(offset, bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn chunks_are_a_thousandth_of_the_memory() {
        let (granules_24g, chunk) = granules(24 << 30, 2 << 20);
        assert_eq!(chunk, 24 << 20);
        assert_eq!(granules_24g.shared_below, Bytes::mib(12));
        let (small, chunk) = granules(64 << 20, 2 << 20);
        assert_eq!((chunk, small.shared_below), (2 << 20, Bytes::mib(2)));
        assert_eq!(granules(80 << 30, 2 << 20).1, 32 << 20);
        // What a LoRA of 150 KiB takes, and what a large component takes.
        assert_eq!(granules_24g.footprint(Bytes::kib(150)), Bytes::kib(152));
        assert_eq!(granules_24g.footprint(Bytes::mib(13)), Bytes::mib(14));
    }

    proptest! {
        #[test]
        fn parts_never_overlap_and_all_come_back(
            acts in proptest::collection::vec((1_u64..40, any::<prop::sample::Index>(), any::<bool>()), 1..200)
        ) {
            let mut extents = Extents::whole(256);
            let mut taken: Vec<(u64, u64)> = Vec::new();
            for (bytes, which, give) in acts {
                if give && !taken.is_empty() {
                    let (offset, bytes) = taken.swap_remove(which.index(taken.len()));
                    extents.give(offset, bytes);
                } else if let Some(offset) = extents.take(bytes) {
                    prop_assert!(offset + bytes <= 256);
                    for (other, length) in &taken {
                        prop_assert!(offset + bytes <= *other || other + length <= offset);
                    }
                    taken.push((offset, bytes));
                }
                let used: u64 = taken.iter().map(|(_, bytes)| bytes).sum();
                prop_assert_eq!(extents.total() + used, 256);
            }
            for (offset, bytes) in taken {
                extents.give(offset, bytes);
            }
            prop_assert_eq!(extents, Extents::whole(256));
        }
    }
}
