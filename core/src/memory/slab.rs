//! Host memory of one component: a memfd, mapped once by the owner, mapped read-only by whoever leases it.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

use crate::units::Bytes;

/// Why host memory could not be had or shared.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SlabError {
    /// The system refused the memory.
    #[error(
        "cannot get {bytes} of shared memory ({step}: {error}); lower ram.budget or free host memory"
    )]
    Allocate {
        /// How much was wanted.
        bytes: Bytes,
        /// The call that failed.
        step: &'static str,
        /// What the system said.
        error: rustix::io::Errno,
    },
    /// The finished slab could not be made read-only.
    #[error("cannot seal a slab of {bytes}: {error}")]
    Seal {
        /// The slab's size.
        bytes: Bytes,
        /// What the system said.
        error: rustix::io::Errno,
    },
    /// The slab was sealed before all its bytes were there.
    #[error("a slab of {bytes} was closed with only {filled} filled")]
    Incomplete {
        /// The slab's size.
        bytes: Bytes,
        /// What is there.
        filled: Bytes,
    },
    /// A read-only descriptor could not be opened.
    #[error("cannot open a read-only descriptor of a slab: {error}; is /proc mounted?")]
    Reopen {
        /// What the system said.
        error: rustix::io::Errno,
    },
}

/// Tells one mapping from every other one of this process, for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MappingId(u64);

/// Where host memory lies in this process, until [`MappingObserver::unmapping`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappedRange {
    /// Which mapping.
    pub mapping: MappingId,
    /// The address of its first byte.
    pub address: usize,
    /// How long it is.
    pub bytes: usize,
}

/// Somebody who has to know when host memory goes: a device that has it pinned.
pub trait MappingObserver: Send + Sync + std::fmt::Debug {
    /// The range is about to be unmapped. Nobody uses its bytes any more; when this returns, its addresses may be anything.
    fn unmapping(&self, range: MappedRange);
}

/// Mappings made in this process so far. Only used to tell them apart.
static MAPPINGS: AtomicU64 = AtomicU64::new(0);

/// Host memory that holds one component's image. Bytes below the watermark never change again, so readers may follow
/// the [`SlabWriter`] while it still writes above it.
#[derive(Debug)]
pub struct Slab {
    start: NonNull<u8>,
    bytes: usize,
    /// The watermark: everything below is written and stays as it is. Stored with release, loaded with acquire.
    filled: AtomicUsize,
    memfd: OwnedFd,
    id: MappingId,
    /// One for each device that has the memory pinned.
    observers: Mutex<Vec<Arc<dyn MappingObserver>>>,
}

// SAFETY: the mapping is owned by the slab for its whole life and not tied to a thread. Shared access goes through
// `filled`, which hands out only bytes below the watermark; the one `SlabWriter` writes only above it.
unsafe impl Send for Slab {}
// SAFETY: as above.
unsafe impl Sync for Slab {}

impl Slab {
    /// New memory of this many bytes, all zero, with its one writer. A slab of zero bytes is one page long.
    ///
    /// # Errors
    /// [`SlabError::Allocate`] where the system has no more memory or descriptors.
    pub fn create(label: &str, bytes: Bytes) -> Result<SlabWriter, SlabError> {
        let refused = |step| move |error| SlabError::Allocate { bytes, step, error };
        let len = usize::try_from(bytes.get().max(1))
            .map_err(|_| refused("size")(rustix::io::Errno::NOMEM))?;
        let memfd =
            rustix::fs::memfd_create(label, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
                .map_err(refused("memfd_create"))?;
        rustix::fs::ftruncate(&memfd, len as u64).map_err(refused("ftruncate"))?;
        // SAFETY: a fresh mapping at an address of the kernel's choice, of a memfd that nobody else knows yet and that
        // can no longer shrink once sealed; it is unmapped in `drop` alone.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &memfd,
                0,
            )
        }
        .map_err(refused("mmap"))?;
        // Sealed against shrinking from the first byte on: nothing can pull pages away under a reader.
        let slab = Self {
            start: NonNull::new(start.cast())
                .ok_or_else(|| refused("mmap")(rustix::io::Errno::NOMEM))?,
            bytes: len,
            filled: AtomicUsize::new(0),
            memfd,
            id: MappingId(MAPPINGS.fetch_add(1, Ordering::Relaxed)),
            observers: Mutex::default(),
        };
        rustix::fs::fcntl_add_seals(&slab.memfd, SealFlags::SHRINK | SealFlags::GROW)
            .map_err(refused("seal"))?;
        Ok(SlabWriter {
            slab: Arc::new(slab),
            wanted: usize::try_from(bytes.get()).unwrap_or(len),
        })
    }

    /// The size.
    #[must_use]
    pub fn bytes(&self) -> Bytes {
        Bytes(self.bytes as u64)
    }

    /// The bytes below the watermark. They never change again.
    #[must_use]
    pub fn filled(&self) -> &[u8] {
        let filled = self.filled.load(Ordering::Acquire);
        // SAFETY: the mapping is live as long as `self`, `filled` never exceeds its length, and the only writer has
        // finished with these bytes before it raised the watermark (release/acquire).
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), filled) }
    }

    /// Where it lies in this process.
    #[must_use]
    pub fn range(&self) -> MappedRange {
        MappedRange {
            mapping: self.id,
            address: self.start.as_ptr() as usize,
            bytes: self.bytes,
        }
    }

    /// The memfd itself; writable, so for the owner only.
    #[must_use]
    pub fn memfd(&self) -> BorrowedFd<'_> {
        self.memfd.as_fd()
    }

    /// A descriptor through which another process can map the bytes, but never write them.
    ///
    /// # Errors
    /// [`SlabError::Reopen`] where `/proc` is missing or descriptors ran out.
    pub fn read_only_descriptor(&self) -> Result<OwnedFd, SlabError> {
        use std::os::fd::AsRawFd;
        let path = format!("/proc/self/fd/{}", self.memfd.as_raw_fd());
        File::open(path)
            .map(OwnedFd::from)
            .map_err(|error| SlabError::Reopen {
                error: rustix::io::Errno::from_io_error(&error).unwrap_or(rustix::io::Errno::NOENT),
            })
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        let range = self.range();
        let observers = self.observers.get_mut();
        for observer in observers.unwrap_or_else(PoisonError::into_inner).drain(..) {
            observer.unmapping(range);
        }
        // SAFETY: this is the mapping made in `create`, and no borrow of it can outlive the slab.
        let unmapped = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.bytes) };
        if let Err(error) = unmapped {
            tracing::error!(%error, bytes = self.bytes, "munmap of a slab failed");
        }
    }
}

/// The one writer of a [`Slab`]. Fills it from the start to the end.
#[derive(Debug)]
pub struct SlabWriter {
    slab: Arc<Slab>,
    /// What `create` was asked for; the slab itself may be a byte longer.
    wanted: usize,
}

impl SlabWriter {
    /// The slab, for those who follow its watermark.
    #[must_use]
    pub fn slab(&self) -> &Arc<Slab> {
        &self.slab
    }

    /// How many bytes are written.
    #[must_use]
    pub fn filled(&self) -> Bytes {
        Bytes(self.slab.filled.load(Ordering::Relaxed) as u64)
    }

    /// The bytes that are still to be written, from the watermark to the end.
    pub fn spare(&mut self) -> &mut [u8] {
        let filled = self.slab.filled.load(Ordering::Relaxed);
        // SAFETY: only this writer touches bytes at or above the watermark, it is unique and borrowed mutably, and
        // `filled <= wanted <= bytes` of a live mapping.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.slab.start.as_ptr().add(filled),
                self.wanted - filled,
            )
        }
    }

    /// Raises the watermark by `bytes`, which the caller has just written at the start of [`spare`](Self::spare).
    ///
    /// # Panics
    /// If that would pass the end.
    pub fn advance(&mut self, bytes: usize) {
        let filled = self.slab.filled.load(Ordering::Relaxed);
        assert!(
            bytes <= self.wanted - filled,
            "watermark past the end of a slab"
        );
        self.slab.filled.store(filled + bytes, Ordering::Release);
    }

    /// Ends writing for good: from here on nobody can write the slab, not even through the descriptor, except by this
    /// process's own mapping, which no safe code can reach any more.
    ///
    /// # Errors
    /// [`SlabError::Incomplete`] where bytes are missing, [`SlabError::Seal`] where the system refuses.
    pub fn seal(self) -> Result<Arc<Slab>, SlabError> {
        let filled = self.filled();
        if filled.get() != self.wanted as u64 {
            return Err(SlabError::Incomplete {
                bytes: Bytes(self.wanted as u64),
                filled,
            });
        }
        // Plain WRITE would fail with EBUSY while the owner's own writable mapping lives.
        rustix::fs::fcntl_add_seals(&self.slab.memfd, SealFlags::FUTURE_WRITE | SealFlags::SEAL)
            .map_err(|error| SlabError::Seal {
                bytes: self.slab.bytes(),
                error,
            })?;
        Ok(self.slab)
    }

    /// Starts again from the first byte, for memory that is used over and over as a stage.
    ///
    /// # Errors
    /// The writer itself, unchanged, while somebody else still holds the slab.
    pub fn rewind(self) -> Result<Self, Self> {
        if Arc::strong_count(&self.slab) == 1 {
            // No other handle exists and none can appear, since this one is owned.
            self.slab.filled.store(0, Ordering::Release);
            Ok(self)
        } else {
            Err(self)
        }
    }
}

/// Some filled bytes of a slab, which stay alive as long as this does: the source of an upload.
#[derive(Clone, Debug)]
pub struct HostRange {
    slab: Arc<Slab>,
    start: usize,
    end: usize,
}

impl HostRange {
    /// The bytes from `start` to `end`. `None` where they are not all below the watermark.
    #[must_use]
    pub fn new(slab: Arc<Slab>, start: u64, end: u64) -> Option<Self> {
        let (start, end) = (usize::try_from(start).ok()?, usize::try_from(end).ok()?);
        (start <= end && end <= slab.filled().len()).then_some(Self { slab, start, end })
    }

    /// The bytes.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        &self.slab.filled()[self.start..self.end]
    }

    /// How many there are.
    #[must_use]
    pub fn bytes(&self) -> Bytes {
        Bytes((self.end - self.start) as u64)
    }

    /// The mapping that they lie in.
    #[must_use]
    pub fn mapping(&self) -> MappedRange {
        self.slab.range()
    }

    /// Tells `observer` before that mapping goes.
    pub fn observe(&self, observer: Arc<dyn MappingObserver>) {
        let observers = self.slab.observers.lock();
        observers
            .unwrap_or_else(PoisonError::into_inner)
            .push(observer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek, SeekFrom, Write};

    fn filled_slab(contents: &[u8]) -> Arc<Slab> {
        let mut writer = Slab::create("test", Bytes(contents.len() as u64)).unwrap();
        writer.spare().copy_from_slice(contents);
        writer.advance(contents.len());
        writer.seal().unwrap()
    }

    #[test]
    fn readers_see_what_is_below_the_watermark_only() {
        let mut writer = Slab::create("test", Bytes(10)).unwrap();
        let slab = writer.slab().clone();
        assert!(slab.filled().is_empty());
        writer.spare()[..4].copy_from_slice(b"abcd");
        writer.advance(4);
        assert_eq!(slab.filled(), b"abcd");
        assert!(HostRange::new(slab.clone(), 2, 5).is_none());
        assert_eq!(HostRange::new(slab, 2, 4).unwrap().as_slice(), b"cd");
    }

    #[test]
    fn an_unfinished_slab_cannot_be_sealed() {
        let mut writer = Slab::create("test", Bytes(10)).unwrap();
        writer.advance(9);
        assert_eq!(
            writer.seal().unwrap_err(),
            SlabError::Incomplete {
                bytes: Bytes(10),
                filled: Bytes(9)
            }
        );
    }

    #[test]
    fn a_shared_descriptor_reads_and_never_writes() {
        let slab = filled_slab(b"weights");
        let mut file = File::from(slab.read_only_descriptor().unwrap());
        let mut read = Vec::new();
        file.read_to_end(&mut read).unwrap();
        assert_eq!(read, b"weights");
        file.seek(SeekFrom::Start(0)).unwrap();
        assert!(file.write_all(b"x").is_err());
        // The owner's own descriptor is sealed as well.
        let mut own = File::from(slab.memfd().try_clone_to_owned().unwrap());
        assert!(own.write_all(b"x").is_err());
        assert!(own.set_len(1).is_err());
        assert_eq!(slab.filled(), b"weights");
    }

    #[test]
    fn an_empty_component_is_a_slab_too() {
        let slab = Slab::create("test", Bytes::ZERO).unwrap().seal().unwrap();
        assert!(slab.filled().is_empty());
    }

    #[test]
    fn a_stage_is_reused_only_when_nobody_looks() {
        let mut writer = Slab::create("stage", Bytes(4)).unwrap();
        writer.advance(4);
        let reader = writer.slab().clone();
        let writer = writer.rewind().unwrap_err();
        drop(reader);
        assert_eq!(writer.rewind().unwrap().filled(), Bytes::ZERO);
    }
}
