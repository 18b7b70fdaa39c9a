//! Host memory of one component: a memfd, mapped once by the owner, mapped read-only by whoever leases it.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use super::arena::Home;
use super::frozen::MemoryIdentity;
use super::mapping::{MappedRange, Mapping, MappingObserver, Pages};
use super::writer::SlabWriter;
use crate::sync::atomic::{AtomicUsize, Ordering};
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
    /// The machine has no room for it, whatever the budget says.
    #[error(
        "the machine has {room} for {bytes}, beside {reserve} that stay free; end what else uses memory, or lower ram.budget"
    )]
    NoRoom {
        /// How much was wanted.
        bytes: Bytes,
        /// How much there is, less what is kept free.
        room: Bytes,
        /// What is kept free.
        reserve: Bytes,
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

/// Host memory that holds one component's image. Bytes below the watermark never change again, so readers may follow
/// the [`SlabWriter`] while it still writes above it.
///
/// When the last handle is gone, the memory goes back to the [`Arena`](super::Arena) that it came from.
#[derive(Debug)]
pub struct Slab {
    /// `None` only while it is dropped.
    mapping: Option<Mapping>,
    bytes: usize,
    /// The watermark: everything below is written and stays as it is. Stored with release, loaded with acquire.
    pub(super) filled: AtomicUsize,
    home: Option<Home>,
}

impl Slab {
    /// New memory of this many bytes that belongs to no arena, with its one writer.
    ///
    /// # Errors
    /// [`SlabError::Allocate`] where the system has no more memory or descriptors.
    pub fn create(label: &str, bytes: Bytes) -> Result<SlabWriter, SlabError> {
        let len = usize::try_from(bytes.get().max(1)).map_err(|_| SlabError::Allocate {
            bytes,
            step: "size",
            error: rustix::io::Errno::NOMEM,
        })?;
        let len = len.next_multiple_of(Pages::Small.granule() as usize);
        let mut mapping = Mapping::create(label, len, Pages::Small)?;
        mapping.fit(bytes.get() as usize);
        Ok(Self::on(mapping, bytes.get() as usize, None))
    }

    /// A slab on memory that nobody can write any more, this process included.
    pub(super) fn adopted(mapping: Mapping, bytes: Bytes) -> Arc<Self> {
        let bytes = (bytes.get() as usize).min(mapping.len());
        Arc::new(Self {
            mapping: Some(mapping),
            bytes,
            filled: AtomicUsize::new(bytes),
            home: None,
        })
    }

    /// A slab of `bytes` on a mapping that was made to fit.
    pub(super) fn on(mapping: Mapping, bytes: usize, home: Option<Home>) -> SlabWriter {
        debug_assert!(bytes <= mapping.len());
        SlabWriter::new(Arc::new(Self {
            mapping: Some(mapping),
            bytes,
            filled: AtomicUsize::new(0),
            home,
        }))
    }

    pub(super) fn mapping(&self) -> &Mapping {
        // Taken in `drop` alone, after which nobody can call this.
        match &self.mapping {
            Some(mapping) => mapping,
            None => unreachable!("a slab that is used while it is dropped"),
        }
    }

    /// The size of the image.
    #[must_use]
    pub const fn bytes(&self) -> Bytes {
        Bytes(self.bytes as u64)
    }

    /// The memory that it takes of the machine: its image in whole pages.
    #[must_use]
    pub fn held(&self) -> Bytes {
        self.mapping().held()
    }

    /// The memory that it still needs, as far as it is not there.
    pub(super) fn unfilled(&self) -> Bytes {
        let there = self.filled().len().max(self.mapping().present());
        Bytes(self.bytes.saturating_sub(there) as u64)
    }

    /// The pages that it lies on.
    #[must_use]
    pub fn pages(&self) -> Pages {
        self.mapping().pages()
    }

    /// Where it lies in this process: its bytes are the first of this range, which outlives the slab. A device that
    /// registers the range once finds later slabs of its size registered already; see
    /// [`MappingObserver`](super::MappingObserver) for when it ends.
    #[must_use]
    pub fn range(&self) -> MappedRange {
        self.mapping().range()
    }

    /// The bytes below the watermark. They never change again.
    #[must_use]
    pub fn filled(&self) -> &[u8] {
        let filled = self.filled.load(Ordering::Acquire);
        // SAFETY: the mapping is live as long as `self`, `filled` never exceeds its length, and the only writer has
        // finished with these bytes before it raised the watermark (release/acquire).
        unsafe { std::slice::from_raw_parts(self.mapping().start().as_ptr(), filled) }
    }

    /// Which memory it is, to tell whether what another process maps is this. `None` where the system does not say.
    #[must_use]
    pub fn identity(&self) -> Option<MemoryIdentity> {
        MemoryIdentity::of(self.memfd())
            .ok()
            .map(|(identity, _)| identity)
    }

    /// The memfd itself; writable, so for the owner only.
    #[must_use]
    pub fn memfd(&self) -> BorrowedFd<'_> {
        self.mapping().memfd()
    }

    /// A descriptor through which another process can map the bytes, but never write them. From the first one on, the
    /// kernel refuses every new writer, this process included.
    ///
    /// # Errors
    /// [`SlabError::Reopen`] where `/proc` is missing or descriptors ran out, [`SlabError::Seal`] where the system
    /// refuses.
    pub fn read_only_descriptor(&self) -> Result<OwnedFd, SlabError> {
        self.mapping().share()
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        if let Some(mapping) = self.mapping.take() {
            mapping.is_present(*self.filled.get_mut());
            match &self.home {
                Some(home) => home.take_back(mapping),
                None => drop(mapping),
            }
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

    /// Tells `observer` before the pages of that mapping go.
    pub fn observe(&self, observer: Arc<dyn MappingObserver>) {
        self.slab.mapping().observe(observer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
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
        // The file is as long as whole pages are.
        assert_eq!(&read[..7], b"weights");
        assert!(read[7..].iter().all(|byte| *byte == 0));
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
