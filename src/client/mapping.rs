//! Memory of the server, mapped read-only.

use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::{Mutex, OnceLock, PoisonError, Weak};

use rustix::fs::{SealFlags, fcntl_get_seals, fstat};
use rustix::mm::{MapFlags, ProtFlags};

use super::link::Link;
use crate::bridge::wire::{LeasedComponent, MappedMemory};

/// Which memory file, and which part of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
    offset: u64,
    bytes: u64,
}

impl Identity {
    pub(super) fn of(descriptor: &OwnedFd, offset: u64, bytes: u64) -> Option<Self> {
        let stat = fstat(descriptor).ok()?;
        Some(Self {
            device: stat.st_dev,
            inode: stat.st_ino,
            offset,
            bytes,
        })
    }
}

/// A read-only mapping of a slab. It stays valid when the server ends, and is unmapped when this is dropped.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
    identity: Option<Identity>,
    /// Shows the next server what is mapped.
    descriptor: OwnedFd,
    /// The component that was leased first in it, and the identity of its bytes.
    holds: OnceLock<(String, String)>,
    /// Where it is counted, and under which number, once its server is gone and another one was told.
    counted: Mutex<Option<(Weak<Link>, u64)>>,
}

// SAFETY: the mapping is read-only, owned by this value for its whole life, and tied to no thread.
unsafe impl Send for Mapping {}
// SAFETY: as above; nobody writes through it, so shared reads do not race.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `bytes` of a slab, from `offset`. Refuses what could shrink or be written under the mapping.
    pub(super) fn new(descriptor: OwnedFd, offset: u64, bytes: u64) -> Result<Self, String> {
        let needed = SealFlags::SHRINK | SealFlags::FUTURE_WRITE;
        let seals = fcntl_get_seals(&descriptor).map_err(|error| error.to_string())?;
        if !seals.contains(needed) {
            return Err("its memory is not sealed".into());
        }
        let there = fstat(&descriptor)
            .map_err(|error| error.to_string())?
            .st_size;
        let end = offset.checked_add(bytes);
        if end.is_none_or(|end| end > u64::try_from(there).unwrap_or(0)) || bytes == 0 {
            return Err(format!("{bytes} bytes from {offset} are not in its memory"));
        }
        let identity = Identity::of(&descriptor, offset, bytes);
        let bytes = usize::try_from(bytes).map_err(|error| error.to_string())?;
        // SAFETY: a new mapping at an address of the kernel's choice; the length is above zero, and the range lies in a memfd that is
        // sealed against shrinking, so no access can fault. Unmapped in `drop` alone.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ,
                MapFlags::SHARED,
                &descriptor,
                offset,
            )
        }
        .map_err(|error| error.to_string())?;
        let start = NonNull::new(start.cast()).ok_or("mmap gave no address")?;
        Ok(Self {
            start,
            bytes,
            identity,
            descriptor,
            holds: OnceLock::new(),
            counted: Mutex::default(),
        })
    }

    pub(super) fn is(&self, identity: Identity) -> bool {
        self.identity == Some(identity)
    }

    /// A component was leased in it.
    pub(super) fn leased(&self, leased: &LeasedComponent) {
        self.holds
            .get_or_init(|| (leased.component.clone(), leased.content.clone()));
    }

    /// What the next server is told of it. `None` where nothing was leased in it, or descriptors ran out.
    pub(super) fn told(&self) -> Option<(MappedMemory, OwnedFd)> {
        let (component, content) = self.holds.get()?.clone();
        let memory = MappedMemory {
            component,
            content,
            tier: "ram".into(),
            bytes: self.bytes as u64,
        };
        Some((memory, self.descriptor.try_clone().ok()?))
    }

    /// The server behind this connection counts it under this number.
    pub(super) fn counted(&self, link: Weak<Link>, number: u64) {
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        *counted = Some((link, number));
    }

    /// The bytes.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: the mapping lives as long as `self`, and the memory behind it is sealed against new writers; the server stops writing
        // before it leases.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`; no borrow of it can outlive this value.
        let unmapped = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.bytes) };
        if let Err(error) = unmapped {
            tracing::error!(%error, bytes = self.bytes, "munmap of a leased slab failed");
        }
        let counted = self.counted.get_mut();
        if let Some((link, number)) = counted.unwrap_or_else(PoisonError::into_inner).take()
            && let Some(link) = link.upgrade()
        {
            link.unmapped(number);
        }
    }
}
