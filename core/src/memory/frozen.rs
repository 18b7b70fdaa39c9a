//! Memory that another process offers: a slab of a server that is gone, which its clients still map.
//!
//! Whoever offers it may lie about everything, so nothing is believed but the kernel: once `F_SEAL_WRITE` is added, nobody
//! can ever write the memory again, and adding it fails as long as anybody still could, through a mapping or a page that
//! is in use by a device. What the memory *holds* is a question for [`io`](crate::io); it can be asked once and for all,
//! since the answer no longer changes.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{SealFlags, SeekFrom};
use rustix::io::Errno;

use super::mapping::{Mapping, Pages};
use super::slab::Slab;
use crate::units::Bytes;

/// `statfs(2)`: the file systems behind a memfd.
const TMPFS: i64 = 0x0102_1994;
const HUGETLBFS: i64 = 0x9584_58f6_u32 as i64;

/// Why offered memory cannot be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrozenError {
    /// It is no memory of a hotset server.
    #[error("it is no sealed memory file")]
    NoSlab,
    /// Somebody may still write it, or it cannot be shown that nobody may.
    #[error("others may still write it ({0})")]
    Writable(Errno),
    /// It has another length.
    #[error("it has {there}, and {needed} are needed")]
    Short {
        /// What is there.
        there: Bytes,
        /// What was looked for.
        needed: Bytes,
    },
    /// Some of it was never written.
    #[error("it has a hole")]
    Hole,
    /// It cannot be mapped.
    #[error("it cannot be mapped: {0}")]
    Map(Errno),
}

impl FrozenError {
    /// Whether it may be gone in a moment: what a process had in use may be let go after its death.
    #[must_use]
    pub const fn is_passing(&self) -> bool {
        matches!(self, Self::Writable(Errno::BUSY))
    }
}

/// Which memory file, for as long as it exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MemoryIdentity {
    device: u64,
    inode: u64,
}

impl MemoryIdentity {
    /// The identity of the file behind a descriptor.
    pub(super) fn of(descriptor: impl AsFd) -> Result<(Self, Bytes), Errno> {
        let stat = rustix::fs::fstat(descriptor)?;
        let identity = Self {
            device: stat.st_dev,
            inode: stat.st_ino,
        };
        // Its length has room for larger slabs; what is taken is what has pages.
        let blocks = u64::try_from(stat.st_blocks).unwrap_or(0);
        Ok((identity, Bytes(blocks.saturating_mul(512))))
    }
}

/// Offered memory, looked at but not yet frozen: how much it is, and which.
#[derive(Debug)]
pub struct OfferedMemory {
    descriptor: OwnedFd,
    identity: MemoryIdentity,
    held: Bytes,
}

impl OfferedMemory {
    /// Looks at a descriptor that somebody sent.
    ///
    /// # Errors
    /// [`FrozenError::NoSlab`].
    pub fn new(descriptor: OwnedFd) -> Result<Self, FrozenError> {
        let wanted = SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE;
        let seals = rustix::fs::fcntl_get_seals(&descriptor).map_err(|_| FrozenError::NoSlab)?;
        if !seals.contains(wanted) {
            return Err(FrozenError::NoSlab);
        }
        let (identity, held) = MemoryIdentity::of(&descriptor).map_err(|_| FrozenError::NoSlab)?;
        Ok(Self {
            descriptor,
            identity,
            held,
        })
    }

    /// Which memory it is.
    #[must_use]
    pub const fn identity(&self) -> MemoryIdentity {
        self.identity
    }

    /// The memory that it takes of the machine.
    #[must_use]
    pub const fn held(&self) -> Bytes {
        self.held
    }

    /// Makes sure that nobody can write it any more, and maps the first `bytes` of it. May wait for pages that are in use: call it
    /// where blocking is allowed.
    ///
    /// # Errors
    /// [`FrozenError`]; then the memory is as it was.
    pub fn freeze(&self, bytes: Bytes) -> Result<FrozenSlab, FrozenError> {
        let stat = rustix::fs::fstat(&self.descriptor).map_err(FrozenError::Map)?;
        let there = Bytes(u64::try_from(stat.st_size).unwrap_or(0));
        if there < bytes || bytes.is_zero() {
            return Err(FrozenError::Short {
                there,
                needed: bytes,
            });
        }
        self.seal()?;
        let pages = self.pages(bytes, there)?;
        let len = usize::try_from(bytes.get()).map_err(|_| FrozenError::Map(Errno::NOMEM))?;
        let len = len.next_multiple_of(pages.granule() as usize);
        let descriptor = rustix::io::fcntl_dupfd_cloexec(&self.descriptor, 0);
        let descriptor = descriptor.map_err(FrozenError::Map)?;
        let mapping = Mapping::adopted(descriptor, len, pages).map_err(FrozenError::Map)?;
        Ok(FrozenSlab {
            slab: Slab::adopted(mapping, bytes),
        })
    }

    /// Adds the seal that tells: the kernel refuses it while anybody has a way to write.
    fn seal(&self) -> Result<(), FrozenError> {
        let named = format!("/proc/self/fd/{}", self.descriptor.as_raw_fd());
        let refused = |error: std::io::Error| {
            FrozenError::Writable(Errno::from_io_error(&error).unwrap_or(Errno::IO))
        };
        // Seals can be added through a writable description alone, whatever can be written through it.
        let writable: File = OpenOptions::new()
            .read(true)
            .write(true)
            .open(named)
            .map_err(refused)?;
        rustix::fs::fcntl_add_seals(&writable, SealFlags::WRITE).map_err(FrozenError::Writable)?;
        // On an executable file, F_SEAL_EXEC has brought F_SEAL_WRITE with it on kernels that did not look for writers then.
        const SEAL_EXEC: u32 = 0x20;
        let seals = rustix::fs::fcntl_get_seals(&writable).map_err(FrozenError::Writable)?;
        let mode = rustix::fs::fstat(&writable)
            .map_err(FrozenError::Writable)?
            .st_mode;
        let by_the_way = seals.bits() & SEAL_EXEC != 0 && mode & 0o111 != 0;
        match seals.contains(SealFlags::WRITE) && !by_the_way {
            true => Ok(()),
            false => Err(FrozenError::Writable(Errno::PERM)),
        }
    }

    /// The pages that it lies on, all of which are there: a hole would have to be filled when it is read, and there may be
    /// nothing to fill it with.
    fn pages(&self, bytes: Bytes, there: Bytes) -> Result<Pages, FrozenError> {
        let found = rustix::fs::fstatfs(&self.descriptor).map_err(|_| FrozenError::NoSlab)?;
        #[expect(
            clippy::useless_conversion,
            reason = "its type differs between architectures"
        )]
        let kind = i64::from(found.f_type);
        match kind {
            HUGETLBFS => match self.held < there {
                true => Err(FrozenError::Hole),
                false => Ok(Pages::Hugetlb),
            },
            TMPFS => {
                let hole = rustix::fs::seek(&self.descriptor, SeekFrom::Hole(0));
                match hole.map_err(|_| FrozenError::Hole)? < bytes.get() {
                    true => Err(FrozenError::Hole),
                    false => Ok(Pages::Small),
                }
            }
            _ => Err(FrozenError::NoSlab),
        }
    }
}

/// Memory that nobody can write any more, mapped: its bytes are what they are, but not yet known to be a component's.
#[derive(Debug)]
pub struct FrozenSlab {
    slab: Arc<Slab>,
}

impl FrozenSlab {
    /// Its bytes.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        self.slab.filled()
    }

    /// The slab, for who has found that these bytes are what they should be.
    #[must_use]
    pub fn accept(self) -> Arc<Slab> {
        self.slab
    }
}

#[cfg(test)]
mod tests;
